"""Control vectors of llama.cpp and repeng: exact both ways, and damaged files refused."""

from __future__ import annotations

import random
import struct
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import steerkern as sk
from steerkern.integrations import gguf as ours

gguf = pytest.importorskip("gguf")
WIDTH = 12


def vectors(*layers: int, width: int = WIDTH) -> dict[int, torch.Tensor]:
    generator = torch.Generator().manual_seed(len(layers))
    return {layer: torch.randn(width, generator=generator) for layer in layers}


def foreign(path: Path, tensors: Mapping[str, np.ndarray], arch: str = "controlvector", **keys: Any) -> Path:
    """A file as repeng's ``export_gguf`` writes it, with the calls of the library that it makes."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_string("controlvector.model_hint", "mistral")
    writer.add_uint32("controlvector.layer_count", len(tensors))
    for key, value in keys.items():
        (writer.add_array if isinstance(value, list) else writer.add_string)(key.replace("_", "."), value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("layers", [(1,), (3, 1, 2), tuple(range(1, 33)), (70,)])
def test_round_trip_keeps_every_bit_and_every_layer(tmp_path: Path, layers: tuple[int, ...]) -> None:
    raw = vectors(*layers)
    raw[layers[0]][0], raw[layers[0]][1] = -0.0, 1e-42  # a negative zero and a subnormal number
    written = sk.Directions.of(raw, "resid_post", "calm voice", sk.Fingerprint("llama", WIDTH, 80))
    ours.write_gguf(written, tmp_path / "v.gguf")
    read = ours.read_gguf(tmp_path / "v.gguf")
    assert (read.site, read.name, list(read)) == ("resid_post", "calm voice", sorted(layers))
    assert read.provenance == {"format": "gguf", "model_hint": "llama"}
    for layer, vector in raw.items():
        assert read[layer].raw.numpy().tobytes() == vector.numpy().tobytes()
    ours.write_gguf(read, tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "v.gguf").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.gguf", "v.gguf"]


def test_the_file_is_what_llama_cpp_loads(tmp_path: Path) -> None:
    raw = vectors(2, 5)
    ours.write_gguf(sk.Directions.of(raw, "resid_post", model=sk.Fingerprint("qwen2", WIDTH, 6)), tmp_path / "v.gguf")
    reader = gguf.GGUFReader(tmp_path / "v.gguf")
    keys = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert keys == {
        "general.architecture": "controlvector",
        "general.name": "directions",
        "controlvector.model_hint": "qwen2",
        "controlvector.layer_count": 2,
    }
    seen = {t.name: (t.tensor_type.name, t.shape.tolist(), t.data.tolist()) for t in reader.tensors}
    assert seen == {f"direction.{n}": ("F32", [WIDTH], v.tolist()) for n, v in raw.items()}


def test_every_byte_is_where_the_specification_puts_it(tmp_path: Path) -> None:
    """Read with ``struct`` alone: version 3, little-endian, data aligned to 32 bytes after the tensor list."""
    raw = vectors(2, 5)
    ours.write_gguf(sk.Directions.of(raw, "resid_post", "calm"), tmp_path / "v.gguf")
    data, at = (tmp_path / "v.gguf").read_bytes(), 0

    def take(form: str) -> Any:
        nonlocal at
        found = struct.unpack_from(form, data, at)
        at += struct.calcsize(form)
        return found if len(found) > 1 else found[0]

    def take_text() -> str:
        size = take("<Q")
        return str(take(f"<{size}s").decode())

    assert take("<4sIQQ") == (b"GGUF", 3, 2, 4)
    keys = {}
    for _ in range(4):
        key, kind = take_text(), take("<I")
        assert kind in (4, 8)  # a uint32 or a string
        keys[key] = take("<I") if kind == 4 else take_text()
    assert keys["general.architecture"] == "controlvector"
    assert keys["controlvector.layer_count"] == 2
    infos = [(take_text(), *take("<IQIQ")) for _ in range(2)]
    base = -(-at // 32) * 32
    for (name, dimensions, width, kind, offset), (layer, vector) in zip(infos, raw.items(), strict=True):
        assert (name, dimensions, width, kind, offset % 32) == (f"direction.{layer}", 1, WIDTH, 0, 0)
        assert np.array_equal(np.frombuffer(data, "<f4", WIDTH, base + offset), vector.numpy())


def test_a_file_of_repeng_is_read(tmp_path: Path) -> None:
    raw = {layer: vector.numpy() for layer, vector in vectors(3, 2, 1).items()}
    path = foreign(
        tmp_path / "happy.gguf", {f"direction.{n}": v for n, v in raw.items()}, general_tags=["a", "b"], my_ages=[1, 2]
    )
    read = ours.read_gguf(path)
    assert (read.name, read.provenance["model_hint"], read.model) == ("happy", "mistral", None)
    assert {n: d.raw.tolist() for n, d in read.items()} == {n: v.tolist() for n, v in raw.items()}


def test_a_direction_of_zeros_adds_nothing_and_is_left_out(tmp_path: Path) -> None:
    ones, zeros = np.ones(WIDTH, np.float32), np.zeros(WIDTH, np.float32)
    path = foreign(tmp_path / "v.gguf", {"direction.1": zeros, "direction.2": ones})
    assert list(ours.read_gguf(path)) == [2]
    with pytest.raises(sk.ArtifactError, match="need at least one layer"):
        ours.read_gguf(foreign(tmp_path / "w.gguf", {"direction.1": zeros}))


def test_inputs_of_blocks_are_written_as_outputs_of_the_ones_before(tmp_path: Path) -> None:
    raw = vectors(2, 4)
    ours.write_gguf(sk.Directions.of(raw, "resid_pre"), tmp_path / "v.gguf")
    read = ours.read_gguf(tmp_path / "v.gguf")
    assert list(read) == [1, 3]
    assert torch.equal(read[1].raw, raw[2])
    assert torch.equal(read[3].raw, raw[4])


@pytest.mark.parametrize(
    ("site", "layers", "message"),
    [
        ("resid_post", (0, 1), r"the output of block 0 \(resid_post\[0\]\) has no place in a GGUF control vector"),
        ("resid_pre", (1, 2), r"the output of block 0 \(resid_pre\[1\]\) has no place in a GGUF control vector"),
        ("resid_pre", (0, 2), r"resid_pre\[0\] is the embedding, no block's output; leave layer 0 out"),
        ("resid_mid", (2,), "these directions are of resid_mid"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(
    tmp_path: Path, site: str, layers: tuple[int, ...], message: str
) -> None:
    directions = sk.Directions.of(vectors(*layers), site)
    (tmp_path / "v.gguf").write_bytes(b"kept")
    with pytest.raises(sk.ArtifactError, match=message):
        ours.write_gguf(directions, tmp_path / "v.gguf")
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"kept"]
    if len(layers) > 1:
        ours.write_gguf(directions, tmp_path / "v.gguf", layers=[layers[1]])
        assert len(ours.read_gguf(tmp_path / "v.gguf")) == 1


def test_layers_that_are_not_there(tmp_path: Path) -> None:
    directions = sk.Directions.of(vectors(1, 2), "resid_post", "calm")
    with pytest.raises(sk.ArtifactError, match=r"layer 7: 'calm' has layers \[1, 2\]"):
        ours.write_gguf(directions, tmp_path / "v.gguf", layers=[1, 7])
    with pytest.raises(sk.ArtifactError, match="at least one layer"):
        ours.write_gguf(directions, tmp_path / "v.gguf", layers=[])


def test_folders_that_cannot_be_written_or_read(tmp_path: Path) -> None:
    directions = sk.Directions.of(vectors(1), "resid_post")
    with pytest.raises(sk.ArtifactError, match="cannot write .*none/v.gguf: No such file"):
        ours.write_gguf(directions, tmp_path / "none" / "v.gguf")
    with pytest.raises(sk.ArtifactError, match="cannot write"):
        ours.write_gguf(directions, tmp_path)
    for path in (tmp_path, tmp_path / "none.gguf"):
        with pytest.raises(sk.ArtifactError, match="no file"):
            ours.read_gguf(path)


def test_without_the_package_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    for attempt in (
        lambda: ours.read_gguf(tmp_path / "v.gguf"),
        lambda: ours.write_gguf(sk.Directions.of(vectors(1), "resid_post"), tmp_path / "v.gguf"),
    ):
        with pytest.raises(sk.BackendError, match=r"pip install 'steerkern\[gguf\]'"):
            attempt()


# files of others


@pytest.mark.parametrize(
    ("tensors", "arch", "message"),
    [
        ({"direction.1": (WIDTH,)}, "llama", "holds 'llama', a control vector holds 'controlvector'"),
        ({"direction.0": (WIDTH,)}, "controlvector", "direction.0: control vectors start at block 1"),
        ({"direction.99999": (WIDTH,)}, "controlvector", "direction.99999: control vectors start at block 1"),
        ({"direction.-1": (WIDTH,)}, "controlvector", r"tensors must be named direction.N, got 'direction.-1'"),
        ({"direction.01": (WIDTH,)}, "controlvector", r"tensors must be named direction.N, got 'direction.01'"),
        ({"blk.1.weight": (WIDTH,)}, "controlvector", r"tensors must be named direction.N, got 'blk.1.weight'"),
        ({"direction.1": (2, WIDTH)}, "controlvector", r"direction.1 must be F32 \[H\], .* got F32 \[12, 2\]"),
        ({"direction.1": (0,)}, "controlvector", r"direction.1 must be F32 \[H\], .* got F32 \[0\]"),
        ({"direction.1": (WIDTH,), "direction.2": (3,)}, "controlvector", "one width"),
        ({}, "controlvector", "a control vector has 1 to 4096 tensors, got 0"),
    ],
)
def test_a_file_that_is_no_control_vector(
    tmp_path: Path, tensors: dict[str, tuple[int, ...]], arch: str, message: str
) -> None:
    path = foreign(tmp_path / "v.gguf", {n: np.ones(s, np.float32) for n, s in tensors.items()}, arch)
    with pytest.raises(sk.ArtifactError, match=message):
        ours.read_gguf(path)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.ones(WIDTH, np.float16), "must be F32"),
        (np.full(WIDTH, np.nan, np.float32), "NaN or Inf"),
        (np.full(WIDTH, -np.inf, np.float32), "NaN or Inf"),
    ],
)
def test_values_that_are_no_vector(tmp_path: Path, value: np.ndarray, message: str) -> None:
    with pytest.raises(sk.ArtifactError, match=message):
        ours.read_gguf(foreign(tmp_path / "v.gguf", {"direction.1": value}))


def header(tensors: int = 1, keys: int = 1, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys)


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


HUGE = 1 << 60


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a GGUF file"),
        (b"\x80\x04pickle", "not a GGUF file"),
        (b"GGUF", "the file ends within its header, at byte 4"),
        (header(version=1), "GGUF versions 2 and 3, little-endian, are read, got 1"),
        (header(version=3 << 24), "little-endian, are read, got 50331648"),
        (header(tensors=HUGE), "a control vector has 1 to 4096 tensors, got 1152921504606846976"),
        (header(keys=HUGE), "allowed are 1024 keys, got 1152921504606846976"),
        (header(), "the file ends within its header, at byte 24"),
        (header() + struct.pack("<Q", HUGE), "allowed are strings of 65536 bytes, got 1152921504606846976"),
        (header() + text(b"k") + struct.pack("<I", 13), "no such value type: 13"),
        (header() + text(b"k") + struct.pack("<IIQ", 9, 4, HUGE), "allowed are 65536 array items, got 11529215046068"),
        (header() + text(b"k") + struct.pack("<IIQ", 9, 4, 60_000), "the file ends within its header"),
        (header() + text(b"k") + struct.pack("<IIQ", 9, 9, 1), "no such value type: 9"),
        (header(keys=0) + struct.pack("<Q", HUGE), "not a well-formed GGUF file"),
        (header(keys=0) + text(b"direction.1") + struct.pack("<I", (1 << 32) - 1), "not a well-formed GGUF file"),
    ],
)
def test_counts_are_checked_before_the_library_follows_them(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "v.gguf").write_bytes(data)
    with pytest.raises(sk.ArtifactError, match=message):
        ours.read_gguf(tmp_path / "v.gguf")


def test_a_whole_model_is_refused_by_its_size(tmp_path: Path) -> None:
    with (tmp_path / "model.gguf").open("wb") as file:
        file.write(header())
        file.truncate((1 << 30) + 1)  # sparse
    with pytest.raises(sk.ArtifactError, match=r"model.gguf is 1073741825 bytes, allowed are 1073741824"):
        ours.read_gguf(tmp_path / "model.gguf")


def test_damaged_files_give_one_kind_of_error_or_directions(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.gguf", tmp_path / "bad.gguf"
    ours.write_gguf(sk.Directions.of(vectors(1, 2, 3), "resid_post"), good)
    data, rng, refused = good.read_bytes(), random.Random(0), 0
    end = data.index(b"direction.3") + 64
    cuts = [data[:n] for n in range(len(data))]
    flips = [data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :] for at in range(end) for bit in (0, 3, 7)]
    smears = []
    for _ in range(400):
        smeared = bytearray(data)
        for _ in range(rng.randint(1, 8)):
            smeared[rng.randrange(4, end)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        smears.append(bytes(smeared))
    for damaged in cuts + flips + smears:
        bad.write_bytes(damaged)
        try:
            read = ours.read_gguf(bad)
        except sk.ArtifactError as error:
            refused += "\n" not in str(error)
        else:
            assert isinstance(read, sk.Directions)
    assert refused > len(cuts)
