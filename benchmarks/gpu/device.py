"""The machine under the gate: a GPU, or, for a dry run, the CPU with the same calls."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

Run = Callable[[], Any]


class Device:
    """The CPU: a captured graph is the function itself, an event the clock. Shapes are tiny."""

    dry = True
    name = "cpu"
    backends: tuple[str, ...] = ("cpu", "reference")
    cache_bytes = 1 << 16

    def last_argument(self) -> int:
        """What a bound kernel takes last: here the number of threads."""
        return 1

    def synchronize(self) -> None:
        """Wait until everything has run."""

    def graph(self, run: Run) -> Run:
        """``run`` as one replayable unit."""
        run()
        return run

    def timed(self, run: Run) -> float:
        """Seconds on the device."""
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    def describe(self) -> dict[str, Any]:
        """Device, versions."""
        return {"device": "cpu", "torch": torch.__version__}

    def free(self) -> None:
        """Give memory back."""


class Gpu(Device):
    """The current CUDA device."""

    dry = False
    name = "cuda"
    backends = ("cuda", "triton")

    def __init__(self) -> None:
        self.properties = torch.cuda.get_device_properties(0)
        self.cache_bytes = self.properties.L2_cache_size

    def last_argument(self) -> int:
        handle: int = torch.cuda.current_stream().cuda_stream
        return handle

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def graph(self, run: Run) -> Run:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()  # whatever compiles or loads does it here
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    def timed(self, run: Run) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3

    def describe(self) -> dict[str, Any]:
        p = self.properties
        driver = torch._C._cuda_getDriverVersion() if hasattr(torch._C, "_cuda_getDriverVersion") else None
        return {
            "device": p.name,
            "capability": f"{p.major}.{p.minor}",
            "processors": p.multi_processor_count,
            "l2_bytes": p.L2_cache_size,
            "memory_bytes": p.total_memory,
            "driver_api": driver,
            "cuda": torch.version.cuda,
            "torch": torch.__version__,
        }

    def free(self) -> None:
        torch.cuda.empty_cache()


def interleaved(device: Device, sides: Mapping[str, Run], rounds: int, warmup: int = 3) -> dict[str, list[float]]:
    """Seconds of every side in every round; the order turns from round to round."""
    names = list(sides)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-warmup, rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            taken = device.timed(sides[name])
            if number >= 0:
                seconds[name].append(taken)
    return seconds


def quartiles(values: list[float], digits: int = 6) -> list[float]:
    """First quartile, median, third quartile."""
    points = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    return [round(float(v), digits) for v in points]


def ratio(over: list[float], under: list[float]) -> list[float]:
    """Quartiles of ``over / under`` within rounds."""
    return quartiles([a / b for a, b in zip(over, under, strict=True)], 4)
