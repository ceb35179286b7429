"""Tenants do not leak into each other, and the measurement finds them out if they do."""

from __future__ import annotations

import pytest
import torch

from benchmarks import isolation


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_no_coordinate_leaks():
    found = isolation.measure(40_000)
    assert found.errors == []
    assert found.leaked == 0
    assert found.rows >= 40_000
    assert found.steered > 10_000
    assert min(found.failed, found.given_up, found.swaps) > 0


def test_a_wrong_row_map_is_found_out():
    assert isolation.measure(4_000, wrong=True).leaked > 0
