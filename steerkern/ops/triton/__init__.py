"""The Triton kernels, for NVIDIA and AMD GPUs: compiled when first used, chosen by capability and never by trying.

One program edits and normalises one row, which it keeps in registers. A slot's entries are looked up by the program,
so rows of different slots cost the same; a row of slot -1, or of a slot outside the tables, is only normalised. The
norm of the edited row is summed from the row as it was rounded. Taking it from the Gram matrix of the directions would
save a row of one entry two of four barriers, but the guard against cancellation needs the sum as well: compiled for
sm_90 both need 96 registers, the Gram kernel 35 shuffles instead of 14, a third more instructions, and a table of inner
products or more sums per entry.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from typing import Any

import torch
from torch import Tensor

from ...errors import BackendError
from ..schemas import DTYPES, Norm, Tables, check, check_tables
from .variants import WIDEST, Variant, loaded

DEVICE = "cuda"
"""Where the tensors lie; torch calls AMD GPUs by the same name."""

OLDEST = (3, 6)
"""The first release of Triton whose compiler interface this was written for."""


def unusable() -> str:
    """Why the kernels cannot run here; empty if they can."""
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        sees = "finds none" if built else "is built without CUDA and ROCm"
        return f"no GPU: torch {torch.__version__} {sees}"
    if torch.version.hip is None and (capability := torch.cuda.get_device_capability()) < (8, 0):
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, needed is 8.0"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    import triton

    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST:
        return f"triton {triton.__version__} is installed, needed is {OLDEST[0]}.{OLDEST[1]} or later"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "triton builds its launchers with a C compiler, and neither gcc nor clang is on the path"
    return ""


class Steer:
    """The kernels for rows of one site; made by :func:`bind`."""

    def __init__(
        self, width: int, dtype: torch.dtype, norm: Norm, eps: float, tables: Tables | None, device: int
    ) -> None:
        self._variant = Variant(width, dtype, norm)
        self._mask = 15 if self._variant.aligned else 0
        self._eps = eps
        self._tables = tables  # keeps them alive
        self._device = device
        self._constants: tuple[int, ...] = (0,) * 8
        if tables is not None:
            bank, links, _, span, _ = tables
            self._constants = (*(t.data_ptr() for t in tables), bank.shape[0], links.shape[1], span.shape[0])

    def __call__(self, n: int, h: int, h_stride: int, slot: int, weight: int, bias: int, y: int, stream: int) -> int:
        """The same as :meth:`full` without ``delta`` and ``trace``."""
        return self.full(n, h, h_stride, slot, weight, bias, y, 0, 0, 0, 0, stream)

    def full(
        self,
        n: int,
        h: int,
        h_stride: int,
        slot: int,
        weight: int,
        bias: int,
        y: int,
        delta: int,
        delta_stride: int,
        trace: int,
        columns: int,
        stream: int,
    ) -> int:
        """Launch on a stream of the device: addresses, 0 for what is not there, strides in elements.

        No allocation and no wait, so it may be captured into a CUDA graph; the first call of a variant compiles it and
        must come before. Always returns -1: a row whose slot lies outside the tables is not edited, and nobody told.

        Raises:
            ValueError: addresses or strides that are no multiple of 16 bytes, at a width that is one of 16.
        """
        if n == 0:
            return -1
        if n == 1:
            h_stride = delta_stride = self._variant.width  # whatever they say, there is no second row
        if (h | weight | bias | y | delta | h_stride | delta_stride) & self._mask:
            raise ValueError(f"rows of {self._variant.width} must be aligned to 16 bytes, and 16 elements, apart")
        slot = slot if self._tables is not None else 0
        variant = self._variant._replace(
            slot=slot != 0, weight=weight != 0, bias=bias != 0, delta=delta != 0, trace=slot != 0 and trace != 0
        )
        bank, links, fields, span, gain, *sizes = self._constants
        launch(
            variant, self._device, stream, n,
            h, h_stride, slot or None, bank, links, fields, span, gain, *sizes,
            weight or None, bias or None, self._eps, y or None, delta or None, delta_stride, trace or None, columns,
        )  # fmt: skip
        return -1


def launch(variant: Variant, device: int, stream: int, n: int, *arguments: Any) -> None:
    """Run ``n`` programs of a variant on a stream of a GPU."""
    if torch.cuda.current_device() != device:
        with torch.cuda.device(device):
            launch(variant, device, stream, n, *arguments)
        return
    kernel = loaded(variant, device)
    kernel[(n, 1, 1)](*arguments, variant.width, variant.block, int(variant.norm), stream=stream)


def bind(
    tables: Tables | None, width: int, dtype: torch.dtype, norm: int, eps: float, *, device: torch.device | None = None
) -> Steer:
    """The kernels for rows ``[N, width]`` of one site, which keep ``tables`` alive and read their values at each call.

    ``kernel(N, h, h_stride, slot, weight, bias, y, stream)`` takes addresses, see :meth:`Steer.full`.

    Without tables they only normalise, on ``device`` or else on the current GPU.

    Raises:
        BackendError: no GPU, no Triton, or rows wider than 65536.
        ValueError, TypeError: tables that break the contract, or lie elsewhere.
    """
    if reason := unusable():
        raise BackendError(f"backend triton: {reason}")
    if width > WIDEST:
        raise BackendError(f"backend triton: rows of {width}, its kernels hold up to {WIDEST}")
    if dtype not in DTYPES:
        raise BackendError(f"backend triton: no kernel for {dtype}, there are float32, bfloat16 and float16")
    if tables is not None:
        check_tables(tables, width)
        _check_device(*tables)
        if tables.bank.data_ptr() & 15:
            raise ValueError("backend triton: the bank must begin at a multiple of 16 bytes")
        device = tables.bank.device if device is None else device
    index = None if device is None else device.index
    return Steer(width, dtype, Norm(norm), eps, tables, torch.cuda.current_device() if index is None else index)


def current_stream(device: int) -> int:
    """The handle of torch's current stream on a GPU."""
    handle: int = torch._C._cuda_getCurrentRawStream(device)
    return handle


def steer(
    h: Tensor,
    slot: Tensor | None,
    tables: Tables,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 0.0,
    norm: int = Norm.NONE,
    delta: Tensor | None = None,
    trace: Tensor | None = None,
) -> Tensor | None:
    """Edit ``h [N, H]`` in place and return it normalised (None where ``norm`` is NONE); see ``reference.steer``.

    Nothing waits for the GPU, so slots are not checked: a row whose slot, or whose slot's entries, lie outside the
    tables is not edited.
    """
    check(h, slot, tables, weight, bias, norm, delta, trace)
    n, width = h.shape
    kernel = bind(tables if slot is not None else None, width, h.dtype, norm, eps, device=h.device)
    _check_device(h, slot, weight, bias, delta, trace)
    rows = aligned(h)
    if n > 1 and rows.stride(0) < width:
        raise ValueError(f"the rows of h overlap: shape {tuple(h.shape)}, strides {h.stride()}")
    slot = None if slot is None else slot.contiguous()
    weight, bias, delta = (None if t is None else aligned(t) for t in (weight, bias, delta))
    y = None if norm == Norm.NONE else torch.empty(h.shape, dtype=h.dtype, device=h.device)
    kernel.full(
        n, rows.data_ptr(), rows.stride(0), _address(slot), _address(weight), _address(bias), _address(y),
        _address(delta), 0 if delta is None else delta.stride(0),
        _address(trace), 0 if trace is None else trace.shape[1], current_stream(h.device.index),
    )  # fmt: skip
    if rows is not h:
        h.copy_(rows)
    return y


def aligned(rows: Tensor) -> Tensor:
    """``rows [..., H]`` as the kernels take them: elements side by side, at widths of 16 at addresses of 16.

    Another layout is copied, because another order of its sums would have other bits.
    """
    width = rows.shape[-1]
    apart = rows.stride(0) if rows.dim() == 2 and rows.shape[0] > 1 else width
    if (rows.stride(-1) == 1 or width == 1) and (width % 16 or not (apart % 16 or rows.data_ptr() & 15)):
        return rows
    return rows.clone(memory_format=torch.contiguous_format)


def _check_device(*tensors: Tensor | None) -> None:
    for tensor in tensors:
        if tensor is not None and tensor.device.type != DEVICE:
            raise ValueError(f"backend triton: every tensor must lie on the GPU, one is on {tensor.device}")


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
