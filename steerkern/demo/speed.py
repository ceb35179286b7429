"""What steering costs: tokens per second of the stock model, hooks and steerkern, side by side."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..edits import ablate
from ..plan import Plan
from ..replies import encode
from ..report import Column, Row, Table
from ..runtime.session import steer
from ..subject import Subject
from ..timing import Quartiles, Timings, decode_contenders, interleave
from .examples import Examples, Size, prompts
from .layers import Found

WARMUP = 2

NAMES = {
    "stock": "stock model",
    "hook": "hooks: ablation written by hand",
    "fused": "attached: steerkern, no row steered",
    "steerkern": "steered: the same by steerkern",
}
SHORT = {name: title.partition(":")[0] for name, title in NAMES.items()} | {"stock": "stock"}
PATTERNS = {"fused": "stock", "steerkern": "hook"}
"""Which contender must make the tokens of which other."""

PAIRS = (("steerkern", "stock"), ("steerkern", "hook"), ("steerkern", "fused"), ("fused", "stock"), ("hook", "stock"))


@dataclass(frozen=True)
class Speed:
    """The timings, and whether those that must agree made the same tokens."""

    timings: Timings
    agreement: dict[str, str]
    size: Size
    threads: int
    backend: str


def measure_speed(subject: Subject, found: Found, heldout: Examples, size: Size, threads: int) -> Speed:
    """Check that the four ways of decoding do the same work, then time them in turn."""
    unit = found.directions[found.layer].unit
    plan = Plan(ablate(unit), name="ablate")
    inputs = encode(subject.model, subject.render(prompts(heldout.harmful[:1])))
    contenders = decode_contenders(subject.model, inputs, size.tokens, plan, unit)
    usual = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        made: dict[str, Tensor] = {}
        for contender in contenders:
            with contender.setting():
                made[contender.name] = contender.run()
        wait = torch.cuda.synchronize if subject.model.device.type == "cuda" else None
        with subject.progress("timing, four ways in turn", size.rounds + WARMUP) as step:
            timings = interleave(contenders, rounds=size.rounds, warmup=WARMUP, synchronize=wait, step=lambda: step(1))
    finally:
        torch.set_num_threads(usual)
    agreement = {name: _agreement(made[name], made[pattern]) for name, pattern in PATTERNS.items()}
    return Speed(timings, agreement, size, threads, _backend(subject, plan))


def speed_table(subject: Subject, speed: Speed) -> Table:
    """Tokens per second of each way."""
    rows: list[Row] = []
    for name, title in NAMES.items():
        rate = speed.timings.rate(name, speed.size.tokens)
        same = f"{SHORT[PATTERNS[name]]}: {speed.agreement[name]}" if name in PATTERNS else ""
        rows.append({"name": title, "rate": rate.median, "quartiles": _span(rate, ".0f"), "same": same})
    columns = (
        Column("name", "decoding"),
        Column("rate", "tokens/s", ".0f"),
        Column("quartiles", "quartiles"),
        Column("same", "same tokens as"),
    )
    parameters = sum(p.numel() for p in subject.model.parameters())
    note = (
        f"Greedy model.generate of {speed.size.tokens} tokens, batch 1, threads: {speed.threads}, interleaved rounds: "
        f"{speed.size.rounds}; {parameters:,} parameters in {subject.dtype}; backend {speed.backend}."
    )
    if speed.backend == "reference":
        note += " The native kernels do not run here and this is plain torch: steerkern doctor says why."
    if speed.agreement["steerkern"] != "yes" and subject.dtype != "float32":
        note += f" The hook rounds its projection to {subject.dtype}, the kernel sums in float32: tokens may part."
    return Table("speed", "Decoding speed", columns, tuple(rows), note)


def ratio_table(subject: Subject, speed: Speed) -> Table:
    """Ratios of tokens per second, taken within each round."""
    rows: list[Row] = []
    for ours, theirs in PAIRS:
        ratio, pair = speed.timings.speedup(ours, theirs), f"{SHORT[ours]} / {SHORT[theirs]}"
        rows.append({"pair": pair, "ratio": ratio.median, "quartiles": _span(ratio, ".3f")})
    note = "Above 1 the first is faster; the ratio is taken within each round."
    if subject.organism:
        note += " A model this tiny spends its time on Python and launches: expect ratios nearer 1 on larger ones."
    columns = (Column("pair", "pair"), Column("ratio", "median ratio", ".3f"), Column("quartiles", "quartiles"))
    return Table("ratios", "Ratios of tokens per second", columns, tuple(rows), note)


def _agreement(made: Tensor, pattern: Tensor) -> str:
    """``yes``, or where two continuations part: in half types a hook may round differently from the kernel."""
    differ = (made != pattern).nonzero()
    return "no, from token " + str(int(differ[0, 1])) if len(differ) else "yes"


def _backend(subject: Subject, plan: Plan) -> str:
    with steer(subject.model, plan, silent="ignore") as session:
        if session.backend != "cpu":
            return session.backend
    from .. import _C

    return f"cpu ({_C.isa()})"


def _span(quartiles: Quartiles, form: str) -> str:
    return f"{quartiles.low:{form}} to {quartiles.high:{form}}"
