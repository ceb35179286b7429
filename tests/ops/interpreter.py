"""Triton's interpreter, mended: what stands between it and what a compiled kernel does.

Import before any kernel, in a process started with ``TRITON_INTERPRET=1``, which excludes compilation.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from steerkern.ops import dispatch, triton
from steerkern.ops.triton import kernels
from steerkern.ops.triton.variants import Variant


def mend(builder: Any = interpreter.InterpreterBuilder) -> None:
    """Mend what Triton 3.6 gets wrong, and patch the language once instead of at each call.

    It truncates to bfloat16, takes a comparison for a number of its operands' type, and its scalars are arrays of one
    element, which NumPy 2.4 does not take for an index.
    """
    cast, binary, patch_tensor = builder.cast_impl, builder.binary_op, interpreter._patch_lang_tensor

    def cast_impl(self: Any, src: Any, to: Any) -> Any:
        pair = (src.dtype.scalar, to.scalar)
        if pair == (tl.float32, tl.bfloat16):
            wide = torch.from_numpy(np.ascontiguousarray(src.data))
            data = wide.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
        elif pair == (tl.bfloat16, tl.float32):
            data = (src.data.astype(np.uint32) << 16).view(np.float32)
        else:
            return cast(self, src, to)
        return interpreter.TensorHandle(data.reshape(src.data.shape), to.scalar)

    def binary_op(self: Any, left: Any, right: Any, op: Any) -> Any:
        out = binary(self, left, right, op)
        return interpreter.TensorHandle(out.data, tl.int1) if out.data.dtype == bool else out

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    patched = set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fn.__module__ not in patched:
            patched.add(self.fn.__module__)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    builder.cast_impl, builder.binary_op = cast_impl, binary_op
    interpreter._patch_lang_tensor = patch_lang_tensor
    interpreter.InterpretedFunction.__call__ = call


def sum_pairs_at_once() -> None:
    """Let NumPy do the kernels' own reduction, which the interpreter goes through element by element."""
    generic = interpreter.ReduceOps.generic_reduce

    def generic_reduce(self: Any, values: Any) -> Any:
        if self.combine_fn is kernels.add_pairs:
            return [self.sum(value) for value in values]
        return generic(self, values)

    interpreter.ReduceOps.generic_reduce = generic_reduce


def launch(variant: Variant, device: int, stream: int, n: int, *arguments: Any) -> None:
    """In place of ``triton.launch``: the same arguments, on memory of the CPU."""
    given = dict(zip(kernels.steer_rows.arg_names, arguments, strict=False))
    width, rows, entries, slots = variant.width, given["rows"], given["entries"], given["slots"]
    sizes = {
        "h": (n - 1) * given["h_stride"] + width, "slot": n, "bank": rows * width, "links": 4 * entries,
        "fields": 7 * entries, "span": 3 * slots, "gain": slots, "weight": width, "bias": width, "y": n * width,
        "delta": (n - 1) * given["delta_stride"] + width, "trace": n * given["columns"],
    }  # fmt: skip
    for name, size in sizes.items():
        if given[name]:
            kind = variant.dtype if name in _ROWS else torch.int32 if name in _INTEGERS else torch.float32
            given[name] = _tensor(given[name], kind, size)
    kernels.steer_rows[(n,)](*given.values(), variant.width, variant.block, int(variant.norm))


_ROWS = ("h", "weight", "bias", "y", "delta")
_INTEGERS = ("slot", "links", "span")


def _tensor(address: int, dtype: torch.dtype, size: int) -> torch.Tensor:
    """The memory at an address."""
    memory = (ctypes.c_char * (size * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype)


def install() -> None:
    """Let the backend run here, on the CPU."""
    mend()
    triton.unusable = lambda: ""  # type: ignore[method-assign]
    triton.DEVICE = "cpu"
    dispatch.PREFERRED["cpu"] = ("cpu", "triton")
    triton.launch = launch
    triton.current_stream = lambda device: 0
    torch.cuda.current_device = lambda: -1
