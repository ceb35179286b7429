"""Replaced states: exact inside one model, between two models and under padding; sweeps against a loop."""

from __future__ import annotations

import pytest
import torch

import steerkern as sk
from steerkern.errors import PlanError
from steerkern.extraction import render, states
from steerkern.runtime.logits import next_logits
from steerkern.runtime.patching import Patch, check_exchange, check_tokenizers, patched, sweep
from tests.runtime.models import LAYERS, VOCABULARY, WIDTH, tiny_llama

TOKENS = 9
SITES = ("resid_pre", "resid_post")


@pytest.fixture(scope="module")
def model():
    return tiny_llama(0)


def prompts(count, seed, tokens=TOKENS):
    return torch.randint(3, VOCABULARY, (count, tokens), generator=torch.Generator().manual_seed(seed))


def residual(model, ids, mask=None):
    """``[L + 1, B, S, H]`` by plain hooks: what enters each block, and what leaves the last."""
    kept = []
    handles = [block.register_forward_pre_hook(lambda m, args: kept.append(args[0])) for block in model.model.layers]
    handles.append(model.model.layers[-1].register_forward_hook(lambda m, args, out: kept.append(out)))
    logits = run(model, ids, mask)
    for handle in handles:
        handle.remove()
    return torch.stack(kept), logits


def run(model, ids, mask=None):
    with torch.no_grad():
        return model(ids, attention_mask=mask, use_cache=False).logits


def whole(layer, h):
    """Every token of a batch ``[B, S, H]``."""
    rows, columns = torch.cartesian_prod(torch.arange(h.shape[0]), torch.arange(h.shape[1])).unbind(1)
    return Patch(layer, rows, columns, h.reshape(-1, h.shape[-1]))


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_own_states_change_no_bit(layer, site, dtype):
    model = tiny_llama(0).to(dtype)
    ids = prompts(3, 1)
    h, stock = residual(model, ids)
    with patched(model, [whole(layer, h[layer + (site == "resid_post")])], site=site):
        assert torch.equal(run(model, ids), stock)
    assert torch.equal(run(model, ids), stock)


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("layer", range(LAYERS))
def test_all_tokens_of_another_run_give_its_logits(model, layer, site):
    ids, other = prompts(2, 1), prompts(2, 2)
    h, wanted = residual(model, other)
    with patched(model, [whole(layer, h[layer + (site == "resid_post")])], site=site):
        assert torch.equal(run(model, ids), wanted)


@pytest.mark.parametrize("layer", range(LAYERS))
def test_all_tokens_of_another_model_are_read_by_the_rest_of_this_one(model, layer):
    """The last block is the whole rest: what the other model wrote goes through this model's norm and unembedding."""
    other, ids = tiny_llama(1), prompts(2, 1)
    h, _ = residual(other, ids)
    state = h[layer + 1]
    with torch.no_grad():
        at = torch.arange(TOKENS)[None]
        rope = model.model.rotary_emb(state, at)
        mask = torch.full((TOKENS, TOKENS), float("-inf")).triu(1)[None, None]
        for block in model.model.layers[layer + 1 :]:
            state = block(state, attention_mask=mask, position_embeddings=rope)
        wanted = model.lm_head(model.model.norm(state))
    with patched(model, [whole(layer, h[layer + 1])]):
        torch.testing.assert_close(run(model, ids), wanted, rtol=1e-5, atol=1e-5)


def test_one_token_changes_only_itself_and_later_ones_of_its_row(model):
    ids = prompts(3, 1)
    stock = run(model, ids)
    with patched(model, [Patch(1, torch.tensor([2]), torch.tensor([4]), torch.ones(1, WIDTH))]):
        changed = (run(model, ids) != stock).any(-1)
    assert not changed[:2].any()
    assert changed[2].tolist() == [False] * 4 + [True] * (TOKENS - 4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(model, side):
    """A padded row is patched as it would be alone; columns count from the start of the batch."""
    ids, lengths = prompts(2, 1), (5, TOKENS)
    mask = torch.ones_like(ids)
    offset = TOKENS - lengths[0] if side == "left" else 0
    real = ids[0, : lengths[0]].clone()
    ids[0] = 0
    ids[0, offset : offset + lengths[0]] = real
    mask[0] = 0
    mask[0, offset : offset + lengths[0]] = 1
    put = torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(3))
    with patched(model, [Patch(1, torch.tensor([0]), torch.tensor([0]), put)]):
        alone = run(model, real[None])[0]
    with patched(model, [Patch(1, torch.tensor([0]), torch.tensor([offset]), put)]):
        batch = run(model, ids, mask)
    torch.testing.assert_close(batch[0, offset : offset + lengths[0]], alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(batch[1], run(model, ids[1:])[0], rtol=1e-4, atol=1e-4)


def test_padding_own_states_change_no_bit(model):
    ids = prompts(2, 1)
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    h, stock = residual(model, ids, mask)
    with patched(model, [whole(2, h[3])]):
        assert torch.equal(run(model, ids, mask), stock)


def brute_force(model, ids, tokens, put, score, lengths):
    """One forward per pair, layer and token, unpadded, with a hook written for it."""
    found = torch.empty(put.shape[:3])
    for n, layer, t in torch.cartesian_prod(*(torch.arange(k) for k in put.shape[:3])).tolist():

        def hook(block, args, out, n=n, layer=layer, t=t):
            out = out.clone()
            out[0, tokens[n, t]] = put[n, layer, t]
            return out

        handle = model.model.layers[layer].register_forward_hook(hook)
        found[n, layer, t] = score(run(model, ids[n : n + 1, : lengths[n]])[:, -1])[0]
        handle.remove()
    return found


def margin(logits):
    return logits[:, 5] - logits[:, 6]


@pytest.mark.parametrize("batch_size", [1, 7, 512])
@pytest.mark.parametrize("lengths", [(TOKENS, TOKENS), (TOKENS, 6)], ids=["one length", "padded"])
def test_a_sweep_is_a_loop_over_layers_and_tokens(model, batch_size, lengths):
    ids, donors = prompts(2, 1), prompts(2, 2)
    mask = (torch.arange(TOKENS) < torch.tensor(lengths)[:, None]).long()
    tokens = torch.tensor([[0, 3, 4, 5], [1, 2, 3, 4]])
    h, _ = residual(model, donors)
    put = h[1:].permute(1, 0, 2, 3)[torch.arange(2)[:, None], :, tokens].transpose(1, 2)
    done = []
    found = sweep(model, ids, tokens, put, margin, mask=mask, batch_size=batch_size, step=done.append)
    assert found.shape == (2, LAYERS, 4)
    assert sum(done) == found.numel()
    torch.testing.assert_close(found, brute_force(model, ids, tokens, put, margin, lengths), rtol=1e-4, atol=1e-4)


def test_next_logits_are_those_of_each_rows_last_token(model):
    ids, lengths = prompts(3, 1), torch.tensor([4, TOKENS, 7])
    mask = (torch.arange(TOKENS) < lengths[:, None]).long()
    alone = torch.stack([run(model, ids[n : n + 1, : lengths[n]])[0, -1] for n in range(3)])
    torch.testing.assert_close(next_logits(model, ids, mask), alone, rtol=1e-4, atol=1e-4)
    assert torch.equal(next_logits(model, ids), run(model, ids)[:, -1])


def test_a_session_steers_the_replaced_state(model):
    ids, vector = prompts(1, 1), torch.randn(WIDTH, generator=torch.Generator().manual_seed(4))
    put = torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(5))
    token = (torch.tensor([0]), torch.tensor([3]))
    with patched(model, [Patch(1, *token, put + vector)]):
        wanted = run(model, ids)
    plan = sk.Plan(sk.add(vector), layers=1, site="resid_post", scope=3 - TOKENS, name="p")
    for fuse in ("all", "none"):
        with sk.steer(model, plan, fuse=fuse), patched(model, [Patch(1, *token, put)]):
            torch.testing.assert_close(run(model, ids), wanted, rtol=1e-4, atol=1e-4)


def test_the_model_is_restored_after_an_error(model):
    ids = prompts(1, 1)
    stock = run(model, ids)
    with pytest.raises(RuntimeError, match="mine"), patched(model, [Patch(0, *torch.zeros(2, 1).long(), put())]):
        raise RuntimeError("mine")
    assert torch.equal(run(model, ids), stock)
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in model.model.layers)


def put(width=WIDTH):
    return torch.ones(1, width)


def test_bad_input(model):
    one = torch.zeros(1, dtype=torch.long)
    for fault, sentence in (
        (lambda: Patch(0, one, one, torch.ones(2, WIDTH)), "layer 0: rows"),
        (lambda: Patch(0, one, one - 1, put()), "count from 0"),
        (lambda: Patch(0, one.repeat(2), one.repeat(2), torch.ones(2, WIDTH)), "two states for one token"),
        (lambda: patched(model, [], site="resid_mid").__enter__(), "site must be one of resid_pre, resid_post"),
        (lambda: patched(model, [Patch(4, one, one, put())]).__enter__(), "layer 4: the model has 4 decoder layers"),
        (lambda: patched(model, [Patch(0, one, one, put(7))]).__enter__(), "states of width 7, the model has 48"),
        (lambda: sweep(model, prompts(1, 1), one[None], torch.ones(1, 4, 2, WIDTH), margin), "are needed, got"),
    ):
        with pytest.raises(ValueError, match=sentence):
            fault()
    late = Patch(0, one, one + TOKENS, put())
    with pytest.raises(PlanError, match=r"column 9, the batch is \[1, 9\]"), patched(model, [late]):
        run(model, prompts(1, 1))


def test_models_and_tokenizers_that_do_not_fit(model):
    from steerkern import organism

    check_exchange(model, tiny_llama(1))
    with pytest.raises(ValueError, match="their width is 48 and 64"):
        check_exchange(model, tiny_llama(0, hidden_size=64))
    with pytest.raises(ValueError, match="their number of layers is 4 and 3"):
        check_exchange(model, tiny_llama(0, num_hidden_layers=3))
    _, tokenizer = organism.load("bare")

    def letters(texts):
        return {"input_ids": [list(map(ord, text)) for text in texts]}

    check_tokenizers(tokenizer, tokenizer, ["steal the kite"])
    with pytest.raises(ValueError, match="read 'steal the kite' differently"):
        check_tokenizers(tokenizer, letters, ["steal the kite"])


def test_states_that_were_captured_go_in_as_they_came_out():
    """``extraction.states`` row ``l + 1`` is ``resid_post[l]``."""
    from steerkern import organism

    model, tokenizer = organism.load()
    (prompt,) = render(tokenizer, ["paint the chair"])
    ids = torch.tensor([prompt.ids])
    kept = states(model, [prompt], [-2, -1], progress=False)
    stock = run(model, ids)
    columns = torch.tensor([len(prompt.ids) - 2, len(prompt.ids) - 1])
    for layer in range(4):
        with patched(model, [Patch(layer, torch.tensor([0, 0]), columns, kept[0, layer + 1])]):
            assert torch.equal(run(model, ids), stock)
