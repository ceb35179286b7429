"""Which direction: candidates of every suffix token and layer, judged by bypass, induction and KL (2406.11717)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ...directions import Direction, Directions
from ...extraction import Prompt, means
from ...logits import divergence, log_odds, next_logprobs
from ...subject import Subject
from .constructions import ablation, addition

DEPTH, MAX_KL = 0.8, 0.1
SHARE = 0.1
"""A token begins refusals if at least this share of them begins with it."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """One direction and what it does to validation prompts.

    Attributes:
        position: of the token that it was read at, from the prompt's end.
        layer: of ``resid_pre``, read and written.
        direction: raw difference of means.
        bypass: mean refusal log-odds of harmful prompts with the direction ablated.
        induce: mean refusal log-odds of harmless prompts with it added.
        kl: of harmless prompts' next token, plain against ablated, in nats.
    """

    position: int
    layer: int
    direction: Direction
    bypass: float
    induce: float
    kl: float

    def allowed(self, depth: int) -> bool:
        """Whether the rule of selection admits it."""
        return self.induce > 0 and self.kl < MAX_KL and self.layer < DEPTH * depth


@dataclass(frozen=True, eq=False)
class Selection:
    """All candidates, the chosen one, and the tokens that refusals begin with."""

    candidates: tuple[Candidate, ...]
    chosen: Candidate
    tokens: tuple[int, ...]
    passed: bool
    """Whether the chosen one meets every condition; else it is the least bad."""


def refusal_tokens(subject: Subject, harmful: Sequence[Prompt], harmless: Sequence[Prompt]) -> tuple[int, ...]:
    """The tokens that refusals begin with: frequent as first token on harmful prompts, and never on harmless ones.

    The paper's sets are written by hand for each family; a wrong one silently spoils filter and selection.

    Raises:
        ValueError: both sides begin alike, so that the first token says nothing about refusal.
    """
    groups = [(None, subject.render(side)) for side in (harmful, harmless)]
    sides = [
        Counter(found.argmax(-1).tolist())
        for found in next_logprobs(subject.model, groups, batch_size=subject.batch_size)
    ]
    enough = SHARE * len(harmful)
    tokens = tuple(token for token, count in sides[0].most_common() if count >= enough and not sides[1][token])
    if not tokens:
        raise ValueError("replies to harmful and harmless prompts begin with the same token: no refusal score from it")
    return tokens


def select(
    subject: Subject,
    train: tuple[Sequence[Prompt], Sequence[Prompt]],
    check: tuple[Sequence[Prompt], Sequence[Prompt]],
) -> Selection:
    """Judge ``r[i, l]`` of every suffix token ``i`` and layer ``l``, and choose the smallest bypass that is allowed.

    Args:
        subject: the model.
        train: harmful and harmless prompts to read; those whose score contradicts their side are left out.
        check: harmful and harmless prompts to judge on.

    Raises:
        ValueError: no prompt of a side is left, or replies that begin alike.
    """
    tokens = refusal_tokens(subject, *train)
    kept = []
    for side, prompts in zip((1, -1), train, strict=True):
        (found,) = next_logprobs(subject.model, [(None, subject.render(prompts))], batch_size=subject.batch_size)
        scores = log_odds(found, tokens)
        kept.append([prompt for prompt, score in zip(prompts, scores.tolist(), strict=True) if side * score > 0])
        if not kept[-1]:
            raise ValueError(f"no {'harmful prompt is refused' if side > 0 else 'harmless prompt is answered'}")
    rendered = [subject.render(side) for side in check]
    suffix = min(prompt.n_suffix for prompt in rendered[0])
    positions = list(range(-max(suffix, 1), 0))
    read = means(
        subject.model,
        subject.tokenizer,
        *kept,
        positions=positions,
        batch_size=subject.batch_size,
        template=subject.template,
    )
    directions: dict[int, Directions] = {}
    for position in positions:
        contrast = read[position]
        directions[position] = contrast.directions("resid_pre", "refusal")
    places = [(position, layer) for position in positions for layer in directions[position]]
    made = _judge(subject, [(p, layer, directions[p][layer]) for p, layer in places], rendered, tokens)
    allowed = [candidate for candidate in made if candidate.allowed(subject.depth)]
    chosen = min(allowed or made, key=lambda candidate: candidate.bypass - (0 if allowed else candidate.induce))
    return Selection(tuple(made), chosen, tokens, bool(allowed))


def _judge(
    subject: Subject,
    places: Sequence[tuple[int, int, Direction]],
    rendered: Sequence[Sequence[object]],
    tokens: Sequence[int],
) -> list[Candidate]:
    harmful, harmless = rendered
    base = _ask(subject, [(None, harmless)])[0]
    made = []
    with subject.progress("judging directions", len(places)) as step:
        for position, layer, direction in places:
            removed, added = ablation(direction.unit), addition(direction, layer)
            open_, plain, shut = _ask(subject, [(removed, harmful), (removed, harmless), (added, harmless)])
            made.append(
                Candidate(
                    position,
                    layer,
                    direction,
                    float(log_odds(open_, tokens).mean()),
                    float(log_odds(shut, tokens).mean()),
                    float(divergence(base, plain).mean()),
                )
            )
            step(1)
    return made


def _ask(subject: Subject, groups: object) -> list[Tensor]:
    return next_logprobs(subject.model, groups, batch_size=subject.batch_size)  # type: ignore[arg-type]
