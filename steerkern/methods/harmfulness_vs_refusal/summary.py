"""The report: pools, beliefs, layers, and their pictures."""

from __future__ import annotations

from ...plots import Line, Panel, Plot, Scatter
from ...report import Column, Report, Row, Table
from ...subject import Subject
from ..sets import Sets
from .beliefs import Beliefs
from .categories import Categories
from .guard import LatentGuard, auroc
from .pools import Pools
from .steering import HARM, REFUSAL, REFUSAL_HERE, Curve, Sweep


def summarise(
    subject: Subject,
    sets: Sets,
    train: Pools,
    heldout: Pools,
    guard: LatentGuard,
    beliefs: Beliefs,
    found: Sweep,
    categories: Categories | None,
    centre: int,
    seed: int,
) -> Report:
    """Tables, plots and the guard of one run."""
    headline = _headline(beliefs, found)
    best = found.best()
    guard_counts = [min(centre, len(pool)) for pool in (train.refused_harmful, train.accepted_harmless)]
    notes = [
        f"Centres over {guard_counts[0]} refused harmful and {guard_counts[1]} answered harmless prompts; all other "
        f"numbers are of held-out prompts. Refusals by scorer {subject.scorer!r}.",
        f"Layer {best}: adding v_harm moves the answer to inverted harmless prompts by "
        f"{100 * found.moved(HARM, best):.0f} points, adding v_ref to the whole prompt by "
        f"{100 * found.moved(REFUSAL, best):.0f}.",
    ]
    if headline["judgement_moved_by_harm"] - headline["judgement_moved_by_refusal"] < 0.2:
        notes.append("Steering along v_harm moves the judgement no more than v_ref: here the two do not come apart.")
    return Report(
        f"Harmfulness against refusal: {subject.source}",
        subject.provenance("harmfulness-vs-refusal", sets.named(), backend=subject.backend, seed=seed),
        tuple(notes),
        (
            _pools(beliefs, guard, train, heldout),
            _directions(subject, beliefs),
            _steering(subject, found, "refusal", "Refused, by the layer that is steered", "refused", "complied"),
            _steering(subject, found, "judgement", "Inverted prompts answered No", "judged_harmless", "judged_harmful"),
            *([] if categories is None else [_categories(categories)]),
        ),
        (_scatter(subject, beliefs), _curves(subject, found)),
        {"stock": found.stock, "guard_threshold": guard.threshold, "layer": best},
        headline,
        {"guard": guard},
    )


def _headline(beliefs: Beliefs, found: Sweep) -> dict[str, float]:
    harm, less = beliefs.harm_scores["refused harmful"], beliefs.harm_scores["accepted harmless"]
    numbers = {"auroc": auroc(harm, less)}
    if "accepted harmful" in beliefs.harm_scores:
        numbers["auroc_jailbroken"] = auroc(beliefs.harm_scores["accepted harmful"], less)
    best = found.best()
    return {
        **numbers,
        "mean_abs_cosine": float(beliefs.cosines().abs().mean()),
        "judgement_moved_by_harm": found.moved(HARM, best),
        "judgement_moved_by_refusal": found.moved(REFUSAL, best),
        "refusal_raised_by_harm": max(found.refused[HARM].values()) - found.stock["refused"],
        "refusal_raised_by_refusal": max(found.refused[REFUSAL].values()) - found.stock["refused"],
    }


def _pools(beliefs: Beliefs, guard: LatentGuard, train: Pools, heldout: Pools) -> Table:
    less = beliefs.harm_scores["accepted harmless"]
    rows: list[Row] = []
    for name, prompts in heldout.named().items():
        harm, refusal = beliefs.harm_scores[name], beliefs.refusal_scores[name]
        rows.append(
            {
                "pool": name,
                "train": len(train.named().get(name, ())),
                "count": len(prompts),
                "harm": float(harm.mean()),
                "refusal": float(refusal.mean()),
                "guard": float((harm >= guard.threshold).float().mean()),
                "auroc": auroc(harm, less) if name.endswith("harmful") else None,
            }
        )
    columns = (
        Column("pool", "pool"),
        Column("train", "n train"),
        Column("count", "n"),
        Column("harm", "harmfulness", "+.3f"),
        Column("refusal", "refusal", "+.3f"),
        Column("guard", "Latent Guard fires", ".1%"),
        Column("auroc", "AUROC", ".3f"),
    )
    note = (
        "Beliefs: mean over all layers of cos(h, centre) - cos(h, other centre), at t_inst and at t_post. The guard "
        f"fires where the harmfulness is at least {guard.threshold:g}; AUROC against the answered harmless prompts."
    )
    return Table("pools", "What the model believes", columns, tuple(rows), note)


def _directions(subject: Subject, beliefs: Beliefs) -> Table:
    columns = (
        Column("layer", "layer"),
        Column("harm_norm", "|v_harm|", ".2f"),
        Column("ref_norm", "|v_ref|", ".2f"),
        Column("cosine", "cosine", "+.2f"),
    )
    rows: tuple[Row, ...] = tuple(
        {
            "layer": str(layer) if layer < subject.depth else "output",
            "harm_norm": float(beliefs.harm[layer].norm()),
            "ref_norm": float(beliefs.refusal[layer].norm()),
            "cosine": float(cosine),
        }
        for layer, cosine in enumerate(beliefs.cosines())
    )
    return Table("directions", "The two directions", columns, rows, "resid_pre of each layer, and the last output.")


def _steering(subject: Subject, found: Sweep, name: str, title: str, up: str, down: str) -> Table:
    plus, minus = getattr(found, up), getattr(found, down)
    curves: dict[str, tuple[str, Curve]] = {
        "harm": ("+v_harm", plus[HARM]),
        "ref": ("+v_ref", plus[REFUSAL]),
        "here": ("+v_ref, instruction", plus[REFUSAL_HERE]),
        "harm_down": ("harmful: -v_harm", minus[HARM]),
        "ref_down": ("-v_ref", minus[REFUSAL]),
        "here_down": ("-v_ref, instruction", minus[REFUSAL_HERE]),
    }
    rows = tuple(
        {"layer": layer, **{key: curve.get(layer) for key, (_, curve) in curves.items()}}
        for layer in range(subject.depth)
    )
    columns = (Column("layer", "layer"), *(Column(key, heading, ".0%") for key, (heading, _) in curves.items()))
    note = (
        "Added on harmless prompts, subtracted on harmful ones, in the prefill at one layer: v_harm on the "
        "instruction, v_ref on the whole prompt and, as a control, on the instruction. "
        f"Without steering: harmless {found.stock[up]:.0%}, harmful {found.stock[down]:.0%}."
    )
    return Table(name, title, columns, rows, note)


def _categories(found: Categories) -> Table:
    columns = (
        Column("category", "category"),
        Column("train", "n train"),
        Column("count", "n"),
        Column("harm", "harm directions alike", ".2f"),
        Column("refusal", "refusal directions alike", ".2f"),
        Column("own", "refused, own subtracted", ".0%"),
        Column("others", "the others'", ".0%"),
        Column("every", "that of all", ".0%"),
    )
    rows: tuple[Row, ...] = tuple(
        {
            "category": name,
            "train": train,
            "count": count,
            "harm": found.harm[name],
            "refusal": found.refusal[name],
            "own": found.own[name],
            "others": found.others[name],
            "every": found.every[name],
        }
        for name, (train, count) in found.counts.items()
    )
    note = (
        "Alike: mean cosine to the directions of the other categories, over layers. Refused: held-out harmful prompts "
        f"of the category with a harm direction subtracted on the instruction, at layer {found.layer}."
    )
    return Table("categories", "Directions per category of harm", columns, rows, note)


def _scatter(subject: Subject, beliefs: Beliefs) -> Plot:
    groups = tuple(
        Line(name, tuple(harm.tolist()), tuple(beliefs.refusal_scores[name].tolist()))
        for name, harm in beliefs.harm_scores.items()
    )
    panel = Scatter("Held-out prompts", "belief: harmful (t_inst)", "belief: refuse (t_post)", groups)
    return Plot("beliefs", f"Two beliefs per prompt: {subject.source}", (panel,))


def _curves(subject: Subject, found: Sweep) -> Plot:
    def lines(curves: dict[str, Curve], names: dict[str, str], stock: float) -> tuple[Line, ...]:
        made = [Line(title, tuple(map(float, curves[n])), tuple(curves[n].values())) for n, title in names.items()]
        ends = (0.0, float(subject.depth - 1))
        return (*made, Line("without steering", ends, (stock, stock)))

    x, stock = "layer l (resid_pre[l])", found.stock
    both = {HARM: "+ v_harm on the instruction", REFUSAL: "+ v_ref on the prompt"}
    three = {**both, REFUSAL_HERE: "+ v_ref on the instruction"}
    panels = (
        Panel(
            "Harmless prompts: refused",
            x,
            "prompts refused",
            lines(found.refused, three, stock["refused"]),
            share=True,
            whole=True,
        ),
        Panel(
            "Inverted harmless prompts: judged harmless",
            x,
            "answered No",
            lines(found.judged_harmless, three, stock["judged_harmless"]),
            share=True,
            whole=True,
        ),
        Panel(
            "Inverted harmful prompts, subtracted: judged harmless",
            x,
            "answered No",
            lines(
                found.judged_harmful,
                {HARM: "- v_harm on the instruction", REFUSAL: "- v_ref on the prompt"},
                stock["judged_harmful"],
            ),
            share=True,
            whole=True,
        ),
    )
    return Plot("layers", f"Steering along harmfulness and refusal: {subject.source}", panels)
