"""The GPU gate runs from end to end on the CPU with tiny shapes, so that it works on the day that there is a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("gate")
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_gate.py"), "--dry", "--out", str(out)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=out, env=environment, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads((out / "gpu_gate.json").read_text())
    return found


def test_every_stage_is_done(results: dict[str, Any]) -> None:
    assert {name: stage["status"] for name, stage in results["stages"].items() if stage["status"] != "done"} == {}
    kinds = {name.split()[0].rstrip(":") for name in results["stages"]}
    assert kinds == {"conformance", "copy", "op", "capture", "calls", "variants", "sanitizer", "decode"}
    conformance = results["stages"]["conformance"]["result"]
    assert all(run["passed"] for run in conformance.values())


def test_results_say_where_they_are_from(results: dict[str, Any]) -> None:
    about = results["about"]
    assert about["dry"] is True
    assert {"date", "commit", "changed", "python", "torch", "triton", "transformers", "backends"} <= set(about)
    assert about["device"]["device"] == "cpu"


def test_every_side_is_timed_against_the_unsteered_kernel(results: dict[str, Any]) -> None:
    ops = [stage["result"] for name, stage in results["stages"].items() if name.startswith("op ")]
    assert ops
    for op in ops:
        assert set(op["us"]) >= {"unsteered", "K=1", "K=4", "K=16", "add and F.rms_norm", "hook K=1"}
        assert all(0 < low <= middle <= high for low, middle, high in op["us"].values())
        assert op["over_unsteered"]["unsteered"] == [1.0, 1.0, 1.0]
        assert set(op["of_copy"]) == {"unsteered", "K=1", "K=16"}


def test_a_launch_that_is_replayed_follows_plans_and_rows(results: dict[str, Any]) -> None:
    found = results["stages"]["capture"]["result"]
    assert found["reference"] == dict.fromkeys(("as captured", "strength", "plan", "rows"), True)


def test_a_step_that_is_replayed_follows_the_strength(results: dict[str, Any]) -> None:
    found = results["stages"]["decode tiny: replays"]["result"]
    assert set(found["reference"]) == {"1.0", "-1.0", "0.5"}
    assert max(found["reference"].values()) < 0.1


def test_every_way_of_decoding_is_there(results: dict[str, Any]) -> None:
    stages = {name: stage["result"] for name, stage in results["stages"].items() if "decode tiny batch" in name}
    assert {name.split(": ")[1] for name in stages} == {"eager", "graph", "compiled"}
    for name, result in stages.items():
        assert result.get("failed", {}) == {}
        if name.endswith("compiled"):
            assert set(result["counted"]) == set(result["tokens_per_second"])
        names = set(result["tokens_per_second"])
        assert names >= {"stock", "stock again", "hooks", "reference, unsteered", "reference, steered"}
