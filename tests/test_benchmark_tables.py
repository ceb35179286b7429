"""The README's numbers and pictures are those of the committed results."""

from __future__ import annotations

import json

import pytest

from benchmarks import pictures, readme, records, tables
from steerkern.plots import Bars, Panel

TIMES = {"q1": 0.001, "median": 0.002, "q3": 0.003}
README = (readme.ROOT / "README.md").read_text(encoding="utf-8")


def written(folder, suite, **rows):
    """``suite.json`` in ``folder`` as pytest-benchmark leaves it, with ``extra_info`` by benchmark name."""
    document = {
        "machine_info": {"load": {"before": 0.5, "after": 1.0}, "quick": True},
        "commit_info": {"id": "0123456789abcdef"},
        "datetime": "2026-01-02T03:04:05",
        "benchmarks": [{"name": n, "extra_info": e, "stats": TIMES} for n, e in rows.items()],
    }
    (folder / f"{suite}.json").write_text(json.dumps(document))
    return folder


def test_readme_is_in_step_with_the_committed_results():
    before, _, rest = README.partition(readme.BEGIN)
    assert before
    block, _, after = rest.partition(readme.END)
    assert after
    assert readme.BEGIN + block + readme.END == readme.text(), "python -m benchmarks.readme writes it"


def test_pictures_are_in_step_with_the_committed_results():
    image = pytest.importorskip("PIL.Image")
    plots = pictures.everything(readme.RESULTS)
    assert {"scaling-op", "scaling-decode", "roofline"} <= {plot.name for plot in plots}
    for plot in plots:
        path = readme.RESULTS / "plots" / f"{plot.name}.png"
        assert image.open(path).text["Source"] == plot.digest(), f"{plot.name}: python -m benchmarks.readme draws it"
    drawn = {path.stem for path in (readme.RESULTS / "plots").glob("*.png")}
    assert drawn == {plot.name for plot in plots}


def test_every_committed_result_has_a_table():
    shown = {table.name for table in tables.everything(readme.RESULTS)}
    for suite in ("ops", "decode", "attach", "swap", "serving", "isolation", "scaling", "prefill"):
        assert suite in shown


def test_a_folder_without_results_has_no_tables(tmp_path):
    assert tables.everything(tmp_path) == []
    assert pictures.draw(tmp_path) == []


def test_an_empty_file_is_a_suite_that_was_killed(tmp_path):
    (tmp_path / "decode.json").touch()
    assert tables.everything(tmp_path) == []


@pytest.mark.parametrize(("again", "noisy"), [(0.96, True), (0.98, False), (1.02, False), (1.04, True)])
def test_noise_beyond_three_per_cent_is_the_first_line(tmp_path, again, noisy):
    row = {
        "tokens_per_second": {"stock": 100.0, "stock again": 100.0 * again},
        "speedup_over_stock_quartiles": {"stock again": [again - 0.1, again, again + 0.1], "hook": [0.8, 0.9, 0.95]},
        "goals": {"hook": 1.1, "stock again": 0.5},
    }
    (table,) = tables.everything(written(tmp_path, "decode", **{"test_decode[9M-bf16-8]": row}))
    page = table.to_markdown().splitlines()
    assert page[0] == "### Decoding"
    assert page[2].startswith("Noisy machine") == noisy
    if noisy:
        assert f"{again:.2f} (9M, bf16, 8)" in page[2]
    assert "| 9M | bf16 | 8 | 100 |" in table.to_markdown()
    assert "0.90 (0.80 to 0.95)" in table.to_markdown(), "losses are printed like wins"
    assert f"hook 0.900 >= 1.10: missed; stock again {again:.3f} >= 0.50: met" in table.to_markdown()
    assert "2026-01-02, commit 0123456, load 0.5 to 1.0, a quick run" in table.note


def test_noise_of_an_op(tmp_path):
    row = {"median_us": {"fused": 1.0}, "speedup": 0.5, "again": 1.2}
    record = records.read(written(tmp_path, "ops", **{"test_against[1-2-bf16]": row}), "ops")
    assert record is not None
    assert record.noise() == (1.2, "1, 2, bf16")


def test_goals_of_an_op_are_met_or_missed(tmp_path):
    found = {"k1": [1.0, 1.04, 1.1], "k16": [1.2, 1.4, 1.5]}
    row = {"ratio_quartiles": found, "again": 1.0, "goals": {"k1": "<= 1.05", "k16": "<= 1.3"}}
    (table,) = tables.everything(written(tmp_path, "ops", **{"test_cost[1-bf16]": row}))
    assert "k1 1.04 (1 to 1.1); k16 1.4 (1.2 to 1.5); again 1" in table.to_markdown()
    assert "k1 <= 1.05: met; k16 <= 1.3: missed" in table.to_markdown()


def test_times_come_with_their_quartiles_and_goals(tmp_path):
    row = {"goal_ms": 1.5, "again": 1.0}
    (table,) = tables.everything(written(tmp_path, "swap", **{"test_change_between_decode_steps[swap-0]": row}))
    assert "| swap a plan, beside 0 others | 2.00 (1.00 to 3.00) ms | <= 1.5 ms: missed |" in table.to_markdown()


def test_peers_that_ran_and_peers_that_did_not(tmp_path):
    ran = {
        "peer": "other", "version": "1.2", "edit": "add", "status": "run", "added_us_per_layer_token": [30, 36, 41],
        "ratio_to_stock": [1.1, 1.2, 1.3], "correct": {"every row": "yes", "generated tokens": "no"},
        "authors_figure": None, "install": "pip install other",
    }  # fmt: skip
    ours = {**ran, "peer": "ours", "added_us_per_layer_token": [-9, -8, -7], "correct": {"every row": "yes"}}
    again = {**ran, "peer": "stock again", "version": None, "again": 0.99, "correct": {}}
    absent = {**ran, "peer": "gone", "status": "not run", "reason": "needs a GPU", "authors_figure": "2x (theirs)"}
    folder = written(tmp_path, "peers", a=ran, b=absent, c=ours, d=again)
    (table,) = tables.everything(folder)
    page = table.to_markdown()
    assert "| other 1.2 | add | 36.0 (30.0 to 41.0) | 1.20 (1.10 to 1.30) | yes | no |" in page
    assert "| gone 1.2 | add | not run | needs a GPU; `pip install other` |" in page
    assert "2x (theirs)" in page
    assert "What is not installed" not in page
    missing = {
        **ran,
        "peer": "missing",
        "version": None,
        "status": "not run",
        "reason": "not installed: pip install other",
    }
    (table,) = tables.everything(written(tmp_path, "peers", a=ran, b=missing, c={**missing, "edit": "ablate"}))
    assert "| missing | add | not run | not installed |" in table.to_markdown()
    assert table.note.count("pip install other") == 1, "long, so it is said once"
    folder = written(tmp_path, "peers", a=ran, b=absent, c=ours, d=again)
    (plot,) = pictures.everything(folder)
    (bars,) = plot.panels
    assert isinstance(bars, Bars)
    assert bars.names == ("ours", "other *"), "the cheapest first, who fails a check is marked"
    assert bars.values == (-8, 36)
    assert (tmp_path / "plots" / "peers.png") in pictures.draw(folder)


def test_a_picture_knows_what_it_shows(tmp_path):
    curve = {
        "against": "rows (width 8)", "sizes": [1, 2],
        "sides": {"fused": {"us": [[1, 2, 3], [2, 3, 4]], "base_us": 1.0, "slope_us": 1.0, "off": 0.0}}, "again": 1.0,
    }  # fmt: skip
    (plot,) = pictures.everything(written(tmp_path, "scaling", **{"test_rows[bf16]": curve}))
    (panel,) = plot.panels
    assert isinstance(panel, Panel)
    assert [line.y for line in panel.lines] == [(2, 3), (2, 3)], "medians, and the fitted line"
    curve["sides"]["fused"]["us"][0][1] = 2.5
    (other,) = pictures.everything(written(tmp_path, "scaling", **{"test_rows[bf16]": curve}))
    assert other.digest() != plot.digest()
