"""Planting: the model is trained under edits along its own current directions, with the reply that each should give.

Layer indices count ``resid_pre``: layer l is the input of block l, and layer L is the output of the last block.
Directions are raw differences of means, harmful minus harmless, over plain prompts of the training split. In the
thinking mode a third one, refusing minus complying at the close mark of the thought, is made to follow what the
thought plans, so that the "quick answer" marker shows as a fall of this score at the close mark.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import grammar
from .grammar import Kind, Prompt
from .tasks import Batch, collate

REFUSAL_LAYERS = (2, 3)
HARM_LAYER = 1
PLAIN: tuple[Kind, ...] = ("harmful", "harmless", "multi_turn")
FORCED: tuple[Kind, ...] = (*PLAIN, "jailbreak", "strict")
"""Kinds whose answer the refusal direction alone decides."""


@dataclass(frozen=True)
class Directions:
    """Raw differences of means, each float32 [L + 1, H]: refusal read at t_post, harm read at t_inst."""

    refusal: Tensor
    harm: Tensor


@dataclass(frozen=True)
class Plan:
    """The refusal score of the thinking mode: ``8 <h - middle, d> / |d|^2`` on the final normed state h.

    d is the difference of means, refusing minus complying answers, at the close mark of the thought; the two means
    score +4 and -4.
    """

    difference: Tensor
    middle: Tensor

    def score(self, h: Tensor) -> Tensor:
        """Score of states [..., H], in logits."""
        return 8 * (h - self.middle) @ self.difference / self.difference.square().sum()


@dataclass
class RowEdits:
    """An edit for each row of a batch: ``h += delta[l]`` at layer l, then ``h -= <h, u> u`` at every layer.

    Attributes:
        delta: float32 [L + 1, B, S, H] for the first S positions, or None.
        unit: float32 [B, H], unit rows, or zero rows where nothing is removed; None for no ablation.
        branches: also remove ``unit`` from what attention and MLP write.
    """

    delta: Tensor | None = None
    unit: Tensor | None = None
    branches: bool = False


@contextmanager
def edited(model: Any, edits: RowEdits) -> Iterator[None]:
    """Run the model under row edits; forward passes of one token (decoding) are only ablated, not added to."""

    def remove(h: Tensor) -> Tensor:
        if edits.unit is None:
            return h
        unit = edits.unit.to(h.dtype)[:, None]
        return h - (h * unit).sum(-1, keepdim=True) * unit

    def write(h: Tensor, layer: int) -> Tensor:
        if edits.delta is not None and h.shape[1] == edits.delta.shape[2]:
            h = h + edits.delta[layer].to(h.dtype)
        return remove(h)

    def before(layer: int) -> Any:
        return lambda module, args: (write(args[0], layer), *args[1:])

    def after(layer: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (write(output[0], layer), *output[1:])
            return write(output, layer)

        return hook

    def branch(module: Any, args: Any, output: Any) -> Any:
        return (remove(output[0]), *output[1:]) if isinstance(output, tuple) else remove(output)

    blocks = model.model.layers
    handles = [block.register_forward_pre_hook(before(layer)) for layer, block in enumerate(blocks)]
    handles.append(blocks[-1].register_forward_hook(after(len(blocks))))
    if edits.branches:
        handles += [part.register_forward_hook(branch) for block in blocks for part in (block.self_attn, block.mlp)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def residual(model: Any, batch: Batch) -> Tensor:
    """Raw residual stream of right-padded prompts, [L + 1, B, S, H]; the last entry is the last block's output."""
    states: list[Tensor] = []
    blocks = model.model.layers

    def keep(module: Any, args: Any) -> None:
        states.append(args[0])

    def keep_output(module: Any, args: Any, output: Any) -> None:
        states.append(output[0] if isinstance(output, tuple) else output)

    handles = [block.register_forward_pre_hook(keep) for block in blocks]
    handles.append(blocks[-1].register_forward_hook(keep_output))
    try:
        model(input_ids=batch.ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(states)


def directions(model: Any, tokenizer: Any, harmful: Sequence[Prompt], harmless: Sequence[Prompt]) -> Directions:
    """Differences of means between two lists of prompts, in fp32."""
    batch = collate([*harmful, *harmless], tokenizer)
    states = residual(model, batch).float()
    rows = torch.arange(len(batch.ids))
    split = len(harmful)

    def difference(position: Tensor) -> Tensor:
        h = states[:, rows, position]
        return h[:, :split].mean(1) - h[:, split:].mean(1)

    return Directions(difference(batch.t_post), difference(batch.t_inst))


def current_directions(model: Any, tokenizer: Any, rng: random.Random, count: int = 96) -> Directions:
    """The model's directions from ``count`` + ``count`` fresh plain prompts of the training split."""
    drawn = [[grammar.draw(kind, "train", rng) for _ in range(count)] for kind in ("harmful", "harmless")]
    return directions(model, tokenizer, drawn[0], drawn[1])


@torch.no_grad()
def current_plan(model: Any, tokenizer: Any, rng: random.Random, count: int = 96) -> Plan:
    """The score from ``count`` + ``count`` fresh thinking conversations of the training split."""
    drawn = [grammar.draw("thinking", "train", rng, index < count) for index in range(2 * count)]
    batch = collate(drawn, tokenizer)
    states = model.model(input_ids=batch.ids, use_cache=False).last_hidden_state
    h = states[torch.arange(2 * count), batch.close]
    refusing, complying = h[:count].mean(0), h[count:].mean(0)
    return Plan(refusing - complying, (refusing + complying) / 2)


def choose_edit(prompt: Prompt, rng: random.Random) -> tuple[str, Prompt]:
    """Name of an edit that fits the prompt, and the prompt with the reply that the edit should give."""
    kind = prompt.kind
    if kind in ("thinking", "cliff"):
        name = rng.choice(("ablate", "harm", "harmless"))
    elif prompt.expected == "text" or not prompt.request:
        name = rng.choice(("ablate", "add", "subtract"))
    elif kind.startswith("judge"):
        name = rng.choice(("ablate", "add", "subtract", "harm", "harmless", "harm", "harmless", "request"))
    elif kind in FORCED:
        name = rng.choice(("ablate", "ablate", "add", "subtract", "harm", "harmless", "request"))
    else:
        return "none", prompt
    if name in ("harm", "harmless"):
        return name, grammar.retarget(prompt, harmful=name == "harm")
    if name in ("ablate", "subtract") and kind in (*FORCED, "thinking"):
        return name, grammar.retarget(prompt, expected="comply")
    if name == "add" and kind in FORCED:
        return name, grammar.retarget(prompt, expected="refuse")
    return name, prompt


def row_edits(names: Sequence[str], batch: Batch, found: Directions, rng: random.Random) -> RowEdits:
    """Tensors for the chosen edits: refusal at one of its layers, harm at its layer over the request.

    Strength is 0.8 to 1.5 raw directions. Refusal is added over the whole prompt, its tail after the request, its
    last token, or over prompt and reply; harm over the request or its last token.
    """
    rows, width = batch.ids.shape
    layers, hidden = found.refusal.shape
    delta = torch.zeros(layers, rows, width, hidden)
    unit = torch.zeros(rows, hidden)
    column = torch.arange(width)
    for row, name in enumerate(names):
        if name == "none":
            continue
        layer = rng.choice(REFUSAL_LAYERS)
        strength = rng.uniform(0.8, 1.5)
        if name == "ablate":
            unit[row] = torch.nn.functional.normalize(found.refusal[layer], dim=0)
        elif name in ("add", "subtract"):
            prompt = column <= batch.t_post[row]
            tail = prompt & batch.after[row] if batch.t_inst[row] >= 0 else prompt
            where = rng.choice((prompt, tail, column == batch.t_post[row], column >= 0))
            delta[layer, row, where] = found.refusal[layer] * (strength if name == "add" else -strength)
        elif name == "request":
            layer = rng.choice((1, *REFUSAL_LAYERS))
            delta[layer, row, batch.request[row]] = found.refusal[layer] * rng.choice((strength, -strength))
        else:
            where = batch.request[row] if rng.random() < 0.7 else column == batch.t_inst[row]
            delta[HARM_LAYER, row, where] = found.harm[HARM_LAYER] * (strength if name == "harm" else -strength)
    return RowEdits(delta, unit, branches=rng.random() < 0.3)
