"""What the GPU gate finds wrong is called wrong and gets no time, tried on sides that are wrong on purpose."""

from __future__ import annotations

import contextlib
import json

import pytest
import torch

from benchmarks.gpu import checks, decode, goals, launches, ops
from benchmarks.gpu.device import Device
from benchmarks.gpu_gate import Gate

CPU = Device()
NAMES = ("cuda", "triton")


@pytest.fixture(scope="module")
def model():
    return decode.model_of("tiny", CPU)


def test_a_kernel_that_writes_nothing_is_wrong_and_not_timed(monkeypatch):
    for module in (ops, launches):
        monkeypatch.setattr(module, "fused", lambda *_, **__: lambda b: b.h.add_(b.delta))
    found = ops.measure(CPU, "cpu", 8, 64, None)
    assert set(found["wrong"]) == {"unsteered", "K=1", "K=4", "K=16", "K=1, 8 plans"}, "y was left as it was: nan"
    assert "us" not in found
    assert [(verdict["found"], verdict["met"]) for verdict in found["goals"]] == [(None, False)] * 2
    variant = launches.variants(CPU, 2, 64, 1)
    assert set(variant["wrong"]) == {"default", "default again"}
    assert "us" not in variant


def test_a_kernel_that_is_wrong_in_its_last_row_is_wrong(monkeypatch):
    fused = ops.fused

    def spoilt(*arguments, **options):
        side = fused(*arguments, **options)

        def call(b):
            side(b)
            b.y[-1].zero_()

        return call

    assert ops.measure(CPU, "cpu", 200, 64, None)["wrong"] == {}
    monkeypatch.setattr(ops, "fused", spoilt)
    assert "K=4" in ops.measure(CPU, "cpu", 200, 64, None)["wrong"]


def test_logits_of_a_session_that_does_not_steer_are_wrong(model, monkeypatch):
    settings = decode.settings

    def idle(*arguments):
        return {**settings(*arguments), "cpu, steered": contextlib.nullcontext}

    assert decode.correct(CPU, model)["wrong"] == {}
    monkeypatch.setattr(decode, "settings", idle)
    assert list(decode.correct(CPU, model)["wrong"]) == ["cpu, steered"]
    found = decode.captured(CPU, model, 2)
    assert list(found["wrong"]) == ["cpu, steered"]
    assert "cpu, steered" not in found["tokens_per_second"]
    assert "cpu, unsteered" in found["tokens_per_second"]


def test_what_raises_does_not_take_the_others_along(model, monkeypatch):
    settings = decode.settings

    @contextlib.contextmanager
    def broken():
        raise RuntimeError("no such kernel")
        yield

    monkeypatch.setattr(decode, "settings", lambda *given: {**settings(*given), "cpu, steered": broken})
    found = decode.correct(CPU, model)
    assert found["failed"] == {"cpu, steered": "RuntimeError: no such kernel"}
    assert "reference, steered" in found["logits"]
    timed = decode.eager(CPU, model, 2, found["failed"])
    assert "cpu, steered" not in timed["over_stock"]
    assert timed["failed"] == found["failed"]


def test_logits_that_are_not_numbers_are_wrong():
    stock, hooks = torch.zeros(4), torch.ones(4)
    found = decode.judged(stock, hooks, {"cuda, steered": torch.full((4,), torch.nan), "triton, steered": hooks})
    assert list(found["wrong"]) == ["cuda, steered"]


@pytest.mark.parametrize(
    ("code", "out", "wrong"),
    [
        (0, "9 passed", ()),
        (1, "FAILED tests/ops/test_conformance.py::test_a[cuda-64] - as triton does\n1 failed", ("cuda",)),
        (2, "no such option", NAMES),
        (124, "....", ()),
    ],
)
def test_failed_tests_are_those_of_the_backends_they_name(monkeypatch, code, out, wrong):
    def python(*arguments, **_):
        return (code, out) if "tests/ops/test_conformance.py" in arguments else (0, "1 passed")

    monkeypatch.setattr(checks, "python", python)
    found = checks.tests(False, 10, NAMES)
    assert tuple(found["wrong"]) == wrong
    assert found["runs"]["tests/ops/test_conformance.py"]["passed"] is (code == 0)


def test_a_sanitizer_that_finds_something_and_one_that_does_not_look(monkeypatch):
    monkeypatch.setattr(checks.shutil, "which", lambda _: "compute-sanitizer")
    for code, out, wrong in ((0, "ran", []), (9, "========= ERROR SUMMARY: 1 error", ["cuda"]), (124, "", [])):
        monkeypatch.setattr(checks, "python", lambda *_, code=code, out=out, **__: (code, out))
        assert list(checks.sanitize("memcheck", "cuda", 10)["wrong"]) == wrong
    monkeypatch.setattr(checks, "python", lambda *_, **__: (1, "device not supported"))
    with pytest.raises(RuntimeError, match=r"memcheck did not look, exit code 1.*device not supported"):
        checks.sanitize("memcheck", "cuda", 10)


def test_a_stage_that_found_something_wrong_says_so(tmp_path):
    gate = Gate(tmp_path, 100, True)
    assert gate.stage("capture", lambda: {"wrong": {"cuda": "stale"}}) == {"wrong": {"cuda": "stale"}}
    stage = json.loads((tmp_path / "gpu.json").read_text())["stages"]["capture"]
    assert (stage["status"], stage["error"]) == ("wrong", "cuda: stale")


def test_goals_are_for_the_median_and_for_what_they_name():
    at_most, at_least = goals.Goal("a", 1.05), goals.Goal("b", 0.85, least=True)
    assert [at_most.judge("cuda", [0.9, m, 9.0])["met"] for m in (1.05, 1.06, float("nan"))] == [True, False, False]
    assert [at_least.judge("cuda", [0.1, m, 9.0])["met"] for m in (0.85, 0.84, float("nan"))] == [True, False, False]
    ratio = [1.0, 1.0, 1.0]
    found = {"over_unsteered": {"K=1": ratio, "K=16": ratio}, "plans_over_one": ratio, "of_copy": {"K=1": ratio}}
    judged = {n: [verdict["what"] for verdict in goals.of_op(n, "cuda", found)] for n in (1, 256, 2048)}
    assert [len(what) for what in judged.values()] == [2, 3, 4]
    speeds = {"over_stock": {"hooks": ratio, "cuda, unsteered": ratio, "cuda, steered": [1.1, 1.2, 1.3]}}
    (verdict,) = goals.of_decoding("8B", 1, "eager", speeds)
    assert (verdict["side"], verdict["found"], verdict["met"]) == ("cuda", [1.1, 1.2, 1.3], True)
    assert (
        list(goals.of_decoding("8B", 8, "eager", speeds)) == list(goals.of_decoding("0.5B", 1, "eager", speeds)) == []
    )
    (verdict,) = goals.of_decoding("8B", 1, "graph", {"wrong": {"cuda, steered": "logits"}})
    assert (verdict["found"], verdict["met"]) == (None, False)
