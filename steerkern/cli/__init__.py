"""The command line: ``steerkern demo | extract | generate | chat | train-controller | run | compare | ...``.

Every command takes ``--json`` and then writes one JSON document to stdout and nothing else; progress and warnings go to
stderr. What a user got wrong is one sentence on stderr and exit code 2 (``STEERKERN_TRACEBACK=1`` shows the traceback).
"""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .bench import bench
from .chat import chat
from .compare import compare
from .demo import demo
from .doctor import doctor
from .extract import extract
from .generate import generate
from .inspect import inspect
from .outcome import command
from .run import systems
from .serve import serve
from .train_controller import train_controller

__all__ = ["app", "main"]


class Commands(TyperGroup):
    """Names the commands that exist when one is asked for that does not."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that ``args`` begin with; exit 2 if there is none of that name."""
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            typer.echo(f"no command {args[0]!r}; there are {', '.join(self.list_commands(ctx))}", err=True)
            raise typer.Exit(2)
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=Commands,
    help="Activation steering inside the normalisation kernel of a language model's decode loop.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for run in (demo, extract, generate, chat, train_controller, compare, bench, inspect, doctor):
    app.command()(command(run))
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(command(serve))
app.add_typer(systems, name="run")


def _version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        typer.echo(f"steerkern {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Options before the command."""


def main() -> None:
    """Entry point of the console script."""
    app()
