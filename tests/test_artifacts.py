"""Files are read whole and right, or refused with one ArtifactError; writing happens whole or not at all."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import math
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import hypothesis.strategies as st
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings

from steerkern import (
    ArtifactError,
    Directions,
    Fingerprint,
    Plan,
    PlanError,
    Tokens,
    ablate,
    add,
    artifacts,
    cap,
    clamp,
    rotate,
)
from steerkern.artifacts import MAX_JSON_BYTES, TENSORS, read_folder, write_folder
from steerkern.program import Program, Site

generator = torch.Generator().manual_seed(0)
V = [torch.randn(6, generator=generator) for _ in range(4)]


def everything() -> Plan:
    """A plan with a value in every field of the format."""
    first = Plan(
        [add({1: V[0], 2: V[1]}, 0.5).when(V[2], lo=0.25, cosine=True), cap(V[1], hi=0.5)],
        layers=[1, 2],
        scope=Tokens("prompt", (-1, 0), 0, 9),
        name="first",
    )
    second = Plan([ablate(V[:2]), clamp(V[2], 1.5)], site="resid_mid", scope="decode", keep_norm=True, scale=-0.5)
    return first + second + Plan(rotate(V[0], V[3], 30), site="resid_post", name="third")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    everything().save_pretrained(tmp_path)
    return tmp_path


def reseal(folder: Path, header: Any = None, tensors: bytes | None = None) -> None:
    """Replace a half of an artefact and make the digest agree: what a hostile author would do."""
    if tensors is not None:
        (folder / TENSORS).write_bytes(tensors)
    if header is None:
        header = json.loads((folder / "plan.json").read_text())
    if isinstance(header, dict) and tensors is not None:
        header["sha256"] = hashlib.sha256(tensors).hexdigest()
    (folder / "plan.json").write_text(json.dumps(header))


def load(folder: Path) -> Plan | None:
    """The plan, or None where it was refused in the one allowed way; a plan that loads can be packed and described."""
    try:
        plan = Plan.from_pretrained(folder)
    except ArtifactError as error:
        check_sentence(error)
        return None
    assert repr(plan)
    sites = [Site(layer, name) for layer in range(4) for name in ("resid_pre", "resid_mid", "resid_post")]
    program = Program(sites, plan.width)
    with contextlib.suppress(PlanError):  # layer 7 of 4, or two steps that meet now and disagree on keep_norm
        program.add(plan)
        program.slot((plan.name, i) for i in range(len(plan.steps)))
    return plan


def check_sentence(error: BaseException) -> None:
    assert "\n" not in str(error)
    assert len(str(error)) < 500


# fuzzing

JUNK: list[Any] = [
    None, True, 0, -1, 7, 2**70, 10**400, -0.5, 1e-300, 1e300, math.nan, "", "-inf", "0.0.2", "probe", "x" * 5000,
    "\x00\x1b[31m\n", "\ud800", [], [[]], [0], [1.0] * 3, {}, {"a": 1},
]  # fmt: skip


def nodes(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    for key, child in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from nodes(child, (*path, key))


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    value = copy.deepcopy(value)
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = new
    return value


def test_every_field_with_every_wrong_value_is_a_plan_or_an_artifact_error(folder: Path) -> None:
    edit = ablate({1: V[0], 2: V[1]}, 0.5).when(V[2], lo=0.25, cosine=True)
    Plan(edit, layers=[1, 2], scope=Tokens("prompt", (-1, 0), 0, 9)).save_pretrained(folder)
    header = json.loads((folder / "plan.json").read_text())
    loaded = refused = 0
    for path in nodes(header):
        for junk in JUNK:
            # json.dumps writes NaN and Infinity, which are no JSON
            (folder / "plan.json").write_text(json.dumps(changed(header, path, junk)))
            if load(folder) is None:
                refused += 1
            else:
                loaded += 1
    assert refused > 800
    assert 0 < loaded < refused / 5  # scales, bounds and the like stay free


def test_every_missing_key_and_every_unknown_key_is_refused(folder: Path) -> None:
    header = json.loads((folder / "plan.json").read_text())
    checked = 0
    for path in nodes(header):
        inner = header
        for key in path:
            inner = inner[key]
        if isinstance(inner, dict):
            for key in inner:
                if key == "gate":
                    continue  # an edit without a gate is another edit
                less = {k: v for k, v in inner.items() if k != key}
                (folder / "plan.json").write_text(json.dumps(changed(header, path, less)))
                with pytest.raises(ArtifactError):
                    Plan.from_pretrained(folder)
            (folder / "plan.json").write_text(json.dumps(changed(header, path, {**inner, "gat": 1})))
            with pytest.raises(ArtifactError, match="unknown key 'gat'"):
                Plan.from_pretrained(folder)
            checked += 1
    assert checked > 10


def test_every_list_may_be_longer_or_shorter(folder: Path) -> None:
    header = json.loads((folder / "plan.json").read_text())
    for path in nodes(header):
        inner = header
        for key in path:
            inner = inner[key]
        if isinstance(inner, list) and inner:
            for other in (inner[:-1], inner[1:], [*inner, inner[-1]], inner[::-1]):
                (folder / "plan.json").write_text(json.dumps(changed(header, path, other)))
                load(folder)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_flipped_bytes_of_the_tensors_are_a_plan_or_an_artifact_error(folder: Path, data: st.DataObject) -> None:
    everything().save_pretrained(folder)
    blob = bytearray((folder / TENSORS).read_bytes())
    head = 8 + int.from_bytes(blob[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.one_of(st.integers(0, 15), st.integers(0, head - 1), st.integers(0, len(blob) - 1)))
        blob[at] = data.draw(st.integers(0, 255))
    if bytes(blob) != (folder / TENSORS).read_bytes():
        (folder / TENSORS).write_bytes(blob)
        with pytest.raises(ArtifactError, match=r"directions\.safetensors is damaged or belongs to another plan\.json"):
            Plan.from_pretrained(folder)
    reseal(folder, tensors=bytes(blob))
    load(folder)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_flipped_bytes_of_the_json_are_a_plan_or_an_artifact_error(folder: Path, data: st.DataObject) -> None:
    everything().save_pretrained(folder)
    text = bytearray((folder / "plan.json").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    (folder / "plan.json").write_bytes(text)
    load(folder)


@pytest.mark.parametrize("name", ["plan.json", TENSORS])
def test_a_file_cut_anywhere_is_refused(folder: Path, name: str) -> None:
    whole = (folder / name).read_bytes()
    for length in (*range(0, len(whole) - 2, 97), len(whole) - 2):
        (folder / name).write_bytes(whole[:length])
        with pytest.raises(ArtifactError, match=name):
            Plan.from_pretrained(folder)
        if name == TENSORS:
            reseal(folder, tensors=whole[:length])
            with pytest.raises(ArtifactError, match="not a well-formed safetensors file"):
                Plan.from_pretrained(folder)


def resave(folder: Path, **tensors: torch.Tensor) -> None:
    found = safetensors.torch.load_file(folder / TENSORS)
    reseal(folder, tensors=safetensors.torch.save({**found, **{k.replace("_", "."): v for k, v in tensors.items()}}))


KEYS = {"matrix": "1_0_any", "unit": "0_0_gate"}


@pytest.mark.parametrize(
    ("key", "tensor", "text"),
    [
        ("matrix", torch.full((2, 6), math.nan), "holds NaN or Inf"),
        ("matrix", torch.full((2, 6), math.inf), "holds NaN or Inf"),
        ("matrix", torch.ones(2, 6), "must have norm 1"),
        ("matrix", torch.eye(6)[[0, 0]], "needs orthogonal vectors"),
        ("matrix", torch.zeros(2, 6), "has norm 0"),
        ("matrix", torch.ones(2, 6).double(), "must be float32"),
        ("matrix", torch.ones(2, 6).bfloat16(), "must be float32"),
        ("matrix", torch.ones(2, 6).long(), "must be float32"),
        ("matrix", torch.eye(5)[:2], "mixes edits of widths"),
        ("matrix", torch.zeros(2, 0), "must be float32 of 1 or 2 dimensions"),
        ("matrix", torch.zeros(0, 6), "takes 1 to 64 vectors, got 0"),
        ("matrix", torch.eye(100)[:65], "takes 1 to 64 vectors, got 65"),
        ("matrix", torch.eye(6)[0], r"must be float32 \[k, H\]"),
        ("matrix", torch.ones(1, 2, 6), "must be float32 of 1 or 2 dimensions"),
        ("matrix", torch.eye(6)[:3], "3 vectors need 3 norms, got 2"),
        ("unit", torch.eye(5)[0], "gate has width 5, the edit has 6"),
        ("unit", torch.ones(6), "gate direction must have norm 1"),
        ("unit", torch.zeros(6), "gate direction has norm 0"),
        ("unit", torch.eye(6)[:1], r"gate direction must be a float vector \[H\]"),
    ],
)
def test_a_wrong_tensor_is_refused(folder: Path, key: str, tensor: torch.Tensor, text: str) -> None:
    resave(folder, **{KEYS[key]: tensor})
    with pytest.raises(ArtifactError, match=text):
        Plan.from_pretrained(folder)


# what JSON leaves open


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not JSON"),
        ("{}", r"not a steerkern\.plan file"),
        ("[]", r"not a steerkern\.plan file"),
        ("null", r"not a steerkern\.plan file"),
        ('{"format": "steerkern.directions", "version": 1}', r"not a steerkern\.plan file"),
        ('{"format": "steerkern.plan", "version": 2}', "has format version 2, this steerkern reads version 1"),
        ('{"format": "steerkern.plan", "version": true}', "has format version True"),
        ('{"format": "steerkern.plan", "version": 1.0}', r"has format version 1\.0"),
        ('{"format": "steerkern.plan"}', "has format version None"),
        ('{"format": "steerkern.plan", "format": "steerkern.plan"}', "'format' stands twice"),
        ('{"a": {"b": 1, "b": 1}}', "'b' stands twice"),
        ('{"a": NaN}', "NaN is no JSON number"),
        ('{"a": -Infinity}', "-Infinity is no JSON number"),
        ("[" * 100_000, "not JSON"),
        ('{"a":' * 100_000, "not JSON"),
        ("\ufeff{}", "not JSON"),
        ("1" * 5000, "not JSON"),
    ],
)
def test_malformed_json_is_refused(folder: Path, text: str, reason: str) -> None:
    (folder / "plan.json").write_text(text, encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"^plan\.json.*" + reason) as caught:
        Plan.from_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_deep_json_that_parses_is_refused_where_it_stands(folder: Path) -> None:
    header = json.loads((folder / "plan.json").read_text())
    for depth in (50, 500, 900, 2000):
        deep = json.loads("[" * 50 + "]" * 50)
        text = json.dumps({**header, "model": deep}).replace("[" * 50, "[" * depth).replace("]" * 50, "]" * depth)
        (folder / "plan.json").write_text(text)
        with pytest.raises(ArtifactError):
            Plan.from_pretrained(folder)


def test_deep_provenance_is_kept_or_refused(tmp_path: Path) -> None:
    Directions.of({0: V[0]}, provenance={"deep": "HERE"}).save_pretrained(tmp_path)
    text = (tmp_path / "directions.json").read_text()
    for depth in (10, 300, 600, 800, 900, 950, 980, 2000):
        (tmp_path / "directions.json").write_text(text.replace('"HERE"', "[" * depth + "]" * depth))
        try:
            found = Directions.from_pretrained(tmp_path)
        except ArtifactError as error:
            check_sentence(error)
        else:
            assert len(found.provenance["deep"]) in (0, 1)


def test_bytes_that_are_not_utf8_are_refused(folder: Path) -> None:
    for data in (b"\xff\xfe{\x00}\x00", b"\x80", "{}".encode("utf-16")):
        (folder / "plan.json").write_bytes(data)
        with pytest.raises(ArtifactError, match="not JSON"):
            Plan.from_pretrained(folder)


# limits


def test_a_file_over_the_limit_is_refused_unread(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (folder / "plan.json").open("ab") as file:
        file.truncate(MAX_JSON_BYTES + 1)
    with pytest.raises(ArtifactError, match=r"plan\.json is 4194305 bytes, allowed are 4194304"):
        Plan.from_pretrained(folder)
    everything().save_pretrained(folder)
    monkeypatch.setattr(artifacts, "MAX_TENSOR_BYTES", 100)
    with pytest.raises(ArtifactError, match=r"directions\.safetensors is \d+ bytes, allowed are 100"):
        Plan.from_pretrained(folder)


@pytest.mark.parametrize(
    ("limit", "value", "text"),
    [("MAX_JSON_BYTES", 100, "bytes, allowed are 100"), ("MAX_TENSOR_BYTES", 100, "bytes, allowed are 100"),
     ("MAX_TENSORS", 2, "holds 7 tensors, allowed are 2"), ("MAX_WIDTH", 5, "up to width 5")],
)  # fmt: skip
def test_nothing_is_written_that_would_not_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, value: int, text: str
) -> None:
    monkeypatch.setattr(artifacts, limit, value)
    with pytest.raises(ArtifactError, match=text):
        everything().save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


# paths


class Bomb:
    def __reduce__(self) -> Any:
        return (os.mkdir, (str(Bomb.target),))

    target = Path()


@pytest.mark.parametrize("name", ["vector.pt", "pytorch_model.bin", "plan.pkl", "directions.safetensors", "plan.json"])
def test_a_pickle_given_as_path_is_refused_unopened(tmp_path: Path, name: str) -> None:
    Bomb.target = tmp_path / "exploded"
    path = tmp_path / name
    path.write_bytes(pickle.dumps(Bomb()))
    for read in (Plan.from_pretrained, Directions.from_pretrained):
        for source in (path, str(path)):
            with pytest.raises(ArtifactError, match="is a file; steerkern reads a folder with") as caught:
                read(source)
            assert "\n" not in str(caught.value)
    assert not Bomb.target.exists()
    pickle.loads(path.read_bytes())  # control: opening it does go off
    assert Bomb.target.exists()


def test_a_pickle_in_the_place_of_the_tensors_is_refused_unopened(folder: Path) -> None:
    Bomb.target = folder / "exploded"
    reseal(folder, tensors=pickle.dumps(Bomb()))
    with pytest.raises(ArtifactError, match="not a well-formed safetensors file"):
        Plan.from_pretrained(folder)
    torch.save({"0.0.1": torch.ones(1, 6)}, folder / "x.pt")
    reseal(folder, tensors=(folder / "x.pt").read_bytes())
    with pytest.raises(ArtifactError, match="not a well-formed safetensors file"):
        Plan.from_pretrained(folder)
    assert not Bomb.target.exists()


@pytest.mark.parametrize("missing", ["plan.json", TENSORS])
def test_a_missing_file_is_named(folder: Path, missing: str) -> None:
    (folder / missing).unlink()
    with pytest.raises(ArtifactError, match=f"has no {missing}"):
        Plan.from_pretrained(folder)
    (folder / missing).mkdir()
    with pytest.raises(ArtifactError, match=f"has no {missing}"):
        Plan.from_pretrained(folder)


def test_a_pipe_in_the_place_of_a_file_does_not_hang(folder: Path) -> None:
    (folder / "plan.json").unlink()
    os.mkfifo(folder / "plan.json")
    with pytest.raises(ArtifactError, match=r"has no plan\.json"):
        Plan.from_pretrained(folder)


@pytest.mark.parametrize(
    "source",
    ["/no/such/folder", "../../etc/x/y", "a/b/c", "a/..", "./a", "x" * 5000, "a\0b", "owner/na me", "~", "a/b\n"],
)
def test_a_source_that_is_neither_folder_nor_hub_id_asks_no_hub(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
    with pytest.raises(ArtifactError) as caught:
        Plan.from_pretrained(source)
    assert "\n" not in str(caught.value)
    assert "\0" not in str(caught.value)


def test_a_tensor_name_is_never_a_path(folder: Path) -> None:
    text = (folder / "plan.json").read_text()
    for name in ("../../secret", "/etc/passwd", str(folder / TENSORS)):
        (folder / "plan.json").write_text(text.replace('"1.0.any"', json.dumps(name)))
        with pytest.raises(ArtifactError, match=r"directions\.safetensors has no tensor"):
            Plan.from_pretrained(folder)


# the hub


def test_a_hub_id_is_fetched_by_huggingface_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, Any]] = []

    def snapshot_download(repo_id: str, **options: Any) -> str:
        asked.append((repo_id, options))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    plan = Plan.from_pretrained("owner/open-plan")
    assert repr(plan) == repr(everything())
    assert asked == [("owner/open-plan", {"allow_patterns": ["plan.json", TENSORS]})]
    with pytest.raises(ArtifactError, match=r"has no directions\.json"):
        Directions.from_pretrained("owner/open-plan")


def test_without_a_network_the_hub_error_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArtifactError, match=r"^no folder 'owner/name', and the hub gave none by that id: \w+$"):
        Plan.from_pretrained("owner/name")


def test_a_folder_is_preferred_to_a_hub_id_of_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    everything().save_pretrained("owner/name")
    assert repr(Plan.from_pretrained("owner/name")) == repr(everything())


# writing


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def test_an_unwritable_place_is_one_sentence_and_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    before = snapshot(tmp_path)
    for place in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "a" / ("x" * 300), tmp_path / "a\0b"):
        for artefact in (everything(), Directions.of({0: V[0]})):
            with pytest.raises((ArtifactError, ValueError)) as caught:
                artefact.save_pretrained(place)
            assert "\n" not in str(caught.value)
            assert snapshot(tmp_path) == before


class Interrupted(BaseException):
    pass


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), Interrupted()])
@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("call", ["replace 1", "replace 2", "replace 3", "replace 4", "write_bytes 1", "write_bytes 2"])
def test_an_interrupted_write_leaves_the_old_artefact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, fresh: bool, error: BaseException
) -> None:
    place = tmp_path / "a" / "b"
    if not fresh:
        Plan(add(V[3]), name="old").save_pretrained(place)
        (place / "README.md").write_text("mine")
    before = snapshot(tmp_path)
    name, number = call.split()
    owner: Any = os if name == "replace" else Path
    real, calls = getattr(owner, name), [0]

    def failing(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == int(number):
            raise error
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing)
        try:
            everything().save_pretrained(place)
        except (ArtifactError, Interrupted) as raised:
            check_sentence(raised)
            assert snapshot(tmp_path) == before
        else:
            assert calls[0] < int(number)  # a fresh folder needs fewer moves
    everything().save_pretrained(place)
    assert repr(Plan.from_pretrained(place)) == repr(everything())


def test_halves_of_two_artefacts_are_not_read_as_one(tmp_path: Path) -> None:
    Plan(ablate(V[0])).save_pretrained(tmp_path / "a")
    Plan(ablate(V[1])).save_pretrained(tmp_path / "b")
    os.replace(tmp_path / "b" / TENSORS, tmp_path / "a" / TENSORS)
    with pytest.raises(ArtifactError, match=r"belongs to another plan\.json"):
        Plan.from_pretrained(tmp_path / "a")


def test_saving_again_replaces_and_leaves_no_scratch(tmp_path: Path) -> None:
    everything().save_pretrained(tmp_path)
    Plan(add(V[0]), name="new").save_pretrained(tmp_path)
    assert Plan.from_pretrained(tmp_path).name == "new"
    assert sorted(snapshot(tmp_path)) == [TENSORS, "plan.json"]


def test_tensors_that_share_memory_can_be_written(tmp_path: Path) -> None:
    stack = torch.arange(12.0).reshape(3, 4)
    write_folder(tmp_path, "test", {}, {"a": stack[0], "b": stack[1:], "c": stack.T[1:3], "d": stack})
    header, tensors = read_folder(tmp_path, "test")
    assert header == {}
    for name, expected in {"a": stack[0], "b": stack[1:], "c": stack.T[1:3], "d": stack}.items():
        assert torch.equal(tensors[name], expected)


def test_a_fingerprint_says_what_it_is() -> None:
    assert str(Fingerprint("qwen2", 896, 24)) == "qwen2 (24 layers, width 896)"
