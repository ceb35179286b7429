"""Results as they were written: the JSON of the suites, read from a folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NOISE = 0.03
"""Stock against stock may come out this far from 1."""


@dataclass(frozen=True)
class Record:
    """What one suite, or several that share a table, found."""

    machine: Mapping[str, Any]
    commit: str
    date: str
    rows: Mapping[str, Mapping[str, Any]]
    """``extra_info`` by benchmark name, with ``quartiles_ms`` of the benchmark itself."""

    def noise(self) -> tuple[float, str] | None:
        """Where stock against stock was furthest from 1: the ratio and the case; None if nothing says so."""
        found = [(ratio, case(name)) for name, row in self.rows.items() for ratio in _again(row)]
        return max(found, key=lambda pair: abs(pair[0] - 1), default=None)

    def warning(self) -> str:
        """The first line of a table of a noisy run; empty if it was none."""
        noise = self.noise()
        if noise is None or abs(noise[0] - 1) <= NOISE:
            return ""
        return (
            f"Noisy machine: the same thing timed against itself came out at {noise[0]:.2f} ({noise[1]}); "
            "what differs by less says nothing."
        )

    def provenance(self) -> str:
        """Date, commit and load in a few words."""
        load = self.machine.get("load")
        words = [f"{self.date[:10]}, commit {self.commit[:7]}"]
        words += [f"load {load['before']:.1f} to {load['after']:.1f}"] if load else []
        words += ["a quick run"] if self.machine.get("quick") else []
        return ", ".join(words)


def document(file: Path, *keys: str) -> dict[str, Any] | None:
    """The JSON object in ``file``; None if there is no file, or an empty one, which a suite that was killed leaves.

    Raises:
        ValueError: something else is in it, or one of ``keys`` is not.
    """
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    if not text:
        return None
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{file} is not the JSON that a suite leaves ({error}); remove it") from None
    absent = [key for key in keys if not isinstance(found, dict) or key not in found]
    if absent:
        raise ValueError(f"{file} is not what a suite leaves, it has no {absent[0]!r}; remove it")
    checked: dict[str, Any] = found
    return checked


def read(folder: Path, *suites: str) -> Record | None:
    """The record of suites, ``NAME.json`` and ``NAME-*.json``; None if none has run.

    Machine, commit and date are those of the first file.
    """
    files = [f for name in suites for f in (folder / f"{name}.json", *sorted(folder.glob(f"{name}-*.json")))]
    documents = [found for file in files if (found := document(file, "benchmarks")) is not None]
    if not documents:
        return None
    first = documents[0]
    benchmarks = [benchmark for document in documents for benchmark in document["benchmarks"]]
    rows = {b["name"]: {**b["extra_info"], "quartiles_ms": _milliseconds(b["stats"])} for b in benchmarks}
    return Record(first["machine_info"], first["commit_info"]["id"], first["datetime"], rows)


def case(name: str) -> str:
    """The parameters of a benchmark, for a person: ``test_decode[9M-bf16-8]`` is ``9M, bf16, 8``."""
    title, _, parameters = name.partition("[")
    return parameters.removesuffix("]").replace("-", ", ") or title.removeprefix("test_").replace("_", " ")


def verdict(value: float, bound: str) -> str:
    """``met`` or ``missed``, for a bound such as ``<= 1.05``."""
    sign, _, limit = bound.partition(" ")
    met = {"<=": value <= float(limit), ">=": value >= float(limit)}[sign]
    return "met" if met else "missed"


def quartiles(found: Sequence[float], form: str = ".2f") -> str:
    """First quartile, median and third quartile for a person."""
    low, median, high = found
    return f"{median:{form}} ({low:{form}} to {high:{form}})"


def _milliseconds(stats: Mapping[str, float]) -> list[float]:
    return [1e3 * stats[name] for name in ("q1", "median", "q3")]


def _again(row: Mapping[str, Any]) -> Iterator[float]:
    """Ratios of something to itself: medians, alone or in quartiles by the names of their sides."""
    if "again" in row:
        yield row["again"]
    sides = [pair for value in row.values() if isinstance(value, Mapping) for pair in value.items()]
    yield from (ratio[1] for name, ratio in sides if name.endswith(" again") and isinstance(ratio, list))
