"""Continuous batching: every request of a flattened batch equals its solo run, and no block of the cache is shared
between requests that were steered differently (with the control in which that goes wrong)."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", minversion="5.17")
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaForCausalLM

import steerkern as sk
from steerkern import Condition, Latch, Read, Term, Tokens
from tests.controller.stubs import Stub
from tests.runtime.models import LAYERS, VOCABULARY, WIDTH, tiny_llama

NEW = 10
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_llama(3, max_position_embeddings=256)


def vector(seed: int) -> Tensor:
    return torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))


PREFIX = torch.randint(3, VOCABULARY, (70,), generator=torch.Generator().manual_seed(9)).tolist()
PROMPTS = [
    torch.randint(3, VOCABULARY, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (5, 40, 9, 23, 64)
]


def latch(open_: bool) -> Latch:
    """Open for every prompt, or for none."""
    term = Term(Read(1, "resid_pre", -1), vector(0))
    return Latch((Condition((term,), lo=-2.0 if open_ else 2.0),))


def plans() -> list[sk.Plan]:
    add = sk.add(vector(1), 4.0)
    controller = Stub(1.0, [0.5] * LAYERS, reads=(Read(2, "resid_post"),), width=WIDTH)
    return [
        sk.Plan(add, layers=2, name="add"),
        sk.Plan(sk.ablate(vector(2)), name="ablate"),
        sk.Plan(add, layers=1, scope="decode", name="decode"),
        sk.Plan(add, layers=1, scope="prompt", name="prompt"),
        sk.Plan(add, layers=1, scope="reply", name="reply"),
        sk.Plan(add, layers=1, scope=Tokens("decode", first=3), name="first"),
        sk.Plan(add, layers=1, scope=Tokens(after=(PROMPTS[1][20],)), name="after"),
        sk.Plan(add, layers=1, scope="decode", latch=latch(True), name="open"),
        sk.Plan(add, layers=1, scope="decode", latch=latch(False), name="shut"),
        sk.Plan(add, layers="all", scope="decode", controller=controller, name="guided"),
    ]


def alone(model: LlamaForCausalLM, session: sk.Session | None, prompt: list[int], names: Any) -> list[int]:
    """The reply of ``generate`` to one prompt under its own plans."""
    if session is not None:
        session.rows([names])
    made = model.generate(torch.tensor([prompt]), **GREEDY)[0, len(prompt) :].tolist()
    if session is not None:
        session.rows(None)
    return made


def config(**changes: Any) -> ContinuousBatchingConfig:
    return ContinuousBatchingConfig(**{"page_size": 16, "max_batch_tokens": 48, "num_blocks": 64, **changes})


def together(model: Any, prompts: list[list[int]], **changes: Any) -> list[list[int]]:
    """Replies of ``generate_batch``, in the order of the prompts."""
    generation = GenerationConfig(**GREEDY)
    made = model.generate_batch(prompts, generation_config=generation, continuous_batching_config=config(**changes))
    assert [output.error for output in made.values()] == [None] * len(prompts)
    return [output.generated_tokens for output in made.values()]


@contextmanager
def manager(model: Any, **changes: Any) -> Iterator[Any]:
    made = model.init_continuous_batching(
        generation_config=GenerationConfig(**GREEDY), continuous_batching_config=config(**changes)
    )
    made.start()
    try:
        yield made
    finally:
        made.stop(block=True)
        made.destroy()


def answers(made: Any, names: list[str]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for _ in range(200):
        output = made.get_result(timeout=1)
        if output is not None and output.is_finished():
            assert output.error is None
            found[output.request_id] = output.generated_tokens
        if len(found) == len(names):
            return found
        assert made.is_running()
    raise AssertionError(f"only {list(found)} of {names} came back")


ROWS: list[Any] = [
    None, "add", "ablate", "decode", "prompt", "reply", "first", "after", "open", "shut", "guided", ("add", "ablate"),
    ["decode", "guided"],
]  # fmt: skip


def test_a_mixed_batch_equals_the_solo_runs(model: LlamaForCausalLM) -> None:
    """Prompts of up to 64 tokens in forwards of at most 48: most are fed in chunks, beside others that decode."""
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(len(ROWS))]
    with sk.steer(model, plans(), silent="ignore") as session:
        expected = [alone(model, session, prompt, row) for prompt, row in zip(prompts, ROWS, strict=True)]
        session.rows(ROWS)
        assert together(model, prompts) == expected
        session.rows(ROWS[::-1])
        turned = together(model, prompts[::-1])
        assert turned == expected[::-1]
        session.rows(None)
    plain = [alone(model, None, prompt, None) for prompt in prompts]
    assert together(model, prompts) == plain
    different = [i for i, (one, other) in enumerate(zip(expected, plain, strict=True)) if one != other]
    assert {ROWS.index("add"), ROWS.index("decode"), ROWS.index("open"), ROWS.index("guided")} <= set(different)
    assert ROWS.index("shut") not in different
    assert 0 not in different


def test_without_rows_every_request_has_every_plan(model: LlamaForCausalLM) -> None:
    with sk.steer(model, [plans()[0], plans()[1]]) as session:
        expected = [alone(model, session, prompt, ("add", "ablate")) for prompt in PROMPTS]
        assert together(model, PROMPTS) == expected
        assert session.receipt().plans["add"].tokens > 0


def test_requests_say_their_plans_and_more_of_them_than_slots_are_served(model: LlamaForCausalLM) -> None:
    names = ["add", None, "decode", ("add", "ablate"), "guided", "prompt"] * 3
    few = sk.Capacity(slots=6, rows=64, entries=256)
    with sk.steer(model, plans(), silent="ignore", capacity=few) as session:
        expected = {f"r{i}": alone(model, session, PROMPTS[i % 5], row) for i, row in enumerate(names)}
        with manager(model, max_requests_per_batch=4) as made:
            for i, row in enumerate(names):
                made.add_request(PROMPTS[i % 5], request_id=f"r{i}", plans=row)
            assert answers(made, list(expected)) == expected


def test_a_strength_that_changes_between_requests(model: LlamaForCausalLM) -> None:
    """Also with prompts whose prefix is in the cache under another strength."""
    with sk.steer(model, plans(), silent="ignore") as session, manager(model) as made:
        for i, scale in enumerate((1.0, -1.0, 0.25, 1.0)):
            session.set("add", scale=scale)
            made.add_request(PREFIX, request_id=str(i), plans="add")
            assert answers(made, [str(i)])[str(i)] == alone(model, session, PREFIX, "add"), scale


# the prefix cache


def shared(model: LlamaForCausalLM, first: Any, second: Any, salted: bool = True) -> tuple[list[int], int]:
    """The reply to PREFIX + 3 tokens under ``second`` after a request with the same prefix under ``first``, and how
    many of its tokens came from the cache."""
    with sk.steer(model, plans(), silent="ignore") as session, manager(model) as made:
        (steered,) = session._managers._managers.values()
        steered.salted = salted
        made.add_request([*PREFIX, 5, 6], request_id="first", plans=first)
        answers(made, ["first"])
        taken: list[int] = []
        search = made.batch_processor.cache.search_prefix_match
        made.batch_processor.cache.search_prefix_match = lambda *a: taken.append(search(*a)) or taken[-1]
        made.add_request([*PREFIX, 7, 8, 9], request_id="second", plans=second)
        reply = answers(made, ["second"])["second"]
        assert len(taken) == 1
        assert session.attached
    return reply, taken[0]


PAIRS = [(None, "add"), ("add", None), ("add", "ablate"), ("prompt", "decode"), ("decode", "prompt"), ("add", "after")]


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_other_steering_shares_no_block(model: LlamaForCausalLM, first: Any, second: Any) -> None:
    with sk.steer(model, plans(), silent="ignore") as session:
        expected = alone(model, session, [*PREFIX, 7, 8, 9], second)
    reply, taken = shared(model, first, second)
    assert reply == expected
    assert taken == 0


@pytest.mark.parametrize(
    ("first", "second"),
    [(None, None), ("add", "add"), (None, "decode"), ("decode", None), ("decode", "guided"), ("reply", "decode")],
)
def test_equal_steering_of_the_prompt_shares_its_blocks(model: LlamaForCausalLM, first: Any, second: Any) -> None:
    """What writes generated tokens only leaves the prompt's keys plain."""
    with sk.steer(model, plans(), silent="ignore") as session:
        expected = alone(model, session, [*PREFIX, 7, 8, 9], second)
    reply, taken = shared(model, first, second)
    assert taken == 64
    assert reply == expected


@pytest.mark.parametrize(("first", "second"), [(None, "add"), ("add", None)])
def test_without_other_names_for_blocks_the_reply_is_wrong(model: LlamaForCausalLM, first: Any, second: Any) -> None:
    """The control of the tests above."""
    with sk.steer(model, plans(), silent="ignore") as session:
        expected = alone(model, session, [*PREFIX, 7, 8, 9], second)
    reply, taken = shared(model, first, second, salted=False)
    assert taken == 64
    assert reply != expected


def test_a_reply_that_was_steered_is_no_prefix_of_a_plain_prompt(model: LlamaForCausalLM) -> None:
    """Blocks that were filled while decoding hold what the plan wrote, though the prompt's do not."""
    with sk.steer(model, plans(), silent="ignore") as session, manager(model) as made:
        made.add_request(PREFIX, request_id="a", plans="decode")
        reply = answers(made, ["a"])["a"]
        again = [*PREFIX, *reply, 5, 6, 7]
        made.add_request(again, request_id="b", plans=None)
        assert answers(made, ["b"])["b"] == alone(model, session, again, None)


# requests that end early, and neighbours


def test_cancelled_requests_change_nothing_for_their_neighbours(model: LlamaForCausalLM) -> None:
    names = ["add", None, "guided", "decode", "ablate", "open"]
    with sk.steer(model, plans(), silent="ignore") as session:
        expected = {str(i): alone(model, session, PROMPTS[i % 5], row) for i, row in enumerate(names)}
        with manager(model) as made:
            for i, row in enumerate(names):
                made.add_request(PROMPTS[(i + 1) % 5], request_id=f"gone {i}", plans=names[-1 - i], max_new_tokens=120)
                made.add_request(PROMPTS[i % 5], request_id=str(i), plans=row)
            for i in range(len(names)):
                made.cancel_request(f"gone {i}")
            assert answers(made, list(expected)) == expected
        assert session._calls.running == {}
        for plan in plans():
            session.remove(plan.name)  # nothing holds them any more


def test_several_threads_add_requests_while_strengths_of_others_change(model: LlamaForCausalLM) -> None:
    names = ["add", "decode", "guided", None]
    with sk.steer(model, plans(), silent="ignore") as session:
        expected = [alone(model, session, PROMPTS[i], row) for i, row in enumerate(names)]
        with manager(model) as made:
            errors: list[BaseException] = []

            def send(i: int) -> None:
                try:
                    for turn in range(5):
                        made.add_request(PROMPTS[i], request_id=f"{i} {turn}", plans=names[i])
                        session.set("ablate", scale=1.0 + turn)
                except BaseException as error:
                    errors.append(error)

            threads = [threading.Thread(target=send, args=(i,)) for i in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert not errors
            found = answers(made, [f"{i} {turn}" for i in range(4) for turn in range(5)])
    assert found == {f"{i} {turn}": expected[i] for i in range(4) for turn in range(5)}


def test_two_sequences_of_one_prompt_have_its_plans(model: LlamaForCausalLM) -> None:
    with sk.steer(model, plans(), silent="ignore") as session:
        expected = [alone(model, session, PROMPTS[i], row) for i, row in enumerate(("add", "guided", None))]
        session.rows(["add", "guided", None])
        generation = GenerationConfig(**{**GREEDY, "num_return_sequences": 2, "do_sample": True, "top_k": 1})
        made = model.generate_batch(PROMPTS[:3], generation_config=generation, continuous_batching_config=config())
        found = [output.generated_tokens for output in made.values()]
    assert found == [expected[i // 2] for i in range(6)]


# bad input


def test_bad_requests_are_refused_before_anything_runs(model: LlamaForCausalLM) -> None:
    gated = sk.Plan(sk.add(vector(1), 4.0), layers=1, scope="all", latch=latch(True), name="gated")
    with sk.steer(model, [*plans(), gated], silent="ignore") as session, manager(model) as made:
        with pytest.raises(sk.PlanError, match="no plan 'nothing' in this session"):
            made.add_request(PROMPTS[0], plans="nothing")
        with pytest.raises(sk.PlanError, match=r"plan 'gated' decides from the prompt.*request 'x' .* scope 'decode'"):
            made.add_request(PROMPTS[0], request_id="x", plans="gated")
        session.rows([None, "add"])
        with pytest.raises(sk.PlanError, match="rows name 2 sequences, the batch has 3 prompts"):
            made.add_requests(PROMPTS[:3])
        with pytest.raises(sk.PlanError, match=r"say plans=\.\.\. for this request"):
            made.add_request(PROMPTS[0])
        session.rows(None)
        made.add_request(PROMPTS[0], request_id="fine", plans="add", max_new_tokens=100)
        with pytest.raises(sk.PlanError, match="plan 'add' steers request 'fine', which is still running"):
            session.remove("add")
        assert len(answers(made, ["fine"])["fine"]) == 100


def test_a_manager_from_before_the_session_is_refused(model: LlamaForCausalLM) -> None:
    with manager(model) as made:
        made.add_request(PROMPTS[0], request_id="before")
        answers(made, ["before"])
        with sk.steer(model, plans(), silent="ignore"):
            made.add_request(PROMPTS[0], request_id="late")
            output = made.get_result("late", timeout=20)
            assert output is not None
            assert "made before the session" in output.error


def test_a_detached_session_leaves_the_manager_as_it_was(model: LlamaForCausalLM) -> None:
    plain = alone(model, None, PROMPTS[1], None)
    with manager(model) as made:
        session = sk.steer(model, plans(), silent="ignore")
        session.detach()
        made.add_request(PROMPTS[1], request_id="a")
        assert answers(made, ["a"])["a"] == plain
        assert "add_request" not in made.__dict__


def test_cuda_graphs_are_refused(model: LlamaForCausalLM) -> None:
    with (
        sk.steer(model, plans(), silent="ignore") as session,
        pytest.raises(sk.PlanError, match="pass use_cuda_graph=False"),
    ):
        made = model.init_continuous_batching(
            generation_config=GenerationConfig(**GREEDY), continuous_batching_config=config()
        )
        made.continuous_batching_config = type("Config", (), {"cuda_graph_booleans": (True, True)})()
        session._managers._managers.clear()
        session._managers.after(made)


def test_requests_of_a_server_leave_no_trace_that_grows(model: LlamaForCausalLM) -> None:
    with sk.steer(model, plans(), silent="ignore") as session, manager(model) as made:
        for i in range(3):
            made.add_request(PROMPTS[i], request_id=str(i), plans="add")
        answers(made, ["0", "1", "2"])
        receipt = session.receipt().plans["add"]
        assert receipt.tokens == sum(map(len, PROMPTS[:3])) + 3 * (NEW - 1)
        assert session._rows.written["add"].spans == {}
