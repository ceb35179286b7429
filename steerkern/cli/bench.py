"""``steerkern bench``: the benchmark suites of a clone of the repository, as JSON, tables and pictures."""

from __future__ import annotations

import importlib.util
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import SteerkernError
from .options import Json
from .outcome import Outcome

if TYPE_CHECKING:
    from rich.console import Console


def bench(
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer suites, cases and rounds: under three minutes.")
    ] = False,
    suite: Annotated[
        list[str] | None, typer.Option(help="A suite to run; may be repeated. All by default.", show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for JSON files, report.md and plots.")] = Path("steerkern-bench"),
    plots: Annotated[bool, typer.Option("--plots/--no-plots", help="Draw the PNG files (needs matplotlib).")] = True,
    as_json: Json = False,
) -> Outcome:
    """Measure everything side by side: against the stock model, hooks, eager torch and other libraries."""
    from .. import plots as drawing
    from .. import report

    absent = [name for name in ("pytest", "pytest_benchmark") if importlib.util.find_spec(name) is None]
    if absent:
        raise SteerkernError(f"benchmarks need {' and '.join(absent)}: pip install 'steerkern[bench]'")
    if (clone := str(_clone())) not in sys.path:
        sys.path.insert(0, clone)
    from benchmarks import pictures, suites, tables  # type: ignore[import-not-found,unused-ignore]

    unknown = [name for name in suite or () if name not in suites.SUITES]
    if unknown:
        raise ValueError(f"no suite {unknown[0]!r}; there are {', '.join(suites.SUITES)}")
    if plots:
        drawing.require_plots("--no-plots does without")
    report.prepare_folder(out)
    tables.everything(out)  # what lies there already and cannot be read is said before anything runs
    chosen = [entry for entry in suites.SUITES.values() if (entry.name in suite if suite else entry.brief or not quick)]
    ran = _run(chosen, out, quick, suites.run)
    found = tables.everything(out)
    (out / "report.md").write_text("\n\n".join(table.to_markdown() for table in found) + "\n", encoding="utf-8")
    files = [out / "report.md", *sorted(out.glob("*.json")), *(pictures.draw(out) if plots else [])]
    statuses = [entry.status for entry in ran.values()]
    if "stopped" in statuses:
        done = f"{statuses.count('done')} of {len(chosen)} suites are done, their results are in {out}"
        typer.echo(f"steerkern bench: interrupted in {list(ran)[-1]}; {done}", err=True)

    def show(console: Console) -> None:
        for table in found:
            console.print(table.render())
        for name, entry in ran.items():
            line = f"{name}: {entry.status} in {entry.seconds:.0f} s" if entry.status == "done" else ""
            console.print(line or f"{name}: {entry.status}, {entry.reason}", markup=False, highlight=False)
        for file in files:
            console.print(f"wrote {file}", markup=False, highlight=False, soft_wrap=True)

    document: dict[str, Any] = {
        "command": "bench",
        "quick": quick,
        "suites": {name: entry._asdict() for name, entry in ran.items()},
        "tables": {table.name: table.to_json() for table in found},
        "files": [str(file) for file in files],
    }
    return Outcome(document, show, status=130 if "stopped" in statuses else 1 if "failed" in statuses else 0)


def _clone() -> Path:
    """The clone that holds the suites: the one that this package lies in, or else around the working folder."""
    here = Path.cwd()
    for folder in (Path(__file__).parents[2], here, *here.parents):
        if (folder / "benchmarks" / "suites.py").is_file() and (folder / "pyproject.toml").is_file():
            return folder
    raise SteerkernError(
        f"the benchmarks are in the repository, not in the installed package, and there is no clone around {here}: "
        "run this inside one"
    )


def _run(chosen: list[Any], out: Path, quick: bool, run: Any) -> dict[str, Any]:
    """Run the suites until one is interrupted, under a bar for all of them and one for the suite that runs."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    ran: dict[str, Any] = {}
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bars:
        everything = bars.add_task(f"{len(chosen)} suites", total=len(chosen))
        for suite in chosen:
            task = bars.add_task(suite.about, total=100)
            begun = time.monotonic()
            ran[suite.name] = run(
                suite, out, quick=quick, advance=lambda done, task=task: bars.update(task, completed=done)
            )
            bars.update(task, completed=100, visible=False)
            bars.advance(everything)
            console.print(f"{suite.name}: {ran[suite.name].status} ({time.monotonic() - begun:.0f} s)", highlight=False)
            if ran[suite.name].status == "stopped":
                break
    return ran
