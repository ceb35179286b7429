"""The model that the demo runs on: how it is asked, and how its replies are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Union

from .. import refusal
from ..extraction import Rendered, render
from ..plan import Plan
from ..replies import replies
from ..runtime.receipt import Receipt
from ..runtime.session import Session, steer
from .examples import Example

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""``with progress(label, total) as step: step(count)``."""
Question = tuple[Union[Plan, None], Sequence[Example]]
"""Prompts, and the plan under which they are asked."""


@dataclass(frozen=True)
class Subject:
    """The model that the demo runs on, and how it is asked and read."""

    model: Any
    tokenizer: Any
    source: str
    scorer: str = "prefix"
    new_tokens: int = 16
    batch_size: int = 256
    organism: bool = False
    """Whether it is the bundled one: its replies are fixed sentences, which may be shown and compared word for word."""
    progress: Progress = lambda label, total: nullcontext(lambda count: None)

    @property
    def template(self) -> str:
        """``chat``, or ``plain`` where the tokenizer has no chat template."""
        return "chat" if self.tokenizer.chat_template else "plain"

    @property
    def depth(self) -> int:
        """Number of decoder blocks."""
        return int(self.model.config.get_text_config().num_hidden_layers)

    @property
    def dtype(self) -> str:
        """Of the parameters, as ``float32``."""
        return str(self.model.dtype).removeprefix("torch.")

    def render(self, examples: Sequence[Example]) -> list[Rendered]:
        """The prompts as the model reads them."""
        return render(self.tokenizer, [example.prompt for example in examples], template=self.template)

    def refused(self, texts: Sequence[str]) -> float:
        """Share of replies that refuse."""
        return refusal.rate(self.scorer, texts)

    def ask(self, label: str, questions: Sequence[Question]) -> Answers:
        """Ask each group of prompts under its own plan, all in the same batches; without plans, no session."""
        prompts = [example for _, examples in questions for example in examples]
        plans = [plan for plan, _ in questions if plan is not None]
        rows = [None if plan is None else plan.name for plan, examples in questions for _ in examples]
        rendered = self.render(prompts)
        attached: AbstractContextManager[Session | None] = steer(self.model, plans) if plans else nullcontext()
        with self.progress(label, len(prompts)) as step, attached as session:
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
        for _, examples in questions:
            groups.append(texts[start : start + len(examples)])
            start += len(examples)
        return Answers(groups, receipt)


@dataclass(frozen=True)
class Answers:
    """Replies per group, and the receipt of the session that made them."""

    groups: list[list[str]]
    receipt: Receipt
