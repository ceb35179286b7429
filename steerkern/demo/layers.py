"""Which layer: directions from the training prompts, judged on the validation prompts."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..directions import Directions
from ..edits import ablate, add
from ..extraction import Position, means, states
from ..plan import Plan
from ..plots import Line, Panel, Plot
from ..report import Column, Table
from ..subject import Question, Subject
from .examples import Examples, prompts

DEPTH = 0.8
"""Directions of the last fifth of the layers are not tried: an edit there acts on the next word, not the decision."""
AT_ONCE = 16
"""Layers that are tried in one session, so that its slot table holds their plans."""


@dataclass(frozen=True)
class Found:
    """What the training and validation prompts say about each layer, and the layer that was chosen."""

    directions: Directions
    harmful_mean: dict[int, float]
    """Mean coordinate of harmful training prompts along the unit direction, at the last prompt token."""
    harmless_mean: dict[int, float]
    separation: dict[int, float]
    ablated: dict[int, float]
    """Refusal of harmful prompts with the layer's direction ablated everywhere, for the layers that were tried."""
    added: dict[int, float]
    """Refusal of harmless prompts with it added at the layer."""
    layer: int


def find(subject: Subject, train: Examples, check: Examples) -> Found:
    """Directions per layer from the prompts of ``train``, and the best layer on those of ``check``."""
    where: Position = "t_post"
    with subject.progress("reading the residual stream", 1) as step:
        contrast = means(
            subject.model,
            subject.tokenizer,
            prompts(train.harmful),
            prompts(train.harmless),
            positions=(where,),
            batch_size=subject.batch_size,
            template=subject.template,
            progress=False,
        )[where]
        directions = contrast.directions("resid_pre", "refusal")
        size = subject.batch_size
        sides = [
            states(subject.model, subject.render(prompts(side)), (where,), batch_size=size, progress=False)[:, :, 0]
            for side in (check.harmful, check.harmless)
        ]
        step(1)
    separation = {layer: _separation(sides[0][:, layer], sides[1][:, layer], d.unit) for layer, d in directions.items()}
    ablated, added = _try_layers(subject, directions, check)
    # in a clear case several layers reach 0 and 1: separation decides among them
    layer = max(ablated, key=lambda at: (added[at] - ablated[at], separation[at]))
    up, down = contrast.positive.at("resid_pre"), contrast.negative.at("resid_pre")
    return Found(
        directions,
        {at: float(up[at] @ d.unit.double()) for at, d in directions.items()},
        {at: float(down[at] @ d.unit.double()) for at, d in directions.items()},
        separation,
        ablated,
        added,
        layer,
    )


def _try_layers(subject: Subject, directions: Directions, check: Examples) -> tuple[dict[int, float], dict[int, float]]:
    layers = [layer for layer in directions if layer < DEPTH * subject.depth] or list(directions)
    ablated: dict[int, float] = {}
    added: dict[int, float] = {}
    for start in range(0, len(layers), AT_ONCE):
        some = layers[start : start + AT_ONCE]
        questions: list[Question] = []
        for layer in some:
            questions.append((Plan(ablate(directions[layer].unit), name=f"ablate {layer}"), prompts(check.harmful)))
            questions.append((Plan(add(directions[layer]), layers=layer, name=f"add {layer}"), prompts(check.harmless)))
        rates = list(map(subject.refused, subject.ask("trying every layer", questions).groups))
        ablated.update(zip(some, rates[0::2], strict=True))
        added.update(zip(some, rates[1::2], strict=True))
    return ablated, added


def _separation(harmful: Tensor, harmless: Tensor, unit: Tensor) -> float:
    """Distance of the class means along ``unit [H]`` in pooled standard deviations, of states ``[N, H]``."""
    a, b = harmful.double() @ unit.double(), harmless.double() @ unit.double()
    spread = ((a.var(correction=0) + b.var(correction=0)) / 2).sqrt()
    return float((a.mean() - b.mean()) / spread.clamp_min(1e-12))


def layer_table(found: Found) -> Table:
    """Norm, separation and refusal rates of every layer, on the validation prompts."""
    columns = (
        Column("layer", "layer"),
        Column("norm", "norm", ".2f"),
        Column("separation", "separation", ".1f"),
        Column("ablated", "ablated: harmful refused", ".0%"),
        Column("added", "added: harmless refused", ".0%"),
        Column("chosen", ""),
    )
    rows = tuple(
        {
            "layer": layer,
            "norm": direction.norm,
            "separation": found.separation[layer],
            "ablated": found.ablated.get(layer),
            "added": found.added.get(layer),
            "chosen": "chosen" if layer == found.layer else "",
        }
        for layer, direction in found.directions.items()
    )
    note = "Validation prompts. Separation: distance of the class means along the direction, in standard deviations."
    return Table("layers", "The direction of each layer", columns, rows, note)


def profile_plot(subject: Subject, found: Found) -> Plot:
    """The same numbers as a picture."""
    layers = tuple(map(float, found.directions))
    tried = tuple(map(float, found.ablated))
    mark = (float(found.layer), f"chosen: layer {found.layer}")
    norm = Line("norm", layers, tuple(d.norm for d in found.directions.values()))
    separation = Line("separation", layers, tuple(found.separation.values()))
    ablated = Line("harmful prompts, direction of l ablated at every layer", tried, tuple(found.ablated.values()))
    added = Line("harmless prompts, direction of l added at l", tried, tuple(found.added.values()))
    x, distance = "layer l (resid_pre[l])", "distance of means (std. deviations)"
    alike = "Layer 0 has no direction: there the last prompt token is the same for every prompt."
    return Plot(
        "layer-profile",
        f"The refusal direction by layer: {subject.source}",
        (
            Panel("Norm of the difference of means", x, "norm (residual units)", (norm,), whole=True, mark=mark),
            Panel("Separation of the classes", x, distance, (separation,), whole=True, mark=mark),
            Panel("Refusal after editing", x, "prompts refused", (ablated, added), share=True, whole=True, mark=mark),
        ),
        "" if 0 in found.directions else alike,
    )
