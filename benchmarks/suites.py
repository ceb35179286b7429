"""The suites, and how one of them runs: a fresh process of one thread that leaves ``NAME.json``.

``steerkern bench`` runs them all; this is the list to add one to.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # others cost a second to load
}
TUNED_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "4294967296"}
"""glibc keeps large blocks instead of giving them back to the kernel, which eager torch gains by."""
LAUNCH = (
    "import runpy, sys; sys.path = [p for p in sys.path if p]; "
    "del sys.argv[0]; runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
)
"""``python -m``, without the working folder in front of the steerkern that was asked to run."""
FEW_ROUNDS = ("--benchmark-max-time=0.2", "--benchmark-min-rounds=3", "--benchmark-calibration-precision=5")
"""Of the benchmarks that pytest-benchmark times by itself."""
PERCENT = re.compile(r"\[ *(\d+)%\]$")


@dataclass(frozen=True)
class Suite:
    """One process that measures."""

    name: str
    about: str
    tests: tuple[str, ...] = ()
    """Files of pytest-benchmark; those that are not in this clone are left out."""
    cases: str = ""
    """Which of their cases, as pytest's -k; all by default."""
    few: str = ""
    """The same for a quick run."""
    brief: bool = True
    """Whether a quick run of everything has it; each process takes seconds to import torch."""
    module: str = ""
    """Instead of tests, a module that is run with ``arguments``."""
    arguments: tuple[str, ...] = ()
    few_arguments: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    missing: Callable[[], str] = str
    """Why it cannot run here; empty if it can."""

    def unable(self) -> str:
        """Why it cannot run here; empty if it can."""
        if self.tests and not self._files():
            return f"{self.tests[0]} is not in this clone"
        return self.missing()

    def command(self, out: Path, quick: bool) -> list[str]:
        """Arguments of the Python interpreter; ``{out}`` stands for the folder of the results."""
        if self.module:
            given = (self.few_arguments or self.arguments) if quick else self.arguments
            return ["-c", LAUNCH, self.module, *(argument.format(out=out) for argument in given)]
        options = ["-c", "pyproject.toml", "-o", "pythonpath=", "-o", "addopts=--import-mode=importlib", "-v"]
        options += [
            "-p",
            "no:cacheprovider",
            "-p",
            "pytest_benchmark.plugin",
            f"--benchmark-json={out / self.name}.json",
        ]
        cases = (self.few if quick else "") or self.cases
        options += [*(FEW_ROUNDS if quick else ()), *(["-k", cases] if cases else ())]
        return ["-c", LAUNCH, "pytest", *options, *self._files()]

    def _files(self) -> list[str]:
        found = [f"benchmarks/{name}" for name in self.tests]
        return [name for name in found if (ROOT / name.partition("::")[0]).exists()]


def _no_gpu() -> str:
    import torch

    return "" if torch.cuda.is_available() else "no CUDA device here"


def _no_vllm() -> str:
    found = importlib.util.find_spec("vllm")
    return "" if found else "vLLM is not installed here; tests/serving/run.sh makes an environment that has it"


def _no_kernels() -> str:
    from steerkern.ops import cpu

    return cpu.unusable()


SUITES = {
    suite.name: suite
    for suite in (
        Suite(
            "ops",
            "the fused op",
            ("test_ops.py",),
            few="bf16 and (1-2048-1 or 64-2048-4 or 2048-bf16) and not compile",
            missing=_no_kernels,
        ),
        Suite("attach", "attach, detach, memory", ("test_attach.py",)),
        Suite("swap", "row maps, changes of plans", ("test_swap.py",), few="8-256 or swap-0"),
        Suite("decode", "decoding", ("test_decode.py",), few="9M-fp32-1]", missing=_no_kernels),
        Suite("prefill", "prefill", ("test_prefill.py",), few="9M-64", missing=_no_kernels),
        Suite("controller", "a controller's cost", ("test_controller.py",), few="34M", brief=False),
        Suite("extraction", "reading states", ("test_extraction.py",), few="9M", brief=False),
        Suite("serving", "continuous batching", ("test_serving.py",), few="9M", brief=False),
        Suite("vllm", "a vLLM engine", ("test_vllm.py",), missing=_no_vllm),
        Suite(
            "scaling",
            "scaling, roofline",
            ("test_scaling.py",),
            few="bf16 and (rows or directions or roofline)",
            missing=_no_kernels,
        ),
        Suite(
            "malloc",
            "eager baselines with tuned malloc",
            ("test_ops.py::test_against_eager_hook_and_norm", "test_prefill.py"),
            "2048-2048 or 9M-512 or 9M-1024 or 34M-256",
            "2048-2048-1-fp32 or 9M-512-fp32",
            brief=False,
            environment=TUNED_MALLOC,
            missing=_no_kernels,
        ),
        Suite("peers", "other libraries", ("test_peers.py",), few="add-1] and (steerkern or repeng) or stock_again"),
        Suite(
            "isolation",
            "do tenants leak into each other",
            module="benchmarks.isolation",
            arguments=("--json",),
            few_arguments=("--json", "--rows", "20000"),
        ),
        Suite(
            "gpu",
            "the GPU gate",
            module="benchmarks.gpu_gate",
            arguments=("--out", "{out}", "--budget", "540"),
            few_arguments=("--out", "{out}", "--budget", "60"),
            missing=_no_gpu,
        ),
    )
}


class Ran(NamedTuple):
    """How a suite went: ``done``, ``failed``, ``skipped`` or ``stopped``, why, and in how many seconds."""

    status: str
    reason: str
    seconds: float


def run(suite: Suite, out: Path, *, quick: bool, advance: Callable[[int], None]) -> Ran:
    """Run a suite into the existing folder ``out``, in place of what it left there; ``advance`` is told the per cent.

    Correctness is checked before time is taken, so a suite fails for being wrong, never for being slow; its output is
    then in ``NAME.log``, and what pytest had measured in ``NAME.partial.json``, of which no table is made. One that is
    interrupted (Ctrl-C) leaves the same without a log.
    """
    if reason := suite.unable():
        return Ran("skipped", reason, 0.0)
    begun = time.monotonic()
    for pattern in (f"{suite.name}.json", f"{suite.name}-*.json", f"{suite.name}.partial.json", f"{suite.name}.log"):
        for old in out.glob(pattern):
            old.unlink()
    command = [sys.executable, *suite.command(out.resolve(), quick)]
    with (out / f"{suite.name}.log").open("w+", encoding="utf-8") as log:
        environment = _environment(suite, quick)
        process = subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=log)
        printed, stopped = [], False
        try:
            assert process.stdout is not None
            for line in process.stdout:
                printed.append(line)
                if found := PERCENT.search(line.rstrip()):
                    advance(int(found[1]))
        except KeyboardInterrupt:
            stopped = True
        finally:
            if process.poll() is None:
                process.terminate()
            process.wait()
        if "--json" in suite.arguments and process.returncode == 0:
            (out / f"{suite.name}.json").write_text("".join(printed), encoding="utf-8")
        log.writelines(printed)
    seconds = time.monotonic() - begun
    status = "stopped" if stopped else "done" if process.returncode == 0 else "failed"
    if suite.tests and status != "done":
        _set_aside(out / f"{suite.name}.json")
    if status == "failed":
        return Ran(status, f"exit code {process.returncode}, see {out / f'{suite.name}.log'}", seconds)
    (out / f"{suite.name}.log").unlink()
    return Ran(status, "interrupted" if stopped else "", seconds)


def _set_aside(results: Path) -> None:
    """Of a run that did not end well; pytest-benchmark leaves an empty file when it has none."""
    if results.exists() and results.stat().st_size:
        results.rename(results.with_suffix(".partial.json"))
    results.unlink(missing_ok=True)


def _environment(suite: Suite, quick: bool) -> dict[str, str]:
    import steerkern

    package = Path(steerkern.__file__).parents[1]
    path = os.pathsep.join(map(str, (package, ROOT)))
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    return {
        **inherited,  # pytest-benchmark times nothing where it believes itself in a worker of xdist
        **ENVIRONMENT,
        **suite.environment,
        "PYTHONPATH": path,
        "STEERKERN_BENCH_QUICK": "1" if quick else "0",
    }
