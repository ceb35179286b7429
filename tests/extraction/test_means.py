"""Streamed means equal direct float64 ones; directions carry their record; the organism's separate its classes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import steerkern as sk
from steerkern import organism, refusal
from steerkern.extraction import extract, means, render, states
from steerkern.runtime.sites import examine

OTHERS = ["bake the cake.", "Write a reply, then a letter.", "is it so?", "really?"]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_stream_equals_direct_float64(model: Any, tokenizer: Any, prompts: list[str], batch_size: int) -> None:
    got = means(model, tokenizer, prompts, OTHERS, batch_size=batch_size, progress=False)
    for position, contrast in got.items():
        for side, texts in ((contrast.positive, prompts), (contrast.negative, OTHERS)):
            direct = states(model, render(tokenizer, texts), (position,), batch_size=batch_size, progress=False)
            direct = direct[:, :, 0].double()
            assert side.n == len(texts)
            assert side.position == position
            torch.testing.assert_close(side.mean, direct.mean(0), rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(side.variance, direct.var(0, correction=0), rtol=1e-9, atol=1e-12)


def test_sites_are_one_block_apart(model: Any, tokenizer: Any, prompts: list[str]) -> None:
    pre = extract(model, tokenizer, prompts, OTHERS, position="t_inst", progress=False)
    post = extract(model, tokenizer, prompts, OTHERS, position="t_inst", site="resid_post", progress=False)
    assert (list(pre), list(post)) == ([0, 1, 2], [0, 1, 2])
    assert (pre.site, post.site) == ("resid_pre", "resid_post")
    for layer in (0, 1):
        assert torch.equal(post[layer].raw, pre[layer + 1].raw)
    want = [
        states(model, render(tokenizer, texts), ("t_inst",), progress=False)[:, -1, 0].double().mean(0)
        for texts in (prompts, OTHERS)
    ]
    torch.testing.assert_close(post[2].raw, (want[0] - want[1]).float())


def test_directions_are_raw_and_know_their_making(model: Any, tokenizer: Any, prompts: list[str]) -> None:
    got = extract(model, tokenizer, prompts, OTHERS, position=-1, name="toy", system="You are.", progress=False)
    assert got.model == examine(model).fingerprint == sk.Fingerprint("llama", 32, 3)
    record = got.provenance
    assert record["method"] == "difference of means"
    assert record["position"] == -1
    assert record["positive"]["n"] == len(prompts)
    assert record["negative"]["n"] == len(OTHERS)
    assert len({record[side]["sha256"] for side in ("positive", "negative")}) == 2
    assert record["steerkern"] == sk.__version__
    assert record["system"] == "You are."
    assert record["dtype"] == "float32"
    flipped = extract(model, tokenizer, OTHERS, prompts, position=-1, system="You are.", progress=False)
    for layer in got:
        assert torch.equal(got[layer].raw, -flipped[layer].raw)
    assert flipped.provenance["negative"] == record["positive"]


def test_record_is_saved_and_holds_no_path(model: Any, prompts: list[str], make_tokenizer: Any, tmp_path: Any) -> None:
    tokenizer = make_tokenizer()
    tokenizer.name_or_path = str(tmp_path / "checkpoint")
    model.config._name_or_path = "owner/model"
    got = extract(model, tokenizer, prompts, OTHERS, progress=False)
    got.save_pretrained(tmp_path / "d")
    back = sk.Directions.from_pretrained(tmp_path / "d")
    assert back.provenance == got.provenance
    assert back.provenance["tokenizer"] == "checkpoint"
    assert back.provenance["model"] == "owner/model"
    assert all(torch.equal(back[layer].raw, got[layer].raw) for layer in got)


def test_same_inputs_give_the_same_bits(model: Any, tokenizer: Any, prompts: list[str]) -> None:
    first, second = (extract(model, tokenizer, prompts, OTHERS, progress=False) for _ in range(2))
    assert all(torch.equal(first[layer].raw, second[layer].raw) for layer in first)


def test_batch_size_and_order_do_not_matter(model: Any, tokenizer: Any, prompts: list[str]) -> None:
    one = extract(model, tokenizer, prompts, OTHERS, batch_size=1, progress=False)
    seven = extract(model, tokenizer, prompts[::-1], OTHERS[::-1], batch_size=7, progress=False)
    for layer in one:
        assert float((one[layer].raw - seven[layer].raw).abs().max()) < 1e-6 * float(one[layer].raw.abs().max()) + 1e-6


def test_the_shared_embedding_at_t_post_is_left_out(model: Any, tokenizer: Any, prompts: list[str]) -> None:
    """At t_post every prompt reads the template's last token, so resid_pre[0] is one vector (arXiv 2507.11878)."""
    got = extract(model, tokenizer, prompts, OTHERS, progress=False)
    assert list(got) == [1, 2]
    assert got.provenance["layers_left_out"] == [0]
    sk.Plan(sk.add(got))  # a plan over "all" layers then means the layers that have a vector
    post = extract(model, tokenizer, prompts, OTHERS, site="resid_post", progress=False)
    assert list(post) == [0, 1, 2]
    assert post.provenance["layers_left_out"] == []


def test_equal_means_name_the_layer(model: Any, tokenizer: Any, prompts: list[str]) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    with pytest.raises(ValueError, match=r"layer 0: positive and negative have the same mean at t_post"):
        extract(model, tokenizer, prompts, OTHERS, progress=False)
    with pytest.raises(ValueError, match=r"layer 0: positive and negative have the same mean at t_inst"):
        extract(model, tokenizer, prompts, OTHERS, position="t_inst", site="resid_post", progress=False)


def test_nan_names_layer_side_and_prompt(model: Any, tokenizer: Any, prompts: list[str]) -> None:
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"layer 2: NaN or Inf in the state of positive prompt \d+ at t_post"):
        extract(model, tokenizer, prompts, OTHERS, progress=False)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = 0.0
        model.model.layers[2].mlp.down_proj.weight[0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"layer 2 \(output\): NaN or Inf"):
        extract(model, tokenizer, prompts, OTHERS, progress=False)


def test_bad_sets_and_sites(model: Any, tokenizer: Any, prompts: list[str]) -> None:
    with pytest.raises(ValueError, match="positive holds no prompts"):
        extract(model, tokenizer, [], OTHERS)
    with pytest.raises(ValueError, match="negative holds no prompts"):
        extract(model, tokenizer, prompts, [])
    with pytest.raises(ValueError, match="positive and negative hold the same prompts"):
        extract(model, tokenizer, prompts, list(prompts))
    with pytest.raises(ValueError, match="site must be resid_pre or resid_post, got 'resid_mid'"):
        extract(model, tokenizer, prompts, OTHERS, site="resid_mid")
    with pytest.raises(ValueError, match=r"prompt 1 has 1\d\d tokens, the model has 128 positions"):
        extract(model, tokenizer, prompts, ["no", "time " * 120])


def auroc(positive: Tensor, negative: Tensor) -> float:
    """Probability that a positive lies above a negative, ties half."""
    above = positive[:, None] - negative[None, :]
    return float((above > 0).double().mean() + 0.5 * (above == 0).double().mean())


def test_organism_directions_separate_held_out_prompts() -> None:
    model, tokenizer = organism.load("planted")
    train, held = (
        {kind: [p.messages for p in organism.prompts(kind, split, 64)] for kind in ("harmful", "harmless")}
        for split in ("train", "heldout")
    )
    found = means(model, tokenizer, train["harmful"], train["harmless"], progress=False)
    read = {
        kind: states(model, render(tokenizer, texts), ("t_inst", "t_post"), batch_size=32, progress=False)
        for kind, texts in held.items()
    }
    for place, position in enumerate(("t_inst", "t_post")):
        directions = found[position].directions()
        scores = {
            layer: auroc(*(read[kind][:, layer, place] @ directions[layer].unit for kind in ("harmful", "harmless")))
            for layer in directions
        }
        assert max(scores.values()) >= 0.95, (position, scores)
        if position == "t_post":
            assert min(scores[layer] for layer in (2, 3)) >= 0.95, scores
    # belief scores (arXiv 2507.11878): mean over layers of cos(h, harmful) - cos(h, harmless)
    contrast = found["t_post"]
    belief = {
        kind: (
            torch.cosine_similarity(states_of[:, :, 1].double(), contrast.positive.mean, dim=-1)
            - torch.cosine_similarity(states_of[:, :, 1].double(), contrast.negative.mean, dim=-1)
        ).mean(1)
        for kind, states_of in read.items()
    }
    assert auroc(belief["harmful"], belief["harmless"]) >= 0.95


def test_organism_refusal_direction_removes_refusal() -> None:
    """The direction does what it is for: ablated it lets harmful requests through, the control lets none."""
    model, tokenizer = organism.load("planted")
    train = {k: [p.messages for p in organism.prompts(k, "train", 64)] for k in ("harmful", "harmless")}  # type: ignore[arg-type]
    direction = extract(model, tokenizer, train["harmful"], train["harmless"], progress=False)[2]
    asked = organism.prompts("harmful", "heldout", 16)
    inputs = tokenizer.apply_chat_template(
        [p.messages for p in asked], add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )

    def refused() -> float:
        out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        replies = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return refusal.rate("prefix", replies)

    assert refused() >= 0.95
    with sk.steer(model, sk.Plan(sk.ablate(direction), name="open"), backend="reference"):
        assert refused() <= 0.05
    assert refused() >= 0.95
