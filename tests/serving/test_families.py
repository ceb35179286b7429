"""Requests of one batch, each steered in its own way, get the tokens that the Hugging Face session gives."""

from __future__ import annotations

import pytest

import steerkern as sk
from tests.serving.asked import Ask, engine, expected, folders, mixed_asks, mixed_plans, vector
from tests.serving.models import FAMILIES, REFUSED, Family, saved


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_a_mixed_batch_is_token_identical(family: Family) -> None:
    model, plans, asks = saved(family), mixed_plans(mid=family.mid), mixed_asks()
    wanted = expected(model, plans, asks)
    plain = expected(model, plans, [Ask(ask.prompt) for ask in asks])
    changed = sum(one != other for one, other in zip(wanted, plain, strict=True))
    assert changed >= 5, "the plans change too few of these replies to tell"
    with engine(model, {"plans": folders(plans)}) as served:
        assert served.tokens(asks) == wanted
        assert served.tokens(asks) == wanted, "now from the prefix cache"


@pytest.mark.parametrize(("family", "reason"), REFUSED, ids=lambda value: str(value).partition(" ")[0])
def test_a_family_without_the_site_is_refused_with_the_reason(family: Family, reason: str) -> None:
    plan = sk.Plan(sk.add(vector(0)), layers=1, name="early")
    with (
        pytest.raises(sk.PlanError, match=f"{reason}, plan 'early'"),
        engine(saved(family), {"plans": folders({"early": plan})}),
    ):
        pass
