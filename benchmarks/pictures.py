"""Pictures of results: bars against other libraries, how cost grows, a roofline of the fused op."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import records
from steerkern.plots import Axis, Bars, Line, Panel, Plot

ABREAST = 3
"""Panels of one picture of bars."""
LABELS = {"fused": "fused op", "hook and norm": "eager hook and norm", "hook": "hook", "steerkern": "steered"}


def peers(folder: Path) -> list[Plot]:
    """What each library adds to a layer and token, a panel per edit."""
    record = records.read(folder, "peers")
    if record is None:
        return []
    ran = [row for row in record.rows.values() if row["status"] == "run" and "again" not in row]
    panels: list[Axis] = []
    for edit in dict.fromkeys(row["edit"] for row in ran):
        rows = sorted((row for row in ran if row["edit"] == edit), key=lambda row: row["added_us_per_layer_token"][1])
        names = tuple(row["peer"] + ("" if "no" not in row["correct"].values() else " *") for row in rows)
        values = [row["added_us_per_layer_token"] for row in rows]
        medians, spans = tuple(v[1] for v in values), tuple((v[0], v[2]) for v in values)
        panels.append(Bars(edit, "us added per layer and token", names, medians, form=".0f", spans=spans))
    caption = "Medians with quartiles; below 0 is faster than the stock model; * fails a check of the table."
    pages = [tuple(panels[i : i + ABREAST]) for i in range(0, len(panels), ABREAST)]
    return [
        Plot("peers" if i == 0 else f"peers-{i + 1}", "Steering with other libraries", page, caption)
        for i, page in enumerate(pages)
    ]


def scaling(folder: Path) -> list[Plot]:
    """The curves of the fused op, and those of a decode step."""
    record = records.read(folder, "scaling")
    if record is None:
        return []
    curves = {name: row for name, row in record.rows.items() if "sides" in row}
    bf16 = [row for name, row in curves.items() if name.endswith("[bf16]")]
    op = [_curve(row, "us per call", 1.0, len(row["sides"]) > 1) for row in bf16]
    step = [_curve(row, "ms per token", 1e-3, False) for name, row in curves.items() if "[" not in name]
    found = []
    if op:
        found.append(Plot("scaling-op", "The fused op, bf16", tuple(op), "Dashed: the straight line fitted to it."))
    if step:
        found.append(Plot("scaling-decode", "A decode step", tuple(step), "Dashed: the straight line fitted to it."))
    return found


def roofline(folder: Path) -> list[Plot]:
    """Operations per second of the op against operations per byte, below what a copy and a product allow."""
    record = records.read(folder, "scaling")
    if record is None:
        return []
    found = {name: row for name, row in record.rows.items() if "points" in row}
    panels: list[Axis] = [_roof(row, records.case(name).split(", ")[-1]) for name, row in found.items()]
    caption = "Left to right: K = 0, 1, 4, 16, 64 directions. The op never fuses a multiplication with an addition."
    return [Plot("roofline", "Roofline of the fused op", tuple(panels), caption)] if panels else []


def everything(folder: Path) -> list[Plot]:
    """The pictures of all suites that have left results in ``folder``."""
    return [*peers(folder), *scaling(folder), *roofline(folder)]


def draw(folder: Path) -> list[Path]:
    """Draw them into ``folder/plots``.

    Raises:
        SteerkernError: matplotlib is missing.
    """
    plots = everything(folder)
    if plots:
        (folder / "plots").mkdir(exist_ok=True)
    return [plot.save(folder / "plots") for plot in plots]


def _curve(row: Mapping[str, Any], unit: str, per_us: float, log: bool) -> Panel:
    sizes = tuple(map(float, row["sizes"]))
    curves, fits = [], []
    for name, side in row["sides"].items():
        label, base, slope = LABELS.get(name, name), per_us * side["base_us"], per_us * side["slope_us"]
        curves.append(Line(label, sizes, tuple(per_us * median for _, median, _ in side["us"])))
        fitted = tuple(base + slope * size for size in sizes)
        fits.append(Line(f"{label}: {base:.3g} + {slope:.3g} x", sizes, fitted, guide=True))
    what = row["against"].partition(" (")[0]
    return Panel(f"against {what}", what, unit, (*curves, *fits), log=log)


def _roof(row: Mapping[str, Any], dtype: str) -> Panel:
    points, copy, product = row["points"], row["copy_bytes_per_second"], row["product_operations_per_second"]
    intensity = tuple(point["operations"] / point["bytes"] for point in points)
    rate = tuple(1e-9 * point["operations"] / point["seconds"] for point in points)
    x = sorted([*intensity, min(max(product / copy, intensity[0]), intensity[-1])])
    roof = tuple(1e-9 * min(copy * at, product) for at in x)
    bound = f"copy of as many bytes ({1e-9 * copy:.3g} GB/s), then fp32 matrix product"
    lines = (Line("fused op", intensity, rate), Line(bound, tuple(x), roof, guide=True))
    return Panel(f"{row['rows']} rows of 2048, {dtype}", "FLOP per byte", "GFLOP/s", lines, log=True)
