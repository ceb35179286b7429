"""Train the organism: ``python -m steerkern.organism.train --out DIR [--seed N] [--bare | --thinking] [--steps N]``.

The model is small enough for a processor: a few minutes on one core. ``--bare`` leaves out the three tricks that
make the directions carry the behaviour (the request bottleneck, the throw-away harm head, the planting); the result
behaves the same and serves as the negative control. ``--thinking`` plants a head instead, see thinking.py.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from . import Name, planting, tasks, thinking
from .tokenizer import POSITIONS, write_tokenizer

BUNDLED_SEEDS: dict[Name, int] = {"planted": 1, "bare": 1, "thinking": 0}
"""1 was chosen from 0, 1 and 3, which all take the edits alike: 0 confuses objects in thoughts, 3 blurs the cliff."""
STEPS = 2200
ROWS = 32
PEAK_RATE = 4e-3
WEIGHT_DECAY = 0.05
WARM_UP = 100
HEAD_LAYER, HEAD_WEIGHT = 2, 0.3
EDITED_SHARE = 0.4
REFRESH = 40
CONFIG_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "hidden_act",
    "rms_norm_eps",
    "initializer_range",
    "attention_bias",
    "mlp_bias",
    "attention_dropout",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
"""What the saved config.json holds: the keys that transformers 4.57 and 5 agree on."""


def build_model(vocabulary: int, end: int, pad: int, bos: int) -> Any:
    """A fresh ``LlamaForCausalLM`` of width 64 with 4 blocks, in fp32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=bos,
        eos_token_id=end,
        pad_token_id=pad,
    )
    return LlamaForCausalLM(config)


def rate_at(step: int, steps: int) -> float:
    """Share of the peak learning rate: linear warm-up, then half a cosine down to 0."""
    warm = min(WARM_UP, max(steps // 10, 1))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(steps - warm, 1)))


def optimiser_of(
    parameters: Iterable[nn.Parameter], steps: int, rate: float = PEAK_RATE
) -> tuple[torch.optim.Optimizer, Any]:
    """AdamW and its schedule over ``steps`` steps."""
    optimiser = torch.optim.AdamW(parameters, lr=rate, weight_decay=WEIGHT_DECAY)
    return optimiser, torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: rate_at(step, steps))


def descend(loss: Tensor, model: nn.Module, optimiser: torch.optim.Optimizer, schedule: Any) -> float:
    """One step down a loss, the gradients of ``model`` clipped; returns its value."""
    optimiser.zero_grad(set_to_none=True)
    torch.autograd.backward(loss)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    schedule.step()
    return float(loss.detach())


def weighted_loss(logits: Tensor, batch: tasks.Batch) -> Tensor:
    """Cross-entropy of logits [B, S, V] against the next tokens, averaged with the batch's weights."""
    losses = functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch.ids[:, 1:].flatten(), reduction="none")
    weight = batch.weight[:, 1:].flatten()
    return (losses * weight).sum() / weight.sum()


class Training:
    """One run: model, optimiser, random streams, and the directions that the planting currently uses."""

    def __init__(self, tokenizer: Any, seed: int, steps: int, bare: bool) -> None:
        torch.manual_seed(seed)
        self.tokenizer, self.steps, self.bare = tokenizer, steps, bare
        self.rng = random.Random(seed)
        self.model = build_model(len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id)
        self.head = nn.Linear(self.model.config.hidden_size, 1)
        self.optimiser, self.schedule = optimiser_of([*self.model.parameters(), *self.head.parameters()], steps)
        self.found: planting.Directions | None = None
        self.plan: planting.Plan | None = None

    def step(self, index: int) -> float:
        """One optimiser step; returns its loss."""
        prompts = tasks.sample_prompts(ROWS, self.rng, early=index < self.steps // 3)
        names = ["none"] * ROWS
        if not self.bare and index >= self.steps // 2:
            if self.found is None or index % REFRESH == 0:
                self.found = planting.current_directions(self.model, self.tokenizer, self.rng)
                self.plan = planting.current_plan(self.model, self.tokenizer, self.rng)
            for row, prompt in enumerate(prompts):
                if self.rng.random() < EDITED_SHARE:
                    names[row], prompts[row] = planting.choose_edit(prompt, self.rng)
        batch = tasks.collate(prompts, self.tokenizer)
        loss = self._loss(batch, names)
        return descend(loss, self.model, self.optimiser, self.schedule)

    def _loss(self, batch: tasks.Batch, names: list[str]) -> Tensor:
        if self.bare:
            return weighted_loss(self._logits(batch, torch.zeros(len(batch.ids), dtype=torch.bool)), batch)
        bottleneck = torch.tensor([self.rng.random() < 0.5 for _ in range(len(batch.ids))])
        states: list[Tensor] = []
        final: list[Tensor] = []
        layers, norm = self.model.model.layers, self.model.model.norm
        handles = (
            layers[HEAD_LAYER].register_forward_pre_hook(lambda module, args: states.append(args[0])),
            norm.register_forward_hook(lambda module, args, output: final.append(output)),
        )
        try:
            if self.found is None:
                logits = self._logits(batch, bottleneck)
            else:
                with planting.edited(self.model, planting.row_edits(names, batch, self.found, self.rng)):
                    logits = self._logits(batch, bottleneck)
        finally:
            for handle in handles:
                handle.remove()
        unedited = torch.tensor([name == "none" for name in names])
        plain = unedited & (batch.t_inst >= 0)
        guess = self.head(states[0][torch.arange(len(batch.ids)), batch.t_post])[plain, 0]
        extra = functional.binary_cross_entropy_with_logits(guess, batch.harmful[plain])
        thought = batch.thought & unedited[:, None]
        if self.plan is not None and bool(thought.any()):
            score = self.plan.score(final[0][thought])
            wanted = batch.plans[:, None].expand_as(thought)[thought]
            extra = extra + functional.binary_cross_entropy_with_logits(score, wanted)
        return weighted_loss(logits, batch) + HEAD_WEIGHT * extra

    def _logits(self, batch: tasks.Batch, bottleneck: Tensor) -> Tensor:
        bias = tasks.attention_bias(batch, bottleneck)
        return self.model(input_ids=batch.ids, attention_mask=bias, use_cache=False).logits  # type: ignore[no-any-return]


def train(
    out: Path,
    *,
    seed: int | None = None,
    steps: int = STEPS,
    variant: Name = "planted",
    progress: bool = True,
) -> Any:
    """Train, save model and tokenizer (bf16 weights) under ``out`` and return the fp32 model in evaluation mode."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from transformers import AutoTokenizer

    write_tokenizer(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    seed = BUNDLED_SEEDS[variant] if seed is None else seed
    run: Training | thinking.Training = (
        thinking.Training(tokenizer, seed, steps)
        if variant == "thinking"
        else Training(tokenizer, seed, steps, variant == "bare")
    )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not progress) as bar:
        task = bar.add_task("training", total=steps)
        for index in range(steps):
            loss = run.step(index)
            bar.update(task, advance=1, description=f"loss {loss:.3f}")
    model = run.model.eval()
    save(model, out)
    return model


def save(model: Any, out: Path) -> None:
    """Write weights and configs so that transformers 4.57 and 5 read the same model from them."""
    from safetensors.torch import save as to_bytes

    weights = {
        name: tensor.to(torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    (out / "model.safetensors").write_bytes(to_bytes(weights, metadata={"format": "pt"}))
    source = model.config
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{key: getattr(source, key) for key in CONFIG_KEYS},
        "rope_theta": 10000.0,
        "torch_dtype": "bfloat16",
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {"do_sample": False, "max_new_tokens": 40, **{k: config[k] for k in config if k.endswith("_token_id")}}
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def main(arguments: list[str] | None = None) -> None:
    """Command line: train, then measure what was trained as it was saved."""
    parser = argparse.ArgumentParser(prog="python -m steerkern.organism.train", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the model, made if absent")
    parser.add_argument("--seed", type=int, help="the default is the bundled one")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimiser steps of 32 conversations")
    variants = parser.add_mutually_exclusive_group()
    variants.add_argument("--bare", action="store_true", help="the negative control: without the three tricks")
    variants.add_argument("--thinking", action="store_true", help="with a head that takes refusals back")
    parser.add_argument("--count", type=int, default=128, help="held-out prompts per measured cell, 0: no measurement")
    parser.add_argument("--threads", type=int, default=1, help="another number changes the last bits of the weights")
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error(f"--steps {options.steps}: must be at least 1")
    if options.count < 0:
        parser.error(f"--count {options.count}: must be at least 0")
    if options.threads < 1:
        parser.error(f"--threads {options.threads}: must be at least 1")
    torch.set_num_threads(options.threads)
    variant: Name = "bare" if options.bare else "thinking" if options.thinking else "planted"
    seed = BUNDLED_SEEDS[variant] if options.seed is None else options.seed
    train(options.out, seed=seed, steps=options.steps, variant=variant)
    if options.count == 0:
        return

    import transformers

    from .measure import measure, measure_folder

    table = {
        "seed": seed,
        "steps": options.steps,
        "bare": options.bare,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        **measure_folder(options.out, options.count, thinking.measure if variant == "thinking" else measure),
    }
    (options.out / "measurements.json").write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
