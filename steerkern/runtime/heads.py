"""The head site: the input of the projection that ends an attention branch (``o_proj``), one slice per query head.

The projection is found by watching one forward, never by name. Every block gets two equal rows but for their first
token; the first matrix of the block that is *given* something different at the last token is the one behind attention,
because everything before attention treats each token on its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..errors import PlanError
from .decoder import block_input, find_decoder, text_config
from .patch import attach, detach, suspended

Head = tuple[int, int]
"""Layer and query head, both from 0."""
Repair = Literal["token", "global"]


@dataclass(frozen=True, eq=False)
class HeadSite:
    """The head site of one layer: ``module`` takes ``[..., heads * size]``, head ``h`` at ``h * size``."""

    layer: int
    module: nn.Module
    heads: int
    size: int


def find(model: nn.Module) -> dict[int, HeadSite]:
    """The head sites of ``model`` by layer; layers without attention have none.

    Runs one forward of six tokens; no handler of steerkern runs, and modes and hooks stay as they were.

    Raises:
        TypeError, PlanError: no decoder, or no layer with such a projection.
    """
    decoder, blocks = find_decoder(model)
    config = text_config(model)
    configs = getattr(config, "per_layer_config", None) or [config] * len(blocks)
    found = {}
    for layer, module, width in _behind_attention(decoder, blocks):
        heads = getattr(configs[layer], "num_attention_heads", None)
        if isinstance(heads, int) and width in _widths(configs[layer], heads):
            found[layer] = HeadSite(layer, module, heads, width // heads)
    if not found:
        raise PlanError(
            f"{type(model).__name__} has no head site: in no block the first matrix behind attention takes as much as "
            "num_attention_heads heads side by side"
        )
    return found


@contextlib.contextmanager
def scaled(
    model: nn.Module,
    scales: Mapping[Head, float],
    *,
    repair: Repair | None = "token",
    sites: Mapping[int, HeadSite] | None = None,
) -> Iterator[None]:
    """Multiply ``head_z[l, h]`` by a scale in every forward, prefill and decode, for as long as the context lasts.

    ``Z' = Z_scaled |Z| / |Z_scaled|`` with the norm over heads and head dimension (``"token"``), so a row depends on
    nothing else; or over batch and positions too (``"global"``, as arXiv 2510.06036 published it); or ``None`` for no
    repair. A layer whose scales are all 1 is left alone to the bit; where everything is scaled to 0 it stays 0.

    Args:
        model: a transformers model.
        scales: by (layer, query head); 0 switches a head off, heads that are not named keep their value.
        repair: which norm is put back.
        sites: from :func:`find`, to save its forward.

    Raises:
        ValueError: an unknown repair, or a scale that is not a finite number.
        PlanError: no such layer or head, or a family whose head site is not found.

    >>> from steerkern import organism
    >>> model, _ = organism.load()
    >>> with scaled(model, {(2, 1): 0.0}):
    ...     out = model(torch.tensor([[1, 2, 3]]))
    """
    if repair is not None and repair not in get_args(Repair):
        raise ValueError(f"repair must be 'token', 'global' or None, got {repair!r}")
    found = find(model) if sites is None else sites
    handlers = [(found[layer].module, _Scale(some, repair)) for layer, some in _by_layer(scales, found).items()]
    attached: list[tuple[nn.Module, _Scale]] = []
    try:
        for module, handler in handlers:
            attach(module, "call", handler)
            attached.append((module, handler))
        yield
    finally:
        for module, handler in attached:
            detach(module, "call", handler)


def rescale(z: Tensor, scales: Tensor, repair: Repair | None = "token") -> Tensor:
    """``Z'`` of :func:`scaled` for ``z [..., H * dh]`` and ``scales [..., H]``, which broadcast against each other.

    >>> rescale(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 1.0]))
    tensor([0., 5.])
    """
    split: Tensor = z.unflatten(-1, (scales.shape[-1], -1))
    changed = (split.float() * scales.float()[..., None]).flatten(-2)
    if repair is None:
        return changed.to(z.dtype)
    before, after = (_norm(some, repair) for some in (z.float(), changed))
    factor = before / torch.where(after > 0, after, torch.ones_like(after))
    return (changed * factor).to(z.dtype)


def read(
    model: nn.Module,
    rows: Sequence[Sequence[int]],
    positions: Sequence[int],
    *,
    batch_size: int = 16,
    sites: Mapping[int, HeadSite] | None = None,
) -> dict[int, Tensor]:
    """``head_z[l]`` by layer, ``[N, H, dh]`` on the model's device: row ``i`` read at its token ``positions[i]``."""
    from ..extraction.capture import pad

    found = find(model) if sites is None else sites
    decoder, _ = find_decoder(model)
    device = next(decoder.parameters()).device
    kept: dict[int, list[Tensor]] = {layer: [] for layer in found}
    for start in range(0, len(rows), batch_size):
        ids, mask = pad(rows[start : start + batch_size], device)
        columns = torch.tensor(positions[start : start + batch_size])

        def keep(layer: int, state: Tensor, columns: Tensor = columns) -> None:
            at = columns.to(state.device)
            kept[layer].append(state[torch.arange(len(at), device=state.device), at])

        with _listening({site.module: _reader(keep, layer) for layer, site in found.items()}), torch.no_grad():
            decoder(input_ids=ids, attention_mask=mask, use_cache=False)
    return {layer: torch.cat(z).unflatten(-1, (found[layer].heads, -1)) for layer, z in kept.items()}


@torch.no_grad()
def contributions(site: HeadSite, z: Tensor) -> Tensor:
    """``a[l, h] = W_O z~ [N, H, d]``: what each head of ``z [N, H, dh]`` adds to the attention branch.

    ``z~`` is ``z`` with all other heads at zero; the projection's bias belongs to no head. Their sum over heads, plus
    that bias, is what the projection returns. The module itself is asked, so it may be quantised.
    """
    alone = torch.diag_embed(z.transpose(-1, -2), dim1=-3, dim2=-2).flatten(-2)
    bias: Tensor = site.module(alone.new_zeros(1, 1, alone.shape[-1]))
    out: Tensor = site.module(alone)
    return out - bias


def _norm(z: Tensor, repair: Repair) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(z, dim=None if repair == "global" else -1, keepdim=True)
    return norm


class _Scale:
    """Stands before a projection and scales what it is given."""

    def __init__(self, scales: Tensor, repair: Repair | None) -> None:
        self.scales, self.repair = scales, repair

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """The arguments with the scaled heads."""
        z = args[0]
        if self.scales.device != z.device:
            self.scales = self.scales.to(z.device)
        return (rescale(z, self.scales, self.repair), *args[1:])

    def after(self, output: Any) -> None:
        """Nothing."""


def _by_layer(scales: Mapping[Head, float], sites: Mapping[int, HeadSite]) -> dict[int, Tensor]:
    """Scales ``[H]`` of the layers where one is not 1."""
    made: dict[int, Tensor] = {}
    for (layer, head), scale in scales.items():
        if layer not in sites:
            raise PlanError(f"layer {layer}: there are heads to scale in layers {_span(list(sites))}")
        site = sites[layer]
        if not 0 <= head < site.heads:
            raise PlanError(f"head {head} of layer {layer}: the layer has heads 0..{site.heads - 1}")
        if not abs(scale) < float("inf"):
            raise ValueError(f"the scale of head {head} of layer {layer} must be a finite number, got {scale}")
        if scale != 1.0:
            made.setdefault(layer, torch.ones(site.heads))[head] = scale
    return made


def _span(layers: list[int]) -> str:
    whole = layers == list(range(layers[0], layers[-1] + 1))
    return f"{layers[0]}..{layers[-1]}" if whole else ", ".join(map(str, layers))


def _widths(config: Any, heads: int) -> set[int]:
    named = (getattr(config, name, None) for name in ("head_dim", "v_head_dim", "global_head_dim"))
    sizes = {size for size in named if isinstance(size, int) and size > 0}
    return {heads * size for size in sizes or {int(config.hidden_size) // heads}}


def _behind_attention(decoder: nn.Module, blocks: nn.ModuleList) -> Iterator[tuple[int, nn.Module, int]]:
    """Per block the first matrix that sees earlier tokens, and the width that it takes."""
    found: dict[int, tuple[nn.Module, int]] = {}

    def note(layer: int, module: nn.Module, state: Tensor) -> None:
        if layer not in found and state.dim() == 3 and len(state) == 2 and not torch.equal(state[0, -1], state[1, -1]):
            found[layer] = (module, state.shape[-1])

    hooks: dict[nn.Module, Any] = {}
    for layer, block in enumerate(blocks):
        for module in block.modules():
            if _holds_matrix(module):
                hooks[module] = _reader(lambda where, state, module=module: note(where, module, state), layer)
        hooks[block] = _told_apart
    device = next(decoder.parameters()).device
    # 0 often is the padding, which has no embedding; a short convolution does not reach back over six tokens
    ids = torch.arange(1, 7, device=device).expand(2, -1)
    with suspended(decoder), _listening(hooks), torch.no_grad():
        decoder(input_ids=ids, use_cache=False)
    for layer, (module, width) in sorted(found.items()):
        yield layer, module, width


def _holds_matrix(module: nn.Module) -> bool:
    own = (*module._parameters.values(), *module._buffers.values())
    return any(tensor is not None and tensor.dim() >= 2 for tensor in own)


def _told_apart(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """A block's input with equal rows, but that the first token of the second has the state of the next token."""
    state = block_input(args, kwargs)
    if state.dim() != 3:
        raise PlanError(
            f"{type(module).__name__}: the block's state has shape {list(state.shape)}, readable are [B, S, H]"
        )
    twin = state[:1].expand_as(state).clone()
    twin[1, 0] = twin[1, 1]
    return ((twin, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": twin})


def _reader(keep: Any, layer: int) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = args[0] if args else next(iter(kwargs.values()), None)
        if isinstance(given, Tensor):
            keep(layer, given)

    return hook


@contextlib.contextmanager
def _listening(hooks: Mapping[nn.Module, Any]) -> Iterator[None]:
    """Forward pre-hooks on modules in evaluation mode; hooks and modes are put back."""
    modes = [(part, part.training) for module in hooks for part in module.modules()]
    handles = []
    try:
        for part, _ in modes:
            part.training = False
        handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in hooks.items()]
        yield
    finally:
        for handle in handles:
            handle.remove()
        for part, mode in modes:
            part.training = mode
