"""Find where the residual stream can be edited, by watching one forward, never by module names.

A *fused* site is a norm that reads the residual tensor itself: it received a tensor of the same storage as the block's
input (or as the sum of input and attention output), nothing copied or combined that tensor before, and its own
arithmetic is one of the conventions of :class:`~steerkern.ops.schemas.Norm`. Every other block gets an *unfused* site:
the same edit, on its own, at the block's door.
"""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..artifacts import Fingerprint
from ..errors import PlanError
from ..program import Site
from .decoder import block_input, block_output, find_decoder, text_config
from .norms import NormSpec, recognise_all
from .watch import PROBE, Passage, Read, Watch

__all__ = ["Anatomy", "FoundSite", "block_input", "block_output", "examine", "find_decoder", "text_config"]


@dataclass(frozen=True, eq=False)
class FoundSite:
    """Where one residual site lives: ``fused`` in a norm, else at the door of a module.

    ``door`` is the block; for ``resid_mid`` the norm that reads it. The state is its first argument, or what it returns
    for ``resid_post``. ``streams`` says how a state with an extra dimension lies in memory: ``outer`` ``[X, B, S, H]``,
    ``inner`` ``[B, S, X, H]`` or ``none``.
    """

    site: Site
    door: nn.Module
    fused: NormSpec | None
    reason: str = ""
    """Why the site is not fused."""
    streams: str = "none"


@dataclass(frozen=True, eq=False)
class Anatomy:
    """What a probe forward showed of a model."""

    model: nn.Module
    decoder: nn.Module
    """The module that owns the blocks and calls them one after the other."""
    blocks: tuple[nn.Module, ...]
    sites: tuple[FoundSite, ...]
    norms: tuple[NormSpec, ...]
    """Every norm of the decoder that a fused kernel can stand in for, sites or not."""
    fingerprint: Fingerprint
    device: torch.device
    dtype: torch.dtype


def examine(model: nn.Module, *, shortcut: bool = True) -> Anatomy:
    """Run one forward of three tokens, mostly without its matrix products, and report the sites of ``model``.

    The model, its hooks and the random state stay as they were; no hook of the user runs.

    Args:
        model: a transformers model with a decoder.
        shortcut: run parts such as attention once per class of block, see :mod:`~steerkern.runtime.watch`.

    Raises:
        TypeError: not a transformers model.
        PlanError: no decoder blocks, blocks on several devices, or blocks that were not called in order.
    """
    decoder, blocks = find_decoder(model)
    modules = list(decoder.modules())
    device = _device(modules, type(decoder).__name__)
    config: Any = model.config
    width = int(text_config(model).hidden_size)
    watch = _watch(decoder, blocks, width, modules, shortcut)
    _check_order(type(decoder).__name__, list(blocks), watch.passages)
    specs = recognise_all(watch.norms)
    report = _Report(watch, specs)
    every = range(len(blocks))
    found = [*map(report.pre, every), *map(report.mid, every), report.last()]
    return Anatomy(
        model,
        decoder,
        tuple(blocks),
        tuple(site for site in found if site is not None),
        tuple(specs.values()),
        Fingerprint(str(config.model_type), width, len(blocks)),
        device,
        watch.passages[-1].entered.dtype,
    )


def _watch(decoder: nn.Module, blocks: nn.ModuleList, width: int, modules: list[nn.Module], shortcut: bool) -> Watch:
    if shortcut:
        with contextlib.suppress(Exception):  # whatever it is, the model as it is decides
            watch = Watch(decoder, blocks, width)
            watch.run(modules)
            return watch
    watch = Watch(decoder, blocks, width, shortcut=False)
    try:
        watch.run(modules)
    except PlanError:
        raise
    except Exception as error:
        raise PlanError(f"{type(decoder).__name__} does not run on {PROBE[1]} plain tokens: {error}") from error
    return watch


def _check_order(name: str, blocks: list[nn.Module], passages: list[Passage]) -> None:
    for i, block in enumerate(blocks):
        if (first := blocks.index(block)) != i:
            raise PlanError(f"blocks {first} and {i} of {name} are one module")
    if [passage.block for passage in passages] != blocks:
        raise PlanError(f"the blocks of {name} were not called once each, in order")
    for i, (one, following) in enumerate(itertools.pairwise(passages)):
        # resid_post[i] and resid_pre[i + 1] must be one tensor
        if one.left.untyped_storage().data_ptr() != following.entered.untyped_storage().data_ptr():
            raise PlanError(f"{name} does not hand on to block {i + 1} what block {i} returns")


def _device(modules: list[nn.Module], name: str) -> torch.device:
    devices = {p.device for module in modules for p in module._parameters.values() if p is not None}
    if len(devices) != 1:
        several = ", ".join(sorted(map(str, devices))) or "none"
        raise PlanError(f"the weights of {name} must lie on one device, found {several}")
    device = devices.pop()
    if device.type == "meta":
        raise PlanError(f"the weights of {name} are not loaded (they lie on the meta device)")
    return device


@dataclass(frozen=True)
class _Report:
    """Turns what was watched into sites."""

    watch: Watch
    specs: dict[nn.Module, NormSpec]

    def pre(self, i: int) -> FoundSite | None:
        passage = self.watch.passages[i]
        if passage.revisited:
            return None  # an edit in place would be seen there too, which an edit of this block's input is not
        return self._site(Site(i, "resid_pre"), passage.block, passage.entered, passage.reads)

    def mid(self, i: int) -> FoundSite | None:
        passage = self.watch.passages[i]
        for read in passage.sum_reads[:1]:
            if read.clean and read.storage in passage.carried and self.watch.norms[read.module].times == 1:
                reason = self._why_not(read)
                return FoundSite(Site(i, "resid_mid"), read.module, None if reason else self.specs[read.module], reason)
        return None

    def last(self) -> FoundSite:
        i, passage = len(self.watch.passages) - 1, self.watch.passages[-1]
        return self._site(Site(i, "resid_post"), passage.block, passage.left, self.watch.final_reads)

    def _site(self, site: Site, door: nn.Module, state: Tensor, reads: list[Read]) -> FoundSite:
        streams = _streams(tuple(state.shape), self.watch.width)
        if streams is None:
            width = self.watch.width
            raise PlanError(f"{site}: the state has shape {list(state.shape)}, not one row of width {width} per token")
        reason = self._why_not(reads[0]) if reads else "no norm reads the residual tensor itself"
        return FoundSite(site, door, None if reason else self.specs[reads[0].module], reason, streams)

    def _why_not(self, read: Read) -> str:
        module = read.module
        if not read.clean:
            return "the block uses its input before the norm"
        if module not in self.specs:
            return f"{type(module).__name__} is none of the known norms"
        if self.watch.norms[module].times > 1:
            return f"one {type(module).__name__} is called at several places"
        if module._forward_pre_hooks:
            return f"{type(module).__name__} has forward pre-hooks, which may replace its input"
        return ""


def _streams(shape: tuple[int, ...], width: int) -> str | None:
    """How the rows of a block's state lie, or None where one row is not one token's state of width H."""
    if shape == (*PROBE, width):
        return "none"
    if len(shape) == 4 and shape[1:] == (*PROBE, width):
        return "outer"
    if len(shape) == 4 and (*shape[:2], shape[3]) == (*PROBE, width):
        return "inner"
    return None
