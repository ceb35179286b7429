"""Requests of one batch, each steered in its own way, get the tokens that the Hugging Face session gives."""

from __future__ import annotations

import pytest

from tests.serving.asked import engine, expected, folders, mixed_asks, mixed_plans
from tests.serving.models import FAMILIES, Family, saved


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_a_mixed_batch_is_token_identical(family: Family) -> None:
    model, plans, asks = saved(family), mixed_plans(), mixed_asks()
    wanted = expected(model, plans, asks)
    unsteered = expected(model, plans, [type(ask)(ask.prompt) for ask in asks])
    changed = sum(one != other for one, other in zip(wanted, unsteered, strict=True))
    assert changed >= 5, "the plans change too few of these replies to tell"
    with engine(model, {"plans": folders(plans)}) as served:
        assert served.tokens(asks) == wanted
        assert served.tokens(asks) == wanted, "now from the prefix cache"
