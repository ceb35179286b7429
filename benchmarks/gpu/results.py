"""What a run of the gate left, read from ``gpu.json``, and which of its timings count."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import records
from benchmarks.records import Record

BACKENDS = ("conformance", "capture", "sanitizer")
"""Stages whose findings concern everything that a backend does."""


@dataclass(frozen=True)
class Gate:
    """One run of the gate."""

    about: Mapping[str, Any]
    stages: Mapping[str, Mapping[str, Any]]
    """By name: ``status`` (done, wrong, failed or skipped), ``result``, ``error``."""
    broken: str
    """Why it did not come to its end; empty if it did."""

    def results(self, kind: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """What the stages of a kind found, by the rest of their names; nothing of those that have no result."""
        for name, stage in self.stages.items():
            first, _, rest = name.partition(" ")
            if first == kind and stage.get("result"):
                yield rest, stage["result"]

    def counts_out(self, stage: str, side: str) -> bool:
        """Whether a check found a side or its backend wrong, so that its timing in ``stage`` is none."""
        model = " ".join(stage.split()[:2])
        own, names = (stage, f"{model}: logits", f"{model}: replays"), (side, side.partition(",")[0])
        for name, entry in self.stages.items():
            concerned = name.split(maxsplit=1)[0] in BACKENDS or name in own
            if concerned and entry["status"] == "wrong" and any(of in entry["result"]["wrong"] for of in names):
                return True
        return False

    def warning(self, *kinds: str) -> str:
        """What has to be known before any figure of these kinds of stages; empty if nothing."""
        rows = {f"{kind} {name}": found for kind in kinds for name, found in self.results(kind)}
        ratios = {name: {"over": found.get("over_stock") or found.get("over_default")} for name, found in rows.items()}
        noisy = Record({}, "", "", ratios).warning()
        dry = "A dry run, tiny shapes on the CPU: nothing about speed." if self.about["dry"] else ""
        broken = f"The run broke off: {self.broken}." if self.broken else ""
        return " ".join(filter(None, (dry, broken, noisy)))

    def provenance(self) -> str:
        """When, of which commit, on what, and how many stages went how."""
        about, device = self.about, self.about.get("device", {})
        commit = about["commit"][:7] + (" with changes" if about["changed"] else "")
        named = {name: device.get(name) or about.get(name) for name in ("cuda", "torch", "triton", "transformers")}
        versions = [f"{name} {version}" for name, version in named.items() if version]
        went = [stage["status"] for stage in self.stages.values()]
        counts = [f"{went.count(status)} {status}" for status in ("done", "wrong", "failed", "skipped")]
        words = [f"{about['date'][:10]}, commit {commit}", device.get("device", "no device"), *versions]
        return f"{', '.join(words)}; stages: {', '.join(counts)} in a budget of {about['budget']:.0f} s"


def read(folder: Path) -> Gate | None:
    """The gate's results in a folder; None if it has not run."""
    document = records.document(folder / "gpu.json", "about", "stages")
    if document is None:
        return None
    cut = "" if document.get("finished") else "it was cut short"
    broken = textwrap.shorten(document.get("error", cut), 200)
    return Gate(document["about"], document["stages"], broken)
