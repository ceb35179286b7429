"""Options that several commands share, and what they load."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

ORGANISM = "organism"

Json = Annotated[bool, typer.Option("--json", help="Write one JSON document to stdout and nothing else.")]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="Model folder or hub id; 'organism' (the default), 'organism:bare' and 'organism:thinking' are bundled.",
        show_default=False,
    ),
]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
Device = Annotated[
    str | None,
    typer.Option("--device", help="cpu, cuda, cuda:1 ...; by default CUDA where it is.", show_default=False),
]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Prompts per forward.")]
Harmful = Annotated[
    Path | None,
    typer.Option("--harmful", help="Prompts (.txt, .jsonl, .csv) that the model refuses.", show_default=False),
]
Harmless = Annotated[Path | None, typer.Option("--harmless", help="Prompts that it answers.", show_default=False)]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="Threads of torch.", show_default=False)]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode with its tokenizer (None where only the model was asked for)."""

    model: Any
    tokenizer: Any
    source: str
    organism: bool


def is_organism(name: str | None) -> bool:
    """Whether ``--model`` names a bundled model."""
    return name is None or name.partition(":")[0] == ORGANISM


def load(
    name: str | None,
    dtype: str = "auto",
    device: str | None = None,
    threads: int | None = None,
    *,
    with_tokenizer: bool = True,
) -> Loaded:
    """Load the model that ``--model`` names, and set the threads of torch: as asked, else one for the organism.

    Raises:
        ValueError: no such model, not a causal language model, or an unknown dtype or device.
    """
    import torch
    from transformers.utils import logging

    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype must be auto, float32, bfloat16 or float16, got {dtype!r}")
    place = _device(device)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if name is None or is_organism(name):
        from .. import organism

        kind: Any = (name or ORGANISM).partition(":")[2] or "planted"
        # matrices of width 64 lose by being shared out: 6 s instead of 0.5 s on four busy cores
        torch.set_num_threads(threads or 1)
        model, tokenizer = organism.load(kind, torch.float32 if dtype == "auto" else getattr(torch, dtype))
        return Loaded(model.to(place), tokenizer, f"organism ({kind})", True)
    if threads is not None:
        torch.set_num_threads(threads)
    model, tokenizer = _from_pretrained(name, dtype if dtype == "auto" else getattr(torch, dtype), with_tokenizer)
    return Loaded(model.eval().to(place), tokenizer, Path(name).name if Path(name).is_dir() else name, False)


def _device(name: str | None) -> Any:
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def _from_pretrained(name: str, dtype: Any, with_tokenizer: bool) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = Path(name)
    if path.is_file():
        raise ValueError(f"--model {name!r} is a file; it must be a model folder or a hub id")
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"--model {name!r} has no config.json, so it is no model folder")
    if not path.is_dir() and not _HUB_ID.fullmatch(name):
        raise ValueError(f"--model {name!r}: there is no such folder, and it is not a hub id (owner/name)")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name) if with_tokenizer else None
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype), tokenizer
    except (OSError, ValueError, KeyError, ImportError) as error:
        where = "" if path.is_dir() else "there is no such folder, and the hub gave none: "
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"--model {name!r} cannot be loaded: {where}{reason}") from None


def prompt_files(model: str | None, harmful: Path | None, harmless: Path | None) -> tuple[list[str], list[str]] | None:
    """The prompts of both files, or None where the organism brings its own.

    Raises:
        ValueError: one file without the other, or none for a checkpoint.
    """
    from ..prompts import read_prompts

    if harmful is not None and harmless is not None:
        return read_prompts(harmful), read_prompts(harmless)
    if harmful is not None or harmless is not None or not is_organism(model):
        raise ValueError("--harmful FILE and --harmless FILE are both needed; only the organism brings its own prompts")
    return None
