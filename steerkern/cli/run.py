"""``steerkern run NAME``: a published system on a model; its options are the keywords of the system's ``run``."""

from __future__ import annotations

import dataclasses
import inspect
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer
from typer.core import TyperGroup

from .. import methods
from .options import ORGANISM, Device, Dtype, Harmful, Harmless, Json, Model, Threads, is_organism, load
from .outcome import Outcome, command, progress

if TYPE_CHECKING:
    from rich.console import Console

    from ..subject import Subject

Extra = Annotated[Path | None, typer.Option(show_default=False)]


def shared(
    out: Annotated[Path, typer.Option(help="Folder for report.json, report.md, the plots and what may be resumed.")],
    model: Model = None,
    harmful: Harmful = None,
    harmless: Harmless = None,
    jailbroken: Annotated[
        Path | None, typer.Option(help="Harmful prompts that the model answers.", show_default=False)
    ] = None,
    overrefused: Annotated[
        Path | None, typer.Option(help="Harmless prompts that the model refuses.", show_default=False)
    ] = None,
    category: Annotated[
        str | None,
        typer.Option(help="Column of --harmful FILE that holds each prompt's category of harm.", show_default=False),
    ] = None,
    count: Annotated[int, typer.Option(min=8, help="Prompts per set to learn from and to measure on, at most.")] = 128,
    scorer: Annotated[str, typer.Option(help="How refusals are told; see steerkern.refusal.")] = "prefix",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the replies that are scored.")] = 16,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Prompts per forward: 256 on the organism, else 16.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the split of the prompts and of random controls.")] = 0,
    plots: Annotated[bool, typer.Option("--plots/--no-plots", help="Draw the PNG files (needs matplotlib).")] = True,
    threads: Threads = None,
    dtype: Dtype = "auto",
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Options that every system has; those of a system come after them."""


class Systems(TyperGroup):
    """One command per system, made when it is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names of the systems."""
        return list(methods.SYSTEMS)

    def get_command(self, ctx: Any, name: str) -> Any:
        """The command of a system; None if there is none."""
        if name not in methods.SYSTEMS:
            return None
        application = typer.Typer(add_completion=False)
        application.command(name)(command(_runner(methods.SYSTEMS[name])))
        return typer.main.get_command(application)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The system that ``args`` begin with; exit 2 if there is none of that name."""
        if args and not args[0].startswith("-") and args[0] not in methods.SYSTEMS:
            typer.echo(f"no system {args[0]!r}; there are {', '.join(methods.SYSTEMS)}", err=True)
            raise typer.Exit(2)
        return super().resolve_command(ctx, args)


systems = typer.Typer(cls=Systems, add_completion=False, no_args_is_help=True)


@systems.callback(invoke_without_command=True)
def root(
    listed: Annotated[bool, typer.Option("--list", help="List the systems and leave.")] = False,
) -> None:
    """Run a published system on a model: report.json, report.md and PNG plots."""
    if listed:
        from rich.console import Console
        from rich.table import Table

        table = Table(box=None, show_header=False)
        for system in methods.SYSTEMS.values():
            table.add_row(system.name, system.title, f"arXiv {system.paper}" if system.paper else "")
        Console().print(table)
        raise typer.Exit


def _runner(system: methods.System) -> Callable[..., Outcome]:
    """The command of a system: shared options, and those of its ``run``."""
    run = system.load()
    signature, hints = inspect.signature(run), get_type_hints(run, include_extras=True)
    inputs = [name for name in signature.parameters if name in methods.INPUTS]
    own = {
        name: parameter.replace(annotation=_option(hints[name]), kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in signature.parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and name != "seed"
    }
    common = dict(inspect.signature(shared, eval_str=True).parameters)
    if "other" in inputs:
        common["other"] = _parameter("other", str, "The second model: folder, hub id or organism:NAME.")

    def invoke(**options: Any) -> Outcome:
        chosen = {name: options.pop(name) for name in own}
        return _run(system, run, inputs, chosen, "seed" in signature.parameters, **options)

    invoke.__name__ = f"run {system.name}"
    invoke.__doc__ = f"{system.title} (arXiv {system.paper})." if system.paper else f"{system.title}."
    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*common.values(), *own.values())]
    invoke.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    invoke.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return invoke


def _option(hint: Any) -> Any:
    """``Annotated[type, "help"]`` as typer's option."""
    text = getattr(hint, "__metadata__", ("",))[0]
    kind = getattr(hint, "__origin__", hint)
    return Annotated[kind, typer.Option(help=text)]


def _parameter(name: str, kind: Any, text: str) -> inspect.Parameter:
    hint = Annotated[kind | None, typer.Option(help=text, show_default=False)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=hint)


def _run(
    system: methods.System, run: Callable[..., Any], inputs: list[str], chosen: dict[str, Any], seeded: bool, **o: Any
) -> Outcome:
    from .. import plots as drawing
    from .. import refusal, report
    from ..kept import Kept
    from ..methods.sets import bundled, split
    from ..prompts import read_prompts

    refusal.get(o["scorer"])
    if o["plots"]:
        drawing.require_plots("--no-plots does without")
    report.prepare_folder(o["out"])
    given = {name: o[name] for name in ("harmful", "harmless", "jailbroken", "overrefused") if o[name] is not None}
    if "sets" in inputs and not {"harmful", "harmless"} <= set(given) and (given or not is_organism(o["model"])):
        raise ValueError("--harmful FILE and --harmless FILE are both needed; only the organism brings its own prompts")
    texts = {name: read_prompts(path) for name, path in given.items()}
    source = o["model"] or f"{ORGANISM}:{system.organism}"
    needed: dict[str, Any] = {}
    if "sets" in inputs:
        name = source.partition(":")[2] or "planted"
        labels = _labels(o["harmful"], o["category"], texts.get("harmful", []))
        needed["sets"] = split(texts, o["count"], o["seed"], labels) if texts else bundled(o["count"], name)
    needed["subject"] = _subject(source, o)
    if "other" in inputs:
        if o["other"] is None:
            raise ValueError(f"{system.name} compares two models: --other MODEL is missing")
        needed["other"] = _subject(o["other"], o)
    for name in ("subject", "other"):
        if name in needed:
            needed[name] = _keeping(needed[name], Kept(o["out"], needed[name].model))
    found = run(**{name: needed[name] for name in inputs}, **chosen, **({"seed": o["seed"]} if seeded else {}))
    line = shlex.join(["steerkern", *sys.argv[1:]]) if sys.argv[1:2] == ["run"] else f"steerkern run {system.name}"
    found = report.with_command(found, line)
    files = found.save(o["out"], plots=o["plots"])

    def show(console: Console) -> None:
        found.print(console)
        console.print()
        for file in files:
            console.print(f"wrote {file}", markup=False, highlight=False, soft_wrap=True)

    return Outcome({"command": f"run {system.name}", **found.to_json(), "files": [str(file) for file in files]}, show)


def _labels(file: Path | None, column: str | None, prompts: list[str]) -> dict[str, str]:
    """The category of each prompt of a file."""
    from ..prompts import read_prompts

    if column is None:
        return {}
    if file is None:
        raise ValueError("--category names a column of --harmful FILE")
    labels = read_prompts(file, column)
    if len(labels) != len(prompts):
        raise ValueError(f"{file.name}: {len(prompts)} prompts, {len(labels)} of them with a {column!r}")
    return dict(zip(prompts, labels, strict=True))


def _subject(name: str | None, o: dict[str, Any]) -> Subject:
    from ..subject import Subject

    loaded = load(name, o["dtype"], o["device"], o["threads"])
    return Subject(
        loaded.model,
        loaded.tokenizer,
        loaded.source,
        o["scorer"],
        o["max_new_tokens"],
        o["batch_size"] or (256 if loaded.organism else 16),
        loaded.organism,
        progress,
    )


def _keeping(subject: Subject, kept: Any) -> Subject:
    return dataclasses.replace(subject, kept=kept)
