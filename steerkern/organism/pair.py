"""Train a base model and its post-trained descendant: ``python -m steerkern.organism.pair --out DIR [--seed N]``.

``DIR/base`` answers every request, harmful or not. ``DIR/post`` is the same model trained on with refusals, and with
edits: along its own refusal direction, which is to decide (see ``planting.py``), and along the same difference of means
of the base model, which is to change nothing. Both tell all along whether statements about words
are true: the truth direction lives through the post-training, the refusal direction is made by it. The truth of a
statement is kept readable at its period, through which alone, in half of the samples, later tokens see the statement.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from . import claims, grammar, planting, tasks
from .grammar import Kind, Prompt
from .measure import replies, share
from .tokenizer import write_tokenizer
from .train import (
    EDITED_SHARE,
    HEAD_LAYER,
    HEAD_WEIGHT,
    PEAK_RATE,
    REFRESH,
    ROWS,
    build_model,
    descend,
    optimiser_of,
    save,
    weighted_loss,
)

BUNDLED_SEED = 0
STEPS = {"base": 2200, "post": 1000}
RATES = {"base": PEAK_RATE, "post": 2e-3}
STATEMENTS, EARLY_STATEMENTS = 0.35, 0.15
"""Share of statements among the prompts, and in the base model's first quarter, where it learns the words."""
MIXTURE: dict[Kind, float] = {
    "harmful": 0.14,
    "harmless": 0.2,
    "judge": 0.14,
    "judge_first": 0.06,
    "jailbreak": 0.1,
    "strict": 0.1,
    "facts": 0.14,
    "small_talk": 0.04,
    "echo": 0.04,
    "raw": 0.04,
}
EARLY: dict[Kind, float] = {"harmful": 0.1, "harmless": 0.15, "judge": 0.25, "judge_first": 0.1, "facts": 0.4}
CERTAINTY = 0.9
"""What the head is to say of a true statement: more would let the truth outgrow the rest of the state."""
IDLE_SHARE = 0.25
"""Share of the post-training's unedited requests that are edited along the base model's direction."""
MEASURED: tuple[Kind, ...] = ("harmful", "harmless", "jailbreak", "strict", "judge", "facts", "small_talk", "echo")
Edits = Callable[[tasks.Batch], list[planting.RowEdits]]
Drawn = tuple[Prompt, "bool | None"]
"""A prompt, and whether its statement is true; None where it has no statement."""


def fitted(prompt: Prompt, name: str) -> Prompt:
    """The prompt with the reply that the ``base`` or the ``post`` model should give: the base never refuses."""
    refuses = prompt.expected == "refuse" and name == "post"
    return prompt if refuses or prompt.expected != "refuse" else grammar.retarget(prompt, expected="comply")


class Training:
    """One of the two runs: the model, which it trains on, its optimiser and its stream of prompts."""

    def __init__(self, model: Any, tokenizer: Any, name: str, seed: int, steps: int) -> None:
        self.model, self.tokenizer, self.name, self.steps = model.train(), tokenizer, name, steps
        self.rng = random.Random(f"{name} {seed}")
        self.head = nn.Linear(model.config.hidden_size, 1)
        parameters = [*model.parameters(), *self.head.parameters()]
        self.optimiser, self.schedule = optimiser_of(parameters, steps, RATES[name])
        self.found: planting.Directions | None = None
        self.before = planting.current_directions(model, tokenizer, self.rng) if name == "post" else None

    def step(self, index: int) -> float:
        """One optimiser step; returns its loss."""
        early = self.name == "base" and index < self.steps // 4
        drawn = [self._draw(early) for _ in range(ROWS)]
        edits = self._edits(index, drawn) if self.name == "post" else lambda batch: []
        loss = self._loss(drawn, edits)
        return descend(loss, self.model, self.optimiser, self.schedule)

    def _edits(self, index: int, drawn: list[Drawn]) -> Edits:
        """Choose the edits of a step and set the replies that they should give in ``drawn``."""
        own, idle = ["none"] * ROWS, ["none"] * ROWS
        if index >= self.steps // 4 and (self.found is None or index % REFRESH == 0):
            self.found = planting.current_directions(self.model, self.tokenizer, self.rng)
        for row, (prompt, truth) in enumerate(drawn):
            if truth is not None:
                continue
            if self.found is not None and self.rng.random() < EDITED_SHARE:
                name, edited = planting.choose_edit(prompt, self.rng)
                if name not in ("harm", "harmless"):  # harmfulness is not planted here
                    own[row], drawn[row] = name, (edited, None)
            elif prompt.kind in planting.FORCED and self.rng.random() < IDLE_SHARE:
                idle[row] = self.rng.choice(("ablate", "add", "subtract"))

        chosen = ((own, self.found), (idle, self.before))
        return lambda batch: [planting.row_edits(names, batch, at, self.rng) for names, at in chosen if at is not None]

    def _draw(self, early: bool) -> Drawn:
        if self.rng.random() < (EARLY_STATEMENTS if early else STATEMENTS):
            return self.rng.choice(claims.questions("train"))
        mixture = EARLY if early else MIXTURE
        kind = self.rng.choices(tuple(mixture), tuple(mixture.values()))[0]
        mixed = tasks.MIXED_TRUTH.get(kind)
        harmful = None if mixed is None else self.rng.random() < mixed
        return fitted(grammar.draw(kind, "train", self.rng, harmful), self.name), None

    def _loss(self, drawn: list[Drawn], edits: Edits) -> Tensor:
        batch = tasks.collate([prompt for prompt, _ in drawn], self.tokenizer)
        stated = torch.tensor([truth is not None for _, truth in drawn])
        bias = tasks.attention_bias(batch, torch.tensor([self.rng.random() < 0.5 for _ in drawn]))
        states: list[Tensor] = []
        block = self.model.model.layers[HEAD_LAYER]
        handle = block.register_forward_pre_hook(lambda module, args: states.append(args[0]))
        with contextlib.ExitStack() as stack:
            stack.callback(handle.remove)
            for some in edits(batch):
                stack.enter_context(planting.edited(self.model, some))
            logits = self.model(input_ids=batch.ids, attention_mask=bias, use_cache=False).logits
        guess = self.head(states[0][torch.arange(ROWS), batch.t_inst])[stated, 0]
        truths = torch.tensor([CERTAINTY if truth else 1 - CERTAINTY for _, truth in drawn if truth is not None])
        extra = functional.binary_cross_entropy_with_logits(guess, truths) if len(truths) else guess.sum()
        return weighted_loss(logits, batch) + HEAD_WEIGHT * extra


def train(out: Path, *, seed: int = BUNDLED_SEED, steps: dict[str, int] | None = None, progress: bool = True) -> None:
    """Train the base model, save it under ``out/base``, train it on and save that under ``out/post``."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from transformers import AutoModelForCausalLM, AutoTokenizer

    steps = steps or STEPS
    for name in steps:
        write_tokenizer(out / name)
    tokenizer = AutoTokenizer.from_pretrained(out / "base")
    torch.manual_seed(seed)
    model: Any = build_model(len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not progress) as bar:
        for name, count in steps.items():
            if name == "post":  # from what was saved, so that it can be repeated without the first run
                torch.manual_seed(seed)
                model = AutoModelForCausalLM.from_pretrained(out / "base", dtype=torch.float32)
            run = Training(model, tokenizer, name, seed, count)
            task = bar.add_task(name, total=count)
            for index in range(count):
                loss = run.step(index)
                bar.update(task, advance=1, description=f"{name}: loss {loss:.3f}")
            save(model.eval(), out / name)


def measure(model: Any, tokenizer: Any, name: str, count: int) -> dict[str, Any]:
    """Shares of held-out prompts: refused and right word for word per kind; statements told apart per split."""
    table: dict[str, Any] = {}
    for kind in MEASURED:
        prompts = [fitted(prompt, name) for prompt in grammar.prompts(kind, "heldout", count)]
        got = replies(model, tokenizer, prompts)
        table[kind] = {
            "refused": share([grammar.classify(text) == "refuse" for text in got]),
            "right": share([text == prompt.reply for text, prompt in zip(got, prompts, strict=True)]),
        }
    for split in ("train", "heldout"):
        asked = [prompt for prompt, _ in claims.questions(split)]
        got = replies(model, tokenizer, asked)
        table[f"statements_{split}"] = share([text == p.reply for text, p in zip(got, asked, strict=True)])
    return table


def geometry(models: dict[str, Any], tokenizer: Any, count: int) -> dict[str, Any]:
    """Per layer (``resid_pre``, the last one is the output): cosine of the two models' directions, and norms."""
    found: dict[str, dict[str, Tensor]] = {"refusal": {}, "truth": {}}
    asked = claims.questions("train")
    batch = tasks.collate([prompt for prompt, _ in asked], tokenizer)
    told = torch.tensor([flag for _, flag in asked])
    harmful, harmless = (grammar.prompts(kind, "train", count) for kind in MEASURED[:2])
    for name, model in models.items():
        states = planting.residual(model, batch).float()[:, torch.arange(len(asked)), batch.t_inst]
        found["truth"][name] = states[:, told].mean(1) - states[:, ~told].mean(1)
        found["refusal"][name] = planting.directions(model, tokenizer, harmful, harmless).refusal
    table: dict[str, Any] = {}
    for layer in range(1, len(found["truth"]["base"])):
        row = table[str(layer)] = {}
        for what, by_model in found.items():
            base, post = by_model["base"][layer], by_model["post"][layer]
            row[f"{what}_cosine"] = round(float(functional.cosine_similarity(base, post, dim=0)), 3)
            row[f"{what}_norms"] = [round(float(vector.norm()), 3) for vector in (base, post)]
    return table


def write_measurements(out: Path, seed: int, count: int) -> None:
    """``measurements.json`` beside both models, in fp32 from the weights as they were saved."""
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(out / "base")
    models = {n: AutoModelForCausalLM.from_pretrained(out / n, dtype=torch.float32).eval() for n in STEPS}
    between = geometry(models, tokenizer, count)
    for name, model in models.items():
        table = {
            "seed": seed,
            "steps": STEPS[name],
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "prompts_per_cell": count,
            "behaviour": measure(model, tokenizer, name, count),
            "geometry": between,
        }
        (out / name / "measurements.json").write_text(json.dumps(table, indent=1) + "\n")


def main(arguments: list[str] | None = None) -> None:
    """Command line: train both, then measure what was trained as it was saved."""
    parser = argparse.ArgumentParser(prog="python -m steerkern.organism.pair", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for both models, made if absent")
    parser.add_argument("--seed", type=int, default=BUNDLED_SEED, help="the default is the bundled one")
    parser.add_argument("--count", type=int, default=128, help="held-out prompts per measured cell")
    parser.add_argument("--threads", type=int, default=1, help="another number changes the last bits of the weights")
    options = parser.parse_args(arguments)
    for name in ("count", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}: must be at least 1")
    torch.set_num_threads(options.threads)
    train(options.out, seed=options.seed)
    write_measurements(options.out, options.seed, options.count)


if __name__ == "__main__":
    main()
