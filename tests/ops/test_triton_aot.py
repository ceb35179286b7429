"""The Triton kernels without a GPU: every variant compiled for NVIDIA and AMD, and what the compiler made of it.

Registers and barriers are counted in the machine code. The counts belong to Triton 3.6, whose version torch 2.11 to
2.13 pin; another release is compiled and checked for spills and wide loads only.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter excludes compilation", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget

from steerkern.ops.schemas import DTYPES, Norm
from steerkern.ops.triton.variants import Variant, build

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
COUNTED = triton.__version__.startswith("3.6.")


class Code(NamedTuple):
    """What a compiled kernel consists of."""

    registers: int
    spills: int
    barriers: int
    loads: int
    wide_loads: int
    """Of 16 bytes per thread."""
    wide_stores: int
    fused: int
    """Multiplications contracted with an addition, outside of division and root."""


@cache
def code(variant: Variant, target: str) -> Code:
    kernel = build(variant, TARGETS[target])
    return _amd(kernel.asm["amdgcn"]) if target.startswith("gfx") else _nvidia(kernel.asm["cubin"], kernel.asm["ptx"])


def _nvidia(cubin: bytes, ptx: str) -> Code:
    import tempfile

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, text = (_run(command, file.name) for command in (["cuobjdump", "-res-usage"], ["nvdisasm", "-c"]))
    used = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert used is not None, usage
    return Code(
        int(used[1]), int(used[2]) + _count(r"\b(LDL|STL)\b", text), _count(r"\bBAR\.SYNC", text),
        _count(r"\bLDG\.", text), _count(r"\bLDG\.\S*128", text), _count(r"\bSTG\.\S*128", text),
        _count(r"\bfma\.rn\.f32", ptx),
    )  # fmt: skip


def _amd(text: str) -> Code:
    def meta(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        assert found is not None, name
        return int(found[1])

    return Code(
        meta("vgpr_count"), meta("vgpr_spill_count") + meta("sgpr_spill_count") + meta("private_segment_fixed_size"),
        _count(r"\bs_barrier\b", text), _count(r"\b(global|buffer)_load_", text),
        _count(r"\b(global|buffer)_load_dwordx4", text), _count(r"\b(global|buffer)_store_dwordx4", text), 0,
    )  # fmt: skip


def _run(command: list[str], path: str) -> str:
    return subprocess.run([TOOLS / command[0], *command[1:], path], capture_output=True, text=True, check=True).stdout


def _count(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text))


# How many registers a thread may use for two programs (of 16 warps: one) to stand on a multiprocessor at every width.
REGISTERS = 128
# Static counts: two per sum, and one more between two sums whose scratch memory overlaps. One entry: projection,
# length, kept norm; several: the same, two projections at a time; then the norm's own sum (LayerNorm has two). Of these
# a row of one entry that is read passes two, or four with a norm.
BARRIERS = {Norm.NONE: 14, Norm.LLAMA: 17, Norm.FP32: 17, Norm.GEMMA: 17, Norm.LAYER: 20}
PLAIN_BARRIERS = {Norm.LLAMA: 2, Norm.FP32: 2, Norm.GEMMA: 2, Norm.LAYER: 5}

EVERY_NORM = [Variant(4096, torch.bfloat16)]
EVERY_NORM += [Variant(4096, torch.bfloat16, norm, weight=True) for norm in (Norm.LLAMA, Norm.FP32, Norm.GEMMA)]
EVERY_NORM += [Variant(4096, torch.bfloat16, Norm.LAYER, weight=True, bias=True)]
EVERY_WIDTH = [Variant(width, torch.bfloat16, Norm.LLAMA, weight=True) for width in (7, 896, 5120, 8192, 16384)]
EVERY_WIDTH += [Variant(16384, torch.float32, Norm.LLAMA, weight=True)]
EVERY_ARGUMENT = [
    Variant(16384, torch.float16, Norm.LAYER, weight=True, bias=True, delta=True, trace=True),
    Variant(4096, torch.float32, Norm.FP32, delta=True),
    Variant(8192, torch.bfloat16, trace=True),
]
PLAIN = [Variant(4096, torch.bfloat16, norm, slot=False, weight=True) for norm in (Norm.LLAMA, Norm.LAYER)]


def name(variant: Variant) -> str:
    given = [field for field in ("slot", "weight", "bias", "delta", "trace") if getattr(variant, field)]
    return f"{variant.width}-{str(variant.dtype)[6:]}-{variant.norm.name}-{'+'.join(given)}"


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("variant", EVERY_NORM + EVERY_WIDTH + EVERY_ARGUMENT + PLAIN, ids=name)
def test_compiles_within_its_budget(variant: Variant, target: str) -> None:
    made = code(variant, target)
    assert made.spills == 0
    assert made.registers <= REGISTERS
    assert made.fused == 0
    if variant.width % 16 == 0:
        # a row's elements per thread in loads of 16 bytes: the row once, each parameter once, and in a steered kernel
        # three times a direction (one entry; several when projecting and when lifting), of which gfx942 needs half
        lanes = variant.warps(TARGETS[target].warp_size) * TARGETS[target].warp_size
        size = variant.dtype.itemsize
        share = -(-variant.width // (lanes * 16 // size))
        rows = 1 + variant.weight + variant.bias + variant.delta
        assert made.wide_loads >= share * (rows + variant.slot * 3 * 4 // size)
        assert made.wide_stores >= share * (variant.norm != Norm.NONE)
    if COUNTED:
        budget = BARRIERS if variant.slot else PLAIN_BARRIERS
        assert made.barriers == (0 if variant.warps(TARGETS[target].warp_size) == 1 else budget[variant.norm])


def test_rows_that_are_not_aligned_are_read_element_by_element() -> None:
    """The control: without the declared alignment the same kernel has no wide load."""
    made = code(Variant(4097, torch.bfloat16, Norm.LLAMA, weight=True), "sm_90")
    assert made.wide_loads == 0
    assert made.wide_stores == 0


def test_the_widest_row_compiles() -> None:
    """It spills; it must only work."""
    assert code(Variant(1 << 16, torch.bfloat16, Norm.LLAMA, weight=True), "sm_90").loads > 0


def test_shape_of_the_block_follows_the_width_and_dtype_alone() -> None:
    """What the kernel is compiled for names nothing of the batch; other arguments leave its block as it is."""
    assert set(Variant._fields) == {"width", "dtype", "norm", "slot", "weight", "bias", "delta", "trace"}
    for width in (1, 7, 64, 896, 2048, 4096, 5120, 8192, 16384):
        plain = Variant(width, torch.bfloat16)
        assert plain.block >= width
        assert plain.warps(64) <= 16  # gfx9 has room for 1024 threads
        for other in (plain._replace(norm=Norm.LAYER, bias=True), plain._replace(trace=True, delta=True)):
            assert (other.block, other.aligned) == (plain.block, plain.aligned)
            assert all(other.warps(lanes) == plain.warps(lanes) for lanes in (32, 64))
    assert {Variant(2048, dtype).warps(32) for dtype in DTYPES} == {4}
