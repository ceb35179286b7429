"""The model's own thinking to prompts, closed by its marker, as token ids that are read again."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ... import refusal
from ...extraction import Prompt, Rendered, render
from ...extraction.capture import check_prompts
from ...markers import marker
from ...replies import encode
from ...runtime.decoder import text_config
from ...steps import Marker
from ...subject import Subject

SHORTEST = 10
"""Thoughts of so few characters are none."""
REFUSING = re.compile(r"refus|declin|can(no|')t|can not|won't|will not|should(n't| not)|unable to|not able to", re.I)
"""Words by which a thought plans to refuse."""


@dataclass(frozen=True)
class Thinking:
    """How the model is asked: what closes a thought, its length in tokens at most, temperature (0: greedy) and seed."""

    marker: str = "</think>"
    most: int = 1024
    temperature: float = 0.7
    seed: int = 0

    def __post_init__(self) -> None:
        if self.most < 1:
            raise ValueError(f"a thought must have room for at least 1 token, got {self.most}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"the temperature must be a number from 0, got {self.temperature}")


@dataclass(frozen=True)
class Trace:
    """A prompt with the thought that the model wrote, up to its marker and the white space behind it.

    Tokens ``[0, start)`` are the prompt, ``[start, close)`` the thought, ``[close, len(ids))`` the marker.
    """

    prompt: Prompt
    text: str
    """The prompt as the model reads it."""
    ids: tuple[int, ...]
    start: int
    close: int
    thought: str
    tail: str
    """The white space behind the marker."""
    answer: str
    refused: bool

    @property
    def plans_refusal(self) -> bool:
        """Whether the thought has words of refusal."""
        return bool(REFUSING.search(self.thought))


def ask(subject: Subject, prompts: Sequence[Prompt], how: Thinking) -> list[Rendered]:
    """The prompts with the generation header, in the template's thinking mode where it has one.

    Raises:
        ValueError: prompts that the model cannot read, or that leave no room for a thought.
    """
    options = {"enable_thinking": True} if subject.template == "chat" else None
    rendered = render(subject.tokenizer, prompts, template=subject.template, options=options)
    check_prompts(subject.model, rendered)
    for i, prompt in enumerate(rendered):
        if _room(subject, len(prompt.ids)) < 1:
            limit = text_config(subject.model).max_position_embeddings
            raise ValueError(
                f"prompt {i} has {len(prompt.ids)} tokens, the model has {limit} positions: no room for a thought and "
                f"{subject.new_tokens} tokens of answer"
            )
    return rendered


def think(subject: Subject, label: str, prompts: Sequence[Prompt], how: Thinking) -> list[Trace]:
    """The closed thoughts of the model to ``prompts``; those that it does not close are left out.

    Raises:
        ValueError: the marker is in none of the first batch's replies, or the prompts are such as :func:`ask` refuses.
        PlanError: the tokenizer has no tokens for the marker.
    """
    closing = marker(subject.tokenizer, how.marker)
    rendered = ask(subject, prompts, how)
    replies = write(subject, label, rendered, how)
    made = [
        _close(subject, prompt, before, reply, closing)
        for prompt, before, reply in zip(prompts, rendered, replies, strict=True)
    ]
    return [trace for trace in made if trace is not None]


def write(
    subject: Subject, label: str, rendered: Sequence[Rendered], how: Thinking, under: object = None
) -> list[list[int]]:
    """Token ids of thought and answer, without what ends them; ``under`` names how the model is changed meanwhile.

    Raises:
        ValueError: the model as it is (``under`` is None) closes no thought in the whole first batch.
    """
    kept = subject.kept
    key = (
        "" if kept is None else kept.key([asdict(how), subject.new_tokens, under, [prompt.ids for prompt in rendered]])
    )
    if kept is not None and (known := kept.get(key)) is not None:
        return [list(map(int, ids)) for ids in known]
    closing = marker(subject.tokenizer, how.marker)
    made: list[list[int]] = []
    with subject.progress(label, len(rendered)) as step, torch.random.fork_rng():
        torch.manual_seed(how.seed)
        for start in range(0, len(rendered), subject.batch_size):
            batch = rendered[start : start + subject.batch_size]
            made += _generate(subject, batch, how, closing)
            if start == 0 and under is None and not any(_find(ids, closing) for ids in made):
                raise ValueError(
                    f"the thinking marker {how.marker!r} is in none of the first {len(made)} replies (thoughts of up "
                    f"to {how.most} tokens): is this a thinking model, and is this its marker?"
                )
            step(len(batch))
    if kept is not None:
        kept.put(key, made)
    return made


def answers(subject: Subject, replies: Sequence[Sequence[int]], how: Thinking) -> list[str]:
    """What follows the thought in each reply; "" where it is not closed."""
    closing = marker(subject.tokenizer, how.marker)
    found = [(ids, _find(ids, closing)) for ids in replies]
    return [_text(subject.tokenizer, ids[at[1] :]).strip() if at else "" for ids, at in found]


def _room(subject: Subject, used: int) -> int:
    limit = getattr(text_config(subject.model), "max_position_embeddings", None)
    return limit - used - subject.new_tokens if isinstance(limit, int) else 1 << 30


def _generate(subject: Subject, batch: Sequence[Rendered], how: Thinking, closing: Marker) -> list[list[int]]:
    inputs = encode(subject.model, batch)
    width = inputs["input_ids"].shape[1]
    sampling: dict[str, Any] = {"do_sample": False}
    if how.temperature > 0:
        sampling = {"do_sample": True, "temperature": how.temperature, "top_k": 0, "top_p": 1.0}
    with torch.no_grad():
        out = subject.model.generate(
            **inputs,
            **sampling,
            max_new_tokens=min(how.most, _room(subject, width)) + subject.new_tokens,
            stopping_criteria=[_Answered(closing, width, subject.new_tokens)],
        )
    ends = subject.model.generation_config.eos_token_id
    ending = {inputs["pad_token_id"], *(ends if isinstance(ends, (list, tuple)) else [ends])}
    return [_until(ids, ending) for ids in out[:, width:].tolist()]


class _Answered:
    """Ends a row when so many tokens follow its marker."""

    def __init__(self, closing: Marker, width: int, tokens: int) -> None:
        self.closing, self.width, self.tokens = closing, width, tokens

    def __call__(self, ids: Tensor, scores: Tensor, **others: Any) -> Tensor:
        written = ids[:, self.width : ids.shape[1] - self.tokens]
        done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        for sequence in self.closing:
            if written.shape[1] >= len(sequence):
                wanted = torch.tensor(sequence, device=ids.device)
                done |= (written.unfold(1, len(sequence), 1) == wanted).all(-1).any(-1)
        return done


def _close(subject: Subject, prompt: Prompt, before: Rendered, reply: list[int], closing: Marker) -> Trace | None:
    found = _find(reply, closing)
    if found is None:
        return None
    first, end = found
    thought = _text(subject.tokenizer, reply[:first])
    if len(thought.strip()) <= SHORTEST:
        return None
    behind = end
    while behind < len(reply) and _text(subject.tokenizer, reply[behind : behind + 1]).isspace():
        behind += 1
    tail, answer = (_text(subject.tokenizer, some) for some in (reply[end:behind], reply[behind:]))
    (refused,) = refusal.score(subject.scorer, [answer])
    ids, start = (*before.ids, *reply[:behind]), len(before.ids)
    return Trace(prompt, before.text, ids, start, start + first, thought, tail, answer.strip(), refused)


def _find(ids: Sequence[int], closing: Marker) -> tuple[int, int] | None:
    """First and last token (exclusive) of the first marker."""
    places = [
        (at, at + len(sequence))
        for sequence in closing
        for at in range(len(ids) - len(sequence) + 1)
        if tuple(ids[at : at + len(sequence)]) == tuple(sequence)
    ]
    return min(places, default=None)


def _until(ids: list[int], ending: set[Any]) -> list[int]:
    return ids[: next((i for i, token in enumerate(ids) if token in ending), len(ids))]


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(list(ids), skip_special_tokens=True)
    return text
