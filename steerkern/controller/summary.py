"""The report of a training: what the controller learned and what it does on held-out prompts, with pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..plots import Line, Panel, Plot
from ..report import Column, Provenance, Report, Row, Table, Value
from .evaluation import LEARNED, SCALES, SHUFFLED, UNIFORM, Evaluation
from .recipe import Trained

BINS = 20
FLOOR = 1e-9
"""A loss below it is drawn as if it were that."""
_SLUGS = {LEARNED: "learned", UNIFORM: "half", SHUFFLED: "shuffled"}


def summarise(trained: Trained, evaluation: Evaluation, provenance: Provenance) -> Report:
    """Tables, plots and values of a trained controller and its held-out evaluation."""
    preset, history, target = trained.preset, trained.history, evaluation.target
    gained = evaluation.refused[LEARNED][target] - evaluation.stock[target]
    spoilt = evaluation.refused[LEARNED]["harmless"] - evaluation.stock["harmless"]
    notes = (
        f"{trained.plan!r}, alpha {trained.alpha:g}",
        f"{len(history.epochs)} epochs, {history.steps} steps; kept: epoch {history.best + 1}, "
        f"validation loss {history.epochs[history.best].validation:.4g}",
        f"held out: {target} prompts refused {100 * gained:+.1f} points, harmless ones {100 * spoilt:+.1f} points",
    )
    return Report(
        f"Guided controller, preset {preset.name}",
        provenance,
        notes,
        (_heldout(evaluation), _kept(evaluation), _layers(trained, evaluation)),
        (_training(trained, evaluation), _allocation(trained, evaluation)),
        {
            "alpha": trained.alpha,
            "history": history.to_json(),
            "gained_points": 100 * gained,
            "harmless_points": 100 * spoilt,
            "scales": list(SCALES),
            "curve": {_SLUGS[label]: list(shares) for label, shares in evaluation.curve.items()},
        },
    )


def _heldout(found: Evaluation) -> Table:
    columns = (
        Column("set", "prompts"),
        Column("count", "n"),
        Column("strength", "mean s", ".2f"),
        Column("spread", "sd", ".2f"),
        Column("stock", "stock", ".1%"),
        *(Column(_SLUGS[label], label, ".1%") for label in found.refused),
    )
    rows: list[Row] = []
    for name, s in found.strengths.items():
        row: dict[str, Value] = {
            "set": name,
            "count": len(s),
            "strength": float(s.mean()),
            "spread": float(s.std(correction=0)),
        }
        shares = {_SLUGS[label]: by_set[name] for label, by_set in found.refused.items()}
        rows.append({**row, "stock": found.stock[name], **shares})
    note = (
        "Strength s of the controller, and share refused by the stock model and under the plan: with the learned layer "
        "weights, and with two controls that keep each prompt's s: 1/2 at every layer, and the learned weights moved "
        "to other layers."
    )
    return Table("heldout", "Held-out prompts: refused", columns, tuple(rows), note)


def _kept(found: Evaluation) -> Table:
    columns = (Column("set", "prompts"), *(Column(_SLUGS[label], label, ".1%") for label in found.kept))
    rows: tuple[Row, ...] = tuple(
        {"set": name, **{_SLUGS[label]: shares[name] for label, shares in found.kept.items()}}
        for name in found.strengths
    )
    return Table("kept", "Held-out prompts: the reply is the stock model's", columns, rows)


def _layers(trained: Trained, found: Evaluation) -> Table:
    columns = (Column("layer", "layer"), *(Column(name, f"mean w, {name}", ".3f") for name in found.weights))
    rows = tuple(
        {"layer": layer, **{name: float(w[i]) for name, w in found.weights.items()}}
        for i, layer in enumerate(trained.controller.layers)
    )
    note = {
        "mse": "This loss gives the layer weights no gradient: they are as they were drawn.",
        "bce": "This loss pulls every layer weight to 1/2 and tells none of them what its layer does.",
        "outcome": "Learned from the replies of the steered model.",
    }[trained.preset.loss]
    return Table("layers", "Layer weights", columns, rows, note)


def _training(trained: Trained, found: Evaluation) -> Plot:
    epochs = trained.history.epochs
    x = tuple(float(i + 1) for i in range(len(epochs)))
    losses = (
        Line("training batches", x, tuple(math.log10(max(e.training, FLOOR)) for e in epochs)),
        Line("validation share", x, tuple(math.log10(max(e.validation, FLOOR)) for e in epochs)),
    )
    best = trained.history.best + 1
    return Plot(
        "training",
        f"Guided controller, preset {trained.preset.name}: training and strength",
        (
            Panel("Loss", "epoch", "log10 of the loss", losses, whole=True, mark=(float(best), f"kept: epoch {best}")),
            Panel("Strength on held-out prompts", "strength s", "share of the set", _histograms(found), share=True),
        ),
    )


def _histograms(found: Evaluation) -> tuple[Line, ...]:
    every = torch.cat(list(found.strengths.values()))
    low, high = float(every.min()), float(every.max())
    margin = max(high - low, 1e-3) / BINS
    edges = torch.linspace(low - margin, high + margin, BINS + 1)
    middles = ((edges[:-1] + edges[1:]) / 2).tolist()

    def shares(s: Tensor) -> tuple[float, ...]:
        counted: list[float] = (torch.histc(s, BINS, float(edges[0]), float(edges[-1])) / len(s)).tolist()
        return tuple(counted)

    return tuple(Line(name, tuple(middles), shares(s)) for name, s in found.strengths.items())


def _allocation(trained: Trained, found: Evaluation) -> Plot:
    layers = tuple(map(float, trained.controller.layers))
    weights = {name: tuple(w.tolist()) for name, w in found.weights.items() if name in (found.target, "harmless")}
    lines = [Line(f"mean w, {name}", layers, w) for name, w in weights.items()]
    lines.append(Line("1/2 at every layer", layers, (0.5,) * len(layers)))
    curves = tuple(Line(label, SCALES, shares) for label, shares in _ordered(found.curve).items())
    return Plot(
        "allocation",
        f"Guided controller, preset {trained.preset.name}: the layers",
        (
            Panel("Layer weights", "layer l", "weight w_l", tuple(lines), whole=True),
            Panel(
                f"Refusal of {found.target} prompts", "scale of the plan", "prompts refused", curves, share=True,
                mark=None,
            ),
        ),
        f"Unsteered, {found.stock[found.target]:.0%} of the {found.target} prompts are refused.",
    )  # fmt: skip


def _ordered(curve: Mapping[str, tuple[float, ...]]) -> dict[str, tuple[float, ...]]:
    return {label: curve[label] for label in (LEARNED, UNIFORM, SHUFFLED) if label in curve}
