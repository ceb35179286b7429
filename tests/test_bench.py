"""``steerkern bench``: what it runs, what it leaves, and what bad input gets before anything runs."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys

import pytest
from _pytest.mark.expression import Expression
from typer.testing import CliRunner

from benchmarks import effort, suites
from benchmarks.suites import Suite
from steerkern.cli import app

MODULE = "steerkern.cli.bench"


def bench(*arguments):
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


@pytest.fixture
def nothing_runs(monkeypatch):
    def run(*_, **__):
        raise AssertionError("a suite was run")

    monkeypatch.setattr(suites, "run", run)


def refused(sentence, *arguments):
    result = bench(*arguments)
    assert result.exit_code == 2, (result.stdout, result.stderr, result.exception)
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert sentence in result.stderr


@pytest.mark.usefixtures("nothing_runs")
class TestBadInput:
    def test_an_unknown_suite_lists_the_suites(self, tmp_path):
        refused(f"no suite 'opps'; there are {', '.join(suites.SUITES)}", "--suite", "opps", "--out", tmp_path / "new")
        assert not (tmp_path / "new").exists()

    def test_a_folder_that_cannot_be_written(self, tmp_path):
        (tmp_path / "file").write_text("")
        refused("cannot write to folder", "--out", tmp_path / "file" / "out")

    @pytest.mark.parametrize(
        ("name", "text"), [("decode", '{"a": 1}'), ("gpu", "[]"), ("ops", "{"), ("isolation", "1")]
    )
    def test_a_folder_with_json_of_something_else(self, tmp_path, name, text):
        (tmp_path / f"{name}.json").write_text(text)
        refused(f"{tmp_path / name}.json is not", "--suite", "attach", "--out", tmp_path)
        assert not (tmp_path / "report.md").exists()

    def test_no_clone_around(self, tmp_path, monkeypatch):
        monkeypatch.setattr(sys.modules[MODULE], "__file__", str(tmp_path / "lib" / "steerkern" / "cli" / "bench.py"))
        monkeypatch.chdir(tmp_path)
        refused("there is no clone around", "--out", tmp_path / "out")

    def test_no_pytest_benchmark(self, tmp_path, monkeypatch):
        find = importlib.util.find_spec
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "pytest_benchmark" else find(name))
        refused("pip install 'steerkern[bench]'", "--out", tmp_path / "out")

    def test_no_matplotlib(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        refused("--no-plots does without", "--out", tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_a_clone_around_the_working_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[MODULE], "__file__", str(tmp_path / "lib" / "steerkern" / "cli" / "bench.py"))
    monkeypatch.chdir(suites.ROOT / "benchmarks")
    assert sys.modules[MODULE]._clone() == suites.ROOT


def test_a_quick_suite_leaves_json_a_report_and_its_tables(tmp_path):
    """In a process of its own, that says on what, when, of which commit and under which load it measured."""
    result = bench("--quick", "--suite", "attach", "--out", tmp_path, "--json")
    assert result.exit_code == 0, (result.stderr, [path.read_text() for path in tmp_path.glob("*.log")])
    document = json.loads(result.stdout)
    assert document["suites"]["attach"]["status"] == "done"
    assert list(document["suites"]) == ["attach"]
    assert list(document["tables"]) == ["attach"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["attach.json", "report.md"]
    assert "attach + detach, 32 layers" in (tmp_path / "report.md").read_text()
    found = json.loads((tmp_path / "attach.json").read_text())
    machine = found["machine_info"]
    assert machine["quick"] is True
    assert machine["threads"] == 1
    assert {"torch", "transformers", "steerkern"} <= set(machine["versions"])
    assert set(machine["load"]) == {"before", "after"}
    assert machine["device"]
    assert found["commit_info"]["id"]
    assert found["datetime"]


def test_a_suite_that_fails_and_one_that_cannot_run(tmp_path, monkeypatch):
    wrong = Suite("wrong", "a module that raises", module="benchmarks.conftest_of_nobody")
    absent = Suite("absent", "not here", ("test_of_nobody.py",))
    monkeypatch.setattr(suites, "SUITES", {"wrong": wrong, "absent": absent})
    result = bench("--out", tmp_path, "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)["suites"]
    assert found["wrong"]["status"] == "failed"
    assert str(tmp_path / "wrong.log") in found["wrong"]["reason"]
    assert "conftest_of_nobody" in (tmp_path / "wrong.log").read_text()
    assert found["absent"]["status"] == "skipped"
    assert "test_of_nobody.py is not in this clone" in found["absent"]["reason"]
    shown = bench("--out", tmp_path)
    assert shown.exit_code == 1
    assert "wrong: failed, exit code" in shown.stdout


def test_a_suite_that_is_interrupted_leaves_those_that_are_done(tmp_path, monkeypatch):
    """Ctrl-C: one sentence, a report of what is done, and no table of what is not."""
    results = suites.ROOT / "benchmarks" / "results"

    def run(suite, out, **_):
        if suite.name == "swap":
            return suites.Ran("stopped", "interrupted", 1.0)
        shutil.copy(results / f"{suite.name}.json", out)
        return suites.Ran("done", "", 1.0)

    monkeypatch.setattr(suites, "run", run)
    chosen = [option for name in ("attach", "swap", "decode") for option in ("--suite", name)]
    result = bench(*chosen, "--no-plots", "--out", tmp_path, "--json")
    assert result.exit_code == 130
    assert f"interrupted in swap; 1 of 3 suites are done, their results are in {tmp_path}\n" in result.stderr
    document = json.loads(result.stdout)
    assert {name: entry["status"] for name, entry in document["suites"].items()} == {
        "attach": "done",
        "swap": "stopped",
    }
    assert list(document["tables"]) == ["attach"]
    assert "attach + detach" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(("ends", "status"), [("time.sleep(60)", "stopped"), ("sys.exit(1)", "failed")])
def test_what_an_unfinished_suite_measured_is_set_aside(tmp_path, monkeypatch, ends, status):
    def advance(percent):
        if status == "stopped":
            raise KeyboardInterrupt

    def run():
        suite = Suite("half", "pytest that is not one", ("test_swap.py",))
        return suites.run(suite, tmp_path, quick=True, advance=advance)

    (tmp_path / "half.json").write_text("the run before")
    begins = (
        "import sys, time\n"
        "(file,) = (a.partition('=')[2] for a in sys.argv if a.startswith('--benchmark-json'))\n"
        "open(file, 'w').write('half of it')\n"
        "print('[ 50%]', flush=True)\n"
    )
    monkeypatch.setattr(suites, "LAUNCH", begins + ends)
    assert run().status == status
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"half.partial.json"} | ({"half.log"} if status == "failed" else set())
    assert (tmp_path / "half.partial.json").read_text() == "half of it"
    monkeypatch.setattr(suites, "LAUNCH", "")
    assert run().status == "done"
    assert list(tmp_path.iterdir()) == []


def test_every_selection_of_cases_selects_some():
    """A case that was renamed must not leave a quick run empty."""
    options = ["-c", "pyproject.toml", "-o", "addopts=--import-mode=importlib", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, "--collect-only", "-q", "benchmarks"]
    environment = {**os.environ, "PYTHONPATH": str(suites.ROOT)}
    done = subprocess.run(command, cwd=suites.ROOT, env=environment, capture_output=True, text=True, check=False)
    cases = [line for line in done.stdout.splitlines() if "::" in line]
    assert cases
    for suite in suites.SUITES.values():
        own = [case for case in cases for name in suite.tests if case.startswith(f"benchmarks/{name}")]
        for selection in filter(None, (suite.cases, suite.few)):
            expression = Expression.compile(selection)
            chosen = [c for c in own if expression.evaluate(lambda word, c=c, **_: word.lower() in c.lower())]
            assert chosen or suite.unable(), (suite.name, selection)


def test_a_short_look_is_shorter(monkeypatch):
    monkeypatch.setenv("STEERKERN_BENCH_QUICK", "0")
    assert (effort.rounds(30), effort.seconds(3.0), effort.warmup()) == (30, 3.0, 2)
    assert 7 <= effort.rounds_within(0.0, lambda: None, 2) <= 25
    monkeypatch.setenv("STEERKERN_BENCH_QUICK", "1")
    assert (effort.rounds(32), effort.seconds(4.0), effort.warmup()) == (4, 0.5, 1)
    assert effort.rounds(6) == effort.LEAST


def test_baselines_with_tuned_malloc_run_with_it():
    environment = suites._environment(suites.SUITES["malloc"], True)
    assert set(suites.TUNED_MALLOC) <= set(environment)
    assert environment["OMP_NUM_THREADS"] == "1"
    assert not set(suites.TUNED_MALLOC) & set(suites._environment(suites.SUITES["ops"], True)) - set(os.environ)
