"""States of the residual stream at chosen tokens, for every layer, one batch of prompts at a time.

``resid_pre[0..L-1]`` is what each block receives; the last row is the raw output of the last block,
``resid_post[L-1]``, which ``output_hidden_states`` does not hold: its last entry is the final-normed state.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PlanError
from ..runtime.decoder import block_input, block_output, find_decoder, text_config
from .template import Position, Rendered


@dataclass(frozen=True, eq=False)
class Captured:
    """One batch of states.

    ``states [L+1, n, P, H]`` lie on the CPU in the model's dtype: rows ``0..L-1`` are ``resid_pre``, row ``L`` is the
    raw ``resid_post[L-1]``; ``P`` follows the positions asked for. ``prompts`` are the numbers of the ``n`` prompts.
    """

    prompts: tuple[int, ...]
    states: Tensor


def capture(
    model: nn.Module,
    rendered: Sequence[Rendered],
    positions: Sequence[Position] = ("t_post",),
    *,
    batch_size: int = 16,
    progress: bool = True,
    label: str = "reading states",
) -> Iterator[Captured]:
    """Run the model over prompts and hand out their states at ``positions``, batch by batch, longest prompts first.

    Only the chosen rows leave a block's hook, so a batch holds ``(L+1) * n * P * H`` numbers whatever the prompts'
    length. The decoder is called without its language-model head and without a cache, in evaluation mode; hooks and
    mode are put back before a batch is handed out. A session may be attached: the states are then those of the steered
    model, at a fused site as they arrive (before that site's own edit), at an unfused ``resid_pre`` after it.

    Raises:
        ValueError: no prompt, no position, a position outside a prompt, more tokens than the model has positions, token
            ids that it does not know; all of these before the model runs.
        PlanError: a model whose blocks do not take one state ``[B, S, H]``.
    """
    if type(batch_size) is not int or batch_size < 1:
        raise ValueError(f"batch_size must be a number from 1, got {batch_size!r}")
    if isinstance(positions, (str, int)) or not positions:
        raise ValueError(f"positions must be a list with at least one position, got {positions!r}")
    model = getattr(model, "_orig_mod", model)
    check_prompts(model, rendered)
    chosen = [[prompt.at(position) for position in positions] for prompt in rendered]
    order = sorted(range(len(rendered)), key=lambda i: (-len(rendered[i].ids), i))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return _stream(model, rendered, chosen, batches, progress, label)


def states(
    model: nn.Module,
    rendered: Sequence[Rendered],
    positions: Sequence[Position] = ("t_post",),
    *,
    batch_size: int = 16,
    progress: bool = True,
) -> Tensor:
    """All states ``[N, L+1, P, H]`` in the order of ``rendered``; see :func:`capture` for layers, dtype and Raises."""
    batches = list(capture(model, rendered, positions, batch_size=batch_size, progress=progress))
    first = batches[0].states
    made = first.new_empty(len(rendered), first.shape[0], *first.shape[2:])
    for batch in batches:
        made[list(batch.prompts)] = batch.states.transpose(0, 1)
    return made


def check_prompts(model: nn.Module, rendered: Sequence[Rendered]) -> None:
    """Raise ValueError unless the model can read every prompt."""
    if not rendered:
        raise ValueError("no prompts to read")
    limit = getattr(text_config(model), "max_position_embeddings", None)
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    known = int(embeddings.weight.shape[0])
    for i, prompt in enumerate(rendered):
        if isinstance(limit, int) and len(prompt.ids) > limit:
            raise ValueError(f"prompt {i} has {len(prompt.ids)} tokens, the model has {limit} positions")
        if (token := max(prompt.ids)) >= known:
            raise ValueError(f"prompt {i} has token {token}, the model knows 0..{known - 1}: is this its tokenizer?")


def _stream(
    model: nn.Module,
    rendered: Sequence[Rendered],
    chosen: list[list[int]],
    batches: list[list[int]],
    progress: bool,
    label: str,
) -> Iterator[Captured]:
    decoder, blocks = find_decoder(model)
    device = next(decoder.parameters()).device
    with _bar(len(rendered), progress, label) as advance:
        for batch in batches:
            ids, mask = pad([rendered[i].ids for i in batch], device)
            inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
            columns = torch.tensor([chosen[i] for i in batch], device=device)
            yield Captured(tuple(batch), _read(decoder, blocks, inputs, columns))
            advance(len(batch))


def pad(rows: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, int64 ``[B, S]``, padded on the right with token 0.

    On the right, because a token then never sees the padding: positions count from the prompt's first token in every
    model, a recurrent state starts clean, and no row of attention is masked whole. (With padding on the left, eager
    attention in float64 fills such rows with NaN, which reaches the real tokens one block later.)
    """
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return ids.to(device), mask.to(device)


def _read(decoder: nn.Module, blocks: nn.ModuleList, inputs: dict[str, Any], columns: Tensor) -> Tensor:
    """One forward; ``columns [n, P]`` are the tokens to keep. Returns ``[L+1, n, P, H]`` on the CPU."""
    kept: dict[int, Tensor] = {}

    def keep(layer: int, state: Tensor) -> None:
        if state.dim() != 3 or state.shape[0] != columns.shape[0]:
            raise PlanError(f"layer {layer}: the block's state has shape {list(state.shape)}, readable are [B, S, H]")
        here = columns.to(state.device)
        kept[layer] = state[torch.arange(len(here), device=state.device)[:, None], here]

    handles = []
    modes = [(module, module.training) for module in decoder.modules()]
    try:
        for layer, block in enumerate(blocks):
            handles.append(block.register_forward_pre_hook(_entering(keep, layer), with_kwargs=True))
        handles.append(blocks[-1].register_forward_hook(lambda _, __, output: keep(len(blocks), block_output(output))))
        decoder.eval()
        # not inference_mode: what the model or a session allocates here (rope tables, row maps) must stay writable
        with torch.no_grad():
            decoder(**inputs)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode
    missing = [layer for layer in range(len(blocks) + 1) if layer not in kept]
    if missing:
        raise PlanError(f"layer {missing[0]}: the block was not called")
    return torch.stack([kept[layer].to("cpu") for layer in range(len(blocks) + 1)])


def _entering(keep: Callable[[int, Tensor], None], layer: int) -> Callable[..., None]:
    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keep(layer, block_input(args, kwargs))

    return enter


@contextlib.contextmanager
def _bar(total: int, wanted: bool, label: str) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr where that is a terminal; yields what advances it."""
    if not wanted:
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda count: bar.advance(task, count)
