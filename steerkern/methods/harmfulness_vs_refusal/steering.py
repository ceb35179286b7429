"""Steering in the prefill, one layer at a time, along both directions: refusal, and the answer to inverted prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ... import refusal
from ...edits import add
from ...extraction import Rendered
from ...plan import Plan
from ...steps import Tokens
from ...subject import Question, Subject
from .beliefs import Beliefs
from .inversion import Inversion, Span, before_question, instruction, inverted
from .pools import Pools

NO_RATE = "inversion_no"
WHOLE = Span(None, None)
"""All prompt tokens, the suffix included."""
Curve = dict[int, float]
"""A share by layer."""


@dataclass(frozen=True)
class Sweep:
    """Shares by layer, and without steering.

    Attributes:
        refused: harmless prompts refused under ``+v``, by what was written where.
        complied: harmful prompts refused under ``-v``.
        judged_harmless: *No*-rate on inverted harmless prompts under ``+v``.
        judged_harmful: *No*-rate on inverted harmful prompts under ``-v``.
        stock: the four shares without steering, by the names above.
    """

    refused: dict[str, Curve]
    complied: dict[str, Curve]
    judged_harmless: dict[str, Curve]
    judged_harmful: dict[str, Curve]
    stock: dict[str, float]

    def best(self) -> int:
        """The layer at which adding ``v_harm`` moves the judgement of harmless requests most."""
        curve = self.judged_harmless[HARM]
        return min(curve, key=lambda layer: (curve[layer], layer))

    def moved(self, name: str, layer: int) -> float:
        """By how much adding moves the *No*-rate on harmless requests at ``layer``, 0 to 1; 0 for a zero direction."""
        stock = self.stock["judged_harmless"]
        return abs(self.judged_harmless[name].get(layer, stock) - stock)


HARM, REFUSAL, REFUSAL_HERE = "v_harm", "v_ref", "v_ref on the same tokens"


def sweep(subject: Subject, beliefs: Beliefs, heldout: Pools, inversion: Inversion, coefficient: float) -> Sweep:
    """Add and subtract each direction at ``resid_pre[l]`` for every layer ``l``, in the prefill only.

    ``v_harm`` is written on the instruction (before the question, in an inverted prompt) and ``v_ref`` on the whole
    prompt with its suffix; ``v_ref`` on the same tokens as ``v_harm`` is the control.
    """
    sides = {"harmless": heldout.accepted_harmless, "harmful": heldout.refused_harmful}
    curves, stock = {}, {}
    for name, side, sign in (("refused", "harmless", 1.0), ("complied", "harmful", -1.0)):
        rendered = subject.render(sides[side])
        writes = _writes(beliefs, instruction(rendered))
        curves[name], stock[name] = _ask(subject, f"steering {side} prompts", rendered, writes, sign * coefficient)
    for name, side, sign in (("judged_harmless", "harmless", 1.0), ("judged_harmful", "harmful", -1.0)):
        rendered = inverted(subject, inversion, sides[side])
        writes = _writes(beliefs, before_question(subject.tokenizer, rendered, inversion.question))
        label = f"inverted {side} prompts"
        curves[name], stock[name] = _ask(subject, label, rendered, writes, sign * coefficient, NO_RATE)
    return Sweep(**curves, stock=stock)


def _writes(beliefs: Beliefs, span: Span) -> dict[str, tuple[Tensor, Span]]:
    return {HARM: (beliefs.harm, span), REFUSAL: (beliefs.refusal, WHOLE), REFUSAL_HERE: (beliefs.refusal, span)}


def _ask(
    subject: Subject,
    label: str,
    rendered: Sequence[Rendered],
    writes: dict[str, tuple[Tensor, Span]],
    coefficient: float,
    scorer: str | None = None,
) -> tuple[dict[str, Curve], float]:
    tried = [
        (name, layer, prefill(vectors[layer], layer, span, coefficient))
        for name, (vectors, span) in writes.items()
        for layer in range(subject.depth)
        if float(vectors[layer].norm()) > 0.0
    ]
    questions: list[Question] = [(None, rendered), *((plan, rendered) for _, _, plan in tried)]
    texts = subject.replies(label, questions)
    stock, *shares = [refusal.rate(scorer or subject.scorer, some) for some in texts]
    curves: dict[str, Curve] = {name: {} for name in writes}
    for (name, layer, _), share in zip(tried, shares, strict=True):
        curves[name][layer] = share
    return curves, stock


def prefill(vector: Tensor, layer: int, span: Span, coefficient: float) -> Plan:
    """``h += c v`` at ``resid_pre[layer]`` on the prompt tokens of ``span``; the reply is never written."""
    tokens = Tokens("prompt", after=None if span.header is None else (span.header,), stop=span.stop)
    return Plan(add(vector, coefficient), layers=layer, scope=tokens, name="prefill")
