"""Find where the residual stream can be edited, by watching one forward, never by module names.

A *fused* site is a norm that reads the residual tensor itself: it received a tensor of the same storage as the block's
input (or as the sum of input and attention output), nothing copied or combined that tensor before, and its own
arithmetic is one of the conventions of :class:`~steerkern.ops.schemas.Norm`. Every other block gets an *unfused* site:
the same edit, on its own, at the block's door.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..artifacts import Fingerprint
from ..errors import PlanError
from ..ops import reference
from ..ops.schemas import Norm
from ..program import Site

PROBE_TOKENS = 3


@dataclass(frozen=True, eq=False)
class NormSpec:
    """A norm module that a fused kernel can stand in for: its convention and the numbers it needs."""

    module: nn.Module
    norm: Norm
    eps: float

    @property
    def weight(self) -> Tensor | None:
        """The scale ``[H]``, read anew because weights may be replaced."""
        return self.module._parameters.get("weight")

    @property
    def bias(self) -> Tensor | None:
        """The shift ``[H]`` of a LayerNorm."""
        return self.module._parameters.get("bias")


@dataclass(frozen=True, eq=False)
class FoundSite:
    """Where one residual site lives: ``fused`` in a norm, else at the door of ``block``.

    ``streams`` says how a block's state with an extra dimension lies in memory: ``outer`` ``[X, B, S, H]``,
    ``inner`` ``[B, S, X, H]`` or ``none``.
    """

    site: Site
    block: nn.Module
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


def text_config(model: nn.Module) -> Any:
    """The configuration of the language model inside ``model``."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise TypeError(f"steerkern steers transformers models, got {type(model).__name__} without a config")
    return config.get_text_config(decoder=True)


def find_decoder(model: nn.Module) -> tuple[nn.Module, nn.ModuleList]:
    """The module that owns the decoder blocks, and the blocks.

    Raises:
        TypeError, PlanError: not a transformers model, an encoder-decoder, or no list of that many blocks.
    """
    config = text_config(model)
    if getattr(model.config, "is_encoder_decoder", False):
        raise PlanError(f"{type(model).__name__} is an encoder-decoder; steerkern steers decoder-only models")
    count = int(config.num_hidden_layers)
    roots = [model]
    with contextlib.suppress(AttributeError, NotImplementedError):
        if isinstance(decoder := model.get_decoder(), nn.Module):  # type: ignore[operator]
            roots.insert(0, decoder)
    for root in roots:
        for module in root.modules():
            for child in module.children():
                if isinstance(child, nn.ModuleList) and len(child) == count and _is_stack(child):
                    return module, child
    raise PlanError(f"{type(model).__name__} has no list of {count} decoder blocks")


def _is_stack(blocks: nn.ModuleList) -> bool:
    # a list of per-layer embeddings or projections also has one item per layer; a block has parts
    return all(any(True for _ in block.children()) for block in blocks)


def examine(model: nn.Module) -> Anatomy:
    """Run one forward of three tokens without its matrix products, and report the sites of ``model``.

    Nothing of the model is changed, and the random state stays where it was.

    Raises:
        PlanError: no decoder blocks, blocks on several devices, or blocks that were not called in order.
    """
    decoder, blocks = find_decoder(model)
    parameter = next(decoder.parameters())
    devices = {p.device for p in decoder.parameters()}
    if len(devices) > 1:
        raise PlanError(f"the decoder lies on several devices ({', '.join(map(str, sorted(devices, key=str)))}), not supported")
    width = int(text_config(model).hidden_size)
    watch = _Watch(blocks, width)
    with watch.hooks(decoder), torch.random.fork_rng(devices=[]), torch.no_grad(), watch:
        decoder(input_ids=torch.zeros(1, PROBE_TOKENS, dtype=torch.long, device=parameter.device), use_cache=False)
    if [b for b, _ in watch.called] != list(range(len(blocks))):
        raise PlanError(f"the blocks of {type(decoder).__name__} were not called once each, in order")
    specs = _recognise_all(watch.norm_like)
    sites = [_pre(watch, specs, i, block) for i, block in enumerate(blocks)]
    sites += [site for i, block in enumerate(blocks) if (site := _mid(watch, specs, i, block)) is not None]
    sites.append(_final(watch, specs, len(blocks) - 1, blocks[-1]))
    return Anatomy(
        model,
        decoder,
        tuple(blocks),
        tuple(sites),
        tuple(specs.values()),
        Fingerprint(str(model.config.model_type), width, len(blocks)),
        parameter.device,
        watch.dtype or parameter.dtype,
    )


def _recognise_all(widths: dict[nn.Module, int]) -> dict[nn.Module, NormSpec]:
    """Recognise one norm of each class and size; its siblings run the same code."""
    kinds: dict[tuple[Any, ...], NormSpec | None] = {}
    specs = {}
    for module, width in widths.items():
        weight = module._parameters.get("weight")
        if "forward" in module.__dict__:
            continue  # someone else's patch
        key = (type(module), _eps(module), width, weight is None, None if weight is None else weight.dtype)
        if key not in kinds:
            kinds[key] = recognise(module, width)
        if (spec := kinds[key]) is not None:
            specs[module] = NormSpec(module, spec.norm, spec.eps)
    return specs


def _eps(module: nn.Module) -> float | None:
    return next((e for name in _EPS if isinstance(e := getattr(module, name, None), float)), None)


def recognise(module: nn.Module, width: int) -> NormSpec | None:
    """Compare a module's arithmetic with the norm conventions on random rows ``[8, width]``; None if none fits.

    Rows of ordinary and of tiny size are compared, so that a wrong eps shows.
    """
    eps = _eps(module)
    weight, bias = (module._parameters.get(name) for name in ("weight", "bias"))
    parameters = {name for name, p in module.named_parameters() if p is not None}
    if eps is None or not parameters <= {"weight", "bias"} or (weight is not None and weight.shape != (width,)):
        return None
    like = weight if weight is not None else torch.empty(0)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(8, width, generator=generator) * torch.tensor([[1.0], [3.0], [1e-1], [1e-3]] * 2) + 0.1
    rows = rows.to(like.device, like.dtype)
    with torch.no_grad():
        own = module.forward(rows.clone())
        if not isinstance(own, Tensor) or own.shape != rows.shape or own.dtype != rows.dtype:
            return None
        fits = {norm: _distance(own, reference.normalise(rows, weight, bias, eps, norm)) for norm in _CONVENTIONS}
    best = min(fits, key=lambda norm: fits[norm])
    return NormSpec(module, best, eps) if fits[best] <= 1.0 else None


_EPS = ("variance_epsilon", "eps", "epsilon", "layer_norm_eps", "norm_eps")
_CONVENTIONS = (Norm.LLAMA, Norm.FP32, Norm.GEMMA, Norm.LAYER)


def _distance(own: Tensor, ours: Tensor) -> float:
    """Mean error in units of what one rounding may leave; over 1 the conventions differ."""
    eps = torch.finfo(own.dtype).eps
    wide, other = own.double(), ours.double()
    error = (wide - other).abs() / (eps * wide.abs() + eps * wide.abs().mean())
    # fp32 sums in another order: a few ulps; half types: an occasional tie
    return float(error.mean()) / (4.0 if own.dtype == torch.float32 else 0.05)


@dataclass
class _Read:
    """One norm-like module that was called inside a block."""

    module: nn.Module
    storage: int
    input_is_sum: bool
    """Its input was made by adding something to the block's input."""
    clean: bool
    """Nothing copied or combined that tensor before."""


@dataclass
class _Watch(TorchFunctionMode):
    """Follow the residual tensor through one forward; skip matrix products, whose values do not matter."""

    blocks: nn.ModuleList
    width: int
    called: list[tuple[int, int]] = field(default_factory=list)  # block, storage of its input
    reads: dict[int, list[_Read]] = field(default_factory=dict)
    shapes: dict[int, tuple[int, ...]] = field(default_factory=dict)
    final_reads: list[_Read] = field(default_factory=list)
    last_output: int = 0
    dtype: torch.dtype | None = None
    norm_like: dict[nn.Module, int] = field(default_factory=dict)
    _block: int | None = None
    _inside: int = 0  # depth of norm-like modules
    _live: int = 0  # storage of the block's input
    _sums: dict[int, Tensor] = field(default_factory=dict)  # tensors made by adding to the block's input
    _touched: set[int] = field(default_factory=set)
    _keep: list[Tensor] = field(default_factory=list)  # storages must not be reused while we compare them

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            x, weight = args[0], args[1]
            out = x.new_zeros(*x.shape[:-1], weight.shape[0])
        elif func is torch.addmm:
            out = args[1].new_zeros(args[1].shape[0], args[2].shape[1])
        else:
            out = func(*args, **kwargs)
        if self._inside == 0 and isinstance(out, Tensor):
            self._follow(args, out)
        return out

    def _follow(self, args: Any, out: Tensor) -> None:
        into = {_storage(a) for a in args if isinstance(a, Tensor)}
        made = _storage(out)
        if not into or made in into:
            return  # a view, or in place
        self._touched |= into
        if self._block is not None and self._live in into and len(into) > 1 and out.shape[-1:] == (self.width,):
            self._sums[made] = out
            self._touched.discard(made)

    @contextlib.contextmanager
    def hooks(self, decoder: nn.Module) -> Iterator[None]:
        """Listen to the blocks and to every norm-like module of the decoder."""
        handles = []
        index = {block: i for i, block in enumerate(self.blocks)}
        try:
            for module in decoder.modules():
                if module in index:
                    handles.append(module.register_forward_pre_hook(self._enter(index[module]), with_kwargs=True))
                    handles.append(module.register_forward_hook(self._leave(index[module])))
                elif _norm_like(module):
                    handles.append(module.register_forward_pre_hook(self._before_norm, with_kwargs=True))
                    handles.append(module.register_forward_hook(self._after_norm, always_call=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, i: int) -> Callable[..., None]:
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            with torch._C.DisableTorchFunction():
                state = block_input(args, kwargs)
                self._block, self._live = i, _storage(state)
                self._sums, self._touched = {}, set()
                self._keep.append(state)
                self.called.append((i, self._live))
                self.shapes[i], self.dtype = tuple(state.shape), state.dtype

        return enter

    def _leave(self, i: int) -> Callable[..., None]:
        def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            with torch._C.DisableTorchFunction():
                state = block_output(output)
                self._keep.append(state)
                self._keep.extend(self._sums.values())
                self._block, self._live, self.last_output = None, 0, _storage(state)
                self._touched = set()

        return leave

    def _before_norm(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with torch._C.DisableTorchFunction():
            if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
                state = args[0]
                self.norm_like[module] = state.shape[-1]
                storage = _storage(state)
                read = _Read(module, storage, storage in self._sums, storage not in self._touched)
                if self._block is not None:
                    self.reads.setdefault(self._block, []).append(read)
                elif storage == self.last_output:
                    self.final_reads.append(read)
                self._touched.add(storage)  # whoever reads it next comes too late to edit it
            self._inside += 1

    def _after_norm(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._inside -= 1


def _norm_like(module: nn.Module) -> bool:
    return any(isinstance(getattr(module, name, None), float) for name in _EPS) and not any(True for _ in module.children())


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def block_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The residual state that a block was called with: its first argument, or the one named ``hidden_states``."""
    state = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(state, Tensor):
        raise PlanError(f"a block was called without its state as first argument, got {type(state).__name__}")
    return state


def block_output(output: Any) -> Tensor:
    """The residual state that a block returned: a tensor (transformers 5), or the first item of a tuple."""
    state = output[0] if isinstance(output, (tuple, list)) else output
    if not isinstance(state, Tensor):
        raise PlanError(f"a block returned no state, got {type(state).__name__}")
    return state


def _streams(shape: tuple[int, ...], width: int) -> str | None:
    """How the rows of a block's state lie, or None where one row is not one token's state of width H."""
    if shape == (1, PROBE_TOKENS, width):
        return "none"
    if len(shape) == 4 and shape[1:] == (1, PROBE_TOKENS, width):
        return "outer"
    if len(shape) == 4 and (*shape[:2], shape[3]) == (1, PROBE_TOKENS, width):
        return "inner"
    return None


def _pre(watch: _Watch, specs: dict[nn.Module, NormSpec], i: int, block: nn.Module) -> FoundSite:
    site, live = Site(i, "resid_pre"), dict(watch.called)[i]
    return _residual(watch, specs, site, block, [r for r in watch.reads.get(i, []) if r.storage == live])


def _final(watch: _Watch, specs: dict[nn.Module, NormSpec], i: int, block: nn.Module) -> FoundSite:
    return _residual(watch, specs, Site(i, "resid_post"), block, watch.final_reads)


def _residual(
    watch: _Watch, specs: dict[nn.Module, NormSpec], site: Site, block: nn.Module, reads: list[_Read]
) -> FoundSite:
    streams = _streams(watch.shapes[site.layer], watch.width)
    if streams is None:
        raise PlanError(f"{site}: the block's state has shape {watch.shapes[site.layer]}, not one row of width {watch.width} per token")
    if not reads:
        return FoundSite(site, block, None, "no norm reads the residual tensor itself", streams)
    first = reads[0]
    if not first.clean:
        return FoundSite(site, block, None, "the block uses its input before the norm", streams)
    spec = specs.get(first.module)
    if spec is None:
        return FoundSite(site, block, None, f"{type(first.module).__name__} is none of the known norms", streams)
    return FoundSite(site, block, spec, "", streams)


def _mid(watch: _Watch, specs: dict[nn.Module, NormSpec], i: int, block: nn.Module) -> FoundSite | None:
    live = dict(watch.called)[i]
    for read in watch.reads.get(i, []):
        if read.input_is_sum and read.clean and read.storage != live and read.module in specs:
            return FoundSite(Site(i, "resid_mid"), block, specs[read.module])
    return None
