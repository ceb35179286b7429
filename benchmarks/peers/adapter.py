"""What every peer is asked to do, and what its adapter says about it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from steerkern import __version__

Kind: TypeAlias = Literal["add", "ablate", "clamp", "rank 4"]
Change: TypeAlias = Callable[[Tensor], Tensor]
Inputs: TypeAlias = Mapping[str, Tensor]
Place: TypeAlias = tuple[nn.Module, Literal["input", "output"]]


@dataclass(frozen=True)
class Edit:
    """One edit of the residual stream at several decoder layers, counted from 0."""

    kind: Kind
    vectors: Mapping[int, Tensor]
    """Orthonormal rows ``[k, H]`` per layer; ``k`` is 1 except for rank 4."""
    strength: float = 1.0
    """What is added along the row, or the coordinate that it is clamped to."""


Rows: TypeAlias = Sequence[Edit | None]
"""One edit for the whole batch, or one per row of it, all of one kind, ``None`` for a plain row."""


def kind_of(rows: Rows) -> Kind:
    """The kind that the edits of a batch share."""
    return next(edit.kind for edit in rows if edit is not None)


def layers_of(rows: Rows) -> list[int]:
    """The layers that any row is edited at."""
    return sorted({layer for edit in rows if edit is not None for layer in edit.vectors})


def directions(rows: Rows, layer: int) -> Tensor:
    """The rows' vectors ``[1 or B, k, H]`` at a layer, zero for a plain row."""
    some = next(edit.vectors[layer] for edit in rows if edit is not None)
    return torch.stack([torch.zeros_like(some) if edit is None else edit.vectors[layer] for edit in rows])


def strength_of(rows: Rows) -> float:
    """The strength that the edits of a batch share."""
    return next(edit.strength for edit in rows if edit is not None)


def change(rows: Rows, layer: int) -> Change:
    """The edit of a state ``[B, T, H]`` at a layer in plain torch, written as a user would for a hook."""
    kind, strength, v = kind_of(rows), strength_of(rows), directions(rows, layer)
    if kind == "add":
        pushed = strength * v
        return lambda h: h + pushed
    if kind == "rank 4":
        return lambda h: h - (h @ v.mT) @ v
    target = strength if kind == "clamp" else 0.0
    if len(rows) == 1:
        unit = v[0, 0]
        if kind == "ablate":
            return lambda h: h - (h @ unit).unsqueeze(-1) * unit
        return lambda h: h + (target - h @ unit).unsqueeze(-1) * unit
    return lambda h: h + (target - (h * v).sum(-1, keepdim=True)) * v


@dataclass(frozen=True)
class Steered:
    """A model while a peer steers it."""

    model: Any
    """The transformers model that runs."""
    generate: Callable[[Inputs, int], object]
    """Decodes greedily exactly so many tokens, through the peer's own call."""
    head: nn.Module | None = None
    """The module that computes the logits, where it is no longer ``model.lm_head``."""


def tokenizer() -> Any:
    """A tokenizer for peers that ask for one; what is decoded here are token ids."""
    from transformers import AutoTokenizer

    from steerkern import organism

    return AutoTokenizer.from_pretrained(organism.path(), local_files_only=True)


def generate(model: Any, inputs: Inputs, tokens: int, **more: Any) -> object:
    """Greedy decoding of exactly ``tokens`` tokens by transformers' own ``generate``."""
    return model.generate(**inputs, do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens, **more)


def block_outputs(model: Any, rows: Rows) -> list[tuple[Place, Change]]:
    """The usual meaning: the output of decoder block ``l`` is edited for every layer ``l``."""
    return [((model.model.layers[layer], "output"), change(rows, layer)) for layer in layers_of(rows)]


@dataclass(frozen=True)
class Adapter:
    """How one peer is driven, in a few lines."""

    name: str
    edits: tuple[Kind, ...]
    steer: Callable[[Any, Rows], AbstractContextManager[Steered]]
    package: str | None = None
    """Its name on PyPI; None where the code is in this folder."""
    per_row: bool = False
    """Whether its API takes another edit for each row of a batch."""
    means: Callable[[Any, Rows], list[tuple[Place, Change]]] = block_outputs
    """Where and how the peer edits by its own documentation: what its result is compared with."""
    note: str | None = None
    """How its edit differs from the usual one."""
    authors_figure: str | None = None
    needs_patch: str | None = None
    """What had to be done before it imports beside the packages of today."""

    @property
    def version(self) -> str | None:
        """Of the installed package; None where it is missing. What is in this folder is as old as steerkern."""
        if self.package is None:
            return __version__
        try:
            return metadata.version(self.package)
        except metadata.PackageNotFoundError:
            return None


INSTALL = 'pip install torch==2.13.0 -e ".[peers]" && pip install --no-deps -r benchmarks/peers/requirements.txt'


@contextlib.contextmanager
def editing(places: Sequence[tuple[Place, Change]], scope: str = "all") -> Iterator[None]:
    """Plain hooks that do what ``places`` say, on every forward, on the first only or on all but the first.

    Args:
        places: what is edited, and how.
        scope: ``"all"``, ``"prompt"`` (the first forward) or ``"generated"`` (the others).
    """

    def active(calls: list[int]) -> bool:
        calls[0] += 1
        return scope == "all" or (scope == "prompt") == (calls[0] == 1)

    def hook(module: nn.Module, where: str, edit: Change) -> Any:
        calls = [0]
        if where == "input":
            return module.register_forward_pre_hook(
                lambda module, args: (edit(args[0]), *args[1:]) if active(calls) else None
            )

        def after(module: nn.Module, args: Any, output: Any) -> Any:
            if not active(calls):
                return None
            return (edit(output[0]), *output[1:]) if isinstance(output, tuple) else edit(output)

        return module.register_forward_hook(after)

    with contextlib.ExitStack() as stack:
        for (module, where), edit in places:
            stack.callback(hook(module, where, edit).remove)
        yield
