"""The model that a run is about: how it is asked, how its replies are read, and what is kept of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Union

from . import refusal
from .artifacts import Fingerprint
from .extraction import Prompt, Rendered, render
from .extraction.capture import check_prompts
from .kept import Kept
from .ops import dispatch
from .plan import Plan
from .replies import replies
from .report import Provenance
from .runtime.decoder import text_config
from .runtime.receipt import Receipt
from .runtime.session import Session, steer

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""``with progress(label, total) as step: step(count)``."""
Asked = Union[Prompt, Rendered]
"""A prompt, or one that was rendered in a way of its own."""
Question = tuple[Union[Plan, None], Sequence[Asked]]
"""Prompts, and the plan under which they are asked."""
AT_ONCE = 32
"""Plans that are asked in one session, so that its slot table holds them."""


@dataclass(frozen=True)
class Subject:
    """The model that a run is about, and how it is asked and read."""

    model: Any
    tokenizer: Any
    source: str
    scorer: str = "prefix"
    new_tokens: int = 16
    batch_size: int = 256
    organism: bool = False
    """Whether it is the bundled one: its replies are fixed sentences, which may be shown and compared word for word."""
    progress: Progress = lambda label, total: nullcontext(lambda count: None)
    kept: Kept | None = None
    """Where replies are kept, so that an interrupted run goes on where it stopped."""

    @property
    def template(self) -> str:
        """``chat``, or ``plain`` where the tokenizer has no chat template."""
        return "chat" if self.tokenizer.chat_template else "plain"

    @property
    def depth(self) -> int:
        """Number of decoder blocks."""
        return int(text_config(self.model).num_hidden_layers)

    @property
    def width(self) -> int:
        """Width ``H`` of the residual stream."""
        return int(text_config(self.model).hidden_size)

    @property
    def dtype(self) -> str:
        """Of the parameters, as ``float32``."""
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def backend(self) -> str:
        """What sessions on it run on."""
        return dispatch.resolve(None, self.model.device, self.model.dtype)

    @property
    def fingerprint(self) -> Fingerprint:
        """Family, width and depth."""
        return Fingerprint(str(self.model.config.model_type), self.width, self.depth)

    def render(self, prompts: Sequence[Asked]) -> list[Rendered]:
        """The prompts as the model reads them."""
        plain = [prompt for prompt in prompts if not isinstance(prompt, Rendered)]
        made = iter(render(self.tokenizer, plain, template=self.template) if plain else ())
        return [prompt if isinstance(prompt, Rendered) else next(made) for prompt in prompts]

    def check(self, *sets: Sequence[Asked]) -> None:
        """Raise ValueError unless the model can read every prompt and has room for a reply: before long work begins."""
        limit = getattr(text_config(self.model), "max_position_embeddings", None)
        for prompts in sets:
            rendered = self.render(prompts)
            check_prompts(self.model, rendered)
            longest = max(len(prompt.ids) for prompt in rendered)
            if isinstance(limit, int) and longest + self.new_tokens > limit:
                room = f"leaves no room for {self.new_tokens} more: the model has {limit} positions"
                raise ValueError(f"a prompt of {longest} tokens {room}")

    def refused(self, texts: Sequence[str]) -> float:
        """Share of replies that refuse."""
        return refusal.rate(self.scorer, texts)

    def ask(self, label: str, questions: Sequence[Question]) -> Answers:
        """Ask each group of prompts under its own plan, all in the same batches; without plans, no session."""
        plans = [plan for plan, _ in questions if plan is not None]
        rendered = self.render([prompt for _, prompts in questions for prompt in prompts])
        rows = [None if plan is None else plan.name for plan, prompts in questions for _ in prompts]
        attached: AbstractContextManager[Session | None] = steer(self.model, plans) if plans else nullcontext()
        with self.progress(label, len(rendered)) as step, attached as session:
            texts = replies(
                self.model,
                self.tokenizer,
                rendered,
                max_new_tokens=self.new_tokens,
                batch_size=self.batch_size,
                session=session,
                rows=rows if plans else None,
                step=step,
            )
            receipt = Receipt({}) if session is None else session.receipt()
        groups, start = [], 0
        for _, prompts in questions:
            groups.append(texts[start : start + len(prompts)])
            start += len(prompts)
        return Answers(groups, receipt)

    def replies(self, label: str, questions: Sequence[Question]) -> list[list[str]]:
        """Replies per group as :meth:`ask` gives them, any number of plans, and those that are :attr:`kept` not again.

        Plans need no names of their own here.
        """
        groups: list[list[str] | None] = [None] * len(questions)
        keys = [self._key(plan, prompts) for plan, prompts in questions]
        if self.kept is not None:
            groups = [self.kept.get(key) for key in keys]
        open_ = [i for i, found in enumerate(groups) if found is None]
        for start in range(0, len(open_), AT_ONCE):
            some = open_[start : start + AT_ONCE]
            asked: list[Question] = []
            for i in some:
                plan, prompts = questions[i]
                asked.append((None if plan is None else plan.named(f"{plan.name[:100]} {i}"), prompts))
            for i, texts in zip(some, self.ask(label, asked).groups, strict=True):
                groups[i] = texts
                if self.kept is not None:
                    self.kept.put(keys[i], texts)
        return [group for group in groups if group is not None]

    def refusals(self, label: str, questions: Sequence[Question]) -> list[float]:
        """Share refused per group."""
        return [self.refused(texts) for texts in self.replies(label, questions)]

    def provenance(
        self, command: str, prompts: Mapping[str, Sequence[Asked]], *, backend: str, seed: int | None = None
    ) -> Provenance:
        """What one must know to repeat a run of ``command`` on sets of prompts by name."""
        return Provenance.of(
            command,
            source=self.source,
            fingerprint=self.fingerprint,
            dtype=self.dtype,
            device=str(self.model.device),
            backend=backend,
            seed=seed,
            scorer=refusal.get(self.scorer).label,
            prompts={name: list(map(request, some)) for name, some in prompts.items()},
        )

    def _key(self, plan: Plan | None, prompts: Sequence[Asked]) -> str:
        if self.kept is None:
            return ""
        ids = [prompt.ids for prompt in self.render(prompts)]
        return self.kept.key([None if plan is None else plan.digest, ids, self.new_tokens])


@dataclass(frozen=True)
class Answers:
    """Replies per group, and the receipt of the session that made them."""

    groups: list[list[str]]
    receipt: Receipt


def request(prompt: Asked) -> str:
    """A prompt as text, to tell it from others: the user's words, the whole conversation, or what was rendered."""
    if isinstance(prompt, Rendered):
        return prompt.text
    if isinstance(prompt, str):
        return prompt
    return prompt[-1]["content"] if len(prompt) == 1 else json.dumps(list(map(dict, prompt)))
