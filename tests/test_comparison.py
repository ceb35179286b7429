"""``steerkern compare`` and ``steerkern run``: reports side by side, commands of systems, bad input."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from steerkern import methods
from steerkern.cli import app


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    before = torch.get_num_threads()
    for name in ("planted", "bare"):
        options = ("--model", f"organism:{name}", "--count", 16, "--out", root / name, "--no-plots")
        result = run("run", "harmfulness-vs-refusal", *options)
        assert result.exit_code == 0, result.stderr
    torch.set_num_threads(before)
    return root


def test_headlines_stand_side_by_side(folders):
    result = run("compare", folders / "planted", folders / "bare", "--json")
    assert result.exit_code == 0, result.stderr
    tables = json.loads(result.stdout)["tables"]
    rows = {row["number"]: row for row in tables["headline"]["rows"]}
    assert rows["judgement moved by harm"] == {"number": "judgement moved by harm", "planted": 1.0, "bare": 0.0}
    facts = {row["fact"] for row in tables["facts"]["rows"]}
    assert "model" in facts
    assert "scorer" not in facts
    saved = json.loads((folders / "bare" / "report.json").read_text())["tables"]["pools"]["rows"]
    shown = [row for row in tables["pools"]["rows"] if row["row"] == saved[0]["pool"] and row["column"] == "AUROC"]
    assert shown[0]["bare"] == saved[0]["auroc"]


def test_a_page_shows_the_tables(folders, tmp_path):
    result = run("compare", folders / "planted", folders / "bare", "--out", tmp_path / "page")
    assert result.exit_code == 0, result.stderr
    page = (tmp_path / "page" / "comparison.md").read_text()
    assert page.startswith("# planted against bare\n")
    assert "### Headline numbers" in page


def test_a_second_run_takes_what_the_first_kept(folders):
    before = (folders / "planted" / "kept.jsonl").read_bytes()
    start = json.loads((folders / "planted" / "report.json").read_text())
    options = ("--model", "organism:planted", "--count", 16, "--out", folders / "planted", "--no-plots")
    assert run("run", "harmfulness-vs-refusal", *options).exit_code == 0
    assert (folders / "planted" / "kept.jsonl").read_bytes() == before
    again = json.loads((folders / "planted" / "report.json").read_text())
    assert again["tables"] == start["tables"]


def test_the_systems_are_listed():
    listed = run("run", "--list")
    assert listed.exit_code == 0
    assert all(name in listed.stdout for name in methods.SYSTEMS)
    unknown = run("run", "nothing")
    assert unknown.exit_code == 2
    assert unknown.stderr == f"no system 'nothing'; there are {', '.join(methods.SYSTEMS)}\n"
    with pytest.raises(ValueError, match="no system 'nothing'; there are harmfulness-vs-refusal"):
        methods.get("nothing")


@pytest.mark.parametrize("name", methods.SYSTEMS)
def test_options_of_a_system_have_help(name):
    shown = run("run", name, "--help")
    assert shown.exit_code == 0, shown.output
    assert "--json" in shown.stdout
    assert "--seed" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["compare", "nowhere"], "at least two folders, got 1"),
        (["compare", "nowhere", "else"], "cannot read nowhere/report.json"),
        (["run", "harmfulness-vs-refusal", "--out", "OUT", "--model", "no/model"], "--harmless FILE are both needed"),
        (["run", "harmfulness-vs-refusal", "--out", "OUT", "--harmful", "x.txt"], "--harmful FILE and --harmless FILE"),
        (["run", "harmfulness-vs-refusal", "--out", "OUT", "--scorer", "none"], "no scorer 'none'"),
        (["run", "harmfulness-vs-refusal", "--out", "OUT", "--lead-in", "no place"], "lead-in with one {}"),
    ],
)
def test_bad_input_is_one_sentence(arguments, sentence, tmp_path):
    result = run(*[tmp_path / "out" if argument == "OUT" else argument for argument in arguments])
    assert result.exit_code == 2, result.output
    assert sentence in result.stderr
    assert result.stderr.count("\n") == 1
