"""``steerkern compare DIR DIR``: reports of several runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import Json
from .outcome import Outcome

if TYPE_CHECKING:
    from rich.console import Console


def compare(
    folders: Annotated[list[Path], typer.Argument(help="Folders that steerkern run, demo or train-controller wrote.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for comparison.md with every picture.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> Outcome:
    """Set reports side by side: headline numbers, the tables that they share, and what differs in how they ran."""
    from .. import report
    from ..comparison import read, side_by_side

    if len(folders) < 2:
        raise ValueError(f"a comparison needs at least two folders, got {len(folders)}")
    found = side_by_side(read(folders))
    if out is not None:
        report.prepare_folder(out)
        (out / "comparison.md").write_text(found.to_markdown(out), encoding="utf-8")

    def show(console: Console) -> None:
        found.print(console)
        if out is not None:
            console.print(f"\nwrote {out / 'comparison.md'}", markup=False, highlight=False, soft_wrap=True)

    document: dict[str, Any] = {"command": "compare", **found.to_json()}
    return Outcome(document, show)
