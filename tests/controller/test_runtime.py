"""The acceptance tests of the guided controller that need no training: what a plan with a controller writes."""

from __future__ import annotations

import pytest
import torch

import steerkern as sk
from steerkern.controller import CODE, PAPER, Controller
from steerkern.decisions import Read
from steerkern.replies import encode
from tests.controller.stubs import Stub, injections

ALPHA = 2.0
W = (0.1, 0.7, 0.4, 0.9)
D = torch.nn.functional.normalize(torch.randn(64, generator=torch.Generator().manual_seed(3)), dim=0)


def plan(controller, scope="decode"):
    edit = sk.add(D, ALPHA)
    return sk.Plan(edit, layers=controller.layers, site="resid_post", scope=scope, controller=controller, name="g")


def generated(model, inputs, new_tokens=5):
    """Tokens, logits and cache of a greedy run of exactly ``new_tokens`` tokens."""
    with torch.no_grad():
        return model.generate(
            **inputs,
            do_sample=False,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            return_dict_in_generate=True,
            output_logits=True,
        )


def prompt_cache(made, length):
    return [part[:, :, :length] for layer in made.past_key_values.layers for part in (layer.keys, layer.values)]


def test_every_decode_step_gets_alpha_s_w_d_at_every_layer(model, rendered):
    inputs = encode(model, rendered("harmful", 3))
    length = inputs["input_ids"].shape[1]
    stub = Stub(1.5, W)
    with injections(model) as forwards, sk.steer(model, plan(stub)):
        steered = generated(model, inputs)
    stock = generated(model, inputs)
    wanted = ALPHA * 1.5 * torch.tensor(W)[:, None, None, None] * D
    assert len(stub.seen) == 1  # decided once per request
    decode = [delta for delta in forwards if delta.shape[2] == 1]
    prefill = [delta for delta in forwards if delta.shape[2] > 1]
    assert len(decode) == 4
    for delta in decode:
        # the row is about 40 long, so its rounding is 4e-6
        torch.testing.assert_close(delta, wanted.expand_as(delta), atol=1e-5, rtol=0)
    assert all(not delta.any() for delta in prefill)
    for ours, theirs in zip(prompt_cache(steered, length), prompt_cache(stock, length), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)
    assert not torch.equal(steered.logits[1], stock.logits[1])


def test_requests_of_one_batch_have_their_own_strength(model, rendered):
    prompts = [*rendered("harmful", 2), *rendered("harmless", 2)]
    strength = lambda states: states[:, 0, 5]  # noqa: E731
    stub = Stub(strength, W)
    with injections(model) as forwards, sk.steer(model, plan(stub)):
        together = generated(model, encode(model, prompts)).sequences[:, -5:]
    s = strength(stub.seen[0])
    assert len(set(s.tolist())) == 4
    delta = next(delta for delta in forwards if delta.shape[2] == 1)
    wanted = ALPHA * s[None, :, None, None] * torch.tensor(W)[:, None, None, None] * D
    torch.testing.assert_close(delta, wanted, atol=1e-5, rtol=1e-5)
    alone = []
    for prompt in prompts:
        with sk.steer(model, plan(Stub(strength, W))):
            alone.append(generated(model, encode(model, [prompt])).sequences[:, -5:])
    assert torch.equal(together, torch.cat(alone))
    changed = [*prompts[:1], *rendered("harmless", 5)[2:]]
    with sk.steer(model, plan(Stub(strength, W))):
        beside_others = generated(model, encode(model, changed)).sequences[:, -5:]
    assert torch.equal(beside_others[0], together[0])


def test_strength_zero_changes_no_bit(model, rendered):
    inputs = encode(model, rendered("harmful", 3))
    for scope in ("decode", "reply"):
        with injections(model) as forwards, sk.steer(model, plan(Stub(0.0, W), scope)):
            generated(model, inputs)
        assert len(forwards) == 5
        assert not any(delta.any() for delta in forwards)
        # the reference: elsewhere a norm whose state is read rounds its last bit like the stock one
        with sk.steer(model, plan(Stub(0.0, W), scope), backend="reference"):
            zero = generated(model, inputs)
        stock = generated(model, inputs)
        assert all(torch.equal(a, b) for a, b in zip(zero.logits, stock.logits, strict=True))
    with sk.steer(model, plan(Stub(1.0, W)), backend="reference"):
        one = generated(model, inputs)
    assert not torch.equal(one.logits[1], stock.logits[1])


@pytest.mark.parametrize(("scope", "same"), [("decode", True), ("reply", False)])
def test_the_first_token_is_steered_only_by_scope_reply(model, rendered, scope, same):
    inputs = encode(model, rendered("harmful", 2))
    with sk.steer(model, plan(Stub(1.0, W), scope), backend="reference"):
        steered = generated(model, inputs)
    stock = generated(model, inputs)
    assert torch.equal(steered.logits[0], stock.logits[0]) == same
    assert not torch.equal(steered.logits[1], stock.logits[1])


def test_reply_writes_the_last_prompt_token_and_no_other(model, rendered):
    inputs = encode(model, rendered("harmful", 2))
    length = inputs["input_ids"].shape[1]
    # read below and above what is written: the decision comes from the unsteered prompt
    for reads in ((Read(0, "resid_post"),), (Read(3, "resid_post"),)):
        with injections(model) as forwards, sk.steer(model, plan(Stub(1.0, W, reads), "reply")):
            generated(model, inputs)
        delta = next(delta for delta in forwards if delta.shape[2] == length and delta.any())
        wanted = ALPHA * torch.tensor(W)[:, None, None] * D
        assert not delta[:, :, :-1].any()
        torch.testing.assert_close(delta[:, :, -1], wanted.expand(4, 2, 64), atol=1e-5, rtol=0)


def made(preset):
    return Controller(
        [Read(layer, "resid_post") for layer in preset.read_layers(4)],
        range(4),
        64,
        hidden=8,
        every_token=preset.every_token,
    )


def test_code_preset_steers_the_last_layer_only_and_paper_preset_all(model, rendered):
    """Finding 1: with late read layers the released hooks fire when the earlier layers of the pass are done."""
    inputs = encode(model, rendered("harmful", 2))
    for preset, expected in ((CODE, [False, False, False, True]), (PAPER, [True] * 4)):
        with injections(model) as forwards, sk.steer(model, plan(made(preset), preset.scope)):
            generated(model, inputs)
        steps = [delta for delta in forwards if delta.shape[2] == 1]
        assert len(steps) == 4
        for delta in steps:
            assert [bool(layer.any()) for layer in delta] == expected


def test_what_the_runtime_reads_is_what_training_read(model, rendered):
    from steerkern.controller import cache_states

    prompts = rendered("harmless", 4)
    reads = (Read(3, "resid_post"), Read(1, "resid_pre", -2))
    stub = Stub(1.0, W, reads)
    with sk.steer(model, plan(stub)):
        generated(model, encode(model, prompts), 2)
    cached = cache_states(model, prompts, reads, progress=False)
    # padded on the other side, so sums of attention run in another order
    torch.testing.assert_close(stub.seen[0], cached, atol=1e-3, rtol=1e-4)


def test_a_plan_with_a_controller_is_saved_with_it(model, rendered, tmp_path):
    controller = made(PAPER)
    controller.plan(dict.fromkeys(range(4), D), ALPHA, name="kept").save_pretrained(tmp_path)
    again = sk.Plan.from_pretrained(tmp_path)
    inputs = encode(model, rendered("harmful", 2))
    runs = []
    for one in (controller.plan(dict.fromkeys(range(4), D), ALPHA), again):
        with sk.steer(model, one):
            runs.append(generated(model, inputs).logits)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_controller_of_another_model_is_refused(model):
    other = Controller([Read(0, "resid_post")], range(4), 64, hidden=4, model=sk.Fingerprint("gpt2", 64, 4))
    sentence = r"was made for gpt2 \(4 layers, width 64\), the model is llama"
    with pytest.raises(sk.PlanError, match=sentence):
        sk.steer(model, other.plan(D, 1.0))
    deep = Controller([Read(7, "resid_post")], range(4), 64, hidden=4)
    with pytest.raises(sk.PlanError, match="layer 7"):
        sk.steer(model, deep.plan(D, 1.0))
    with pytest.raises(sk.PlanError, match="the controller reads width 32, the edits have 64"):
        Controller([Read(0)], range(4), 32, hidden=4).plan(D, 1.0)
    with pytest.raises(sk.PlanError, match="layer 3"):
        Controller([Read(0)], range(4), 64, hidden=4).plan({0: D, 1: D, 2: D}, 1.0)
    with pytest.raises(sk.PlanError, match="directions for gpt2"):
        Controller([Read(0)], range(4), 64, hidden=4, model=sk.Fingerprint("llama", 64, 4)).plan(
            sk.Direction(D, 2, model=sk.Fingerprint("gpt2", 64, 4)), 1.0
        )
