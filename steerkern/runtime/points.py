"""Edit points: what stands in a norm or at a block's door while a session is attached."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ..errors import PlanError
from ..ops import dispatch, reference, triton
from ..ops.schemas import DTYPES, Norm, Tables
from ..program import Program
from .deciding import Observer
from .decoder import block_input, block_output
from .norms import NormSpec
from .patch import stock_class
from .readings import Readings
from .rows import RowMap
from .sites import FoundSite

THREADED_ELEMENTS = 1 << 16
"""Below this many elements one thread is faster than waking others."""


class Point:
    """Edits a state in place at one site, by the row map of the current forward."""

    def __init__(self, program: Program, rows: RowMap, number: int | None, backend: str, streams: str = "none") -> None:
        self.program = program
        self.rows = rows
        self.number = number
        """The site's number in the program, or None for a norm that is only fused, never steered."""
        self.streams = streams
        self.width = program.width
        self.backend = backend
        self.native: Any = dispatch.NATIVE.get(backend)
        """The module that has the kernels; None for the reference."""
        self._threaded = backend == "cpu"
        self.calls = 0
        self.readings: Readings | None = None
        """Where coordinates go, when a probe is among the plans."""
        self.observer: Observer | None = None
        """Shown each state that arrives, before it is edited; set for single forwards."""
        self.tables: Tables | None = None if number is None else program.tables(number)
        self._kernels: dict[torch.dtype, Any] = {}

    def edit(self, state: Tensor) -> None:
        """Edit ``state [..., H]`` in place on its own, without a norm."""
        if self.tables is None:
            return
        if self.observer is not None:
            self.observer(state)
        if is_compiling():
            self._edit_traced(state)
            return
        rows = self.rows
        self.calls += 1
        if not rows.pointer:
            return
        slot = self._slots(state)
        flat, back = self._flatten(state)
        if torch.is_grad_enabled() and state.requires_grad:
            self._edit_differentiably(state, slot)
            return
        trace = None if self.readings is None else self.readings.buffer(flat.shape[0])
        if self.native is not None and flat.dtype in DTYPES:
            kernel = self._kernels.get(flat.dtype) or self._bind(flat.dtype)
            columns, pointer = (0, 0) if trace is None else (trace.shape[1], trace.data_ptr())
            fault = kernel.full(
                flat.shape[0], flat.data_ptr(), flat.stride(0), slot.data_ptr(), 0, 0, 0, 0, 0, pointer, columns,
                self._where(flat.numel()),
            )  # fmt: skip
            self._check(fault, slot)
        else:
            flat.copy_(reference.edit_rows(flat, slot, self.tables, self.program.entries_per_row, trace))
        self._take(slot, trace)
        if back is not None:
            back.copy_(flat.view_as(back))

    def _bind(self, dtype: torch.dtype) -> Any:
        kernel = self._kernels[dtype] = self._kernel_for(dtype, Norm.NONE, 0.0)
        return kernel

    def _kernel_for(self, dtype: torch.dtype, norm: Norm, eps: float) -> Any:
        where = {} if self._threaded else {"device": self.program.gain.device}
        return self.native.bind(self.tables, self.width, dtype, norm, eps, **where)

    def _where(self, elements: int) -> int:
        """What a kernel takes last: a number of threads on the CPU, the current stream on a GPU."""
        if self._threaded:
            return 1 if elements < THREADED_ELEMENTS else torch.get_num_threads()
        stream: int = self.native.current_stream(self.program.gain.device.index)
        return stream

    def _flatten(self, state: Tensor) -> tuple[Tensor, Tensor | None]:
        """``state`` as ``[N, H]`` rows that a kernel takes; where that needs a copy, also where to copy it back."""
        flat = state.detach().reshape(-1, state.shape[-1])
        if flat.stride(-1) != 1:
            flat = flat.contiguous()
        if self.backend == "triton":
            flat = triton.aligned(flat)
        return flat, None if flat.untyped_storage().data_ptr() == state.untyped_storage().data_ptr() else state

    def _check(self, fault: int, slot: Tensor) -> None:
        if fault >= 0:
            assert self.tables is not None
            raise PlanError(reference.find_fault(slot, self.tables) or f"row {fault}: fault in the program's tables")

    def _slots(self, state: Tensor) -> Tensor:
        """One slot per row of ``state``, for all its streams."""
        rows = self.rows
        count = state.numel() // self.width
        slot = rows.slot[: rows.count]
        if self.streams != "none":
            times = count // rows.count if rows.count else 1
            slot = slot.repeat(times) if self.streams == "outer" else slot.repeat_interleave(times)
        elif rows.kept and count < rows.count and state.shape[-2] == rows.kept:
            # blocks that share the keys of earlier ones run on the last tokens only (gemma4's prefill)
            slot = slot.view(state.shape[0], -1)[:, -rows.kept :].reshape(-1)
        if slot.numel() != count:
            raise PlanError(f"the state has {count} rows, the row map of this forward {rows.count}")
        return slot

    def _take(self, slot: Tensor, trace: Tensor | None) -> None:
        if trace is not None and self.readings is not None:
            self.readings.take(self.rows.request, self.rows.tokens, slot, trace)

    def _edit_differentiably(self, state: Tensor, slot: Tensor) -> None:
        assert self.tables is not None
        if state.is_leaf:
            raise PlanError("the state to edit is a leaf that requires grad; pass inputs_embeds * 1 or detach it")
        flat = state.reshape(-1, self.width).clone()  # what autograd saves must survive the write below
        trace = None if self.readings is None else self.readings.buffer(flat.shape[0])
        edited = reference.edit_rows(flat, slot, self.tables, self.program.entries_per_row, trace)
        self._take(slot, trace)
        state.copy_(edited.view_as(state))

    def _traced_slots(self, flat: Tensor) -> Tensor:
        if flat.shape[0] != self.rows.count:
            raise PlanError("a block that gets part of the tokens is steered in eager forwards only, not compiled")
        return self.rows.slot[: flat.shape[0]]

    def _edit_traced(self, state: Tensor) -> None:
        assert self.tables is not None
        if self.readings is not None:
            raise PlanError("probes are read in eager forwards only; this one is being compiled")
        if self.streams != "none":
            raise PlanError(
                "a state with several streams is steered in eager forwards only; this one is being compiled"
            )
        flat = state.reshape(-1, self.width)
        slot = self._traced_slots(flat)
        if torch.is_grad_enabled() and state.requires_grad:
            edited = reference.edit_rows(flat.clone(), slot, self.tables, self.program.entries_per_row)
            state.copy_(edited.view_as(state))
            return
        torch.ops.steerkern.steer_(flat, slot, *self.tables)
        if not state.is_contiguous():
            state.copy_(flat.view_as(state))


class NormPoint(Point):
    """Stands in for one norm module: one kernel call edits the residual state and normalises it.

    Where gradients are wanted, or the kernel does not apply, the edit runs on the reference and the module's own
    ``forward`` follows it.
    """

    def __init__(self, spec: NormSpec, program: Program, rows: RowMap, number: int | None, backend: str) -> None:
        super().__init__(program, rows, number, backend)
        self.spec = spec
        self.width = spec.width
        self.dtype: torch.dtype | None = None
        self._parameters = spec.module._parameters
        self._forward: Callable[[Any, Tensor], Tensor] = stock_class(type(spec.module)).forward
        self._unaligned = 15 if backend == "triton" and self.width % 16 == 0 else 0
        self._call: Any = None
        if self.native is not None and spec.dtype in DTYPES:
            self.dtype = spec.dtype
            self._kernel = self._kernel_for(self.dtype, spec.norm, spec.eps)
            if self._threaded:
                steering = None if self.tables is None else rows
                self._call = self.native.bind_norm(
                    self._kernel, self.width, spec.dtype, self._parameters, steering, THREADED_ELEMENTS
                )

    def __call__(self, state: Tensor) -> Tensor:
        """Edit ``state [..., H]`` in place and return it normalised."""
        if self.readings is not None or self.observer is not None:
            return self._slow(state)
        if is_compiling():
            traceable = state.dtype is self.dtype and not torch.is_grad_enabled()
            return self._traced(state) if traceable else self._slow(state)
        out: Tensor | None = self._launch(state) if self._call is None else self._call(state)
        if out is None:
            return self._slow(state)
        self.calls += 1
        return out

    def add(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor] | None:
        """``left + right [..., H]``, edited, and that normalised; None where that is not for one kernel call."""
        if self._call is None or self.readings is not None or self.observer is not None:
            return None
        both: tuple[Tensor, Tensor] | None = self._call(left, right)
        if both is not None:
            self.calls += 1
        return both

    def _launch(self, state: Tensor) -> Tensor | None:
        """One launch on a GPU; None where the kernel does not apply."""
        parameters = self._parameters
        weight, bias = parameters.get("weight"), parameters.get("bias")
        # a weight cast since then would be read past its end; without a weight nothing fixes the width
        fits = state.shape[-1] == self.width if weight is None else weight.dtype is self.dtype
        if state.dtype is not self.dtype or torch.is_grad_enabled() or not fits or not state.is_contiguous():
            return None
        address = state.data_ptr()
        scale, shift = 0 if weight is None else weight.data_ptr(), 0 if bias is None else bias.data_ptr()
        if self._unaligned and (address | scale | shift) & self._unaligned:
            return None
        slot, count = 0 if self.tables is None else self.rows.pointer, state.numel() // self.width
        if slot and count != self.rows.count:
            return None
        out = torch.empty_like(state)
        where = self._where(count * self.width)
        fault = self._kernel(count, address, self.width, slot, scale, shift, out.data_ptr(), where)
        if fault >= 0:
            self._check(fault, self.rows.slot[: self.rows.count])
        return out

    def _slow(self, state: Tensor) -> Tensor:
        self.edit(state)
        return self._forward(self.spec.module, state)

    def _traced(self, state: Tensor) -> Tensor:
        flat = state.reshape(-1, self.width)
        spec, tables = self.spec, self.tables
        if tables is None:
            return reference.normalise(flat, spec.weight, spec.bias, spec.eps, spec.norm).view_as(state)
        if not state.is_contiguous():
            return self._slow(state)
        slot = self._traced_slots(flat)
        weight, bias = self._parameters.get("weight"), self._parameters.get("bias")
        out: Tensor = torch.ops.steerkern.steer_norm_(flat, slot, *tables, weight, bias, spec.eps, int(spec.norm))
        return out.view_as(state)


class DoorPoint(Point):
    """Edits at the door of a block without a fused site: its input, or the last block's output."""

    def __init__(self, found: FoundSite, program: Program, rows: RowMap, number: int, backend: str) -> None:
        super().__init__(program, rows, number, backend, found.streams)
        self.leaving = found.site.name == "resid_post"

    def before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Edit the state on its way into the block."""
        if not self.leaving:
            self.edit(block_input(args, kwargs))

    def after(self, output: Any) -> None:
        """Edit the state on its way out."""
        if self.leaving and output is not None:
            self.edit(block_output(output))
