"""The organism as a subject, and its prompts."""

from __future__ import annotations

import pytest
import torch

from steerkern import organism
from steerkern.methods.sets import bundled
from steerkern.subject import Subject


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def subject(name, **options):
    model, tokenizer = organism.load(name)
    return Subject(model, tokenizer, f"organism ({name})", organism=True, **options)


@pytest.fixture(scope="session")
def planted():
    return subject("planted")


@pytest.fixture(scope="session")
def bare():
    return subject("bare")


@pytest.fixture(scope="session")
def sets():
    return bundled(64)


@pytest.fixture(scope="session")
def thinker():
    return subject("thinking")
