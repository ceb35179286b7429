"""Everything that a GPU can show, in one command and one budget of time.

``python benchmarks/gpu_gate.py --out DIR --budget 540`` builds the extension, runs the conformance tests and
compute-sanitizer, then measures; ``DIR/gpu.json`` is rewritten after every stage, what matters most first, so that
a run that is cut short has its most important part. ``--dry`` runs the same code on the CPU with tiny shapes, which
proves that the gate works and nothing about speed. Needs a checkout, nvcc, torch, triton, transformers; no network.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from benchmarks.gpu.goals import GOALS, of_decoding  # noqa: E402


class Gate:
    """The stages, their time and their results."""

    def __init__(self, out: Path, budget: float, dry: bool) -> None:
        self.out, self.budget, self.dry = out / "gpu.json", budget, dry
        self.start = time.monotonic()
        self.results: dict[str, Any] = {"about": about(dry, budget), "stages": {}}
        out.mkdir(parents=True, exist_ok=True)
        self.write()

    def left(self) -> float:
        """Seconds until the budget is spent; the last ten are kept for leaving."""
        return self.budget - 10 - (time.monotonic() - self.start)

    def write(self) -> None:
        """Replace the JSON in one step."""
        self.results["seconds"] = round(time.monotonic() - self.start, 1)
        partial = self.out.with_suffix(".partial")
        partial.write_text(json.dumps(self.results, indent=1) + "\n")
        partial.replace(self.out)

    def stage(self, name: str, run: Callable[[], Any], needs: float = 5.0) -> Any:
        """Run one stage, if ``needs`` seconds are left, and write down how it went."""
        begun = time.monotonic()
        entry: dict[str, Any] = {"status": "skipped", "error": f"{self.left():.0f} s left, {needs:.0f} s needed"}
        result = None
        if self.left() >= needs or self.dry:
            try:
                result = run()
                wrong = isinstance(result, dict) and result.get("wrong")
                entry = {"status": "wrong" if wrong else "done", "result": result}
                entry |= {"error": "; ".join(f"{side}: {why}" for side, why in wrong.items())} if wrong else {}
            except Exception as error:
                entry = {"status": "failed", "error": f"{type(error).__name__}: {error}"[:2000]}
                entry["trace"] = traceback.format_exc()[-2000:]
        entry["seconds"] = round(time.monotonic() - begun, 1)
        self.results["stages"][name] = entry
        self.write()
        line = f"{name}: {entry['status']} in {entry['seconds']} s {entry.get('error', '')}"[:300]
        print(line, f"[{min(100, 100 * self.results['seconds'] / self.budget):3.0f}%]", flush=True)
        return result


def about(dry: bool, budget: float) -> dict[str, Any]:
    """Commit, date, goals, versions of what needs no GPU to ask."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, text=True, capture_output=True, check=False)
        return done.stdout.strip()

    found: dict[str, Any] = {
        "dry": dry,
        "budget": budget,
        "goals": [goal.to_json() for goal in GOALS],
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "HEAD") or os.environ.get("STEERKERN_COMMIT", "unknown"),
        "changed": bool(git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
    }
    for name in ("torch", "triton", "transformers"):
        try:
            found[name] = __import__("importlib.metadata").metadata.version(name)
        except ModuleNotFoundError:
            found[name] = None
    return found


def run(gate: Gate) -> None:
    """All stages; each stands on its own."""
    import torch

    from benchmarks.gpu import checks

    if not gate.dry:
        major, minor = torch.cuda.get_device_capability(0)  # raises where there is no GPU: nothing to do then
        gate.stage("build", lambda: checks.build(f"{major}{minor}", gate.left()))
    from benchmarks.gpu import launches, ops  # loads the extension
    from benchmarks.gpu.device import Device, Gpu
    from steerkern.ops import dispatch

    device = Device() if gate.dry else Gpu()
    if gate.dry:
        torch.set_num_threads(1)  # beside other tests, two threads of tiny shapes wait for each other
    gate.results["about"]["device"] = device.describe()
    backends = [name for name in device.backends if not dispatch.backends()[name]]
    gate.results["about"]["backends"] = dispatch.backends()
    gate.stage("conformance", lambda: checks.tests(gate.dry, min(gate.left(), 100), backends))
    rates = gate.stage("copy bandwidth", lambda: ops.copy_rate(device)) or {}

    def measured(backend: str, n: int, width: int, compiled: bool = False) -> None:
        gate.stage(
            f"op {backend} N={n} H={width}" + (", compiled too" if compiled else ""),
            lambda: ops.measure(device, backend, n, width, rates.get("large"), compiled),
            needs=15 if compiled else 5,
        )
        device.free()

    shapes = list(ops.grid(device))
    for n, width in shapes[:4]:
        for backend in backends:
            measured(backend, n, width)
    gate.stage("capture", lambda: ops.replayed(device))
    gate.stage("calls", lambda: launches.calls(device))
    plain = launches.variant_grid(device)
    if backends:
        for n, width, k in plain[:8]:
            gate.stage(f"variants N={n} H={width} K={k}", lambda n=n, w=width, k=k: launches.variants(device, n, w, k))
    for tool in ("memcheck", "racecheck"):
        gate.stage(f"sanitizer {tool}", lambda t=tool: checks.sanitize(t, backends[0], min(gate.left(), 60)), needs=30)
    for name in ("tiny",) if gate.dry else ("8B", "0.5B"):
        decode(gate, device, name, (2,) if gate.dry else (1, 8, 64))
    for n, width in shapes[4:]:
        for backend in backends:
            measured(backend, n, width)
    for n in (1, 64, 2048) if not gate.dry else ():
        measured(backends[0], n, 4096, compiled=True)
    for n, width, k in plain[8:]:
        gate.stage(f"variants N={n} H={width} K={k}", lambda n=n, w=width, k=k: launches.variants(device, n, w, k))


def decode(gate: Gate, device: Any, name: str, batches: tuple[int, ...]) -> None:
    """The decode stages of one model: batch 1 in every mode first. What has wrong logits is not timed."""
    from benchmarks.gpu import decode as parts

    # 8 billion parameters are made and compiled in 20 s; leave the second model its turn
    large = name == "8B"
    model: Any = None

    def load() -> dict[str, Any]:
        nonlocal model
        model = parts.model_of(name, device)
        return parts.correct(device, model)

    def stage(batch: int, way: str, run: Callable[[], dict[str, Any]], needs: float) -> None:
        def judged() -> dict[str, Any]:
            found = run()
            return {**found, "goals": list(of_decoding(name, batch, way, found))}

        gate.stage(f"decode {name} batch {batch}: {way}", judged, needs)

    checked = gate.stage(f"decode {name}: logits", load, needs=40)
    if checked is not None and "stock" not in checked["wrong"]:
        without = {**checked["wrong"], **checked["failed"]}
        gate.stage(f"decode {name}: replays", lambda: parts.replayed(device, model), needs=20)
        for batch in batches:
            stage(batch, "graph", lambda b=batch: parts.captured(device, model, b), 20)
            stage(batch, "eager", lambda b=batch: parts.eager(device, model, b, without), 60 if large else 40)
        first = batches[0]
        stage(first, "compiled", lambda: parts.compiled(device, model, first, gate.left), 120 if large else 60)
    model = None
    gc.collect()
    device.free()


def main() -> int:
    """Run the gate; 0 unless a stage failed or found something wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json")
    parser.add_argument("--budget", type=float, default=540, help="seconds for everything")
    parser.add_argument("--dry", action="store_true", help="tiny shapes on the CPU: does the gate itself work?")
    options = parser.parse_args()
    gate = Gate(options.out, options.budget, options.dry)
    try:
        run(gate)
    except Exception as error:
        gate.results["error"] = f"{type(error).__name__}: {error}"
        gate.results["trace"] = traceback.format_exc()[-3000:]
        gate.write()
        print(gate.results["error"], file=sys.stderr)
        return 2
    gate.results["finished"] = True
    gate.write()
    failed = [name for name, stage in gate.results["stages"].items() if stage["status"] in ("failed", "wrong")]
    print(f"{len(gate.results['stages'])} stages, wrong or failed: {failed or 'none'}; {gate.out}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
