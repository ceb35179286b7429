"""Tell which norm a module is by its arithmetic: its convention and its eps, never its name.

A module's own code runs on a twin of it with random weights, so that a norm whose weights are still ones is told
apart from one that multiplies before it rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import reference
from ..ops.schemas import Norm
from .patch import stock_class


@dataclass(frozen=True, eq=False)
class NormSpec:
    """A norm module that a fused kernel can stand in for: its convention and the numbers it needs."""

    module: nn.Module
    norm: Norm
    eps: float
    width: int
    dtype: torch.dtype
    """Of its input, its weights and its output."""

    @property
    def weight(self) -> Tensor | None:
        """The scale ``[width]``, read anew because weights may be replaced."""
        return self.module._parameters.get("weight")

    @property
    def bias(self) -> Tensor | None:
        """The shift ``[width]`` of a LayerNorm."""
        return self.module._parameters.get("bias")


def norm_like(module: nn.Module) -> bool:
    """Whether a module has the make of a norm: no parts, no buffers, at most a weight and a bias of one dimension."""
    if module._modules or module._buffers:
        return False
    return all(name in _NAMES and (p is None or p.dim() == 1) for name, p in module._parameters.items())


_NAMES = ("weight", "bias")

Kind = tuple[Any, ...]


def kind(module: nn.Module) -> Kind:
    """What decides a norm-like module's arithmetic, weights apart: siblings of one kind run the same code."""
    own = vars(module)
    settings = [item for item in own.items() if type(item[1]) in _SETTINGS and item[0] != "training"]
    parameters = [(name, p.shape, p.dtype) for name, p in own["_parameters"].items() if p is not None]
    return (stock_class(type(module)), "forward" in own, *settings, *parameters)


_SETTINGS = {bool, float, str}


@dataclass(frozen=True)
class Called:
    """How a norm-like module was called with one tensor: the last dimension and dtype of that, and how often."""

    kind: Kind
    width: int
    dtype: torch.dtype
    times: int = 1


def recognise_all(modules: Mapping[nn.Module, Called]) -> dict[nn.Module, NormSpec]:
    """The norms among ``modules``, one of each kind tried."""
    kinds: dict[tuple[Any, ...], NormSpec | None] = {}
    specs = {}
    for module, called in modules.items():
        key = (called.kind, called.width, called.dtype)
        if key not in kinds:
            kinds[key] = recognise(module, called.width, called.dtype)
        if (spec := kinds[key]) is not None:
            specs[module] = NormSpec(module, spec.norm, spec.eps, called.width, called.dtype)
    return specs


Run = Callable[[Any, Tensor], Any]
"""Runs a norm module, or a twin of it, on rows ``[N, width]``."""


def _forward(module: Any, rows: Tensor) -> Any:
    return module.forward(rows)


def recognise(module: nn.Module, width: int, dtype: torch.dtype, run: Run = _forward) -> NormSpec | None:
    """The convention that a module follows on rows ``[N, width]`` of ``dtype``; None if it follows none.

    Rows of ordinary and of tiny size are compared, so that a wrong eps shows. ``run`` calls the module's code.
    """
    parameters = [p for p in module._parameters.values() if p is not None]
    if "forward" in vars(module) or not norm_like(module):
        return None
    if any(p.shape != (width,) or p.dtype != dtype for p in parameters):
        return None
    device = parameters[0].device if parameters else torch.device("cpu")
    with torch.no_grad():
        try:
            eps = _measure_eps(module, width, device, run)
            if eps is None:
                return None
            generator = torch.Generator().manual_seed(0)
            rows = torch.randn(8, width, generator=generator) * torch.tensor([[1.0], [3.0], [1e-1], [1e-3]] * 2) + 0.1
            rows = rows.to(device, dtype)
            twin = _twin(module, {n: torch.randn(width, generator=generator).to(rows) for n in _NAMES})
            own = run(twin, rows.clone())
        except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError):
            return None  # not code for rows of this shape
        if not isinstance(own, Tensor) or own.shape != rows.shape or own.dtype != rows.dtype:
            return None
        weight, bias = twin._parameters.get("weight"), twin._parameters.get("bias")
        tried = _CONVENTIONS if bias is None else (Norm.LAYER,)
        fits = {norm: _distance(own, reference.normalise(rows, weight, bias, eps, norm)) for norm in tried}
    best = min(fits, key=lambda norm: fits[norm])
    return NormSpec(module, best, eps, width, dtype) if fits[best] <= 1.0 else None


_CONVENTIONS = (Norm.LLAMA, Norm.FP32, Norm.GEMMA, Norm.LAYER)


def _twin(module: nn.Module, parameters: dict[str, Tensor]) -> Any:
    """A module that runs the same code with other parameters, of those that ``module`` has."""
    twin: Any = object.__new__(stock_class(type(module)))
    twin.__dict__.update(vars(module))
    own = module._parameters
    twin.__dict__["_parameters"] = {n: parameters[n] if p is not None else None for n, p in own.items()}
    return twin


def _measure_eps(module: nn.Module, width: int, device: torch.device, run: Run) -> float | None:
    """The eps under the root, from the lengths at which a large and a tiny row of the same direction come out."""
    if width < 2:
        return None
    signs = torch.ones(width, device=device)
    signs[1::2] = -1.0
    signs[width // 2 * 2 :] = 0.0  # the mean is 0: with or without centring
    rows = signs * torch.tensor([[1e4], [1e-8]], device=device)
    ones = {"weight": torch.ones(width, device=device), "bias": torch.zeros(width, device=device)}
    out = run(_twin(module, ones), rows.clone())
    if not isinstance(out, Tensor) or out.shape != rows.shape:
        return None
    large, tiny = (float(v) for v in out[:, 0].double())
    mean_square = width // 2 * 2 / width
    if not large > 0.0 < tiny:
        return None
    # scale * 1e-8 / sqrt(1e-16 m + eps) = tiny, and scale / sqrt(m) = large
    eps = float((large * 1e-8 / tiny) ** 2 * mean_square - 1e-16 * mean_square)
    if not 1e-14 < eps < 0.1:
        return None
    named = [v for v in vars(module).values() if isinstance(v, float) and abs(v - eps) <= 1e-3 * eps]
    return named[0] if named else float(f"{eps:.3g}")


def _distance(own: Tensor, ours: Tensor) -> float:
    """Mean error in units of what one rounding may leave; over 1 the conventions differ."""
    eps = torch.finfo(own.dtype).eps
    wide, other = own.double(), ours.double()
    error = (wide - other).abs() / (eps * wide.abs() + eps * wide.abs().mean())
    # fp32 sums in another order: a few ulps; half types: an occasional tie
    return float(error.mean()) / (4.0 if own.dtype == torch.float32 else 0.05)
