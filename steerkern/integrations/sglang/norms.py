"""The norms of an SGLang model that read the residual stream, and what stands in for them.

SGLang keeps the stream as a pair ``(x, residual)`` and calls ``norm(x, residual)``, which adds, keeps the sum as the
new residual and returns it normalised; the first block calls ``norm(x)``, and ``x`` itself becomes the residual. Both
are one call of ``steer_norm_``, the first with ``delta=x``. Where a block's norm is fed with something else, as
gemma3n's is, the first forward raises: a name is taken as a hint only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import PlanError
from ...ops import dispatch as _ops  # noqa: F401 registers the ops
from ...ops import reference
from ...ops.schemas import Tables
from ...packing import Site
from ...runtime.norms import NormSpec, recognise
from ...runtime.rows import RowMap

FIRST, FINAL = "input_layernorm", "norm"
"""Attributes of a block and of the decoder that name the norms in question."""

Normed = Tensor | tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Anatomy:
    """The sites of a model, and those norms of theirs that this process holds."""

    sites: tuple[Site, ...]
    blocks: tuple[nn.Module, ...]
    norms: dict[Site, nn.Module]
    width: int
    device: torch.device


def examine(model: nn.Module) -> Anatomy:
    """The sites of ``model``: ``resid_pre`` of every block and ``resid_post`` of the last one.

    Raises:
        PlanError: no decoder of the known shape, several of them, or norms without a weight.
    """
    decoder, layers = _find_decoder(model)
    own = [i for i, block in enumerate(layers) if hasattr(block, FIRST)]  # the others belong to other pipeline ranks
    norms = {Site(i, "resid_pre"): getattr(layers[i], FIRST) for i in own}
    last = Site(len(layers) - 1, "resid_post")
    if not isinstance(getattr(decoder, FINAL), nn.Identity):
        norms[last] = getattr(decoder, FINAL)
    weight = norms[Site(own[0], "resid_pre")]._parameters.get("weight")
    if weight is None:
        raise PlanError(f"{type(model).__name__} has norms without a weight, which steerkern does not know")
    sites = (*(Site(i, "resid_pre") for i in range(len(layers))), last)
    return Anatomy(sites, tuple(layers[i] for i in own), norms, weight.numel(), weight.device)


def _find_decoder(model: nn.Module) -> tuple[nn.Module, nn.ModuleList]:
    found = [
        (owner, layers)
        for owner in model.modules()
        for layers in owner.children()
        if isinstance(layers, nn.ModuleList) and any(hasattr(b, FIRST) for b in layers) and hasattr(owner, FINAL)
    ]
    if len(found) != 1:
        raise PlanError(
            f"{type(model).__name__} has {len(found)} decoders whose blocks have an {FIRST} and that end in a {FINAL}; "
            "steerkern knows models with one"
        )
    return found[0]


def recognise_norm(site: Site, norm: nn.Module) -> NormSpec:
    """The convention and eps of a norm, measured on its own ``forward_native``, which says what its kernels mean.

    Raises:
        PlanError: it follows none of the known conventions, or does not add as a plain residual does.
    """
    weight = norm._parameters.get("weight")
    if "forward" in vars(norm):
        raise PlanError(f"{site}: the forward of its norm was replaced already")
    if weight is None or not callable(getattr(norm, "forward_native", None)):
        raise PlanError(f"{site}: its norm is a {type(norm).__name__}, which has no weight or no forward_native")
    kind: Any = type(norm)
    twin: Any = object.__new__(type(f"Native{kind.__name__}", (kind,), {"forward": kind.forward_native}))
    twin.__dict__.update(vars(norm), _buffers={})  # GemmaRMSNorm keeps 1 + weight for kernels that are not used
    spec = recognise(twin, weight.numel(), weight.dtype)
    if spec is None or not _adds_plainly(twin, spec):
        raise PlanError(f"{site}: its norm is a {type(norm).__name__} of a kind that steerkern does not know")
    return NormSpec(norm, spec.norm, spec.eps, spec.width, spec.dtype)


def _adds_plainly(norm: Any, spec: NormSpec) -> bool:
    """Whether ``norm(x, residual)`` returns the normalised sum, and the sum in the dtype of the state."""
    generator = torch.Generator().manual_seed(1)
    x, residual = (torch.randn(4, spec.width, generator=generator).to(norm.weight) for _ in range(2))
    with torch.no_grad():
        try:
            normed, added = norm.forward(x.clone(), residual.clone())
        except (RuntimeError, TypeError, ValueError):
            return False
        total = (x.float() + residual.float()).to(spec.dtype)
        ours = reference.normalise(total, norm.weight, None, spec.eps, spec.norm)
    # SGLang normalises the sum before it is rounded
    near = torch.allclose(normed.float(), ours.float(), rtol=8 * torch.finfo(spec.dtype).eps, atol=1e-5)
    return added.dtype == spec.dtype and torch.equal(added, total) and near


class FusedNorm:
    """Stands in for the ``forward`` of one norm: adds, edits the sum in place by the row map, normalises it.

    Rows that nobody steers are added and normalised as they are. In half precision the sum is rounded before it is
    normalised, where SGLang's kernels normalise first: steered or not, rows may differ from theirs by a rounding.
    """

    def __init__(self, site: Site, spec: NormSpec, tables: Tables, rows: RowMap) -> None:
        self.site, self.spec, self.tables, self.rows = site, spec, tables, rows
        self.called = False
        self.streams: list[Tensor] | None = None
        """What entered the current block, or left the last one, until the norm was seen to read one of these."""

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        post_residual_addition: Tensor | None = None,
        quant_linear: nn.Module | None = None,
        backend: object = None,
    ) -> Normed:
        """``norm(x)`` or ``(norm(x + residual + post_residual_addition), the sum)``, the sum edited.

        ``quant_linear`` names a projection that would also take a quantised result; it gets a plain one. ``backend``
        chooses among SGLang's kernels, which this is none of.

        Raises:
            PlanError: the norm does not read the residual stream, or gets some of the rows only.
        """
        self.called = True
        if not torch.compiler.is_compiling():
            self._check_call(x, residual)
        if not x.numel():
            return x if residual is None else (x, residual)
        if residual is None:
            return self._run(x, None).view(x.shape)
        if post_residual_addition is not None:
            residual = residual + post_residual_addition
        return self._run(residual, x).view(x.shape), residual

    def _run(self, state: Tensor, delta: Tensor | None) -> Tensor:
        flat = state.view(-1, self.spec.width)
        count = flat.shape[0]
        add = None if delta is None else delta.reshape(-1, self.spec.width)
        spec = self.spec
        normed: Tensor = torch.ops.steerkern.steer_norm_(
            flat, self.rows.slot[:count], *self.tables, spec.weight, None, spec.eps, int(spec.norm), add
        )
        return normed

    def _check_call(self, x: Tensor, residual: Tensor | None) -> None:
        if self.streams is not None:
            storages = {tensor.untyped_storage().data_ptr() for tensor in self.streams}
            if residual is None and x.untyped_storage().data_ptr() not in storages:
                raise PlanError(f"{self.site}: its norm reads another tensor than the residual stream")
            self.streams = None
        count = x.numel() // self.spec.width
        if count < self.rows.count:
            raise PlanError(f"{self.site}: its norm gets {count} of the {self.rows.count} rows of this forward")


def tensors(given: object) -> Iterator[Tensor]:
    """The tensors among the arguments or outputs of a block."""
    if isinstance(given, Tensor):
        yield given
    elif isinstance(given, (tuple, list)):
        for one in given:
            yield from tensors(one)
    elif isinstance(given, dict):
        yield from tensors(tuple(given.values()))
