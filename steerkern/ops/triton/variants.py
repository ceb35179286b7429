"""Which kernels there are: one per width, dtype, norm and set of arguments, compiled ahead of its first launch."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from ..schemas import Norm

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
"""Row dtypes, by Triton's names."""

WIDEST = 1 << 16
"""A row lies in the registers of one program; up to 16384 elements none spills, and beyond this none compiles soon."""


class Variant(NamedTuple):
    """What a kernel is compiled for. Only ``width`` and ``dtype`` decide the shape of its block."""

    width: int
    dtype: torch.dtype
    norm: Norm = Norm.NONE
    slot: bool = True
    weight: bool = False
    bias: bool = False
    delta: bool = False
    trace: bool = False

    @property
    def aligned(self) -> bool:
        """Whether every row begins at a multiple of 16 bytes, so that 16 are read at a time."""
        return self.width % 16 == 0

    @property
    def block(self) -> int:
        """Elements of the block: the width, rounded up to a power of two."""
        return max(32, 1 << (self.width - 1).bit_length())

    def warps(self, lanes: int) -> int:
        """Warps of a program on a GPU with ``lanes`` threads in each: four, unless rows are short or long.

        At least 8 elements per thread, so that a load takes 16 bytes; at most 32 (of 32 lanes), for which a kernel
        takes 128 registers: then 4 rows of 4096 stand on a multiprocessor, or 2 of 8192, where 16 elements per thread
        at 80 or 93 registers leave 3 and 1.
        """
        return min(16, max(self.block // 1024, min(4, self.block // (8 * lanes)), 1))

    def arguments(self) -> dict[str, Any]:
        """Values of the kernel's arguments that are compiled in, by name."""
        fixed: dict[str, Any] = {"WIDTH": self.width, "BLOCK": self.block, "NORM": int(self.norm)}
        given = {"y": self.norm != Norm.NONE, **{name: getattr(self, name) for name in _OPTIONAL}}
        return {**fixed, **{name: None for name, present in given.items() if not present}}


_OPTIONAL = ("slot", "weight", "bias", "delta", "trace")
_SIGNATURE = {
    "h": "*{}", "h_stride": "i64", "slot": "*i32", "bank": "*fp32", "links": "*i32", "fields": "*fp32",
    "span": "*i32", "gain": "*fp32", "rows": "i32", "entries": "i32", "slots": "i32", "weight": "*{}",
    "bias": "*{}", "eps": "fp32", "y": "*{}", "delta": "*{}", "delta_stride": "i64", "trace": "*fp32",
    "columns": "i32", "WIDTH": "constexpr", "BLOCK": "constexpr", "NORM": "constexpr",
}  # fmt: skip
_ALIGNED = ("h", "h_stride", "bank", "weight", "bias", "y", "delta", "delta_stride")


def build(variant: Variant, target: Any) -> Any:
    """Compile a variant for a ``triton.backends.compiler.GPUTarget``, here or for another machine.

    Products and sums are rounded one by one (no contraction to FMA), so that an addition has the bits of torch's.
    """
    import triton
    from triton.compiler import ASTSource

    from .kernels import steer_rows

    fixed = variant.arguments()
    name = TYPES[variant.dtype]
    signature = {key: "constexpr" if key in fixed else kind.format(name) for key, kind in _SIGNATURE.items()}
    indices = {key: (steer_rows.arg_names.index(key),) for key in _ALIGNED if key not in fixed and variant.aligned}
    attributes = {index: [["tt.divisibility", 16]] for index in indices.values()}
    options = {"num_warps": variant.warps(target.warp_size), "num_stages": 1, "enable_fp_fusion": False}
    return triton.compile(ASTSource(steer_rows, signature, fixed, attributes), target=target, options=options)


@functools.cache
def loaded(variant: Variant, device: int) -> Any:
    """The compiled kernel of a variant on a GPU, which must be the current one; its code lives there."""
    from triton.runtime.driver import driver

    return build(variant, driver.active.get_current_target())
