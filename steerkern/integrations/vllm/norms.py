"""The fused op in place of a norm of vLLM: ``norm(x, residual) -> (normed, residual + x, edited)`` in one kernel.

What a compiled or captured graph sees is one registered op on tensors that never move: the row map and the tables.
Eager forwards on the CPU call the kernel by its address.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Union

import torch
from torch import Tensor, nn

from ...ops import cpu
from ...program import Program
from ...runtime.norms import NormSpec
from ...runtime.points import THREADED_ELEMENTS
from ...runtime.rows import RowMap
from .reads import Reads

Normed = Union[Tensor, tuple[Tensor, Tensor]]
Norm = Callable[..., Normed]


def stand_in(spec: NormSpec, program: Program, number: int, rows: RowMap, backend: str, reads: Reads) -> Norm:
    """What takes the place of a norm's code at site ``number`` of the program."""
    tables, slot, width = program.tables(number), rows.slot, spec.width
    eps, norm = spec.eps, int(spec.norm)
    module: Any = spec.module
    shown = reads.states.get(number)
    kernel = cpu.bind(tables, width, spec.dtype, norm, eps).full if backend == "cpu" else None

    def by_op(x: Tensor, residual: Tensor | None) -> Normed:
        h = x if residual is None else residual
        flat, delta = h.reshape(-1, width), None if residual is None else x.reshape(-1, width)
        out: Tensor = torch.ops.steerkern.steer_norm_(
            flat, slot[: flat.shape[0]], *tables, module.weight, module.bias if has_bias else None, eps, norm, delta
        )
        return out.view_as(x) if residual is None else (out.view_as(x), residual)

    def by_address(x: Tensor, residual: Tensor | None) -> Normed:
        h, n = x if residual is None else residual, x.numel() // width
        out = torch.empty_like(x)
        bias = module.bias.data_ptr() if has_bias else 0
        added = (0, 0) if residual is None else (x.data_ptr(), x.stride(-2))
        threads = 1 if n * width < THREADED_ELEMENTS else torch.get_num_threads()
        assert kernel is not None
        kernel(n, h.data_ptr(), h.stride(-2), rows.pointer, module.weight.data_ptr(), bias, out.data_ptr(), *added,
               0, 0, threads)  # fmt: skip
        return out if residual is None else (out, residual)

    has_bias = spec.bias is not None

    def call(x: Tensor, residual: Tensor | None = None) -> Normed:
        if shown is not None:
            torch.ops.steerkern.keep_rows_(shown, reads.rows, x, residual)
        if kernel is None or torch.compiler.is_compiling():
            return by_op(x, residual)
        plain = x.is_contiguous() and (residual is None or residual.is_contiguous())
        return by_address(x, residual) if plain and x.dtype == spec.dtype else by_op(x, residual)

    return call


def put(module: nn.Module, code: Norm) -> None:
    """Let one norm run ``code``: vLLM's own norms call what ``_forward_method`` says, others their ``forward``."""
    own: Any = module
    if hasattr(own, "_forward_method"):
        own._forward_method = code
    else:
        own.forward = code
