"""Reports: what a command or a method found, as JSON, as tables for a terminal and as plots, with its provenance."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Union

from .artifacts import Fingerprint
from .errors import SteerkernError
from .plots import Plot

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table as RichTable

Value = Union[str, int, float, bool, None]
Row = Mapping[str, Value]
"""A row of a table: values by column key, also of columns that are not shown."""


@dataclass(frozen=True)
class Provenance:
    """What one must know to repeat a result."""

    command: str
    seed: int | None
    scorer: str | None
    prompts: Mapping[str, Mapping[str, Value]]
    """Per set of prompts its ``count`` and ``sha256``."""
    model: Mapping[str, Value]
    versions: Mapping[str, str]
    device: str
    backend: str
    threads: int
    created: str

    @staticmethod
    def of(
        command: str,
        *,
        source: str,
        fingerprint: Fingerprint,
        dtype: str,
        device: str,
        backend: str,
        seed: int | None = None,
        scorer: str | None = None,
        prompts: Mapping[str, Sequence[str]] | None = None,
    ) -> Provenance:
        """Gather versions, machine, threads and time for a run of ``command`` on the model from ``source``."""
        import torch

        return Provenance(
            command,
            seed,
            scorer,
            {name: {"count": len(texts), "sha256": hash_texts(texts)} for name, texts in (prompts or {}).items()},
            {"source": source, "dtype": dtype, **fingerprint._asdict()},
            versions(),
            f"{device} ({_processor(device)})",
            backend,
            torch.get_num_threads(),
            datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )

    def to_markdown(self) -> str:
        """One line per fact."""
        model = self.model
        facts = {
            "command": f"`{self.command}`",
            "model": f"{model['source']} ({model['model_type']}, {model['layers']} layers, {model['dtype']})",
            "scorer": self.scorer,
            "seed": self.seed,
            "ran on": f"{self.backend}, {self.device}, {self.threads} threads",
            "versions": ", ".join(f"{name} {version}" for name, version in self.versions.items()),
            "made": self.created,
        }
        for name, entry in self.prompts.items():
            facts[name] = f"{entry['count']} prompts, sha256 {str(entry['sha256'])[:12]}"
        return "\n".join(f"- {name}: {fact}" for name, fact in facts.items() if fact is not None)


@dataclass(frozen=True)
class Column:
    """A column of a table: the key in the rows, the heading, and how numbers are written (``".0%"``, ``".2f"``)."""

    key: str
    title: str
    form: str = ""

    def text(self, value: Value) -> str:
        """The value as a person reads it."""
        if value is None:
            return ""
        if isinstance(value, bool):
            return "yes" if value else "no"
        return format(value, self.form) if isinstance(value, (int, float)) else value


@dataclass(frozen=True)
class Table:
    """Rows of values under columns; ``note`` says below the table what has to be known to read it."""

    name: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """Title, headings by key, rows and note."""
        return {
            "title": self.title,
            "columns": {column.key: column.title for column in self.columns},
            "rows": [dict(row) for row in self.rows],
            "note": self.note,
        }

    def to_markdown(self) -> str:
        """A Markdown table under its title."""
        heads = [_cells(column.title for column in self.columns), _cells("---" for _ in self.columns)]
        lines = [f"### {self.title}", "", *heads]
        lines += [_cells(column.text(row.get(column.key)) for column in self.columns) for row in self.rows]
        return "\n".join([*lines, *(["", self.note] if self.note else [])])

    def render(self) -> RichTable:
        """For a terminal: text to the left, numbers to the right."""
        from rich import box
        from rich.markup import escape
        from rich.table import Table as RichTable

        table = RichTable(
            title=escape(self.title),
            caption=escape(self.note) or None,
            title_justify="left",
            caption_justify="left",
            title_style="bold",
            caption_style="dim",
            box=box.SIMPLE_HEAD,
            show_header=any(column.title for column in self.columns),
        )
        for column in self.columns:
            numeric = any(isinstance(row.get(column.key), (int, float)) for row in self.rows)
            table.add_column(escape(column.title), justify="right" if numeric else "left", overflow="fold")
        for row in self.rows:
            table.add_row(*(escape(column.text(row.get(column.key))) for column in self.columns))
        return table


class Saved(Protocol):
    """Something that a run made besides numbers, such as a guard or a plan."""

    def save_pretrained(self, folder: Path) -> None:
        """Write it into ``folder``."""


@dataclass(frozen=True)
class Report:
    """What a run found: sentences, tables, plots and any further values, with its provenance."""

    title: str
    provenance: Provenance
    notes: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    plots: tuple[Plot, ...] = ()
    values: Mapping[str, Any] = field(default_factory=dict)
    headline: Mapping[str, float] = field(default_factory=dict)
    """The few numbers that the run is about, by name: what reports are compared by."""
    artefacts: Mapping[str, Saved] = field(default_factory=dict)
    """What the run made, by the name of its folder beside the report."""

    def __getitem__(self, name: str) -> Table:
        """The table of that name."""
        for table in self.tables:
            if table.name == name:
                return table
        raise KeyError(f"table {name!r}: this report has {', '.join(table.name for table in self.tables)}")

    def to_json(self) -> dict[str, Any]:
        """The whole report as JSON values; numbers that are not finite become null."""
        content = {
            "format": "steerkern.report",
            "version": 1,
            "title": self.title,
            "notes": list(self.notes),
            "tables": {table.name: table.to_json() for table in self.tables},
            "plots": {plot.name: asdict(plot) for plot in self.plots},
            "headline": dict(self.headline),
            "values": dict(self.values),
            "provenance": asdict(self.provenance),
        }
        return {key: _finite(value) for key, value in content.items()}

    def save(self, folder: str | os.PathLike[str], *, plots: bool = True) -> list[Path]:
        """Write ``report.json``, ``report.md``, the plots and artefacts into ``folder``; returns what was written."""
        path = prepare_folder(folder)
        (path / "report.json").write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")
        drawn = [plot.save(path) for plot in self.plots] if plots else []
        (path / "report.md").write_text(self.to_markdown([file.name for file in drawn]), encoding="utf-8")
        for name, made in self.artefacts.items():
            made.save_pretrained(path / name)
        return [path / "report.json", path / "report.md", *drawn, *(path / name for name in self.artefacts)]

    def to_markdown(self, pictures: Sequence[str] = ()) -> str:
        """The report as a page that shows ``pictures`` (files beside it)."""
        parts = [f"# {self.title}", *self.notes, *(f"![{name}]({name})" for name in pictures)]
        parts += [table.to_markdown() for table in self.tables]
        return "\n\n".join([*parts, "### How it was made", self.provenance.to_markdown()]) + "\n"

    def print(self, console: Console) -> None:
        """Write title, notes and tables to a terminal."""
        console.print(self.title, style="bold underline", markup=False)
        for note in self.notes:
            console.print(note, markup=False, highlight=False)
        for table in self.tables:
            console.print()
            console.print(table.render())


def with_command(report: Report, command: str) -> Report:
    """The same report, made by the command line ``command``."""
    return replace(report, provenance=replace(report.provenance, command=command))


def prepare_folder(folder: str | os.PathLike[str]) -> Path:
    """Make ``folder`` and try to write in it, so that long work does not end in a folder that cannot take it.

    Raises:
        SteerkernError: it cannot be made or written.
    """
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise SteerkernError(f"cannot write to folder {path}: {error.strerror or error}") from None
    return path


def _cells(texts: Iterable[str]) -> str:
    return "| " + " | ".join(text.replace("|", "\\|").replace("\n", " ") for text in texts) + " |"


def hash_texts(texts: Sequence[str]) -> str:
    """SHA-256 of a list of texts, which depends on their order and their bounds.

    >>> hash_texts(["a", "b"]) == hash_texts(["ab"])
    False
    """
    return hashlib.sha256(json.dumps(list(texts), ensure_ascii=False).encode()).hexdigest()


def versions() -> dict[str, str]:
    """Versions of python, steerkern and the packages that results depend on; those not installed are left out."""
    from . import __version__

    found = {"python": platform.python_version(), "steerkern": __version__}
    for package in ("torch", "transformers", "tokenizers", "safetensors", "numpy", "triton"):
        if importlib.util.find_spec(package) is not None:
            found[package] = importlib.metadata.version(package)
    return found


def _processor(device: str) -> str:
    import torch

    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
