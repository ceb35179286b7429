"""PEFT: the edit as a rank-1 LoRA on what attention and MLP write, the form in which weights are ablated.

``o' = o - v v^T o`` is a LoRA of ``W`` with ``A = v^T W`` and ``B = -v``. An addition is the bias of ``B``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .adapter import Adapter, Change, Edit, Inputs, Place, Rows, Steered, change, generate, kind_of, layers_of

WRITERS = {"add": ["down_proj"], "ablate": ["o_proj", "down_proj"], "rank 4": ["o_proj", "down_proj"]}


@contextlib.contextmanager
def steer(model: Any, rows: Rows) -> Iterator[Steered]:
    """An adapter per distinct edit; ``adapter_names`` gives each row of a batch its own."""
    import peft

    kind = kind_of(rows)
    names = ["__base__" if edit is None else f"p{i}" for i, edit in enumerate(rows)]
    config = peft.LoraConfig(
        r=4 if kind == "rank 4" else 1,
        lora_alpha=4 if kind == "rank 4" else 1,
        target_modules=WRITERS[kind],
        layers_to_transform=layers_of(rows),
        lora_bias=kind == "add",
    )
    edits = {name: edit for name, edit in zip(names, rows, strict=True) if edit is not None}
    first, *others = edits
    wrapped = peft.get_peft_model(model, config, adapter_name=first)
    for name in others:
        wrapped.add_adapter(name, config)
    for name, edit in edits.items():
        _write(wrapped, name, edit)
    wrapped.eval()
    per_row: dict[str, Any] = {"adapter_names": names} if len(rows) > 1 else {}

    def run(inputs: Inputs, tokens: int) -> None:
        generate(wrapped, inputs, tokens, **per_row)

    try:
        yield Steered(model, run)
    finally:
        wrapped.unload()


@torch.no_grad()
def _write(wrapped: Any, name: str, edit: Edit) -> None:
    blocks = wrapped.get_base_model().model.layers
    for layer, v in edit.vectors.items():
        for linear in _linears(blocks[layer], WRITERS[edit.kind]):
            a, b = linear.lora_A[name], linear.lora_B[name]
            if edit.kind == "add":
                a.weight.zero_()
                b.bias.copy_(edit.strength * v[0])
            else:
                a.weight.copy_(v @ linear.base_layer.weight)
                b.weight.copy_(-v.T)


def _linears(block: nn.Module, names: list[str]) -> list[Any]:
    return [module for name, module in block.named_modules() if name.rpartition(".")[2] in names]


def written(model: Any, rows: Rows) -> list[tuple[Place, Change]]:
    """What attention and MLP write is edited, not the state that they write to."""
    names = WRITERS[kind_of(rows)]
    places: list[tuple[Place, Change]] = []
    for layer in layers_of(rows):
        places += [((linear, "output"), change(rows, layer)) for linear in _linears(model.model.layers[layer], names)]
    return places


ADAPTER = Adapter(
    "PEFT rank-1",
    ("add", "ablate", "rank 4"),
    steer,
    package="peft",
    per_row=True,
    means=written,
    note="ablates what attention and MLP write, not the state",
)
