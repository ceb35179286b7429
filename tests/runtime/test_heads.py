"""The head site: scales with norm repair, contributions, and where it is found (refusal cliff, list 1 to 5)."""

from __future__ import annotations

import pytest
import torch

import steerkern as sk
from steerkern.runtime import heads
from tests.runtime import families
from tests.runtime.models import LAYERS, VOCABULARY, tiny_llama

HEADS = 4
HEAD = (2, 1)
NAMED = [(layer, head) for layer in range(LAYERS) for head in range(HEADS)]


def projection(model, layer):
    return model.model.layers[layer].self_attn.o_proj


def watched(model, layer, ids, **inputs):
    """Input and output of the projection of ``layer``, as it runs."""
    seen = []
    # behind the handlers, which stand around the whole call
    handle = projection(model, layer).register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    try:
        with torch.no_grad():
            model(ids, use_cache=False, **inputs)
    finally:
        handle.remove()
    return seen[0]


def test_1_scales_of_one_change_no_bit(model, ids):
    stock = model(ids).logits
    for repair in ("token", "global", None):
        with heads.scaled(model, dict.fromkeys(NAMED, 1.0), repair=repair):
            assert torch.equal(model(ids).logits, stock)


@pytest.mark.parametrize("repair", ["token", "global", None])
def test_2_a_head_at_zero_contributes_nothing_and_the_norm_is_kept(model, ids, repair):
    layer, head = HEAD
    before, _ = watched(model, layer, ids)
    with heads.scaled(model, {HEAD: 0.0}, repair=repair):
        after, out = watched(model, layer, ids)
    site = heads.find(model)[layer]
    assert not after.unflatten(-1, (HEADS, -1))[..., head, :].any()
    parts = heads.contributions(site, after.reshape(-1, HEADS, site.size))
    assert not parts[:, head].any()
    assert torch.allclose(parts.sum(1).view_as(out), out, atol=1e-5)
    if repair == "token":
        assert torch.allclose(after.norm(dim=-1), before.norm(dim=-1), rtol=1e-4)
    if repair == "global":
        assert torch.allclose(after.norm(), before.norm(), rtol=1e-4)
        assert not torch.allclose(after.norm(dim=-1), before.norm(dim=-1), rtol=1e-4)


def test_2_other_heads_keep_their_direction(model, ids):
    layer, head = HEAD
    before, _ = watched(model, layer, ids)
    with heads.scaled(model, {HEAD: 0.0}):
        after, _ = watched(model, layer, ids)
    kept = [h for h in range(HEADS) if h != head]
    ratio = (after / before).unflatten(-1, (HEADS, -1))[..., kept, :].flatten(-2)
    assert torch.allclose(ratio, ratio[..., :1].expand_as(ratio), rtol=1e-3)


@pytest.mark.parametrize("repair", ["token", None])
def test_3_the_last_token_never_changes_earlier_logits(model, ids, repair):
    other = ids.clone()
    other[:, -1] = (ids[:, -1] + 1) % VOCABULARY
    with heads.scaled(model, {HEAD: 0.0, (0, 3): 2.5}, repair=repair):
        assert torch.equal(model(ids).logits[:, :-1], model(other).logits[:, :-1])


def test_3_the_global_repair_is_not_causal(model, ids):
    """The control: the published repair does couple tokens."""
    other = ids.clone()
    other[:, -1] = (ids[:, -1] + 1) % VOCABULARY
    with heads.scaled(model, {HEAD: 0.0}, repair="global"):
        assert not torch.equal(model(ids).logits[:, :-1], model(other).logits[:, :-1])


@pytest.mark.parametrize("biased", [False, True])
def test_4_contributions_add_up_to_the_attention_branch(ids, biased):
    model = tiny_llama(attention_bias=biased)
    rows = ids.tolist()
    z = heads.read(model, rows, [8, 5, 0], batch_size=2)
    for layer, site in heads.find(model).items():
        _, out = watched(model, layer, ids)
        wanted = torch.stack([out[0, 8], out[1, 5], out[2, 0]])
        bias = projection(model, layer).bias
        total = heads.contributions(site, z[layer]).sum(1) + (0 if bias is None else bias)
        assert z[layer].shape == (3, HEADS, 12)
        assert torch.allclose(total, wanted, atol=1e-5)


def test_4_contributions_are_slices_of_the_weight(model):
    site = heads.find(model)[1]
    z = torch.randn(5, HEADS, site.size)
    weight = projection(model, 1).weight.unflatten(1, (HEADS, site.size))
    assert torch.allclose(heads.contributions(site, z), torch.einsum("nhs,dhs->nhd", z, weight), atol=1e-5)


def test_5_prefill_and_decode_equal_a_full_recompute(model, ids):
    scales = {HEAD: 0.0, (0, 2): 3.0}
    with heads.scaled(model, scales):
        made = model.generate(
            ids, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_logits=True, eos_token_id=None
        )  # fmt: skip
        whole = model(made.sequences).logits
    for step, logits in enumerate(made.logits):
        assert torch.allclose(whole[:, 8 + step], logits, atol=1e-4)
    stock = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert not torch.equal(stock, made.sequences)


def test_a_row_depends_on_no_other_row_and_on_no_padding(model, ids):
    with heads.scaled(model, {HEAD: 0.0}), torch.no_grad():
        together = model(ids).logits
        for i in range(len(ids)):
            assert torch.allclose(model(ids[i : i + 1]).logits[0], together[i], atol=1e-5)
        padded = torch.cat([torch.zeros(3, 4, dtype=torch.long), ids], 1)
        mask = (torch.arange(13) >= 4).long().expand(3, -1)
        places = (mask.cumsum(1) - 1).clamp(min=0)
        shifted = model(padded, attention_mask=mask, position_ids=places).logits[:, 4:]
        assert torch.allclose(shifted, together, atol=1e-4)


def test_query_heads_that_share_keys_are_told_apart(model, ids):
    """Heads 0 and 1 share one key-value head: switching one off leaves the other."""
    outs = []
    for head in (0, 1):
        with heads.scaled(model, {(1, head): 0.0}, repair=None):
            outs.append(watched(model, 1, ids)[0].unflatten(-1, (HEADS, -1)).any(-1))
    assert outs[0][..., 1].all()
    assert outs[1][..., 0].all()
    assert not outs[0][..., 0].any()
    assert not outs[1][..., 1].any()


def test_all_heads_at_zero_give_zero_and_no_nan(model, ids):
    with heads.scaled(model, {(1, head): 0.0 for head in range(HEADS)}):
        assert not watched(model, 1, ids)[1].any()


def test_half_types_repair_the_norm_in_fp32():
    z = 200 * torch.randn(3, 4 * 64).half()  # the square of 200 is out of range
    scales = torch.tensor([0.0, 1.0, 1.0, 1.0])
    out = heads.rescale(z, scales)
    assert out.dtype == torch.float16
    assert torch.allclose(out.float().norm(dim=-1), z.float().norm(dim=-1), rtol=2e-3)


def test_the_model_is_what_it_was_also_after_an_error(model, ids):
    stock, kinds = model(ids).logits, [type(module) for module in model.modules()]
    with pytest.raises(RuntimeError, match="in between"), heads.scaled(model, {HEAD: 0.0}):
        raise RuntimeError("in between")
    assert [type(module) for module in model.modules()] == kinds
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert torch.equal(model(ids).logits, stock)


def test_two_contexts_and_a_session_stand_together(model, ids, vector):
    plan = sk.Plan(sk.add(vector, 1.0), layers=1, name="p")
    with heads.scaled(model, {HEAD: 0.0}):
        one = model(ids).logits
        with heads.scaled(model, {(0, 0): 0.0}), sk.steer(model, plan):
            assert not torch.equal(model(ids).logits, one)
        assert torch.equal(model(ids).logits, one)


def test_training_mode_and_hooks_survive_the_search(model):
    model.train()
    handle = model.model.layers[0].register_forward_pre_hook(lambda module, args: None)
    heads.find(model)
    assert all(module.training for module in model.modules())
    assert len(model.model.layers[0]._forward_pre_hooks) == 1
    handle.remove()


def test_what_cannot_be_scaled_is_refused(model):
    with pytest.raises(sk.PlanError, match=r"layer 9: there are heads to scale in layers 0\.\.3"):
        heads.scaled(model, {(9, 0): 0.0}).__enter__()
    with pytest.raises(sk.PlanError, match=r"head 4 of layer 1: the layer has heads 0\.\.3"):
        heads.scaled(model, {(1, 4): 0.0}).__enter__()
    with pytest.raises(ValueError, match="head 0 of layer 1 must be a finite number, got nan"):
        heads.scaled(model, {(1, 0): float("nan")}).__enter__()
    with pytest.raises(ValueError, match="repair must be 'token', 'global' or None, got 'row'"):
        heads.scaled(model, {HEAD: 0.0}, repair="row").__enter__()


# families

FOUND = {
    "llama": "o_proj", "qwen2": "o_proj", "qwen3": "o_proj", "gemma2": "o_proj", "phi3": "o_proj", "mixtral": "o_proj",
    "gpt2": "c_proj", "gpt_neox": "dense", "falcon": "dense", "bloom": "dense", "mpt": "out_proj", "opt": "out_proj",
    "gptj": "out_proj", "deepseek_v3": "o_proj", "bitnet": "o_proj", "olmo2": "o_proj", "dbrx": "out_proj",
}  # fmt: skip
KNOWN = {family.name: family for family in families.FAMILIES}


@pytest.mark.parametrize("name", FOUND)
def test_the_projection_behind_attention_is_found_in_every_layer(name):
    model = families.build(KNOWN[name])
    names = {module: path for path, module in model.named_modules()}
    found = heads.find(model)
    assert list(found) == [0, 1, 2]
    assert {names[site.module].rpartition(".")[2] for site in found.values()} == {FOUND[name]}


@pytest.mark.parametrize(("name", "layers"), [("lfm2", [1]), ("jamba", [1]), ("qwen3_next", [1])])
def test_layers_without_attention_have_no_heads(name, layers):
    assert list(heads.find(families.build(KNOWN[name]))) == layers


@pytest.mark.parametrize(
    ("name", "reason"),
    [("mamba", "MambaForCausalLM has no head site"), ("gemma3n_text", "the block's state has shape")],
)
def test_families_without_a_head_site_are_refused(name, reason):
    with pytest.raises(sk.PlanError, match=reason):
        heads.find(families.build(KNOWN[name]))


def test_a_graph_that_was_compiled_before_is_not_used_for_scaled_heads(model, ids):
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        stock = compiled(ids).logits
        with heads.scaled(compiled, {HEAD: 0.0}):
            scaled = compiled(ids).logits
            assert torch.allclose(scaled, model(ids).logits, atol=1e-4)
        assert not torch.allclose(scaled, stock, atol=1e-2)
        assert torch.equal(compiled(ids).logits, stock)


def test_generation_with_a_static_cache(model, ids):
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    with heads.scaled(model, {HEAD: 0.0}):
        grown = model.generate(ids, **options)
        static = model.generate(ids, cache_implementation="static", disable_compile=True, **options)
    assert torch.equal(grown, static)
