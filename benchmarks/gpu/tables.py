"""Tables of what the gate found: goals, correctness, decoding, the op, its variants, calls.

A side that a check found wrong has no timing in any of them.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import results
from benchmarks.gpu.results import Gate
from benchmarks.records import quartiles
from steerkern.report import Column, Row, Table

FOLDED = ("gpu-checks", "gpu-op", "gpu-variants", "gpu-calls")
"""Tables that the README keeps shut."""
WRONG = "wrong"
"""Stands where a timing would."""


def goals(folder: Path) -> Table | None:
    """Every goal with what was found furthest from it."""
    gate = results.read(folder)
    if gate is None:
        return None
    judged = [
        {**verdict, "stage": name, "counts": bool(verdict["found"]) and not gate.counts_out(name, verdict["side"])}
        for name, stage in gate.stages.items()
        for verdict in (stage.get("result") or {}).get("goals", ())
    ]
    body: list[Row] = []
    for goal in gate.about["goals"]:
        own = [verdict for verdict in judged if verdict["what"] == goal["what"]]
        sides = list(dict.fromkeys(verdict["side"] for verdict in own))
        body += [_verdict(goal, side, [v for v in own if v["side"] == side]) for side in sides]
        if not own:
            body.append({"what": goal["what"], "goal": goal["goal"], "met": "not measured"})
    columns = [
        Column("what", "what"),
        Column("side", "backend"),
        Column("goal", "goal"),
        Column("met", "cases"),
        Column("found", "worst median (quartiles)"),
        Column("at", "at"),
    ]
    note = "The goal is for the median of every case."
    return _table(gate, "goals", "goals", columns, body, note, "decode", "variants")


def _verdict(goal: Mapping[str, Any], side: str, cases: Sequence[Mapping[str, Any]]) -> Row:
    """One backend's cases under one goal."""
    counted = [case for case in cases if case["counts"]]
    met = sum(case["met"] for case in counted)
    counts = {"met": met, "missed": len(counted) - met, "wrong or failed": len(cases) - len(counted)}
    said = ", ".join(f"{what} {count}" for what, count in counts.items() if count)
    row = {"what": goal["what"], "side": side, "goal": goal["goal"], "met": said}
    if not counted:
        return row
    pick = min if goal["goal"].startswith(">=") else max
    worst = pick(counted, key=lambda case: float(case["found"][1]))
    return {**row, "found": quartiles(worst["found"], ".3f"), "at": worst["stage"]}


def checks(folder: Path) -> Table | None:
    """What was checked, what was wrong, and what did not run."""
    gate = results.read(folder)
    if gate is None:
        return None
    body: list[Row] = [row for name, stage in gate.stages.items() for row in _check(name, stage)]
    shapes = [found for _, found in gate.results("op")]
    if shapes:
        right = [found["relative_error"] for found in shapes if not found["wrong"]]
        worst = max((error for errors in right for error in errors.values()), default=0.0)
        said = f"{len(right)} of {len(shapes)} shapes, their relative error at most {worst:.2g}"
        body.append({"stage": "op, against the reference", "correct": len(right) == len(shapes), "said": said})
    columns = [Column("stage", "stage"), Column("correct", "correct"), Column("said", "what it said")]
    return _table(gate, "checks", "is it right", columns, body, "What is wrong here is in no other table.")


def _check(name: str, stage: Mapping[str, Any]) -> Iterator[Row]:
    """The rows of a stage that checks, or of any that did not go well."""
    found, status = stage.get("result") or {}, stage["status"]
    error = _short(stage.get("error", ""))
    kind = name.split(maxsplit=1)[0]
    if status != "done":
        if status != "skipped" or _checks(name):
            correct = {"wrong": "no", "failed": "failed", "skipped": "not run"}[status]
            yield {"stage": name, "correct": correct, "said": error}
    elif "skipped" in found:
        yield {"stage": name, "correct": "not run", "said": found["skipped"]}
    elif kind == "conformance":
        for which, run in found["runs"].items():
            finished = run["exit"] == 0
            yield {"stage": which, "correct": "yes" if finished else "not finished", "said": "; ".join(run["last"])}
    elif _checks(name):
        finished = found.get("exit", 0) == 0
        yield {"stage": name, "correct": "yes" if finished else "not finished", "said": _said(found)}
    for side, reason in found.get("failed", {}).items():
        yield {"stage": f"{name}, {side}", "correct": "failed", "said": _short(reason)}


def _checks(name: str) -> bool:
    return name.split(maxsplit=1)[0] in results.BACKENDS or name.endswith((": logits", ": replays"))


def _said(found: Mapping[str, Any]) -> str:
    """What a check that found nothing wrong measured."""
    if "logits" in found:
        return f"{len(found['logits'])} ways, at most {max(found['logits'].values()):.2f} of the effect away"
    if "distance" in found:
        far = max(far for by_scale in found["distance"].values() for far in by_scale.values())
        return f"{', '.join(found['distance'])}: at most {far:.3f} of the effect away"
    if "changes" in found:
        return f"{', '.join(found['changes'])}: a replay has the bits of a launch after every change"
    return "; ".join(found["said"][-1:])


def decode(folder: Path) -> Table | None:
    """Tokens per second of the stock model, and every way of running it over that."""
    gate = results.read(folder)
    if gate is None:
        return None
    timed = {case: found for case, found in gate.results("decode") if "tokens_per_second" in found}
    sides = [
        side for found in timed.values() for part in ("over_stock", "failed", "wrong") for side in found.get(part, ())
    ]
    sides = [side for side in dict.fromkeys(sides) if side != "stock"]
    body: list[Row] = []
    for case, found in timed.items():
        name = f"decode {case}"
        row: dict[str, Any] = {"case": case, "rate": f"{found['tokens_per_second']['stock']:.1f}"}
        row |= {side: quartiles(ratio) for side, ratio in found["over_stock"].items()}
        row |= dict.fromkeys(found.get("failed", ()), "failed")
        row |= {side: WRONG for side in sides if gate.counts_out(name, side)}
        row["goal"] = "; ".join(dict.fromkeys(verdict["goal"] for verdict in found["goals"]))
        body.append({**row, "missed": _missed(gate, name, found, "side")})
    columns = [Column("case", "case"), Column("rate", "stock, tokens/s"), *(Column(side, side) for side in sides)]
    columns += [Column("goal", "goal"), Column("missed", "goal missed by")]
    note = (
        "Speed over the *unsteered stock* model: median (quartiles), by pairs within rounds; compiled, one way after "
        "the other. Random weights, bf16."
    )
    return _table(gate, "decode", "decoding", columns, body, note, "decode")


def op(folder: Path) -> Table | None:
    """The op over the unsteered kernel of its backend, and over what it replaces."""
    gate = results.read(folder)
    if gate is None:
        return None
    body: list[Row] = []
    sides: dict[str, None] = {}
    for case, found in gate.results("op"):
        name = f"op {case}"
        if found["wrong"] or gate.counts_out(name, found["backend"]):
            body.append({"case": case, "us": WRONG})
            continue
        over = {side: ratio for side, ratio in found["over_unsteered"].items() if not side.endswith("plans")}
        over.pop("unsteered")
        sides |= dict.fromkeys(over)
        row = {"case": case, "us": f"{found['us']['unsteered'][1]:.2f}"}
        row |= {side: quartiles(ratio) for side, ratio in over.items()}
        row |= {"plans": quartiles(found["plans_over_one"])} if found["plans_over_one"] else {}
        row |= {"copy": quartiles(found["of_copy"]["K=1"])} if found["of_copy"] else {}
        body.append({**row, "missed": _missed(gate, name, found, "what")})
    columns = [Column("case", "case"), Column("us", "unsteered, us"), *(Column(side, side) for side in sides)]
    columns += [Column("plans", "N plans (at most 256) over one"), Column("copy", "bandwidth over a copy's, K=1")]
    columns += [Column("missed", "goals missed")]
    note = "Time over the unsteered kernel (add and norm) of the same backend: median (quartiles). bf16."
    return _table(gate, "op", "the op", columns, body, note, "variants")


def variants(folder: Path) -> Table | None:
    """The ways of launching the CUDA kernel."""
    gate = results.read(folder)
    if gate is None:
        return None
    body: list[Row] = []
    sides: dict[str, None] = {}
    for case, found in gate.results("variants"):
        row = {"case": case} | dict.fromkeys(found["wrong"], WRONG)
        if gate.counts_out(f"variants {case}", found["backend"]):
            row |= {"us": WRONG}
        elif "us" in found:
            row |= {"us": f"{found['us']['default'][1]:.2f}"}
            row |= {side: quartiles(ratio) for side, ratio in found["over_default"].items() if side != "default"}
        sides |= dict.fromkeys(side for side in row if side not in ("case", "us", "default"))
        body.append(row)
    columns = [Column("case", "case"), Column("us", "default, us"), *(Column(side, side) for side in sides)]
    return _table(gate, "variants", "ways of launching", columns, body, "Time over the default launch.", "variants")


def calls(folder: Path) -> Table | None:
    """What a call costs the host."""
    gate = results.read(folder)
    if gate is None or not (found := gate.stages.get("calls", {}).get("result")):
        return None
    body: list[Row] = [
        {"call": side, "us": WRONG if gate.counts_out("calls", side) else f"{us:.2f}"} for side, us in found.items()
    ]
    columns = [Column("call", "call"), Column("us", "us, median")]
    return _table(gate, "calls", "a call on the host", columns, body, "One row, nobody waiting for the device.")


TABLES = (goals, decode, checks, op, variants, calls)
"""In the order in which they are shown."""


def _missed(gate: Gate, name: str, found: Mapping[str, Any], what: str) -> str:
    """The goals that a stage missed, called by their sides or by what they are about."""
    missed = [v[what] for v in found["goals"] if v["found"] and not v["met"] and not gate.counts_out(name, v["side"])]
    return "; ".join(dict.fromkeys(missed))


def _short(text: str) -> str:
    return textwrap.shorten(text, 160)


def _table(
    gate: Gate, name: str, title: str, columns: Sequence[Column], body: Sequence[Row], note: str, *noise: str
) -> Table | None:
    """The table under what has to be known first, above what repeats it; None of no rows.

    ``noise``: the kinds of stages that timed something against itself.
    """
    headed = "\n\n".join(filter(None, (f"GPU: {title}", gate.warning(*noise))))
    about = f"{note} Made {gate.provenance()}; repeat: `steerkern bench --suite gpu`."
    return Table(f"gpu-{name}", headed, tuple(columns), tuple(body), about) if body else None
