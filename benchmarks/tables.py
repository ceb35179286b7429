"""Tables of results. Each is made of the JSON of one or two suites; where they have not run there is none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import records
from benchmarks.gpu import tables as gpu
from benchmarks.records import Record, quartiles
from steerkern.report import Column, Row, Table

READING = ("controller", "extraction")


def decode(folder: Path) -> Table | None:
    """Tokens per second with every layer steered, against the stock model."""
    note = (
        "`model.generate` from one token on, every layer steered. The gain is the fusion of the norms; steering itself "
        "costs what lies between `fused, unsteered` and the columns after it."
    )
    return _speedups("decode", "Decoding", records.read(folder, "decode"), ("model", "dtype", "batch"), note)


def prefill(folder: Path) -> Table | None:
    """The same for one forward over a prompt."""
    note = "One forward over a prompt, every layer steered."
    return _speedups("prefill", "Prefill", records.read(folder, "prefill"), ("model", "tokens", "dtype"), note)


def serving(folder: Path) -> Table | None:
    """Continuous batching, steered, against the stock model."""
    note = "`generate_batch` of 16 requests."
    return _speedups("serving", "Continuous batching", records.read(folder, "serving"), ("model",), note)


def vllm(folder: Path) -> Table | None:
    """A vLLM engine with the plugin, against the engine without it."""
    note = (
        "Offline throughput of 64 requests of 8 + 12 tokens in vLLM on the CPU, eager, against the engine without the "
        "plugin."
    )
    return _speedups("vllm", "vLLM", records.read(folder, "vllm"), ("model",), note)


def peers(folder: Path) -> Table | None:
    """Other libraries that steer: what they cost and whether they do what was asked."""
    record = records.read(folder, "peers")
    if record is None:
        return None
    checks = list(dict.fromkeys(name for row in record.rows.values() for name in row.get("correct", {})))
    body: list[Row] = []
    for row in record.rows.values():
        ran = row["status"] == "run"
        body.append(
            {
                "peer": f"{row['peer']} {row.get('version') or ''}".strip(),
                "edit": row["edit"],
                "added": quartiles(row["added_us_per_layer_token"], ".1f") if ran else "not run",
                "ratio": quartiles(row["ratio_to_stock"]) if ran else _absence(row),
                **{name: row.get("correct", {}).get(name, "") for name in checks},
                "theirs": row.get("authors_figure"),
            }
        )
    columns = [
        Column("peer", "library"),
        Column("edit", "edit"),
        Column("added", "us added per layer and token"),
        Column("ratio", "time over stock"),
        *(Column(name, name) for name in checks),
        Column("theirs", "authors' own figure"),
    ]
    installs = dict.fromkeys(
        f" What is not installed: `{row['install']}`." for row in record.rows.values() if _is_missing(row)
    )
    note = "Below 0 us: faster than the stock model." + "".join(installs)
    return _table("peers", "Other libraries", columns, body, record, note)


def sessions(folder: Path) -> Table | None:
    """What a session costs apart from decoding."""
    record = records.read(folder, "attach")
    if record is None:
        return None
    rows = record.rows
    attach, memory = rows["test_attach_and_detach_of_32_layers"], rows["test_memory_of_a_session"]
    kilobytes = (memory["python_peak_bytes"] + memory["row_map_bytes"]) / 1024
    body = [
        ("attach + detach, 32 layers", *_judged(attach["quartiles_ms"], ".1f", "ms", attach["goal_ms"])),
        ("a plain forward of three tokens, beside it", f"{attach['plain_forward_ms']:.1f} ms", ""),
        ("change a plan's strength", *_judged(rows["test_scale_during_decode"]["quartiles_ms"], ".2f", "ms", 1)),
        ("swap a plan", *_judged(rows["test_swap_of_a_plan_during_decode"]["quartiles_ms"], ".2f", "ms", 1)),
        (
            "peak memory beside the tables",
            f"{kilobytes:.0f} kB",
            f"<= 1024 kB: {records.verdict(kilobytes, '<= 1024')}",
        ),
        ("tables", f"{memory['table_bytes'] / 1024:.0f} kB", ""),
    ]
    return _medians("attach", "Sessions", body, record)


def swap(folder: Path) -> Table | None:
    """The row map of a decode step, and changes of plans."""
    record = records.read(folder, "swap")
    if record is None:
        return None
    body = []
    for name, row in record.rows.items():
        first, _, second = records.case(name).partition(", ")
        if name.startswith("test_row_map"):
            what = f"row map of a decode step, {first} rows, {second} plans"
            body.append((what, *_judged([1e3 * ms for ms in row["quartiles_ms"]], ".1f", "us", row["goal_us"])))
        elif name.startswith("test_change"):
            what = f"{first} a plan, beside {second} others"
            body.append((what, *_judged(row["quartiles_ms"], ".2f", "ms", row["goal_ms"])))
    return _medians("swap", "Who is steered by what", body, record)


def reading(folder: Path) -> Table | None:
    """What a controller adds to decoding, and capture to forwards."""
    record = records.read(folder, *READING)
    if record is None:
        return None
    body = []
    for name, row in record.rows.items():
        if "speedup_over_plain_quartiles" in row:
            what = f"decoding under a controller, speed over the same plan without one, {records.case(name)}"
            found, bound = row["speedup_over_plain_quartiles"]["guided"], f">= {row['goal']:.2f}"
            body.append((what, quartiles(found), f"{bound}: {records.verdict(found[1], bound)}"))
        elif "cost_over_plain_quartiles" in row:
            what = f"capturing two states per layer, time over the plain forwards, {records.case(name)}"
            found, bound = row["cost_over_plain_quartiles"]["capture"], f"<= {row['goal']:.2f}"
            body.append((what, quartiles(found), f"{bound}: {records.verdict(found[1], bound)}"))
    return _medians("reading", "Reading states", body, record, READING) if body else None


def ops(folder: Path) -> Table | None:
    """The fused op against what it replaces, and against a copy of as many bytes."""
    note = "Against an eager hook and norm, the same compiled, our own unsteered kernel, and a copy of as many bytes."
    return _ratios("ops", "The fused op", records.read(folder, "ops"), note)


def malloc(folder: Path) -> Table | None:
    """The eager baselines again, with an allocator that keeps large blocks."""
    note = "As above, with `MALLOC_MMAP_THRESHOLD_` and `MALLOC_TRIM_THRESHOLD_` raised, which eager torch gains by."
    return _ratios("malloc", "Against eager with tuned malloc", records.read(folder, "malloc"), note)


def scaling(folder: Path) -> Table | None:
    """Straight lines through the medians of every side."""
    record = records.read(folder, "scaling")
    if record is None:
        return None
    body: list[Row] = []
    for name, row in record.rows.items():
        for side, fit in row.get("sides", {}).items():
            dtype = records.case(name) if "[" in name else ""
            at = {"case": f"{row['against']} {dtype}".strip(), "range": f"{row['sizes'][0]} to {row['sizes'][-1]}"}
            body.append({**at, "side": side, "base": fit["base_us"], "slope": fit["slope_us"], "off": fit["off"]})
    columns = [
        Column("case", "against"),
        Column("range", "range"),
        Column("side", "side"),
        Column("base", "base, us", ".4g"),
        Column("slope", "us for each", ".3g"),
        Column("off", "off the line by", ".0%"),
    ]
    return _table("scaling", "How cost grows", columns, body, record, "Straight lines fitted by relative distance.")


def isolation(folder: Path) -> Table | None:
    """Tenants, threads, rows, leaks."""
    found = records.document(folder / "isolation.json", "levels")
    if found is None:
        return None
    keys = {"rows": "rows", "steered": "steered", "swaps": "plans swapped", "failed": "failed"}
    keys |= {"given_up": "given up", "leaked": "rows leaked"}
    body: list[Row] = [
        {"level": name, **{key: f"{count[key]:,}" for key in keys}} for name, count in found["levels"].items()
    ]
    note = (
        f"{found['tenants']} tenants with an axis each, {found['threads']} threads, one session; the rows `wrong on "
        f"purpose` must leak. Made {found['date'][:10]}, commit {found['commit'][:7]}; "
        "repeat: `steerkern bench --suite isolation`."
    )
    columns = (Column("level", "level"), *(Column(key, title) for key, title in keys.items()))
    return Table("isolation", "Isolation", columns, tuple(body), note)


TABLES = (decode, peers, *gpu.TABLES, prefill, serving, vllm, sessions, reading, swap, isolation, ops, malloc, scaling)
"""In the order in which they are shown."""


def everything(folder: Path) -> list[Table]:
    """The tables of all suites that have left results in ``folder``."""
    return [table for make in TABLES if (table := make(folder)) is not None]


def _speedups(name: str, title: str, record: Record | None, parameters: Sequence[str], note: str) -> Table | None:
    """A row per case: tokens per second of the stock model, and every other side over it with quartiles."""
    if record is None:
        return None
    sides = list(dict.fromkeys(side for row in record.rows.values() for side in row["speedup_over_stock_quartiles"]))
    body: list[Row] = []
    for benchmark, row in record.rows.items():
        ratios: Mapping[str, Any] = row["speedup_over_stock_quartiles"]
        at: dict[str, Any] = dict(zip(parameters, records.case(benchmark).split(", "), strict=False))
        at |= {"batch": at.get("batch", "1"), "rate": _rate(row["tokens_per_second"]["stock"])}
        at |= {side: quartiles(ratios[side]) for side in ratios}
        bounds = {side: f">= {bound:.2f}" for side, bound in row.get("goals", {}).items()}
        verdicts = (
            f"{side} {ratios[side][1]:.3f} {bound}: {records.verdict(ratios[side][1], bound)}"
            for side, bound in bounds.items()
        )
        body.append({**at, "goals": "; ".join(verdicts) or None})
    goals = [Column("goals", "goals")] if any(row["goals"] for row in body) else []
    columns = [Column(key, key) for key in parameters]
    columns += [Column("rate", "stock, tokens/s"), *(Column(side, side) for side in sides), *goals]
    about = "Speed over the *unsteered stock* model, by pairs within rounds: median (quartiles). " + note
    return _table(name, title, columns, body, record, about)


def _ratios(name: str, title: str, record: Record | None, note: str) -> Table | None:
    """A row per case with every ratio that it has, by pairs within turns: median (quartiles)."""
    if record is None:
        return None
    body: list[Row] = []
    for benchmark, row in record.rows.items():
        found = row.get("ratio_quartiles") or row.get("speedup_over_stock_quartiles", {})
        shown = benchmark.partition("[")[0].removeprefix("test_").replace("_", " ")
        text = "; ".join(f"{key.replace('_', ' ')} {quartiles(value, '.3g')}" for key, value in found.items())
        text += f"; again {row['again']:.3g}" if "again" in row else ""
        bounds = {key: (found[key][1], bound) for key, bound in row.get("goals", {}).items()}
        goals = "; ".join(f"{key.replace('_', ' ')} {b}: {records.verdict(v, b)}" for key, (v, b) in bounds.items())
        body.append({"case": f"{shown}: {records.case(benchmark)}", "ratios": text, "goals": goals or None})
    columns = [Column("case", "case"), Column("ratios", "ratios")]
    columns += [Column("goals", "goals")] if any(row["goals"] for row in body) else []
    return _table(name, title, columns, body, record, note)


def _medians(
    name: str, title: str, body: Iterable[tuple[str, str, str]], record: Record, repeated: Sequence[str] = ()
) -> Table:
    rows: list[Row] = [{"what": what, "median": median, "goal": goal} for what, median, goal in body]
    columns = [Column("what", "what"), Column("median", "median (quartiles)"), Column("goal", "goal")]
    return _table(name, title, columns, rows, record, "", repeated)


def _judged(found: Sequence[float], form: str, unit: str, most: float) -> tuple[str, str]:
    """Quartiles for a person, and whether the median stays under its bound."""
    bound = f"<= {most:g}"
    return f"{quartiles(found, form)} {unit}", f"{bound} {unit}: {records.verdict(found[1], bound)}"


def _table(
    name: str,
    title: str,
    columns: Sequence[Column],
    body: Sequence[Row],
    record: Record,
    note: str,
    repeated: Sequence[str] = (),
) -> Table:
    """The table, under the warning that its run was noisy if it was, above what repeats it (the suite of its name)."""
    suites = " ".join(f"--suite {suite}" for suite in repeated or (name,))
    about = f"{note} Made {record.provenance()}; repeat: `steerkern bench {suites}`."
    headed = "\n\n".join(filter(None, (title, record.warning())))
    return Table(name, headed, tuple(columns), tuple(body), about.strip())


def _rate(tokens: float) -> str:
    return f"{tokens:.0f}" if tokens >= 100 else f"{tokens:.1f}"


def _absence(row: Mapping[str, Any]) -> str:
    """Why a library was not run, and what would install it; what is below the table is not said again."""
    reason, install = str(row.get("reason", "")), row["install"]
    if _is_missing(row):
        return reason.replace(f": {install}", "")
    return "; ".join(filter(None, (reason, install and f"`{install}`")))


def _is_missing(row: Mapping[str, Any]) -> bool:
    """Whether a library was not run because it is not installed."""
    return bool(row["install"]) and row["install"] in row.get("reason", "")
