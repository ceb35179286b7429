from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import steerkern as sk
from steerkern.integrations.vllm import anatomy
from steerkern.integrations.vllm.anatomy import Anatomy
from tests.integrations.vllm.engine import LAYERS, WIDTH, Model, config


@pytest.fixture(autouse=True)
def _exceptions(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's own error, which API servers turn into HTTP 400, where vLLM is not installed."""

    class VLLMValidationError(Exception):
        def __init__(self, message: str, *, parameter: str | None = None) -> None:
            super().__init__(message)
            self.parameter = parameter

    module = ModuleType("vllm.exceptions")
    module.VLLMValidationError = VLLMValidationError  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.exceptions", module)


def vector(seed: int) -> torch.Tensor:
    return torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def plans() -> dict[str, sk.Plan]:
    return {
        "add": sk.Plan(sk.add(vector(1), 3.0), layers=1, name="add"),
        "ablate": sk.Plan(sk.ablate(vector(2)), name="ablate", scope="decode"),
        "late": sk.Plan(sk.add(vector(3), 5.0), layers=LAYERS - 1, site="resid_post", name="late", scope="reply"),
    }


@pytest.fixture
def folder(tmp_path: Path, plans: dict[str, sk.Plan]) -> Path:
    for name, plan in plans.items():
        plan.save_pretrained(tmp_path / "plans" / name)
    return tmp_path / "plans"


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model().eval()


@pytest.fixture
def examined(monkeypatch: pytest.MonkeyPatch) -> Callable[[torch.nn.Module], Anatomy]:
    def forward(model: Any, vllm_config: Any) -> None:
        with torch.no_grad():
            model(torch.arange(anatomy.TOKENS))

    monkeypatch.setattr(anatomy, "_forward", forward)
    return lambda model: anatomy.examine(model, config())


@pytest.fixture
def given() -> SimpleNamespace:
    """Sampling parameters."""
    return SimpleNamespace(extra_args=None)
