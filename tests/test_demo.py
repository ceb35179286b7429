"""``steerkern demo``, end to end. No timing is asserted, only that what is timed does the same work."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from steerkern import organism
from steerkern.cli import app
from steerkern.demo import QUICK, Size, organism_examples, split_examples

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module", autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    result = CliRunner().invoke(app, ["demo", "--quick", "--json", "--threads", "1", "--out", str(folder)])
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout), folder


def rows(document, table, key):
    return {row[key]: row for row in document["tables"][table]["rows"]}


def test_refusals_flip_both_ways(quick):
    effects = rows(quick[0], "effects", "edit")
    for edit in ("ablate", "subtract", "clamp to harmless mean"):
        assert effects[edit]["side"] == "harmful"
        assert effects[edit]["before"] >= 0.9, edit
        assert effects[edit]["after"] <= 0.1, edit
    for edit in ("add", "clamp to harmful mean"):
        assert effects[edit]["side"] == "harmless"
        assert effects[edit]["before"] <= 0.1, edit
        assert effects[edit]["after"] >= 0.9, edit


def test_controls_do_not_flip(quick):
    effects = rows(quick[0], "effects", "edit")
    assert effects["side effect: ablate"]["after"] <= 0.1
    assert effects["control: ablate at random"]["after"] >= 0.9
    assert effects["control: add at random"]["after"] <= 0.1


def test_the_receipt_names_every_plan(quick):
    receipt = rows(quick[0], "receipt", "plan")
    assert receipt["ablate"]["sites"] == "resid_pre[0] to resid_pre[3], 4 sites"
    assert receipt["add"]["sites"] == f"resid_pre[{quick[0]['values']['layer']}]"
    assert all(row["tokens"] > 0 and row["rows"] == QUICK.heldout for row in receipt.values())


def test_what_is_timed_does_the_same_work(quick):
    document = quick[0]
    assert [row["same"] for row in document["tables"]["speed"]["rows"]] == ["", "", "stock: yes", "hooks: yes"]
    assert {name: len(seconds) for name, seconds in document["values"]["seconds"].items()} == dict.fromkeys(
        ("stock", "hook", "fused", "steerkern"), QUICK.rounds
    )
    assert len(document["tables"]["ratios"]["rows"]) == 5


def test_strength_curves_run_from_stock_to_flipped(quick):
    curves = quick[0]["values"]["strengths"]
    assert curves["add"]["strength"][0] == 0.0
    assert curves["add"]["refused"][0] <= 0.1 <= 0.9 <= curves["add"]["refused"][-1]
    for kind in ("subtract", "ablate"):
        assert curves[kind]["refused"][0] >= 0.9 >= 0.1 >= curves[kind]["refused"][-1]


def test_files_and_provenance(quick):
    document, folder = quick
    assert sorted(file.name for file in folder.iterdir()) == [
        "layer-profile.png",
        "refusal-strength.png",
        "report.json",
        "report.md",
    ]
    names = ("report.json", "report.md", "layer-profile.png", "refusal-strength.png")
    assert [str(folder / name) for name in names] == document["files"]
    assert all((folder / f"{name}.png").read_bytes().startswith(PNG) for name in document["plots"])
    saved = json.loads((folder / "report.json").read_text())
    assert saved == {key: value for key, value in document.items() if key != "files"}
    assert "constructed so that its planted directions carry the behaviour" in document["notes"][0]
    assert document["provenance"]["scorer"] == "prefix/1"
    assert len(document["provenance"]["prompts"]) == 6


def test_the_bare_organism_has_no_direction_and_the_demo_says_so(tmp_path):
    options = ["--quick", "--no-plots", "--model", "organism:bare", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, ["demo", *options])
    assert result.exit_code == 0, result.stderr
    assert "No layer's direction carries refusal here" in " ".join(result.stdout.split())
    assert {file.name for file in tmp_path.iterdir()} == {"report.json", "report.md"}


def test_any_checkpoint_with_prompt_files(tmp_path):
    files = []
    for kind in ("harmful", "harmless"):
        files.append(tmp_path / f"{kind}.txt")
        files[-1].write_text("\n".join(prompt.text for prompt in organism.prompts(kind, "heldout", 64)))
    options = ["--model", str(organism.path()), "--harmful", str(files[0]), "--harmless", str(files[1]), "--quick"]
    result = CliRunner().invoke(
        app, ["demo", *options, "--no-plots", "--json", "--threads", "1", "--out", str(tmp_path / "out")]
    )
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    effects = rows(document, "effects", "edit")
    assert effects["ablate"]["after"] <= 0.1 <= 0.9 <= effects["add"]["after"]
    assert effects["ablate"]["prompts"] == 16
    assert "replies" not in document["tables"], "replies of a checkpoint stay out of the report"
    assert not any("constructed" in note for note in document["notes"])


def test_splits_do_not_overlap():
    size = Size(train=40, validation=10, heldout=10)
    made = [
        organism_examples(size),
        split_examples([f"a{i}" for i in range(70)], [f"b{i}" for i in range(9)] * 2, size),
    ]
    for examples in made:
        for side in ("harmful", "harmless"):
            texts = [repr(example.prompt) for split in examples.values() for example in getattr(split, side)]
            assert len(texts) == len(set(texts))
    sizes = {name: (len(split.harmful), len(split.harmless)) for name, split in made[1].items()}
    assert sizes == {"train": (36, 5), "validation": (10, 2), "heldout": (10, 2)}
    with pytest.raises(ValueError, match="at least 8 different harmful prompts, got 1"):
        split_examples(["x"] * 20, ["y"] * 20, size)
