"""Every method on one model: plans towards refusal and away from it, held-out prompts, and the report."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from ...extraction import Prompt, Rendered
from ...logits import divergence, next_logprobs
from ...plan import Plan
from ...plots import Bars, HeatMap, Plot
from ...report import Column, Report, Row, Table
from ...subject import Question, Subject
from ..sets import Sets
from .calibration import calibrate
from .constructions import ablation, actadd, addition, angular, caa, iti, repe
from .gating import Gate, conditional, search
from .selection import Selection, select


class Method(NamedTuple):
    """A method as it is tried: away from refusal on harmful prompts, towards it on harmless ones."""

    name: str
    away: Plan
    towards: Plan


def compare(subject: Subject, sets: Sets, budget: float, heads: int, strength: float, seed: int) -> Report:
    """Build every method from the prompts to learn from, and ask the held-out ones."""
    half = len(sets.train["harmful"]) // 4
    learn = (sets.train["harmful"][half:], sets.train["harmless"][half:])
    check = (sets.train["harmful"][:half], sets.train["harmless"][:half])
    selection = select(subject, learn, check)
    methods = _methods(subject, selection, learn, heads, strength)
    harmful, harmless = sets.heldout["harmful"], sets.heldout["harmless"]
    asked: list[Question] = [(None, harmful), (None, harmless)]
    asked += [(m.away, harmful) for m in methods] + [(m.towards, harmless) for m in methods]
    rates = subject.refusals("held-out prompts", asked)
    stock, rest = rates[:2], rates[2:]
    away, towards = rest[: len(methods)], rest[len(methods) :]
    plain = subject.render(harmless)
    (base, *moved) = next_logprobs(
        subject.model, [(None, plain), *((m.away, plain) for m in methods)], batch_size=subject.batch_size
    )
    kl = [float(divergence(base, found).mean()) for found in moved]
    table = _table(subject, methods, stock, away, towards, kl, check[1], budget)
    cast_table, f1 = _cast(subject, sets, selection)
    chosen = selection.chosen
    notes = (
        f"Direction: token {chosen.position}, layer {chosen.layer}, of {len(selection.candidates)} candidates; bypass "
        f"{chosen.bypass:+.2f}, induce {chosen.induce:+.2f}, KL {chosen.kl:.3f}."
        + ("" if selection.passed else " No candidate meets every condition of the paper: this one comes closest."),
        f"Refusals begin with {subject.tokenizer.convert_ids_to_tokens(list(selection.tokens))}.",
    )
    headline = {
        "ablation_harmful_refused": away[0],
        "addition_harmless_refused": towards[0],
        "ablation_kl": kl[0],
        "cast_f1": f1,
    }
    return Report(
        f"Steering baselines: {subject.source}",
        subject.provenance("steering-baselines", sets.named(), backend=subject.backend, seed=seed),
        notes,
        (table, cast_table, _candidates(selection)),
        (_bars(subject, methods, stock, away, towards), _maps(subject, selection)),
        {"position": chosen.position, "layer": chosen.layer, "tokens": list(selection.tokens)},
        headline,
        {f"plans/{plan.name}": plan for method in methods for plan in (method.away, method.towards)},
    )


def _methods(
    subject: Subject,
    selection: Selection,
    learn: tuple[Sequence[Prompt], Sequence[Prompt]],
    heads: int,
    strength: float,
) -> list[Method]:
    r, layer = selection.chosen.direction, selection.chosen.layer
    refusing, complying = _answered(subject, learn)
    plus = addition(r, layer, name="addition")
    towards = {
        "CAA": caa(subject, refusing, complying, max(layer - 1, 0), 1.0),
        "ActAdd": actadd(subject, _text(learn[0][0]), _text(learn[1][0]), layer),
        "RepE": repe(subject, *learn, coefficient=r.norm),
        "ITI": iti(subject, *learn, strength=strength, count=heads or None),
    }
    made = [Method("ablation, addition", ablation(r.unit), plus)]
    made.append(Method("subtraction, addition", addition(r, layer, -1.0, name="subtraction"), plus))
    made += [Method(name, plan.scaled(-1.0).named(f"{plan.name} away"), plan) for name, plan in towards.items()]
    turns = [angular(subject, *learn, degrees=d, name=f"angular {d}") for d in (180, 0)]
    made.append(Method("Angular Steering", *turns))
    return made


def _answered(
    subject: Subject, learn: tuple[Sequence[Prompt], Sequence[Prompt]]
) -> tuple[list[Rendered], list[Rendered]]:
    """Harmful prompts with the first tokens of a refusal and of an answer: the pairs of CAA."""
    texts = subject.replies("replies to learn from", [(None, side[:8]) for side in learn])
    beginnings = [subject.tokenizer(side[0], add_special_tokens=False)["input_ids"][:2] for side in texts]
    rendered = subject.render(learn[0])
    made = [
        [
            dataclasses.replace(prompt, text=prompt.text + subject.tokenizer.decode(ids), ids=(*prompt.ids, *ids))
            for prompt in rendered
        ]
        for ids in beginnings
    ]
    return made[0], made[1]


def _text(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def _table(
    subject: Subject,
    methods: Sequence[Method],
    stock: Sequence[float],
    away: Sequence[float],
    towards: Sequence[float],
    kl: Sequence[float],
    prompts: Sequence[Prompt],
    budget: float,
) -> Table:
    rows: list[Row] = []
    with subject.progress("calibrating strengths", len(methods)) as step:
        for method, open_, shut, spent in zip(methods, away, towards, kl, strict=True):
            fixed = "Angular" in method.name  # an absolute angle has no strength
            scale = None if fixed else calibrate(subject, method.away, prompts, budget=budget).scale
            rows.append({"method": method.name, "away": open_, "towards": shut, "kl": spent, "scale": scale})
            step(1)
    columns = (
        Column("method", "method"),
        Column("away", "harmful refused, away", ".0%"),
        Column("towards", "harmless refused, towards", ".0%"),
        Column("kl", "KL on harmless, away", ".3f"),
        Column("scale", f"scale within KL {budget:g}", ".2f"),
    )
    note = (
        f"Stock: harmful refused {stock[0]:.0%}, harmless {stock[1]:.0%}. Strengths as published (RepE: the norm of "
        "the selected direction); away from refusal is the same with the opposite sign, or ablation. KL of the next "
        "token in nats; the last column is the largest scale up to 4 of the plan away from refusal within the budget."
    )
    return Table("methods", "Held-out prompts under every method", columns, tuple(rows), note)


def _cast(subject: Subject, sets: Sets, selection: Selection) -> tuple[Table, float]:
    """Refuse what is harmful, also where the model would answer, and leave the rest alone."""
    up = [*sets.train["harmful"], *sets.train.get("jailbroken", ())]
    down = [*sets.train["harmless"], *sets.train.get("overrefused", ())]
    gate = search(subject, up, down)
    r = selection.chosen
    plan = conditional(r.direction.raw, [r.layer], gate, 1.0, name="cast")
    held = {name: prompts for name, prompts in sets.heldout.items() if prompts}
    always = addition(r.direction.raw, r.layer, name="always")
    rates = subject.refusals("CAST", [(p, some) for p in (None, plan, always) for some in held.values()])
    count = len(held)
    fired = _fires(subject, gate, held)
    rows: list[Row] = [
        {
            "set": name,
            "count": len(held[name]),
            "fires": fired[name],
            "stock": rates[i],
            "cast": rates[count + i],
            "always": rates[2 * count + i],
        }
        for i, name in enumerate(held)
    ]
    positive = [name for name in held if name in ("harmful", "jailbroken")]
    hits = sum(fired[name] * len(held[name]) for name in positive)
    wrong = sum(fired[name] * len(held[name]) for name in held if name not in positive)
    f1 = 2 * hits / (hits + wrong + sum(len(held[name]) for name in positive)) if hits else 0.0
    columns = (
        Column("set", "prompts"),
        Column("count", "n"),
        Column("fires", "gate fires", ".1%"),
        Column("stock", "stock", ".1%"),
        Column("cast", "CAST", ".1%"),
        Column("always", "without the gate", ".1%"),
    )
    note = (
        f"Condition: similarity {gate.fires} {gate.threshold:.3f}, layer {gate.layer}, {gate.where} (F1 {gate.f1:.3f} "
        f"on the prompts it was searched on, {f1:.3f} held out). Behaviour: the refusal direction at layer {r.layer}."
    )
    return Table("cast", "CAST: refused", columns, tuple(rows), note), f1


def _fires(subject: Subject, gate: Gate, held: dict[str, Sequence[Prompt]]) -> dict[str, float]:
    return {name: float(gate.opens(subject, prompts).float().mean()) for name, prompts in held.items()}


def _candidates(selection: Selection) -> Table:
    columns = (
        Column("position", "token"),
        Column("layer", "layer"),
        Column("bypass", "bypass", "+.2f"),
        Column("induce", "induce", "+.2f"),
        Column("kl", "KL", ".3f"),
        Column("chosen", ""),
    )
    rows = tuple(
        {
            "position": c.position,
            "layer": c.layer,
            "bypass": c.bypass,
            "induce": c.induce,
            "kl": c.kl,
            "chosen": "chosen" if c is selection.chosen else "",
        }
        for c in selection.candidates
    )
    note = (
        "Refusal log-odds of the first token, on validation prompts; KL of harmless ones. Chosen: the least bypass "
        "with induce > 0, KL < 0.1 and layer < 0.8 L."
    )
    return Table("candidates", "Candidate directions", columns, rows, note)


def _bars(
    subject: Subject, methods: Sequence[Method], stock: Sequence[float], away: Sequence[float], towards: Sequence[float]
) -> Plot:
    names = tuple(method.name for method in methods)
    panels = tuple(
        Bars(title, "prompts refused", names, tuple(values), (before, "stock model"))
        for title, values, before in (
            ("Harmful prompts, away from refusal", away, stock[0]),
            ("Harmless prompts, towards refusal", towards, stock[1]),
        )
    )
    return Plot("methods", f"Steering baselines: {subject.source}", panels)


def _maps(subject: Subject, selection: Selection) -> Plot:
    positions = sorted({c.position for c in selection.candidates})
    layers = sorted({c.layer for c in selection.candidates})
    at = {(c.position, c.layer): c for c in selection.candidates}
    box = (layers.index(selection.chosen.layer), positions.index(selection.chosen.position))

    def cells(name: str) -> tuple[tuple[float | None, ...], ...]:
        return tuple(tuple(getattr(at.get((p, layer)), name, None) for p in positions) for layer in layers)

    panels = tuple(
        HeatMap(
            title,
            "token, from the prompt's end",
            "layer",
            cells(name),
            tuple(map(str, positions)),
            tuple(map(str, layers)),
            unit,
            diverging,
            (box,),
        )
        for title, name, unit, diverging in (
            ("Bypass: harmful, ablated", "bypass", "log-odds", True),
            ("Induce: harmless, added", "induce", "log-odds", True),
            ("KL: harmless, ablated", "kl", "nats", False),
        )
    )
    return Plot("candidates", f"Candidate directions: {subject.source}", panels, "Boxed: the chosen direction.")
