"""Residual additions inside decoder blocks, done by the kernel of the norm that follows.

A block whose forward says ``h = residual + x; x = self.norm(h)`` runs its own code with that sum handed to
:func:`add_norm`, see :mod:`~steerkern.runtime.rewriting`. The sum is written over one of the two summands, and only
where nobody else can see that: the reference counts of the tensor and of its storage are looked at in every call. So a
hook that keeps what attention returned, an autograd graph or a module that returns a tensor of its own need no list of
exceptions; wherever anything is unusual, the two statements run as they were written.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from sys import getrefcount
from typing import Any

import torch
from torch import Tensor, nn

from .rewriting import Rewritten, rewrite

NORM = "_steerkern_norm"
"""Where a module keeps the handlers that stand in for a norm."""

_storages = getattr(torch._C, "_storage_Use_Count", None)


def add_norm(left: Tensor, right: Tensor, norm: Any) -> tuple[Tensor, Tensor]:
    """``left + right`` and its norm; the sum may take the place of a summand that only the caller holds."""
    if not torch.compiler.is_compiling() and not torch.is_grad_enabled():
        own = norm.__dict__
        handlers = own.get(NORM)
        if handlers is not None and len(handlers) == 1 and not (own["_forward_hooks"] or own["_forward_pre_hooks"]):
            if getrefcount(right) == _HELD_BY_CALLER and _unshared(right):
                normalised = handlers[0].add(right, left)
                if normalised is not None:
                    return right, normalised
            elif getrefcount(left) == _HELD_BY_CALLER and _unshared(left):
                normalised = handlers[0].add(left, right)
                if normalised is not None:
                    return left, normalised
    total = left + right
    return total, norm(total)


def add(left: Tensor, right: Tensor) -> Tensor:
    """``left + right``, which may take the place of a summand that only the caller holds."""
    if not torch.compiler.is_compiling() and not torch.is_grad_enabled() and _alike(left, right):
        if getrefcount(right) == _HELD_BY_CALLER and _unshared(right):
            return right.add_(left)
        if getrefcount(left) == _HELD_BY_CALLER and _unshared(left):
            return left.add_(right)
    return left + right


def _alike(left: Tensor, right: Tensor) -> bool:
    """Whether the sum of both has the type, dtype and layout of either."""
    if type(left) is not Tensor or type(right) is not Tensor or left.dtype is not right.dtype:
        return False
    return left.shape == right.shape and left.is_contiguous() and right.is_contiguous()


def _unshared(tensor: Any) -> bool:
    """Whether no C++ code holds ``tensor`` and no other tensor its storage."""
    assert _storages is not None
    return tensor._use_count() == 1 and _storages(tensor.untyped_storage()._cdata) == _STORAGE_ALONE


def _references(left: Tensor) -> int:
    return getrefcount(left)


def _held_by_caller() -> int:
    """References to a tensor that a caller has under one name and passed on, as Python counts them here."""
    tensor = torch.empty(0)
    return _references(tensor)


def _storage_alone() -> int:
    tensor = torch.empty(0)
    return 0 if _storages is None else int(_storages(tensor.untyped_storage()._cdata))


_HELD_BY_CALLER, _STORAGE_ALONE = _held_by_caller(), _storage_alone()


# which blocks


@dataclass(frozen=True, eq=False)
class FusedBlock:
    """A block that runs with its additions fused."""

    layer: int
    block: nn.Module
    norms: tuple[str, ...]
    """The norms whose kernel adds, by their name in the block."""


def find_blocks(blocks: Iterable[nn.Module], fused: Iterable[nn.Module]) -> tuple[list[FusedBlock], dict[int, str]]:
    """The blocks whose sums can be fused into the norms ``fused``, and by layer why the others cannot."""
    norms, found, reasons = set(fused), [], {}
    for layer, block in enumerate(blocks):
        rewritten = _of_module(block)
        if isinstance(rewritten, str):
            reasons[layer] = rewritten
            continue
        names = tuple(name for name in rewritten.norms if getattr(block, name, None) in norms)
        if names:
            found.append(FusedBlock(layer, block, names))
        else:
            reasons[layer] = "no kernel stands in for the norm after its sum"
    return found, reasons


def _of_module(block: nn.Module) -> Rewritten | str:
    if "forward" in block.__dict__:
        return "its forward was replaced"
    return rewritten(getattr(type(block), "_steerkern_base", type(block)))


@functools.cache
def rewritten(cls: type) -> Rewritten | str:
    """The forward of the blocks of a class with its additions fused, or why there is none."""
    if _storages is None or not hasattr(Tensor, "_use_count"):
        return f"torch {torch.__version__} does not count who holds a tensor"
    stock: Any = cls.forward  # type: ignore[attr-defined]
    made = rewrite(stock, add_norm, add)
    if isinstance(made, str):
        return made
    # a base class may wrap the forward of every subclass; other wrappers would be lost
    subclass: Any = type(cls)(cls.__name__, (cls,), {"forward": made.forward, "__module__": cls.__module__})
    if _wrappers(subclass.forward) != _wrappers(stock):
        return "something is wrapped around its forward"
    return made


def _wrappers(function: Any) -> list[Any]:
    codes = []
    while hasattr(function, "__wrapped__"):
        codes.append(getattr(function, "__code__", function))
        function = function.__wrapped__
    return codes
