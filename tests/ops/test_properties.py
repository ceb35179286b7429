"""Properties that hold for every program, found or refuted by hypothesis."""

from __future__ import annotations

import math

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from programs import KINDS, Entry, orthonormal, pack, program, units
from runners import Runner
from torch import Tensor

from steerkern.ops.schemas import DTYPES, Flag, Norm

# the backend fixture holds nothing that an example could change
steady = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
widths = st.integers(2, 300)
seeds = st.integers(0, 2**16)


def rows(n: int, width: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (2 * torch.randn(n, width, generator=torch.Generator().manual_seed(seed))).to(dtype)


def zeros(n: int) -> Tensor:
    return torch.zeros(n, dtype=torch.int32)


@steady
@given(width=widths, seed=seeds, count=st.integers(1, 6))
def test_ablation_is_idempotent(backend: Runner, width: int, seed: int, count: int) -> None:
    tables = pack([[Entry(v, beta=1.0) for v in orthonormal(min(count, width), width, seed)]])
    once = backend.run(rows(3, width, seed), zeros(3), tables).h
    twice = backend.run(once, zeros(3), tables).h
    # what is left of a coordinate is its rounding: some ulp of |h|, which is below 2 * sqrt(300) * 4
    assert float((twice - once).abs().max()) < 1e-5 * (1 + width**0.5)


@steady
@given(width=widths, seed=seeds, angle=st.floats(-7, 7))
def test_rotation_keeps_the_norm_and_sets_the_angle(backend: Runner, width: int, seed: int, angle: float) -> None:
    first, second = orthonormal(2, width, seed)
    pair = Flag.READ | Flag.WRITE | Flag.PAIR
    turn = [
        Entry(first, alpha=math.cos(angle), mate=1, flags=pair),
        Entry(second, alpha=math.sin(angle), mate=0, flags=pair),
    ]
    h = rows(4, width, seed)
    got = backend.run(h, zeros(4), pack([turn])).h
    torch.testing.assert_close(got.norm(dim=-1), h.norm(dim=-1), rtol=1e-5, atol=1e-6)
    plane = torch.stack([h @ first, h @ second]).norm(dim=0)
    torch.testing.assert_close(got @ first, plane * math.cos(angle), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got @ second, plane * math.sin(angle), rtol=1e-4, atol=1e-4)


@steady
@given(width=widths, seed=seeds, low=st.floats(-3, 0), high=st.floats(0, 3), dtype=st.sampled_from(DTYPES))
def test_cap_moves_only_rows_outside_the_interval(
    backend: Runner, width: int, seed: int, low: float, high: float, dtype: torch.dtype
) -> None:
    v = units(1, width, seed)[0]
    h = rows(16, width, seed, dtype)
    got = backend.run(h, zeros(16), pack([[Entry(v, lo=low, hi=high)]])).h
    a = h.double() @ v.double()
    margin = 1e-5 * (1 + a.abs())  # where float32 and float64 may disagree on which side a row is
    inside = (a > low + margin) & (a < high - margin)
    assert torch.equal(got[inside], h[inside])
    outside = (a < low - 1e-2) | (a > high + 1e-2)
    if dtype == torch.float32:
        assert bool((got[outside] != h[outside]).any(-1).all())
        after = got.double() @ v.double()
        assert bool(((after > low - 1e-3) & (after < high + 1e-3)).all())


@steady
@given(kind=st.sampled_from(sorted(KINDS)), seed=seeds, n=st.integers(1, 40), dtype=st.sampled_from(DTYPES))
def test_permuting_the_rows_permutes_the_result(
    backend: Runner, kind: str, seed: int, n: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    h, tables = rows(n, 96, seed, dtype), program(kind, 96)
    slot = torch.randint(-1, 5, (n,), generator=generator, dtype=torch.int32)
    order = torch.randperm(n, generator=generator)
    plain = backend.run(h, slot, tables, norm=Norm.LLAMA)
    mixed = backend.run(h[order], slot[order], tables, norm=Norm.LLAMA)
    assert torch.equal(mixed.h, plain.h[order])
    assert torch.equal(mixed.y, plain.y[order])


@steady
@given(width=widths, seed=seeds, size=st.floats(-50, 50), dtype=st.sampled_from(DTYPES))
def test_keep_norm_keeps_the_norm(backend: Runner, width: int, seed: int, size: float, dtype: torch.dtype) -> None:
    tables = pack([[Entry(units(1, width, seed)[0], alpha=size, flags=Flag.WRITE)]], modes=[1])
    h = rows(4, width, seed, dtype)
    got = backend.run(h, zeros(4), tables).h
    # each element is rounded once, by half an eps; the two norms and their ratio are float32 sums
    rtol = torch.finfo(dtype).eps + 1e-6
    torch.testing.assert_close(got.double().norm(dim=-1), h.double().norm(dim=-1), rtol=rtol, atol=1e-6)


@steady
@given(kind=st.sampled_from(sorted(KINDS)), seed=seeds)
def test_gain_zero_is_no_edit(backend: Runner, kind: str, seed: int) -> None:
    tables = program(kind, 40)
    tables.links[3] |= Flag.GAINED
    tables.gain.zero_()
    h = rows(8, 40, seed)
    slot = torch.arange(8, dtype=torch.int32) % 5
    assert torch.equal(backend.run(h, slot, tables).h, h)
