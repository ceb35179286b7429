import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

if os.environ.get("TRITON_INTERPRET") == "1":  # a run of its own, see test_triton_interpret.py
    import interpreter

    interpreter.install()
    interpreter.sum_pairs_at_once()

from runners import BACKENDS, Runner

collect_ignore = ["interpreter.py"]  # the search for doctests would import it into every process


@pytest.fixture(params=BACKENDS, ids=str)
def backend(request: pytest.FixtureRequest) -> Iterator[Runner]:
    runner: Runner = request.param
    if reason := runner.unusable():
        pytest.skip(reason)
    with runner.in_use():
        yield runner


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
