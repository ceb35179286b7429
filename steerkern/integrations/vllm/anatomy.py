"""Find the norms of a vLLM model that read the residual stream, by watching a forward of three tokens.

vLLM's decoders keep ``(x, residual)``: the residual stream is their sum, which the next norm makes
(``norm(x, residual) -> (normed, sum)``). Others hand on the sum itself, as transformers does. A norm is a site where it
is the first to read exactly what its block was given; which one that is shows in the storages, never in names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import PlanError
from ...packing import Site
from ...runtime.norms import NormSpec, norm_like, recognise

TOKENS = 3


@dataclass(frozen=True)
class Anatomy:
    """What a worker's part of the model showed."""

    width: int
    layers: int
    """Blocks of the whole model; those of other pipeline ranks have no sites here."""
    local: range
    sites: Mapping[Site, NormSpec]
    refused: Mapping[Site, str]
    """Sites of this rank's blocks that cannot be steered, and why."""

    @property
    def all_sites(self) -> tuple[Site, ...]:
        """Every site that a model of this many blocks can have, on whichever rank."""
        inner = [Site(i, name) for i in range(self.layers) for name in ("resid_pre", "resid_mid")]
        return (*inner, Site(self.layers - 1, "resid_post"))


@dataclass
class NormCall:
    """A norm was called: with these storages, inside this block (None between and after the blocks)."""

    module: nn.Module
    block: int | None
    read: tuple[int, ...]
    returned: tuple[int, ...]
    dtype: torch.dtype


@dataclass
class Passage:
    """What a block was given and what it returned, by storage."""

    block: int
    entered: tuple[int, ...]
    left: tuple[int, ...] = ()


@dataclass
class Watched:
    """Takes down a forward."""

    width: int
    passages: list[Passage] = field(default_factory=list)
    norms: list[NormCall] = field(default_factory=list)
    inside: int | None = None
    kept: list[Any] = field(default_factory=list)
    """Tensors seen, so that no storage is used again while the forward lasts."""

    def storages(self, several: Iterable[Any]) -> tuple[int, ...]:
        """Addresses of the tensors of one row per token among some arguments, nested ones included."""
        found: list[int] = []
        for one in several:
            if isinstance(one, (tuple, list)):
                found += self.storages(one)
            elif isinstance(one, Tensor) and one.shape[-1:] == (self.width,) and one.numel() == TOKENS * self.width:
                self.kept.append(one)
                found.append(one.untyped_storage().data_ptr())
        return tuple(found)

    def enter(self, block: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A block begins."""
        self.inside = block
        self.passages.append(Passage(block, self.storages([*args, *kwargs.values()])))

    def leave(self, output: Any) -> None:
        """It ends."""
        self.passages[-1].left = self.storages([output])
        self.inside = None

    def norm(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """A norm was called."""
        read, returned = self.storages([*args, *kwargs.values()]), self.storages([output])
        if read and returned:  # a projection whose weights were packed away looks like a norm without any
            dtype = next(a.dtype for a in [*args, *kwargs.values()] if isinstance(a, Tensor))
            self.norms.append(NormCall(module, self.inside, read, returned, dtype))


def examine(model: nn.Module, vllm_config: Any) -> Anatomy:
    """Run three tokens through this rank's part of a loaded model and report its sites.

    Raises:
        PlanError: a model without decoder blocks, or one that does not run on plain tokens.
    """
    from .library import model_shape

    width, layers = model_shape(vllm_config)
    blocks = find_blocks(model, layers)
    local = [i for i, block in enumerate(blocks) if any(True for _ in block.parameters())]
    if not local:
        raise PlanError(f"this rank has none of the {layers} blocks of {type(model).__name__}")
    watched = _watch(model, {i: blocks[i] for i in local}, width, vllm_config)
    if [passage.block for passage in watched.passages] != local:
        raise PlanError(f"the blocks of {type(model).__name__} were not called once each, in order")
    found = _Found(watched, layers)
    for passage in watched.passages:
        found.block(passage)
    if local[-1] == layers - 1:
        found.last()
    return Anatomy(width, layers, range(local[0], local[-1] + 1), found.sites, found.refused)


def find_blocks(model: nn.Module, layers: int) -> nn.ModuleList:
    """The list of decoder blocks: the largest of its length, which is the model's number of layers.

    Raises:
        PlanError: no such list.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == layers]
    if not lists:
        raise PlanError(f"{type(model).__name__} has no list of {layers} decoder blocks")
    return max(lists, key=lambda one: sum(p.numel() for p in one.parameters()))


def _watch(model: Any, blocks: dict[int, nn.Module], width: int, vllm_config: Any) -> Watched:
    watched, handles = Watched(width), []
    for i, block in blocks.items():
        handles.append(
            block.register_forward_pre_hook(
                lambda _, args, kwargs, i=i: watched.enter(i, args, kwargs), with_kwargs=True
            )
        )
        handles.append(block.register_forward_hook(lambda _, __, output: watched.leave(output)))
    for module in model.modules():
        if norm_like(module) and next(module.parameters(recurse=False), torch.empty(0)).shape[-1:] in ((width,), (0,)):
            handles.append(module.register_forward_hook(watched.norm, with_kwargs=True))
    try:
        _forward(model, vllm_config)
    except Exception as error:
        raise PlanError(f"{type(model).__name__} does not run on {TOKENS} plain tokens: {error}") from error
    finally:
        for handle in handles:
            handle.remove()
    return watched


def _forward(model: Any, vllm_config: Any) -> None:
    from vllm.distributed import get_pp_group
    from vllm.forward_context import set_forward_context

    device, dtype = next(p for p in model.parameters()).device, vllm_config.model_config.dtype
    positions = torch.arange(TOKENS, device=device)
    if vllm_config.model_config.uses_mrope:
        positions = positions.expand(3, -1)
    between = None
    if not get_pp_group().is_first_rank:
        between = model.make_empty_intermediate_tensors(batch_size=TOKENS, dtype=dtype, device=device)
    with torch.no_grad(), set_forward_context(None, vllm_config, num_tokens=TOKENS, skip_compiled=True):
        ids = torch.zeros(TOKENS, dtype=torch.long, device=device)
        model(input_ids=ids, positions=positions, intermediate_tensors=between)


@dataclass
class _Found:
    """Turns what was watched into sites."""

    watched: Watched
    layers: int
    sites: dict[Site, NormSpec] = field(default_factory=dict)
    refused: dict[Site, str] = field(default_factory=dict)

    def block(self, passage: Passage) -> None:
        calls = [call for call in self.watched.norms if call.block == passage.block]
        pre, mid = Site(passage.block, "resid_pre"), Site(passage.block, "resid_mid")
        first = self._reader(calls, passage.entered)
        if first is None:
            self.refused[pre] = "no norm reads what the block is given"
            self.refused[mid] = self.refused[pre]
            return
        self._take(pre, first)
        # a norm that adds to the stream which the first one returned
        later = calls[calls.index(first) + 1 :]
        stream = set(first.returned[1:]) if len(first.read) > 1 else set(first.read)
        found = next((call for call in later if len(call.read) > 1 and call.read[1] in stream), None)
        if found is None:
            self.refused[mid] = "no norm makes the sum of the stream and what attention adds"
        else:
            self._take(mid, found)

    def last(self) -> None:
        site, passage = Site(self.layers - 1, "resid_post"), self.watched.passages[-1]
        calls = [call for call in self.watched.norms if call.block is None]
        reader = self._reader(calls, passage.left)
        if reader is None:
            self.refused[site] = "no norm reads what the last block returns"
        else:
            self._take(site, reader)

    def _reader(self, calls: list[NormCall], given: tuple[int, ...]) -> NormCall | None:
        return next((call for call in calls if given and set(call.read) == set(given)), None)

    def _take(self, site: Site, call: NormCall) -> None:
        times = sum(other.module is call.module for other in self.watched.norms)
        spec = recognise(call.module, self.watched.width, call.dtype, _native) if times == 1 else None
        if spec is not None:
            self.sites[site] = spec
        elif times > 1:
            self.refused[site] = f"one {type(call.module).__name__} is called at several places"
        else:
            self.refused[site] = f"{type(call.module).__name__} is none of the known norms"


def _native(module: Any, rows: Tensor) -> Any:
    """A vLLM norm's meaning, whatever kernel it would choose: ``forward_native`` where it has one."""
    native = getattr(type(module), "forward_native", None)
    return module.forward(rows) if native is None else native(module, rows)
