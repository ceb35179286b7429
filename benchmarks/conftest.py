import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from steerkern.ops import cpu


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    machine_info["device"] = f"{len(names)} x {names[0]}" if names else platform.processor()
    machine_info["torch"] = torch.__version__
    machine_info["instruction set"] = cpu.unusable() or cpu._C.isa()
