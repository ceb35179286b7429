"""The CPU op executes as many instructions as when they were last counted: a gate that no load can disturb."""

from __future__ import annotations

import json

import pytest

from benchmarks import instructions

STORED = json.loads(instructions.STORED.read_text(encoding="utf-8"))


@pytest.mark.skipif(bool(instructions.missing()), reason=instructions.missing() or "-")
def test_no_call_takes_more_instructions_than_were_stored(tmp_path):
    if (here := instructions.compiler()) != STORED["compiler"]:
        pytest.skip(f"counted with {STORED['compiler']}, this is {here}")
    found = instructions.count(instructions.build(tmp_path))
    assert len(found) == 6
    moved = instructions.differences(found, STORED["counts"])
    assert not moved, "\n".join([*moved, "if this is meant: python -m benchmarks.instructions"])


def test_counts_that_moved_are_named():
    stored = STORED["counts"]
    name, many = max(stored.items(), key=lambda pair: pair[1])
    assert instructions.differences(stored, stored) == []
    assert instructions.differences({**stored, name: int(many * 1.01)}, stored) == []
    (slower,) = instructions.differences({**stored, name: int(many * 1.05)}, stored)
    assert name in slower
    assert "+5.0%" in slower
    (faster,) = instructions.differences({**stored, name: many // 2}, stored)
    assert "-50.0%" in faster
    rest = {case: count for case, count in stored.items() if case != name}
    assert instructions.differences(rest, stored) == [f"{name}: {many} stored, None found"]
    assert instructions.differences(stored, rest) == [f"{name}: None stored, {many} found"]
