"""The report: maps, directions, effects and neurons of two models side by side, and their pictures."""

from __future__ import annotations

from torch import Tensor

from ...plots import HeatMap, Line, Panel, Plot
from ...report import Column, Report, Row, Table
from ...subject import Subject
from ..sets import Sets
from .entropy import COUNT, Neurons, overlap
from .knowledge import Knowledge, normalise, pearson
from .pairs import Statements
from .refusal import Transfer
from .truth import Truth

Both = tuple[Subject, Subject]


def summarise(
    both: Both,
    sets: Sets,
    told: Statements,
    knowledge: Knowledge,
    left_out: int,
    truth: Truth,
    refusal: Transfer,
    neurons: tuple[Neurons, Neurons],
    seed: int,
) -> Report:
    """Tables, plots and headline of one run."""
    names = (both[0].source, both[1].source)
    asked = {**sets.named(), **told.named()}
    maps = {key: normalise(effects) for key, effects in knowledge.maps.items()}
    share = f"; {left_out} of another tokenisation were left out" if left_out else ""
    notes = (
        f"A is {names[0]}, B is {names[1]}. Directions, probes and neurons of A and B; all shares are of held-out "
        f"prompts and statements. Refusals by scorer {both[0].scorer!r}.",
        f"Knowledge: {knowledge.pairs} held-out statement pairs traced{share}.",
        f"Truth is read at resid_post[{truth.layer}] and written at layers {', '.join(map(str, truth.layers))}; "
        f"refusal is read at resid_pre[{refusal.layer}].",
    )
    return Report(
        f"What post-training changed: {names[0]} and {names[1]}",
        both[0].provenance("post-training", asked, backend=both[0].backend, seed=seed),
        notes,
        (
            _knowledge(knowledge, maps),
            _truth(truth),
            _refusal(refusal),
            _cosines(truth, refusal, both[0].depth),
            _neurons(neurons),
        ),
        (_heat_maps(knowledge, maps), _curves(truth, refusal)),
        {
            "maps": {_kind(key): effects.tolist() for key, effects in knowledge.maps.items()},
            "restored": {"AB"[i]: effects.tolist() for i, effects in enumerate(knowledge.restored)},
            "tokens": list(knowledge.traced.names),
            "stock_margins": {"AB"[i]: stock for i, stock in enumerate(knowledge.stock)},
            "entropy_neurons": {"AB"[i]: list(some.found) for i, some in enumerate(neurons)},
            "other": {"source": names[1], "dtype": both[1].dtype},
        },
        _headline(knowledge, maps, truth, refusal, neurons),
    )


def _headline(
    knowledge: Knowledge,
    maps: dict[tuple[int, int], Tensor],
    truth: Truth,
    refusal: Transfer,
    neurons: tuple[Neurons, Neurons],
) -> dict[str, float]:
    at = truth.layer
    own, cross = ((0, 0), (1, 1)), ((0, 1), (1, 0))
    return {
        "knowledge_pearson": pearson(maps[0, 0], maps[1, 1]) or 0.0,
        "probe_own": min(truth.accuracy[key][at] for key in own),
        "probe_cross": min(truth.accuracy[key][at] for key in cross),
        "nie_own": min(truth.effects[key].mean for key in own),
        "nie_cross": min(truth.effects[key].mean for key in cross),
        "truth_cosine": float(truth.cosines[at]),
        "refusal_cosine": refusal.cosines[refusal.layer],
        "refusal_steered_a_in_b": refusal.shares[0, 1].harmless_steered,
        "refusal_steered_b_in_a": refusal.shares[1, 0].harmless_steered,
        "entropy_iou": overlap(*neurons),
    }


def _knowledge(knowledge: Knowledge, maps: dict[tuple[int, int], Tensor]) -> Table:
    facts = list(knowledge.traced.facts)
    rows: list[Row] = []
    for one, other in (((0, 0), (1, 1)), ((0, 1), (0, 0)), ((1, 0), (1, 1))):
        here, there = maps[one], maps[other]
        rows.append(
            {
                "map": _kind(one),
                "against": _kind(other),
                "pearson": pearson(here, there),
                "pearson_facts": pearson(here[:, facts], there[:, facts]),
                "difference": float((here - there).abs().max()),
                "difference_facts": float((here - there)[:, facts].abs().max()),
                "largest": float(knowledge.maps[one].max()),
                **knowledge.stock[one[0]],
            }
        )
    columns = (
        Column("map", "states"),
        Column("against", "against"),
        Column("pearson", "Pearson r", ".3f"),
        Column("pearson_facts", "facts", ".3f"),
        Column("difference", "largest difference", ".2f"),
        Column("difference_facts", "facts", ".2f"),
        Column("largest", "largest margin", "+.2f"),
        Column("true", "true run", "+.2f"),
        Column("false", "false run", "+.2f"),
        Column("noise", "noisy run", "+.2f"),
    )
    note = (
        "Maps of the effect of one state of the true run in the false run, over layers and tokens, in 20 bins; facts: "
        "only the subject's and the object's tokens (no r where a map is flat there). Margins are logit(true) - "
        "logit(false); noise on the subject."
    )
    return Table("knowledge", "Where facts sit", columns, tuple(rows), note)


def _kind(key: tuple[int, int]) -> str:
    """Of a map's (target, source)."""
    return f"{'AB'[key[1]]} in {'AB'[key[0]]}"


def _truth(truth: Truth) -> Table:
    rows: list[Row] = []
    for (a, b), effect in sorted(truth.effects.items()):
        rows.append(
            {
                "direction": "AB"[a],
                "model": "AB"[b],
                "accuracy": truth.accuracy[a, b][truth.layer],
                "nie": effect.mean,
                "to_false": effect.to_false,
                "to_true": effect.to_true,
                "pd_true": truth.stock[b][0],
                "pd_false": truth.stock[b][1],
            }
        )
    columns = (
        Column("direction", "direction of"),
        Column("model", "in"),
        Column("accuracy", "probe accuracy", ".1%"),
        Column("nie", "NIE", ".3f"),
        Column("to_false", "true to false", ".3f"),
        Column("to_true", "false to true", ".3f"),
        Column("pd_true", "PD, true", "+.2f"),
        Column("pd_false", "PD, false", "+.2f"),
    )
    note = (
        "Probe: logistic regression along mean(true) - mean(false), fitted in the one model, read in the other. NIE: "
        "the vector added on false statements and subtracted on true ones; PD = P(true) - P(false) without it."
    )
    return Table("truth", "The truth direction in both models", columns, tuple(rows), note)


def _refusal(refusal: Transfer) -> Table:
    rows: list[Row] = []
    for (a, b), shares in sorted(refusal.shares.items()):
        rows.append(
            {
                "direction": "AB"[a],
                "model": "AB"[b],
                "steered": shares.harmless_steered,
                "harmless": refusal.stock[b][0],
                "ablated": shares.harmful_ablated,
                "harmful": refusal.stock[b][1],
                "coefficient": refusal.strengths[b],
            }
        )
    columns = (
        Column("direction", "direction of"),
        Column("model", "in"),
        Column("steered", "harmless refused, steered", ".0%"),
        Column("harmless", "unsteered", ".0%"),
        Column("ablated", "harmful refused, ablated", ".0%"),
        Column("harmful", "not ablated", ".0%"),
        Column("coefficient", "coefficient", ".2f"),
    )
    note = (
        "The unit direction added at three sites of one layer (the shift is three times the coefficient), or projected "
        "out at every site of every layer; prompt and reply."
    )
    return Table("refusal", "The refusal direction in both models", columns, tuple(rows), note)


def _cosines(truth: Truth, refusal: Transfer, depth: int) -> Table:
    rows: tuple[Row, ...] = tuple(
        {
            "layer": layer,
            "truth": float(truth.cosines[layer]),
            "probe_a": truth.accuracy[0, 0][layer],
            "probe_b": truth.accuracy[1, 1][layer],
            "refusal": refusal.cosines.get(layer),
        }
        for layer in range(depth)
    )
    columns = (
        Column("layer", "layer"),
        Column("truth", "truth, resid_post", "+.2f"),
        Column("refusal", "refusal, resid_pre", "+.2f"),
        Column("probe_a", "truth probe, A", ".1%"),
        Column("probe_b", "truth probe, B", ".1%"),
    )
    return Table("cosines", "Cosine of A's and B's direction by layer", columns, rows)


def _neurons(neurons: tuple[Neurons, Neurons]) -> Table:
    rows: tuple[Row, ...] = tuple(
        {"model": "AB"[i], "found": ", ".join(map(str, some.found)), "ratio": some.ratio, "iou": overlap(*neurons)}
        for i, some in enumerate(neurons)
    )
    columns = (
        Column("model", "model"),
        Column("found", "entropy neurons"),
        Column("ratio", "norm / log(LogitVar)", ".3f"),
        Column("iou", "overlap (IoU)", ".2f"),
    )
    note = f"Of the last MLP: the {COUNT} of smallest LogitVar among the quarter with the largest output vectors."
    return Table("entropy", "Entropy neurons", columns, rows, note)


def _heat_maps(knowledge: Knowledge, maps: dict[tuple[int, int], Tensor]) -> Plot:
    layers = tuple(str(layer) for layer in range(len(maps[0, 0])))
    titles = {(0, 0): "A", (1, 1): "B", (1, 0): "B, states of A", (0, 1): "A, states of B"}
    panels = [_heat_map(title, maps[key], knowledge.traced.names, layers) for key, title in titles.items()]
    return Plot("knowledge", "Effect of one state of the true statement's run in the false one's", tuple(panels))


def _heat_map(title: str, effects: Tensor, tokens: tuple[str, ...], layers: tuple[str, ...]) -> HeatMap:
    values = tuple(tuple(row) for row in effects.tolist())
    return HeatMap(title, "token", "layer l (resid_post[l])", values, tokens, layers, "normalised effect")


def _curves(truth: Truth, refusal: Transfer) -> Plot:
    x = tuple(map(float, range(len(truth.cosines))))
    known = tuple(map(float, refusal.cosines))
    lines = (
        Line("truth (resid_post, period)", x, tuple(truth.cosines.tolist())),
        Line("refusal (resid_pre, t_post)", known, tuple(refusal.cosines.values())),
    )
    titles = {(0, 0): "A in A", (0, 1): "A in B", (1, 0): "B in A", (1, 1): "B in B"}
    probes = tuple(Line(title, x, tuple(truth.accuracy[key])) for key, title in titles.items())
    panels = (
        Panel("Cosine of A's and B's direction", "layer l", "cosine", lines, whole=True),
        Panel("Truth probe on held-out statements", "layer l", "told right", probes, share=True, whole=True),
    )
    return Plot("directions", "Do the directions survive post-training?", panels)
