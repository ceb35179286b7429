"""The registered ops: argument checks, faults, gradients, opcheck and torch.compile."""

from __future__ import annotations

import gc
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from programs import KINDS, Entry, orthonormal, pack, program, units
from torch import Tensor

from steerkern.errors import BackendError
from steerkern.ops import cpu, dispatch, reference
from steerkern.ops.schemas import DTYPES, Flag, Link, Norm, Tables

steer_ = torch.ops.steerkern.steer_
steer_norm_ = torch.ops.steerkern.steer_norm_
native = pytest.mark.skipif(bool(cpu.unusable()), reason=cpu.unusable() or "-")
RUNNERS = ["reference", pytest.param("cpu", marks=native)]
"""Those that report faults; on a GPU a faulty row is not edited, and nobody waits to hear of it."""
WIDTH = 64


@pytest.fixture
def rows() -> tuple[Tensor, Tensor, Tables, Tensor]:
    """``h``, ``slot``, tables and a norm weight."""
    torch.manual_seed(0)
    slot = torch.tensor([0, -1, 1, 2, 2, 3], dtype=torch.int32)
    return torch.randn(6, WIDTH), slot, program("mixed", WIDTH), torch.randn(WIDTH)


# faults


def corrupted(tables: Tables, change: Callable[[Tables], object]) -> Tables:
    copy = Tables(*(table.clone() for table in tables))
    change(copy)
    return copy


FAULTS: dict[str, tuple[Callable[[Tables], object], type[Exception], str]] = {
    "negative first entry": (lambda t: t.span[2, 0].fill_(-1), ValueError, "slot 2: entries -1"),
    "entries past the end": (lambda t: t.span[2, 0].fill_(10_000), ValueError, "slot 2: entries 10000"),
    "first entry near 2^31": (lambda t: t.span[2, 0].fill_(2**31 - 1), ValueError, "slot 2: entries 2147483647"),
    "too many entries": (lambda t: t.span[2, 1].fill_(65), ValueError, "slot 2: entries"),
    "negative count": (lambda t: t.span[2, 1].fill_(-3), ValueError, "slot 2: entries"),
    "bank row past the end": (lambda t: t.links[Link.ROW].fill_(9999), ValueError, "a bank row lies outside"),
    "negative bank row": (lambda t: t.links[Link.ROW].fill_(-1), ValueError, "a bank row lies outside"),
    "gate past the slot": (lambda t: t.links[Link.GATE].fill_(8), ValueError, "a mate or gate lies outside"),
    "mate past the slot": (lambda t: t.links[Link.MATE].fill_(8), ValueError, "a mate or gate lies outside"),
    "rotation without a mate": (lambda t: t.links[Link.MATE].fill_(-1), ValueError, "a rotation entry has no mate"),
}


@pytest.mark.parametrize("backend", RUNNERS)
@pytest.mark.parametrize("fault", FAULTS)
def test_fault_in_the_tables_raises_before_anything_is_written(backend: str, fault: str, rows: Any) -> None:
    h, slot, tables, weight = rows
    change, error, sentence = FAULTS[fault]
    broken = corrupted(tables, change)
    before, trace = h.clone(), torch.full((6, 2), torch.nan)
    with pytest.raises(error, match=re.escape(sentence)):
        dispatch.RUNNERS[backend](h, slot, broken, weight, None, 1e-6, Norm.LLAMA, torch.ones_like(h), trace)
    assert torch.equal(h, before)
    assert bool(trace.isnan().all())


@pytest.mark.parametrize("backend", RUNNERS)
@pytest.mark.parametrize("bad", [5, 2**31 - 1])
def test_slot_that_does_not_exist_raises_before_anything_is_written(backend: str, bad: int, rows: Any) -> None:
    h, slot, tables, weight = rows
    slot[-1] = bad  # in the last row: the rows before it must not have been edited by then
    before = h.clone()
    with pytest.raises(IndexError, match=rf"slot {bad}: the program has 5 slots \(0..4, -1 for none\)"):
        dispatch.RUNNERS[backend](h, slot, tables, weight, None, 1e-6, Norm.LLAMA, None, None)
    assert torch.equal(h, before)


@native
def test_kernel_reports_the_first_bad_row_and_writes_no_output(rows: Any) -> None:
    h, slot, tables, weight = rows
    slot[3:] = 7
    y = torch.full_like(h, torch.nan)
    kernel = cpu.bind(tables, WIDTH, h.dtype, Norm.LLAMA, 1e-6)
    assert kernel(6, h.data_ptr(), WIDTH, slot.data_ptr(), weight.data_ptr(), 0, y.data_ptr(), 1) == 3
    assert bool(y.isnan().all())


@native
def test_kernel_without_tables_steers_nobody(rows: Any) -> None:
    h, slot, _, _ = rows
    kernel = cpu.bind(None, WIDTH, h.dtype, Norm.LLAMA, 1e-6)
    y = torch.empty_like(h)
    assert kernel(6, h.data_ptr(), WIDTH, 0, 0, 0, y.data_ptr(), 1) == -1
    torch.testing.assert_close(y, reference.normalise(h, None, None, 1e-6, Norm.LLAMA))
    assert kernel(6, h.data_ptr(), WIDTH, slot.data_ptr(), 0, 0, y.data_ptr(), 1) == 0


@native
def test_kernel_keeps_its_tables_alive(rows: Any) -> None:
    h, slot, tables, _ = rows
    wanted, _ = reference.steer(h, slot, tables)
    kernel = cpu.bind(Tables(*(table.clone() for table in tables)), WIDTH, h.dtype, Norm.NONE, 0.0)
    gc.collect()
    churn = [torch.full((4096,), torch.nan) for _ in range(64)]
    assert kernel(6, h.data_ptr(), WIDTH, slot.data_ptr(), 0, 0, 0, 1) == -1
    del churn
    torch.testing.assert_close(h, wanted)


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "width"), [(0, 7), (1, 1), (3, 64), (5, 129), (257, 40)])
def test_a_new_sum_has_the_bits_of_a_sum_in_place(dtype: torch.dtype, n: int, width: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(width).to(dtype)
    left, right = torch.randn(2, n, width).to(dtype).unbind()
    kernel = cpu.bind(None, width, dtype, Norm.LLAMA, 1e-6)
    norm = cpu.bind_norm(kernel, width, dtype, {"weight": weight}, None, 1)
    before = left.clone(), right.clone()
    with torch.no_grad():
        made = norm(left, right)
        assert made is not None
        total, y = made
        assert torch.equal(total, left + right)
        assert torch.equal(y, norm(left + right))
        assert torch.equal(left, before[0])
        assert torch.equal(right, before[1])
        assert norm(left.double()) is None
        assert norm(left, right.view(-1)) is None
        assert norm(torch.empty(width, 2, dtype=dtype).T if width > 1 else left.double()) is None
    assert norm(left) is None  # gradients are enabled
    with pytest.raises(TypeError, match="one state, or two to add"):
        norm()


@native
def test_kernel_wants_eight_integers(rows: Any) -> None:
    kernel: Any = cpu.bind(None, WIDTH, torch.float32, Norm.NONE, 0.0)
    with pytest.raises(TypeError, match="eight positional integers"):
        kernel(1, 2, 3)
    with pytest.raises(TypeError):
        kernel(0, 0, "64", 0, 0, 0, 0, 1)
    with pytest.raises(TypeError, match="eight positional integers"):
        kernel(n=0)
    with pytest.raises(ValueError, match="width must be positive"):
        cpu._C.Steer(0, 0, 0, 0.0)
    with pytest.raises(ValueError, match="instruction set"):
        cpu._C.set_isa("avx1024")


# arguments


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"h": torch.zeros(6, 2, WIDTH)}, ValueError, r"h must be \[N, H\]"),
        ({"h": torch.zeros(6, WIDTH, dtype=torch.int32)}, TypeError, "h must be float32"),
        ({"slot": torch.zeros(6, dtype=torch.int64)}, TypeError, "slot must be int32, got torch.int64"),
        ({"slot": torch.zeros(5, dtype=torch.int32)}, ValueError, r"slot must be \[6\]"),
        ({"weight": torch.zeros(WIDTH - 1)}, ValueError, r"weight must be a contiguous \[64\]"),
        ({"weight": torch.zeros(WIDTH, dtype=torch.bfloat16)}, TypeError, "weight must be torch.float32"),
        ({"bias": torch.zeros(WIDTH)}, ValueError, "bias is for LayerNorm only"),
        ({"norm": 9}, ValueError, "norm must be one of"),
        ({"norm": 0}, ValueError, "steer_norm_ needs a norm"),
        ({"delta": torch.zeros(5, WIDTH)}, ValueError, "delta must be"),
        ({"delta": torch.zeros(6, WIDTH).half()}, TypeError, "delta must be torch.float32"),
        ({"trace": torch.zeros(6, 3).double()}, TypeError, "trace must be float32"),
        ({"trace": torch.zeros(3, 6).T}, ValueError, r"trace must be a contiguous \[6, T\]"),
        ({"bank": torch.zeros(24, 63)}, ValueError, "bank must be a contiguous"),
        ({"gain": torch.zeros(5).double()}, TypeError, "gain must be torch.float32"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], error: type[Exception], sentence: str, rows: Any) -> None:
    h, slot, tables, weight = rows
    arguments = {"h": h, "slot": slot, **tables._asdict(), "weight": weight, "bias": None, "eps": 1e-6, "norm": 1}
    arguments |= {"delta": None, "trace": None} | change
    with pytest.raises(error, match=sentence):
        steer_norm_(*arguments.values())


@native
def test_overlapping_rows_are_refused(rows: Any) -> None:
    _, slot, tables, _ = rows
    with pytest.raises(ValueError, match="the rows of h overlap"):
        steer_(torch.randn(6 + WIDTH).as_strided((6, WIDTH), (1, 1)), slot, *tables)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_any_strides_give_the_same(rows: Any, dtype: torch.dtype) -> None:
    h, slot, tables, weight = rows
    h, weight, delta = h.to(dtype), weight.to(dtype), torch.randn(6, WIDTH).to(dtype)
    plain, columns = h.clone(), h.T.contiguous().T
    wanted = steer_norm_(plain, slot, *tables, weight, None, 1e-6, Norm.FP32, delta)
    slots = slot.repeat_interleave(2)[::2]
    got = steer_norm_(columns, slots, *tables, weight, None, 1e-6, Norm.FP32, delta.T.contiguous().T)
    tolerance = 1e-12 if dtype == torch.float64 else 0.0  # float64 runs on the reference, whose sums follow the strides
    torch.testing.assert_close(columns, plain, rtol=0, atol=tolerance)
    torch.testing.assert_close(got, wanted, rtol=0, atol=tolerance)
    assert got.is_contiguous()


# gradients


def test_gradients_are_refused_in_one_sentence(rows: Any) -> None:
    h, slot, tables, weight = rows
    leaf = h.clone().requires_grad_()
    with pytest.raises(RuntimeError, match=r"steer_ writes in place and has no gradient: .*reference"):
        steer_(leaf * 1, slot, *tables)
    with pytest.raises(RuntimeError, match=r"steer_norm_ writes in place and has no gradient"):
        steer_norm_(h, slot, *tables, weight.requires_grad_(), None, 1e-6, Norm.LLAMA)
    with torch.no_grad():
        steer_norm_(h, slot, *tables, weight, None, 1e-6, Norm.LLAMA)


def test_backward_through_a_value_saved_before_the_edit_raises(rows: Any) -> None:
    h, slot, tables, _ = rows
    w = torch.randn(WIDTH, requires_grad=True)
    product = h * w
    steer_(h, slot, *tables)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_inference_mode(rows: Any) -> None:
    h, slot, tables, weight = rows
    wanted = steer_norm_(h.clone(), slot, *tables, weight, None, 1e-6, Norm.LLAMA)
    with torch.inference_mode():
        inside = h.clone()
        assert torch.equal(steer_norm_(inside, slot, *tables, weight, None, 1e-6, Norm.LLAMA), wanted)


SMOOTH = [kind for kind in KINDS if kind not in ("cap", "floor", "probe")]


@pytest.mark.parametrize("kind", SMOOTH)
def test_reference_passes_gradcheck(kind: str) -> None:
    torch.manual_seed(0)
    tables, slot = program(kind, 12), torch.tensor([0, 1, -1, 4], dtype=torch.int32)
    h = torch.randn(4, 12, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(12, dtype=torch.float64, requires_grad=True)
    gain = tables.gain.double().requires_grad_()

    def run(h: Tensor, weight: Tensor, gain: Tensor) -> tuple[Tensor, Tensor | None]:
        return reference.steer(h, slot, tables._replace(gain=gain), weight, None, 1e-6, Norm.FP32)

    assert torch.autograd.gradcheck(run, (h, weight, gain))


@pytest.mark.parametrize("kind", ["rotate", "gate_cosine", "keep_norm"])
def test_reference_has_finite_gradients_at_zero(kind: str) -> None:
    h = torch.zeros(3, 12, requires_grad=True)
    out, _ = reference.steer(h, torch.tensor([0, 1, 2], dtype=torch.int32), program(kind, 12))
    out.sum().backward()
    assert h.grad is not None
    assert bool(h.grad.isfinite().all())


# opcheck and compile


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_opcheck(rows: Any, dtype: torch.dtype) -> None:
    h, slot, tables, weight = rows
    h, weight = h.to(dtype), weight.to(dtype)
    delta, trace = torch.randn(6, WIDTH).to(dtype), torch.zeros(6, 2)
    torch.library.opcheck(steer_, (h.clone(), slot, *tables), {"delta": delta, "trace": trace})
    torch.library.opcheck(steer_norm_, (h.clone(), slot, *tables, weight, None, 1e-6, int(Norm.LLAMA)))
    torch.library.opcheck(steer_norm_, (h.clone(), None, *tables, weight, weight, 1e-5, int(Norm.LAYER)))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_graph_edits_the_residual_without_a_copy(rows: Any, dynamic: bool) -> None:
    from torch._inductor.utils import run_and_get_code

    h, slot, tables, weight = rows

    def block(x: Tensor, slot: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        residual = x * 2
        y = steer_norm_(residual.view(-1, WIDTH), slot, *tables, weight, None, 1e-6, int(Norm.LLAMA))
        steer_(residual, slot, *tables)
        return residual + y, y

    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(block, fullgraph=True, dynamic=dynamic)
        got, (code, *_) = run_and_get_code(compiled, h, slot, weight)
        wanted = block(h, slot, weight)
    torch.testing.assert_close(got, wanted)
    call = code[code.index("def call(") :]
    before, after = call.split("torch.ops.steerkern.steer_norm_.default(", 1)
    assert before.count("empty_strided") == 1  # the residual itself
    between = after[: after.index("torch.ops.steerkern.steer_.default(")]
    assert "empty_strided" not in between
    assert "copy" not in between
    assert "clone" not in call


def test_compiled_graph_edits_its_input(rows: Any) -> None:
    h, slot, tables, _ = rows
    wanted, _ = reference.steer(h, slot, tables)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(lambda h: steer_(h, slot, *tables), fullgraph=True)(h)
    torch.testing.assert_close(h, wanted)


# choosing a backend


def test_backends_say_why_they_cannot_run() -> None:
    known = dispatch.backends()
    assert list(known) == ["reference", "cpu", "triton", "cuda"]
    assert known["reference"] == ""
    if not torch.cuda.is_available():
        assert known["triton"].startswith("no GPU: torch ")
        assert known["cuda"]


@native
def test_automatic_choice(recwarn: pytest.WarningsRecorder) -> None:
    for dtype in DTYPES:
        assert dispatch.resolve(None, "cpu", dtype) == "cpu"
    assert dispatch.resolve("cpu", torch.device("cpu"), torch.bfloat16) == "cpu"
    assert not recwarn.list


@pytest.mark.parametrize(("missing", "chosen"), [("", "cuda"), ("cuda", "triton")])
def test_automatic_choice_on_a_gpu(missing: str, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cuda", "triton"):
        monkeypatch.setattr(dispatch.NATIVE[name], "unusable", lambda name=name: "gone" if name == missing else "")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.resolve(None, "cuda", torch.bfloat16) == chosen


def test_automatic_choice_falls_back_and_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    dispatch._warn_once.cache_clear()
    for name in ("cuda", "triton"):
        monkeypatch.setattr(dispatch.NATIVE[name], "unusable", lambda name=name: f"no {name} here")
    reasons = "plain torch reference: backend cuda: no cuda here; backend triton: no triton here"
    with pytest.warns(RuntimeWarning, match=reasons):
        assert dispatch.resolve(None, "cuda", torch.bfloat16) == "reference"
    with pytest.warns(RuntimeWarning, match=r"backend cpu: .*float64"):
        assert dispatch.resolve(None, "cpu", torch.float64) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.resolve(None, "cuda", torch.bfloat16) == "reference"


@pytest.mark.parametrize(
    ("backend", "device", "dtype", "sentence"),
    [
        ("triton", "cuda", torch.float32, "backend triton: no GPU: torch "),
        ("cpu", "cuda", torch.float32, "backend cpu: the model is on cuda"),
        ("cpu", "cpu", torch.float64, "backend cpu: no kernel for torch.float64"),
        ("gpu", "cpu", torch.float32, "backend 'gpu': known are reference, cpu, triton, cuda"),
    ],
)
@native
def test_a_backend_asked_for_works_or_raises(backend: str, device: str, dtype: torch.dtype, sentence: str) -> None:
    if "no GPU" in sentence and torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(BackendError, match=re.escape(sentence)):
        dispatch.resolve(backend, device, dtype)


def test_missing_extension_is_explained(monkeypatch: pytest.MonkeyPatch, rows: Any) -> None:
    monkeypatch.setattr(cpu, "_MISSING", "the native extension is not built")
    h, slot, tables, _ = rows
    with pytest.raises(BackendError, match="backend cpu: the native extension is not built"):
        cpu.bind(tables, WIDTH, torch.float32, Norm.NONE, 0.0)
    wanted, _ = reference.steer(h, slot, tables)
    steer_(h, slot, *tables)  # the registered op runs all the same
    assert torch.equal(h, wanted)


@native
def test_unknown_instruction_set_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEERKERN_ISA", "avx1024")
    assert 'STEERKERN_ISA="avx1024": this machine and build have' in dispatch.backends()["cpu"]


def test_rank_k_ablation_of_orthonormal_rows_empties_the_subspace() -> None:
    vectors = orthonormal(5, WIDTH, 0)
    tables = pack([[Entry(v, beta=1.0, flags=Flag.READ | Flag.WRITE) for v in vectors]])
    h = torch.randn(7, WIDTH)
    steer_(h, torch.zeros(7, dtype=torch.int32), *tables)
    assert float((h @ torch.stack(vectors).T).abs().max()) < 1e-5  # 64 terms of size 1 at float32


def test_slots_of_a_batch_do_not_mix() -> None:
    first, second = units(2, WIDTH, 1)
    tables = pack([[Entry(first, alpha=1.0, flags=Flag.WRITE)], [Entry(second, alpha=1.0, flags=Flag.WRITE)]])
    h = torch.zeros(4, WIDTH)
    steer_(h, torch.tensor([0, 1, -1, 0], dtype=torch.int32), *tables)
    assert torch.equal(h, torch.stack([first, second, torch.zeros(WIDTH), first]))
