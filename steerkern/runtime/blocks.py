"""Residual sums inside decoder blocks, made by the kernel of the norm that reads them.

A block whose forward says ``h = residual + x; x = self.norm(h)`` runs its own code with those statements given to
:func:`add_norm`, see :mod:`~steerkern.runtime.rewriting`. The sum is a new tensor, as it was: neither summand is
written, so whoever kept one still has it. Where one kernel call will not do (gradients, hooks on the norm, several
sessions, probes, a graph being compiled) the statements run as they were written.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .rewriting import Rewritten, rewrite

NORM = "_steerkern_norm"
"""Where a module keeps the handlers that stand in for a norm."""

_hooks = torch.nn.modules.module


def add_norm(left: Tensor, right: Tensor, norm: Any) -> tuple[Tensor, Tensor]:
    """``left + right`` and its norm."""
    if not torch.compiler.is_compiling():
        own = norm.__dict__
        handlers = own.get(NORM)
        # a hook must see the norm being called
        if handlers is not None and len(handlers) == 1 and not (
            own["_forward_hooks"] or own["_forward_pre_hooks"] or _hooks._global_forward_hooks
            or _hooks._global_forward_pre_hooks
        ):  # fmt: skip
            both: tuple[Tensor, Tensor] | None = handlers[0].add(left, right)
            if both is not None:
                return both
    total = left + right
    return total, norm(total)


@dataclass(frozen=True, eq=False)
class FusedBlock:
    """A block that runs with its sums fused."""

    layer: int
    block: nn.Module
    norms: tuple[str, ...]
    """The norms whose kernel adds, by their name in the block."""


def find_blocks(blocks: Sequence[nn.Module], norms: Iterable[nn.Module]) -> tuple[list[FusedBlock], dict[int, str]]:
    """The blocks that have sums which the kernels of ``norms`` can make, and by layer why the others have none."""
    standing, found, reasons = set(norms), [], {}
    for layer, block in enumerate(blocks):
        made = rewritten(_stock_class(block)) if "forward" not in block.__dict__ else "its forward was replaced"
        if isinstance(made, str):
            reasons[layer] = made
            continue
        names = tuple(name for name in made.norms if getattr(block, name, None) in standing)
        if names:
            found.append(FusedBlock(layer, block, names))
        else:
            reasons[layer] = "no kernel stands in for the norm of its sum"
    return found, reasons


def _stock_class(block: nn.Module) -> type:
    return getattr(type(block), "_steerkern_base", type(block))


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
