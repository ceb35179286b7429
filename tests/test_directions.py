"""Directions keep what they were given, per layer, through arithmetic, files and refusals."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from steerkern import ArtifactError, Direction, Directions, Fingerprint
from steerkern.directions import SITES

MODEL = Fingerprint("llama", 4, 8)
RAW = {5: torch.tensor([0.0, 3.0, 4.0, 0.0]), 0: torch.full((4,), 1e-25), 2: torch.tensor([-1.0, 0.0, 1e30, 0.0])}


def test_a_direction_keeps_its_raw_norm_and_a_unit() -> None:
    direction = Direction(RAW[5], 5)
    assert direction.norm == 5.0
    assert torch.equal(direction.unit, torch.tensor([0.0, 0.6, 0.8, 0.0]))
    for raw in RAW.values():  # squares that leave float32 on both sides
        unit = Direction(raw, 0).unit
        assert float(unit.double().norm()) == pytest.approx(1.0, abs=1e-7)


def test_directions_are_a_mapping_in_the_order_of_layers() -> None:
    directions = Directions.of(RAW, "resid_post", "toy", MODEL, {"n": 3})
    assert list(directions) == [0, 2, 5]
    assert len(directions) == 3
    assert 2 in directions
    assert 3 not in directions
    assert directions.width == 4
    for layer, direction in directions.items():
        assert torch.equal(direction.raw, RAW[layer])
        assert (direction.layer, direction.site, direction.model) == (layer, "resid_post", MODEL)
    with pytest.raises(KeyError, match=r"layer 3: 'toy' has layers \[0, 2, 5\]"):
        directions[3]


def test_half_and_double_vectors_become_float32_copies() -> None:
    given = {0: torch.ones(4, dtype=torch.bfloat16), 1: torch.ones(4, dtype=torch.float64), 2: torch.ones(4)}
    directions = Directions.of(given)
    for vector in given.values():
        vector.zero_()
    assert all(torch.equal(d.raw, torch.ones(4)) for d in directions.values())


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("model", [None, MODEL, Fingerprint("", 4, 8)])
def test_a_saved_folder_gives_back_every_bit(tmp_path: Path, site: str, model: Fingerprint | None) -> None:
    provenance = {"prompts": "Grüße 雪 \u2028 😀", "n": [1, 2], "deep": {"x": None, "y": 0.1}, "": True}
    directions = Directions.of(RAW, site, "a name+v1.0", model, provenance)
    directions.save_pretrained(tmp_path / "new" / "folder")
    found = Directions.from_pretrained(tmp_path / "new" / "folder")
    assert (found.site, found.name, found.model) == (site, "a name+v1.0", model)
    assert found.provenance == provenance == directions.provenance
    assert list(found) == list(directions)
    assert all(torch.equal(found[layer].raw, directions[layer].raw) for layer in directions)
    names = {path.name for path in (tmp_path / "new" / "folder").iterdir()}
    assert names == {"directions.json", "directions.safetensors"}


def test_provenance_is_what_a_file_would_hold() -> None:
    given: dict[str, Any] = {"layers": (1, 2)}
    directions = Directions.of(RAW, provenance=given)
    given["later"] = 1
    assert directions.provenance == {"layers": [1, 2]}


NAN = math.nan
REFUSED: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "none": (lambda: Directions.of({}), ValueError, "at least one layer, got none"),
    "NaN": (lambda: Directions.of({3: torch.tensor([NAN])}), ValueError, "direction of layer 3 holds NaN or Inf"),
    "Inf": (lambda: Direction(torch.tensor([math.inf]), 3), ValueError, "direction of layer 3 holds NaN or Inf"),
    "zero": (lambda: Directions.of({3: torch.zeros(4)}), ValueError, "direction of layer 3 has norm 0"),
    "two widths": (lambda: Directions.of({0: torch.ones(3), 1: torch.ones(4)}), ValueError, r"one width, got \[3, 4\]"),
    "matrix": (lambda: Directions.of({0: torch.ones(1, 3)}), ValueError, r"\[H\], got torch.float32 \[1, 3\]"),
    "list": (lambda: Directions.of({0: [1.0]}), TypeError, "direction of layer 0 must be a tensor, got list"),
    "layer -1": (lambda: Directions.of({-1: torch.ones(4)}), ValueError, "whole number from 0, got -1"),
    "layer 1.0": (lambda: Directions.of({1.0: torch.ones(4)}), ValueError, "got 1.0"),
    "site": (lambda: Directions.of(RAW, "resid"), ValueError, "one of resid_pre, resid_mid, resid_post, got 'resid'"),
    "site of a type": (lambda: Direction(torch.ones(4), 0, ["x"]), ValueError, r"got \['x'\]"),
    "name": (lambda: Directions.of(RAW, name="../x"), ValueError, "name must be 1 to 128 letters.*got '../x'"),
    "model": (lambda: Directions.of(RAW, model=Fingerprint("llama", 5, 8)), ValueError, "width 4, the model is llama"),
    "provenance": (lambda: Directions.of(RAW, provenance={"x": torch.ones(1)}), ValueError, "provenance must be JSON"),
    "NaN in it": (lambda: Directions.of(RAW, provenance={"x": NAN}), ValueError, "provenance must be JSON"),
    "bare tensors": (lambda: Directions(RAW), TypeError, "layer 5 must be a Direction, got Tensor"),
    "wrong layer": (lambda: Directions({1: Direction(RAW[5], 5)}), ValueError, "layer 1: got the direction of"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused_in_one_sentence(name: str) -> None:
    call, kind, text = REFUSED[name]
    with pytest.raises(kind, match=text) as caught:
        call()
    assert "\n" not in str(caught.value)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "layers of another number": ({"layers": [0, 2]}, "2 layers need a tensor 'raw' of 2 rows, got"),
    "a layer twice": ({"layers": [0, 2, 2]}, "listed once"),
    "no list": ({"layers": "025"}, "layers must be a list, got '025'"),
    "layer null": ({"layers": [0, 2, None]}, "whole number from 0, got None"),
    "layer of a list": ({"layers": [0, 2, [5]]}, r"whole number from 0, got \[5\]"),
    "layer true": ({"layers": [0, 2, True]}, "got True"),
    "site": ({"site": "embed"}, "site must be one of"),
    "name": ({"name": None}, "name must be 1 to 128"),
    "model": ({"model": ["llama", 4]}, r"model must be \[type, width, layers\] or null"),
    "model of another width": ({"model": ["llama", 5, 8]}, "width 4, the model is llama"),
    "model of true": ({"model": ["llama", True, 8]}, "model must be"),
    "model with a line break": ({"model": ["a\nb", 4, 8]}, "model must be"),
    "provenance": ({"provenance": []}, "provenance must be an object"),
    "unknown key": ({"sites": 1}, "unknown key 'sites'; known are name, site"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_value_in_the_file_is_named(tmp_path: Path, name: str) -> None:
    change, text = WRONG[name]
    Directions.of(RAW, model=MODEL).save_pretrained(tmp_path)
    path = tmp_path / "directions.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ArtifactError, match="^directions.json: .*" + text) as caught:
        Directions.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["name", "site", "layers", "model", "provenance"])
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    Directions.of(RAW).save_pretrained(tmp_path)
    path = tmp_path / "directions.json"
    header = json.loads(path.read_text())
    del header[key]
    path.write_text(json.dumps(header))
    with pytest.raises(ArtifactError, match=f"^directions.json: the file has no '{key}'$"):
        Directions.from_pretrained(tmp_path)
