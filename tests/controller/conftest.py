"""The organism and its prompts."""

from __future__ import annotations

import pytest
import torch

from steerkern import organism
from steerkern.extraction import render


@pytest.fixture(scope="package", autouse=True)
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="package")
def planted():
    return organism.load()


@pytest.fixture
def model(planted):
    return planted[0]


@pytest.fixture
def tokenizer(planted):
    return planted[1]


@pytest.fixture
def rendered(tokenizer):
    """Prompts of a kind as the organism reads them."""

    def of(kind, count, split="train"):
        return render(tokenizer, [prompt.messages for prompt in organism.prompts(kind, split, count)])

    return of
