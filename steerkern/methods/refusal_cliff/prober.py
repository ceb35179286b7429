"""The prober: one linear score of ``final_norm`` that says whether the model is about to refuse."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...extraction.capture import pad
from ...runtime.decoder import find_decoder
from ...subject import Subject
from .traces import Trace

MOST = 200
"""Items of a class."""
VALIDATION = 0.2
RATE, ROWS, EPOCHS = 1e-3, 64, 5
"""The published training: Adam's rate, rows of a step, and epochs, of which the best on validation counts."""


@dataclass(frozen=True, eq=False)
class Probe:
    """``I = sigmoid(<w, h> + b)`` of ``final_norm`` states, and how it was fitted.

    Attributes:
        weight: ``w [H]`` float32.
        bias: ``b``.
        accuracy: on the validation items, 0 to 1.
        count: items of each class, validation included.
    """

    weight: Tensor
    bias: float
    accuracy: float
    count: int

    def score(self, states: Tensor) -> Tensor:
        """Refusal scores ``[...]`` of states ``[..., H]``."""
        return torch.sigmoid(states.float() @ self.weight.to(states.device) + self.bias)


def final_norm(subject: Subject, traces: Sequence[Trace]) -> Iterator[tuple[int, Tensor]]:
    """Number and ``final_norm [S, H]`` of each trace, at every token, in one teacher-forced pass.

    That is ``hidden_states[L]`` of transformers: the last block's output behind the last norm.
    """
    decoder, _ = find_decoder(subject.model)
    device = next(decoder.parameters()).device
    order = sorted(range(len(traces)), key=lambda i: -len(traces[i].ids))
    for start in range(0, len(order), subject.batch_size):
        some = order[start : start + subject.batch_size]
        ids, mask = pad([traces[i].ids for i in some], device)
        with torch.no_grad():
            states = decoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        for row, i in enumerate(some):
            yield i, states[row, : len(traces[i].ids)]


def scores(subject: Subject, traces: Sequence[Trace], probe: Probe) -> list[Tensor]:
    """``I_j [S]`` at every token of each trace."""
    found = {i: probe.score(states).cpu() for i, states in final_norm(subject, traces)}
    return [found[i] for i in range(len(traces))]


def fit(
    subject: Subject, refused: Sequence[Trace], answered: Sequence[Trace], *, published: bool = False, seed: int = 0
) -> Probe:
    """Logistic regression at the last token of the marker; classes of equal size, a fifth of each for validation.

    ``published`` is the released training (Adam, features as they are, few steps); the other is fitted to the end.

    Raises:
        ValueError: a class with fewer than 5 items.
    """
    for name, traces in (("refused harmful", refused), ("answered harmless", answered)):
        if len(traces) < 5:
            raise ValueError(f"a prober needs two classes of at least 5 items: there are {len(traces)} {name} prompts")
    chance = torch.Generator().manual_seed(seed)
    count = min(len(refused), len(answered), MOST)
    sides = [[side[i] for i in torch.randperm(len(side), generator=chance)[:count]] for side in (refused, answered)]
    found = {i: h[-1].float().cpu() for i, h in final_norm(subject, [*sides[0], *sides[1]])}
    states = torch.stack([found[i] for i in range(2 * count)])
    labels = torch.cat([torch.ones(count), torch.zeros(count)])
    held = torch.arange(2 * count) % count < max(1, round(VALIDATION * count))
    train = _adam if published else _regression
    weight, bias = train(states[~held], labels[~held], states[held], labels[held], chance)
    return Probe(weight, bias, _accuracy(states[held] @ weight + bias, labels[held]), count)


def _regression(
    states: Tensor, labels: Tensor, held: Tensor, held_labels: Tensor, chance: torch.Generator
) -> tuple[Tensor, float]:
    from sklearn.linear_model import LogisticRegression

    found = LogisticRegression(max_iter=2000).fit(states.double().numpy(), labels.numpy())
    return torch.from_numpy(found.coef_[0]).float(), float(found.intercept_[0])


def _adam(
    states: Tensor, labels: Tensor, held: Tensor, held_labels: Tensor, chance: torch.Generator
) -> tuple[Tensor, float]:
    layer = nn.Linear(states.shape[1], 1)
    bound = states.shape[1] ** -0.5
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(-bound, bound, generator=chance)
    optimiser = torch.optim.Adam(layer.parameters(), lr=RATE)
    best: tuple[float, Tensor, float] | None = None
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(states), generator=chance).split(ROWS):
            optimiser.zero_grad()
            loss = functional.binary_cross_entropy_with_logits(layer(states[rows])[:, 0], labels[rows])
            torch.autograd.backward(loss)
            optimiser.step()
        weight, bias = layer.weight.detach()[0].clone(), float(layer.bias.detach())
        accuracy = _accuracy(held @ weight + bias, held_labels)
        if best is None or accuracy >= best[0]:
            best = (accuracy, weight, bias)
    assert best is not None
    return best[1], best[2]


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return float(((logits > 0) == (labels > 0)).float().mean())
