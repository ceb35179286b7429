"""Plans that decide from the prompt's last token: latches and controllers, several requests in one batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

import steerkern as sk
from steerkern.controller import Controller
from tests.serving.asked import Ask, engine, expected, folders, vector
from tests.serving.models import LAYERS, LLAMA, WIDTH, saved

PROMPTS = [tuple(range(5, 13)), (20, 21, 22), (30, 31, 32, 33, 34) * 9, (40, 41), (50, 52, 51, 53)]


def states(model: Path, layer: int) -> torch.Tensor:
    """``[prompts, H]``: what goes into a block at each prompt's last token."""
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        kept = [loaded(torch.tensor([p]), output_hidden_states=True).hidden_states[layer][0, -1] for p in PROMPTS]
    return torch.stack(kept)


def gated(model: Path) -> tuple[sk.Plan, int]:
    """A plan whose latch opens for some of the prompts, and for how many."""
    direction = vector(9)
    coordinates = states(model, 2) @ (direction / direction.norm())
    low, high = coordinates.sort().values[1:3].tolist()
    term = sk.Term(sk.Read(2), direction, measure="coordinate")
    latch = sk.Latch((sk.Condition((term,), lo=(low + high) / 2),))
    plan = sk.Plan(sk.add(vector(3), 9.0), layers=[1, 2], scope="decode", latch=latch, name="gated")
    return plan, len(PROMPTS) - 2


def guided() -> sk.Plan:
    """A plan under a controller that reads an inner block and the last one, and weighs each layer."""
    reads = [sk.Read(1, "resid_post"), sk.Read(LAYERS - 1, "resid_post")]
    controller = Controller(reads, range(LAYERS), WIDTH, hidden=8, seed=4)
    edit = sk.add(vector(4), 30.0)
    return sk.Plan(edit, layers="all", site="resid_post", scope="decode", controller=controller, name="guided")


@pytest.mark.runner
@pytest.mark.parametrize("tokens", [256, 16], ids=["whole", "chunks"])
def test_each_request_has_its_own_decision(tokens: int) -> None:
    model = saved(LLAMA)
    plan, open_for = gated(model)
    always = sk.Plan(sk.add(vector(5), 4.0), layers=1, name="always")
    plans = {one.name: one for one in (plan, guided(), always)}
    ways = ["gated", "guided", ["gated", "always"], {"plan": "guided", "scale": -0.5}, None]
    wanted = {str(way): expected(model, plans, [Ask(prompt, way) for prompt in PROMPTS]) for way in ways}
    plain = wanted[str(None)]
    assert sum(one != other for one, other in zip(wanted["gated"], plain, strict=True)) == open_for
    assert sum(one != other for one, other in zip(wanted["guided"], plain, strict=True)) >= 4
    with engine(model, {"plans": folders(plans)}, max_num_batched_tokens=tokens) as served:
        for turn in range(len(ways)):  # each prompt in each way, the ways mixed in every batch
            chosen = [ways[(turn + i) % len(ways)] for i in range(len(PROMPTS))]
            found = served.tokens([Ask(prompt, way) for prompt, way in zip(PROMPTS, chosen, strict=True)])
            assert found == [wanted[str(way)][i] for i, way in enumerate(chosen)]


def latch(token: int | str = -1) -> sk.Latch:
    return sk.Latch((sk.Condition((sk.Term(sk.Read(1, "resid_pre", token), vector(0)),), lo=0.0),))  # type: ignore[arg-type]


def asked_each_token() -> Controller:
    return Controller([sk.Read(1, "resid_post")], range(LAYERS), WIDTH, hidden=4, every_token=True)


EDIT = sk.add(vector(1))
REFUSED = {
    "has a probe": sk.Plan(sk.probe(vector(1)), name="p"),
    "asks its controller at every token": sk.Plan(
        EDIT, layers=[2, 3], scope="decode", controller=asked_each_token(), name="p"
    ),
    "decides from the prompt and writes prompt tokens": sk.Plan(EDIT, latch=latch(), name="p"),
    "decides from other states than the last": sk.Plan(EDIT, latch=latch("mean"), scope="decode", name="p"),
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_no_engine_can_do_is_refused_before_it_runs(sentence: str) -> None:
    with (
        pytest.raises(sk.PlanError, match=f"plan 'p' {sentence}"),
        engine(saved(LLAMA), {"plans": folders({"p": REFUSED[sentence]})}),
    ):
        pass


def test_a_request_cannot_ask_a_latch_to_write_prompts() -> None:
    from vllm.exceptions import VLLMValidationError

    model, ask = saved(LLAMA), Ask(PROMPTS[0], "gated")
    plan, _ = gated(model)
    with engine(model, {"plans": folders({"gated": plan})}) as served:
        with pytest.raises(VLLMValidationError, match="decides from the prompt and writes prompt tokens"):
            served.tokens([Ask(PROMPTS[0], {"plan": "gated", "scope": "all"})])
        assert served.tokens([ask]) == expected(model, {"gated": plan}, [ask])
