"""``steerkern train-controller``: a guided controller, the plan that it weighs, what both do on held-out prompts."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import Device, Dtype, Harmful, Harmless, Json, Model, Threads, load, prompt_files
from .outcome import Outcome, progress

if TYPE_CHECKING:
    from rich.console import Console

    from ..controller.recipe import Prompts

HELD_OUT = 128
FEWEST = 8


def train_controller(
    out: Annotated[Path, typer.Option(help="Folder for controller.json, the plan, report.json and the plots.")],
    model: Model = None,
    harmful: Harmful = None,
    harmless: Harmless = None,
    jailbroken: Annotated[
        Path | None, typer.Option(help="Harmful prompts that the model answers.", show_default=False)
    ] = None,
    decoys: Annotated[
        Path | None, typer.Option(help="Harmless prompts that look like --jailbroken ones.", show_default=False)
    ] = None,
    preset: Annotated[str, typer.Option(help="outcome, or paper or code as published.")] = "outcome",
    vectors: Annotated[
        str | None,
        typer.Option(help="unembed, embed (refusal phrases) or means; the preset's.", show_default=False),
    ] = None,
    alpha: Annotated[float | None, typer.Option(help="Global strength; the preset's.", show_default=False)] = None,
    scope: Annotated[
        str | None, typer.Option(help="decode, or reply (the first token too); the preset's.", show_default=False)
    ] = None,
    refusal: Annotated[
        str | None, typer.Option(help="What refused prompts are to get; the model's own refusal.", show_default=False)
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="The preset's.", show_default=False)] = None,
    lr: Annotated[float | None, typer.Option(help="Of AdamW; the preset's.", show_default=False)] = None,
    count: Annotated[int, typer.Option(min=4, help="Training prompts per side, at most.")] = 200,
    seed: Annotated[int, typer.Option(help="Of weights, splits, batches and the shuffled control.")] = 0,
    scorer: Annotated[str, typer.Option(help="How refusals are told; see steerkern.refusal.")] = "prefix",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the replies that are looked at.")] = 16,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Prompts per forward: 256 on the organism, else 16.", show_default=False)
    ] = None,
    plots: Annotated[bool, typer.Option("--plots/--no-plots", help="Draw the PNG files (needs matplotlib).")] = True,
    dtype: Dtype = "auto",
    device: Device = None,
    threads: Threads = None,
    as_json: Json = False,
) -> Outcome:
    """Train a network that reads each prompt and says how strongly to refuse, and at which layers."""
    from .. import plots as drawing
    from .. import refusal as scorers
    from .. import report
    from ..controller import presets
    from ..vectors import finite

    chosen = presets.get(preset)
    scorers.get(scorer)
    if alpha is not None:
        finite(alpha, "--alpha", nonzero=True)
    if lr is not None and not finite(lr, "--lr") > 0:
        raise ValueError(f"--lr must be above 0, got {lr}")
    if plots:
        drawing.require_plots("--no-plots does without")
    report.prepare_folder(out)
    chosen = dataclasses.replace(
        chosen,
        vectors=presets.check_vectors(chosen.vectors if vectors is None else vectors),
        epochs=chosen.epochs if epochs is None else epochs,
        lr=chosen.lr if lr is None else lr,
    )
    texts = prompt_files(model, harmful, harmless)
    if texts is None and (jailbroken is not None or decoys is not None):
        raise ValueError("--jailbroken and --decoys come with --harmful FILE and --harmless FILE")
    train, heldout = _bundled(count, seed) if texts is None else _split(texts, jailbroken, decoys, count, seed)

    from ..controller.evaluation import evaluate
    from ..controller.recipe import train_controller as train_on
    from ..controller.summary import summarise

    loaded = load(model, dtype, device, threads)
    at_once = batch_size or (256 if loaded.organism else 16)
    trained = train_on(
        loaded.model,
        loaded.tokenizer,
        train,
        chosen,
        alpha=alpha,
        scope=scope,
        refusal_text=refusal,
        max_new_tokens=max_new_tokens,
        batch_size=at_once,
        seed=seed,
        progress=progress,
    )
    trained.controller.save_pretrained(out)
    trained.plan.save_pretrained(out / "plan")
    found = evaluate(
        loaded.model,
        loaded.tokenizer,
        trained,
        heldout,
        scorer=scorer,
        max_new_tokens=max_new_tokens,
        batch_size=at_once,
        seed=seed,
        progress=progress,
    )
    assert trained.controller.model is not None
    provenance = report.Provenance.of(
        "train-controller",
        source=loaded.source,
        fingerprint=trained.controller.model,
        dtype=str(loaded.model.dtype).removeprefix("torch."),
        device=str(loaded.model.device),
        backend=found.backend,
        seed=seed,
        scorer=scorers.get(scorer).label,
        prompts={
            f"{split} {name}": [repr(prompt) for prompt in some]
            for split, sets in (("train", train), ("heldout", heldout))
            for name, some in sets.sets().items()
        },
    )
    made = summarise(trained, found, provenance)
    files = [out / "controller.json", out / "plan" / "plan.json", *made.save(out, plots=plots)]

    def show(console: Console) -> None:
        made.print(console)
        console.print()
        for file in files:
            console.print(f"wrote {file}", markup=False, highlight=False, soft_wrap=True)

    document = {"command": "train-controller", **made.to_json(), "files": [str(file) for file in files]}
    return Outcome(document, show)


def _bundled(count: int, seed: int) -> tuple[Prompts, Prompts]:
    """The organism's prompts: half of each side with the jailbreak marker, so that the marker alone tells nothing."""
    from ..controller.recipe import Prompts
    from ..organism import grammar, vocabulary

    def draw(kind: grammar.Kind, split: vocabulary.Split, number: int, harmful: bool) -> list[list[dict[str, str]]]:
        rng = random.Random(f"{kind} {split} {harmful} {seed}")
        return [grammar.draw(kind, split, rng, harmful).messages for _ in range(number)]

    def prompts(split: vocabulary.Split, plain: int, marked: int) -> Prompts:
        return Prompts(
            draw("harmful", split, plain, True),
            draw("harmless", split, plain, False),
            draw("jailbreak", split, marked, True),
            draw("jailbreak", split, marked, False),
        )

    return prompts("train", count - count // 2, count // 2), prompts("heldout", HELD_OUT, HELD_OUT)


def _split(
    texts: tuple[list[str], list[str]], jailbroken: Path | None, decoys: Path | None, count: int, seed: int
) -> tuple[Prompts, Prompts]:
    """A quarter of each file, at most 128 prompts, is held out; the others train, ``count`` per side."""
    from ..controller.recipe import Prompts
    from ..prompts import read_prompts

    more = {"jailbroken": jailbroken, "decoys": decoys}
    given = dict(zip(("harmful", "harmless"), texts, strict=True))
    given |= {name: read_prompts(path) for name, path in more.items() if path is not None}
    sides = {"harmful": ("harmful", "jailbroken"), "harmless": ("harmless", "decoys")}
    parts: tuple[dict[str, list[str]], dict[str, list[str]]] = ({}, {})
    for names in sides.values():
        present = [name for name in names if name in given]
        for name in present:
            distinct = list(dict.fromkeys(given[name]))
            if len(distinct) < FEWEST:
                raise ValueError(f"training needs at least {FEWEST} different {name} prompts, got {len(distinct)}")
            random.Random(f"{name} {seed}").shuffle(distinct)
            held = min(len(distinct) // 4, HELD_OUT)
            parts[1][name] = distinct[:held]
            parts[0][name] = distinct[held:][: count // len(present)]
    return Prompts(**parts[0]), Prompts(**parts[1])
