"""The C++ kernels for NVIDIA GPUs: one block of threads, or one cluster, per row; launched without torch.

They are part of the extension only where it was built with ``STEERKERN_BUILD=cuda``; the CUDA runtime is inside.
"""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor

from ..errors import BackendError
from . import cpu
from .schemas import Norm, Tables, check, check_tables

try:
    from .. import _C
except ImportError as error:
    _MISSING = f"the native extension is not built or does not load ({error}); reinstall with STEERKERN_BUILD=cuda"
else:
    _MISSING = "" if hasattr(_C, "SteerCuda") else "built without CUDA kernels; reinstall with STEERKERN_BUILD=cuda"


def unusable() -> str:
    """Why the kernels cannot run here; empty if they can."""
    if _MISSING:
        return _MISSING
    if torch.version.hip:
        return "this torch is made for AMD; the Triton backend runs there"
    if reason := _C.cuda_unusable():
        return reason
    return "" if torch.cuda.is_available() else "this torch finds no CUDA device"


def bind(
    tables: Tables | None,
    width: int,
    dtype: torch.dtype,
    norm: int,
    eps: float,
    *,
    device: torch.device | None = None,
    entries: int = 1,
) -> _C.SteerCuda:
    """The kernel for rows ``[N, width]`` of one site on one device; calling it costs one launch.

    ``kernel(N, h, h_stride, slot, weight, bias, y, stream)`` takes addresses (``slot``, ``weight`` and ``bias`` may be
    0) and a stream handle, see :func:`current_stream`, and returns -1 before the work is done. A row whose slot, span
    or links reach outside the tables is left as it is. The kernel keeps ``tables`` alive and reads their values when it
    runs. Without tables it only normalises. It can be captured into a CUDA graph: nothing is loaded or allocated later.

    Args:
        tables: of the site, on the device.
        width: ``H``.
        dtype: of the rows.
        norm: a :class:`~steerkern.ops.schemas.Norm`.
        eps: of the norm.
        device: where to launch; by default that of ``tables``, else the current one.
        entries: most entries of a slot, if known: with many, few rows are shared out to several multiprocessors.

    Raises:
        BackendError: the kernels are missing, do not fit the device, or have no such dtype.
        ValueError, TypeError: tables that break the contract or lie on another device.
    """
    if reason := unusable():
        raise BackendError(f"backend cuda: {reason}")
    if dtype not in cpu.DTYPE_CODES:
        raise BackendError(f"backend cuda: no kernel for {dtype}, there are float32, bfloat16 and float16")
    if tables is not None:
        check_tables(tables, width)
        device = tables.bank.device if device is None else device
        _check_device(device, *tables)
    index = torch.cuda.current_device() if device is None or device.index is None else device.index
    kernel = _C.SteerCuda(width, cpu.DTYPE_CODES[dtype], int(norm), eps, index)
    kernel.tune(entries=entries)
    kernel.prepare()
    if tables is not None:
        bank, links, fields, span, gain = tables
        kernel.bind(
            bank.data_ptr(), bank.shape[0], links.data_ptr(), fields.data_ptr(), links.shape[1],
            span.data_ptr(), span.shape[0], gain.data_ptr(), tables,
        )  # fmt: skip
    return kernel


def current_stream(device: int) -> int:
    """The handle of torch's current stream on a device, 0.1 us."""
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

    Nothing waits for the device, so slots are not checked here: a row whose slot the tables do not have is not edited.
    With ``STEERKERN_CHECK_SLOTS=1`` such a row raises as on the CPU.

    Raises:
        BackendError: the kernels are missing or do not fit the device.
        ValueError, TypeError: arguments that break the contract or lie on several devices.
    """
    check(h, slot, tables, weight, bias, norm, delta, trace)
    _check_device(h.device, h, slot, weight, bias, delta, trace, *(tables if slot is not None else ()))
    n, width = h.shape
    rows = h if h.stride(1) == 1 or width == 1 else h.contiguous()
    if n > 1 and rows.stride(0) < width:
        raise ValueError(f"the rows of h overlap: shape {tuple(h.shape)}, strides {h.stride()}")
    if slot is not None and os.environ.get("STEERKERN_CHECK_SLOTS") == "1":
        cpu.raise_fault(slot, tables)
    slot = None if slot is None else slot.contiguous()
    if delta is not None and delta.stride(1) != 1:
        delta = delta.contiguous()
    y = None if norm == Norm.NONE else torch.empty(h.shape, dtype=h.dtype, device=h.device)
    kernel = _kernel_on_tensors(h, tables if slot is not None else None, norm, eps)
    kernel.full(
        n, rows.data_ptr(), rows.stride(0), _address(slot), _address(weight), _address(bias), _address(y),
        _address(delta), 0 if delta is None else delta.stride(0),
        _address(trace), 0 if trace is None else trace.shape[1], current_stream(h.device.index),
    )  # fmt: skip
    if rows is not h:
        h.copy_(rows)
    return y


def _kernel_on_tensors(h: Tensor, tables: Tables | None, norm: int, eps: float) -> _C.SteerCuda:
    if tables is None:
        return _kernel(h.device.index, h.shape[1], h.dtype, int(norm), eps, None)
    bank, links, fields, span, gain = tables
    places = (
        bank.data_ptr(), bank.shape[0], links.data_ptr(), fields.data_ptr(), links.shape[1],
        span.data_ptr(), span.shape[0], gain.data_ptr(),
    )  # fmt: skip
    return _kernel(h.device.index, h.shape[1], h.dtype, int(norm), eps, places)


@functools.lru_cache(maxsize=4096)
def _kernel(
    device: int, width: int, dtype: torch.dtype, norm: int, eps: float, places: tuple[int, ...] | None
) -> _C.SteerCuda:
    """A kernel that holds addresses only: the caller of the op has the tensors."""
    kernel = bind(None, width, dtype, norm, eps, device=torch.device("cuda", device))
    if places is not None:
        kernel.bind(*places)
    return kernel


def _check_device(device: torch.device, *tensors: Tensor | None) -> None:
    for tensor in tensors:
        if tensor is not None and (tensor.device.type != "cuda" or tensor.device != device):
            if reason := unusable():
                raise BackendError(f"backend cuda: {reason}")
            raise ValueError(f"backend cuda: every tensor must lie on one CUDA device, one is on {tensor.device}")


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
