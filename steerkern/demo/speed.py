"""What steering costs: tokens per second of the stock model, hooks and steerkern, side by side."""

from __future__ import annotations

import torch
from torch import Tensor

from ..edits import ablate
from ..plan import Plan
from ..replies import encode
from ..report import Column, Table
from ..runtime.session import steer
from ..timing import Quartiles, Timings, decode_contenders, interleave
from .examples import Examples, Size
from .layers import Found
from .subject import Subject

NAMES = {
    "stock": "stock model",
    "hook": "hand-written hooks, ablating",
    "fused": "steerkern attached, no row steered",
    "steerkern": "steerkern, ablating",
}


def measure_speed(
    subject: Subject, found: Found, heldout: Examples, size: Size, threads: int
) -> tuple[Table, Table, Timings, str]:
    """Tokens per second of stock, hook, fused but unsteered, and steered, after checking that they do the same work."""
    unit = found.directions[found.layer].unit
    plan = Plan(ablate(unit), name="ablate")
    inputs = encode(subject.model, subject.render(heldout.harmful[:1]))
    usual = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        contenders = decode_contenders(subject.model, inputs, size.tokens, plan, unit)
        made = {}
        for contender in contenders:
            with contender.setting():
                made[contender.name] = contender.run()
        backend = _backend(subject, plan)
        with subject.progress("timing, four ways in turn", size.rounds + 2) as step:
            wait = torch.cuda.synchronize if subject.model.device.type == "cuda" else None
            timings = interleave(contenders, rounds=size.rounds, synchronize=wait, step=lambda: step(1))
    finally:
        torch.set_num_threads(usual)
    rows = []
    for name, pattern in (("stock", None), ("hook", None), ("fused", "stock"), ("steerkern", "hook")):
        rate = timings.rate(name, size.tokens)
        rows.append({"name": NAMES[name], "rate": rate.median, "quartiles": _span(rate, ".0f"), "same": _same(made, name, pattern)})
    parameters = sum(p.numel() for p in subject.model.parameters())
    note = (
        f"Greedy model.generate of {size.tokens} tokens, batch 1, {threads} thread{'s' if threads > 1 else ''}, {size.rounds} "
        f"interleaved rounds, {parameters:,} parameters in {str(subject.model.dtype).removeprefix('torch.')}, backend {backend}."
    )
    columns = (Column("name", "decoding"), Column("rate", "tokens/s", ".0f"), Column("quartiles", "quartiles"), Column("same", "same tokens as"))
    speed = Table("speed", "Decoding speed", columns, tuple(rows), note)
    pairs = (("steerkern", "stock"), ("steerkern", "hook"), ("steerkern", "fused"), ("fused", "stock"), ("hook", "stock"))
    lines = []
    for ours, theirs in pairs:
        ratio = timings.speedup(ours, theirs)
        lines.append({"pair": f"{NAMES[ours]} / {NAMES[theirs]}", "ratio": ratio.median, "quartiles": _span(ratio, ".3f")})
    note = "Ratios of tokens/s within each round; above 1 the first is faster."
    if subject.organism:
        note += " A model this small spends its time in Python, not in its weights: ratios shrink with size."
    titles = (Column("pair", "pair"), Column("ratio", "median ratio", ".3f"), Column("quartiles", "quartiles"))
    return speed, Table("ratios", "Ratios", titles, tuple(lines), note), timings, backend


def _same(made: dict[str, Tensor], name: str, pattern: str | None) -> str:
    if pattern is None:
        return ""
    differ = (made[name] != made[pattern]).nonzero()
    return f"{pattern}: yes" if not len(differ) else f"{pattern}: no, from token {int(differ[0, 1])}"


def _backend(subject: Subject, plan: Plan) -> str:
    with steer(subject.model, plan, silent="ignore") as session:
        if session.backend != "cpu":
            return session.backend
    from . import _C

    return f"cpu ({_C.isa()})"


def _span(quartiles: Quartiles, form: str) -> str:
    return f"{quartiles.low:{form}} to {quartiles.high:{form}}"
