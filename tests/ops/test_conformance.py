"""Every backend against float64: each kind of edit, dtype, shape, layout and norm."""

from __future__ import annotations

import functools

import oracle
import pytest
import torch
from programs import KINDS, Entry, orthonormal, pack, program, units
from runners import BACKENDS, NATIVE, Runner
from torch import Tensor

from steerkern.ops import reference
from steerkern.ops.schemas import DTYPES, Flag, Norm, Tables

WIDTHS = (1, 7, 64, 129, 896)
HALVES = (torch.bfloat16, torch.float16)


def rows(n: int, width: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + n * 7919 + width)
    return (3 * torch.randn(n, width, generator=generator)).to(dtype)


def slots(n: int, count: int, seed: int = 0) -> Tensor:
    """Random slots, -1 among them, in runs and alone."""
    generator = torch.Generator().manual_seed(seed + n)
    return torch.randint(-1, count, (n,), generator=generator, dtype=torch.int32)


@functools.lru_cache(maxsize=1024)
def case(
    kind: str, n: int, width: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tables, oracle.Exact, Tensor, Tensor]:
    """Inputs, the exact answer, and what torch makes of them, shared by all backends."""
    tables = program(kind, width)
    h, slot = rows(n, width, dtype), slots(n, tables.span.shape[0])
    trace = torch.full((n, 4), torch.nan)
    own, _ = reference.steer(h, slot, tables, trace=trace)
    return h, slot, tables, oracle.edit(h, slot, tables), own, trace


@pytest.mark.parametrize("odd", [False, True], ids=["packed", "odd"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_edit(backend: Runner, kind: str, width: int, dtype: torch.dtype, odd: bool) -> None:
    h, slot, tables, exact, own, own_trace = case(kind, 23, width, dtype)
    got = backend.run(h, slot, tables, trace=4, odd=odd)
    oracle.assert_close(got.h, own, exact.h, dtype, h)
    assert got.trace is not None
    assert_trace(got.trace, own_trace, exact, h)
    assert torch.equal(bits(got.h[slot < 0]), bits(h[slot < 0]))


def assert_trace(got: Tensor, own: Tensor, exact: oracle.Exact, h: Tensor) -> None:
    wanted = torch.full(got.shape, torch.nan, dtype=torch.float64)
    for row, coordinates in zip(wanted, exact.coordinates, strict=True):
        row[: len(coordinates)] = torch.tensor(coordinates[: len(row)], dtype=torch.float64)
    assert torch.equal(got.isnan(), wanted.isnan())
    oracle.assert_close(got.nan_to_num(), own.nan_to_num(), wanted.nan_to_num(), torch.float32, h)


@pytest.mark.parametrize("n", [0, 1, 3, 257])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_number_of_rows(backend: Runner, n: int, dtype: torch.dtype) -> None:
    h, slot, tables, exact, own, _ = case("mixed", n, 129, dtype)
    got = backend.run(h, slot, tables, torch.ones(129, dtype=dtype), norm=Norm.LLAMA, odd=True)
    oracle.assert_close(got.h, own, exact.h, dtype, h)
    assert got.y is not None
    assert got.y.shape == h.shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_width(backend: Runner, dtype: torch.dtype) -> None:
    """All ends that a row can have behind its last whole vector, block of 32 and block of 64 elements."""
    for width in range(1, 135):
        h, slot, tables, exact, own, _ = case("rotate", 2, width, dtype)
        weight, bias = rows(2, width, dtype, seed=1)
        for norm, shift in ((Norm.LLAMA, None), (Norm.LAYER, bias)):
            got = backend.run(h, slot, tables, weight, shift, norm=norm, odd=True)
            oracle.assert_close(got.h, own, exact.h, dtype, h)
            assert_normalised(got.y, got.h, weight, shift, norm)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [4096, 16384])
def test_wide_rows(backend: Runner, width: int, dtype: torch.dtype) -> None:
    h, slot, tables, exact, own, _ = case("mixed", 6, width, dtype)
    got = backend.run(h, slot, tables, torch.ones(width, dtype=dtype), norm=Norm.FP32)
    oracle.assert_close(got.h, own, exact.h, dtype, h)
    assert_normalised(got.y, got.h, torch.ones(width, dtype=dtype), None, Norm.FP32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_most_entries_of_a_slot(backend: Runner, dtype: torch.dtype) -> None:
    tables = pack([[Entry(v, beta=0.05, hi=2.0) for v in units(64, 200, 3)]])
    h, slot = rows(5, 200, dtype), torch.zeros(5, dtype=torch.int32)
    got = backend.run(h, slot, tables)
    oracle.assert_close(got.h, reference.steer(h, slot, tables)[0], oracle.edit(h, slot, tables).h, dtype, h)


def assert_normalised(y: Tensor | None, h: Tensor, weight: Tensor | None, bias: Tensor | None, norm: int) -> None:
    """``y`` against float64 of the very rows that were stored, so that their rounding does not count twice."""
    assert y is not None
    assert y.dtype == h.dtype
    exact = oracle.normalise(h, weight, bias, 1e-6, norm)
    # LayerNorm ends in seven float32 roundings (divide, root, inverse, subtract, scale, weight, bias) of half an ulp
    # each, of which torch contracts some to FMAs
    ulps = 4 if norm == Norm.LAYER and h.dtype == torch.float32 else 1
    oracle.assert_close(y, reference.normalise(h, weight, bias, 1e-6, norm), exact, h.dtype, ulps=ulps)


@pytest.mark.parametrize("odd", [False, True], ids=["packed", "odd"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(
    ("norm", "parameters"),
    [(norm, p) for norm in Norm if norm != Norm.NONE for p in ("", "weight")]
    + [(Norm.LAYER, "bias"), (Norm.LAYER, "weight, bias")],
)
def test_norm(backend: Runner, norm: Norm, parameters: str, width: int, dtype: torch.dtype, odd: bool) -> None:
    weight = rows(1, width, dtype, seed=1)[0] if "weight" in parameters else None
    bias = rows(1, width, dtype, seed=2)[0] if "bias" in parameters else None
    h, slot, tables, exact, own, _ = case("mixed", 23, width, dtype)
    got = backend.run(h, slot, tables, weight, bias, norm=norm, odd=odd)
    oracle.assert_close(got.h, own, exact.h, dtype, h)
    assert_normalised(got.y, got.h, weight, bias, norm)
    unsteered = backend.run(h, None, tables, weight, bias, norm=norm, odd=odd)
    assert torch.equal(unsteered.h, h)
    assert_normalised(unsteered.y, h, weight, bias, norm)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_delta_is_added_first_and_rounded_once(backend: Runner, width: int, dtype: torch.dtype) -> None:
    h, slot, tables, *_ = case("mixed", 23, width, dtype)
    delta = rows(23, width, dtype, seed=9)
    total = h + delta
    got = backend.run(h, slot, tables, torch.ones(width, dtype=dtype), norm=Norm.LLAMA, delta=delta, odd=True)
    assert torch.equal(got.h[slot < 0], total[slot < 0])
    own, _ = reference.steer(total, slot, tables)
    oracle.assert_close(got.h, own, oracle.edit(total, slot, tables).h, dtype, total)
    apart = backend.run(total, slot, tables, torch.ones(width, dtype=dtype), norm=Norm.LLAMA)
    assert torch.equal(got.h, apart.h)
    assert torch.equal(got.y, apart.y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_delta_before_any_number_of_directions(backend: Runner, count: int, dtype: torch.dtype) -> None:
    width = 897
    tables = pack([[Entry(v, beta=1.0) for v in orthonormal(count, width, 5)]])
    h, delta, slot = rows(3, width, dtype), rows(3, width, dtype, seed=9), torch.zeros(3, dtype=torch.int32)
    weight = rows(1, width, dtype, seed=1)[0]
    got = backend.run(h, slot, tables, weight, norm=Norm.LLAMA, delta=delta, trace=count)
    apart = backend.run(h + delta, slot, tables, weight, norm=Norm.LLAMA, trace=count)
    assert all(torch.equal(one, other) for one, other in zip(got, apart, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", [Norm.LLAMA, Norm.FP32, Norm.GEMMA, Norm.LAYER])
@pytest.mark.parametrize("backend", [r for r in NATIVE if r.isa], indirect=True, ids=str)
def test_output_depends_on_the_edited_row_alone(backend: Runner, norm: Norm, dtype: torch.dtype) -> None:
    """Not on how the row came about: summed, lifted, kept in norm, or given as it is."""
    width = 897
    h, slot, tables, *_ = case("mixed", 23, width, dtype)
    weight, delta = rows(1, width, dtype, seed=1)[0], rows(23, width, dtype, seed=9)
    got = backend.run(h, slot, tables, weight, norm=norm, delta=delta)
    assert torch.equal(got.y, backend.run(got.h, None, tables, weight, norm=norm).y)


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32 if x.dtype == torch.float32 else torch.int16)


@pytest.mark.parametrize("width", WIDTHS)
def test_additions_have_the_bits_of_torch(backend: Runner, width: int) -> None:
    """Elementwise float32 work is the same work in any order of rows: no tolerance."""
    first, second = units(2, width, 4)
    both = [Entry(first, alpha=1.7, flags=Flag.WRITE), Entry(second, alpha=-0.3, scale=3.0, flags=Flag.WRITE)]
    h, slot = rows(9, width, torch.float32), torch.tensor([0, 1, -1] * 3, dtype=torch.int32)
    got = backend.run(h, slot, pack([both[:1], both]))
    c = torch.tensor(-0.3) * torch.tensor(3.0)
    assert torch.equal(got.h[0::3], h[0::3] + torch.tensor(1.7) * first)
    assert torch.equal(got.h[1::3], h[1::3] + (torch.tensor(1.7) * first + c * second))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_untouched_rows_keep_every_bit(backend: Runner, dtype: torch.dtype) -> None:
    """Not steered, no entries, a shut gate, a cap that is not reached: NaN payloads and -0.0 survive."""
    v = units(1, 256, 0)[0]
    shut = [Entry(torch.zeros(256), flags=Flag.READ), Entry(v, alpha=9.0, gate=0, gate_lo=1.0, flags=Flag.WRITE)]
    tables = pack([[Entry(v, hi=torch.inf)], [], shut], modes=[1, 1, 1])
    generator = torch.Generator().manual_seed(0)
    anything = torch.randint(-(2**15), 2**15, (4, 512), dtype=torch.int16, generator=generator).view(dtype)[:, :256]
    anything = anything.clone(memory_format=torch.contiguous_format)
    anything[0] = rows(1, 256, dtype)[0]  # the one row that a cap may read
    slot = torch.tensor([0, 1, 2, -1], dtype=torch.int32)
    assert torch.equal(bits(backend.run(anything, slot, tables, odd=True).h), bits(anything))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_rounding_to_half_types(backend: Runner, dtype: torch.dtype) -> None:
    """A row of zeros plus a bank row rounds that bank row: halfway cases, subnormals, overflow, NaN of any payload."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(-(2**31), 2**31 - 1, (20000,), generator=generator).to(torch.int32)
    halves = torch.arange(0, 1 << 16, 5, dtype=torch.int32) << 16
    near = torch.cat([(halves | low) for low in (0, 0x7FFF, 0x8000, 0x8001, 0xFFFF)])
    half = torch.arange(-(2**15), 2**15, 3, dtype=torch.int16).view(torch.float16).float().view(torch.int32)
    near_half = torch.cat([half + step for step in (-0x1001, -0x1000, -0xFFF, 0, 0xFFF, 0x1000, 0x1001)])
    special = [0x7FFFFFFF, -1, 0x7F800001, 0x7F800000, -(2**31), 1, 0x33000000, 0x33000001]
    bank = torch.cat([patterns, near, near_half, torch.tensor(special, dtype=torch.int32)]).view(torch.float32)
    zeros, slot = torch.zeros(1, bank.numel(), dtype=dtype), torch.zeros(1, dtype=torch.int32)
    got = backend.run(zeros, slot, pack([[Entry(bank, alpha=1.0, flags=Flag.WRITE)]])).h[0]
    wanted = bank.to(dtype)
    assert torch.equal(got.isnan(), wanted.isnan())
    assert torch.equal(got.nan_to_num(nan=0.0), wanted.nan_to_num(nan=0.0))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_half_value_is_read_exactly(backend: Runner, dtype: torch.dtype) -> None:
    h = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)[None]
    nothing = Entry(torch.zeros(h.numel()), alpha=1.0, flags=Flag.WRITE)
    got = backend.run(h, torch.zeros(1, dtype=torch.int32), pack([[nothing]])).h
    assert torch.equal(got.isnan(), h.isnan())
    assert torch.equal(got[~h.isnan()], h[~h.isnan()])


@pytest.mark.parametrize("size", [1e2, 1e3, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ablating_a_massive_activation(backend: Runner, dtype: torch.dtype, size: float) -> None:
    """The norm shrinks by ``size``: |h'|^2 must come from h', not from |h|^2 minus what was taken away."""
    v = units(1, 2048, 1)[0]
    h = (size * v + torch.randn(4, 2048, generator=torch.Generator().manual_seed(2)) / 45).to(dtype)
    slot, tables = torch.zeros(4, dtype=torch.int32), pack([[Entry(v, beta=1.0)]])
    weight = torch.ones(2048, dtype=dtype)
    got = backend.run(h, slot, tables, weight, norm=Norm.FP32)
    oracle.assert_close(got.h, reference.steer(h, slot, tables)[0], oracle.edit(h, slot, tables).h, dtype, h)
    assert_normalised(got.y, got.h, weight, None, Norm.FP32)


def test_zero_rows_do_not_divide_by_zero(backend: Runner) -> None:
    v = units(2, 64, 0)
    pair = Flag.READ | Flag.WRITE | Flag.PAIR
    turn = [Entry(v[0], alpha=0.6, mate=1, flags=pair), Entry(v[1], alpha=0.8, mate=0, flags=pair)]
    cosine = [Entry(v[0], alpha=1.0, gate=1, gate_lo=0.0, flags=Flag.WRITE | Flag.COSINE), Entry(v[1], flags=Flag.READ)]
    tables = pack([turn, cosine, [Entry(v[0], alpha=1.0, flags=Flag.WRITE)]], modes=[0, 0, 1])
    got = backend.run(torch.zeros(3, 64), torch.arange(3, dtype=torch.int32), tables, norm=Norm.LLAMA)
    assert torch.equal(got.h[0], torch.zeros(64))
    assert torch.equal(got.h[1], v[0])  # the cosine of a zero row is 0
    assert torch.equal(got.h[2], torch.zeros(64))  # and its norm is kept
    assert got.y is not None
    assert bool(got.y.isfinite().all())


# What must not matter: the other rows, their number, the threads, the instruction set.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", NATIVE, indirect=True, ids=str)  # torch orders its sums by shape
def test_bits_do_not_depend_on_the_batch(backend: Runner, dtype: torch.dtype) -> None:
    n, width = 40, 896
    h, slot, tables, *_ = case("mixed", n, width, dtype)
    weight = rows(1, width, dtype, seed=1)[0]
    together = backend.run(h, slot, tables, weight, norm=Norm.LLAMA)
    assert together.y is not None
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1))
    shuffled = backend.run(h[order], slot[order], tables, weight, norm=Norm.LLAMA)
    assert torch.equal(shuffled.h, together.h[order])
    assert torch.equal(shuffled.y, together.y[order])
    for i in range(0, n, 7):
        alone = backend.run(h[i : i + 1], slot[i : i + 1], tables, weight, norm=Norm.LLAMA, odd=True)
        assert torch.equal(alone.h[0], together.h[i])
        assert torch.equal(alone.y[0], together.y[i])


def test_the_batch_test_can_fail() -> None:
    """The control: a projection whose split of the sum follows N, as a batched matmul's may, has other bits."""

    def project(h: Tensor, v: Tensor) -> Tensor:
        blocks = 1 + len(h) % 4
        parts = zip(h.chunk(blocks, -1), v.chunk(blocks), strict=True)
        return torch.stack([(part * w).sum(-1) for part, w in parts]).sum(0)

    h, v = rows(39, 896, torch.float32), units(1, 896, 0)[0]
    together = project(h, v)
    assert any(not torch.equal(project(h[i : i + 1], v)[0], together[i]) for i in range(39))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", NATIVE, indirect=True, ids=str)
def test_bits_do_not_depend_on_threads(backend: Runner, dtype: torch.dtype) -> None:
    h, slot, tables, *_ = case("mixed", 257, 896, dtype)  # enough elements for seven threads
    weight = rows(1, 896, dtype, seed=1)[0]
    one, *more = (backend.run(h, slot, tables, weight, norm=Norm.LLAMA, trace=3, threads=t) for t in (1, 2, 3))
    for other in more:
        assert torch.equal(other.h, one.h)
        assert torch.equal(other.y, one.y)
        assert torch.equal(other.trace.nan_to_num(), one.trace.nan_to_num())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_the_instruction_set(dtype: torch.dtype, kind: str) -> None:
    usable = [runner for runner in BACKENDS if runner.isa and not runner.unusable()]
    if len(usable) < 2:
        pytest.skip("fewer than two instruction sets to compare")
    for width in (*WIDTHS, 2048):
        h, slot, tables, *_ = case(kind, 23, width, dtype)
        weight, delta = rows(1, width, dtype, seed=1)[0], rows(23, width, dtype, seed=9)
        for norm in Norm:
            results = []
            for runner in usable:
                with runner.in_use():
                    results.append(runner.run(h, slot, tables, weight, norm=norm, delta=delta, trace=3))
            for other in results[1:]:
                assert torch.equal(other.h, results[0].h)
                assert torch.equal(other.trace.nan_to_num(), results[0].trace.nan_to_num())
                assert other.y is results[0].y is None or torch.equal(other.y, results[0].y)
