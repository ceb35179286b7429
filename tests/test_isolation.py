"""Tenants do not leak into each other, and the measurement finds them out if they do."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks import isolation, isolation_ops
from benchmarks.isolation_ops import Count


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


LEVELS = {"session": isolation.measure, "op": isolation_ops.measure}


@pytest.mark.parametrize("level", LEVELS)
def test_no_coordinate_leaks(level):
    looked_at: list[int] = []
    found = LEVELS[level](40_000, looked_at.append)
    assert found.errors == []
    assert found.leaked == 0
    assert found.rows == sum(looked_at) >= 40_000
    assert found.steered > 10_000
    assert min(found.failed, found.given_up, found.swaps) > 0


@pytest.mark.parametrize("level", LEVELS)
def test_what_is_wrong_on_purpose_is_found_out(level):
    """A row map moved by one row; a slot kept after it was given to another."""
    assert LEVELS[level](4_000, lambda count: None, wrong=True).leaked > 0


def test_a_leak_or_an_unnoticed_control_fails_the_run():
    fine = {"op": Count(rows=9), "op, wrong on purpose": Count(rows=9, leaked=3)}
    assert isolation.passed(fine)
    for name, count in fine.items():
        assert not isolation.passed({**fine, name: dataclasses.replace(count, leaked=3 - count.leaked)})
        assert not isolation.passed({**fine, name: dataclasses.replace(count, errors=["broken"])})
