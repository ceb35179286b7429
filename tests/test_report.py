from __future__ import annotations

import dataclasses
import io
import json
import math
import sys

import pytest
from rich.console import Console

from steerkern import Fingerprint, SteerkernError
from steerkern.plots import Bars, HeatMap, Line, Panel, Plot, Scatter, require_plots
from steerkern.report import Column, Provenance, Report, Table, hash_texts, prepare_folder, versions

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def report():
    provenance = Provenance.of(
        "test",
        source="none",
        fingerprint=Fingerprint("llama", 64, 4),
        dtype="float32",
        device="cpu",
        backend="reference",
        seed=3,
        scorer="prefix/1",
        prompts={"all": ["a", "b"]},
    )
    columns = (Column("name", "name"), Column("share", "refused", ".0%"), Column("odd", "[odd]"))
    table = Table("rates", "Rates", columns, ({"name": "[red]x", "share": 0.25, "odd": None, "hidden": 7},), "a note")
    panel = Panel(
        "p", "layer", "share", (Line("one", (0.0, 1.0), (0.0, 1.0)),), share=True, whole=True, mark=(1.0, "here")
    )
    return Report(
        "title", provenance, ("note",), (table,), (Plot("pic", "Pic", (panel, panel), "c"),), {"bad": math.nan}
    )


def test_json_is_whole_and_strict(report):
    document = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert document["format"] == "steerkern.report"
    assert document["version"] == 1
    assert document["tables"]["rates"]["rows"] == [{"name": "[red]x", "share": 0.25, "odd": None, "hidden": 7}]
    assert document["plots"]["pic"]["panels"][0]["lines"][0]["y"] == [0.0, 1.0]
    assert document["values"] == {"bad": None}
    provenance = document["provenance"]
    assert provenance["model"] == {
        "source": "none",
        "dtype": "float32",
        "model_type": "llama",
        "width": 64,
        "layers": 4,
    }
    assert provenance["prompts"]["all"] == {"count": 2, "sha256": hash_texts(["a", "b"])}
    assert provenance["versions"] == versions()
    assert (provenance["seed"], provenance["scorer"], provenance["command"]) == (3, "prefix/1", "test")


def test_save_writes_json_and_plots(report, tmp_path):
    files = report.save(tmp_path / "new" / "folder")
    assert [file.name for file in files] == ["report.json", "report.md", "pic.png"]
    assert json.loads(files[0].read_text()) == report.to_json()
    assert files[2].read_bytes().startswith(PNG)
    assert [file.name for file in report.save(tmp_path / "bare", plots=False)] == ["report.json", "report.md"]


def test_the_page_shows_every_table_and_picture_and_how_it_was_made(report, tmp_path):
    page = report.save(tmp_path)[1].read_text()
    assert page.startswith(f"# {report.title}\n")
    assert "![pic.png](pic.png)" in page
    for table in report.tables:
        assert f"### {table.title}" in page
        assert table.note in page
    for part in ("- seed: 3", "- scorer: prefix/1", "- all: 2 prompts, sha256 ", "- command: `test`"):
        assert part in page
    table = Table("t", "a|b", (Column("x", "x|y"), Column("y", "n", ".1f")), ({"x": "p|q\nr", "y": 0.25},))
    assert table.to_markdown().splitlines()[2:] == [r"| x\|y | n |", "| --- | --- |", r"| p\|q r | 0.2 |"]


@pytest.mark.parametrize(
    "panel",
    [
        Scatter("t", "x", "y", (Line("a", (0.0, 1.0), (1.0, -1.0)), Line("b", (-1.0,), (0.5,)))),
        HeatMap("t", "x", "y", ((0.1, None), (-0.2, 0.3)), ("a", "b"), ("0", "1"), "z", True, ((0, 1),)),
        HeatMap("t", "x", "y", ((0.0,) * 9,), ("a token",) * 9, ("0",)),
        Bars("t", "x", ("one", "two"), (0.0, 1.0), (0.5, "before")),
    ],
    ids=lambda panel: type(panel).__name__,
)
def test_every_kind_of_panel_is_drawn_and_told_in_json(report, tmp_path, panel):
    made = dataclasses.replace(report, plots=(Plot("p", "title", (panel, panel), "caption"),))
    assert made.save(tmp_path)[-1].read_bytes().startswith(PNG)
    assert len(json.loads((tmp_path / "report.json").read_text())["plots"]["p"]["panels"]) == 2


def test_artefacts_are_saved_beside_the_report(report, tmp_path):
    class Made:
        def save_pretrained(self, folder):
            folder.mkdir()
            (folder / "made.txt").write_text("yes")

    files = dataclasses.replace(report, artefacts={"thing": Made()}).save(tmp_path, plots=False)
    assert files[-1] == tmp_path / "thing"
    assert (files[-1] / "made.txt").read_text() == "yes"


def test_print_shows_text_as_it_is(report):
    console = Console(width=100, record=True, file=io.StringIO())
    report.print(console)
    text = console.export_text()
    for part in ("title", "note", "[red]x", "[odd]", "25%", "a note"):
        assert part in text
    assert "hidden" not in text


def test_a_narrow_terminal_loses_nothing_of_a_long_word():
    word = "0123456789" * 12
    console = Console(width=40, record=True, file=io.StringIO())
    console.print(Table("t", "T", (Column("a", "a"),), ({"a": word},)).render())
    assert "".join(console.export_text().split()).endswith(word)


def test_tables_are_found_by_name(report):
    assert report["rates"].title == "Rates"
    with pytest.raises(KeyError, match="this report has rates"):
        report["none"]


def test_missing_matplotlib_names_the_command(report, tmp_path, monkeypatch):
    for module in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SteerkernError, match=r"pip install 'steerkern\[plots\]' \(or not\)"):
        require_plots("or not")
    with pytest.raises(SteerkernError, match="plots need matplotlib"):
        report.save(tmp_path)


def test_a_folder_below_a_file_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SteerkernError, match=r"cannot write to folder .*file/out: Not a directory"):
        prepare_folder(tmp_path / "file" / "out")
    assert prepare_folder(tmp_path / "a" / "b").is_dir()
    assert list((tmp_path / "a" / "b").iterdir()) == []


@pytest.mark.parametrize(
    ("value", "form", "text"),
    [(None, "", ""), (True, "", "yes"), (False, ".0%", "no"), (0.5, ".0%", "50%"), (3, "", "3"), ("x", ".2f", "x")],
)
def test_column_writes_values(value, form, text):
    assert Column("k", "t", form).text(value) == text
