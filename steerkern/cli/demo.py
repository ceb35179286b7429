"""``steerkern demo``: steer a chat model along its refusal direction, before and after, with pictures and speed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import Device, Dtype, Harmful, Harmless, Json, Model, Threads, load, prompt_files
from .outcome import Outcome, progress

if TYPE_CHECKING:
    from rich.console import Console


def demo(
    model: Model = None,
    harmful: Harmful = None,
    harmless: Harmless = None,
    out: Annotated[Path, typer.Option(help="Folder for report.json and the plots.")] = Path("steerkern-demo"),
    scorer: Annotated[str, typer.Option(help="How refusals are told; see steerkern.refusal.")] = "prefix",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the replies that are scored.")] = 16,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Prompts per forward: 256 on the organism, else 16.", show_default=False)
    ] = None,
    threads: Threads = None,
    seed: Annotated[int, typer.Option(help="Of the split of the prompts and of the random control.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer prompts, coarser curves, short timing.")] = False,
    plots: Annotated[bool, typer.Option("--plots/--no-plots", help="Draw the PNG files (needs matplotlib).")] = True,
    dtype: Dtype = "auto",
    device: Device = None,
    as_json: Json = False,
) -> Outcome:
    """Find the refusal direction, ablate, add, subtract and clamp it, and measure replies and speed."""
    from .. import plots as drawing
    from .. import refusal, report
    from ..demo import QUICK, Size, organism_examples, run, split_examples
    from ..subject import Subject

    refusal.get(scorer)
    if plots:
        drawing.require_plots("--no-plots does without")
    report.prepare_folder(out)
    size = QUICK if quick else Size()
    texts = prompt_files(model, harmful, harmless)
    examples = organism_examples(size) if texts is None else split_examples(*texts, size, seed)
    loaded = load(model, dtype, device, threads)
    subject = Subject(
        loaded.model,
        loaded.tokenizer,
        loaded.source,
        scorer,
        max_new_tokens,
        batch_size or (256 if loaded.organism else 16),
        loaded.organism,
        progress,
    )
    found = run(subject, examples, size, threads=threads or 1, seed=seed)
    files = found.save(out, plots=plots)

    def show(console: Console) -> None:
        found.print(console)
        console.print()
        for file in files:
            console.print(f"wrote {file}", markup=False, highlight=False, soft_wrap=True)

    return Outcome({**found.to_json(), "files": [str(file) for file in files]}, show)
