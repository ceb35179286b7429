"""The report: scores by group, heads, ablations, chosen items, and their pictures."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...plots import HeatMap, Line, Panel, Plot
from ...report import Column, Report, Row, Table
from ...runtime.heads import Head
from ...subject import Subject
from ..sets import Sets
from .cliffs import PRESETS, cliff, ending, trajectory
from .judge import Selection
from .prober import Probe
from .suppressors import Ablation, Ablations, ranked
from .traces import Thinking, Trace

LISTED = 16
"""Heads in the table."""
TRUSTED = 0.9
"""Validation accuracy from which on the prober's scores mean something."""
SHOWN = 16
"""Tokens in the picture of the end."""
Group = tuple[list[Trace], list[Tensor]]


@dataclass(frozen=True)
class Found:
    """What a run found; ``held`` are held-out traces of harmful and harmless prompts, ``tracks`` their scores."""

    preset: str
    how: Thinking
    probe: Probe
    attribution: dict[Head, float]
    ablations: Ablations
    chosen: Selection
    held: tuple[list[Trace], list[Trace]]
    tracks: list[list[Tensor]]

    def groups(self) -> dict[str, Group]:
        """Held-out traces with their scores, by what was asked and what came of it; empty groups are left out."""
        made: dict[str, Group] = {}
        for truth, traces, tracks in zip(("harmful", "harmless"), self.held, self.tracks, strict=True):
            for refused in (True, False):
                chosen = [i for i, trace in enumerate(traces) if trace.refused == refused]
                if chosen:
                    name = f"{truth}, {'refused' if refused else 'answered'}"
                    made[name] = ([traces[i] for i in chosen], [tracks[i] for i in chosen])
        return made


def summarise(subject: Subject, sets: Sets, found: Found, seed: int) -> Report:
    """Tables, plots and the chosen items of one run."""
    table = _scores(found)
    top = found.ablations.top
    worst = max((abs(found.ablations.raised(one)) for one in found.ablations.random), default=0.0)
    headline = {
        "prober_accuracy": found.probe.accuracy,
        **_fall(found, table),
        "raised_by_suppressors": found.ablations.raised(top),
        "raised_by_random_heads": worst,
        "selection_precision": found.chosen.precision,
    }
    notes = [
        f"Preset {found.preset!r}; thoughts closed by {found.how.marker!r}, temperature {found.how.temperature:g}; "
        f"refusals by scorer {subject.scorer!r}. The prober was fitted on {found.probe.count} prompts of each class "
        f"and is right on {found.probe.accuracy:.1%} of those kept for validation.",
        f"Heads switched off: {len(top.heads)}, the strongest suppressor is {_named(top.heads[0])}. The final score of "
        f"held-out prompts changes by {found.ablations.raised(top):+.3f}, without random heads by at most {worst:.3f}.",
    ]
    if found.probe.accuracy < TRUSTED:
        notes.append("A prober that is so often wrong says little: all scores below are to be read with care.")
    if "harmful, answered" not in found.groups():
        notes.append("No held-out harmful prompt is answered: there is no cliff here to explain.")
    return Report(
        f"Refusal cliff: {subject.source}",
        subject.provenance("refusal-cliff", sets.named(), backend=subject.backend, seed=seed),
        tuple(notes),
        (table, _heads(found), _ablations(found), _selection(found)),
        (_curves(subject, found), _map(subject, found)),
        {"preset": found.preset, "marker": found.how.marker, "heads": [list(head) for head in top.heads]},
        headline,
        {"selected": found.chosen},
    )


def _named(head: Head) -> str:
    return f"head {head[1]} of layer {head[0]}"


def _scores(found: Found) -> Table:
    rows: list[Row] = []
    for name, (traces, tracks) in found.groups().items():
        for preset, rules in PRESETS.items():
            cliffs = [cliff(trace, track, rules) for trace, track in zip(traces, tracks, strict=True)]
            plateau, final = (sum(getattr(c, key) for c in cliffs) / len(cliffs) for key in ("plateau", "final"))
            numbers = {"plateau": plateau, "final": final, "misalignment": plateau - final}
            rows.append({"group": name, "count": len(traces), "preset": preset, **numbers})
    columns = (
        Column("group", "held-out prompts"),
        Column("count", "n"),
        Column("preset", "definition"),
        Column("plateau", "plateau", ".3f"),
        Column("final", "final", ".3f"),
        Column("misalignment", "misalignment", "+.3f"),
    )
    note = (
        "Means of the refusal score. paper and code: maximum over the thought, and the last token. robust: 90th "
        "percentile over the thought without its last 8 tokens, and the mean over the marker."
    )
    return Table("scores", "Plateau and cliff", columns, tuple(rows), note)


def _fall(found: Found, table: Table) -> dict[str, float]:
    """The chosen preset's numbers for answered harmful prompts, else for all harmful ones."""
    for group in ("harmful, answered", "harmful, refused"):
        for row in table.rows:
            if row["group"] == group and row["preset"] == found.preset:
                return {key: float(row[key] or 0.0) for key in ("plateau", "final", "misalignment")}
    return {}


def _heads(found: Found) -> Table:
    strongest = ranked(found.attribution)[:LISTED]
    rows: tuple[Row, ...] = tuple(
        {
            "rank": i + 1,
            "layer": layer,
            "head": head,
            "score": found.attribution[layer, head],
            "off": (layer, head) in found.ablations.top.heads,
        }
        for i, (layer, head) in enumerate(strongest)
    )
    columns = (
        Column("rank", "rank"),
        Column("layer", "layer"),
        Column("head", "head"),
        Column("score", "c", "+.3f"),
        Column("off", "switched off"),
    )
    note = (
        "c: what the head adds to the residual stream at the marker's last token, along the prober's unit weight. The "
        "most negative suppress the refusal. The prober lives behind the final norm: this ranks, and explains no size."
    )
    return Table("heads", "Refusal suppression heads", columns, rows, note)


def _ablations(found: Found) -> Table:
    def row(name: str, one: Ablation) -> Row:
        return {
            "name": name,
            "heads": len(one.heads),
            "final": one.final,
            "raised": found.ablations.raised(one),
            "refused": one.refused,
        }

    rows = [row("none", found.ablations.stock), row("suppressors", found.ablations.top)]
    rows += [row(f"random {i + 1}", one) for i, one in enumerate(found.ablations.random)]
    columns = (
        Column("name", "heads switched off"),
        Column("heads", "count"),
        Column("final", "final score", ".3f"),
        Column("raised", "change", "+.3f"),
        Column("refused", "refused", ".0%"),
    )
    note = (
        f"Heads at 0 in prefill and decoding, norm repaired per {PRESETS[found.preset].repair}. Final score: the "
        "same thoughts read again. Refused: thought and answer written anew."
    )
    return Table("ablation", "Without heads", columns, tuple(rows), note)


def _selection(found: Found) -> Table:
    chosen = found.chosen
    row: Row = {
        "pool": chosen.pool,
        "chosen": len(chosen.traces),
        "precision": chosen.precision,
        "least": min((one.misalignment for one in chosen.cliffs), default=None),
    }
    columns = (
        Column("pool", "thoughts that plan to refuse"),
        Column("chosen", "chosen"),
        Column("precision", "of them answered", ".1%"),
        Column("least", "least misalignment", "+.3f"),
    )
    note = "Chosen items are in selected/items.jsonl: own thought, marker and a refusal, as chat messages."
    return Table("selection", "Cliff-as-a-Judge", columns, (row,), note)


def _curves(subject: Subject, found: Found) -> Plot:
    zeros = PRESETS[found.preset].zeros
    whole, ends = [], []
    for name, (traces, tracks) in found.groups().items():
        whole.append(Line(f"{name} ({len(traces)})", *trajectory(traces, tracks, zeros=zeros)))
        ends.append(Line(name, *ending(tracks, SHOWN)))
    if fall := _fall(found, _scores(found)):
        first, last = (0.0, 2.2) if zeros else (1.0, 2.2)
        whole += [
            Line(f"plateau {fall['plateau']:.2f}", (first, last), (fall["plateau"],) * 2, guide=True),
            Line(f"cliff {fall['final']:.2f}", (first, last), (fall["final"],) * 2, guide=True),
        ]
    marked = min(len(trace.ids) - trace.close for traces in found.held for trace in traces)
    panels = (
        Panel(
            "Mean over held-out prompts",
            "whole sequence, zeros on the left" if zeros else "prompt [0, 1], thought [1, 2], marker",
            "refusal score",
            tuple(whole),
            share=True,
            mark=None if zeros else (2.0, "end of the thought"),
        ),
        Panel(
            "The last tokens",
            "token, counted from the end of the marker",
            "refusal score",
            tuple(ends),
            share=True,
            whole=True,
            mark=(-float(marked), "marker begins"),
        ),
    )
    return Plot("trajectory", f"Refusal score through the thought: {subject.source}", panels)


def _map(subject: Subject, found: Found) -> Plot:
    heads = 1 + max(head for _, head in found.attribution)
    values = tuple(
        tuple(found.attribution.get((layer, head)) for head in range(heads)) for layer in range(subject.depth)
    )
    panel = HeatMap(
        "Contribution at the marker along the prober",
        "head",
        "layer",
        values,
        tuple(map(str, range(heads))),
        tuple(map(str, range(subject.depth))),
        "c (negative: takes refusal away)",
        diverging=True,
        boxed=found.ablations.top.heads,
    )
    return Plot("heads", f"Refusal suppression heads: {subject.source}", (panel,))
