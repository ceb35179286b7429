"""What compute-sanitizer runs: every edit kind in one launch, aligned and not, in every launch shape of a backend."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "ops")]

from programs import KINDS, pack, units  # noqa: E402

from steerkern.ops.schemas import Norm, Tables  # noqa: E402


def main(backend: str, device: str = "cuda") -> None:
    """Run the rows of one mixed batch through a backend."""
    ops = importlib.import_module(f"steerkern.ops.{backend}")
    last = 1 if device == "cpu" else torch.cuda.current_stream().cuda_stream
    for width in (896, 2048, 4096, 129):
        slots = [KINDS[kind](units(5, width, 1)) for kind in ("mixed", "ablate", "rotate", "gate_cosine", "keep_norm")]
        tables = Tables(*(t.to(device) for t in pack(slots, modes=[0, 0, 0, 0, 1])))
        slot = torch.tensor([0, 1, 2, 3, 4, -1, 99], dtype=torch.int32, device=device)
        slot = slot[: 7 if device != "cpu" else 6].contiguous()
        n = slot.numel()
        for dtype in (torch.bfloat16, torch.float32):
            h = torch.randn(n, width, device=device).to(dtype)
            delta, y, weight = torch.randn_like(h), torch.empty_like(h), torch.ones_like(h[0])
            trace = torch.zeros(n, 4, device=device)
            for norm in (Norm.LLAMA, Norm.LAYER):
                for tuning in ({}, {"cluster": 4}, {"gram": True}) if backend == "cuda" else ({},):
                    kernel = ops.bind(tables, width, dtype, norm, 1e-6)
                    if tuning:
                        kernel.tune(**tuning)
                    kernel.full(
                        n, h.data_ptr(), width, slot.data_ptr(), weight.data_ptr(), 0, y.data_ptr(),
                        delta.data_ptr(), width, trace.data_ptr(), 4, last,
                    )  # fmt: skip
            if device != "cpu":
                torch.cuda.synchronize()
            assert bool(y.isfinite().all())
    print("ran")


if __name__ == "__main__":
    main(*sys.argv[1:])
