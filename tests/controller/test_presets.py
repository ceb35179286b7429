"""Presets and the refusal vector, against the specification and against sums by hand."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from steerkern.controller import CODE, OUTCOME, PAPER, PRESETS, Scores, bce, mse, refusal_vector
from steerkern.controller.phrases import ANSWERS, REFUSALS
from steerkern.controller.presets import check_vectors, get


def test_the_two_published_presets_differ_as_specified():
    assert PAPER.read_layers(32) == tuple(range(22, 32))
    assert CODE.read_layers(32) == (28, 29, 30, 31)
    assert (PAPER.vectors, CODE.vectors) == ("unembed", "embed")
    assert (PAPER.alpha, CODE.alpha) == (2.0, 4.0)
    assert (PAPER.loss, CODE.loss) == ("mse", "bce")
    assert {(p.lr, p.clip, p.hidden, p.weights, p.layer_norm) for p in (PAPER, CODE)} == {
        (5e-5, 1.0, 1024, "sigmoid", False)
    }
    assert [(p.epochs, p.batch_size) for p in (PAPER, CODE)] == [(4, 4), (10, 8)]
    assert (PAPER.every_token, CODE.every_token) == (False, True)
    assert (PAPER.header, CODE.header) == (True, False)
    assert PAPER.scope == "decode"
    assert (OUTCOME.layer_norm, OUTCOME.hidden, OUTCOME.weights, OUTCOME.loss) == (True, 32, "softmax", "outcome")


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5, 24, 80])
def test_read_layers_exist_at_any_depth(depth):
    for preset in PRESETS.values():
        layers = preset.read_layers(depth)
        assert layers
        assert all(0 <= layer < depth for layer in layers)
    assert all(3 * layer >= 2 * depth for layer in PAPER.read_layers(depth)) or depth < 3


def test_unknown_names():
    assert get("paper") is PAPER
    with pytest.raises(ValueError, match="no preset 'best'; there are paper, code, outcome"):
        get("best")
    with pytest.raises(ValueError, match="vectors must be unembed, embed, means"):
        check_vectors("W_U")


def test_losses_by_hand():
    harmful = Scores(torch.tensor([2.0, 0.0]), torch.tensor([[0.1, 0.9], [0.5, 0.7]]))
    harmless = Scores(torch.tensor([0.5]), torch.rand(1, 2))
    assert mse(harmful, harmless).item() == pytest.approx(0.5 * (1 + 1) / 2 + 0.5 * 0.25)
    log = torch.nn.functional.binary_cross_entropy_with_logits
    ce = 0.5 * log(harmful.s, torch.ones(2)) + 0.5 * log(harmless.s, torch.zeros(1))
    regulariser = 0.1 * ((0.4 + 0.4 + 0.0 + 0.2) / 4 + 0.01 * 2.2 / 4)
    assert bce(harmful, harmless).item() == pytest.approx(ce.item() + regulariser)


@pytest.fixture(scope="module")
def untied(planted):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(planted[1]),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


@pytest.mark.parametrize(("weights", "matrix"), [("unembed", "lm_head"), ("embed", "model.embed_tokens")])
def test_the_refusal_vector_is_a_difference_of_mean_rows(untied, tokenizer, weights, matrix):
    rows = untied.get_submodule(matrix).weight.detach().double()

    def mean(phrases):
        tokens = [t for phrase in phrases for t in tokenizer(phrase, add_special_tokens=False)["input_ids"]]
        return sum(rows[t] for t in tokens) / len(tokens)

    wanted = mean(REFUSALS) - mean(ANSWERS)
    found = refusal_vector(untied, tokenizer, weights=weights)
    assert found.dtype == torch.float32
    assert float(found.double().norm()) == pytest.approx(1.0, abs=1e-6)
    torch.testing.assert_close(found.double(), wanted / wanted.norm(), atol=1e-7, rtol=1e-6)
    turned = refusal_vector(untied, tokenizer, ANSWERS, REFUSALS, weights)
    torch.testing.assert_close(turned, -found)


def test_output_and_input_embeddings_differ_unless_tied(untied, tokenizer, model):
    apart = [refusal_vector(untied, tokenizer, weights=weights) for weights in ("unembed", "embed")]
    assert abs(float(apart[0] @ apart[1])) < 0.9
    tied = [refusal_vector(model, tokenizer, weights=weights) for weights in ("unembed", "embed")]
    assert torch.equal(*tied)


def test_bad_phrases(model, tokenizer):
    with pytest.raises(ValueError, match="refusals must be a list of phrases"):
        refusal_vector(model, tokenizer, [])
    with pytest.raises(ValueError, match="answers must be a list of phrases"):
        refusal_vector(model, tokenizer, answers="Sure")
    with pytest.raises(ValueError, match="answers: '' has no tokens"):
        refusal_vector(model, tokenizer, answers=[""])
    with pytest.raises(ValueError, match="the same tokens"):
        refusal_vector(model, tokenizer, ["No."], ["No."])
    with pytest.raises(ValueError, match="weights must be"):
        refusal_vector(model, tokenizer, weights="W_U")
