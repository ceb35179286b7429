"""The GPU gate runs from end to end on the CPU with tiny shapes, so that it works on the day that there is a GPU.

Its tables state what its JSON states, and give no timing to what a check found wrong.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import readme, tables
from benchmarks.gpu.goals import DECODING, GOALS, ONE, SIXTEEN, of_decoding
from steerkern.report import Table

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gate")
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_gate.py"), "--dry", "--out", str(out)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=out, env=environment, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture
def results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "gpu.json").read_text())
    return found


def test_every_stage_is_done(results: dict[str, Any]) -> None:
    assert {name: stage["status"] for name, stage in results["stages"].items() if stage["status"] != "done"} == {}
    kinds = {name.split()[0].rstrip(":") for name in results["stages"]}
    assert kinds == {"conformance", "copy", "op", "capture", "calls", "variants", "sanitizer", "decode"}
    conformance = results["stages"]["conformance"]["result"]
    assert all(run["passed"] for run in conformance["runs"].values())
    assert results["finished"] is True


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
        assert set(op["relative_error"]) == {"unsteered", "K=1", "K=4", "K=16", f"K=1, {op['n']} plans"}


def test_a_launch_that_is_replayed_follows_plans_and_rows(results: dict[str, Any]) -> None:
    found = results["stages"]["capture"]["result"]["changes"]
    assert found["reference"] == dict.fromkeys(("as captured", "strength", "plan", "rows"), True)


def test_a_step_that_is_replayed_follows_the_strength(results: dict[str, Any]) -> None:
    found = results["stages"]["decode tiny: replays"]["result"]["distance"]
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
        assert name.endswith("eager") or set(result["logits"]) == names, "what is timed was checked in the same stage"


def shown(folder: Path, results: dict[str, Any]) -> dict[str, Table]:
    """The GPU's tables of these results, without the name's beginning."""
    (folder / "gpu.json").write_text(json.dumps(results))
    return {table.name.removeprefix("gpu-"): table for table in tables.everything(folder)}


def cells(table: Table, key: str, value: str) -> dict[str, Any]:
    """The row of a table with this value under a key."""
    (row,) = (row for row in table.rows if row.get(key) == value)
    return dict(row)


def written(ratio: list[float], form: str = ".2f") -> str:
    return f"{ratio[1]:{form}} ({ratio[0]:{form}} to {ratio[2]:{form}})"


def test_tables_state_what_the_results_state(results: dict[str, Any], tmp_path: Path) -> None:
    found = shown(tmp_path, results)
    assert list(found) == ["goals", "decode", "checks", "op", "variants", "calls"]
    for name, stage in results["stages"].items():
        kind, _, case = name.partition(" ")
        result = stage["result"]
        if kind == "op":
            row = cells(found["op"], "case", case)
            assert row["us"] == f"{result['us']['unsteered'][1]:.2f}"
            assert row["K=16"] == written(result["over_unsteered"]["K=16"])
            assert row["copy"] == written(result["of_copy"]["K=1"])
            assert row.get("plans") == (written(result["plans_over_one"]) if result["n"] >= 8 else None)
            over = {
                goal.what: result["over_unsteered"][k][1] > goal.bound for k, goal in (("K=1", ONE), ("K=16", SIXTEEN))
            }
            assert row["missed"] == "; ".join(what for what, missed in over.items() if missed)
        if kind == "decode" and "over_stock" in result:
            row = cells(found["decode"], "case", case)
            assert row["rate"] == f"{result['tokens_per_second']['stock']:.1f}"
            for side in ("stock again", "hooks", "cpu, unsteered", "reference, steered"):
                assert row[side] == written(result["over_stock"][side])
    assert {row["call"]: row["us"] for row in found["calls"].rows} == {
        name: f"{us:.2f}" for name, us in results["stages"]["calls"]["result"].items()
    }
    about = results["about"]
    for table in found.values():
        assert "A dry run, tiny shapes on the CPU: nothing about speed." in table.title
        assert f"{about['date'][:10]}, commit {about['commit'][:7]}" in table.note
        assert f"cpu, torch {about['torch']}" in table.note
        assert "16 done, 0 wrong, 0 failed, 0 skipped in a budget of 540 s" in table.note


def test_every_goal_is_in_the_table_with_its_worst_case(results: dict[str, Any], tmp_path: Path) -> None:
    table = shown(tmp_path, results)["goals"]
    assert {row["what"] for row in table.rows} == {goal.what for goal in GOALS}
    medians = {
        name: stage["result"]["over_unsteered"]["K=16"]
        for name, stage in results["stages"].items()
        if name.startswith("op reference")
    }
    (row,) = (row for row in table.rows if (row["what"], row.get("side")) == (SIXTEEN.what, "reference"))
    worst = max(medians, key=lambda name: medians[name][1])
    assert (row["found"], row["at"]) == (written(medians[worst], ".3f"), worst)
    assert row["goal"] == f"<= {SIXTEEN.bound}"
    missed = sum(median > SIXTEEN.bound for _, median, _ in medians.values())
    assert row["met"] == ", ".join(
        filter(None, (f"met {2 - missed}" * (missed < 2), f"missed {missed}" * (missed > 0)))
    )
    assert cells(table, "what", DECODING["eager"].what)["met"] == "not measured", "the dry run has no such model"


def test_the_goals_of_decoding_are_beside_it(results: dict[str, Any], tmp_path: Path) -> None:
    result = results["stages"].pop("decode tiny batch 2: eager")["result"]
    result["over_stock"] |= {"cpu, steered": [1.1, 1.2, 1.3], "reference, steered": [0.9, 1.1, 1.3]}
    result["goals"] = list(of_decoding("8B", 1, "eager", result))
    results["stages"]["decode 8B batch 1: eager"] = {"status": "done", "result": result}
    found = shown(tmp_path, results)
    row = cells(found["decode"], "case", "8B batch 1: eager")
    assert (row["goal"], row["missed"]) == (">= 1.15", "reference")
    met = {
        row["side"]: (row["met"], row["found"]) for row in found["goals"].rows if row["what"] == DECODING["eager"].what
    }
    assert met == {"cpu": ("met 1", "1.200 (1.100 to 1.300)"), "reference": ("missed 1", "1.100 (0.900 to 1.300)")}


@pytest.mark.parametrize("check", ["conformance", "capture", "sanitizer memcheck"])
def test_a_backend_that_fails_a_check_has_no_timing(results: dict[str, Any], tmp_path: Path, check: str) -> None:
    stage = results["stages"][check]
    stage |= {"status": "wrong", "error": "cpu: not what it should be"}
    stage["result"]["wrong"] = {"cpu": "not what it should be"}
    found = shown(tmp_path, results)
    assert cells(found["checks"], "stage", check)["correct"] == "no"
    assert "not what it should be" in found["checks"].to_markdown()
    assert cells(found["op"], "case", "cpu N=8 H=64") == {"case": "cpu N=8 H=64", "us": "wrong"}
    assert "K=16" in cells(found["op"], "case", "reference N=8 H=64")
    for row in found["decode"].rows:
        assert (row["cpu, unsteered"], row["cpu, steered"]) == ("wrong", "wrong")
        assert row["reference, steered"] != "wrong"
    assert cells(found["calls"], "call", "cpu")["us"] == "wrong"
    assert cells(found["variants"], "case", "N=2 H=64 K=1") == {"case": "N=2 H=64 K=1", "us": "wrong"}
    judged = [row for row in found["goals"].rows if row.get("side") == "cpu"]
    assert judged
    assert all(row["met"] == "wrong or failed 2" and "found" not in row for row in judged)
    assert "1 wrong" in found["goals"].note


def test_wrong_logits_leave_one_side_of_one_model_without_timing(results: dict[str, Any], tmp_path: Path) -> None:
    stage = results["stages"]["decode tiny: logits"]
    stage |= {"status": "wrong", "error": "cpu, steered: logits 1.0 of the effect away"}
    stage["result"]["wrong"] = {"cpu, steered": "logits 1.0 of the effect away"}
    results["stages"]["decode other batch 1: eager"] = results["stages"]["decode tiny batch 2: eager"]
    found = shown(tmp_path, results)
    for row in found["decode"].rows:
        assert (row["cpu, steered"] == "wrong") == row["case"].startswith("tiny")
        assert row["cpu, unsteered"] != "wrong"


def test_a_shape_that_is_wrong_or_failed_is_told(results: dict[str, Any], tmp_path: Path) -> None:
    wrong, failed = results["stages"]["op cpu N=1 H=64"], results["stages"]["decode tiny batch 2: graph"]
    wrong |= {"status": "wrong", "error": "K=1: relative error 0.5"}
    wrong["result"] |= {"wrong": {"K=1": "relative error 0.5"}}
    wrong["result"]["goals"] = [{**verdict, "found": None, "met": False} for verdict in wrong["result"]["goals"]]
    del failed["result"]
    failed |= {"status": "failed", "error": "RuntimeError: out of memory"}
    results["stages"]["decode tiny batch 2: eager"]["result"]["failed"] = {"triton, steered": "no such kernel"}
    found = shown(tmp_path, results)
    assert cells(found["op"], "case", "cpu N=1 H=64") == {"case": "cpu N=1 H=64", "us": "wrong"}
    assert cells(found["checks"], "stage", "op cpu N=1 H=64")["said"] == "K=1: relative error 0.5"
    assert "3 of 4 shapes" in cells(found["checks"], "stage", "op, against the reference")["said"]
    assert cells(found["checks"], "stage", "decode tiny batch 2: graph")["correct"] == "failed"
    assert cells(found["decode"], "case", "tiny batch 2: eager")["triton, steered"] == "failed"
    assert {row["case"] for row in found["decode"].rows} == {"tiny batch 2: eager", "tiny batch 2: compiled"}
    assert all(row["met"].endswith("wrong or failed 1") for row in found["goals"].rows if row.get("side") == "cpu")


def test_a_run_that_was_cut_short_or_noisy_says_so_first(results: dict[str, Any], tmp_path: Path) -> None:
    del results["finished"]
    results["about"]["dry"] = False
    for stage in results["stages"].values():
        for ratios in (stage["result"].get("over_stock", {}), stage["result"].get("over_default", {})):
            ratios |= {side: [1.0, 1.0, 1.0] for side in ratios if side.endswith(" again")}
    page = shown(tmp_path, results)["decode"].to_markdown().splitlines()
    assert page[:3] == ["### GPU: decoding", "", "The run broke off: it was cut short."]
    results["finished"] = True
    assert shown(tmp_path, results)["decode"].title == "GPU: decoding"
    results["stages"]["decode tiny batch 2: eager"]["result"]["over_stock"]["stock again"] = [0.8, 0.9, 1.0]
    page = shown(tmp_path, results)["decode"].to_markdown().splitlines()
    assert page[2].startswith("Noisy machine: the same thing timed against itself came out at 0.90 (decode tiny")
    assert shown(tmp_path, results)["calls"].title == "GPU: a call on the host"


def test_committed_results_appear_in_the_readme(results: dict[str, Any], tmp_path: Path) -> None:
    shutil.copy(readme.RESULTS / "decode.json", tmp_path)
    before = readme.text(tmp_path)
    assert "GPU" not in before
    found = shown(tmp_path, results)
    after = readme.text(tmp_path)
    for name in ("goals", "decode"):
        assert found[f"{name}"].to_markdown() in after
    for title in ("is it right", "the op", "ways of launching", "a call on the host"):
        assert f"<details><summary><b>GPU: {title}</b></summary>" in after
