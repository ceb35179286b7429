"""Requests share blocks of the prefix cache if the steering that touched them is the same, and only then."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest

from steerkern.integrations.vllm import prefix_cache
from tests.serving.asked import NEW, Ask, Engine, engine, expected, folders, mixed_plans
from tests.serving.models import LLAMA, saved

pytestmark = pytest.mark.runner
PLANS = mixed_plans()
PROMPT, REUSED = 96, 64
"""Tokens of a prompt, and those of them that a second request with it finds: whole blocks before the last token."""


@pytest.fixture(scope="module")
def served() -> Iterator[Engine]:
    with engine(saved(LLAMA), {"plans": folders(PLANS)}) as made:
        yield made


@pytest.fixture
def prompt(request: pytest.FixtureRequest) -> tuple[int, ...]:
    """One that no other test has."""
    return tuple(random.Random(request.node.name).choices(range(3, 500), k=PROMPT))


def run(served: Engine, *asks: Ask) -> list[int]:
    """Ask one after the other, compare with the session, and return how many tokens each found cached."""
    made = [served.answers([ask])[0] for ask in asks]
    assert [one.tokens for one in made] == expected(saved(LLAMA), PLANS, asks)
    return [one.cached for one in made]


EARLY_HALF = {"plan": "early", "scale": 0.5}
ONCE = {"plan": "early", "scope": "decode"}


@pytest.mark.parametrize(
    ("first", "second", "found"),
    [
        (None, None, REUSED),
        ("early", "early", REUSED),
        (["early", "everywhere"], ["early", "everywhere"], REUSED),
        ("early", None, 0),
        (None, "early", 0),
        ("early", EARLY_HALF, 0),
        ("early", "prompted", 0),
        ("early", ["early", "everywhere"], 0),
        (None, "everywhere", REUSED),
        ("everywhere", None, REUSED),
        ("everywhere", ONCE, REUSED),
        ("early", ONCE, 0),
    ],
)
def test_a_prompt_asked_twice(served: Engine, prompt: tuple[int, ...], first: Any, second: Any, found: int) -> None:
    assert run(served, Ask(prompt, first), Ask(prompt, second)) == [0, found]


@pytest.mark.parametrize(
    ("plans", "found"),
    [
        (None, 128),
        ("early", 128),  # writes every token, prompt or reply
        ("everywhere", 96),  # the reply's blocks were written when they were generated, and are not in a prompt
        ("prompted", 96),  # nor were they written as a reply, as they are now
    ],
)
def test_a_reply_in_the_next_prompt(served: Engine, prompt: tuple[int, ...], plans: Any, found: int) -> None:
    new = 50
    made = served.answers([Ask(prompt, plans, new)])[0]
    assert [made.tokens] == expected(saved(LLAMA), PLANS, [Ask(prompt, plans, new)])
    longer = (*prompt, *made.tokens, 7, 8, 9)
    assert run(served, Ask(longer, plans)) == [found]
    assert run(served, Ask(longer)) == [{None: 128, "everywhere": 128}.get(plans, 0)]


def test_without_the_key_a_plain_request_reads_steered_blocks(
    served: Engine, prompt: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: what the tests above would show if blocks had their plain names."""
    monkeypatch.setattr(prefix_cache, "extra_keys", lambda ticket, end: [])
    steered, plain = (served.answers([Ask(prompt, plans)])[0] for plans in ("early", None))
    assert plain.cached == REUSED
    assert [steered.tokens] == expected(saved(LLAMA), PLANS, [Ask(prompt, "early")])
    assert [plain.tokens] != expected(saved(LLAMA), PLANS, [Ask(prompt)])
    assert len(plain.tokens) == NEW
