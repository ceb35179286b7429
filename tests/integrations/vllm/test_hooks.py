"""How the hooks stand in classes: once, passing on what they do not need, and saying so where a vLLM lacks them."""

from __future__ import annotations

import importlib.metadata
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from steerkern.errors import PlanError
from steerkern.integrations.vllm import hooks
from tests.integrations.vllm.engine import config


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    class Thing:
        def method(self, a: int, b: int = 2) -> int:
            return a + b

    made: Any = ModuleType("some_module")
    made.Thing = Thing
    monkeypatch.setitem(sys.modules, "some_module", made)
    return made


def test_a_method_is_wrapped_once(module: Any) -> None:
    def double(stock: Any, *args: Any, **kwargs: Any) -> int:
        return 2 * int(stock(*args, **kwargs))

    for _ in range(3):  # vLLM may load its plugins several times
        hooks.wrap("some_module", "Thing", "method", double)
    assert module.Thing().method(1, b=3) == 8
    assert module.Thing.method.__name__ == "method"


@pytest.mark.parametrize(("owner", "name"), [("Thing", "gone"), ("Gone", "method")])
def test_a_vllm_without_the_place_is_named(module: Any, owner: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["vllm"], "__version__", "9.9", raising=False)
    with pytest.raises(ImportError, match=r"knows vLLM 0.32, and this is 9.9: .*(gone|Gone)"):
        hooks.wrap("some_module", owner, name, lambda stock: None)


def test_a_model_that_no_hook_saw_is_an_error_not_a_plain_run() -> None:
    runner = SimpleNamespace(get_model=SimpleNamespace, vllm_config=config({}))
    with pytest.raises(PlanError, match="loaded in a way"):
        hooks._steering(runner)
    assert hooks._steering(SimpleNamespace(get_model=SimpleNamespace, vllm_config=config())) is None


def test_runners_hand_over_who_comes_goes_and_runs() -> None:
    calls: list[Any] = []

    class Steering:
        def __getattr__(self, name: str) -> Any:
            return lambda *args: calls.append((name, *args))

    model = SimpleNamespace(**{hooks.HELD: Steering()})
    ticket = {"plans": [["d", 1.0, None]], "first": 0, "by_length": 0, "prompt": 4, "receipt": ""}
    new = [
        SimpleNamespace(req_id="a", sampling_params=SimpleNamespace(extra_args={"steerkern_ticket": ticket})),
        SimpleNamespace(req_id="b", sampling_params=SimpleNamespace(extra_args=None)),
    ]
    scheduled = SimpleNamespace(scheduled_new_reqs=new, finished_req_ids={"z"})

    class Numbers(list[int]):
        def tolist(self) -> list[int]:
            return list(self)

        def __getitem__(self, at: Any) -> Any:
            return Numbers(super().__getitem__(at))

    def stock(*args: Any) -> str:
        return "stock"

    batch = SimpleNamespace(req_ids=["a", "b"], num_reqs=2, num_computed_tokens_cpu=Numbers([0, 3, 7]))
    runner = SimpleNamespace(get_model=lambda: model, input_batch=batch)
    assert hooks._update_states(stock, runner, scheduled) == "stock"
    assert hooks._prepare_inputs(stock, runner, scheduled, Numbers([4, 1])) == "stock"
    assert [call[0] for call in calls] == ["leave", "arrive", "forward"]
    assert calls[1][1] == "a"
    assert calls[2][1:] == (["a", "b"], [0, 3], [4, 1])

    calls.clear()
    v2 = SimpleNamespace(req_ids=["b"], num_computed_tokens_np=Numbers([5]), num_scheduled_tokens=Numbers([1]))
    hooks._finish_requests(stock, runner, scheduled)
    hooks._add_requests(stock, runner, scheduled)
    assert hooks._prepare_inputs_v2(lambda *args: v2, runner, scheduled, None) is v2
    assert [call[0] for call in calls] == ["leave", "arrive", "forward"]
    assert calls[2][1:] == (["b"], [5], [1])


def test_the_wheel_names_its_plugins() -> None:
    entries = importlib.metadata.entry_points(name="steerkern")
    found = {entry.group: entry.value for entry in entries}
    if not found:
        pytest.skip("steerkern is not installed here, it runs from its folder")
    assert found["vllm.general_plugins"] == "steerkern.integrations.vllm:register"
    assert found["vllm.endpoint_plugins"] == "steerkern.integrations.vllm:routes"
