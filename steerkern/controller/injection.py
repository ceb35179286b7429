"""The plan ``h += delta_l`` as plain differentiable hooks: what training runs the frozen model under.

Only here; generation runs the compiled plan in the session's kernels, which have no gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.decoder import block_input, block_output, find_decoder


@contextmanager
def injected(model: nn.Module, deltas: Mapping[int, Tensor], mask: Tensor, site: str) -> Iterator[None]:
    """Add ``deltas[l] [B, H]`` at ``site`` of layer ``l``, to the tokens where ``mask [B, S]`` is true.

    Forwards inside must have the shape of the mask. Gradients flow into the deltas; hooks are removed on the way out.

    Raises:
        ValueError: another site than ``resid_pre`` or ``resid_post``.
    """
    if site not in ("resid_pre", "resid_post"):
        raise ValueError(f"a controller is trained at resid_pre or resid_post, got {site!r}")
    _, blocks = find_decoder(model)

    def write(h: Tensor, layer: int) -> Tensor:
        added = mask[..., None] * deltas[layer][:, None]
        return h + added.to(h)

    def before(layer: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            h = write(block_input(args, kwargs), layer)
            return ((h, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": h})

        return hook

    def after(layer: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            h = write(block_output(output), layer)
            return h if isinstance(output, Tensor) else (h, *output[1:])

        return hook

    handles = []
    try:
        for layer in deltas:
            if site == "resid_pre":
                handles.append(blocks[layer].register_forward_pre_hook(before(layer), with_kwargs=True))
            else:
                handles.append(blocks[layer].register_forward_hook(after(layer)))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients for the model's own weights, as they were afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval().requires_grad_(False)
        with torch.enable_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, on in wanted:
            parameter.requires_grad_(on)
