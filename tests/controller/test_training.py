"""Training: which weights a loss reaches, equal bits for equal seeds, early stopping, and the outcome loss."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from steerkern import PlanError
from steerkern.controller import (
    CODE,
    OUTCOME,
    PAPER,
    Controller,
    OutcomeObjective,
    Scores,
    bce,
    cache_states,
    score_objective,
    train,
)
from steerkern.controller.injection import frozen, injected
from steerkern.controller.outcome import example
from steerkern.decisions import Read
from steerkern.organism.vocabulary import REFUSAL

READS = (Read(0, "resid_post"), Read(1, "resid_post"))


def made(preset=PAPER, reads=READS, width=6, layers=3, seed=0, **options):
    given = {"hidden": 16, "layer_norm": preset.layer_norm, "weights": preset.weights, "seed": seed, **options}
    return Controller(reads, range(layers), width, **given)


def clouds(count=40, width=6):
    """Two separable sets of states ``[N, 2, H]``."""
    generator = torch.Generator().manual_seed(0)
    up, down = (torch.randn(count, 2, width, generator=generator) for _ in range(2))
    up[:, :, 0] += 4.0
    return up, down


def everyone(count):
    return torch.arange(count), torch.arange(count)


def test_the_paper_loss_gives_the_layer_weights_exactly_no_gradient():
    controller = made()
    score_objective(controller, clouds(), PAPER)(*everyone(40)).backward()
    rows, bias = controller.output.weight.grad, controller.output.bias.grad
    assert torch.equal(rows[1:], torch.zeros_like(rows[1:]))
    assert torch.equal(bias[1:], torch.zeros(3))
    assert rows[0].any()
    assert bias[0] != 0
    assert controller.input.weight.grad.any()


def test_after_training_by_the_paper_the_layer_weights_are_as_they_were_drawn():
    controller, drawn = made(), made()
    train(controller, score_objective(controller, clouds(), PAPER), (40, 40), PAPER)
    assert torch.equal(controller.output.weight[1:], drawn.output.weight[1:])
    assert not torch.equal(controller.output.weight[0], drawn.output.weight[0])


def test_the_code_loss_reaches_the_layer_weights_through_its_regulariser_alone():
    states = clouds()
    controller, regulariser = made(CODE), made(CODE)
    score_objective(controller, states, CODE)(*everyone(40)).backward()
    w = regulariser.scores(states[0])[1]
    (0.1 * ((w - 0.5).abs().mean() + 0.01 * w.mean())).backward()
    torch.testing.assert_close(controller.output.weight.grad[1:], regulariser.output.weight.grad[1:])
    assert controller.output.weight.grad[1:].any()
    s, w = controller.scores(states[0])
    s.retain_grad()
    bce(Scores(s, w.detach()), Scores(*controller.scores(states[1]))).backward()
    assert s.grad.any()


def test_the_published_losses_separate_the_sides():
    for preset, low, high in ((PAPER, 0.2, 0.8), (CODE, -1.0, 1.0)):
        controller = made(preset, hidden=256)
        states = clouds(100)
        faster = dataclasses.replace(preset, lr=1e-3)
        history = train(controller, score_objective(controller, states, faster), (100, 100), faster)
        assert history.epochs[-1].training < history.epochs[0].training
        up, down = (controller.scores(side)[0].mean().item() for side in states)
        assert down < low < high < up


@pytest.mark.parametrize("preset", [PAPER, CODE])
def test_the_same_seed_gives_the_same_bits(preset):
    results = []
    for seed, noise in ((1, 5), (1, 6), (2, 5)):
        torch.manual_seed(noise)
        controller = made(preset, seed=seed)
        history = train(controller, score_objective(controller, clouds(), preset), (40, 40), preset, seed=seed)
        results.append((torch.cat([p.detach().flatten() for p in controller.parameters()]), history))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    assert not torch.equal(results[0][0], results[2][0])


def test_training_stops_when_the_validation_loss_no_longer_falls_and_keeps_the_best():
    controller = made()
    validations, kept = [], []
    script = iter([5.0, 3.0, 2.0, 2.5, 4.0, 2.1, 9.0, 9.0])

    def objective(up, down):
        zero = 0.0 * sum(p.sum() for p in controller.parameters())
        if torch.is_grad_enabled():
            return zero + controller.output.bias.sum()
        validations.append(next(script))
        kept.append(controller.output.bias.detach().clone())
        return zero + validations[-1]

    preset = dataclasses.replace(PAPER, epochs=8, batch_size=8)
    history = train(controller, objective, (8, 8), preset, patience=3)
    assert validations == [5.0, 3.0, 2.0, 2.5, 4.0, 2.1]
    assert (history.best, len(history.epochs)) == (2, 6)
    assert torch.equal(controller.output.bias, kept[2])
    assert not torch.equal(kept[2], kept[-1])


def test_the_validation_share_is_never_trained_on_and_batches_are_balanced():
    controller = made()
    trained, validated, sizes = (set(), set()), (set(), set()), set()

    def objective(up, down):
        sizes.add((len(up), len(down)))
        for side, batch in enumerate((up, down)):
            (trained if torch.is_grad_enabled() else validated)[side].update(batch.tolist())
        return controller.output.bias.square().sum()

    train(controller, objective, (30, 9), dataclasses.replace(PAPER, batch_size=6), validation=0.2)
    assert sizes == {(3, 3)}
    for side, count in enumerate((30, 9)):
        assert trained[side] | validated[side] == set(range(count))
        assert not trained[side] & validated[side]
        assert len(validated[side]) == round(0.2 * count)


def test_bad_training_arguments():
    controller = made()
    objective = score_objective(controller, clouds(), PAPER)
    for counts, side in (((0, 40), "harmful prompts, got 0"), ((40, 1), "harmless prompts, got 1")):
        with pytest.raises(ValueError, match=f"at least 2 {side}"):
            train(controller, objective, counts, PAPER)
    for change in ({"lr": 0.0}, {"lr": float("nan")}, {"clip": -1.0}):
        with pytest.raises(ValueError, match="a rate and a clip above 0"):
            train(controller, objective, (40, 40), dataclasses.replace(PAPER, **change))
    for options in ({"validation": 0.0}, {"validation": 1.0}, {"patience": 0}):
        with pytest.raises(ValueError, match="training needs a validation share"):
            train(controller, objective, (40, 40), PAPER, **options)
    with pytest.raises(ValueError, match="'outcome' is not one on the scores"):
        score_objective(controller, clouds(), OUTCOME)
    with pytest.raises(ValueError, match="epoch 0, step 0: the loss is nan"):
        train(controller, lambda up, down: torch.nan * controller.output.bias.sum(), (9, 9), PAPER)


# the outcome loss


@pytest.fixture
def outcome(model, tokenizer, rendered):
    """An objective over six prompts of each side, and what it was made of."""

    def build(controller=None, scope="reply", site="resid_post", penalty=0.0, size=2.0):
        prompts = rendered("jailbreak", 6), rendered("harmless", 6)
        texts = [REFUSAL] * 6, ["Sure, here is a page about the kite."] * 6
        examples = tuple(
            [example(prompt, text, tokenizer, model) for prompt, text in zip(some, says, strict=True)]
            for some, says in zip(prompts, texts, strict=True)
        )
        reads = (Read(1, "resid_post"),)
        controller = controller or made(OUTCOME, reads, 64, 4)
        states = tuple(cache_states(model, some, reads, progress=False) for some in prompts)
        generator = torch.Generator().manual_seed(2)
        directions = {layer: size * torch.randn(64, generator=generator) for layer in range(4)}
        return OutcomeObjective(model, controller, examples, states, directions, site, scope, penalty)

    return build


@pytest.mark.parametrize("site", ["resid_pre", "resid_post"])
@pytest.mark.parametrize("scope", ["decode", "reply"])
def test_the_outcome_loss_reaches_every_output(model, outcome, site, scope):
    def hooks():
        return [len(block._forward_hooks) + len(block._forward_pre_hooks) for block in model.model.layers]

    objective, before = outcome(scope=scope, site=site), hooks()
    objective(*everyone(6)).backward()
    rows = objective.controller.output.weight.grad
    assert all(bool(row.any()) for row in rows)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert hooks() == before


def test_the_gradient_of_the_outcome_loss_is_the_slope(outcome):
    controller = made(OUTCOME, (Read(1, "resid_post"),), 64, 4)
    with torch.no_grad():
        controller.output.bias[0] = 0.5
    objective = outcome(controller, penalty=0.3)
    batch = everyone(6)
    objective(*batch).backward()
    step = 1e-2
    for entry in range(5):
        at = []
        for sign in (1, -1):
            with torch.no_grad():
                controller.output.bias[entry] += sign * step
                at.append(objective(*batch).double())
                controller.output.bias[entry] -= sign * step
        slope = float(at[0] - at[1]) / (2 * step)
        # float32 losses of about 10, difference quotient of second order
        assert float(controller.output.bias.grad[entry]) == pytest.approx(slope, rel=0.02, abs=2e-3)


def test_the_outcome_loss_by_hand(model, outcome):
    """Row by row, unpadded, with log-probabilities of whole replies."""
    objective = outcome(penalty=0.25)
    controller = objective.controller
    gains = [controller.gains(states) for states in objective.states]
    refused, apart = 0.0, 0.0
    with torch.no_grad():
        for side in (0, 1):
            for i, one in enumerate(objective.examples[side]):
                ids = torch.tensor([[*one.prompt, *one.reply]])
                start = len(one.prompt) - 1
                mask = torch.arange(ids.shape[1])[None] >= start
                deltas = {layer: gains[side][i : i + 1, layer, None] * d for layer, d in objective.directions.items()}
                stock = model(ids).logits[0, start:-1].double().log_softmax(-1)
                with injected(model, deltas, mask, "resid_post"):
                    steered = model(ids).logits[0, start:-1].double().log_softmax(-1)
                if side == 0:
                    refused -= float(steered.gather(1, torch.tensor(one.reply)[:, None]).sum())
                else:
                    apart += float((stock.exp() * (stock - steered)).sum())
    wanted = 0.5 * refused / 6 + 0.5 * apart / 6 + 0.25 * float(torch.cat(gains).square().mean())
    assert apart > 0
    assert objective(*everyone(6)).item() == pytest.approx(wanted, rel=1e-4)


def test_without_strength_nothing_is_changed(outcome):
    controller = made(OUTCOME, (Read(1, "resid_post"),), 64, 4)
    with torch.no_grad():
        controller.output.weight[0] = 0.0
        controller.output.bias[0] = 0.0
    off, weak = outcome(controller), outcome(controller, size=1e-6)
    batch = everyone(6)
    with torch.no_grad():
        assert float(off(*batch)) == pytest.approx(float(weak(*batch)))
        controller.output.bias[0] = 1.0
        assert float(off(*batch)) != pytest.approx(float(weak(*batch)))


def test_decode_scope_leaves_the_first_token_alone(model, rendered):
    mask = torch.zeros(1, len(rendered("harmful", 1)[0].ids), dtype=torch.bool)
    ids = torch.tensor([rendered("harmful", 1)[0].ids])
    with torch.no_grad():
        stock = model(ids).logits
        with injected(model, {1: torch.ones(1, 64)}, mask, "resid_post"):
            assert torch.equal(model(ids).logits, stock)
        mask[0, -1] = True
        with injected(model, {1: torch.ones(1, 64)}, mask, "resid_post"):
            changed = model(ids).logits
    assert torch.equal(changed[:, :-1], stock[:, :-1])
    assert not torch.equal(changed[:, -1], stock[:, -1])


def test_frozen_puts_modes_and_gradients_back(model):
    weight = model.lm_head.weight
    model.train()
    model.model.norm.weight.requires_grad_(False)
    try:
        with pytest.raises(RuntimeError, match="inside"), frozen(model):
            assert not model.training
            assert not weight.requires_grad
            raise RuntimeError("inside")
        assert model.training
        assert weight.requires_grad
        assert not model.model.norm.weight.requires_grad
    finally:
        model.eval()
        model.model.norm.weight.requires_grad_(True)


def test_what_does_not_fit_the_outcome_loss(model, tokenizer, rendered, outcome):
    good = outcome()
    with pytest.raises(ValueError, match="scope decode or reply, got 'prompt'"):
        dataclasses.replace(good, scope="prompt")
    with pytest.raises(ValueError, match="6 examples need states of as many prompts, got 5"):
        dataclasses.replace(good, states=(good.states[0][:5], good.states[1]))
    with pytest.raises(PlanError, match="layer 2: the controller weighs it"):
        dataclasses.replace(good, directions={0: torch.ones(64), 1: torch.ones(64), 3: torch.ones(64)})
    with pytest.raises(ValueError, match="at resid_pre or resid_post, got 'resid_mid'"):
        dataclasses.replace(good, site="resid_mid")(*everyone(6))
    prompt = rendered("harmful", 1)[0]
    with pytest.raises(ValueError, match="has no tokens"):
        example(prompt, "", tokenizer, model)
    with pytest.raises(ValueError, match=r"with its reply, prompt 0 has \d+ tokens, the model has 256 positions"):
        example(prompt, "no " * 300, tokenizer, model)
    assert example(prompt, REFUSAL, tokenizer, model).reply[-1] == model.generation_config.eos_token_id
