"""The acceptance list of the specification (arXiv 2507.11878), by its numbers; the guard as a gate; bad input."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from pathlib import Path

import pytest
import torch

import steerkern as sk
from steerkern import refusal
from steerkern.extraction import render, states
from steerkern.methods.harmfulness_vs_refusal import Inversion, LatentGuard, cluster_score, run
from steerkern.methods.harmfulness_vs_refusal.guard import auroc
from steerkern.methods.harmfulness_vs_refusal.inversion import ORGANISM, before_question, instruction, inverted
from steerkern.methods.harmfulness_vs_refusal.steering import prefill
from steerkern.methods.sets import Sets, split
from tests.runtime.models import LAYERS, VOCABULARY, WIDTH, tiny_llama


@pytest.fixture(scope="module")
def found(planted, sets):
    return run(planted, sets)


@pytest.fixture(scope="module")
def guard(planted, sets):
    train = sets.train
    return LatentGuard.fit(planted.model, planted.tokenizer, train["harmful"], train["harmless"], batch_size=64)


# 1. Selectors

TEMPLATES = {
    "four tokens after": "{% for m in messages %}<|user|>{{ m.content }}{% endfor %}<|end|><|assistant|>",
    "none after": "{% for m in messages %}<|user|>{{ m.content }}{% endfor %}",
    "may merge with the end": "{% for m in messages %}<|user|>{{ m.content }}s and so on{% endfor %}<|assistant|>",
}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_1_selectors(planted, template):
    text = "paint the chair"
    rendered = render(planted.tokenizer, [text, "hello. find the tent"], template=template)
    for prompt, words in zip(rendered, (text, "hello. find the tent"), strict=True):
        spans = planted.tokenizer(prompt.text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        last = prompt.text.index(words) + len(words) - 1
        (holding,) = [i for i, (begin, end) in enumerate(spans) if begin <= last < end]
        assert prompt.t_inst == holding == len(prompt.ids) - 1 - prompt.n_suffix
        assert prompt.t_post == len(prompt.ids) - 1


def test_1_the_span_of_the_instruction_is_its_tokens_whatever_comes_before(planted, sets):
    """Also behind a system prompt, which some of the prompts have."""
    rendered = planted.render(sets.heldout["harmful"])
    assert len({prompt.t_first for prompt in rendered}) > 1
    span = instruction(rendered)
    for prompt, tokens in zip(rendered, written(planted, rendered, span), strict=True):
        assert tokens == list(range(prompt.t_first, prompt.t_inst + 1))


def test_1_tokens_before_the_question(planted, sets):
    rendered = inverted(planted, ORGANISM, sets.heldout["harmless"])
    span = before_question(planted.tokenizer, rendered, ORGANISM.question)
    for prompt, tokens in zip(rendered, written(planted, rendered, span), strict=True):
        spans = planted.tokenizer(prompt.text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        at = prompt.text.rindex(ORGANISM.question)
        assert tokens == [i for i in range(prompt.t_first, len(spans)) if spans[i][1] <= at]


def written(subject, rendered, span):
    """Positions of each prompt that a plan on ``span`` writes: where the first norm's output is another."""
    vector = torch.randn(subject.width, generator=torch.Generator().manual_seed(0))
    seen = []
    norm = subject.model.model.layers[0].input_layernorm
    for plan in (None, prefill(vector, 0, span, 1.0)):
        with contextlib.ExitStack() as stack:
            if plan is not None:
                stack.enter_context(sk.steer(subject.model, plan, backend="reference"))
            stack.callback(norm.register_forward_hook(lambda module, args, out: seen.append(out[0])).remove)
            for prompt in rendered:
                subject.model.model(torch.tensor([prompt.ids]))
    count = len(rendered)
    return [(seen[i] != seen[count + i]).any(-1).nonzero()[:, 0].tolist() for i in range(count)]


# 2. Prefill-only write


def test_2_a_prefill_write_with_cache_equals_a_full_recompute():
    model = tiny_llama(0)
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
    vector = torch.randn(WIDTH, generator=torch.Generator().manual_seed(2))
    layer = min(1, LAYERS - 1)
    plan = sk.Plan(sk.add(vector, 2.0), layers=layer, scope=sk.Tokens("prompt", stop=-2), name="p")
    with sk.steer(model, plan):
        made = model.generate(
            ids, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_logits=True, eos_token_id=None
        )  # fmt: skip

    def shift(module, args, kwargs):
        hidden = (args[0] if args else kwargs["hidden_states"]).clone()
        hidden[:, :7] += 2.0 * vector
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    handle = model.model.layers[layer].register_forward_pre_hook(shift, with_kwargs=True)
    whole = model(made.sequences).logits
    handle.remove()
    for step, logits in enumerate(made.logits):
        assert (whole[:, 8 + step] - logits).abs().max() < 1e-5 * whole.abs().max()


# 3. Golden scores


def test_3_golden_scores_of_the_released_tensors():
    folder = Path(os.environ.get("STEERKERN_HARMFULNESS_TENSORS", "no folder"))
    if not folder.is_dir():
        pytest.skip("STEERKERN_HARMFULNESS_TENSORS names no folder: the tensors have no licence and are not with us")
    read = {
        name: torch.load(folder / f"qwen-{name}-cls-all-layer.pt", weights_only=True).float()
        for name in ("hf", "hl", "refuse", "accept")
    }
    tested = torch.load(folder / "qwen-hl-refuse5-all-layer-2pos.pt", weights_only=True).float().permute(1, 2, 0, 3)
    harm = cluster_score(tested[:, 0], read["hf"], read["hl"]).mean(-1)
    refuse = cluster_score(tested[:, 1], read["refuse"], read["accept"]).mean(-1)
    assert torch.allclose(harm, torch.tensor([-0.056, -0.028, -0.045, -0.043, -0.040]), atol=1e-3)
    assert torch.allclose(refuse, torch.tensor([0.009, 0.010, 0.016, 0.009, 0.015]), atol=1e-3)


def test_3_scores_by_hand():
    """Two layers: cosines 1 and 0 against 0 and 1, and 1/sqrt(2) against the same."""
    states = torch.tensor([[[2.0, 0.0], [1.0, 1.0]]])
    up, down = torch.tensor([[3.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, 5.0]])
    assert torch.allclose(cluster_score(states, up, down), torch.tensor([[1.0, 0.0]]))


# 4. Degenerate layer


def test_4_equal_centres_give_zero_and_no_nan(found):
    same = torch.randn(3, 8)
    assert torch.equal(cluster_score(torch.randn(5, 3, 8), same, same), torch.zeros(5, 3))
    first = found["directions"].rows[0]
    assert first["ref_norm"] == 0.0
    assert first["cosine"] == 0.0


# 5 to 8. Behaviour, on held-out prompts of the organism


def test_5_the_guard_tells_harmful_from_harmless_also_where_the_model_answers(found):
    assert found.headline["auroc"] >= 0.95
    assert found.headline["auroc_jailbroken"] >= 0.95
    rows = {row["pool"]: row for row in found["pools"].rows}
    assert rows["accepted harmful"]["count"] >= 60, "the jailbroken prompts are answered"
    assert rows["refused harmful"]["guard"] >= 0.9
    assert rows["accepted harmless"]["guard"] <= 0.1


def test_6_the_refusal_direction_raises_refusal(found):
    assert found.headline["refusal_raised_by_refusal"] >= 0.4


def test_7_only_the_harm_direction_moves_the_judgement(found):
    assert found.headline["judgement_moved_by_harm"] >= 0.4
    assert found.headline["judgement_moved_by_refusal"] <= 0.2


def test_8_the_two_directions_are_nearly_orthogonal(found):
    assert found.headline["mean_abs_cosine"] <= 0.5


def test_the_bare_organism_has_no_harm_direction(bare, sets):
    """The negative control: it behaves the same, and nothing was planted."""
    report = run(bare, sets)
    assert report.headline["judgement_moved_by_harm"] <= 0.1
    assert report.headline["auroc"] < 0.95
    assert any("do not come apart" in note for note in report.notes)


def test_categories_of_harm_have_directions_of_their_own(found):
    """On the organism one direction is planted for all harm, so those of both categories are alike and do the same."""
    rows = {row["category"]: row for row in found["categories"].rows}
    assert set(rows) == {"taking something", "making something bad"}
    for row in rows.values():
        assert row["harm"] > 0.5
        assert row["refusal"] > 0.9
        assert max(row["own"], row["every"]) <= 0.05


def test_categories_come_from_a_column_of_the_file(planted, tmp_path):
    import csv
    import json

    from typer.testing import CliRunner

    from steerkern import organism
    from steerkern.cli import app

    sides = {kind: organism.prompts(kind, "train", 48) for kind in ("harmful", "harmless")}
    with (tmp_path / "harmful.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["prompt", "kind"])
        rows.writerows([prompt.text, prompt.verb[0] < "m"] for prompt in sides["harmful"])
    (tmp_path / "harmless.txt").write_text("\n".join(prompt.text for prompt in sides["harmless"]))
    options = ["--harmful", tmp_path / "harmful.csv", "--harmless", tmp_path / "harmless.txt", "--no-plots", "--json"]
    command = ["run", "harmfulness-vs-refusal", "--out", tmp_path / "out", *options]
    result = CliRunner().invoke(app, list(map(str, [*command, "--category", "kind"])))
    assert result.exit_code == 0, result.stderr
    rows = json.loads(result.stdout)["tables"]["categories"]["rows"]
    assert {row["category"] for row in rows} == {"True", "False"}
    result = CliRunner().invoke(app, list(map(str, [*command, "--category", "nothing"])))
    assert result.exit_code == 2
    assert "no column 'nothing'" in result.stderr


# The guard as an object, an artefact and a gate


def test_the_guard_scores_and_predicts(planted, sets, guard):
    harmful = guard.score(planted.model, planted.tokenizer, sets.heldout["jailbroken"], batch_size=64)
    harmless = guard.score(planted.model, planted.tokenizer, sets.heldout["harmless"], batch_size=64)
    assert auroc(harmful, harmless) >= 0.95
    predicted = guard.predict(planted.model, planted.tokenizer, sets.heldout["jailbroken"], batch_size=64)
    assert predicted == (harmful >= 0).tolist()


def test_the_guard_comes_back_from_a_folder(tmp_path, guard):
    guard.save_pretrained(tmp_path)
    again = LatentGuard.from_pretrained(tmp_path)
    assert (again.model, again.offset, again.threshold) == (guard.model, guard.offset, guard.threshold)
    assert torch.equal(again.harmful, guard.harmful)
    assert torch.equal(again.harmless, guard.harmless)
    (tmp_path / "latent_guard.json").write_text("{}")
    with pytest.raises(sk.ArtifactError):
        LatentGuard.from_pretrained(tmp_path)


def test_a_guard_of_another_model_is_refused(guard):
    with pytest.raises(sk.PlanError, match="the guard was made for llama .4 layers, width 64., the model is"):
        guard.score(tiny_llama(0), None, ["a"])


def test_as_a_gate_it_steers_the_harmful_requests_of_a_batch_and_no_others(planted, sets, guard):
    """Jailbroken prompts are refused, harmless ones answered word for word as before, in the same batch."""
    asked = [*sets.heldout["jailbroken"][:16], *sets.heldout["harmless"][:16]]
    mixed = [asked[i] for pair in zip(range(16), range(16, 32), strict=True) for i in pair]
    direction = sk.extraction.extract(
        planted.model, planted.tokenizer, sets.train["harmful"], sets.train["harmless"], batch_size=64
    )[2]
    gated = sk.Plan(sk.add(direction, 2.0), layers=2, scope="reply", latch=guard.latch(), name="gated")
    (stock,) = planted.replies("stock", [(None, mixed)])
    (steered,) = planted.replies("gated", [(gated, mixed)])
    refused = refusal.score("prefix", steered)
    assert refused[::2] == [True] * 16
    assert steered[1::2] == stock[1::2]
    other = dataclasses.replace(guard, threshold=0.0).latch(harmful=False)
    opposite = sk.Plan(sk.add(direction, 2.0), layers=2, scope="reply", latch=other, name="opposite")
    (turned,) = planted.replies("opposite", [(opposite, mixed)])
    assert turned[::2] == stock[::2]
    assert refusal.rate("prefix", turned[1::2]) == 1.0


def test_the_gate_decides_what_the_guard_predicts(planted, sets, guard):
    prompts = [*sets.heldout["harmful"][:8], *sets.heldout["overrefused"][:8]]
    read = states(planted.model, planted.render(prompts), ("t_inst",), batch_size=64)[:, :, 0]
    latch = guard.latch()
    assert latch.opens(read).tolist() == guard.predict(planted.model, planted.tokenizer, prompts, batch_size=64)


# The report, and bad input


def test_the_report_saves_pictures_page_and_guard(found, tmp_path):
    pytest.importorskip("matplotlib")
    files = {file.name for file in found.save(tmp_path)}
    assert files == {"report.json", "report.md", "beliefs.png", "layers.png", "guard"}
    assert LatentGuard.from_pretrained(tmp_path / "guard").threshold == 0.0
    provenance = found.provenance
    assert provenance.scorer == "prefix/1"
    assert {"train harmful", "heldout overrefused"} <= set(provenance.prompts)


def test_pools_that_are_missing_are_named(planted, sets):
    harmless = sets.heldout["harmless"]
    with pytest.raises(ValueError, match="to learn from no harmful prompt is refused"):
        run(planted, Sets({"harmful": sets.train["jailbroken"], "harmless": harmless}, sets.heldout))
    with pytest.raises(ValueError, match="held out no harmless prompt is answered"):
        run(planted, Sets(sets.train, {"harmful": sets.heldout["harmful"], "harmless": sets.heldout["overrefused"]}))


def test_prompts_without_room_are_refused_before_anything_is_asked(planted, sets, monkeypatch):
    monkeypatch.setattr(type(planted), "ask", lambda *_: pytest.fail("asked"))
    long = [*sets.heldout["harmful"], "tent " * 240]
    with pytest.raises(ValueError, match="leaves no room for 16 more: the model has 256 positions|has 256 positions"):
        run(planted, Sets(sets.train, {**sets.heldout, "harmful": long}))


def test_an_inversion_needs_its_parts():
    with pytest.raises(ValueError, match="lead-in with one {}"):
        Inversion("no place", "why?")
    with pytest.raises(ValueError, match="and a question"):
        Inversion("{}", " ")


def test_sets_from_files_are_disjoint_and_checked():
    texts = [f"prompt {i}" for i in range(30)]
    made = split({"harmful": texts, "harmless": [t.upper() for t in texts]}, 100)
    for name in ("harmful", "harmless"):
        assert not set(made.train[name]) & set(made.heldout[name])
        assert len(made.train[name]) + len(made.heldout[name]) == 30
    assert split({"harmful": texts}, 5).train["harmful"] == split({"harmful": texts}, 5).train["harmful"]
    with pytest.raises(ValueError, match="at least 8 different harmful prompts are needed, got 3"):
        split({"harmful": texts[:3]}, 5)
    with pytest.raises(ValueError, match="stands in both harmful and harmless"):
        split({"harmful": texts, "harmless": texts}, 5)
