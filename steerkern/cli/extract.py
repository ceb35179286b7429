"""``steerkern extract``: difference-of-means directions of a model, into a folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import BatchSize, Device, Dtype, Harmful, Harmless, Json, Model, Threads, load, prompt_files
from .outcome import Outcome

if TYPE_CHECKING:
    from rich.console import Console


def extract(
    out: Annotated[Path, typer.Option(help="Folder for directions.json and directions.safetensors.")],
    model: Model = None,
    harmful: Harmful = None,
    harmless: Harmless = None,
    position: Annotated[str, typer.Option(help="t_post, t_inst, or a number counted from the end (-1).")] = "t_post",
    site: Annotated[str, typer.Option(help="resid_pre or resid_post.")] = "resid_pre",
    system: Annotated[str | None, typer.Option(help="A system prompt before each prompt.", show_default=False)] = None,
    template: Annotated[str, typer.Option(help="chat, or plain for raw text.")] = "chat",
    name: Annotated[str, typer.Option(help="Name of the directions.")] = "refusal",
    batch_size: BatchSize = 16,
    dtype: Dtype = "auto",
    device: Device = None,
    threads: Threads = None,
    as_json: Json = False,
) -> Outcome:
    """Save mean(harmful) - mean(harmless) of every layer; any two sets of prompts will do."""
    from .. import extraction, report
    from ..artifacts import check_name
    from .inspect import directions_document, show_directions

    check_name(name, "--name")
    if template not in ("chat", "plain"):
        raise ValueError(f"--template must be chat or plain, got {template!r}")
    report.prepare_folder(out)
    texts = prompt_files(model, harmful, harmless)
    positive, negative = texts if texts is not None else _bundled()
    loaded = load(model, dtype, device, threads)
    directions = extraction.extract(
        loaded.model,
        loaded.tokenizer,
        positive,
        negative,
        position=_position(position),
        site=site,
        batch_size=batch_size,
        system=system,
        template=template,
        name=name,
    )
    directions.save_pretrained(out)

    def show(console: Console) -> None:
        show_directions(directions, console)
        console.print(f"wrote {out}", markup=False, highlight=False, soft_wrap=True)

    return Outcome({"command": "extract", "out": str(out), **directions_document(directions)}, show)


def _position(text: str) -> str | int:
    try:
        return int(text)
    except ValueError:
        return text


def _bundled() -> tuple[list[Any], list[Any]]:
    from .. import organism

    harmful, harmless = (organism.prompts(kind, "train", 128) for kind in ("harmful", "harmless"))
    return [prompt.messages for prompt in harmful], [prompt.messages for prompt in harmless]
