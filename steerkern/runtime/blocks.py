"""Residual sums inside decoder blocks, made by the kernel of the norm that reads them.

A block whose forward says ``h = residual + x; x = self.norm(h)`` runs its own code with those statements given to
:func:`add_norm`, see :mod:`~steerkern.runtime.rewriting`. The sum is a new tensor, as it was: neither summand is
written, so whoever kept one still has it. Where one kernel call will not do (gradients, hooks on the norm, several
sessions, probes, a graph being compiled) the statements run as they were written.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_backward_hooks as _BACKWARD
from torch.nn.modules.module import _global_backward_pre_hooks as _BEFORE_BACKWARD
from torch.nn.modules.module import _global_forward_hooks as _AFTER
from torch.nn.modules.module import _global_forward_pre_hooks as _BEFORE

from .rewriting import Rewritten, rewrite

NORM = "_steerkern_norm"
"""Where a module keeps the handlers that stand in for a norm."""

DIRECT = "_steerkern_direct"
"""On the class of a steered norm: whether calling it comes down to its forward."""


def add_norm(left: Tensor, right: Tensor, norm: Any) -> tuple[Tensor, Tensor]:
    """``left + right`` and its norm."""
    if not torch.compiler.is_compiling() and getattr(type(norm), DIRECT, False) and not hooked(norm):
        handlers = norm.__dict__[NORM]
        both: tuple[Tensor, Tensor] | None = handlers[0].add(left, right) if len(handlers) == 1 else None
        if both is not None:
            return both
    total = left + right
    return total, norm(total)


def hooked(module: Any) -> bool:
    """Whether a hook wants to see a call of ``module``, or somebody gave it a forward of its own."""
    own = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(own or _AFTER or _BEFORE or _BACKWARD or _BEFORE_BACKWARD or "forward" in module.__dict__)


@dataclass(frozen=True, eq=False)
class BlockSums:
    """The residual sums of one block that the kernels of its norms make."""

    layer: int
    block: nn.Module
    norms: tuple[str, ...]
    """The norms of those sums, by their name in the block."""
    reason: str = ""
    """Why there are none."""


def find_sums(blocks: Iterable[nn.Module], norms: Iterable[nn.Module], backend: str) -> tuple[BlockSums, ...]:
    """For each block, the sums that the kernels of ``norms`` can make."""
    standing = set(norms)
    return tuple(_sums_of(layer, block, standing, backend) for layer, block in enumerate(blocks))


def _sums_of(layer: int, block: nn.Module, standing: set[nn.Module], backend: str) -> BlockSums:
    if backend != "cpu":  # the other kernels add in place only, which whoever kept the summand would see
        return BlockSums(layer, block, (), f"backend {backend} has no kernel that makes a new sum")
    if "forward" in block.__dict__:
        return BlockSums(layer, block, (), "its forward was replaced")
    cls: Any = type(block)
    made = rewritten(getattr(cls, "_steerkern_base", cls))
    if isinstance(made, str):
        return BlockSums(layer, block, (), made)
    names = tuple(name for name in made.norms if getattr(block, name, None) in standing)
    return BlockSums(layer, block, names, "" if names else "no kernel stands in for the norm of its sum")


@functools.cache
def rewritten(cls: type) -> Rewritten | str:
    """The forward of a class of blocks with its sums given to :func:`add_norm`, or why there is none."""
    stock: Any = cls.forward  # type: ignore[attr-defined]
    made = rewrite(stock, add_norm)
    if isinstance(made, str):
        return made
    # transformers wraps the forward of every subclass; other wrappers would be lost
    subclass: Any = type(cls)(cls.__name__, (cls,), {"forward": made.forward, "__module__": cls.__module__})
    return made if _wrappers(subclass.forward) == _wrappers(stock) else "something is wrapped around its forward"


def _wrappers(function: Any) -> list[Any]:
    codes = []
    while hasattr(function, "__wrapped__"):
        codes.append(getattr(function, "__code__", function))
        function = function.__wrapped__
    return codes
