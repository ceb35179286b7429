"""The checks that judge other libraries find each broken adapter, and nothing in the two that are right."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from torch import Tensor

from benchmarks.peers import correctness, hook, steerkern
from benchmarks.peers.absent import ABSENT
from benchmarks.peers.adapter import (
    INSTALL,
    Adapter,
    Change,
    Edit,
    Inputs,
    Place,
    Rows,
    Steered,
    block_outputs,
    editing,
    generate,
    kind_of,
)
from benchmarks.peers.correctness import CHECKS, Case, WeakEdit, judge
from benchmarks.peers.registry import ADAPTERS
from tests.runtime.models import LAYERS, tiny_llama

ROOT = Path(__file__).parent.parent
KINDS = ("add", "ablate", "clamp", "rank 4")


def hooks(places: list[tuple[Place, Change]], model: Any, scope: str = "all") -> AbstractContextManager[Steered]:
    def steered(inputs: Inputs, tokens: int) -> object:
        with editing(places, scope):
            return generate(model, inputs, tokens)

    return contextlib.nullcontext(Steered(model, steered))


def row_0_only(model: Any, rows: Rows) -> Any:
    def first(edit: Change, h: Tensor) -> Tensor:
        h = h.clone()
        h[:1] = edit(h[:1])
        return h

    return hooks([(place, partial(first, edit)) for place, edit in block_outputs(model, rows)], model)


def prompt_only(model: Any, rows: Rows) -> Any:
    return hooks(block_outputs(model, rows), model, "prompt")


def generated_only(model: Any, rows: Rows) -> Any:
    return hooks(block_outputs(model, rows), model, "generated")


def one_layer_late(model: Any, rows: Rows) -> Any:
    moved = [edit and replace(edit, vectors={(n + 1) % LAYERS: v for n, v in edit.vectors.items()}) for edit in rows]
    return hooks(block_outputs(model, moved), model)


def the_last_vector_everywhere(model: Any, rows: Rows) -> Any:
    def last(edit: Edit) -> Edit:
        return replace(edit, vectors=dict.fromkeys(edit.vectors, edit.vectors[max(edit.vectors)]))

    return hooks(block_outputs(model, [edit and last(edit) for edit in rows]), model)


def padding_shifts_rows(model: Any, rows: Rows) -> Any:
    """Leaves as many positions alone at the right as there is padding at the left."""

    def steered(inputs: Any, tokens: int) -> object:
        pads = (1 - inputs["attention_mask"]).sum(1)

        def short(edit: Change, h: Tensor) -> Tensor:
            found = edit(h)
            for row, pad in enumerate(pads.tolist()):
                if pad and h.shape[1] > 1:
                    found[row, -pad:] = h[row, -pad:]
            return found

        places = [(place, partial(short, edit)) for place, edit in block_outputs(model, rows)]
        with editing(places):
            return generate(model, inputs, tokens)

    return contextlib.nullcontext(Steered(model, steered))


def the_first_plan_for_all(model: Any, rows: Rows) -> Any:
    return hooks(block_outputs(model, rows[:1]), model)


@contextlib.contextmanager
def leaves_its_hooks(model: Any, rows: Rows) -> Iterator[Steered]:
    entered = editing(block_outputs(model, rows))
    entered.__enter__()
    KEPT.append(entered)
    yield Steered(model, partial(generate, model))


@contextlib.contextmanager
def leaves_weights_changed(model: Any, rows: Rows) -> Iterator[Steered]:
    with hook.steer(model, rows) as steered:
        yield steered
    model.lm_head.weight.data.mul_(1 + 2**-20)


@contextlib.contextmanager
def removes_the_hooks_of_others(model: Any, rows: Rows) -> Iterator[Steered]:
    with hook.steer(model, rows) as steered:
        yield steered
    for module in model.modules():
        module._forward_hooks.clear()


@contextlib.contextmanager
def one_register_for_all_models(model: Any, rows: Rows) -> Iterator[Steered]:
    REGISTER.append(rows)

    def look_up(n: int, h: Tensor) -> Tensor:
        return block_outputs(model, REGISTER[-1])[n][1](h)

    places = [(place, partial(look_up, n)) for n, (place, _) in enumerate(block_outputs(model, rows))]
    with hooks(places, model) as steered:
        yield steered
    REGISTER.pop()


KEPT: list[Any] = []
REGISTER: list[Rows] = []
BROKEN: list[tuple[Callable[[Any, Rows], Any], str]] = [
    (row_0_only, "every row"),
    (prompt_only, "generated tokens"),
    (generated_only, "prompt tokens"),
    (one_layer_late, "right layer"),
    (the_last_vector_everywhere, "right layer"),
    (padding_shifts_rows, "left padding"),
    (the_first_plan_for_all, "plan per row"),
    (one_register_for_all_models, "two models"),
    (leaves_its_hooks, "restored"),
    (leaves_weights_changed, "restored"),
    (removes_the_hooks_of_others, "restored"),
]
NO_MORE = {
    row_0_only: {"every row", "left padding", "plan per row"},
    one_layer_late: {"every row", "prompt tokens", "generated tokens", "right layer", "left padding", "plan per row"},
}
NO_MORE[the_last_vector_everywhere] = NO_MORE[one_layer_late]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adapter", [hook.ADAPTER, steerkern.ADAPTER], ids=lambda adapter: adapter.name)
def test_nothing_is_found_where_nothing_is_wrong(adapter: Adapter, kind: Any) -> None:
    assert judge(adapter, tiny_llama(), kind).correct == dict.fromkeys(CHECKS, "yes")


@pytest.mark.parametrize(("steer", "check"), BROKEN, ids=lambda value: getattr(value, "__name__", value))
def test_each_fault_is_found_by_its_check(steer: Any, check: str) -> None:
    found = judge(Adapter("broken", KINDS, steer, per_row=True), tiny_llama(), "ablate")
    wrong = {name for name, outcome in found.correct.items() if outcome == "no"}
    assert check in wrong
    assert wrong <= NO_MORE.get(steer, {check}), "what is right is not called wrong"


def test_what_an_api_lacks_is_not_counted_against_it() -> None:
    found = judge(replace(hook.ADAPTER, per_row=False), tiny_llama(), "add")
    assert found.correct["plan per row"] == "n/a"
    assert "no" not in found.correct.values()


def test_an_adapter_that_raises_fails_with_its_own_words() -> None:
    def steer(model: Any, rows: Rows) -> Any:
        if len(rows) > 1:
            raise RuntimeError("one plan only\nand more")
        return hook.steer(model, rows)

    found = judge(Adapter("broken", KINDS, steer, per_row=True), tiny_llama(), "add")
    assert found.correct["plan per row"] == "no"
    assert found.raised == {"plan per row": "RuntimeError: one plan only"}


def test_an_edit_too_weak_to_see_is_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    weak = Case.edit
    monkeypatch.setattr(Case, "edit", lambda *args, **named: replace(weak(*args, **named), strength=1e-7))
    with pytest.raises(WeakEdit, match="the edit changes logits of up to"):
        judge(hook.ADAPTER, tiny_llama(), "add")


def test_the_model_that_is_judged_stays_as_it_was() -> None:
    model = tiny_llama()
    before = correctness.structure(model)
    judge(Adapter("broken", KINDS, leaves_its_hooks), model, "add")
    assert correctness.structure(model) == before


def test_every_peer_names_a_version_or_says_how_to_install_it() -> None:
    pins = [
        line.partition("#")[0].strip() for line in (ROOT / "benchmarks/peers/requirements.txt").read_text().split("\n")
    ]
    assert all(peer.version for peer in ADAPTERS if peer.package is None), "also in a clone that is not installed"
    loose = {Requirement(pin).name for pin in pins if pin}
    extra = {Requirement(line).name for line in _extra("peers")}
    assert loose & extra == set()
    assert {peer.package for peer in ADAPTERS if peer.package} <= loose | extra
    assert '".[peers]"' in INSTALL
    assert "--no-deps -r benchmarks/peers/requirements.txt" in INSTALL
    assert all(peer.reason and peer.home.startswith("https://") for peer in ABSENT)
    assert len({peer.name for peer in (*ADAPTERS, *ABSENT)}) == len(ADAPTERS) + len(ABSENT)


def _extra(name: str) -> list[str]:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads TOML")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return list(project["optional-dependencies"][name])


def test_the_kind_of_a_batch_is_that_of_its_first_edit() -> None:
    edit = Case(hook.ADAPTER, tiny_llama(), "clamp").edit(1)
    assert kind_of([None, edit]) == "clamp"
