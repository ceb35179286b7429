"""Steering inside ``generate``: caches, padding, beams, scopes, streamers, compilation."""

from __future__ import annotations

import itertools
import queue
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, StaticCache
from transformers.generation.streamers import BaseStreamer

import steerkern as sk
from tests.runtime.models import LAYERS, VOCABULARY, tiny_llama

NEW = 8
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
LAYER = 2
STRENGTH = 3.0
TOLERANCE = 1e-3  # logits up to 10, fp32: the norms of the kernel sum in another order than torch's


def padded(side: str) -> tuple[Tensor, Tensor]:
    """Three prompts of 9, 6 and 4 tokens with their mask."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, VOCABULARY, (3, 9), generator=generator)
    mask = torch.ones_like(ids)
    for row, missing in ((1, 3), (2, 5)):
        mask[row, slice(0, missing) if side == "left" else slice(9 - missing, 9)] = 0
    return ids * mask, mask


def solo_logits(
    model: LlamaForCausalLM, prompt: Tensor, vector: Tensor, written: Callable[[int, int], bool], steps: int = NEW
) -> Tensor:
    """Logits ``[steps, V]`` of a greedy reply, recomputed in full at every step."""
    ids, steps_logits = prompt[None], []
    for _ in range(steps):
        chosen = torch.tensor([written(p, len(prompt)) for p in range(ids.shape[1])])
        handle = model.model.layers[LAYER].register_forward_pre_hook(
            lambda block, args, chosen=chosen: (args[0] + STRENGTH * vector * chosen[None, :, None], *args[1:])
        )
        with torch.no_grad():
            steps_logits.append(model(ids, use_cache=False).logits[0, -1])
        handle.remove()
        ids = torch.cat([ids, steps_logits[-1].argmax().view(1, 1)], 1)
    return torch.stack(steps_logits)


def solo(
    model: LlamaForCausalLM, prompt: Tensor, vector: Tensor, written: Callable[[int, int], bool], steps: int = NEW
) -> list[int]:
    """Its tokens."""
    return solo_logits(model, prompt, vector, written, steps).argmax(-1).tolist()


SCOPES = {
    "all": ("all", lambda p, n: True),
    "prompt": ("prompt", lambda p, n: p < n),
    "decode": ("decode", lambda p, n: p >= n),
    "last": (-1, lambda p, n: p == n - 1),
    "chosen": ((0, -2), lambda p, n: p in (0, n - 2)),
    "from 3": (sk.Tokens(start=3), lambda p, n: p >= 3),
    "window": (sk.Tokens(start=2, stop=11), lambda p, n: 2 <= p < 11),
}


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
def test_every_scope_writes_the_same_tokens_with_and_without_a_cache(
    model: LlamaForCausalLM, vector: Tensor, scope: str, cache: str
) -> None:
    ids, mask = padded("left")
    what, written = SCOPES[scope]
    options = {"static": {"cache_implementation": "static"}, "none": {"use_cache": False}}.get(cache, {})
    with sk.steer(model, sk.Plan(sk.add(vector, STRENGTH), layers=[LAYER], scope=what, name="p")) as session:
        out = model.generate(
            ids, attention_mask=mask, return_dict_in_generate=True, output_logits=True, **GREEDY, **options
        )
        receipt = session.receipt()["p"]
    logits = torch.stack(out.logits, 1)
    for row in range(3):
        prompt = ids[row][mask[row] == 1]
        expected = solo_logits(model, prompt, vector, written)
        assert out.sequences[row, 9:].tolist() == expected.argmax(-1).tolist(), f"row {row}"
        torch.testing.assert_close(logits[row], expected, atol=TOLERANCE, rtol=0)
        pads = 9 - len(prompt)
        positions = [p for p in range(len(prompt) + NEW - 1) if written(p, len(prompt))]
        counted = [p - pads for a, b in receipt.rows[row] for p in range(a, b + 1)]
        assert counted == positions, f"row {row}"


def test_the_scopes_differ_so_that_the_test_above_can_fail(model: LlamaForCausalLM, vector: Tensor) -> None:
    prompt = padded("left")[0][0]
    scopes = [lambda p, n: False, *(written for _, written in SCOPES.values())]
    replies = [solo_logits(model, prompt, vector, written) for written in scopes]
    for one, other in itertools.combinations(replies, 2):
        assert float((one - other).abs().max()) > 20 * TOLERANCE


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_never_steered(model: LlamaForCausalLM, vector: Tensor, side: str) -> None:
    ids, mask = padded(side)
    with sk.steer(model, sk.Plan(sk.add(vector, STRENGTH), layers=[LAYER], name="p")) as session, torch.no_grad():
        model(ids, attention_mask=mask)
        rows = session.receipt()["p"].rows
    assert rows == (
        {0: [(0, 8)], 1: [(3, 8)], 2: [(5, 8)]} if side == "left" else {0: [(0, 8)], 1: [(0, 5)], 2: [(0, 3)]}
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_last_prompt_token_is_found_on_either_side_of_the_padding(
    model: LlamaForCausalLM, vector: Tensor, side: str
) -> None:
    ids, mask = padded(side)
    with sk.steer(model, sk.Plan(sk.add(vector, STRENGTH), layers=[LAYER], scope=-1, name="p")), torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
    for row in range(3):
        prompt = ids[row][mask[row] == 1]
        last = int(mask[row].nonzero().max())
        assert [int(logits[row, last].argmax())] == solo(model, prompt, vector, lambda p, n: p == n - 1, 1)


def test_padding_is_inferred_from_the_pad_token_as_generate_does(model: LlamaForCausalLM, vector: Tensor) -> None:
    ids, mask = padded("left")
    plan = sk.Plan(sk.add(vector, STRENGTH), layers=[LAYER], scope=0, name="p")
    with sk.steer(model, plan):
        expected = model.generate(ids, attention_mask=mask, **GREEDY)
    with sk.steer(model, plan) as session:
        out = model.generate(ids, **GREEDY)
        assert session.receipt()["p"].rows == {0: [(0, 0)], 1: [(3, 3)], 2: [(5, 5)]}
    assert torch.equal(out, expected)


def test_prompt_only_writes_equal_a_full_recompute(model: LlamaForCausalLM, vector: Tensor) -> None:
    ids, mask = padded("left")
    with sk.steer(model, sk.Plan(sk.ablate(vector), layers="all", scope="prompt")):
        cached = model.generate(ids, attention_mask=mask, **GREEDY)
        recomputed = model.generate(ids, attention_mask=mask, use_cache=False, **GREEDY)
    assert torch.equal(cached, recomputed)


def test_chunked_prefill_keeps_the_scope(model: LlamaForCausalLM, vector: Tensor) -> None:
    ids = padded("left")[0][:1]
    with sk.steer(model, sk.Plan(sk.add(vector, STRENGTH), layers=[LAYER], scope=-1)):
        expected = model.generate(ids, **GREEDY)
        chunked = model.generate(ids, prefill_chunk_size=4, **GREEDY)
    assert torch.equal(chunked, expected)


def test_a_hand_written_loop_with_a_cache_knows_prompt_from_decode(model: LlamaForCausalLM, vector: Tensor) -> None:
    prompt = padded("left")[0][0]
    with sk.steer(model, sk.Plan(sk.add(vector, STRENGTH), layers=[LAYER], scope="decode")), torch.no_grad():
        out = model(prompt[None], use_cache=True)
        tokens = [int(out.logits[0, -1].argmax())]
        while len(tokens) < NEW:
            out = model(torch.tensor([tokens[-1:]]), past_key_values=out.past_key_values)
            tokens.append(int(out.logits[0, -1].argmax()))
    assert tokens == solo(model, prompt, vector, lambda p, n: p >= n)


def test_two_conversations_may_take_turns(model: LlamaForCausalLM, vector: Tensor) -> None:
    prompts = [padded("left")[0][0], padded("left")[0][0][:5]]
    with sk.steer(model, sk.Plan(sk.add(vector, STRENGTH), layers=[LAYER], scope="decode")), torch.no_grad():
        states = [model(p[None], use_cache=True) for p in prompts]
        tokens = [[int(s.logits[0, -1].argmax())] for s in states]
        for _ in range(NEW - 1):
            for i in (0, 1):
                states[i] = model(torch.tensor([tokens[i][-1:]]), past_key_values=states[i].past_key_values)
                tokens[i].append(int(states[i].logits[0, -1].argmax()))
    for prompt, reply in zip(prompts, tokens, strict=True):
        assert reply == solo(model, prompt, vector, lambda p, n: p >= n)


def test_a_loop_without_a_cache_states_its_prompt(model: LlamaForCausalLM, vector: Tensor) -> None:
    prompt = padded("left")[0][0]
    ids = prompt[None]
    with (
        sk.steer(model, sk.Plan(sk.add(vector, STRENGTH), layers=[LAYER], scope="decode")) as session,
        torch.no_grad(),
        session.request(9),
    ):
        for _ in range(NEW):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert ids[0, 9:].tolist() == solo(model, prompt, vector, lambda p, n: p >= n)


def test_a_second_turn_on_the_same_cache(model: LlamaForCausalLM, vector: Tensor) -> None:
    ids = padded("left")[0][:1]
    plan = sk.Plan(sk.add(vector, STRENGTH), layers=[LAYER], scope="decode")
    more = {**GREEDY, "return_dict_in_generate": True}
    with sk.steer(model, plan):
        first = model.generate(ids, attention_mask=torch.ones_like(ids), **more)
        follow = torch.cat([first.sequences, ids[:, :4]], 1)
        second = model.generate(
            follow, past_key_values=first.past_key_values, attention_mask=torch.ones_like(follow), **GREEDY
        )
    reply = solo(model, ids[0], vector, lambda p, n: p >= n)
    assert first.sequences[0, 9:].tolist() == reply
    # the cache holds the first reply as it was written; what was asked next is prompt, so unsteered
    last = 9 + NEW - 1
    written = lambda p, n: 9 <= p < last or p >= n  # noqa: E731
    assert second[0, follow.shape[1] :].tolist() == solo(model, follow[0], vector, written)


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}, {"num_return_sequences": 1}]
)
def test_beams_and_returned_sequences_follow_the_rows_of_their_prompts(
    model: LlamaForCausalLM, vector: Tensor, options: dict[str, int]
) -> None:
    ids, mask = padded("left")
    plans = [
        sk.Plan(sk.add(vector, STRENGTH * s), layers=[LAYER], scope="decode", name=n)
        for n, s in (("up", 1), ("down", -1))
    ]
    times = options.get("num_return_sequences", 1)
    with sk.steer(model, plans) as session:
        session.rows(["up", None, "down"])
        mixed = model.generate(ids, attention_mask=mask, **GREEDY, **options)
    for row, plan in ((0, plans[0]), (1, None), (2, plans[1])):
        alone = ids[row : row + 1], mask[row : row + 1]
        if plan is None:
            expected = model.generate(alone[0], attention_mask=alone[1], **GREEDY, **options)
        else:
            with sk.steer(model, plan):
                expected = model.generate(alone[0], attention_mask=alone[1], **GREEDY, **options)
        assert torch.equal(mixed[row * times : (row + 1) * times], expected), f"row {row}"


def test_sampling_draws_the_same_numbers(model: LlamaForCausalLM, vector: Tensor) -> None:
    ids = padded("left")[0][:1]
    options = {**GREEDY, "do_sample": True, "num_return_sequences": 4}
    torch.manual_seed(0)
    plain = model.generate(ids, **options)
    with sk.steer(model, sk.Plan(sk.add(vector, STRENGTH), layers=[LAYER])) as session:
        session.rows([None])
        torch.manual_seed(0)
        unsteered = model.generate(ids, **options)
        session.rows(None)
        steered = model.generate(ids, **options)
    assert torch.equal(unsteered, plain)
    assert not torch.equal(steered, plain)


def test_streamers_see_the_steered_tokens(model: LlamaForCausalLM, vector: Tensor) -> None:
    class Collect(BaseStreamer):
        def __init__(self) -> None:
            self.tokens: queue.Queue[int] = queue.Queue()

        def put(self, value: Tensor) -> None:
            for token in value.reshape(-1).tolist():
                self.tokens.put(token)

        def end(self) -> None:
            pass

    ids, streamer = padded("left")[0][:1], Collect()
    with sk.steer(model, sk.Plan(sk.add(vector, STRENGTH), layers=[LAYER])):
        out = model.generate(ids, streamer=streamer, **GREEDY)
    assert list(streamer.tokens.queue) == out[0].tolist()


def test_embeddings_as_prompt(model: LlamaForCausalLM, vector: Tensor) -> None:
    ids, mask = padded("left")
    embeds = model.get_input_embeddings()(ids).detach()
    kept = embeds.clone()
    plan = sk.Plan(sk.add(vector, STRENGTH), layers=[0, LAYER], scope=(-1,))
    with sk.steer(model, plan):
        expected = model.generate(ids, attention_mask=mask, **GREEDY)[:, 9:]
        out = model.generate(inputs_embeds=embeds, attention_mask=mask, **GREEDY)
    assert torch.equal(out, expected)
    assert torch.equal(embeds, kept)


def test_assisted_decoding_gives_the_steered_tokens(model: LlamaForCausalLM, vector: Tensor) -> None:
    ids = padded("left")[0][:1]
    options = {**GREEDY, "eos_token_id": VOCABULARY - 1}  # transformers 4.57 looks prompts up with an eos only
    with sk.steer(model, sk.Plan(sk.add(vector, STRENGTH), layers=[LAYER], scope="decode")):
        expected = model.generate(ids, **options)
        assisted = model.generate(ids, assistant_model=tiny_llama(seed=1), **options)
        looked_up = model.generate(ids, prompt_lookup_num_tokens=2, **options)
    assert torch.equal(assisted, expected)
    assert torch.equal(looked_up, expected)


# torch.compile


@pytest.fixture(scope="module")
def small() -> LlamaForCausalLM:
    return tiny_llama(num_hidden_layers=2)


PLANS = {
    "add": lambda v: sk.Plan(sk.add(v, STRENGTH), layers="all", name="p"),
    "mixed": lambda v: sk.Plan(
        [sk.ablate(v).when(v, lo=-1.0), sk.cap(v.flip(0), hi=0.1)], layers="all", scope="decode", name="p"
    ),
    "event": lambda v: sk.Plan(
        sk.add(v, STRENGTH), layers="all", scope=sk.Tokens("decode", after=tuple((i,) for i in range(50))), name="p"
    ),
    "first": lambda v: sk.Plan(sk.add(v, STRENGTH), layers="all", scope=sk.Tokens("decode", first=2), name="p"),
}


@pytest.mark.parametrize(
    ("kind", "compiler"),
    [("add", "aot_eager"), ("mixed", "inductor"), ("event", "aot_eager"), ("first", "aot_eager")],
)
def test_a_compiled_forward_with_a_static_cache_is_steered(
    small: LlamaForCausalLM, vector: Tensor, kind: str, compiler: str
) -> None:
    torch._dynamo.reset()
    ids, mask = padded("left")
    options = {**GREEDY, "attention_mask": mask, "cache_implementation": "static"}
    plain = small.generate(ids, **options)
    with sk.steer(small, PLANS[kind](vector)) as session:
        expected = small.generate(ids, **options)
        counted = session.receipt().to_json()
    small.forward = torch.compile(small.forward, backend=compiler, fullgraph=True)
    try:
        assert torch.equal(small.generate(ids, **options), plain)
        with sk.steer(small, PLANS[kind](vector)) as session:
            assert torch.equal(small.generate(ids, **options), expected)
            assert session.receipt().to_json() == counted
            session.set("p", scale=1e-6)
            assert torch.equal(small.generate(ids, **options), plain)  # no recompilation was needed for a new strength
            session.remove("p")
            assert torch.equal(small.generate(ids, **options), plain)
            session.add(PLANS[kind](vector))
            assert torch.equal(small.generate(ids, **options), expected)
        assert torch.equal(small.generate(ids, **options), plain)
    finally:
        del small.forward
    assert not torch.equal(expected, plain)


def test_a_compiled_model_is_steered_inside_one_graph(small: LlamaForCausalLM, vector: Tensor) -> None:
    torch._dynamo.reset()
    ids = padded("left")[0]
    compiled = torch.compile(small, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        plain = small(ids).logits
        torch.testing.assert_close(compiled(ids).logits, plain, atol=1e-5, rtol=1e-5)
        with sk.steer(compiled, PLANS["add"](vector)) as session:
            expected = small(ids).logits
            session.rows([None, "p", "p"])
            mixed = compiled(ids).logits
            session.rows(None)
            steered = compiled(ids).logits
        torch.testing.assert_close(steered, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(mixed, torch.cat([plain[:1], expected[1:]]), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(compiled(ids).logits, plain, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(expected, plain, atol=0.1)


def test_static_cache_in_a_hand_written_loop(model: LlamaForCausalLM, vector: Tensor) -> None:
    prompt = padded("left")[0][0]
    cache = StaticCache(config=model.config, max_cache_len=32)
    with sk.steer(model, sk.Plan(sk.add(vector, STRENGTH), layers=[LAYER], scope="decode")), torch.no_grad():
        ids, place = prompt[None], torch.arange(9)
        tokens: list[int] = []
        for _ in range(NEW):
            out = model(ids, past_key_values=cache, position_ids=place[None], cache_position=place)
            tokens.append(int(out.logits[0, -1].argmax()))
            ids, place = torch.tensor([tokens[-1:]]), place[-1:] + 1
    assert tokens == solo(model, prompt, vector, lambda p, n: p >= n)
    assert LAYERS > LAYER
