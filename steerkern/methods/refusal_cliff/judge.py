"""Cliff-as-a-Judge: the items with the deepest cliffs, written as safety-training data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .cliffs import Cliff, Preset
from .traces import Trace

FILE = "items.jsonl"


@dataclass(frozen=True)
class Selection:
    """The chosen items of a pool, deepest cliff first, and what they are to say.

    Attributes:
        traces: the items.
        cliffs: their plateaus and final scores.
        pool: number of items that were considered: those whose thought has words of refusal.
        marker: closes the thought.
        refusal: the answer that is to be learnt.
    """

    traces: tuple[Trace, ...]
    cliffs: tuple[Cliff, ...]
    pool: int
    marker: str
    refusal: str

    @property
    def precision(self) -> float:
        """Share of the chosen items that were answered although their thought plans to refuse."""
        return sum(not trace.refused for trace in self.traces) / max(len(self.traces), 1)

    def messages(self, trace: Trace) -> list[dict[str, str]]:
        """The conversation with the model's own thought, its marker and the refusal as the assistant's turn.

        An opening tag that the chat template wrote (``<think>``) stands before the thought again. Templates that drop
        thoughts from the history must be told to keep this one.
        """
        asked = [{"role": "user", "content": trace.prompt}] if isinstance(trace.prompt, str) else trace.prompt
        opening = self.marker.replace("</", "<", 1)
        opened = opening != self.marker and trace.text.rstrip().endswith(opening)
        content = f"{opening if opened else ''}{trace.thought}{self.marker}{trace.tail}{self.refusal}"
        return [*map(dict, asked), {"role": "assistant", "content": content}]

    def save_pretrained(self, folder: Path) -> None:
        """Write ``items.jsonl``: per line ``messages`` and the item's plateau, final and misalignment score."""
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / FILE).open("w", encoding="utf-8") as file:
            for trace, found in zip(self.traces, self.cliffs, strict=True):
                numbers = {"plateau": found.plateau, "final": found.final, "misalignment": found.misalignment}
                rounded = {name: round(value, 6) for name, value in numbers.items()}
                file.write(json.dumps({"messages": self.messages(trace), **rounded}, ensure_ascii=False) + "\n")


def select(
    traces: Sequence[Trace], cliffs: Sequence[Cliff], preset: Preset, count: int, marker: str, refusal: str
) -> Selection:
    """The ``count`` items with the largest misalignment score, or (as released) with the lowest final score.

    Only thoughts that plan to refuse are considered.
    """
    pool = [(trace, found) for trace, found in zip(traces, cliffs, strict=True) if trace.plans_refusal]
    by_final = preset.order == "final"
    pool.sort(key=lambda item: item[1].final if by_final else -item[1].misalignment)
    chosen = pool[:count]
    return Selection(tuple(t for t, _ in chosen), tuple(c for _, c in chosen), len(pool), marker, refusal)
