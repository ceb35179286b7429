"""TransformerLens: a bridge over the model's modules, with a hook point at the output of each block."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from .adapter import Adapter, Change, Inputs, Rows, Steered, change, layers_of, tokenizer


@contextlib.contextmanager
def steer(model: Any, rows: Rows) -> Iterator[Steered]:
    """``TransformerBridge`` with ``hooks`` around its own ``generate``."""
    from transformer_lens.model_bridge import TransformerBridge

    head = model.lm_head
    bridge = TransformerBridge.boot_transformers("llama", hf_model=model, tokenizer=tokenizer())
    hooks = [(f"blocks.{layer}.hook_out", _hook(change(rows, layer))) for layer in layers_of(rows)]

    def run(inputs: Inputs, tokens: int) -> None:
        bridge.generate(
            inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=tokens,
            do_sample=False,
            stop_at_eos=False,
            verbose=False,
        )

    with bridge.hooks(fwd_hooks=hooks):
        yield Steered(model, run, head)


def _hook(edit: Change) -> Callable[..., Tensor]:
    return lambda h, hook: edit(h)


ADAPTER = Adapter(
    "TransformerLens", ("add", "ablate", "clamp", "rank 4"), steer, package="transformer-lens", per_row=True
)
