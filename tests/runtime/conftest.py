from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from steerkern.ops.dispatch import backends
from tests.runtime.models import VOCABULARY, WIDTH, tiny_llama


@pytest.fixture
def model() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture
def vector() -> Tensor:
    return torch.nn.functional.normalize(torch.randn(WIDTH, generator=torch.Generator().manual_seed(7)), dim=0)


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(3))


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    if reason := backends()[request.param]:
        pytest.skip(reason)
    return str(request.param)
