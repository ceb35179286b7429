"""How a command ends: its result as JSON or for a person, or one sentence about what went wrong."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import typer

from ..errors import SteerkernError

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Outcome:
    """What a command found: ``document`` for ``--json``, and what it prints otherwise.

    Without a document, ``show`` is all there is, and writes JSON itself where that is wanted. ``status`` is the exit
    code.
    """

    document: dict[str, Any] | None
    show: Callable[[Console], None]
    status: int = 0


def command(run: Callable[..., Outcome]) -> Callable[..., None]:
    """Make a typer command of a function that returns an :class:`Outcome` and has an option ``as_json``."""

    @functools.wraps(run)
    def invoke(**options: Any) -> None:
        as_json = bool(options.get("as_json"))
        try:
            # a library that prints must not break the document
            with contextlib.redirect_stdout(sys.stderr):
                outcome = run(**options)
        except (SteerkernError, ValueError, OSError) as error:
            if os.environ.get("STEERKERN_TRACEBACK"):
                raise
            sentence = " ".join(str(error).split()) or type(error).__name__
            typer.echo(f"steerkern {run.__name__}: {sentence}", err=True)
            if as_json:
                typer.echo(json.dumps({"error": sentence}))
            raise typer.Exit(2) from None
        if as_json and outcome.document is not None:
            typer.echo(json.dumps(outcome.document, indent=1, allow_nan=False))
        else:
            from rich.console import Console

            outcome.show(Console())
        if outcome.status:
            raise typer.Exit(outcome.status)

    return invoke


@contextlib.contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr, where that is a terminal; yields what advances it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bars:
        task = bars.add_task(label, total=total)
        yield lambda count: bars.advance(task, count)
