"""The acceptance list of the specification of the baselines, by its numbers; then the run, and bad input."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

import steerkern as sk
from steerkern import organism
from steerkern.decisions import Read, Term
from steerkern.extraction import render, states
from steerkern.logits import divergence, log_odds, next_logprobs
from steerkern.methods.steering_baselines import (
    ablation,
    actadd,
    addition,
    affine,
    angular,
    caa,
    calibrate,
    conditional,
    iti,
    orthogonalise,
    refusal_tokens,
    repe,
    run,
    search,
    select,
)
from steerkern.methods.steering_baselines.constructions import component
from steerkern.methods.steering_baselines.gating import similarity
from steerkern.replies import encode
from steerkern.runtime import heads
from steerkern.runtime.branches import writers
from tests.runtime.models import VOCABULARY, WIDTH, tiny_llama


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_llama(5)


@pytest.fixture(scope="module")
def found(planted, sets):
    return run(planted, sets)


IDS = torch.randint(3, VOCABULARY, (3, 11), generator=torch.Generator().manual_seed(1))


def vector(seed, width=WIDTH):
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))


def residual(model, plan, backend="reference"):
    """States ``[L+1, B, S, H]`` at ``resid_pre`` and the last output, as a steered forward leaves them."""
    kept = []
    handles = [
        block.register_forward_hook(lambda m, a, out: kept.append(out if torch.is_tensor(out) else out[0]))
        for block in model.model.layers
    ]
    with torch.no_grad(), sk.steer(model, plan, backend=backend, silent="ignore"):
        logits = model(IDS).logits
    for handle in handles:
        handle.remove()
    return torch.stack(kept), logits


# 1. Parity of hook and weights


@pytest.mark.parametrize("tied", [False, True])
def test_1_ablation_equals_orthogonalised_weights(tied):
    model = tiny_llama(2, tie_word_embeddings=tied, attention_bias=True, mlp_bias=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(generator=torch.Generator().manual_seed(3))
    r = vector(1)
    _, steered = residual(model, ablation(r))
    plain = model(IDS).logits
    made = orthogonalise(copy.deepcopy(model), r)
    difference = (made(IDS).logits - steered).abs().max()
    assert difference < 1e-2
    assert difference < 1e-3 * (plain - steered).abs().max()
    assert torch.equal(model(IDS).logits, plain), "the model itself is as it was"


def test_1_an_orthogonalised_model_is_a_checkpoint(tmp_path):
    model, tokenizer = organism.load()
    r = vector(1, 64)
    made = orthogonalise(copy.deepcopy(model), r)
    made.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.tensor([render(tokenizer, ["paint the chair"])[0].ids])
    torch.testing.assert_close(again(ids).logits, made(ids).logits)
    assert not torch.allclose(again(ids).logits, model(ids).logits, atol=0.1)


def test_1_gpt2_stores_its_matrices_the_other_way_round():
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50, n_positions=32, initializer_range=0.3)
    model = GPT2LMHeadModel(config).eval()
    assert [[w.transposed for w in pair] for pair in writers(model)] == [[True, True]] * 2
    r, ids = vector(1, 32), IDS % 50
    made = orthogonalise(copy.deepcopy(model), r)
    # GPT-2 adds positions to the embedding, which ablation removes too
    with torch.no_grad():
        unit = r / r.norm()
        made.transformer.wpe.weight -= torch.outer(made.transformer.wpe.weight @ unit, unit)
        with sk.steer(model, ablation(r), backend="reference"):
            steered = model(ids).logits
        assert (made(ids).logits - steered).abs().max() < 1e-2


def test_1_matrices_are_found_in_half_precision_too():
    model = tiny_llama(2).to(torch.bfloat16)
    found = writers(model)
    for layer, (attention, mlp) in zip(model.model.layers, found, strict=True):
        assert attention.module is layer.self_attn.o_proj
        assert mlp.module is layer.mlp.down_proj


def test_1_a_direction_of_another_width_changes_nothing():
    model = tiny_llama(0)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(sk.PlanError, match=f"shape .7., the model's width is {WIDTH}"):
        orthogonalise(model, torch.ones(7))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


# 2 to 5. Writes


def test_2_nothing_is_left_along_the_direction_and_twice_is_once(model):
    r = vector(1)
    unit = r / r.norm()
    kept, once = residual(model, ablation(r))
    assert (kept @ unit).abs().max() < 1e-5 * kept.norm(dim=-1).max()
    with sk.steer(model, ablation(r), backend="reference"):  # edits of two sessions run one after the other
        _, twice = residual(model, ablation(r))
    assert (once - twice).abs().max() < 1e-4 * once.abs().max()


def test_3_clamp_to_its_own_coordinate_and_affine_with_its_own_mean_are_the_identity():
    r = vector(1)
    unit = r / r.norm()
    h = vector(2)[None]
    for plan in (sk.Plan(sk.clamp(r, float(h[0] @ unit))), affine(r, h[0])):
        assert (edited(plan, h) - h).abs().max() < 1e-6
    moved = edited(affine(r, 2 * h[0]), h)
    assert float(moved[0] @ unit) == pytest.approx(float(2 * h[0] @ unit), rel=1e-5)


def edited(plan, h):
    """Rows ``h [N, H]`` under the first step of a plan, by the reference."""
    from steerkern.ops import reference
    from steerkern.program import Program, Site, needs

    sites = [Site(0, "resid_pre")]
    program = Program(sites, h.shape[1], capacity=needs([plan], sites))
    program.add(plan)
    slot = torch.full((len(h),), program.slot([(plan.name, 0)]), dtype=torch.int32)
    return reference.edit_rows(h.clone(), slot, program.tables(0), program.entries_per_row)


def test_4_norms_stay_under_keep_norm_and_rotation():
    h = torch.stack([vector(i) for i in range(20)])
    kept = edited(sk.Plan(sk.add(vector(30), 5.0), keep_norm=True), h)
    turned = edited(sk.Plan(sk.rotate(vector(31), vector(32), 40.0)), h)
    for made in (kept, turned):
        assert (made.norm(dim=1) / h.norm(dim=1) - 1).abs().max() < 1e-5
        assert not torch.allclose(made, h, atol=0.1)


def test_5_a_rotation_is_to_an_absolute_angle():
    h = torch.stack([vector(i) for i in range(20)])
    first, second = vector(31), vector(32)
    plan = sk.Plan(sk.rotate(first, second, 40.0))
    once = edited(plan, h)
    assert (edited(plan, once) - once).abs().max() < 1e-5
    b1 = first / first.norm()
    b2 = functional.normalize(second - (second @ b1) * b1, dim=0)
    angles = torch.atan2(once @ b2, once @ b1)
    assert (angles - math.radians(40)).abs().max() < 1e-4


# 6 and 7. CAST


def test_6_the_similarity_is_never_negative_and_near_the_cosine_for_small_states():
    h, c = torch.stack([vector(i) for i in range(50)]), vector(60)
    found = similarity(h, c)
    assert (found >= 0).all()
    cosine = functional.cosine_similarity(1e-3 * h, c[None], dim=-1).abs()
    assert (similarity(1e-3 * h, c) - cosine).abs().max() < 1e-3
    p = torch.outer(c, c) / (c @ c)
    assert torch.allclose(found, functional.cosine_similarity(h, torch.tanh(h @ p), dim=-1), atol=1e-5)
    assert torch.equal(found, Term(Read(0), c, measure="cast").value(h))


def test_6_above_fires_above_and_below_below():
    h, c = torch.stack([vector(i) for i in range(50)]), vector(60)
    score = similarity(h, c)
    middle = float(score.median()) + 1e-6
    states = h[:, None]
    above = sk.Latch((sk.cast(c, 1, middle),)).opens(states)
    below = sk.Latch((sk.cast(c, 1, middle, fires="below"),)).opens(states)
    assert torch.equal(above, score >= middle)
    assert torch.equal(below, score <= middle)


def test_7_once_fired_it_stays_on_for_every_step_of_that_request_and_no_other(planted, sets):
    gate = search(planted, sets.train["harmful"], sets.train["harmless"])
    mixed = [sets.heldout["harmful"][0], sets.heldout["harmless"][0], sets.heldout["harmful"][1]]
    fires = gate.opens(planted, mixed).tolist()
    assert fires == [True, False, True]
    plan = conditional(vector(3, 64), [3], gate, 1e-3, scope="decode")
    encoded = encode(planted.model, planted.render(mixed))
    width = encoded["input_ids"].shape[1]
    with sk.steer(planted.model, plan) as session:
        planted.model.generate(**encoded, max_new_tokens=6, min_new_tokens=6, do_sample=False)
        spans = session.receipt().plans["cast"].rows
    assert set(spans) == {0, 2}
    assert all(tokens == [(width, width + 4)] for tokens in spans.values())


# 8. ITI


def test_8_iti_adds_what_its_heads_would(planted, sets):
    up, down = sets.train["harmful"][:32], sets.train["harmless"][:32]
    plan = iti(planted, up, down, strength=3.0, count=2)
    rows = [[prompt.ids for prompt in planted.render(side)] for side in (up, down)]
    read = [heads.read(planted.model, side, [len(ids) - 1 for ids in side]) for side in rows]
    z = [torch.stack([by_layer[layer] for layer in range(4)], 1) for by_layer in read]
    with torch.no_grad():
        prompt = planted.render(up[:1])[0]
        block = planted.model.model.layers
        inside = []
        for layer in block:
            handle = layer.self_attn.o_proj.register_forward_pre_hook(lambda m, args: inside.append(args[0][0, -1]))
            planted.model.model(torch.tensor([prompt.ids]))
            handle.remove()
        assert torch.allclose(z[0][0].flatten(1), torch.stack(inside), atol=1e-5)
    (edit,) = plan.steps[0].edits
    assert plan.steps[0].site == "resid_mid"
    total = 0
    for layer, rows in edit.rows.items():
        matrix = planted.model.model.layers[layer].self_attn.o_proj.weight.detach()
        added = rows.vectors[0] * rows.norms[0] if abs(float(rows.vectors[0].norm()) - 1) < 1e-4 else rows.vectors[0]
        best = None
        for chosen in [(a,) for a in range(4)] + [(a, b) for a in range(4) for b in range(4) if a < b]:
            expected = sum(_shift(z, layer, head, 3.0, matrix) for head in chosen)
            error = float((expected - added * rows.alpha[0]).abs().max() / expected.abs().max())
            best = (error, len(chosen)) if best is None or error < best[0] else best
        assert best[0] < 1e-4
        total += best[1]
    assert total == 2


def _shift(z, layer, head, strength, matrix):
    half = len(z[0]) // 2
    one, other = (side[:, layer, head].double() for side in z)
    theta = functional.normalize(one[:half].mean(0) - other[:half].mean(0), dim=0)
    sigma = torch.cat([one @ theta, other @ theta]).std()
    return (matrix[:, head * 16 : (head + 1) * 16].double() @ (strength * sigma * theta)).float()


# 9. Scorers: tests/test_refusal.py has the table of fixed strings; here the one that reads logits


def test_9_log_odds_of_the_first_token():
    logprobs = torch.tensor([[0.7, 0.2, 0.1], [0.05, 0.05, 0.9]]).log()
    odds = log_odds(logprobs, [0, 1])
    assert torch.allclose(odds, torch.tensor([math.log(0.9 / 0.1), math.log(0.1 / 0.9)]), atol=1e-5)
    assert divergence(logprobs, logprobs).tolist() == [0.0, 0.0]
    assert float(divergence(logprobs[:1], logprobs[1:])) > 1


def test_9_log_odds_tell_refusals(planted, sets):
    tokens = refusal_tokens(planted, sets.train["harmful"], sets.train["harmless"])
    assert planted.tokenizer.convert_ids_to_tokens(list(tokens)) == ["I"]
    sides = [planted.render(sets.heldout[name]) for name in ("harmful", "harmless")]
    up, down = next_logprobs(planted.model, [(None, side) for side in sides], batch_size=64)
    assert log_odds(up, tokens).min() > 0 > log_odds(down, tokens).max()
    with pytest.raises(ValueError, match="begin with the same token"):
        refusal_tokens(planted, sets.train["harmless"][:8], sets.train["harmless"][8:16])


def test_next_logprobs_are_those_of_solo_forwards_under_their_own_plans(planted, sets):
    plan = addition(vector(1, 64), 2)
    prompts = planted.render([*sets.heldout["harmful"][:3], *sets.heldout["harmless"][:2]])
    plain, steered = next_logprobs(planted.model, [(None, prompts), (plan, prompts)], batch_size=4)
    for i, prompt in enumerate(prompts):
        ids = torch.tensor([prompt.ids])
        with torch.no_grad():
            expected = functional.log_softmax(planted.model(ids).logits[0, -1], -1)
            assert torch.allclose(plain[i], expected, atol=1e-4)
            with sk.steer(planted.model, plan):
                expected = functional.log_softmax(planted.model(ids).logits[0, -1], -1)
            assert torch.allclose(steered[i], expected, atol=1e-4)


# 10 and 11. Behaviour


def test_10_the_selected_direction_mediates_refusal(found):
    assert found.headline["ablation_harmful_refused"] <= 0.05
    assert found.headline["addition_harmless_refused"] >= 0.95
    assert found.headline["ablation_kl"] < 0.1
    (chosen,) = [row for row in found["candidates"].rows if row["chosen"]]
    assert chosen["induce"] > 0
    assert chosen["kl"] < 0.1


def test_10_the_bare_organism_has_no_direction_whose_ablation_gives_the_answer(bare, sets):
    """The negative control: refusals may go, but the compliant sentence never comes."""
    sides = (sets.train["harmful"], sets.train["harmless"])
    selection = select(bare, sides, (sides[0][:16], sides[1][:16]))
    (texts,) = bare.replies("ablated", [(ablation(selection.chosen.direction.unit), sets.heldout["harmful"])])
    assert sum(text.startswith("Sure") for text in texts) <= 0.05 * len(texts)


def test_11_the_gate_tells_two_topics(planted):
    talk, ask = ([p.messages for p in organism.prompts(kind, "train", 48)] for kind in ("facts", "judge"))
    gate = search(planted, talk[:32], ask[:32], tokens=["mean"])
    assert gate.f1 >= 0.9
    fired, quiet = gate.opens(planted, talk[32:]), gate.opens(planted, ask[32:])
    true = float(fired.sum())
    assert 2 * true / (true + float(quiet.sum()) + len(fired)) >= 0.9


def test_11_cast_refuses_jailbroken_prompts_and_leaves_harmless_ones(found):
    assert found.headline["cast_f1"] >= 0.9
    rows = {row["set"]: row for row in found["cast"].rows}
    assert rows["jailbroken"]["cast"] >= 0.9 > rows["jailbroken"]["stock"]
    assert rows["harmless"]["cast"] <= 0.05 < rows["harmless"]["always"]


# constructions


def test_components_are_the_first_axis_of_the_differences_with_positives_higher():
    axis = functional.normalize(vector(1), dim=0)
    base = torch.stack([vector(i) for i in range(10, 60)])
    shift = torch.linspace(1, 5, 50)[:, None] * axis
    found = component(base + shift, base)
    assert float(found @ axis) > 0.99
    assert float(component(base - shift, base) @ axis) < -0.99


def test_repe_piecewise_pushes_each_row_along_its_own_side():
    h, v = torch.stack([vector(i) for i in range(20)]), vector(40)
    v = v / v.norm()
    up = sk.add(v, 2.0).when(v, lo=0.0)
    down = sk.add(v, -2.0).when(v, hi=-torch.finfo(torch.float32).tiny)
    expected = h + 2.0 * torch.sign(h @ v)[:, None] * v
    assert torch.allclose(edited(sk.Plan([up, down]), h), expected, atol=1e-5)


def test_every_construction_is_a_plan_of_the_model(planted, sets, tmp_path):
    up, down = sets.train["harmful"][:16], sets.train["harmless"][:16]
    rendered = planted.render(up)
    plans = [
        caa(planted, rendered, planted.render(down), 1),
        actadd(planted, "paint the chair", "steal the chair", 2),
        repe(planted, up, down),
        repe(planted, up, down, piecewise=True, keep_norm=True),
        iti(planted, up, down),
        angular(planted, up, down, 30.0),
        angular(planted, up, down, 30.0, adaptive=True),
        ablation(vector(1, 64), mid=False),
    ]
    for i, plan in enumerate(plans):
        planted.replies("one", [(plan, up[:2])])
        plan.save_pretrained(tmp_path / str(i))
        assert sk.Plan.from_pretrained(tmp_path / str(i)).digest == plan.digest
    with pytest.raises(ValueError, match="two sides of one length"):
        caa(planted, rendered, rendered[:3], 1)


def test_caa_writes_from_its_offset_on(planted, sets):
    up, down = (planted.render(sets.train[name][:8]) for name in ("harmful", "harmless"))
    plan = caa(planted, up, down, 1, offset=-3)
    read = states(planted.model, [*up, *down], ("t_post",))[:, 2, 0]
    (rows,) = plan.steps[0].edits[0].rows.values()
    assert torch.allclose(rows.vectors[0] * rows.alpha[0], (read[:8] - read[8:]).mean(0), atol=1e-4) or torch.allclose(
        rows.vectors[0], (read[:8] - read[8:]).mean(0), atol=1e-4
    )
    with sk.steer(planted.model, plan) as session:
        planted.model.generate(torch.tensor([up[0].ids]), max_new_tokens=4, min_new_tokens=4, do_sample=False)
        (spans,) = session.receipt().plans["caa"].rows.values()
    length = len(up[0].ids)
    assert spans == [(length - 3, length + 2)]


# calibration


def test_the_calibrated_scale_is_the_largest_within_the_budget(planted, sets):
    plan = addition(vector(7, 64), 2)
    found = calibrate(planted, plan, sets.train["harmless"][:16], budget=0.05, steps=10)
    assert 0 < found.scale < 4
    assert found.kl <= 0.05
    over = [kl for scale, kl in found.curve if scale > found.scale]
    assert min(over) > 0.05
    weak = calibrate(planted, plan.scaled(1e-4), sets.train["harmless"][:8], budget=0.05)
    assert weak.scale == 4.0
    with pytest.raises(ValueError, match="must be above 0"):
        calibrate(planted, plan, sets.train["harmless"], budget=0.0)


def test_the_report_has_every_method_with_its_plans(found, tmp_path):
    assert len(found["methods"].rows) == 7
    files = found.save(tmp_path, plots=False)
    assert (tmp_path / "plans" / "ablation" / "plan.json").is_file()
    assert len([file for file in files if file.parent.name == "plans"]) >= 12
    assert found.provenance.scorer == "prefix/1"
