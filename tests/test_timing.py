from __future__ import annotations

import contextlib
import gc

import pytest
import torch

from steerkern import Plan, ablate, organism
from steerkern.timing import Contender, Quartiles, Timings, ablation_hooks, decode_contenders, interleave


@pytest.fixture(scope="module", autouse=True)
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_every_round_runs_every_contender_in_a_turning_order():
    ran = []
    contenders = [Contender(name, lambda name=name: ran.append(name)) for name in "abc"]
    timings = interleave(contenders, rounds=6, warmup=1)
    rounds = ["".join(ran[i : i + 3]) for i in range(0, len(ran), 3)]
    assert len(rounds) == 7
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert {one[0] for one in rounds[1:]} == {"a", "b", "c"}
    assert rounds[1] == rounds[2][::-1]
    assert {name: len(seconds) for name, seconds in timings.seconds.items()} == {"a": 6, "b": 6, "c": 6}


def test_the_setting_is_outside_the_clock_and_left_after_an_error():
    events = []

    @contextlib.contextmanager
    def setting():
        events.append("enter")
        try:
            yield
        finally:
            events.append("leave")

    def fail():
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        interleave([Contender("a", fail, setting)], rounds=1, warmup=0, synchronize=lambda: events.append("wait"))
    assert events == ["enter", "wait", "leave"]
    assert gc.isenabled()


def test_ratios_are_taken_within_rounds():
    timings = Timings({"stock": (1.0, 10.0, 4.0), "ours": (0.5, 5.0, 2.0)})
    assert timings.speedup("ours", "stock") == Quartiles(2.0, 2.0, 2.0)
    assert timings.time("stock").median == 4.0
    assert timings.rate("ours", 10).median == 5.0
    assert timings.to_json() == {"stock": [1.0, 10.0, 4.0], "ours": [0.5, 5.0, 2.0]}


@pytest.mark.parametrize(("names", "rounds"), [("", 1), ("aa", 1), ("a", 0)])
def test_bad_arguments(names, rounds):
    with pytest.raises(ValueError):
        interleave([Contender(name, lambda: None) for name in names], rounds=rounds)


def test_contenders_do_the_same_work():
    model, tokenizer = organism.load()
    prompt = organism.prompts("harmful", "heldout", 1)[0]
    inputs = tokenizer.apply_chat_template(
        prompt.messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    unit = torch.nn.functional.normalize(torch.randn(64, generator=torch.Generator().manual_seed(0)), dim=0)
    plan = Plan(ablate(unit), name="ablate")
    made = {}
    for contender in decode_contenders(model, inputs, 8, plan, unit):
        with contender.setting():
            made[contender.name] = contender.run()
    assert list(made) == ["stock", "hook", "fused", "steerkern"]
    assert all(ids.shape == (1, 8) for ids in made.values())
    assert torch.equal(made["fused"], made["stock"])
    assert torch.equal(made["steerkern"], made["hook"])


def test_hooks_leave_the_model_as_it_was():
    model, _ = organism.load()
    seen = []

    def look_and_fail():
        with ablation_hooks(model, torch.ones(64)):
            seen.append(hooked())
            raise RuntimeError("inside")

    def hooked():
        return sum(len(module._forward_pre_hooks) for module in model.modules())

    with pytest.raises(RuntimeError, match="inside"):
        look_and_fail()
    assert (seen, hooked()) == ([4], 0)
