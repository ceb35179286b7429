"""From prompts to a trained controller and the plan that it weighs, by one of the presets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import refusal
from ..decisions import Read
from ..extraction import Prompt, Rendered, extract
from ..extraction.capture import check_prompts
from ..plan import Plan
from ..replies import replies
from ..vectors import finite
from .activations import cache_states, fingerprint, rendered_for, without_header
from .network import Controller
from .outcome import SCOPES, OutcomeObjective, example
from .phrases import REFUSALS, refusal_vector
from .presets import OUTCOME, Preset
from .training import History, Objective, Progress, check_counts, score_objective, silent, train

SITE = "resid_post"


@dataclass(frozen=True, eq=False)
class Prompts:
    """What a controller is trained on, or judged by: prompts to refuse and prompts to leave alone.

    ``jailbroken`` are harmful prompts that the model answers: with the ``harmful`` ones they are one side of the
    training, but no part of a difference of means. ``decoys`` are their harmless counterparts, which look like them;
    without any, a controller may learn the look.
    """

    harmful: Sequence[Prompt]
    harmless: Sequence[Prompt]
    jailbroken: Sequence[Prompt] = ()
    decoys: Sequence[Prompt] = ()

    def __post_init__(self) -> None:
        up, down = self.sides()
        both = set(map(repr, up)) & set(map(repr, down))
        if both:
            raise ValueError(f"{len(both)} prompts stand on both sides, to refuse and to leave alone")

    def sides(self) -> tuple[list[Prompt], list[Prompt]]:
        """All prompts to refuse, and all to leave alone."""
        return [*self.harmful, *self.jailbroken], [*self.harmless, *self.decoys]

    def sets(self) -> dict[str, Sequence[Prompt]]:
        """The sets that are not empty, by name."""
        named = {"harmful": self.harmful, "jailbroken": self.jailbroken}
        named |= {"harmless": self.harmless, "decoys": self.decoys}
        return {name: prompts for name, prompts in named.items() if prompts}


@dataclass(frozen=True, eq=False)
class Trained:
    """A controller, the plan that it weighs, and how it was trained; ``vectors`` are ``d_l [H]`` without alpha."""

    controller: Controller
    plan: Plan
    vectors: Mapping[int, Tensor]
    alpha: float
    preset: Preset
    history: History


def train_controller(
    model: Any,
    tokenizer: Any,
    prompts: Prompts,
    preset: Preset = OUTCOME,
    *,
    alpha: float | None = None,
    scope: str | None = None,
    refusal_text: str | None = None,
    max_new_tokens: int = 16,
    batch_size: int = 16,
    validation: float = 0.15,
    patience: int = 3,
    seed: int = 0,
    cache: Path | None = None,
    name: str = "guided",
    progress: Progress = silent,
) -> Trained:
    """Cache what the controller reads, train it by the preset, and make the plan ``h += alpha s w_l d_l``.

    Args:
        model: a transformers decoder-only model; it is frozen, and as it was afterwards.
        tokenizer: its fast tokenizer.
        prompts: both sides; the shorter one is repeated.
        preset: :data:`~steerkern.controller.presets.PAPER`, ``CODE`` or ``OUTCOME``, or one of your own.
        alpha: global strength; the preset's if None.
        scope: of the plan; the preset's if None. The outcome loss is taken under it.
        refusal_text: what a refused prompt is to be answered (outcome loss); if None the model's own refusal, where it
            refuses, and its commonest one elsewhere.
        max_new_tokens: length of the stock model's replies that the outcome loss looks at.
        batch_size: prompts per forward of the stock model.
        validation: share of each side that only tells when to stop.
        patience: epochs without a lower loss before that.
        seed: of initial weights, split and batches; equal seeds give equal bits on the CPU.
        cache: folder for the states, as safetensors; None keeps them in memory.
        name: of the plan.
        progress: ``with progress(label, total) as step``.

    Raises:
        ValueError: fewer than two prompts on a side, prompts that the model cannot read, or states with NaN or Inf.
    """
    up, down = prompts.sides()
    check_counts((len(up), len(down)))
    where = preset.scope if scope is None else scope
    if preset.loss == "outcome" and where not in SCOPES:
        raise ValueError(f"the outcome loss takes scope {' or '.join(SCOPES)}, got {where!r}")
    rendered = (rendered_for(tokenizer, up), rendered_for(tokenizer, down))
    for prompt in rendered:
        check_prompts(model, prompt)
    strength = finite(preset.alpha if alpha is None else alpha, "alpha", nonzero=True)
    controller = _untrained(model, preset, seed)
    vectors = _vectors(model, tokenizer, prompts, preset, batch_size)
    plan = controller.plan(vectors, strength, site=SITE, scope=where, name=name)
    states = _states(model, tokenizer, rendered, controller, preset, batch_size, cache)
    objective: Objective
    if preset.loss == "outcome":
        texts = _replies(model, tokenizer, rendered, refusal_text, max_new_tokens, batch_size, progress)
        examples = (
            [example(prompt, reply, tokenizer, model) for prompt, reply in zip(rendered[0], texts[0], strict=True)],
            [example(prompt, reply, tokenizer, model) for prompt, reply in zip(rendered[1], texts[1], strict=True)],
        )
        scaled = {layer: strength * vector for layer, vector in vectors.items()}
        objective = OutcomeObjective(model, controller, examples, states, scaled, SITE, where)
    else:
        objective = score_objective(controller, states, preset)
    history = train(
        controller,
        objective,
        (len(up), len(down)),
        preset,
        validation=validation,
        patience=patience,
        seed=seed,
        progress=progress,
    )
    controller.record_training(
        {
            "preset": asdict(preset),
            "alpha": strength,
            "scope": where,
            "seed": seed,
            "prompts": {name: len(some) for name, some in prompts.sets().items()},
            "history": history.to_json(),
        }
    )
    return Trained(controller, plan, vectors, strength, preset, history)


def _untrained(model: Any, preset: Preset, seed: int) -> Controller:
    found = fingerprint(model)
    return Controller(
        [Read(layer, SITE) for layer in preset.read_layers(found.layers)],
        range(found.layers),
        found.width,
        hidden=preset.hidden,
        layer_norm=preset.layer_norm,
        weights=preset.weights,
        every_token=preset.every_token,
        model=found,
        seed=seed,
    ).to(next(model.parameters()).device)


def _states(
    model: Any,
    tokenizer: Any,
    rendered: tuple[list[Rendered], list[Rendered]],
    controller: Controller,
    preset: Preset,
    batch_size: int,
    cache: Path | None,
) -> tuple[Tensor, Tensor]:
    def read(name: str, side: list[Rendered]) -> Tensor:
        return cache_states(
            model,
            side if preset.header else without_header(tokenizer, side),
            controller.reads,
            file=None if cache is None else cache / f"{name}.safetensors",
            batch_size=batch_size,
            label=f"reading {name} prompts",
        )

    return read("harmful", rendered[0]), read("harmless", rendered[1])


def _vectors(model: Any, tokenizer: Any, prompts: Prompts, preset: Preset, batch_size: int) -> dict[int, Tensor]:
    depth = fingerprint(model).layers
    if preset.vectors != "means":
        vector = refusal_vector(model, tokenizer, weights=preset.vectors)
        return dict.fromkeys(range(depth), vector)
    template = "chat" if getattr(tokenizer, "chat_template", None) else "plain"
    found = extract(
        model, tokenizer, prompts.harmful, prompts.harmless, site=SITE, batch_size=batch_size, template=template
    )
    return {layer: direction.raw for layer, direction in found.items()}


def _replies(
    model: Any,
    tokenizer: Any,
    rendered: Sequence[Sequence[Rendered]],
    text: str | None,
    max_new_tokens: int,
    batch_size: int,
    progress: Progress,
) -> list[list[str]]:
    """The reply that each prompt is to get: a refusal on the harmful side, the stock model's own on the other."""
    asked = rendered[1:] if text is not None else rendered
    found = []
    with progress("replies of the stock model", sum(map(len, asked))) as step:
        for side in asked:
            found.append(
                replies(model, tokenizer, side, max_new_tokens=max_new_tokens, batch_size=batch_size, step=step)
            )
    empty = [i for i, reply in enumerate(found[-1]) if not reply.strip()]
    if empty:
        raise ValueError(f"harmless prompt {empty[0]}: the stock model says nothing, so there is nothing to keep")
    if text is not None:
        return [[text] * len(rendered[0]), found[0]]
    refused = refusal.score("prefix", found[0])
    own = Counter(reply for reply, no in zip(found[0], refused, strict=True) if no)
    usual = own.most_common(1)[0][0] if own else REFUSALS[0]
    return [[reply if no else usual for reply, no in zip(found[0], refused, strict=True)], found[1]]
