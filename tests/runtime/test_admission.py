"""Requests of a manager that cannot run are refused before they are queued, and ended ones are forgotten; neither is
noticed by their neighbours."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", minversion="5.17")
from transformers import GenerationConfig, LlamaForCausalLM

import steerkern as sk
from steerkern import Condition, Latch, Read, Term
from steerkern.runtime.manager_parts import check_processor
from tests.controller.stubs import Stub
from tests.runtime.models import LAYERS, VOCABULARY, WIDTH, tiny_llama
from tests.runtime.test_continuous_batching import (
    GREEDY,
    PROMPTS,
    alone,
    answers,
    config,
    latch,
    manager,
    plans,
    together,
    vector,
)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_llama(3, max_position_embeddings=256)


class EachToken(Stub):
    every_token = True


def strength(states: Tensor) -> Tensor:
    return torch.tanh(states[:, 0, :8].sum(-1))


def asked(scope: Any, name: str = "asked") -> sk.Plan:
    """A plan whose controller is asked at every token."""
    controller = EachToken(strength, [1.0] * LAYERS, reads=(Read(1),), width=WIDTH)
    return sk.Plan(sk.add(vector(1), 6.0), layers=(2, 3), scope=scope, name=name, controller=controller)


@pytest.mark.parametrize("scope", ["decode", "reply"])
def test_a_controller_asked_at_every_token(model: LlamaForCausalLM, scope: str) -> None:
    with sk.steer(model, asked(scope)) as session:
        expected = [alone(model, session, prompt, "asked") for prompt in PROMPTS]
        assert together(model, PROMPTS, max_batch_tokens=16) == expected


def mean_latch(read: Read) -> Latch:
    return Latch((Condition((Term(read, vector(0)),), lo=-2.0),))


REFUSED: dict[str, tuple[list[sk.Plan], str]] = {
    "chunks": ([asked("all")], "asks its controller at every token .* 'x' reads its prompt in chunks; give it"),
    "position": (
        [sk.Plan(sk.add(vector(1), 4.0), layers=1, scope=(20,), name="bad")],
        r"position 20: the prompt of row 0 has 5 tokens, plan 'bad', request 'x'",
    ),
    "read": (
        [sk.Plan(sk.add(vector(1), 1.0), layers=1, scope="decode", latch=mean_latch(Read(1, token=-20)), name="bad")],
        r"position -20: the prompt of row 0 has 5 tokens, plan 'bad', request 'x'",
    ),
    "meeting": (
        [
            sk.Plan(sk.add(vector(1), 4.0), layers=1, name="bad"),
            sk.Plan(sk.add(vector(2), 4.0), layers=1, keep_norm=True, scope="decode", name="worse"),
        ],
        "plans 'bad.worse' meet on one row, and only some of them keep its norm",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_request_that_would_fail_harms_no_neighbour(model: LlamaForCausalLM, case: str) -> None:
    bad, message = REFUSED[case]
    with sk.steer(model, [*plans(), *bad], silent="ignore") as session, manager(model) as made:
        expected = alone(model, session, PROMPTS[1], "add")
        made.add_request(PROMPTS[1], request_id="fine", plans="add")
        with pytest.raises(sk.PlanError, match=message):
            made.add_request(PROMPTS[0], request_id="x", plans=[plan.name for plan in bad])
        assert answers(made, ["fine"])["fine"] == expected
        for plan in bad:
            session.remove(plan.name)


def test_a_batch_with_a_request_that_would_fail_raises(model: LlamaForCausalLM) -> None:
    """transformers by itself logs it, and returns no replies."""
    bad = sk.Plan(sk.add(vector(1), 4.0), layers=1, scope=(20,), name="bad")
    with sk.steer(model, [*plans(), bad], silent="ignore") as session:
        session.rows(["add", "bad", "bad"])
        with pytest.raises(sk.PlanError, match=r"the prompt of row 0 has 9 tokens, plan 'bad', input 2"):
            together(model, PROMPTS[:3])
        with pytest.raises(sk.PlanError, match="rows name 3 sequences, the batch has 2 prompts"):
            together(model, PROMPTS[:2])
        assert session.receipt().plans["add"].tokens == 0
        session.rows(["add", None])
        assert len(together(model, PROMPTS[:2])) == 2


def test_a_plan_that_waiting_requests_cannot_have_is_not_added(model: LlamaForCausalLM) -> None:
    gated = sk.Plan(sk.add(vector(1), 4.0), layers=1, latch=latch(True), name="gated")
    with sk.steer(model, plans()[0], silent="ignore") as session:
        made = model.init_continuous_batching(  # not started: its requests wait
            generation_config=GenerationConfig(**GREEDY), continuous_batching_config=config()
        )
        made.add_request(PROMPTS[0], request_id="waits")
        with pytest.raises(sk.PlanError, match="plan 'gated' decides from the prompt .* request 'waits'"):
            session.add(gated)
        assert "gated" not in session.receipt().plans
        made.start()
        assert len(answers(made, ["waits"])["waits"]) == GREEDY["max_new_tokens"]
        made.stop(block=True)
        made.destroy()


def test_a_plan_is_free_when_its_requests_have_ended(model: LlamaForCausalLM) -> None:
    """Finished, cancelled before it ran, and failed before it ran; the manager lives on."""
    with sk.steer(model, plans(), silent="ignore") as session, manager(model, max_requests_per_batch=1) as made:
        made.add_request(PROMPTS[0], request_id="long", plans="add", max_new_tokens=100)
        made.add_request(PROMPTS[1], request_id="gone", plans="ablate")
        made.cancel_request("gone")
        made.add_request(PROMPTS[1], request_id="wrong", plans="decode", temperature="no processor takes this")
        errors = []
        while "long" not in (found := {}) and (output := made.get_result(timeout=20)) is not None:
            errors += [output.error] if output.request_id == "wrong" else []
            found[output.request_id] = output
            if output.request_id == "long":
                break
        assert len(errors) == 1
        for name in ("add", "ablate", "decode"):
            session.remove(name)
        assert session._calls.running == {}


def test_an_id_is_free_when_its_request_has_ended(model: LlamaForCausalLM) -> None:
    with sk.steer(model, plans(), silent="ignore") as session, manager(model) as made:
        for prompt in PROMPTS[:3]:
            made.add_request(prompt, request_id="same", plans="add", max_new_tokens=60)
            with pytest.raises(sk.PlanError, match="request 'same' is still running"):
                made.add_request(prompt, request_id="same", plans="add")
            answers(made, ["same"])
        assert len(session._calls.running) <= 1


def test_requests_that_a_full_cache_evicts(model: LlamaForCausalLM) -> None:
    """They start again with their reply as prompt; one that would be steered otherwise then ends with an error."""
    read = (Read(2, "resid_post", "mean"),)
    mean = Stub(strength, [1.0] * LAYERS, reads=read, width=WIDTH)
    means = sk.Plan(sk.add(vector(1), 4.0), layers=1, scope="decode", controller=mean, name="mean")
    names: list[str | None] = ["mean", "asked", "after", "asked", None, "mean"]
    drawn = [torch.Generator().manual_seed(50 + i) for i in range(len(names))]
    prompts = [torch.randint(3, VOCABULARY, (60 + i,), generator=g).tolist() for i, g in enumerate(drawn)]
    longer = {**GREEDY, "max_new_tokens": 24}
    with sk.steer(model, [*plans(), means, asked("decode")], silent="ignore") as session:
        expected = []
        for prompt, name in zip(prompts, names, strict=True):
            session.rows([name])
            expected.append(model.generate(torch.tensor([prompt]), **longer)[0, len(prompt) :].tolist())
        session.rows(names)
        made = model.generate_batch(
            prompts, generation_config=GenerationConfig(**longer), continuous_batching_config=config(num_blocks=16)
        )
        outputs = list(made.values())
    failed = [name for name, output in zip(names, outputs, strict=True) if output.error is not None]
    assert failed
    assert set(failed) == {"asked"}
    assert all("was evicted from a full cache" in output.error for output in outputs if output.error is not None)
    for output, reply in zip(outputs, expected, strict=True):
        assert output.error is not None or output.generated_tokens == reply


def test_another_make_of_continuous_batching_is_refused(model: LlamaForCausalLM) -> None:
    with sk.steer(model, plans(), silent="ignore"), manager(model) as made:
        made.add_request(PROMPTS[0], request_id="a", plans=None)
        answers(made, ["a"])
        parts = dict(vars(made.batch_processor))
    check_processor(SimpleNamespace(**parts))
    other = SimpleNamespace(prepare_batch_tensors=lambda states: None)
    with pytest.raises(sk.PlanError, match="prepare_batch_tensors does not begin with requests_in_batch"):
        check_processor(SimpleNamespace(**{**parts, "inputs_and_outputs": other}))
    del parts["offloading_manager"]
    with pytest.raises(sk.PlanError, match="SimpleNamespace has no offloading_manager"):
        check_processor(SimpleNamespace(**parts))
