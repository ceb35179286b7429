"""The acceptance list of the specification (arXiv 2504.02904), by its numbers; what the parts compute; bad input."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import steerkern as sk
from steerkern import organism
from steerkern.cli import app
from steerkern.methods import post_training
from steerkern.methods.post_training import Pair, ablation, ask, entropy_neurons, normalise, overlap, pearson, steering
from steerkern.methods.post_training.knowledge import margin, tokens, trace
from steerkern.methods.post_training.pairs import GENERIC, ORGANISM, Question, bundled, read_pairs, same_pattern, split
from steerkern.methods.post_training.truth import Effect, fit, intervene, read
from steerkern.methods.sets import Sets
from steerkern.runtime.patching import Patch, patched
from steerkern.subject import Subject
from tests.methods.conftest import subject
from tests.runtime.models import LAYERS, VOCABULARY, WIDTH, tiny_llama


@pytest.fixture(scope="module")
def base():
    return subject("base")


@pytest.fixture(scope="module")
def post():
    return subject("post")


@pytest.fixture(scope="module")
def told():
    return bundled()


@pytest.fixture(scope="module")
def found(base, post, sets):
    return post_training.run(base, sets, post)


def asked(subject, pairs):
    return ask(subject.tokenizer, ORGANISM, pairs, pairs)


def prompts(count, seed, length=9):
    return torch.randint(3, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed))


def logits(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


@contextlib.contextmanager
def changed(model, change):
    """``change(layer, site, h)`` at pre, mid and post of every block, by hooks that know the Llama's inside."""

    def forward(block, layer):
        def run(hidden, *args, **kwargs):
            hidden = change(layer, "resid_pre", hidden)
            attended, *_ = block.self_attn(hidden_states=block.input_layernorm(hidden), **kwargs)
            hidden = change(layer, "resid_mid", hidden + attended)
            return change(layer, "resid_post", hidden + block.mlp(block.post_attention_layernorm(hidden)))

        return run

    for layer, block in enumerate(model.model.layers):
        block.forward = forward(block, layer)
    try:
        yield
    finally:
        for block in model.model.layers:
            del block.forward


# 1 to 3. Patching (the whole of it is in tests/runtime/test_patching.py)


def test_1_and_2_own_states_change_nothing_and_those_of_the_true_run_give_its_logits(base, told):
    made = asked(base, told.heldout[:1])
    true, false = (torch.tensor([side[0].ids]) for side in (made.true, made.false))
    kept = []
    hooks = [b.register_forward_hook(lambda m, args, out: kept.append(out[0])) for b in base.model.model.layers]
    stock = [logits(base.model, ids) for ids in (false, true)]
    for hook in hooks:
        hook.remove()
    where = (torch.zeros(true.shape[1], dtype=torch.long), torch.arange(true.shape[1]))
    for layer in range(base.depth):
        for run, wanted in enumerate(stock):
            with patched(base.model, [Patch(layer, *where, kept[run * base.depth + layer])]):
                assert torch.equal(logits(base.model, false), wanted)


def test_3_the_map_is_a_loop_over_layers_tokens_and_pairs(base, post, told):
    """Every cell of all four maps, and of the noise variant, by one forward each."""
    made, _ = same_pattern(asked(base, told.heldout), 2)
    both = (base, post)
    found = trace(both, made, noise=0.5, seed=3)
    positions = found.traced.positions
    noisy = torch.randn(2, 1, base.width, generator=torch.Generator().manual_seed(3))

    def states(model, ids, at):
        kept = []
        hook = model.model.layers[at].register_forward_hook(lambda m, args, out: kept.append(out[0]))
        logits(model, ids)
        hook.remove()
        return kept[0]

    def cell(target, source, layer, position, corrupt):
        values = []
        for n in range(2):
            true, false = (torch.tensor([side[n].ids]) for side in (made.true, made.false))
            column = true.shape[1] + position
            model = both[target].model
            put = Patch(layer, *torch.tensor([[0], [column]]), states(both[source].model, true, layer)[column][None])
            with contextlib.ExitStack() as stack:
                stack.enter_context(patched(model, [put]))
                if corrupt:
                    where = true.shape[1] + positions[found.traced.names.index("subject")]
                    clean = model.model.embed_tokens(true[0, where]).detach()
                    bad = clean + 0.5 * clean.norm() * noisy[n, 0]
                    at = torch.tensor([[0], [where]])
                    stack.enter_context(patched(model, [Patch(0, *at, bad[None])], site="resid_pre"))
                values.append(margin(made.labels)(logits(model, true if corrupt else false)[:, -1]))
        return torch.cat(values).mean()

    for layer in range(base.depth):
        for i in (1, 3, 4, len(positions) - 1):
            for (target, source), effects in found.maps.items():
                wanted = cell(target, source, layer, positions[i], corrupt=False)
                torch.testing.assert_close(effects[layer, i], wanted, rtol=1e-4, atol=1e-4)
            wanted = cell(1, 1, layer, positions[i], corrupt=True)
            torch.testing.assert_close(found.restored[1][layer, i], wanted, rtol=1e-4, atol=1e-4)


# 4. Three sites of one layer


@pytest.mark.parametrize("fuse", ["all", "none"])
def test_4_three_adds_are_one_of_three_times_the_size_only_in_a_block_that_writes_nothing(fuse):
    ids = prompts(2, 1)
    unit = torch.nn.functional.normalize(torch.randn(WIDTH, generator=torch.Generator().manual_seed(2)), dim=0)
    for zeroed in (True, False):
        model = tiny_llama(0)
        if zeroed:
            block = model.model.layers[1]
            for part in (block.self_attn.o_proj, block.mlp.down_proj):
                torch.nn.init.zeros_(part.weight)
        with sk.steer(model, steering(unit, 1, 0.7), fuse=fuse):
            three = logits(model, ids)
        with sk.steer(model, sk.Plan(sk.add(unit, 2.1), layers=1, site="resid_post", name="once"), fuse=fuse):
            once = logits(model, ids)
        near = torch.allclose(three, once, rtol=1e-4, atol=1e-4)
        assert near == zeroed
        with changed(model, lambda layer, site, h: h + 0.7 * unit if layer == 1 else h):
            torch.testing.assert_close(three, logits(model, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fuse", ["all", "none"])
def test_ablation_removes_the_direction_at_every_site_of_every_layer_once(fuse):
    model, ids = tiny_llama(0), prompts(2, 1)
    unit = torch.nn.functional.normalize(torch.randn(WIDTH, generator=torch.Generator().manual_seed(2)), dim=0)
    with sk.steer(model, ablation(unit, LAYERS), fuse=fuse):
        found = logits(model, ids)
    with changed(model, lambda layer, site, h: h - (h @ unit)[..., None] * unit):
        torch.testing.assert_close(found, logits(model, ids), rtol=1e-4, atol=1e-4)


# 5. Entropy neurons


def test_5_a_model_has_its_own_entropy_neurons():
    neurons = entropy_neurons(tiny_llama(0))
    assert overlap(neurons, neurons) == 1.0
    assert overlap(neurons, entropy_neurons(tiny_llama(0))) == 1.0
    assert overlap(neurons, entropy_neurons(tiny_llama(1))) < 1.0


def test_entropy_neurons_by_a_loop():
    model = tiny_llama(3)
    written, words = model.model.layers[-1].mlp.down_proj.weight.detach().T, model.lm_head.weight.detach()
    norms = [float(row.norm()) for row in written]
    loudest = sorted(range(96), key=lambda n: -norms[n])[:24]
    cosine = torch.nn.functional.cosine_similarity
    spread = {n: torch.stack([cosine(written[n], word, dim=0) for word in words]).var(correction=0) for n in loudest}
    wanted = sorted(sorted(loudest, key=lambda n: spread[n])[:10])
    found = entropy_neurons(model)
    assert list(found.found) == wanted
    ratio = sum(norms[n] / float(spread[n].log()) for n in wanted) / 10
    assert found.ratio == pytest.approx(ratio, rel=1e-4)


def test_entropy_neurons_of_another_family():
    """GPT-2 keeps its matrices the other way round."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=16))
    found = entropy_neurons(model)
    assert len(found.norm) == 128
    torch.testing.assert_close(found.norm, model.transformer.h[-1].mlp.c_proj.weight.norm(dim=1))


# 6. Released vectors


def test_6_cosines_of_the_released_refusal_vectors():
    folder = Path(os.environ.get("STEERKERN_POST_TRAINING_TENSORS", "no folder"))
    if not folder.is_dir():
        pytest.skip("STEERKERN_POST_TRAINING_TENSORS names no folder with the refusal_directions of the release")
    read = {"base": None, "instruct": None, "sft": None}
    for file in sorted(folder.glob("*.pt")):
        name = next((kind for kind in ("instruct", "sft") if kind in file.name.lower()), "base")
        read[name] = torch.load(file, weights_only=True).float().flatten()
    for one, other, wanted in (("base", "instruct", 0.251), ("base", "sft", 0.073), ("instruct", "sft", 0.435)):
        assert torch.nn.functional.cosine_similarity(read[one], read[other], dim=0) == pytest.approx(wanted, abs=1e-3)


# 7 to 9. Behaviour of the organism's base and post-trained pair, on held-out words


def test_7_the_truth_probe_tells_held_out_statements_in_both_models(found):
    assert found.headline["probe_own"] >= 0.85
    assert found.headline["probe_cross"] >= 0.80


def test_8_the_truth_vector_turns_the_answer_in_both_models(found):
    assert found.headline["nie_own"] >= 0.3
    effects = {(row["direction"], row["model"]): row["nie"] for row in found["truth"].rows}
    for source, target in (("A", "B"), ("B", "A")):
        assert effects[source, target] >= 0.7 * effects[target, target]


def test_9_the_truth_direction_survives_and_the_refusal_direction_does_not(found):
    assert found.headline["truth_cosine"] >= abs(found.headline["refusal_cosine"]) + 0.3


def test_refusals_are_made_by_post_training(found):
    rows = {(row["direction"], row["model"]): row for row in found["refusal"].rows}
    assert rows["B", "B"]["harmful"] >= 0.95
    assert rows["A", "A"]["harmful"] == 0.0
    assert rows["B", "B"]["steered"] >= 0.9, "its own direction makes it refuse"
    assert rows["B", "B"]["ablated"] <= 0.1, "and without it it answers"
    assert rows["A", "B"]["ablated"] >= rows["B", "B"]["ablated"] + 0.5, "the base model's direction is another"


def test_knowledge_is_found_at_the_same_places(found):
    assert found.headline["knowledge_pearson"] >= 0.8
    names = found.values["tokens"]
    assert names[:5] == ["The", "subject", "is", "object", "."]
    own = normalise(torch.tensor(found.values["maps"]["B in B"]))
    assert own[-1].argmax() == len(names) - 1, "the last layer's effect is at the last token"


def test_models_that_never_read_a_statement_have_no_truth_direction(planted, bare, sets):
    """The negative control: the same words, and nothing that was told true or false."""
    report = post_training.run(planted, Sets(*({k: v[:16] for k, v in p.items()} for p in vars(sets).values())), bare)
    assert report.headline["probe_own"] < 0.85
    assert abs(report.headline["nie_own"]) < 0.1
    rows = {(row["direction"], row["model"]): row for row in report["refusal"].rows}
    assert rows["A", "A"]["ablated"] <= 0.1, "the planted refusal direction"
    assert rows["A", "B"]["ablated"] >= 0.9, "which is none in the bare model"


# What the parts compute


def test_twenty_bins():
    effects = torch.linspace(-3, 1, 41).reshape(1, -1)
    binned = normalise(effects)
    assert binned[0, :20].eq(0).all()
    assert sorted(set(binned.flatten().tolist())) == pytest.approx([i / 10 for i in range(11)])
    assert normalise(torch.ones(2, 2)).eq(0).all()
    assert pearson(effects, 2 * effects + 1) == pytest.approx(1.0)
    assert pearson(effects, torch.zeros(41)) is None


def test_states_are_centred_per_topic_and_the_vector_is_the_difference_of_means(base, told):
    made = asked(base, told.train)
    found = read(base, made)
    topics = [pair.topic for pair in made.pairs] * 2
    for topic in ("things", "deeds"):
        here = torch.tensor([t == topic for t in topics])
        assert found.states[here].mean(0).abs().max() < 1e-4
    direction = found.direction(1)
    up, down = found.states[found.truths, 1].mean(0), found.states[~found.truths, 1].mean(0)
    unit = direction / direction.norm()
    torch.testing.assert_close(((up - down) @ unit) * unit, direction, rtol=1e-4, atol=1e-4)
    probe = fit(found, 1)
    again = [probe.slope * float(h @ direction) + probe.bias > 0 for h in found.states[:, 1]]
    right = [guess == bool(truth) for guess, truth in zip(again, found.truths, strict=True)]
    assert probe.accuracy(found, 1) == pytest.approx(sum(right) / len(right))


def test_the_vector_is_written_on_the_period_and_the_token_before(base, told):
    made = asked(base, told.heldout[:6])
    vector = 3 * torch.randn(base.width, generator=torch.Generator().manual_seed(0))

    def difference(prompts, sign):
        odds = []
        for prompt in prompts:

            def add(layer, site, h, last=prompt.t_inst):
                if site == "resid_post" and layer in (1, 2):
                    h = h.clone()
                    h[:, last - 1 : last + 1] += sign * vector
                return h

            with changed(base.model, add):
                p = logits(base.model, torch.tensor([prompt.ids]))[0, -1].softmax(-1)
            odds.append(p[made.labels[0]] - p[made.labels[1]])
        return float(torch.stack(odds).mean())

    stock = (difference(made.true, 0), difference(made.false, 0))
    found = intervene(base, made, vector, (1, 2), stock)
    raised, lowered = difference(made.false, 1), difference(made.true, -1)
    wanted = Effect((raised - stock[1]) / (1 - stock[1]), (lowered - stock[0]) / (-1 - stock[0]))
    assert found.to_true == pytest.approx(wanted.to_true, abs=1e-4)
    assert found.to_false == pytest.approx(wanted.to_false, abs=1e-4)
    assert found.mean == pytest.approx((wanted.to_true + wanted.to_false) / 2, abs=1e-4)


def test_demonstrations_come_first_half_of_them_true(base, told):
    question = dataclasses.replace(GENERIC, suffix=" This is:\n", true="TRUE", false="FALSE")  # one line each
    made = ask(base.tokenizer, question, told.heldout[:8], told.train)
    orders = set()
    for pair, true, false in zip(made.pairs, made.true, made.false, strict=True):
        shown = [line == "TRUE" for line in true.text.split("\n")[1:-1:2]]
        assert sorted(shown) == [False, False, True, True]
        orders.add(tuple(shown))
        before = true.text.removesuffix(pair.true + question.suffix)
        assert before != true.text
        assert before == false.text.removesuffix(pair.false + question.suffix)
        words = base.tokenizer.decode(true.ids[true.t_first : true.t_inst + 1])
        assert words == pair.true
    assert len(orders) > 1


def test_positions_in_the_statement(base, told):
    made, left_out = same_pattern(asked(base, told.heldout), 64)
    assert (len(made.pairs), left_out) == (16, 8)
    assert {pair.topic for pair in made.pairs} == {"things"}
    traced = tokens(base, made)
    assert traced.names[:6] == ("The", "subject", "is", "object", ".", "\\n")
    assert traced.facts == (1, 3)
    assert traced.positions[-1] == -1
    assert len(same_pattern(asked(base, told.heldout), 5)[0].pairs) == 5


# Files and bad input


def write(folder, pairs, name="pairs.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps({"true": p.true, "false": p.false, "topic": p.topic}) + "\n" for p in pairs))
    return path


def test_statements_come_from_files(tmp_path, told):
    path = write(tmp_path, told.train)
    assert read_pairs(path) == list(told.train)
    made = split(read_pairs(path))
    assert {pair.topic for pair in made.heldout} == {"deeds"}, "the last topic is held out"
    one = split([pair for pair in told.train if pair.topic == "things"])
    assert len(one.heldout) == 16
    assert not set(one.heldout) & set(one.train)
    table = tmp_path / "pairs.csv"
    table.write_text("true,false\nA b c.,A d c.\n")
    assert read_pairs(table) == [Pair("A b c.", "A d c.")]


def test_a_run_on_checkpoints(tmp_path, told):
    """Two folders, prompts and statements from files, and words of one's own for the question."""
    path = write(tmp_path, [*told.train, *told.heldout])
    arguments = ["run", "post-training", "--model", organism.path("base"), "--other", organism.path("post")]
    arguments += ["--out", tmp_path / "out", "--pairs", "3"]
    for side in ("harmful", "harmless"):
        lines = [p.text for p in organism.prompts(side, "train", 24) if "\n" not in p.text]
        (tmp_path / f"{side}.txt").write_text("\n".join(lines))
        arguments += [f"--{side}", tmp_path / f"{side}.txt"]
    arguments += ["--statements", path, "--suffix", "\nTrue or false?\n", "--true", "True", "--false", "False"]
    result = CliRunner().invoke(app, [*map(str, arguments), "--no-plots", "--refusal-layer", "3", "--json"])
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    deeds = [pair for pair in (*told.train, *told.heldout) if pair.topic == "deeds"]
    assert document["provenance"]["prompts"]["heldout statements"]["count"] == 2 * len(deeds)
    assert (tmp_path / "out" / "report.md").exists()


def test_bad_input_is_one_sentence_before_the_long_work(tmp_path, base, post, sets, told, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("long work began")

    for name in ("compare", "trace", "transfer"):
        monkeypatch.setattr(post_training, name, never)
    narrow = Subject(tiny_llama(0), base.tokenizer, "narrow")
    with pytest.raises(ValueError, match="their width is 64 and 48"):
        post_training.run(base, sets, narrow)
    one_sided = Sets({**sets.train, "harmful": []}, sets.heldout)
    for part, missing in (("to learn from", one_sided), ("held out", Sets(sets.train, {}))):
        with pytest.raises(ValueError, match=f"there are no harmful prompts {part}; both sides are needed"):
            post_training.run(base, missing, post)
    with pytest.raises(ValueError, match="probe_layer 4: the models have layers 0..3"):
        post_training.run(base, sets, post, probe_layer=4)
    with pytest.raises(ValueError, match="--statements FILE is needed"):
        post_training.run(Subject(base.model, base.tokenizer, "mine"), sets, post)
    with pytest.raises(ValueError, match="belong together"):
        post_training.run(base, sets, post, suffix="?")
    with pytest.raises(ValueError, match="at least 4 statement pairs to learn from are needed, got 3"):
        post_training.run(base, sets, post, statements=write(tmp_path, told.train[:4]))
    long = Pair("The bomb is dangerous.", "The xylophone of them is dangerous.", "things")
    with pytest.raises(ValueError, match="a pair must have equally many tokens: 'The bomb is dangerous.' has 5"):
        post_training.run(base, sets, post, statements=write(tmp_path, [*told.train[:12], *[long] * 2]))
    with pytest.raises(ValueError, match="is given as true and as false"):
        ask(base.tokenizer, ORGANISM, [Pair("A b.", "A b.")], ())
    with pytest.raises(ValueError, match="begin with the same token"):
        ask(base.tokenizer, Question("?", "True", "True", 0), told.train, told.train)
    with pytest.raises(ValueError, match="4 demonstrations need as many other pairs, there are 2"):
        ask(base.tokenizer, GENERIC, told.train[:3], told.train[:3])


def test_the_report_saves_its_pictures(found, tmp_path):
    pytest.importorskip("matplotlib")
    files = {file.name for file in found.save(tmp_path)}
    assert files == {"report.json", "report.md", "knowledge.png", "directions.png"}
    assert found.provenance.scorer == "prefix/1"
    assert {"train harmful", "heldout statements"} <= set(found.provenance.prompts)
