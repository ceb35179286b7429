"""Where facts sit: the effect of every single state of the true statement's run, put into the false one's.

``m[l, i] = logit(true) - logit(false)`` after ``resid_post[l]`` of token ``i`` was replaced, mean over pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from ...extraction import Rendered, states
from ...extraction.capture import pad
from ...runtime.logits import next_logits
from ...runtime.patching import Patch, patched, sweep
from ...subject import Subject
from .pairs import Asked, object_tokens, subject_tokens

BINS = 20


@dataclass(frozen=True)
class Traced:
    """The tokens that are patched, counted from the end of the prompt, with what they are."""

    positions: tuple[int, ...]
    names: tuple[str, ...]
    facts: tuple[int, ...]
    """Numbers of the subject's and the object's tokens among :attr:`positions`."""


@dataclass(frozen=True, eq=False)
class Knowledge:
    """Maps ``[L, T]`` of two models, own and crosswise, and of the noise variant; ``stock`` are unpatched means.

    ``maps[target, source]`` has states of ``source`` in the false runs of ``target``, each 0 or 1.
    """

    traced: Traced
    maps: dict[tuple[int, int], Tensor]
    restored: tuple[Tensor, Tensor]
    stock: tuple[dict[str, float], dict[str, float]]
    pairs: int


def tokens(subject: Subject, asked: Asked) -> Traced:
    """Every token from the statement's first on; those that differ within the first pair are its subject."""
    one, other = asked.true[0], asked.false[0]
    positions = tuple(range(one.t_first - len(one.ids), 0))
    about, what = subject_tokens(one, other), object_tokens(subject.tokenizer, one, asked.pairs[0].true)
    names = [str(subject.tokenizer.decode([one.ids[p]])).strip() or "\\n" for p in positions]
    for name, these in (("subject", about), ("object", what)):
        for number, position in enumerate(these, 1):
            names[position] = name if len(these) == 1 else f"{name} {number}"
    facts = tuple(i for i, position in enumerate(positions) if position in (*about, *what))
    return Traced(positions, tuple(names), facts)


def trace(subjects: tuple[Subject, Subject], asked: Asked, noise: float, seed: int) -> Knowledge:
    """All four maps of two models and the noise variant of both."""
    traced = tokens(subjects[0], asked)
    donors = [_cache(subject, asked.true, traced.positions) for subject in subjects]
    maps = {
        (target, source): _map(subjects[target], asked, asked.false, traced, donors[source][:, 1:])
        for target in (0, 1)
        for source in (0, 1)
    }
    restored, stock = [], []
    for subject, clean in zip(subjects, donors, strict=True):
        around = _corruption(subject, asked, clean[:, 0], traced, noise, seed)
        restored.append(_map(subject, asked, asked.true, traced, clean[:, 1:], around))
        stock.append(
            {
                "true": float(_margins(subject, asked, asked.true).mean()),
                "false": float(_margins(subject, asked, asked.false).mean()),
                "noise": float(_margins(subject, asked, asked.true, around).mean()),
            }
        )
    return Knowledge(traced, maps, (restored[0], restored[1]), (stock[0], stock[1]), len(asked.pairs))


def normalise(effects: Tensor) -> Tensor:
    """20 equal bins between minimum and maximum: the lower ten become 0, the upper ten 0.1 ... 1.

    >>> normalise(torch.tensor([[0.0, 4.9, 5.0, 10.0]])).tolist()
    [[0.0, 0.0, 0.10000000149011612, 1.0]]
    """
    low, high = effects.min(), effects.max()
    if low == high:
        return torch.zeros_like(effects)
    bins = ((effects - low) / (high - low) * BINS).floor().clamp_max(BINS - 1)
    return (bins - (BINS // 2 - 1)).clamp_min(0) / (BINS // 2)


def pearson(one: Tensor, other: Tensor) -> float | None:
    """Correlation of two maps of one shape; None where one is constant."""
    r = float(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]).double())[0, 1])
    return None if math.isnan(r) else r


def margin(labels: tuple[int, int]) -> Callable[[Tensor], Tensor]:
    """``logit(true) - logit(false)`` of logits ``[B, V]``, which is ``log P(true) / P(false)``."""
    return lambda logits: logits[:, labels[0]] - logits[:, labels[1]]


def _cache(subject: Subject, prompts: Sequence[Rendered], positions: Sequence[int]) -> Tensor:
    """``[N, L+1, T, H]``; layer 0 is the embedding, layer ``l + 1`` is ``resid_post[l]``."""
    return states(subject.model, prompts, positions, batch_size=subject.batch_size)


def _map(
    subject: Subject,
    asked: Asked,
    prompts: Sequence[Rendered],
    traced: Traced,
    put: Tensor,
    around: Callable[[Tensor], AbstractContextManager[object]] | None = None,
) -> Tensor:
    ids, mask = pad([prompt.ids for prompt in prompts])
    columns = mask.sum(1, keepdim=True) + torch.tensor(traced.positions)
    with subject.progress(f"patching {subject.source}", put[..., 0].numel()) as step:
        effects = sweep(
            subject.model,
            ids,
            columns,
            put,
            margin(asked.labels),
            mask=mask,
            around=around,
            batch_size=subject.batch_size,
            step=step,
        )
    return effects.mean(0)


def _corruption(
    subject: Subject, asked: Asked, embedded: Tensor, traced: Traced, noise: float, seed: int
) -> Callable[[Tensor], AbstractContextManager[object]]:
    """Noise of standard deviation ``noise * |embedding|`` on the subject's tokens, the same in every forward."""
    about = subject_tokens(asked.true[0], asked.false[0])
    here = [traced.positions.index(position) for position in about]
    clean = embedded[:, here].float()  # [N, C, H]
    random = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))
    noisy = (clean + noise * clean.norm(dim=-1, keepdim=True) * random).to(embedded.dtype)
    columns = torch.tensor([[len(prompt.ids) + position for position in about] for prompt in asked.true])

    def corrupted(prompts: Tensor) -> AbstractContextManager[object]:
        rows = torch.arange(len(prompts)).repeat_interleave(len(about))
        patch = Patch(0, rows, columns[prompts].flatten(), noisy[prompts].flatten(0, 1))
        return patched(subject.model, [patch], site="resid_pre")

    return corrupted


def _margins(
    subject: Subject,
    asked: Asked,
    prompts: Sequence[Rendered],
    around: Callable[[Tensor], AbstractContextManager[object]] | None = None,
) -> Tensor:
    found = []
    for numbers in torch.arange(len(prompts)).split(subject.batch_size):
        ids, mask = pad([prompts[i].ids for i in numbers], subject.model.device)
        if around is None:
            found.append(margin(asked.labels)(next_logits(subject.model, ids, mask)))
        else:
            with around(numbers):
                found.append(margin(asked.labels)(next_logits(subject.model, ids, mask)))
    return torch.cat(found).cpu()
