"""Replacing states: activation patching inside one model, and from one model into another.

``h[row, column] <- state`` at ``resid_post[l]`` or ``resid_pre[l]``, before anything reads it there. The states may
come from another run of the model or from another model of the same width that reads the same tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..directions import check_layer
from ..errors import PlanError
from .decoder import block_input, block_output, find_decoder, text_config
from .logits import next_logits

SITES = ("resid_pre", "resid_post")


@dataclass(frozen=True, eq=False)
class Patch:
    """The states of ``P`` tokens of a batch at one layer.

    Attributes:
        layer: number of the block.
        rows: int64 ``[P]``, rows of the batch.
        columns: int64 ``[P]``, columns of the batch as the model gets it, padding included.
        states: ``[P, H]``, rounded once to the model's dtype; those of the model's own dtype go in bit for bit.

    Raises:
        ValueError: shapes that do not fit each other, a negative index, or two states for one token.
    """

    layer: int
    rows: Tensor
    columns: Tensor
    states: Tensor

    def __post_init__(self) -> None:
        check_layer(self.layer)
        count = len(self.states)
        if self.states.dim() != 2 or self.rows.shape != (count,) or self.columns.shape != (count,):
            shapes = ", ".join(str(list(part.shape)) for part in (self.rows, self.columns, self.states))
            raise ValueError(f"layer {self.layer}: rows [P], columns [P] and states [P, H] are needed, got {shapes}")
        tokens = list(zip(self.rows.tolist(), self.columns.tolist(), strict=True))
        if any(row < 0 or column < 0 for row, column in tokens):
            raise ValueError(f"layer {self.layer}: rows and columns count from 0")
        if len(set(tokens)) < count:
            raise ValueError(f"layer {self.layer}: two states for one token")


@contextlib.contextmanager
def patched(model: nn.Module, patches: Sequence[Patch], *, site: str = "resid_post") -> Iterator[None]:
    """``model`` with states replaced in every forward while the context lasts.

    ``resid_post[l]`` and ``resid_pre[l + 1]`` are one tensor: a session's edit at either acts on the replaced state.
    Patches of one layer are put in one after the other. Forwards run eagerly.

    Raises:
        ValueError: another site, a layer that the model does not have, or states of another width.
        PlanError: in a forward whose batch lacks a row or column of a patch.

    >>> from steerkern import organism
    >>> model, tokenizer = organism.load()
    >>> ids = tokenizer("hello", return_tensors="pt").input_ids
    >>> zero = Patch(3, torch.tensor([0]), torch.tensor([ids.shape[1] - 1]), torch.zeros(1, 64))
    >>> with torch.no_grad(), patched(model, [zero]):
    ...     float(model(ids).logits[0, -1].abs().max())
    0.0
    """
    if site not in SITES:
        raise ValueError(f"site must be one of {', '.join(SITES)}, got {site!r}")
    model = getattr(model, "_orig_mod", model)
    _, blocks = find_decoder(model)
    width = int(text_config(model).hidden_size)
    for patch in patches:
        if patch.layer >= len(blocks):
            raise ValueError(f"layer {patch.layer}: the model has {len(blocks)} decoder layers (0..{len(blocks) - 1})")
        if patch.states.shape[1] != width:
            raise ValueError(f"layer {patch.layer}: states of width {patch.states.shape[1]}, the model has {width}")
    handles = []
    try:
        for patch in patches:
            after = patch.layer - (site == "resid_pre")  # the block that returns this state
            if after < 0:
                handles.append(blocks[0].register_forward_pre_hook(_entering(patch), with_kwargs=True))
            else:
                handles.append(blocks[after].register_forward_hook(_leaving(patch)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _entering(patch: Patch) -> Callable[..., Any]:
    def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        state = _replace(block_input(args, kwargs), patch)
        return ((state, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": state})

    return hook


def _leaving(patch: Patch) -> Callable[..., Any]:
    def hook(block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        state = _replace(block_output(output), patch)
        return state if isinstance(output, Tensor) else (state, *output[1:])

    return hook


def _replace(state: Tensor, patch: Patch) -> Tensor:
    if state.dim() != 3:
        raise PlanError(f"layer {patch.layer}: the state has shape {list(state.shape)}, replaceable are [B, S, H]")
    rows, columns = patch.rows, patch.columns
    if len(rows) and (int(rows.max()) >= state.shape[0] or int(columns.max()) >= state.shape[1]):
        last = f"row {int(rows.max())}, column {int(columns.max())}"
        raise PlanError(f"layer {patch.layer}: a patch reaches {last}, the batch is {list(state.shape[:2])}")
    return state.index_put((rows.to(state.device), columns.to(state.device)), patch.states.to(state))


def sweep(
    model: nn.Module,
    ids: Tensor,
    tokens: Tensor,
    states: Tensor,
    score: Callable[[Tensor], Tensor],
    *,
    mask: Tensor | None = None,
    around: Callable[[Tensor], AbstractContextManager[object]] | None = None,
    batch_size: int = 64,
    step: Callable[[int], object] | None = None,
) -> Tensor:
    """Score every single replacement: one token at one layer of one prompt, each in a row of its own.

    Args:
        model: a transformers causal language model.
        ids: int64 ``[N, S]``, the prompts that are patched, padded on the right.
        tokens: int64 ``[N, T]``, which columns of each prompt are tried.
        states: ``[N, L, T, H]``, what is put in at ``resid_post[l]``.
        score: makes one number per row ``[B]`` of next-token logits ``[B, V]`` float32.
        mask: int64 ``[N, S]``, 0 at padding.
        around: makes the context in which a batch runs of the numbers ``[B]`` of its prompts, to corrupt them first.
        batch_size: rows per forward.
        step: called with the number of rows of each batch that is done.

    Returns:
        ``[N, L, T]`` float32 on the CPU.

    Raises:
        ValueError: shapes that do not fit each other, none of anything, or a batch size below 1.
    """
    n, layers, count = states.shape[:3] if states.dim() == 4 else (-1, 0, 0)
    if ids.shape[:1] != (n,) or tokens.shape != (n, count) or min(n, layers, count) < 1:
        shapes = ", ".join(str(list(part.shape)) for part in (ids, tokens, states))
        raise ValueError(f"ids [N, S], tokens [N, T] and states [N, L, T, H] are needed, got {shapes}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    where = torch.cartesian_prod(torch.arange(n), torch.arange(layers), torch.arange(count)).reshape(-1, 3)
    device = next(model.parameters()).device
    scores = []
    for batch in where.split(batch_size):
        prompt, layer, token = batch.unbind(1)
        patches = []
        for number in layer.unique().tolist():
            here = (layer == number).nonzero()[:, 0]
            columns = tokens[prompt[here], token[here]]
            patches.append(Patch(number, here, columns, states[prompt[here], number, token[here]]))
        given = None if mask is None else mask[prompt].to(device)
        with around(prompt) if around is not None else contextlib.nullcontext(), patched(model, patches):
            scores.append(score(next_logits(model, ids[prompt].to(device), given)).float().cpu())
        if step is not None:
            step(len(batch))
    return torch.cat(scores).reshape(n, layers, count)


def check_exchange(source: nn.Module, target: nn.Module) -> None:
    """Raise ValueError unless states of ``source`` can be put into ``target``: the same width and depth."""
    for what, key in (("width", "hidden_size"), ("number of layers", "num_hidden_layers")):
        mine, yours = (int(getattr(text_config(model), key)) for model in (source, target))
        if mine != yours:
            raise ValueError(f"states cannot go from one model into the other: their {what} is {mine} and {yours}")


def check_tokenizers(source: Any, target: Any, texts: Sequence[str]) -> None:
    """Raise ValueError unless both tokenizers read every text as the same tokens; other words may differ."""
    read = (tokenizer(list(texts))["input_ids"] for tokenizer in (source, target))
    for text, mine, yours in zip(texts, *read, strict=True):
        if mine != yours:
            raise ValueError(f"the two tokenizers read {text[:40]!r} differently: {mine[:8]} and {yours[:8]}")
