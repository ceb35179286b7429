"""What requests ask for, over HTTP and offline, and what settings may say."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from steerkern.errors import PlanError
from steerkern.integrations.vllm.asked import FieldError, Ticket, Variant, Wish, ticket_of, wishes
from steerkern.integrations.vllm.settings import Settings, check_engine, settings_of
from tests.integrations.vllm.engine import config


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, None),
        ({"other": 1}, None),
        ({"steerkern": None}, []),
        ({"steerkern": "none"}, []),
        ({"steerkern": "calm"}, [Wish("calm")]),
        ({"steerkern": "calm", "steerkern_scale": 1.5, "steerkern_scope": "decode"}, [Wish("calm", 1.5, "decode")]),
        ({"steerkern": ["a", "b"]}, [Wish("a"), Wish("b")]),
        ({"steerkern": {"plan": "a", "scale": -2}}, [Wish("a", -2.0)]),
        ({"steerkern": '{"plan": "a", "scope": "prompt"}'}, [Wish("a", 1.0, "prompt")]),
        ({"steerkern": '[{"plan": "a"}, "b"]', "steerkern_scale": 2}, [Wish("a", 2.0), Wish("b", 2.0)]),
        ({"steerkern": "a", "steerkern_scale": 0}, []),
    ],
)
def test_wishes(given: dict[str, Any], expected: list[Wish] | None) -> None:
    assert wishes(given) == expected


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"steerkern": 5}, "steerkern"),
        ({"steerkern": {"plan": 5}}, "steerkern"),
        ({"steerkern": {"plan": "a", "strength": 1}}, "steerkern"),
        ({"steerkern": ["a", "a"]}, "steerkern"),
        ({"steerkern": [f"p{i}" for i in range(9)]}, "steerkern"),
        ({"steerkern": "{bad"}, "steerkern"),
        ({"steerkern": "a", "steerkern_scale": "2"}, "steerkern_scale"),
        ({"steerkern": "a", "steerkern_scale": math.nan}, "steerkern_scale"),
        ({"steerkern": "a", "steerkern_scale": math.inf}, "steerkern_scale"),
        ({"steerkern": "a", "steerkern_scale": 1e6}, "steerkern_scale"),
        ({"steerkern": "a", "steerkern_scale": 10**400}, "steerkern_scale"),
        ({"steerkern": "a", "steerkern_scale": [1]}, "steerkern_scale"),
        ({"steerkern": "a", "steerkern_scope": "sometimes"}, "steerkern_scope"),
        ({"steerkern": "a", "steerkern_scope": ["all"]}, "steerkern_scope"),
        ({"steerkern_scale": 1.0}, "steerkern_scale"),
        ({"steerkern_ticket": {"plans": []}}, "steerkern_ticket"),
    ],
)
def test_bad_fields_are_named(given: dict[str, Any], field: str) -> None:
    with pytest.raises(FieldError) as refusal:
        wishes(given)
    assert refusal.value.field == field
    assert field in str(refusal.value)


def test_a_ticket_survives_the_wire() -> None:
    ticket = Ticket((Variant("d", 1.5, None), Variant("e", -1.0, "decode")), 3, 7, 9, "r")
    assert Ticket.from_wire(ticket.to_wire()) == ticket
    assert ticket_of(SimpleNamespace(extra_args={"steerkern_ticket": ticket.to_wire()})) == ticket
    assert ticket_of(SimpleNamespace(extra_args=None)) is None
    assert ticket_of(None) is None


def test_tickets_have_one_key_where_their_plans_do_the_same() -> None:
    def key(*plans: Variant) -> str:
        return Ticket(plans, 0, 0, 5).key

    one = Variant("d", 1.0, None)
    assert key(one) == key(Variant("d", 1.0, None))
    assert len({key(one), key(one._replace(scale=2.0)), key(one._replace(scope="all")), key(one, one)}) == 4


def test_an_engine_that_says_nothing_is_not_steered() -> None:
    assert settings_of(config()) is None


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("yes", "must be an object"),
        ({"plan": {}}, "steerkern.plan is no setting"),
        ({"plans": ["a"]}, "must map names to folders"),
        ({"plans": {"none": "x"}}, "cannot name one"),
        ({"default": "a"}, "none of the plans"),
        ({"folder": 5}, "folder must be a string"),
        ({"sites": "some"}, "must be 'plans' or 'all'"),
        ({"max_plans": 0}, "max_plans must be a whole number from 1"),
        ({"plans": {"a": "x", "b": "y"}, "max_plans": 1}, "names 2 plans"),
    ],
)
def test_bad_settings(given: Any, sentence: str) -> None:
    with pytest.raises((TypeError, ValueError), match=sentence):
        settings_of(config(given))


def test_sites_follow_from_whether_plans_can_come_later() -> None:
    assert Settings(plans={"a": "x"}).sites == "plans"
    assert Settings(plans={"a": "x"}, folder="f").sites == "all"
    assert Settings().sites == "all"


@pytest.mark.parametrize(
    ("changed", "setting"),
    [
        ({"use_ubatching": True}, "ubatch_size"),
        ({"prefill_context_parallel_size": 2}, "prefill_context_parallel_size"),
        ({"enable_sp": True}, "enable_sp"),
    ],
)
def test_engines_that_move_rows_are_refused(changed: dict[str, Any], setting: str) -> None:
    check_engine(config())
    with pytest.raises(PlanError, match=setting):
        check_engine(config(**changed))
