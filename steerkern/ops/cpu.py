"""The C++ kernels for the CPU: AVX-512, AVX2 or portable, chosen when first used (``STEERKERN_ISA`` overrides)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import BackendError
from . import reference
from .schemas import DTYPES, Norm, Tables, check, check_tables

try:
    from .. import _C
except ImportError as error:
    _MISSING = f"the native extension is not built or does not load ({error}); reinstall with STEERKERN_BUILD=cpu"
else:
    _MISSING = ""

DTYPE_CODES = {dtype: code for code, dtype in enumerate(DTYPES)}
"""Row dtypes of the kernels, by the number that the extension knows them by."""


def unusable() -> str:
    """Why the kernels cannot run here; empty if they can."""
    wanted = os.environ.get("STEERKERN_ISA")
    if not _MISSING and wanted and wanted not in _C.supported_isas():
        return f'STEERKERN_ISA="{wanted}": this machine and build have {", ".join(_C.supported_isas())}'
    return _MISSING


def bind(tables: Tables | None, width: int, dtype: torch.dtype, norm: int, eps: float) -> _C.Steer:
    """The kernel for rows ``[N, width]`` of one site; calling it costs about 0.2 us plus its work.

    ``kernel(N, h, h_stride, slot, weight, bias, y, threads)`` takes addresses (``slot``, ``weight`` and ``bias`` may be
    0) and returns -1, or the first row whose slot reaches outside the tables; then nothing was written. With two
    addresses more, ``base`` and ``delta`` of rows with the stride of ``h``, their sum is written to ``h`` first. The
    kernel keeps ``tables`` alive and reads their values at each call. Without tables it only normalises.

    Raises:
        BackendError: the extension is missing.
        ValueError, TypeError: tables that break the contract or lie on another device.
    """
    if reason := unusable():
        raise BackendError(f"backend cpu: {reason}")
    kernel = _C.Steer(width, DTYPE_CODES[dtype], int(norm), eps)
    if tables is not None:
        check_tables(tables, width)
        _check_device(*tables)
        bank, links, fields, span, gain = tables
        kernel.bind(
            bank.data_ptr(), bank.shape[0], links.data_ptr(), fields.data_ptr(), links.shape[1],
            span.data_ptr(), span.shape[0], gain.data_ptr(), tables,
        )  # fmt: skip
    return kernel


def bind_norm(
    kernel: _C.Steer, width: int, dtype: torch.dtype, parameters: Mapping[str, Tensor | None], rows: Any, threaded: int
) -> _C.NormCall:
    """A whole call of a norm module: ``norm(state)`` edits in place and returns the output.

    ``norm(left, right)`` returns the edited sum as a new tensor, and its output. Both return None, with nothing done,
    where gradients are enabled or the tensors are not contiguous rows ``[..., width]`` of ``dtype`` in number as the
    row map.

    Args:
        kernel: what :func:`bind` returned.
        width: of the rows.
        dtype: of the rows, of ``weight`` and of ``bias``.
        parameters: those of the module, by name; read at each call.
        rows: has ``pointer`` and ``count`` of the row map; None for a norm that is never steered.
        threaded: number of elements from which on several threads share a call.
    """
    return _C.NormCall(kernel, width, dtype, parameters, rows, threaded)


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

    Raises:
        IndexError: a slot that the tables do not have.
        ValueError: a span or link that reaches outside the tables. In both cases nothing was written.
    """
    check(h, slot, tables, weight, bias, norm, delta, trace)
    n, width = h.shape
    kernel = bind(tables if slot is not None else None, width, h.dtype, norm, eps)
    _check_device(h, slot, weight, bias, delta, trace)
    rows = h if h.stride(1) == 1 or width == 1 else h.contiguous()
    if n > 1 and rows.stride(0) < width:
        raise ValueError(f"the rows of h overlap: shape {tuple(h.shape)}, strides {h.stride()}")
    slot = None if slot is None else slot.contiguous()
    if delta is not None and delta.stride(1) != 1:
        delta = delta.contiguous()
    y = None if norm == Norm.NONE else torch.empty(h.shape, dtype=h.dtype)
    fault = kernel.full(
        n, rows.data_ptr(), rows.stride(0), _address(slot), _address(weight), _address(bias), _address(y),
        _address(delta), 0 if delta is None else delta.stride(0),
        _address(trace), 0 if trace is None else trace.shape[1], torch.get_num_threads(),
    )  # fmt: skip
    if fault >= 0:
        assert slot is not None
        raise_fault(slot, tables)
    if rows is not h:
        h.copy_(rows)
    return y


def raise_fault(slot: Tensor, tables: Tables) -> None:
    """Raise for the first slot that reaches outside the tables, if one does."""
    sentence = reference.find_fault(slot, tables)
    if sentence is not None:
        raise (IndexError if int(slot.max()) >= tables.span.shape[0] else ValueError)(sentence)


def _check_device(*tensors: Tensor | None) -> None:
    for tensor in tensors:
        if tensor is not None and tensor.device.type != "cpu":
            raise ValueError(f"backend cpu: every tensor must lie on the CPU, one is on {tensor.device}")


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
