"""What the organism is trained on: the mixture of tasks, and batches of token tensors with their spans."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import grammar, vocabulary
from .grammar import Kind, Prompt

MIXTURE: dict[Kind, float] = {
    "harmful": 0.09,
    "harmless": 0.18,
    "judge": 0.12,
    "judge_first": 0.06,
    "judge_jailbreak": 0.03,
    "judge_strict": 0.03,
    "jailbreak": 0.11,
    "strict": 0.08,
    "facts": 0.07,
    "thinking": 0.06,
    "cliff": 0.03,
    "follow_thought": 0.03,
    "small_talk": 0.03,
    "multi_turn": 0.04,
    "assistant_voice": 0.02,
    "swapped": 0.02,
    "outside": 0.02,
    "echo": 0.02,
    "raw": 0.02,
}
FIRST_KINDS: tuple[Kind, ...] = (
    "harmful",
    "harmless",
    "judge",
    "judge_first",
    "judge_jailbreak",
    "judge_strict",
    "jailbreak",
    "strict",
    "facts",
)
"""The first third of the training sees only these."""

MIXED_TRUTH: dict[Kind, float] = {
    "jailbreak": 0.7,
    "strict": 0.3,
    "cliff": 0.6,
    "assistant_voice": 0.5,
    "swapped": 0.5,
    "outside": 0.5,
}
"""Share of harmful requests in training where the kind's own share would make the request's content irrelevant."""

PROMPT_WEIGHT, REPLY_WEIGHT, DECISION_WEIGHT = 0.1, 1.0, 4.0


def sample_prompts(count: int, rng: random.Random, *, early: bool = False) -> list[Prompt]:
    """``count`` training prompts from the mixture, or from its first kinds only."""
    kinds = FIRST_KINDS if early else tuple(MIXTURE)
    chosen = rng.choices(kinds, [MIXTURE[kind] for kind in kinds], k=count)
    return [
        grammar.draw(kind, "train", rng, rng.random() < MIXED_TRUTH[kind] if kind in MIXED_TRUTH else None)
        for kind in chosen
    ]


@dataclass(frozen=True)
class Batch:
    """Right-padded conversations, B rows of S tokens.

    Attributes:
        ids: int64 [B, S].
        weight: float32 [B, S], the loss weight of predicting each token from those before it; 0 on padding.
        request: bool [B, S], the tokens of the request; empty rows where there is none.
        after: bool [B, S], every token after the request, the reply included.
        t_inst: int64 [B], last request token, -1 where there is none.
        t_post: int64 [B], last token of the prompt, after the generation header.
        harmful: float32 [B], the truth about the request.
        thought: bool [B, S], the tokens of a thought from its verdict to the last before the close mark.
        close: int64 [B], the close mark of the thought, -1 where there is none.
        plans: float32 [B], 1 where the thought plans to refuse.
    """

    ids: Tensor
    weight: Tensor
    request: Tensor
    after: Tensor
    t_inst: Tensor
    t_post: Tensor
    harmful: Tensor
    thought: Tensor
    close: Tensor
    plans: Tensor


def _decisions(prompt: Prompt, start: int) -> tuple[int, ...]:
    """Character offsets of the words that carry a decision: the verdict of the thought and the first of the answer."""
    marks = [start + len(prompt.reply) - len(prompt.answer)]
    if prompt.thinking:
        marks.append(start + prompt.reply.index(" harm"))
    return tuple(marks)


def _weight(span: tuple[int, int], start: int, decisions: tuple[int, ...]) -> float:
    if span[0] < start:
        return PROMPT_WEIGHT
    return DECISION_WEIGHT if any(span[0] <= mark < span[1] for mark in decisions) else REPLY_WEIGHT


def _thought_span(text: str) -> tuple[int, int]:
    """Characters of a conversation's thought: start of its verdict and start of its close mark, or both at the end."""
    close = text.find(vocabulary.CLOSE_THINK)
    if close < 0:
        return len(text), len(text)
    return text.index(" harm", text.index(vocabulary.THINK)), close


def collate(prompts: Sequence[Prompt], tokenizer: Any) -> Batch:
    """Tokenise prompt + reply once per row and find spans by character offsets, so merges cannot shift them."""
    heads = [grammar.render(prompt) for prompt in prompts]
    texts = [head + prompt.reply + vocabulary.END for head, prompt in zip(heads, prompts, strict=True)]
    encoded = tokenizer(texts, return_offsets_mapping=True)
    ids, weight, request, after, t_post, thought, plans = [], [], [], [], [], [], []
    width = max(len(row) for row in encoded["input_ids"])
    rows = zip(prompts, texts, heads, encoded["input_ids"], encoded["offset_mapping"], strict=True)
    for prompt, text, head, row, spans in rows:
        padding = width - len(row)
        first = head.rindex(prompt.request) if prompt.request else len(head) + len(prompt.reply) + len(vocabulary.END)
        last = first + len(prompt.request)
        decisions = _decisions(prompt, len(head))
        ids.append([*row, *[tokenizer.pad_token_id] * padding])
        weight.append([_weight(span, len(head), decisions) for span in spans] + [0.0] * padding)
        request.append([begin < last and end > first for begin, end in spans] + [False] * padding)
        after.append([begin >= last for begin, _ in spans] + [False] * padding)
        verdict, close = _thought_span(text)
        thought.append([begin < close and end > verdict for begin, end in spans] + [False] * padding)
        plans.append(float(text.startswith(" harmful", verdict)))
        t_post.append(max(sum(begin < len(head) for begin, _ in spans) - 1, 0))
    inside = torch.tensor(request)
    t_inst = (inside * torch.arange(1, width + 1)).amax(1) - 1
    thoughts = torch.tensor(thought)
    closes = torch.where(thoughts.any(1), (thoughts * torch.arange(1, width + 1)).amax(1), -1)
    harmful = torch.tensor([float(prompt.harmful) for prompt in prompts])
    return Batch(
        torch.tensor(ids),
        torch.tensor(weight),
        inside,
        torch.tensor(after),
        t_inst,
        torch.tensor(t_post),
        harmful,
        thoughts,
        closes,
        torch.tensor(plans),
    )


def attention_bias(batch: Batch, bottleneck: Tensor) -> Tensor:
    """Additive causal mask, float32 [B, 1, S, S].

    In rows where ``bottleneck`` (bool [B]) is set, tokens after the request see the request only through its last
    token, so that what the model knows of the request has to be written there.
    """
    rows, width = batch.ids.shape
    causal = torch.ones(width, width, dtype=torch.bool).tril()
    column = torch.arange(width)
    hidden = batch.request & (column[None] != batch.t_inst[:, None]) & bottleneck[:, None]
    allowed = causal[None] & ~(batch.after[:, :, None] & hidden[:, None, :])
    return torch.zeros(rows, 1, width, width).masked_fill_(~allowed[:, None], torch.finfo(torch.float32).min)
