"""The README's tables, written from the committed results: ``python -m benchmarks.tables``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- written by python -m benchmarks.tables -->", "<!-- end -->"


def results(suite: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The JSON files of a suite: machine and commit, and ``extra_info`` by benchmark name, with the median in ms."""
    documents = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob(f"{suite}*.json"))]
    benchmarks = [benchmark for document in documents for benchmark in document["benchmarks"]]
    rows = {b["name"]: {**b["extra_info"], "median_ms": 1e3 * b["stats"]["median"]} for b in benchmarks}
    return documents[0], rows


def decode() -> str:
    """Tokens per second with every layer steered, against the stock model."""
    _, rows = results("decode")
    names = ["stock again", "hook K=1", "fused, unsteered", "steered K=1", "steered K=4"]
    head = ["model", "stock, tokens/s", *names, "goal"]
    body = []
    for name, row in rows.items():
        model = name.removeprefix("test_decode[").removesuffix("]").replace("-", ", ")
        ratios = row["speedup_over_stock_quartiles"]
        cells = [f"{ratios[n][1]:.2f} ({ratios[n][0]:.2f} to {ratios[n][2]:.2f})" for n in names]
        body.append([model, f"{row['tokens_per_second']['stock']:.0f}", *cells, f"{row['goal']:.2f}"])
    return table(head, body)


def ops() -> str:
    """The fused op against what it replaces, and against a copy of as many bytes."""
    _, rows = results("ops")
    body = []
    for name, row in rows.items():
        shown = name.removeprefix("test_").replace("_", " ").replace("[", ": ").removesuffix("]")
        ratios = {k.replace("_", " "): v for k, v in row.items() if k not in ("median_us", "median_ms")}
        if ratios:
            body.append([shown, "; ".join(f"{k} {v}" for k, v in ratios.items())])
    return table(["case", "ratios"], body)


def sessions() -> str:
    """What a session costs apart from decoding."""
    _, rows = results("attach")
    attach, memory = rows["test_attach_and_detach_of_32_layers"], rows["test_memory_of_a_session"]
    kilobytes = (memory["python_peak_bytes"] + memory["row_map_bytes"]) / 1024
    body = [
        ["attach + detach, 32 layers", f"{attach['median_ms']:.1f} ms", f"{attach['goal_ms']:.0f} ms"],
        ["a plain forward of three tokens, beside it", f"{attach['plain_forward_ms']:.1f} ms", ""],
        ["change a plan's strength", f"{rows['test_scale_during_decode']['median_ms']:.2f} ms", "1 ms"],
        ["swap a plan", f"{rows['test_swap_of_a_plan_during_decode']['median_ms']:.2f} ms", "1 ms"],
        ["peak memory beside the tables", f"{kilobytes:.0f} kB", "1024 kB"],
        ["tables", f"{memory['table_bytes'] / 1024:.0f} kB", ""],
    ]
    return table(["what", "median", "goal"], body)


def batching() -> str:
    """Continuous batching, steered, against the stock model."""
    _, rows = results("batching")
    names = ["stock again", "one plan", "half plain", "a plan each"]
    body = []
    for name, row in rows.items():
        ratios = row["speedup_over_stock_quartiles"]
        cells = [f"{ratios[n][1]:.2f} ({ratios[n][0]:.2f} to {ratios[n][2]:.2f})" for n in names]
        body.append([name.removeprefix("test_generate_batch[").removesuffix("]"), *cells, f"{row['goal']:.2f}"])
    return table(["model", *names, "goal"], body)


def swap() -> str:
    """The row map of a decode step, changes of plans, and what a controller adds."""
    _, rows = results("swap")
    body = []
    for name, row in rows.items():
        if name.startswith("test_row_map"):
            rows_, plans = name.partition("[")[2].removesuffix("]").split("-")
            what = f"row map of a decode step, {rows_} rows, {plans} plans"
            body.append([what, f"{1e3 * row['median_ms']:.1f} us", f"{row['goal_us']:.0f} us"])
        elif name.startswith("test_change"):
            change, others = name.partition("[")[2].removesuffix("]").split("-")
            what = f"{change} a plan, beside {others} others"
            body.append([what, f"{row['median_ms']:.2f} ms", f"{row['goal_ms']:.0f} ms"])
        else:
            low, middle, high = row["speedup_over_plain_quartiles"]["guided"]
            shape = name.partition("[")[2].removesuffix("]")
            what = f"decoding under a controller over the same plan without one, {shape}"
            body.append([what, f"{middle:.2f} ({low:.2f} to {high:.2f})", f"{row['goal']:.2f}"])
    return table(["what", "median", "goal"], body)


def isolation() -> str:
    """Tenants, threads, rows, leaks."""
    found = json.loads((RESULTS / "isolation.json").read_text(encoding="utf-8"))
    body = [
        [name, *(f"{count[key]:,}" for key in ("rows", "steered", "swaps", "failed", "given_up", "leaked"))]
        for name, count in found["levels"].items()
    ]
    head = ["level", "rows", "steered", "plans swapped", "failed", "given up", "rows leaked"]
    title = f"{found['tenants']} tenants with an axis each, {found['threads']} threads, one session"
    return f"**Isolation**: {title} (`python -m benchmarks.isolation`):\n\n{table(head, body)}"


def table(head: list[str], body: list[list[str]]) -> str:
    """A Markdown table."""
    rows = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def text() -> str:
    """Everything between the README's two marks."""
    document, _ = results("decode")
    machine, commit = document["machine_info"], document["commit_info"]
    where = f"{machine['device']}, torch {machine['torch']}, {machine['instruction set']}, one thread"
    return f"""{BEGIN}
Medians of interleaved runs on a shared machine ({where};
{document["datetime"][:10]}, commit {commit["id"][:7]}), correctness checked first.
**Decoding**: `model.generate` from one token on, batch 1, every layer steered: tokens per second over the *unsteered
stock* model within the same round (quartiles in brackets; "stock again" is the noise floor):

{decode()}

The gain is the fusion of the norms; steering itself costs what lies between the last three columns. Repeat with
`pytest benchmarks/test_decode.py`.

**Sessions** (`pytest benchmarks/test_attach.py`):

{sessions()}

**Continuous batching**: `generate_batch` of 16 requests against the stock model (`pytest benchmarks/test_batching.py`):

{batching()}

**Who is steered by what** (`pytest benchmarks/test_swap.py`):

{swap()}

{isolation()}

<details><summary><b>The fused op</b> against an eager hook and norm, our own unsteered kernel, and a copy of as many
bytes (<code>pytest benchmarks/test_ops.py</code>); losses are listed like wins</summary>

{ops()}

</details>
{END}"""


def main() -> None:
    """Rewrite the block in the README."""
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    readme.write_text(before + text() + after, encoding="utf-8")


if __name__ == "__main__":
    main()
