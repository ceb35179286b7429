"""``.svec`` files: read to the bit, refused in one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import steerkern as sk
from steerkern.integrations.svec import read_svec


def write(folder: Path, **changes: object) -> Path:
    content = {
        "model_type": "llama",
        "directions": {"1": [0.5, -2.0, 3.25], "4": [1.0, 0.0, 1e-3]},
        "explained_variances": {"1": 0.75, "4": 0.5},
    }
    path = folder / "refusal.svec"
    path.write_text(json.dumps({**content, **changes}))
    return path


def test_vectors_come_as_they_are(tmp_path: Path) -> None:
    found = read_svec(write(tmp_path))
    assert list(found) == [1, 4]
    assert found.site == "resid_pre"
    assert torch.allclose(found[1].raw, torch.tensor([0.5, -2.0, 3.25]))
    assert found.provenance["model_hint"] == "llama"
    assert found.provenance["explained_variances"] == {"1": 0.75, "4": 0.5}
    assert sk.Plan(sk.add(found), layers=[1, 4]).width == 3


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"directions": {}}, "has no directions"),
        ({"directions": [1]}, "has no directions"),
        ({"directions": {"-1": [1.0]}}, "'-1' is no layer number"),
        ({"directions": {"1": []}}, "layer 1 must be a list"),
        ({"directions": {"1": [True]}}, "layer 1 holds something that is no number"),
        ({"directions": {"1": ["a"]}}, "layer 1 holds something that is no number"),
        ({"directions": {"1": [1.0], "2": [1.0, 2.0]}}, r"widths \[1, 2\]"),
        ({"directions": {"1": [0.0, 0.0]}}, "norm 0"),
        ({"directions": {"1": [float("nan")]}}, "NaN"),
    ],
)
def test_what_is_none_is_refused(tmp_path: Path, changes: dict[str, object], sentence: str) -> None:
    with pytest.raises(sk.ArtifactError, match=sentence):
        read_svec(write(tmp_path, **changes))


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(sk.ArtifactError, match="cannot read"):
        read_svec(tmp_path / "none.svec")
    (tmp_path / "a.svec").write_text("{")
    with pytest.raises(sk.ArtifactError, match="is not JSON"):
        read_svec(tmp_path / "a.svec")


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=3),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.sampled_from(["0", "1", "x"]), x, max_size=3),
)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(directions=JSON, variances=JSON, hint=JSON)
def test_any_json_is_read_or_refused(tmp_path: Path, directions: object, variances: object, hint: object) -> None:
    path = tmp_path / "any.svec"
    content = {"directions": directions, "explained_variances": variances, "model_type": hint}
    path.write_text(json.dumps(content))
    try:
        read_svec(path)
    except sk.ArtifactError as error:
        assert "\n" not in str(error)  # noqa: PT017 (either outcome is right)
