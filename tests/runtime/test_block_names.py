"""What keeps the blocks of a manager's prefix cache apart: strengths that came back, prompts that hold a former reply,
decisions that read the whole prompt, sessions that end in flight."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5.17")
from transformers import LlamaForCausalLM

import steerkern as sk
from steerkern import Condition, Latch, Read, Term, Tokens
from steerkern.runtime.batch import Batch
from steerkern.runtime.block_names import BlockNames
from steerkern.runtime.prompts import Prompts
from tests.runtime.models import tiny_llama
from tests.runtime.test_continuous_batching import GREEDY, PREFIX, PROMPTS, alone, answers, manager, vector


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_llama(3, max_position_embeddings=256)


def solo(model: Any, session: sk.Session | None, prompt: list[int], names: Any) -> list[int]:
    """The reply of ``generate``, also to a prompt that holds the pad token."""
    if session is not None:
        session.rows([names])
    made = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), **GREEDY)
    if session is not None:
        session.rows(None)
    return list(made[0, len(prompt) :].tolist())


ADD = sk.add(vector(1), 6.0)
PLANS = [
    sk.Plan(ADD, layers=1, name="all"),
    sk.Plan(ADD, layers=1, scope="prompt", name="prompt"),
    sk.Plan(sk.add(vector(4), 6.0), layers=1, scope="decode", name="decode"),
    sk.Plan(ADD, layers=1, scope=(-1, -2), name="last"),
    sk.Plan(ADD, layers=1, scope=(2, -1), name="both ends"),
    sk.Plan(ADD, layers=1, scope=Tokens(stop=-3), name="but three"),
]
TURNS: list[tuple[str, ...]] = [("prompt",), ("all", "decode"), ("last",), ("both ends",), ("but three",), ("all",)]


@pytest.mark.parametrize("names", TURNS, ids="+".join)
def test_a_second_turn_whose_prompt_holds_the_first_reply(model: LlamaForCausalLM, names: tuple[str, ...]) -> None:
    """Tokens that were generated then are prompt now: what the same plan writes of them is another."""
    with sk.steer(model, PLANS, silent="ignore") as session, manager(model) as made:
        made.add_request(PREFIX, request_id="a", plans=names, max_new_tokens=40)
        again = [*PREFIX, *answers(made, ["a"])["a"], 5, 6, 7]
        expected = solo(model, session, again, names)
        made.add_request(again, request_id="b", plans=names)
        assert answers(made, ["b"])["b"] == expected


@pytest.mark.parametrize(("names", "taken"), [(("all",), 112), (("all", "decode"), 64), (("prompt",), 64), ((), 112)])
def test_how_much_of_the_first_turn_is_shared(model: LlamaForCausalLM, names: tuple[str, ...], taken: int) -> None:
    with sk.steer(model, PLANS, silent="ignore"), manager(model) as made:
        made.add_request(PREFIX, request_id="a", plans=names, max_new_tokens=44)
        again = [*PREFIX, *answers(made, ["a"])["a"], 5, 6, 7]
        found: list[int] = []
        search = made.batch_processor.cache.search_prefix_match
        made.batch_processor.cache.search_prefix_match = lambda *a: found.append(search(*a)) or found[-1]
        made.add_request(again, request_id="b", plans=names)
        answers(made, ["b"])
    assert found == [taken]


@pytest.mark.parametrize("changed", [True, False])
def test_a_strength_that_was_another_within_a_block(model: LlamaForCausalLM, changed: bool) -> None:
    """The block of tokens 80 to 95 was written at two strengths, the first of which holds again when it is full."""
    with sk.steer(model, PLANS, silent="ignore") as session, manager(model) as made:
        (steered,) = session._managers._managers.values()
        part = steered._part

        def turn(state: Any, tokens: int) -> Any:
            if changed:
                session.set("decode", scale=-30.0 if 14 <= len(state.generated_tokens) < 18 else 1.0)
            return part(state, tokens)

        steered._part = turn  # type: ignore[method-assign]
        made.add_request(PREFIX, request_id="a", plans="decode", max_new_tokens=60)
        tokens = [*PREFIX, *answers(made, ["a"])["a"]]
        batch = Batch(session._program, Prompts.of(1, len(PREFIX), None), [("decode",)])
        known = BlockNames(session._program, batch).rename(tokens, 16)
        (allocator,) = made.batch_processor.cache.cache_allocators.values()
        found = len(type(allocator).match_prefix_blocks(allocator, known))
    assert found == (5 if changed else 8)


def test_a_mean_over_the_prompt_is_read_from_all_of_it(model: LlamaForCausalLM) -> None:
    """Though a plain request left the first 64 tokens in the cache."""
    condition = Condition((Term(Read(1, "resid_pre", "mean"), vector(0), measure="coordinate"),), lo=0.0)
    latched = sk.Plan(ADD, layers=1, scope="decode", name="latched", latch=Latch((condition,)))
    prompt, seen = [*PREFIX, 7, 8, 9], []
    with sk.steer(model, latched, silent="ignore") as session, manager(model) as made:
        decide = session._deciding.decide
        session._deciding.decide = lambda batch, reading: (  # type: ignore[method-assign]
            seen.extend(reading.counts.values()),
            decide(batch, reading),
        )[1]
        expected = alone(model, session, prompt, "latched")
        made.add_request([*PREFIX, 5, 6], request_id="a", plans=None)
        answers(made, ["a"])
        made.add_request(prompt, request_id="b", plans="latched")
        assert answers(made, ["b"])["b"] == expected
    assert [count.item() for count in seen] == [len(prompt)] * 2


def test_a_session_that_ends_in_flight_leaves_no_steered_block(model: LlamaForCausalLM) -> None:
    session = sk.steer(model, PLANS, silent="ignore")
    with manager(model) as made:
        made.add_request([3], request_id="start", plans=None)
        answers(made, ["start"])
        update, forwards = made.batch_processor.update_batch, []

        def end() -> None:
            update()
            forwards.append(None)
            if len(forwards) == 4:
                session.detach()

        made.batch_processor.update_batch = end
        made.add_request(PROMPTS[0], request_id="a", plans="all", max_new_tokens=60)
        again = [*PROMPTS[0], *answers(made, ["a"])["a"]]
        assert not session.attached
        expected = solo(model, None, again, None)
        made.add_request(again, request_id="b")
        assert answers(made, ["b"])["b"] == expected
