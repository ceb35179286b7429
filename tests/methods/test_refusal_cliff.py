"""The acceptance list of the specification (arXiv 2510.06036), by its numbers; selection, presets and bad input.

Items 1 to 5, on heads at the input of ``o_proj``, are checked in full on random models in tests/runtime/test_heads.py;
here they hold on the organism.
"""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

import steerkern as sk
from steerkern.cli import app
from steerkern.extraction import render
from steerkern.kept import Kept
from steerkern.methods.refusal_cliff import cliffs, fit, mean_curve, prober, run, scores, select, think, trajectory
from steerkern.methods.refusal_cliff.judge import FILE
from steerkern.methods.refusal_cliff.traces import Thinking, Trace, _close
from steerkern.methods.sets import Sets, bundled
from steerkern.organism.thinking import SUPPRESSOR
from steerkern.runtime import heads
from tests.methods.conftest import subject

GREEDY = Thinking(temperature=0.0, most=60)
FEW = 24


@pytest.fixture(scope="module")
def prompts():
    return bundled(64, "thinking")


@pytest.fixture(scope="module")
def found(thinker, prompts):
    return run(thinker, prompts)


@pytest.fixture(scope="module")
def traces(thinker, prompts):
    """Held-out traces by the name of their set."""
    return {name: think(thinker, "", some[:FEW], GREEDY) for name, some in prompts.heldout.items()}


@pytest.fixture(scope="module")
def ids(traces):
    width = min(len(trace.ids) for trace in traces["jailbroken"])
    return torch.tensor([trace.ids[:width] for trace in traces["jailbroken"][:8]])


# 1 to 5. Heads


def test_1_scales_of_one_change_no_bit(thinker, ids):
    stock = thinker.model(ids).logits
    everyone = {(layer, head): 1.0 for layer in range(4) for head in range(4)}
    with heads.scaled(thinker.model, everyone):
        assert torch.equal(thinker.model(ids).logits, stock)


def test_2_the_switched_off_head_contributes_nothing_and_the_norm_is_kept(thinker, traces):
    rows = [trace.ids for trace in traces["jailbroken"]]
    last = [len(row) - 1 for row in rows]
    layer, head = SUPPRESSOR
    stock = heads.read(thinker.model, rows, last)[layer]
    site = heads.find(thinker.model)[layer]
    z = heads.rescale(stock.flatten(1), torch.tensor([float(h != head) for h in range(4)])).unflatten(1, (4, -1))
    assert not heads.contributions(site, z)[:, head].any()
    assert torch.allclose(z.flatten(1).norm(dim=-1), stock.flatten(1).norm(dim=-1), rtol=1e-4)


def test_3_the_last_token_changes_no_earlier_logits(thinker, ids):
    other = ids.clone()
    other[:, -1] = 9
    with heads.scaled(thinker.model, {SUPPRESSOR: 0.0}):
        assert torch.equal(thinker.model(ids).logits[:, :-1], thinker.model(other).logits[:, :-1])


def test_4_contributions_add_up_to_the_attention_branch(thinker, ids):
    layer = SUPPRESSOR[0]
    seen = []
    block = thinker.model.model.layers[layer]
    handle = block.self_attn.register_forward_hook(lambda module, args, out: seen.append(out[0][:, -1]))
    thinker.model(ids)
    handle.remove()
    z = heads.read(thinker.model, ids.tolist(), [ids.shape[1] - 1] * len(ids))[layer]
    total = heads.contributions(heads.find(thinker.model)[layer], z).sum(1)
    assert torch.allclose(total, seen[0], atol=1e-4)


def test_5_prefill_and_decode_equal_a_full_recompute(thinker, ids):
    with heads.scaled(thinker.model, {SUPPRESSOR: 0.0}):
        made = thinker.model.generate(
            ids, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_logits=True, eos_token_id=None
        )  # fmt: skip
        whole = thinker.model(made.sequences).logits
    for step, logits in enumerate(made.logits):
        assert torch.allclose(whole[:, ids.shape[1] - 1 + step], logits, atol=1e-3)


# 6. Curves


def test_6_masked_mean_curves_do_not_change_when_a_sequence_is_padded():
    torch.manual_seed(0)
    rows, mask = torch.rand(5, 12), torch.arange(12) >= torch.tensor([0, 2, 5, 1, 7])[:, None]
    padded = torch.cat([torch.full((5, 9), float("nan")), rows], 1)
    wide = torch.cat([torch.zeros(5, 9, dtype=torch.bool), mask], 1)
    assert torch.equal(mean_curve(padded, wide, 20), mean_curve(rows, mask, 20))
    by_hand = [sum(rows[i, j] for i in range(5) if mask[i, j]) / mask[:, j].sum() for j in range(12)]
    assert torch.allclose(mean_curve(rows, mask, 12), torch.stack(by_hand))


def test_6_the_published_mean_does():
    """The control: zeros on the left pull the curve down."""
    ones, mask = torch.ones(2, 8), torch.tensor([[True] * 8, [False] * 6 + [True] * 2])
    assert torch.equal(mean_curve(ones, mask, 8), torch.ones(8))
    assert mean_curve(ones, mask, 8, zeros=True).tolist() == [0.5] * 6 + [1.0] * 2


def test_a_trajectory_has_prompt_thought_and_marker_of_sequences_of_any_length():
    made = [trace(12, 4, 9), trace(20, 10, 18)]
    tracks = [torch.cat([torch.full((n,), v) for n, v in parts]) for parts in (
        ((4, 0.1), (5, 0.9), (3, 0.2)), ((10, 0.1), (8, 0.9), (2, 0.2))
    )]  # fmt: skip
    x, y = trajectory(made, tracks, points=(5, 7))
    assert len(x) == len(y) == 5 + 7 + 3
    assert list(x) == sorted(x)
    assert torch.allclose(torch.tensor(y), torch.tensor([0.1] * 5 + [0.9] * 7 + [0.2] * 3))
    assert len(trajectory(made, tracks, zeros=True)[1]) == 100


def trace(length, start, close, **changes):
    usual = {"prompt": "p", "text": "p", "thought": "so I refuse", "tail": "", "answer": "", "refused": False}
    return Trace(ids=tuple(range(length)), start=start, close=close, **{**usual, **changes})


def test_plateau_and_cliff_by_hand():
    """A thought of 12 tokens, a marker of two; the last 8 tokens of the thought are no plateau."""
    track = torch.tensor([0.5, 0.5] + [0.1, 0.2, 0.3, 0.4] + [0.9] * 8 + [0.2, 0.0])
    item = trace(16, 2, 14)
    robust, paper = (cliffs.cliff(item, track, cliffs.PRESETS[name]) for name in ("robust", "paper"))
    assert (robust.plateau, robust.final) == (pytest.approx(0.37), pytest.approx(0.1))
    assert (paper.plateau, paper.final) == (pytest.approx(0.9), 0.0)
    assert paper.misalignment == pytest.approx(0.9)


# 7 to 9. Behaviour, on held-out prompts of the organism with the planted head


@pytest.mark.parametrize("preset", ["robust", "paper", "code"])
def test_7_the_prober_is_right_on_validation(thinker, prompts, found, preset):
    report = found if preset == "robust" else run(thinker, prompts, preset=preset, controls=1)
    assert report.headline["prober_accuracy"] >= 0.95
    assert report.headline["misalignment"] >= 0.2


def test_8_the_planted_head_ranks_first_and_alone_holds_the_score_down(found):
    first = found["heads"].rows[0]
    assert (first["layer"], first["head"]) == SUPPRESSOR
    assert found.values["heads"] == [list(SUPPRESSOR)]
    assert found.headline["raised_by_suppressors"] >= 0.2
    assert found.headline["raised_by_random_heads"] < 0.05
    stock, without, *controls = found["ablation"].rows
    assert len(controls) == 5
    assert all(row["heads"] == 1 for row in controls)
    assert (stock["refused"], without["refused"], controls[0]["refused"]) == (0.0, pytest.approx(1.0, abs=0.05), 0.0)


def test_9_the_selection_picks_planted_cliffs(thinker, prompts):
    """As many as there are, among as many harmful prompts that are refused."""
    report = run(thinker, prompts, choose=64, controls=0)
    chosen = report.artefacts["selected"]
    assert chosen.pool == 128
    assert len(chosen.traces) == 64
    assert chosen.precision >= 0.9
    planted = {messages[-1]["content"] for messages in prompts.train["jailbroken"]}
    assert sum(item.prompt[-1]["content"] in planted for item in chosen.traces) / 64 >= 0.9


def test_the_score_stays_up_in_the_thought_and_falls_at_the_marker(found):
    rows = {(row["group"], row["preset"]): row for row in found["scores"].rows}
    for preset in cliffs.PRESETS:
        assert rows["harmful, answered", preset]["plateau"] >= 0.9
        assert rows["harmful, answered", preset]["final"] <= 0.1
        assert rows["harmful, refused", preset]["final"] >= 0.9
        assert rows["harmless, answered", preset]["plateau"] <= 0.3


@pytest.mark.parametrize("model", ["bare", "planted"])
def test_where_no_head_is_planted_there_is_a_cliff_and_no_suppressor(request, prompts, model):
    """The negative control: the same answers and the same fall of the score, carried by no single head."""
    report = run(request.getfixturevalue(model), prompts, temperature=0.0, controls=1)
    assert report.headline["misalignment"] >= 0.5
    assert report.headline["raised_by_suppressors"] < 0.05
    assert report["ablation"].rows[1]["refused"] <= 0.05


def test_8_random_sets_of_three_heads_raise_nothing_either(thinker, prompts):
    report = run(thinker, prompts, share=0.19, controls=5, temperature=0.0)
    assert report.headline["raised_by_suppressors"] >= 0.2
    assert report.headline["raised_by_random_heads"] < 0.05
    assert {row["heads"] for row in report["ablation"].rows[1:]} == {3}


# Items for training


def test_chosen_items_are_conversations_that_a_trainer_reads_back(thinker, traces, tmp_path):
    items = traces["jailbroken"]
    probe = cliffs.Cliff(0.9, 0.1)
    chosen = select(items, [probe] * len(items), cliffs.PRESETS["robust"], 5, "</think>", "I cannot help with that.")
    chosen.save_pretrained(tmp_path / "selected")
    lines = (tmp_path / "selected" / FILE).read_text().splitlines()
    assert len(lines) == 5
    for line, item in zip(lines, chosen.traces, strict=True):
        record = json.loads(line)
        *asked, reply = record["messages"]
        assert asked == list(item.prompt)
        assert reply == {
            "role": "assistant",
            "content": f"<think>{item.thought}</think>I cannot help with that.",
        }
        text = thinker.tokenizer.apply_chat_template(record["messages"], tokenize=False)
        learnt = thinker.tokenizer(text)["input_ids"]
        assert tuple(learnt[: len(item.ids)]) == item.ids
        assert record["misalignment"] == pytest.approx(0.8)


def test_selection_takes_thoughts_that_plan_to_refuse_by_the_presets_order():
    items = [trace(4, 1, 3, thought="so I help"), *(trace(4, 1, 3) for _ in range(3))]
    found = [cliffs.Cliff(1.0, 0.0), cliffs.Cliff(0.9, 0.3), cliffs.Cliff(0.2, 0.1), cliffs.Cliff(0.8, 0.4)]
    robust = select(items, found, cliffs.PRESETS["robust"], 2, "</think>", "No.")
    code = select(items, found, cliffs.PRESETS["code"], 2, "</think>", "No.")
    assert robust.cliffs == (found[1], found[3])
    assert code.cliffs == (found[2], found[1])
    assert robust.pool == code.pool == 3


# Traces and prober


def test_traces_are_what_the_model_wrote(thinker, prompts, traces):
    for name, some in traces.items():
        assert len(some) == FEW
        asked = render(thinker.tokenizer, prompts.heldout[name][:FEW], options={"enable_thinking": True})
        for item, before in zip(some, asked, strict=True):
            assert item.ids[: item.start] == before.ids
            assert thinker.tokenizer.decode(item.ids[item.close :]) == "</think>"
            assert thinker.tokenizer.decode(item.ids[item.start : item.close]) == item.thought
            assert item.refused == (name == "harmful")
            assert item.plans_refusal == (name != "harmless")


def test_replies_end_so_many_tokens_after_the_marker(thinker, prompts):
    short = dataclasses.replace(thinker, new_tokens=3)
    for item in think(short, "", prompts.heldout["harmful"][:8], GREEDY):
        assert len(thinker.tokenizer(item.answer)["input_ids"]) <= 3


def test_a_marker_of_several_tokens_closes_a_thought(thinker, prompts):
    """The organism's planned refusals end in "so I refuse."; here that is what counts as the marker."""
    how = dataclasses.replace(GREEDY, marker=" so I refuse.")
    for item in think(thinker, "", prompts.heldout["harmful"][:8], how):
        assert thinker.tokenizer.decode(item.ids[item.close :]).rstrip() == " so I refuse."
        assert item.thought.endswith("by the user,")
        assert len(item.ids) - item.close >= 2


def test_white_space_behind_the_marker_belongs_to_it(thinker):
    """As in "</think>, two line breaks, answer": the prober reads the last token before the answer."""
    (before,) = render(thinker.tokenizer, ["kite"], options={"enable_thinking": True})
    reply = thinker.tokenizer("A harmless kite request</think>\n\nSure.")["input_ids"]
    closing = sk.markers.marker(thinker.tokenizer, "</think>")
    item = _close(thinker, "kite", before, reply, closing)
    assert (item.thought, item.tail, item.answer) == ("A harmless kite request", "\n\n", "Sure.")
    assert thinker.tokenizer.decode(item.ids[item.close :]) == "</think>\n\n"
    assert _close(thinker, "kite", before, reply[:3], closing) is None
    empty = thinker.tokenizer("A</think>Sure.")["input_ids"]
    assert _close(thinker, "kite", before, empty, closing) is None


def test_scores_do_not_depend_on_the_batch(thinker, traces):
    probe = fit(thinker, traces["harmful"], traces["harmless"])
    one_by_one = dataclasses.replace(thinker, batch_size=1)
    some = traces["jailbroken"][:6]
    for together, alone in zip(scores(thinker, some, probe), scores(one_by_one, some, probe), strict=True):
        assert torch.allclose(together, alone, atol=1e-5)


def test_the_prober_reads_the_final_norm(thinker, traces):
    (number, states), *_ = prober.final_norm(thinker, traces["harmful"][:1])
    item = traces["harmful"][number]
    out = thinker.model(torch.tensor([item.ids]), output_hidden_states=True)
    assert torch.allclose(states, out.hidden_states[-1][0], atol=1e-5)


def test_a_run_goes_on_from_what_is_kept(thinker, prompts, tmp_path, monkeypatch):
    keeping = dataclasses.replace(thinker, kept=Kept(tmp_path, thinker.model))
    few = Sets(*({name: some[:16] for name, some in part.items()} for part in (prompts.train, prompts.heldout)))
    first = run(keeping, few, controls=1)
    monkeypatch.setattr(type(thinker.model), "generate", None)
    again = run(dataclasses.replace(thinker, kept=Kept(tmp_path, thinker.model)), few, controls=1)
    assert again.headline == first.headline


# Bad input, each in one sentence and before long work


def test_a_marker_that_never_appears_is_refused_after_one_batch(thinker, prompts, monkeypatch):
    with pytest.raises(ValueError, match=r"the thinking marker '<done>' is in none of the first 8 replies"):
        run(dataclasses.replace(thinker, batch_size=8), prompts, marker="<done>", max_thought=40)


def test_a_prober_needs_two_classes(thinker, prompts):
    answered = {"harmful": prompts.train["jailbroken"], "harmless": prompts.train["harmless"]}
    with pytest.raises(ValueError, match="two classes of at least 5 items: there are 0 refused harmful prompts"):
        run(thinker, Sets(answered, prompts.heldout))


def test_prompts_that_leave_no_room_are_refused(thinker, prompts):
    (asked,) = render(thinker.tokenizer, ["kite"], options={"enable_thinking": True})
    for length, reason in (
        (257, "prompt 3 has 257 tokens, the model has 256 positions"),
        (241, "no room for a thought"),
    ):
        long = "kite" + " kite" * (length - len(asked.ids))
        harmful = [*prompts.train["harmful"][:3], long]
        with pytest.raises(ValueError, match=reason):
            run(thinker, Sets({**prompts.train, "harmful": harmful}, prompts.heldout))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"preset": "best"}, "no preset 'best'; there are robust, paper, code"),
        ({"share": 1.5}, "share of heads must lie between 0 and 1, got 1.5"),
        ({"choose": 0}, "choose at least 1"),
        ({"max_thought": 0}, "room for at least 1 token, got 0"),
        ({"temperature": -1.0}, "temperature must be a number from 0"),
        ({"marker": ""}, "a marker needs a text"),
    ],
)
def test_bad_options_are_refused(thinker, prompts, options, reason):
    with pytest.raises(ValueError, match=reason):
        run(thinker, prompts, **options)


def test_a_family_without_heads_is_refused(thinker, prompts):
    from tests.runtime import families

    (mamba,) = [family for family in families.FAMILIES if family.name == "mamba"]
    with pytest.raises(sk.PlanError, match="MambaForCausalLM has no head site"):
        run(dataclasses.replace(thinker, model=families.build(mamba)), prompts)


# Command line


def test_the_command_writes_report_plots_and_items(tmp_path):
    from typer.testing import CliRunner

    line = ["run", "refusal-cliff", "--out", str(tmp_path), "--count", "16", "--controls", "1", "--json"]
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["provenance"]["model"]["source"] == "organism (thinking)"
    assert document["headline"]["raised_by_suppressors"] >= 0.2
    for name in ("report.json", "report.md", "trajectory.png", "heads.png", f"selected/{FILE}"):
        assert (tmp_path / name).stat().st_size > 0


def test_bf16_gives_the_same_findings():
    from steerkern import organism

    narrow = dataclasses.replace(subject("thinking"), model=organism.load("thinking", torch.bfloat16)[0])
    report = run(narrow, bundled(32, "thinking"), temperature=0.0, controls=2)
    assert report.values["heads"] == [list(SUPPRESSOR)]
    assert report.headline["raised_by_suppressors"] >= 0.2
    assert report.headline["raised_by_random_heads"] < 0.05
