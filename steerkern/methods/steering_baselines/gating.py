"""CAST (arXiv 2409.05907): behaviour and condition vectors, the search for a threshold, the conditional plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...decisions import Latch, Read, Term, cast
from ...edits import add
from ...extraction import Prompt, capture, instruction_offset, states
from ...plan import Plan
from ...steps import Scope
from ...subject import Subject
from .constructions import component

Token = Literal["mean", "t_inst", "t_post"]
TOKENS: tuple[Token, ...] = ("mean", "t_inst", "t_post")


@dataclass(frozen=True, eq=False)
class Gate:
    """A condition that was searched for: its vector ``[H]``, layer, token, threshold and side, and its F1.

    ``token`` is that of a :class:`~steerkern.decisions.Read`: ``"mean"``, or counted from the prompt's end.
    """

    vector: Tensor
    layer: int
    token: int | Literal["mean"]
    threshold: float
    fires: Literal["above", "below"]
    f1: float

    @property
    def where(self) -> str:
        """The token in words."""
        return "mean of the prompt" if self.token == "mean" else f"token {self.token}"

    def latch(self) -> Latch:
        """The condition as a plan takes it, decided once per request."""
        return Latch((cast(self.vector, self.layer, self.threshold, fires=self.fires, token=self.token),))

    def opens(self, subject: Subject, prompts: Sequence[Prompt]) -> Tensor:
        """Whether each prompt passes, bool ``[N]``."""
        return self.latch().opens(_read(subject, prompts, self.token)[:, self.layer, None])


def similarity(states: Tensor, vector: Tensor) -> Tensor:
    """``cos(m, tanh(P m)) [N]`` of states ``[N, H]``: never negative, near ``|cos(m, c)|`` for small states."""
    return Term(Read(0), vector, measure="cast").value(states)


def search(
    subject: Subject,
    positive: Sequence[Prompt],
    negative: Sequence[Prompt],
    *,
    shift: int = 1,
    layers: Sequence[int] | None = None,
    tokens: Sequence[Token] = TOKENS,
) -> Gate:
    """The layer, token, threshold and side with the highest F1 on ``positive`` (to fire) and ``negative`` prompts.

    The vector is the first principal component of pairwise centred states. The published code takes it from the
    *outputs* of block ``l`` and uses it at the input of block ``l``: ``shift=1``; with 0, both are the input. It reads
    the mean of the prompt or its last token; the instruction's last token is tried too.
    """
    best: Gate | None = None
    for named in tokens:
        token = _token(subject, positive, named)
        sides = [_read(subject, side, token) for side in (positive, negative)]
        count = min(map(len, sides))
        for layer in range(1, subject.depth) if layers is None else layers:
            vector = component(sides[0][:count, layer + shift], sides[1][:count, layer + shift])
            f1, threshold, fires = _threshold(*(similarity(side[:, layer], vector) for side in sides))
            if best is None or f1 > best.f1:
                best = Gate(vector, layer, token, threshold, fires, f1)
    assert best is not None
    return best


def conditional(
    vector: Tensor,
    layers: Sequence[int],
    gate: Gate,
    strength: float = 1.5,
    *,
    scope: Scope = "all",
    name: str = "cast",
) -> Plan:
    """``h += strength v`` at ``resid_pre`` of ``layers``, on every token of requests whose prompt passes the gate.

    The decision is there before the prompt runs (it runs ahead to the layer that is read); with scope ``decode`` it is
    read on the way, and the prompt's keys and the first token stay plain.
    """
    return Plan(add(vector, strength), layers=list(layers), scope=scope, latch=gate.latch(), name=name)


def _token(subject: Subject, prompts: Sequence[Prompt], token: Token) -> int | Literal["mean"]:
    if token == "mean":
        return "mean"
    return -1 if token == "t_post" else instruction_offset(subject.render(prompts))


def _read(subject: Subject, prompts: Sequence[Prompt], token: int | Literal["mean"]) -> Tensor:
    if token == "mean":
        return prompt_means(subject, prompts)
    read = states(subject.model, subject.render(prompts), (token,), batch_size=subject.batch_size, progress=False)
    return read[:, :, 0].float()


def prompt_means(subject: Subject, prompts: Sequence[Prompt]) -> Tensor:
    """Mean over the prompt's tokens, ``[N, L+1, H]`` float32; rows as in :func:`~steerkern.extraction.states`."""
    rendered = subject.render(prompts)
    made = torch.empty(len(rendered), subject.depth + 1, subject.width)
    by_length: dict[int, list[int]] = {}
    for i, prompt in enumerate(rendered):
        by_length.setdefault(len(prompt.ids), []).append(i)
    for length, numbers in by_length.items():
        some = [rendered[i] for i in numbers]
        for batch in capture(
            subject.model, some, list(range(-length, 0)), batch_size=subject.batch_size, progress=False
        ):
            at = [numbers[i] for i in batch.prompts]
            made[at] = batch.states.float().mean(2).transpose(0, 1)
    return made


def _threshold(positive: Tensor, negative: Tensor) -> tuple[float, float, Literal["above", "below"]]:
    """Best F1, threshold and side, over the middles between neighbouring scores."""
    every = torch.cat([positive, negative]).sort().values.unique()
    middles = (every[1:] + every[:-1]) / 2 if len(every) > 1 else every
    best: tuple[float, float, Literal["above", "below"]] = (-1.0, 0.5, "above")
    sides: tuple[Literal["above", "below"], ...] = ("above", "below")
    for threshold in middles.clamp(1e-6, 1 - 1e-6).tolist():
        for side in sides:
            hit = (positive >= threshold) if side == "above" else (positive <= threshold)
            wrong = (negative >= threshold) if side == "above" else (negative <= threshold)
            true = float(hit.sum())
            score = 2 * true / (true + float(wrong.sum()) + len(positive)) if true else 0.0
            if score > best[0]:
                best = (score, threshold, side)
    return best
