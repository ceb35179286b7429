"""One thread and no gradients for every benchmark, and what a result is worth nothing without.

That is device, versions, load and commit.
"""

import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import effort
from steerkern.ops import cpu
from steerkern.report import versions

ALLOCATOR = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")


@pytest.fixture(autouse=True)
def _inference_on_one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(before)


def pytest_sessionstart(session: pytest.Session) -> None:
    session.config.stash[_LOAD] = os.getloadavg()[0]


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["cpu"].pop("flags", None)
    machine_info["device"] = _device()
    machine_info["torch"] = torch.__version__
    machine_info["versions"] = versions()
    machine_info["instruction set"] = cpu.unusable() or cpu._C.isa()
    machine_info["threads"] = 1
    machine_info["load"] = {"before": config.stash[_LOAD], "after": os.getloadavg()[0]}
    machine_info["allocator"] = {name: os.environ[name] for name in ALLOCATOR if name in os.environ}
    machine_info["quick"] = effort.quick()


_LOAD = pytest.StashKey[float]()


def _device() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor() or platform.machine()
