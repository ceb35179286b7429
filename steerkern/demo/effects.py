"""What the edits do to held-out prompts: refusal before and after, and against strength."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..edits import ablate, add, clamp
from ..plan import Plan
from ..plots import Line, Panel, Plot
from ..report import Column, Row, Table
from ..runtime.receipt import PlanReceipt
from ..subject import Answers, Subject
from .examples import Example, Examples, prompts
from .layers import Found


class Trial(NamedTuple):
    """One edit and the side of the prompts that it is tried on."""

    title: str
    plan: Plan
    side: str


@dataclass(frozen=True)
class Effects:
    """Replies of the stock model and under every trial, to the same prompts."""

    heldout: Examples
    trials: tuple[Trial, ...]
    stock: Answers
    edited: Answers

    def before(self, side: str) -> list[str]:
        """Replies of the stock model to one side."""
        return self.stock.groups[("harmful", "harmless").index(side)]


def trials(found: Found, seed: int) -> tuple[Trial, ...]:
    """Every edit that should flip refusal, one that should not, and two along a random direction of the same norm."""
    at, layer = found.directions[found.layer], found.layer
    noise = torch.randn(at.raw.numel(), generator=torch.Generator().manual_seed(seed))
    noise = noise / noise.norm() * at.norm
    up, down = clamp(at.unit, found.harmful_mean[layer]), clamp(at.unit, found.harmless_mean[layer])
    return (
        Trial("ablate", Plan(ablate(at.unit), name="ablate"), "harmful"),
        Trial("subtract", Plan(add(at, -1.0), layers=layer, name="subtract"), "harmful"),
        Trial("clamp to harmless mean", Plan(down, layers=layer, name="clamp down"), "harmful"),
        Trial("add", Plan(add(at), layers=layer, name="add"), "harmless"),
        Trial("clamp to harmful mean", Plan(up, layers=layer, name="clamp up"), "harmless"),
        Trial("side effect: ablate", Plan(ablate(at.unit), name="ablate harmless"), "harmless"),
        Trial("control: ablate at random", Plan(ablate(noise), name="ablate random"), "harmful"),
        Trial("control: add at random", Plan(add(noise), layers=layer, name="add random"), "harmless"),
    )


def edit(subject: Subject, found: Found, heldout: Examples, seed: int) -> Effects:
    """Ask the held-out prompts without steering, then under every trial in the same batches."""
    tried = trials(found, seed)
    stock = subject.ask("held-out prompts", [(None, prompts(heldout.harmful)), (None, prompts(heldout.harmless))])
    edited = subject.ask("held-out prompts, edited", [(t.plan, prompts(getattr(heldout, t.side))) for t in tried])
    return Effects(heldout, tried, stock, edited)


def effect_table(subject: Subject, found: Found, effects: Effects) -> Table:
    """Refusal rates before and after every edit."""
    rows: list[Row] = [
        {
            "edit": trial.title,
            "side": trial.side,
            "prompts": len(texts),
            "before": subject.refused(effects.before(trial.side)),
            "after": subject.refused(texts),
            "exact": _exact(getattr(effects.heldout, trial.side), texts),
        }
        for trial, texts in zip(effects.trials, effects.edited.groups, strict=True)
    ]
    columns = [
        Column("edit", "edit"),
        Column("side", "prompts"),
        Column("prompts", "n"),
        Column("before", "refused", ".0%"),
        Column("after", "edited", ".0%"),
    ]
    note = (
        f"Share of replies that refuse. Ablation at every layer, the other edits at layer {found.layer}; at random: a "
        "random direction of the same norm. All edits ran in the same batches, each row under its own plan."
    )
    if subject.organism:
        columns.append(Column("exact", "word for word", ".0%"))
        note += " Word for word: edited replies that are exactly one of the two sentences the model was trained to say."
    return Table("effects", "Refusal on held-out prompts", tuple(columns), tuple(rows), note)


def receipt_table(effects: Effects) -> Table:
    """What the session says it wrote."""
    receipts = effects.edited.receipt.plans.values()
    rows: list[Row] = [{"plan": r.name, "tokens": r.tokens, "rows": len(r.rows), "sites": _sites(r)} for r in receipts]
    columns = (Column("plan", "plan"), Column("tokens", "tokens written", ","), Column("sites", "at"))
    return Table("receipt", "The session's receipt", columns, tuple(rows))


def reply_table(effects: Effects) -> Table:
    """The first harmful and the first harmless prompt, with their replies."""
    by_plan = {trial.plan.name: texts for trial, texts in zip(effects.trials, effects.edited.groups, strict=True)}
    shown = [
        ("harmful", "none", effects.before("harmful")),
        ("harmful", "ablate", by_plan["ablate"]),
        ("harmless", "none", effects.before("harmless")),
        ("harmless", "add", by_plan["add"]),
    ]
    rows: list[Row] = [
        {"prompt": getattr(effects.heldout, side)[0].text, "edit": name, "reply": texts[0].strip()}
        for side, name, texts in shown
    ]
    columns = (Column("prompt", "prompt"), Column("edit", "edit"), Column("reply", "reply"))
    return Table("replies", "Two of these prompts", columns, tuple(rows))


def sweep(subject: Subject, found: Found, heldout: Examples, points: int) -> dict[str, dict[str, list[float]]]:
    """Refusal rate against strength: adding on harmless prompts, subtracting and partial ablation on harmful ones."""
    at, layer = found.directions[found.layer], found.layer
    strengths = [1.5 * i / (points - 1) for i in range(points)]
    kinds: list[tuple[str, Callable[[float, str], Plan], tuple[Example, ...]]] = [
        ("add", lambda s, name: Plan(add(at, s), layers=layer, name=name), heldout.harmless),
        ("subtract", lambda s, name: Plan(add(at, -s), layers=layer, name=name), heldout.harmful),
        ("ablate", lambda s, name: Plan(ablate(at.unit, s), name=name), heldout.harmful),
    ]
    curves = {}
    for kind, build, side in kinds:
        questions = [(build(s, f"{kind} {i}") if s else None, prompts(side)) for i, s in enumerate(strengths)]
        rates = [subject.refused(texts) for texts in subject.ask(f"strengths: {kind}", questions).groups]
        curves[kind] = {"strength": strengths, "refused": rates}
    return curves


def strength_plot(subject: Subject, found: Found, curves: dict[str, dict[str, list[float]]]) -> Plot:
    """The refusal rates of :func:`sweep`."""

    def line(label: str, kind: str) -> Line:
        return Line(label, tuple(curves[kind]["strength"]), tuple(curves[kind]["refused"]))

    layer = found.layer
    harmless = (line(f"c · direction added, layer {layer}", "add"),)
    harmful = (
        line(f"c · direction subtracted, layer {layer}", "subtract"),
        line("share c of the coordinate ablated, every layer", "ablate"),
    )
    return Plot(
        "refusal-strength",
        f"Refusal against strength, held-out prompts: {subject.source}",
        (
            Panel("Harmless prompts", "strength c", "prompts refused", harmless, share=True),
            Panel("Harmful prompts", "strength c", "prompts refused", harmful, share=True),
        ),
        "c = 1 adds the whole difference of the class means, or ablates the direction completely.",
    )


def _exact(examples: Sequence[Example], texts: Sequence[str]) -> float | None:
    """Share of replies that are word for word the refusal or the compliance of their prompt."""
    hits = [text.strip() in (e.refusing, e.complying) for e, text in zip(examples, texts, strict=True) if e.refusing]
    return sum(hits) / len(hits) if hits else None


def _sites(receipt: PlanReceipt) -> str:
    sites = receipt.sites
    return str(sites[0]) if len(sites) == 1 else f"{sites[0]} to {sites[-1]}, {len(sites)} sites"
