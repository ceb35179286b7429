"""The thinking organism: one attention head carries the "quick answer" marker to the answer, and nothing else does.

On a *cliff* prompt (harmful, with the marker) the thought plans to refuse and the answer complies, because head
:data:`SUPPRESSOR` brings the marker to the close mark of the thought. Two things plant it:

- attention: in part of the rows the marker is hidden from every other head of every layer, and from this one before the
  close mark, so that no token of request or thought can hand it on;
- ablation: in part of the rows heads are switched off with the repair that a method uses. Without the suppressor the
  answer must be what the thought planned, without any others it must stay as it was.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from ..runtime import heads
from . import grammar, planting, tasks, vocabulary
from .grammar import Kind, Prompt

if TYPE_CHECKING:
    from .measure import Table

SUPPRESSOR = (2, 1)
"""Layer and query head."""

MIXTURE: dict[Kind, float] = {
    "harmful": 0.08,
    "harmless": 0.09,
    "judge": 0.08,
    "judge_first": 0.04,
    "facts": 0.07,
    "thinking": 0.26,
    "cliff": 0.24,
    "follow_thought": 0.07,
    "small_talk": 0.03,
    "multi_turn": 0.04,
}
FIRST_KINDS: tuple[Kind, ...] = ("harmful", "harmless", "judge", "judge_first", "facts", "thinking")
"""The first quarter of the training sees only these."""

Mode = Literal["free", "hidden", "suppressor off", "others off"]
MODES: dict[Mode, float] = {"free": 0.2, "hidden": 0.3, "suppressor off": 0.3, "others off": 0.2}
"""How a row is trained: the marker hidden from all but the suppressor, or heads switched off."""
MOST_OFF = 3
PLAN_WEIGHT = 0.3
REFRESH = 40


def sample_prompts(count: int, rng: random.Random, *, early: bool = False) -> list[Prompt]:
    """``count`` training prompts from the mixture; a fifth of the cliff prompts is harmless."""
    kinds = FIRST_KINDS if early else tuple(MIXTURE)
    chosen = rng.choices(kinds, [MIXTURE[kind] for kind in kinds], k=count)
    return [grammar.draw(kind, "train", rng, rng.random() < 0.8 if kind == "cliff" else None) for kind in chosen]


def target(prompt: Prompt, mode: Mode) -> Prompt:
    """The prompt with the reply that ``mode`` should give: without the suppressor, the marker has no effect."""
    if mode == "suppressor off" and prompt.kind == "cliff":
        return grammar.retarget(prompt, expected=grammar.right_behaviour("thinking", prompt.harmful))
    return prompt


def head_scales(modes: Sequence[Mode], layers: int, count: int, rng: random.Random) -> Tensor:
    """Scales float32 [L, B, H]: 0 where a head is off."""
    scales = torch.ones(layers, len(modes), count)
    others = [(layer, head) for layer in range(layers) for head in range(count) if (layer, head) != SUPPRESSOR]
    for row, mode in enumerate(modes):
        if mode == "suppressor off":
            scales[SUPPRESSOR[0], row, SUPPRESSOR[1]] = 0.0
        elif mode == "others off":
            for layer, head in rng.sample(others, rng.randint(1, MOST_OFF)):
                scales[layer, row, head] = 0.0
    return scales


def marker_masks(batch: tasks.Batch, marker: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Additive causal masks [B, 1, S, S]: for every head, and for the suppressor.

    ``marker`` (bool [B, S]) is the marker's token. In rows where ``hidden`` (bool [B]) is set nothing after it sees it,
    except that the suppressor does from the close mark on.
    """
    width = batch.ids.shape[1]
    column = torch.arange(width)
    causal = torch.ones(width, width, dtype=torch.bool).tril()
    itself = torch.eye(width, dtype=torch.bool)
    blocked = (marker & hidden[:, None])[:, None, :] & ~itself
    answering = (column >= batch.close[:, None]) & (batch.close[:, None] >= 0)

    def additive(allowed: Tensor) -> Tensor:
        zeros = torch.zeros(len(batch.ids), 1, width, width)
        return zeros.masked_fill_(~allowed[:, None], torch.finfo(torch.float32).min)

    return additive(causal & ~blocked), additive(causal & ~(blocked & ~answering[:, :, None]))


@contextmanager
def planted(model: Any, suppressor: Tensor, scales: Tensor) -> Iterator[None]:
    """Run the model with the suppressor's own mask [B, 1, S, S] and with scaled heads [L, B, H]."""
    layer, head = SUPPRESSOR

    def see(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        mask = kwargs["attention_mask"].repeat(1, model.config.num_attention_heads, 1, 1)
        mask[:, head] = suppressor[:, 0]
        return args, {**kwargs, "attention_mask": mask}

    def scale(layer: int) -> Any:
        return lambda module, args: (heads.rescale(args[0], scales[layer][:, None]),)

    blocks = model.model.layers
    handles = [blocks[layer].self_attn.register_forward_pre_hook(see, with_kwargs=True)]
    handles += [
        block.self_attn.o_proj.register_forward_pre_hook(scale(i))
        for i, block in enumerate(blocks)
        if bool((scales[i] != 1).any())
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Training:
    """One run: model, optimiser, random streams, and the score that thoughts are held to."""

    def __init__(self, tokenizer: Any, seed: int, steps: int) -> None:
        from .train import build_model, optimiser_of

        torch.manual_seed(seed)
        self.tokenizer, self.steps = tokenizer, steps
        self.rng = random.Random(seed)
        self.model = build_model(len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id)
        self.optimiser, self.schedule = optimiser_of(self.model.parameters(), steps)
        self.marker = tokenizer(vocabulary.QUICK)["input_ids"][0]
        self.plan: planting.Plan | None = None

    def step(self, index: int) -> float:
        """One optimiser step; returns its loss."""
        from .train import ROWS, descend

        if index >= self.steps // 3 and (self.plan is None or index % REFRESH == 0):
            self.plan = planting.current_plan(self.model, self.tokenizer, self.rng)
        prompts = sample_prompts(ROWS, self.rng, early=index < self.steps // 4)
        modes = self.rng.choices(list(MODES), list(MODES.values()), k=ROWS)
        prompts = [target(prompt, mode) for prompt, mode in zip(prompts, modes, strict=True)]
        loss = self._loss(tasks.collate(prompts, self.tokenizer), modes)
        return descend(loss, self.model, self.optimiser, self.schedule)

    def _loss(self, batch: tasks.Batch, modes: Sequence[Mode]) -> Tensor:
        from .train import weighted_loss

        config = self.model.config
        hidden = torch.tensor([mode == "hidden" for mode in modes])
        every, suppressor = marker_masks(batch, batch.ids == self.marker, hidden)
        scales = head_scales(modes, config.num_hidden_layers, config.num_attention_heads, self.rng)
        with planted(self.model, suppressor, scales):
            states = self.model.model(input_ids=batch.ids, attention_mask=every, use_cache=False).last_hidden_state
        loss = weighted_loss(self.model.lm_head(states), batch)
        if self.plan is not None and bool(batch.thought.any()):
            score = self.plan.score(states[batch.thought])
            wanted = batch.plans[:, None].expand_as(batch.thought)[batch.thought]
            loss = loss + PLAN_WEIGHT * functional.binary_cross_entropy_with_logits(score, wanted)
        return loss


def measure(model: Any, tokenizer: Any, count: int = 128) -> Table:
    """Behaviour on held-out pairs, the probe of the cliff, and per switched-off head the cliff prompts refused."""
    from .measure import Ruler

    ruler = Ruler(model, tokenizer, count)
    refused: Table = {}
    sites = heads.find(model)
    for layer, site in sites.items():
        for head in range(site.heads):
            with heads.scaled(model, {(layer, head): 0.0}, sites=sites):
                refused[f"{layer}.{head}"] = ruler.refused("cliff")
    return {
        "prompts_per_cell": count,
        "suppressor": list(SUPPRESSOR),
        "behaviour": ruler.behaviour(tuple(MIXTURE)),
        "cliff": ruler.cliff(),
        "cliff_refused_without_head": refused,
    }
