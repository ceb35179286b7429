"""Instructions of six calls of the CPU op: ``python -m benchmarks.instructions`` counts and stores them.

Callgrind counts what is executed, so neither load nor clock matters; the compiler does, and is stored beside the
counts. Valgrind knows no AVX-512, so the AVX2 kernels are counted.
"""

from __future__ import annotations

import json
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
STORED = ROOT / "benchmarks" / "results" / "instructions.json"
SOURCES = ("benchmarks/instructions.cpp", "csrc/cpu/steer.cpp", "csrc/cpu/rows_avx2.cpp")
TOLERANCE = 0.02
"""Counts may move by this much: libc differs from one machine to the next, the kernels do not."""
FLAGS = ("-std=c++17", "-O3", "-Wno-psabi", "-ffp-contract=off", "-fopenmp")
"""Those of setup.py."""


def missing() -> str:
    """Why nothing can be counted here; empty if it can."""
    for tool in ("g++", "valgrind"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed: apt-get install {tool}"
    if platform.machine() != "x86_64" or platform.system() != "Linux":
        return f"counts are of x86-64 Linux, this is {platform.machine()} {platform.system()}"
    if "avx2" not in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace"):
        return "this machine has no AVX2"
    return ""


def compiler() -> str:
    """First line of what g++ says of itself."""
    return _run("g++", "--version").stdout.splitlines()[0]


def build(folder: Path, *flags: str) -> Path:
    """The driver, built into ``folder`` as the extension is, with further ``flags``."""
    driver = folder / "instructions"
    _run("g++", *FLAGS, *flags, *(str(ROOT / source) for source in SOURCES), "-o", str(driver))
    return driver


def count(driver: Path) -> dict[str, int]:
    """Instructions by case.

    Raises:
        RuntimeError: a case failed, or callgrind did not see it.
    """
    return {case: _count(driver, case) for case in _run(str(driver)).stdout.splitlines()}


def differences(found: Mapping[str, int], stored: Mapping[str, int]) -> list[str]:
    """A sentence for every count that moved by more than :data:`TOLERANCE`, in either direction, or is new or gone."""
    said = []
    for case in dict.fromkeys([*stored, *found]):
        before, now = stored.get(case), found.get(case)
        if before is None or now is None:
            said.append(f"{case}: {before} stored, {now} found")
        elif abs(now / before - 1) > TOLERANCE:
            said.append(f"{case}: {before} instructions stored, {now} found ({now / before - 1:+.1%})")
    return said


def _count(driver: Path, case: str) -> int:
    options = ["--collect-atstart=no", "--toggle-collect=measured", "--callgrind-out-file=/dev/null"]
    said = _run("valgrind", "--tool=callgrind", *options, str(driver), case).stderr
    found = re.search(r"Collected : (\d+)", said)
    if found is None or int(found[1]) == 0:
        raise RuntimeError(f"callgrind counted nothing for {case}: {said[-300:]}")
    return int(found[1])


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-2000:]}")
    return done


def main() -> None:
    """Count and store."""
    if reason := missing():
        raise SystemExit(reason)
    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, Any] = {"compiler": compiler(), "counts": count(build(Path(folder)))}
    STORED.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
