"""What the edits do to held-out prompts: refusal before and after, and against strength."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..edits import ablate, add, clamp
from ..plan import Plan
from ..report import Column, Line, Panel, Plot, Table
from ..runtime.receipt import PlanReceipt
from .examples import Example, Examples
from .layers import Found
from .subject import Subject


def edit(subject: Subject, found: Found, heldout: Examples, seed: int) -> tuple[Table, Table | None]:
    """Refusal rates before and after each edit on held-out prompts; the second table shows replies, where they are tame."""
    at, layer = found.directions[found.layer], found.layer
    random_unit = torch.nn.functional.normalize(torch.randn(at.raw.numel(), generator=torch.Generator().manual_seed(seed)), dim=0)
    trials: list[tuple[str, Plan, str]] = [
        ("ablate at every layer", Plan(ablate(at.unit), name="ablate"), "harmful"),
        (f"subtract at layer {layer}", Plan(add(at, -1.0), layers=layer, name="subtract"), "harmful"),
        (f"clamp to the harmless mean, layer {layer}", Plan(clamp(at.unit, found.harmless_mean[layer]), layers=layer, name="clamp down"), "harmful"),
        (f"add at layer {layer}", Plan(add(at), layers=layer, name="add"), "harmless"),
        (f"clamp to the harmful mean, layer {layer}", Plan(clamp(at.unit, found.harmful_mean[layer]), layers=layer, name="clamp up"), "harmless"),
        ("side effect: ablate at every layer", Plan(ablate(at.unit), name="ablate harmless"), "harmless"),
        ("control: ablate a random direction", Plan(ablate(random_unit), name="ablate random"), "harmful"),
        (f"control: add a random one, layer {layer}", Plan(add(random_unit * at.norm), layers=layer, name="add random"), "harmless"),
    ]  # fmt: skip
    bare = subject.ask("held-out prompts", [(None, heldout.harmful), (None, heldout.harmless)]).groups
    before = dict(zip(("harmful", "harmless"), bare, strict=True))
    answers = subject.ask("held-out prompts, edited", [(plan, getattr(heldout, side)) for _, plan, side in trials])
    rows = []
    for (title, plan, side), texts in zip(trials, answers.groups, strict=True):
        receipt = answers.receipt[plan.name]
        rows.append(
            {
                "edit": title,
                "prompts": f"{len(texts)} {side}",
                "before": subject.refused(before[side]),
                "after": subject.refused(texts),
                "exact": _exact(getattr(heldout, side), texts),
                "tokens": receipt.tokens,
                "sites": _sites(receipt),
            }
        )
    columns = [Column("edit", "edit"), Column("prompts", "prompts"), Column("before", "refused before", ".0%"), Column("after", "after", ".0%")]
    if subject.organism:
        columns.append(Column("exact", "word for word", ".0%"))
    columns += [Column("tokens", "receipt: tokens", ","), Column("sites", "at sites")]
    note = "All edits ran in the same batches of one session, each row with its own plan."
    if subject.organism:
        note += " Word for word: replies that are exactly the refusal or the compliance that the prompt should get."
    effects = Table("effects", "Refusal on held-out prompts", tuple(columns), tuple(rows), note)
    if not subject.organism:
        return effects, None
    shown = [("stock", "harmful", before["harmful"]), ("ablate", "harmful", answers.groups[0])]
    shown += [("stock", "harmless", before["harmless"]), ("add", "harmless", answers.groups[3])]
    lines = [{"prompt": getattr(heldout, side)[0].text, "edit": name, "reply": texts[0].strip()} for name, side, texts in shown]
    titles = (Column("prompt", "prompt"), Column("edit", "edit"), Column("reply", "reply"))
    return effects, Table("replies", "Two of these prompts", titles, tuple(lines))


def _exact(examples: Sequence[Example], texts: Sequence[str]) -> float | None:
    """Share of replies that are word for word the refusal or the compliance of their prompt."""
    hits = [text.strip() in (e.refusing, e.complying) for e, text in zip(examples, texts, strict=True) if e.refusing]
    return sum(hits) / len(hits) if hits else None


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
    for kind, build, prompts in kinds:
        asked = [(build(s, f"{kind} {i}") if s else None, prompts) for i, s in enumerate(strengths)]
        rates = [subject.refused(texts) for texts in subject.ask(f"strengths: {kind}", asked).groups]
        curves[kind] = {"strength": strengths, "refused": rates}
    return curves


def _sites(receipt: PlanReceipt) -> str:
    sites = receipt.sites
    return str(sites[0]) if len(sites) == 1 else f"{sites[0]} to {sites[-1]}"


def strength_plot(subject: Subject, found: Found, curves: dict[str, dict[str, list[float]]]) -> Plot:
    """The refusal rates of :func:`sweep`."""

    def line(label: str, kind: str) -> Line:
        return Line(label, tuple(curves[kind]["strength"]), tuple(curves[kind]["refused"]))

    layer = found.layer
    unit = "strength (1 = the distance of the class means)"
    harmless = (line(f"direction added at layer {layer}", "add"),)
    harmful = (line(f"direction subtracted at layer {layer}", "subtract"), line("direction ablated in part, every layer (1 = removed)", "ablate"))
    return Plot(
        "refusal-strength",
        f"Refusal against strength, held-out prompts ({subject.source})",
        (
            Panel("Harmless prompts", unit, "prompts refused", harmless, share=True),
            Panel("Harmful prompts", "strength", "prompts refused", harmful, share=True),
        ),
    )
