"""Registers ``steerkern::steer_`` and ``steerkern::steer_norm_`` and says which backend runs where.

The registered ops serve ``torch.compile`` and callers with tensors; the session's eager path calls the kernels that a
backend's ``bind`` returns. Plain ``torch.library.Library`` registration: ``custom_op`` takes 33 us a call.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import BackendError
from . import cpu, cuda, reference, triton
from .schemas import (
    DTYPES,
    STEER_NORM_SCHEMA,
    STEER_SCHEMA,
    Norm,
    Tables,
    check,
    steer_fake,
    steer_norm_fake,
)

NATIVE: dict[str, Any] = {"cpu": cpu, "triton": triton, "cuda": cuda}
"""The modules of the backends that have kernels."""

PREFERRED = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}
"""By type of device, the backends that the automatic choice tries; torch calls AMD GPUs ``cuda`` too."""


def backends() -> dict[str, str]:
    """The backends by name: an empty string for one that runs here, else the reason why it does not.

    >>> backends()["reference"]
    ''
    """
    return {"reference": "", **{name: module.unusable() for name, module in NATIVE.items()}}


def resolve(backend: str | None, device: torch.device | str, dtype: torch.dtype) -> str:
    """The backend for rows of ``dtype`` on ``device``.

    A backend asked for by name works or raises; ``None`` takes the fastest that runs, and says once if that is the
    reference.

    Raises:
        BackendError: the backend asked for cannot run.

    >>> resolve("reference", "cpu", torch.float32)
    'reference'
    """
    device = torch.device(device)
    if backend is None:
        name, reasons = _automatic(device, dtype)
        if name == "reference":
            _warn_once(f"steering runs on the plain torch reference: {reasons}")
        return name
    if backend != "reference" and backend not in NATIVE:
        raise BackendError(f"backend {backend!r}: known are reference, {', '.join(NATIVE)}")
    if reason := _unusable(backend, device, dtype):
        raise BackendError(f"backend {backend}: {reason}")
    return backend


def _automatic(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """The fastest backend that runs, and why the faster ones do not."""
    reasons: list[str] = []
    for name in PREFERRED.get(device.type, ()):
        reason = _unusable(name, device, dtype)
        if not reason:
            return name, "; ".join(reasons)
        reasons.append(f"backend {name}: {reason}")
    return "reference", "; ".join(reasons) or f"no other backend runs on {device.type}"


def _unusable(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    if backend == "reference":
        return ""
    if reason := NATIVE[backend].unusable():
        return str(reason)
    if backend not in PREFERRED.get(device.type, ()):
        return f"the model is on {device}"
    if dtype not in DTYPES:
        return f"no kernel for {dtype}, there are float32, bfloat16 and float16"
    return ""


@functools.cache
def _warn_once(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=4)


Run = Callable[
    [Tensor, Tensor | None, Tables, Tensor | None, Tensor | None, float, int, Tensor | None, Tensor | None],
    Tensor | None,
]
"""``run(h, slot, tables, weight, bias, eps, norm, delta, trace)``: edits ``h`` in place, returns ``y`` or None."""


def _run_reference(
    h: Tensor,
    slot: Tensor | None,
    tables: Tables,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    norm: int,
    delta: Tensor | None,
    trace: Tensor | None,
) -> Tensor | None:
    check(h, slot, tables, weight, bias, norm, delta, trace)
    if slot is not None:
        cpu.raise_fault(slot, tables)
    edited, y = reference.steer(h, slot, tables, weight, bias, eps, norm, delta, trace)
    if edited is not h:
        h.copy_(edited)
    return None if y is None else y.contiguous()


RUNNERS: dict[str, Run] = {
    "reference": _run_reference, "cpu": cpu.steer, "triton": triton.steer, "cuda": cuda.steer
}  # fmt: skip
"""The op on tensors, by backend."""


def _run_on_cpu(h: Tensor, *arguments: Any) -> Tensor | None:
    return RUNNERS[_automatic(h.device, h.dtype)[0]](h, *arguments)


def _run_on_gpu(h: Tensor, *arguments: Any) -> Tensor | None:
    return RUNNERS[_fastest_on_gpu(h.device, h.dtype)](h, *arguments)


@functools.cache  # asking the driver takes longer than a launch, and its answer stays
def _fastest_on_gpu(device: torch.device, dtype: torch.dtype) -> str:
    return _automatic(device, dtype)[0]


def _kernels(run: Run) -> dict[str, Callable[..., Any]]:
    """``run`` under the signatures of the two schemas."""

    def steer_(
        h: Tensor,
        slot: Tensor,
        bank: Tensor,
        links: Tensor,
        fields: Tensor,
        span: Tensor,
        gain: Tensor,
        delta: Tensor | None = None,
        trace: Tensor | None = None,
    ) -> None:
        run(h, slot, Tables(bank, links, fields, span, gain), None, None, 0.0, Norm.NONE, delta, trace)

    def steer_norm_(
        h: Tensor,
        slot: Tensor | None,
        bank: Tensor,
        links: Tensor,
        fields: Tensor,
        span: Tensor,
        gain: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        norm: int,
        delta: Tensor | None = None,
        trace: Tensor | None = None,
    ) -> Tensor:
        torch._check_value(norm != Norm.NONE, lambda: "steer_norm_ needs a norm; without one, steer_ edits the rows")
        y = run(h, slot, Tables(bank, links, fields, span, gain), weight, bias, eps, norm, delta, trace)
        assert y is not None
        return y

    return {"steer_": steer_, "steer_norm_": steer_norm_}


def _below_autograd(name: str) -> Callable[..., Any]:
    def run(h: Tensor, *arguments: Any, **options: Any) -> Any:
        tensors = [h, *arguments, *options.values()]
        if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tensors):
            raise RuntimeError(
                f"steerkern::{name} writes in place and has no gradient: call it under torch.no_grad(), or take "
                "steerkern.ops.reference.steer, which a session does by itself"
            )
        with torch._C._AutoDispatchBelowAutograd():
            result = getattr(torch.ops.steerkern, name)(h, *arguments, **options)
        if not h.is_inference():
            torch.autograd.graph.increment_version(h)  # so that a backward that saved the old h raises
        return result

    return run


_LIBRARY = torch.library.Library("steerkern", "FRAGMENT")
_LIBRARY.define(STEER_SCHEMA)
_LIBRARY.define(STEER_NORM_SCHEMA)
for _key, _run in (("CompositeExplicitAutograd", _run_reference), ("CPU", _run_on_cpu), ("CUDA", _run_on_gpu)):
    for _name, _kernel in _kernels(_run).items():
        _LIBRARY.impl(_name, _kernel, _key)
for _name, _fake in (("steer_", steer_fake), ("steer_norm_", steer_norm_fake)):
    _LIBRARY.impl(_name, _below_autograd(_name), "Autograd")
    torch.library.register_fake(f"steerkern::{_name}", _fake, lib=_LIBRARY)
