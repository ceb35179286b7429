"""What a trained controller does on prompts that it was not trained on, beside two controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import refusal
from ..plan import Plan
from ..replies import replies
from ..runtime.session import steer
from .activations import cache_states, rendered_for
from .network import Controller
from .recipe import SITE, Prompts, Trained
from .training import Progress, silent

SCALES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Of the plan, in the curve that compares the allocations at strengths where they differ."""
LEARNED, UNIFORM, SHUFFLED = "learned w", "w = 1/2", "shuffled w"


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Held-out results.

    Attributes:
        strengths: ``s [N]`` per set of prompts.
        weights: mean ``w [L]`` per set.
        stock: share of each set that the unsteered model refuses.
        refused: the same under the plan, per allocation of the layer weights (learned, 1/2, shuffled).
        kept: share of each set whose reply is the stock model's, word for word, per allocation.
        curve: share of :attr:`target` refused at each of :data:`SCALES`, per allocation.
        backend: that the session ran on.
        target: the set that the controller is for: jailbroken prompts where there are any, else harmful ones.
    """

    strengths: Mapping[str, Tensor]
    weights: Mapping[str, Tensor]
    stock: Mapping[str, float]
    refused: Mapping[str, Mapping[str, float]]
    kept: Mapping[str, Mapping[str, float]]
    curve: Mapping[str, tuple[float, ...]]
    backend: str
    target: str


def evaluate(
    model: Any,
    tokenizer: Any,
    trained: Trained,
    heldout: Prompts,
    *,
    scorer: str = "prefix",
    max_new_tokens: int = 16,
    batch_size: int = 16,
    seed: int = 0,
    progress: Progress = silent,
) -> Evaluation:
    """Ask every held-out prompt of the stock model and under the plan, with the learned and two control allocations.

    The controls keep the strength ``s`` of each prompt: ``w = 1/2`` at every layer (the paper's "scalar only"), and the
    learned weights each at another layer.

    Raises:
        ValueError: no harmful or no harmless prompts, an unknown scorer, or prompts that the model cannot read.
    """
    sets = heldout.sets()
    if not {"harmful", "harmless"} <= set(sets):
        raise ValueError("held-out prompts of both sides are needed, harmful and harmless")
    refusal.get(scorer)
    rendered = {name: rendered_for(tokenizer, prompts) for name, prompts in sets.items()}
    controller = trained.controller
    scores = {}
    for name, some in rendered.items():
        states = cache_states(model, some, controller.reads, batch_size=batch_size, progress=False)
        with torch.no_grad():
            scores[name] = [part.cpu() for part in controller.scores(states.to(controller.output.weight.device))]
    allocations = {LEARNED: controller, UNIFORM: controller.uniform()}
    if len(controller.layers) > 1:
        allocations[SHUFFLED] = controller.shuffled(seed)
    target = "jailbroken" if "jailbroken" in sets else "harmful"
    whole = [prompt for some in rendered.values() for prompt in some]
    asked = len(whole) + len(allocations) * (len(whole) + (len(SCALES) - 1) * len(rendered[target]))

    with progress("asking held-out prompts", asked) as step:

        def ask(prompts: Sequence[Any]) -> list[str]:
            return replies(model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, step=step)

        def by_set(texts: list[str]) -> dict[str, list[str]]:
            rest = iter(texts)
            return {name: [next(rest) for _ in some] for name, some in rendered.items()}

        stock = by_set(ask(whole))
        refused, kept, curve = {}, {}, {}
        for label, weighed in allocations.items():
            with steer(model, _plan(trained, weighed)) as session:
                backend = session.backend
                found = by_set(ask(whole))
                shares = []
                for scale in SCALES[:-1]:
                    session.set(trained.plan.name, scale=scale)
                    shares.append(refusal.rate(scorer, ask(rendered[target])))
            refused[label] = {name: refusal.rate(scorer, texts) for name, texts in found.items()}
            curve[label] = (*shares, refused[label][target])
            kept[label] = {name: sum(map(str.__eq__, texts, stock[name])) / len(texts) for name, texts in found.items()}
    return Evaluation(
        {name: s for name, (s, _) in scores.items()},
        {name: w.mean(0) for name, (_, w) in scores.items()},
        {name: refusal.rate(scorer, texts) for name, texts in stock.items()},
        refused,
        kept,
        curve,
        backend,
        target,
    )


def _plan(trained: Trained, controller: Controller) -> Plan:
    """The trained plan under another controller."""
    tokens, name = trained.plan.steps[0].tokens, trained.plan.name
    return controller.plan(trained.vectors, trained.alpha, site=SITE, scope=tokens, name=name)
