"""The outcome loss: the layer weights learn from what the steered model would say.

The published losses leave the layer weights where they were drawn. Here the loss is that of the replies, carried back
through the frozen model and the edits ``h += alpha * s * w_l * d_l`` to every output of the controller.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import PlanError
from ..extraction import Rendered
from ..extraction.capture import check_prompts, pad
from .injection import frozen, injected
from .network import Controller

SCOPES = ("decode", "reply")


class Example(NamedTuple):
    """Token ids of a prompt and of the reply that it is to get."""

    prompt: tuple[int, ...]
    reply: tuple[int, ...]


def example(prompt: Rendered, reply: str, tokenizer: Any, model: Any) -> Example:
    """A prompt with a reply, closed by the model's first end-of-text token.

    Raises:
        ValueError: a reply without tokens, or more tokens than the model has positions.
    """
    ids = list(tokenizer(reply, add_special_tokens=False)["input_ids"])
    if not ids:
        raise ValueError(f"the reply {reply!r} has no tokens")
    ends = model.generation_config.eos_token_id
    first = next(iter(ends), None) if isinstance(ends, (list, tuple)) else ends
    ids += [] if first is None else [int(first)]
    whole = Rendered(prompt.text + reply, (*prompt.ids, *ids), prompt.t_first, prompt.t_inst)
    try:
        check_prompts(model, [whole])
    except ValueError as error:
        raise ValueError(f"with its reply, {error}") from None
    return Example(prompt.ids, tuple(ids))


@dataclass(frozen=True)
class OutcomeObjective:
    """``1/2 mean -log p(refusal | harmful) + 1/2 mean KL(stock | steered) (harmless) + penalty * mean (s w)^2``.

    Log-probabilities and divergences are sums over the tokens of a reply, which is teacher-forced; ``p`` is the steered
    model's. The last term, over the gains of both sides, prefers the weakest edit that does it.

    Args:
        model: frozen; runs in evaluation mode.
        controller: gets the gradients.
        examples: harmful prompts with the refusal that each is to get, and harmless ones with the stock model's reply.
        states: what the controller reads of them, ``[N, R, H]`` each.
        directions: ``alpha * d_l [H]`` per layer that the controller weighs.
        site: ``resid_pre`` or ``resid_post``.
        scope: ``decode``, or ``reply`` to steer the last prompt token too.
        penalty: on the squared gains.

    Raises:
        ValueError: another scope, states or directions that do not fit.
    """

    model: Any
    controller: Controller
    examples: tuple[Sequence[Example], Sequence[Example]]
    states: tuple[Tensor, Tensor]
    directions: Mapping[int, Tensor]
    site: str = "resid_post"
    scope: str = "reply"
    penalty: float = 0.01

    def __post_init__(self) -> None:
        if self.scope not in SCOPES:
            raise ValueError(f"a controller is trained with scope {' or '.join(SCOPES)}, got {self.scope!r}")
        for side, seen in zip(self.examples, self.states, strict=True):
            if len(side) != len(seen):
                raise ValueError(f"{len(side)} examples need states of as many prompts, got {len(seen)}")
        missing = sorted(set(self.controller.layers) - set(self.directions))
        if missing:
            raise PlanError(f"layer {missing[0]}: the controller weighs it, and there is no direction for it")

    def __call__(self, up: Tensor, down: Tensor) -> Tensor:
        """The loss of the harmful prompts ``up [b]`` and the harmless prompts ``down [b]``."""
        learning = torch.is_grad_enabled()
        with frozen(self.model), torch.set_grad_enabled(learning):
            device = next(self.model.parameters()).device
            gains = [
                self.controller.gains(side[batch].to(device), grad=learning)
                for side, batch in zip(self.states, (up, down), strict=True)
            ]
            refuse, answer = (
                _Batch.of([side[i] for i in batch.tolist()], device)
                for side, batch in zip(self.examples, (up, down), strict=True)
            )
            wanted = functional.cross_entropy(
                self._logits(refuse, gains[0]).transpose(1, 2), refuse.targets, ignore_index=-1, reduction="sum"
            )
            with torch.no_grad():
                stock = self._logits(answer, None).log_softmax(-1)
            steered = self._logits(answer, gains[1]).log_softmax(-1)
            apart = (stock.exp() * (stock - steered)).sum(-1)[answer.targets >= 0].sum()
            size = torch.cat(gains).square().mean()
            return 0.5 * wanted / len(up) + 0.5 * apart / len(down) + self.penalty * size

    def _logits(self, batch: _Batch, gains: Tensor | None) -> Tensor:
        """Logits ``[B, C, V]``, float32, at the columns that predict the replies."""
        steering: Any = nullcontext()
        if gains is not None:
            deltas = {
                layer: gains[:, i, None] * self.directions[layer].to(gains)
                for i, layer in enumerate(self.controller.layers)
            }
            mask = batch.decode | batch.last if self.scope == "reply" else batch.decode
            steering = injected(self.model, deltas, mask, self.site)
        with steering:
            found = self.model(
                input_ids=batch.ids, attention_mask=batch.attended, use_cache=False, logits_to_keep=batch.columns
            )
        logits: Tensor = found.logits
        return logits.float()


class _Batch(NamedTuple):
    """Right-padded prompts with replies, ``[B, S]``; ``targets [B, C]`` are -1 where a column predicts no reply."""

    ids: Tensor
    attended: Tensor
    last: Tensor
    decode: Tensor
    columns: Tensor
    targets: Tensor

    @staticmethod
    def of(examples: Sequence[Example], device: torch.device) -> _Batch:
        ids, attended = pad([(*e.prompt, *e.reply) for e in examples], device)
        lengths = torch.tensor([len(e.prompt) for e in examples], device=device)[:, None]
        at = torch.arange(ids.shape[1], device=device)[None]
        last, decode = at == lengths - 1, (at >= lengths) & attended.bool()
        columns = torch.arange(int(lengths.min()) - 1, ids.shape[1] - 1, device=device)
        after = columns + 1
        targets = torch.where(decode[:, after], ids[:, after], -1)
        return _Batch(ids, attended, last, decode, columns, targets)
