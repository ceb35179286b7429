"""The norm of a model as it is, the fused norm in its place, and the tables of an ablation."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from steerkern.ops import cpu, reference
from steerkern.ops.schemas import Flag, Norm, Tables

EPS = 1e-6


class RMSNorm(nn.Module):
    """The norm of Llama in transformers, operation by operation."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, h: Tensor) -> Tensor:
        dtype = h.dtype
        h = h.to(torch.float32)
        variance = h.pow(2).mean(-1, keepdim=True)
        h = h * torch.rsqrt(variance + EPS)
        return self.weight * h.to(dtype)


class Fused:
    """What a session puts in the norm's place, on one thread and under ``no_grad``."""

    def __init__(self, weight: Tensor, tables: Tables | None, slot: Tensor | None) -> None:
        self.kernel = cpu.bind(tables, weight.numel(), weight.dtype, Norm.LLAMA, EPS)
        self.slot = slot
        rows = None if slot is None else SimpleNamespace(pointer=slot.data_ptr(), count=len(slot))
        self._call = cpu.bind_norm(self.kernel, weight.numel(), weight.dtype, {"weight": weight}, rows, sys.maxsize)

    def __call__(self, h: Tensor) -> Tensor:
        """Edit ``h [N, H]`` in place and return it normalised."""
        y: Tensor | None = self._call(h)
        assert y is not None
        return y

    def add(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """The edited sum of two states ``[N, H]``, and that normalised."""
        both: tuple[Tensor, Tensor] | None = self._call(left, right)
        assert both is not None
        return both


def ablation(k: int, width: int, plans: int = 1) -> Tables:
    """``plans`` slots that each ablate ``k`` orthonormal directions of their own."""
    torch.manual_seed(0)
    bank = torch.cat([torch.linalg.qr(torch.randn(width, k))[0].T for _ in range(plans)]).contiguous()
    links = torch.full((4, plans * k), -1, dtype=torch.int32)
    links[0] = torch.arange(plans * k)
    links[3] = int(Flag.READ | Flag.WRITE)
    fields = torch.tensor([0.0, 1.0, -torch.inf, torch.inf, 1.0, -torch.inf, torch.inf])
    span = torch.tensor([[p * k, k, 0] for p in range(plans)], dtype=torch.int32)
    return Tables(bank, links, fields[:, None].repeat(1, plans * k), span, torch.ones(plans))


def gate(h: Tensor, fused: Callable[[Tensor], Tensor], tables: Tables, slot: Tensor | None, weight: Tensor) -> None:
    """The fused op must agree with the reference before it is timed."""
    edited = h.clone()
    close((edited, fused(edited)), h, tables, slot, weight)


def close(found: tuple[Tensor, Tensor], h: Tensor, tables: Tables, slot: Tensor | None, weight: Tensor) -> None:
    """What was made of rows ``h [N, H]``, edited and normalised, must agree with the reference."""
    wanted, own = reference.steer(h, slot, tables, weight, None, EPS, Norm.LLAMA)
    assert own is not None
    step, terms = torch.finfo(h.dtype).eps, float(tables.span[:, 1].max())
    near = step * terms**0.5  # each term of a lift is of order 1 and may be rounded the other way
    torch.testing.assert_close(found[0], wanted, rtol=2 * step, atol=near)
    torch.testing.assert_close(found[1], own, rtol=4 * step, atol=2 * near)
