"""The Triton kernel without a GPU, in Triton's interpreter: a process of its own, for it excludes compilation.

It runs the conformance file on a part of its matrix (a row takes 20 ms there) and, in this file, what only this backend
has. What the interpreter cannot show, the order of sums on a GPU and its instructions, is compiled in
``test_triton_aot.py``.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from programs import KINDS, Entry, pack, program, units

from steerkern.errors import BackendError
from steerkern.ops import dispatch, reference, triton
from steerkern.ops.schemas import DTYPES, Flag, Link, Norm, Tables

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
inside = pytest.mark.skipif(not INTERPRETED, reason="runs in the interpreter's process")
outside = pytest.mark.skipif(INTERPRETED, reason="starts the interpreter's process")
HERE = Path(__file__).parent
WIDTHS = (1, 7, 64, 129, 896)


def part() -> list[str]:
    """Of each parametrised test every value at least once: every kind, norm, width, dtype and layout."""
    places = [(w, d, o) for d in DTYPES for w in WIDTHS for o in ("odd", "packed")]
    norms = [(n, p) for n in Norm if n != Norm.NONE for p in ("", "weight")]
    norms += [(Norm.LAYER, "bias"), (Norm.LAYER, "weight, bias")]
    names = []
    for i, kind in enumerate(KINDS):
        for w, d, o in (places[(7 * i) % 30], places[(7 * i + 13) % 30])[: 1 + i % 2]:
            names.append(f"test_edit[triton-{kind}-{w}-{d}-{o}]")
    for i, (norm, parameters) in enumerate(norms):
        w, d, o = places[(11 * i) % 30]
        names.append(f"test_norm[triton-{norm!s}-{parameters}-{w}-{d}-{o}]")
    for i, w in enumerate(WIDTHS):
        names += [f"test_delta_is_added_first_and_rounded_once[triton-{w}-{DTYPES[i % 3]}]"][: i % 2]
        names += [f"test_additions_have_the_bits_of_torch[triton-{w}]"]
    for d in DTYPES:
        names += [f"test_number_of_rows[triton-{d}-{n}]" for n in (0, 1, 3)]
        names += [f"test_untouched_rows_keep_every_bit[triton-{d}]", f"test_wide_rows[triton-16384-{d}]"]
    for once in ("most_entries_of_a_slot", "bits_do_not_depend_on_the_batch"):
        names.append(f"test_{once}[triton-torch.bfloat16]")
    for d in DTYPES[:2]:
        names += [f"test_ablating_a_massive_activation[triton-{d}-{size}]" for size in (100.0, 1000.0, 10000.0)]
    names += [f"test_every_half_value_is_read_exactly[triton-{d}]" for d in DTYPES[1:]]
    return [f"{HERE}/test_conformance.py::{name}" for name in [*names, "test_zero_rows_do_not_divide_by_zero[triton]"]]


@outside
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_conformance_in_the_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--no-header", __file__, *part()]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE.parents[1], check=False)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed is not None
    assert int(passed[1]) > len(part())  # this file's own tests ran too, and none of the part was skipped


@outside
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_reason_is_given() -> None:
    h = torch.zeros(1, 64)
    with pytest.raises(BackendError, match=r"backend triton: no GPU: torch .* (is built without CUDA|finds none)"):
        triton.steer(h, None, program("add", 64), norm=Norm.FP32)
    with pytest.raises(BackendError, match="backend triton: no GPU"):
        dispatch.resolve("triton", "cuda", torch.bfloat16)


@outside
def test_import_needs_no_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from steerkern.ops import dispatch, triton\n"
        "import torch; torch.cuda.is_available = lambda: False\n"
        "assert dispatch.backends()['triton'].startswith('no GPU'), dispatch.backends()\n"
        "assert dispatch.resolve(None, 'cpu', torch.float32) in ('cpu', 'reference')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=HERE.parents[1])


# in the interpreter


@inside
@pytest.mark.parametrize("change", ["first", "count", "end", "row", "negative row", "slot"])
def test_rows_whose_entries_lie_outside_the_tables_are_left_alone(change: str) -> None:
    """On a GPU nobody waits to hear of a fault, so the kernel must not follow it: here that would be a crash."""
    far = 2**31 - 1
    h, tables = torch.randn(3, 64), Tables(*(t.clone() for t in program("mixed", 64)))
    slot = torch.tensor([2, 0, -1], dtype=torch.int32)
    wanted, _ = reference.steer(h, slot, tables)
    match change:
        case "first":
            tables.span[2, 0] = -1
        case "count":
            tables.span[2, 1] = 65
        case "end":
            tables.span[2, 0] = far
        case "row":
            tables.links[Link.ROW, tables.span[2, 0] :] = far
        case "negative row":
            tables.links[Link.ROW, tables.span[2, 0] :] = -far
        case "slot":
            slot[0] = far
    got = h.clone()
    triton.steer(got, slot, tables)
    assert torch.equal(got[0], h[0])
    torch.testing.assert_close(got[1:], wanted[1:])


@inside
def test_gates_and_mates_outside_the_slot_read_nothing_outside() -> None:
    tables = program("mixed", 64)
    tables.links[Link.GATE] = 2**31 - 1
    tables.links[Link.MATE] = -(2**31)
    h = torch.randn(2, 64)
    triton.steer(h, torch.tensor([2, 1], dtype=torch.int32), tables)
    assert bool(h.isfinite().all())


@inside
def test_gates_and_mates_reach_over_the_halves_of_a_slot() -> None:
    """Coordinates lie in two tensors of 32: a gate and a mate in the other half must be found."""
    vectors = units(64, 96, 5)
    entries = [Entry(v, beta=0.3, gate=63 - k, gate_lo=0.0) for k, v in enumerate(vectors)]
    pair = Flag.READ | Flag.WRITE | Flag.PAIR
    for k in (3, 40):
        entries[k] = Entry(vectors[k], alpha=0.7, mate=43 - k, flags=pair)
    tables, h = pack([entries]), torch.randn(4, 96)
    slot = torch.zeros(4, dtype=torch.int32)
    wanted, _ = reference.steer(h, slot, tables)
    triton.steer(h, slot, tables)
    torch.testing.assert_close(h, wanted)


@inside
def test_pairs_are_added_element_by_element_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other tests sum pairs with NumPy; this one goes through the kernel's own ``add_pairs``."""
    from triton.runtime import interpreter

    from steerkern.ops.triton import kernels

    called = []
    add = kernels.add_pairs.fn

    def counted(*terms: object) -> object:
        called.append(1)
        return add(*terms)

    def one_by_one(self: object, values: tuple[object, object]) -> list[object]:
        first, second = (value.handle.data for value in values)
        total = (first[0], second[0])
        for terms in zip(first[1:], second[1:], strict=True):
            total = counted(*total, *terms)
        return [self.to_tensor(t, v.dtype) for t, v in zip(total, values, strict=True)]

    monkeypatch.setattr(interpreter.ReduceOps, "generic_reduce", one_by_one)
    h, tables, slot = torch.randn(2, 32), program("ablate", 32), torch.tensor([1, 2], dtype=torch.int32)
    wanted, _ = reference.steer(h, slot, tables)
    triton.steer(h, slot, tables)
    torch.testing.assert_close(h, wanted)
    assert len(called) == 31 * (2 + 9)  # three entries are two pairs, seventeen are nine


@inside
def test_rows_too_wide_are_refused() -> None:
    with pytest.raises(BackendError, match="rows of 65537, its kernels hold up to 65536"):
        triton.bind(None, 65537, torch.float32, Norm.LLAMA, 1e-6)


@inside
def test_addresses_that_a_wide_load_cannot_take_are_refused() -> None:
    kernel = triton.bind(None, 64, torch.float32, Norm.LLAMA, 1e-6)
    with pytest.raises(ValueError, match="rows of 64 must be aligned to 16 bytes"):
        kernel(1, 64 + 4, 64, 0, 0, 0, 128, 0)


@inside
@pytest.mark.parametrize("fuse", ["all", "none"])
def test_a_session_runs_on_it(fuse: str) -> None:
    """The path of a model on a GPU: bound kernels, called with addresses and the row map's."""
    from transformers import LlamaConfig, LlamaForCausalLM

    import steerkern as sk

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=64, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    plan = sk.Plan([sk.ablate(units(1, 32, 0)[0]), sk.add(units(1, 32, 1)[0], 4.0)], name="push")
    ids = torch.arange(1, 7).view(2, 3)
    tokens = {}
    for backend in ("triton", "reference"):
        with sk.steer(model, plan, backend=backend, fuse=fuse) as session:
            tokens[backend] = model(ids).logits
            assert session.backend == backend
    assert not torch.allclose(tokens["reference"], model(ids).logits)
    torch.testing.assert_close(tokens["triton"], tokens["reference"])
