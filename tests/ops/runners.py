"""How tests call a backend: on rows inside a sentinel-filled buffer, into outputs poisoned with NaN.

A new backend is one more entry of ``BACKENDS``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from steerkern.ops import cpu, dispatch
from steerkern.ops.schemas import Norm, Tables

SENTINEL = 0x5A


class Result(NamedTuple):
    h: Tensor
    y: Tensor | None
    trace: Tensor | None


class Buffer:
    """``tensor`` inside a larger allocation; ``odd``: shifted by one element, rows further apart than their width."""

    def __init__(self, tensor: Tensor, odd: bool, device: str = "cpu") -> None:
        n, width = tensor.shape
        stride, lead = (width + 3, 1) if odd else (width, 64)
        self.memory = torch.empty(lead + n * stride + 64, dtype=tensor.dtype, device=device)
        self.bytes = self.memory.view(torch.uint8)
        self.bytes.fill_(SENTINEL)
        self.rows = self.memory.as_strided((n, width), (stride, 1), lead)
        self.rows.copy_(tensor)

    def take(self) -> Tensor:
        """The rows, after a check that nothing around them was written."""
        out = self.rows.clone(memory_format=torch.contiguous_format)
        self.bytes_of_rows().fill_(SENTINEL)
        assert bool((self.bytes == SENTINEL).all()), "a byte outside the rows was written"
        return out

    def bytes_of_rows(self) -> Tensor:
        size = self.memory.element_size()
        n, width = self.rows.shape
        return self.bytes.as_strided(
            (n, width * size), (self.rows.stride(0) * size, 1), self.rows.storage_offset() * size
        )


@dataclass(frozen=True)
class Runner:
    name: str
    isa: str | None = None

    def __str__(self) -> str:
        return self.name if self.isa is None else f"{self.name}-{self.isa}"

    @property
    def device(self) -> str:
        return getattr(dispatch.NATIVE.get(self.name), "DEVICE", "cuda" if self.name == "cuda" else "cpu")

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        return (torch.float32, torch.bfloat16, torch.float16)

    def unusable(self) -> str:
        reason = dispatch.backends()[self.name]
        if not reason and self.isa is not None and self.isa not in cpu._C.supported_isas():
            reason = f"this machine has no {self.isa}"
        return reason

    @contextmanager
    def in_use(self) -> Iterator[None]:
        if self.isa is None:
            yield
            return
        before = cpu._C.isa()
        cpu._C.set_isa(self.isa)
        yield
        cpu._C.set_isa(before)

    def run(
        self,
        h: Tensor,
        slot: Tensor | None,
        tables: Tables,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-6,
        norm: int = Norm.NONE,
        delta: Tensor | None = None,
        trace: int = 0,
        odd: bool = False,
        threads: int = 1,
    ) -> Result:
        """Run on copies; ``trace`` is a number of columns, NaN where the backend writes nothing."""
        device = self.device
        rows = Buffer(h, odd, device)
        steps = None if delta is None else Buffer(delta, odd, device).rows
        columns = torch.full((h.shape[0], trace), torch.nan, device=device) if trace else None
        if self.name == "cpu":
            y = self._run_native(rows.rows, slot, tables, weight, bias, eps, norm, steps, columns, odd, threads)
        else:
            run = dispatch.RUNNERS[self.name]
            there = [None if t is None else t.to(device) for t in (slot, weight, bias)]
            tables = Tables(*(table.to(device) for table in tables))
            y = run(rows.rows, there[0], tables, *there[1:], eps, norm, steps, columns)
        return Result(*(None if t is None else t.cpu() for t in (rows.take(), y, columns)))

    def _run_native(
        self,
        h: Tensor,
        slot: Tensor | None,
        tables: Tables,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        norm: int,
        delta: Tensor | None,
        trace: Tensor | None,
        odd: bool,
        threads: int,
    ) -> Tensor | None:
        n, width = h.shape
        kernel = cpu.bind(tables, width, h.dtype, norm, eps)
        # the kernel writes y as one contiguous block, which may start anywhere
        y = Buffer(torch.full((1, n * width), torch.nan, dtype=h.dtype), odd) if norm != Norm.NONE else None
        pointers = [0 if t is None else t.data_ptr() for t in (slot, weight, bias, None if y is None else y.rows)]
        if delta is None and trace is None:
            fault = kernel(n, h.data_ptr(), h.stride(0), *pointers, threads)
        else:
            fault = kernel.full(
                n, h.data_ptr(), h.stride(0), *pointers,
                0 if delta is None else delta.data_ptr(), 0 if delta is None else delta.stride(0),
                0 if trace is None else trace.data_ptr(), 0 if trace is None else trace.shape[1], threads,
            )  # fmt: skip
        assert fault == -1
        return None if y is None else y.take().view(n, width)


BACKENDS = [Runner("reference"), *(Runner("cpu", isa) for isa in ("avx512", "avx2", "portable"))]
BACKENDS += [gpu for gpu in (Runner("triton"), Runner("cuda")) if not gpu.unusable()]
NATIVE = BACKENDS[1:]
