"""Before anything is timed: build the extension, run the tests, let compute-sanitizer look."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FOUND = 9
"""What compute-sanitizer leaves with when it has found something."""


def python(*arguments: str, timeout: float, before: tuple[str, ...] = (), **variables: str) -> tuple[int, str]:
    """Exit code and output of a Python process in the checkout; 124 if it takes too long."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    command = [*before, sys.executable, *arguments]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, text=True, timeout=max(1.0, timeout), check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        out = error.stdout or b""
        return 124, out.decode(errors="replace") if isinstance(out, bytes) else out
    return done.returncode, done.stdout


def build(arch: str, timeout: float) -> dict[str, Any]:
    """Build the extension in place for one arch, unless the one that is there runs."""
    probe = "from steerkern import _C; print(_C.cuda_unusable(), _C.cuda_archs(), sep='|')"
    code, out = python("-c", probe, timeout=60)
    reason, _, archs = out.strip().splitlines()[-1].partition("|") if out.strip() else ("", "", "")
    if code == 0 and not reason and arch in re.findall(r"\d+", archs):
        return {"built": False, "archs": archs}
    # what torch brings may come before nvcc's own libraries; the extension has cudart inside
    jobs = str(min(8, os.cpu_count() or 1))
    options = {"STEERKERN_BUILD": "cuda", "STEERKERN_CUDA_ARCHS": arch, "STEERKERN_JOBS": jobs, **headers()}
    code, log = python("setup.py", "-q", "build_ext", "--inplace", timeout=timeout, **options)
    if code:
        raise RuntimeError(f"the build failed with {code}: {log[-1500:]}")
    code, out = python("-c", probe, timeout=60)
    if code:
        raise RuntimeError(f"the extension does not load: {out[-1500:]}")
    reason, _, archs = out.strip().splitlines()[-1].partition("|")
    if reason:
        raise RuntimeError(f"the extension does not run: {reason}")
    return {"built": True, "archs": archs}


def headers() -> dict[str, str]:
    """Where a build finds pybind11 on a machine without the package: torch carries its headers."""
    if importlib.util.find_spec("pybind11") is not None:
        return {}
    import torch

    return {"PYBIND11_INCLUDE": str(Path(torch.__file__).parent / "include")}


def tests(dry: bool, timeout: float, backends: Sequence[str]) -> dict[str, Any]:
    """The conformance tests that run on the GPU; in a dry run those of one edit on the CPU."""
    if dry:
        runs = [["tests/ops/test_conformance.py", "-k", "test_additions_have_the_bits_of_torch"]]
    else:
        runs = [["tests/ops/test_cuda.py"], ["tests/ops/test_conformance.py", "-k", "triton or cuda"]]
    found: dict[str, Any] = {}
    wrong: dict[str, str] = {}
    for which in runs:
        # the engine named so leaves out what a machine without a GPU tests
        code, out = python(
            "-m", "pytest", "-p", "no:cacheprovider", *which, timeout=timeout / len(runs), STEERKERN_TEST_ENGINE="gpu"
        )
        lines = out.strip().splitlines()
        failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        found[which[0]] = {"exit": code, "passed": code == 0, "failed": failed[:40], "last": lines[-1:]}
        if code not in (0, 124):  # what takes too long is not finished, not wrong
            names = [line.partition(" - ")[0] for line in failed]
            blamed = [backend for backend in backends if any(backend in name for name in names)]
            wrong |= dict.fromkeys(blamed or backends, f"{which[0]}: {lines[-1] if lines else code}")
    return {"runs": found, "wrong": wrong}


def sanitize(tool: str, backend: str, timeout: float) -> dict[str, Any]:
    """compute-sanitizer over one mixed program; only our kernels are instrumented."""
    if shutil.which("compute-sanitizer") is None:
        return {"skipped": "no compute-sanitizer"}
    filters = ("--kernel-name", "kns=steer_rows")
    before = ("compute-sanitizer", "--tool", tool, "--error-exitcode", str(FOUND), *filters)
    code, out = python("benchmarks/gpu/case.py", backend, timeout=timeout, before=before)
    lines = [line for line in out.splitlines() if "=========" in line]
    if code not in (0, FOUND, 124) or (code == 0 and "ran" not in out):
        raise RuntimeError(f"{tool} did not look, exit code {code}: {out[-600:]}")
    wrong = {backend: f"{tool}: {lines[-1] if lines else out[-200:]}"} if code == FOUND else {}
    return {"exit": code, "clean": code == 0, "said": lines[-15:], "tail": out[-600:], "wrong": wrong}
