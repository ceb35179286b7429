"""The CUDA kernels as a backend of the conformance tests: on a GPU, and their own code compiled for the CPU.

On the CPU every CUDA thread is a fiber (cuda_host.h), which shows wrong sums, indices and barriers, but no race and
nothing of nvcc.
"""

from __future__ import annotations

import contextlib
import ctypes
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from runners import Buffer, Result
from torch import Tensor

from steerkern.ops import cpu, cuda
from steerkern.ops.schemas import Norm, Tables

HERE = Path(__file__).parent


def load_host(folder: Path, build: bool) -> ctypes.CDLL:
    """The kernels compiled by g++ in ``folder``, about 10 s."""
    target = folder / "cuda_host.so"
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared"]
    include = ["-I", str(HERE), "-I", str(HERE.parents[1] / "csrc")]
    machine = ['-DSTEER_MACHINE="cuda_host.h"']
    if build:
        subprocess.run(["g++", *flags, *machine, *include, str(HERE / "cuda_host.cpp"), "-o", str(target)], check=True)
    library = ctypes.CDLL(str(target))
    library.steer_on_host.restype = ctypes.c_int64
    return library


def no_host() -> str:
    """Why the kernels cannot be compiled for the CPU, or an empty string."""
    return "" if shutil.which("g++") else "no g++"


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(0 if tensor is None else tensor.data_ptr())


@dataclass
class CudaRunner:
    """``library`` None: on the GPU."""

    library: ctypes.CDLL | None
    warps: int = 0
    cluster: int = 0
    gram: bool = False
    shapes: set[tuple[int, int, int, bool]] = field(default_factory=set)
    """Threads, blocks per row, pieces per thread and alignment of the calls on the host so far."""

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
        """Run on copies, as ``runners.Runner.run``."""
        n, width = h.shape
        on_gpu = self.library is None
        with torch.device("cuda") if on_gpu else contextlib.nullcontext():
            rows = Buffer(h, odd)
            steps = None if delta is None else Buffer(delta, odd).rows
            columns = torch.full((n, trace), torch.nan) if trace else None
            y = Buffer(torch.full((1, n * width), torch.nan, dtype=h.dtype), odd) if norm != Norm.NONE else None
        given = [slot, weight, bias, *tables]
        slot, weight, bias, *parts = (t.cuda() if on_gpu and t is not None else t for t in given)
        where = [slot, weight, bias, None if y is None else y.rows]
        strides = (0 if steps is None else steps.stride(0), 0 if columns is None else columns.shape[1])
        call = self._launch if on_gpu else self._emulate
        call(Tables(*parts), rows.rows, where, steps, columns, strides, int(norm), eps)
        out = None if y is None else y.take().view(n, width).cpu()
        return Result(rows.take().cpu(), out, None if columns is None else columns.cpu())

    def _emulate(
        self,
        tables: Tables,
        h: Tensor,
        where: list[Tensor | None],
        delta: Tensor | None,
        trace: Tensor | None,
        strides: tuple[int, int],
        norm: int,
        eps: float,
    ) -> None:
        assert self.library is not None
        bank, links, fields, span, gain = tables
        n, width = h.shape
        number = ctypes.c_int64
        shape = self.library.steer_on_host(
            pointer(bank), number(bank.shape[0]), pointer(links), pointer(fields), number(links.shape[1]),
            pointer(span), number(span.shape[0]), pointer(gain), number(width), number(cpu.DTYPE_CODES[h.dtype]),
            number(norm), ctypes.c_float(eps), number(n), pointer(h), number(h.stride(0)), *map(pointer, where),
            pointer(delta), number(strides[0]), pointer(trace), number(strides[1]),
            number(self.warps), number(self.cluster), number(self.gram),
        )  # fmt: skip
        self.shapes.add((shape >> 8, shape >> 4 & 15, shape >> 1 & 7, bool(shape & 1)))

    def _launch(
        self,
        tables: Tables,
        h: Tensor,
        where: list[Tensor | None],
        delta: Tensor | None,
        trace: Tensor | None,
        strides: tuple[int, int],
        norm: int,
        eps: float,
    ) -> None:
        n, width = h.shape
        kernel: Any = cuda.bind(tables, width, h.dtype, norm, eps)
        kernel.tune(warps=self.warps, cluster=self.cluster, gram=self.gram)
        stream = cuda.current_stream(h.device.index)
        places = [n, h.data_ptr(), h.stride(0), *(0 if t is None else t.data_ptr() for t in where)]
        if delta is None and trace is None:
            kernel(*places, stream)
        else:
            kernel.full(
                *places, 0 if delta is None else delta.data_ptr(), strides[0],
                0 if trace is None else trace.data_ptr(), strides[1], stream,
            )  # fmt: skip
        torch.cuda.synchronize()
