"""Prompts shared out over the ranks of a process group: each reads whole batches, one sum brings them together.

The batches are those of a single process, so every forward gives the same bits as there, and only the order of float64
sums differs. Before ranks wait for each other they say whether all went well, so an error on one is an error on all.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import PlanError

T = TypeVar("T")
_ERRORS: dict[str, type[Exception]] = {e.__name__: e for e in (ValueError, TypeError, PlanError)}
_BYTES = 2048  # of a rank's message; longer error texts are cut


class Ranks(NamedTuple):
    """This process among those that read prompts together; ``size`` is 1 where it reads alone."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    """Where tensors lie that ranks exchange."""

    def share(self, lengths: Sequence[int], batch_size: int) -> list[int]:
        """Which of the prompts with so many tokens this rank reads, longest first.

        A single process reads batches of ``batch_size`` by falling length; rank ``r`` of ``R`` takes batches ``r``,
        ``r + R`` and so on, so where there are fewer batches than ranks, some read nothing.

        >>> Ranks(1, 2).share([3, 9, 5, 7, 1], 2)
        [2, 0]
        """
        order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
        batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        return [i for batch in batches[self.rank :: self.size] for i in batch]

    def agree(self, work: Callable[[], T], about: Callable[[T], object] = lambda _: None) -> T:
        """Do ``work`` on every rank; where it raises on one, all raise the error of the first that failed.

        ``about`` says in JSON values what the ranks must agree on.

        Raises:
            ValueError: what the ranks did differs in ``about``.
            RuntimeError: a rank failed with another error than ValueError, TypeError or PlanError.
        """
        if self.size == 1:
            return work()
        failed: Exception | None = None
        try:
            done = work()
            message = ["", hashlib.sha256(json.dumps(about(done), sort_keys=True).encode()).hexdigest()]
        except Exception as error:
            failed, message = error, [type(error).__name__, str(error)]
        heard = self._gather(message)
        for rank, (kind, text) in enumerate(heard):
            if kind and rank == self.rank and failed is not None:
                raise failed
            if kind in _ERRORS:
                raise _ERRORS[kind](text) from failed
            if kind:
                raise RuntimeError(f"rank {rank}: {kind}: {text}") from failed
        odd = next((rank for rank, said in enumerate(heard) if said != heard[0]), None)
        if odd is not None:
            raise ValueError(f"ranks 0 and {odd} were given different prompts or settings; all must be given the same")
        return done

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all ranks, by one all-reduce; ranks must have agreed before."""
        if self.size == 1:
            return values
        total = values.to(self.device)
        dist.all_reduce(total)
        return total.to(values.device)

    def _gather(self, message: list[str]) -> list[list[str]]:
        kind, text = message
        while len(line := json.dumps([kind, text]).encode()) > _BYTES:
            text = text[: len(text) * 3 // 4]
        mine = torch.tensor([*line, *b" " * (_BYTES - len(line))], dtype=torch.uint8, device=self.device)
        every = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(every, mine)
        return [json.loads(bytes(said.tolist())) for said in every]


def ranks(model: nn.Module, sharded: bool = True) -> Ranks:
    """The default process group where it is initialised and every rank holds a whole model; else this process alone.

    Weights that are spread over ranks (tensor parallel, FSDP) need every rank in every forward, so nothing is shared
    out then and all ranks read all prompts.
    """
    if not (sharded and dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1 or _spread(model):
        return Ranks()
    # NCCL alone moves nothing that lies on the CPU
    nccl_only = "nccl" in str(dist.get_backend()) and "gloo" not in str(dist.get_backend())
    device = next(model.parameters()).device if nccl_only else torch.device("cpu")
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


def _spread(model: Any) -> bool:
    from torch.distributed.tensor import DTensor

    mesh = getattr(model, "_device_mesh", None)  # set by transformers
    if mesh is not None and mesh.size() > 1:
        return True
    wrapped = any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules())
    return wrapped or any(isinstance(parameter, DTensor) for parameter in model.parameters())
