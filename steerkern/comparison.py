"""Reports side by side: headline numbers, shared tables, and what differs in how they were made."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ArtifactError
from .report import Column, Row, Table, Value

if TYPE_CHECKING:
    from rich.console import Console

FACTS = ("command", "model", "scorer", "seed", "prompts", "backend", "device", "threads", "versions")


@dataclass(frozen=True)
class Read:
    """A report that was read again, and its folder; ``name`` tells it from the others."""

    name: str
    folder: Path
    content: Mapping[str, Any]


@dataclass(frozen=True)
class Comparison:
    """The reports, and tables with one column for each."""

    reports: tuple[Read, ...]
    tables: tuple[Table, ...]

    def to_json(self) -> dict[str, Any]:
        """Folders and tables."""
        return {
            "reports": {one.name: str(one.folder) for one in self.reports},
            "tables": {table.name: table.to_json() for table in self.tables},
        }

    def print(self, console: Console) -> None:
        """Write the tables to a terminal."""
        for table in self.tables:
            console.print(table.render())

    def to_markdown(self, folder: Path) -> str:
        """A page in ``folder`` with the tables and the pictures of all reports, those of one name together."""
        parts = ["# " + " against ".join(one.name for one in self.reports)]
        parts += [table.to_markdown() for table in self.tables]
        names = list(dict.fromkeys(name for one in self.reports for name in one.content.get("plots", {})))
        for name in names:
            shown = [one for one in self.reports if (one.folder / f"{name}.png").is_file()]
            if shown:
                parts.append(f"### {name}")
            for one in shown:
                path = os.path.relpath(one.folder / f"{name}.png", folder)
                parts += [one.name, f"![{name} of {one.name}]({path})"]
        return "\n\n".join(parts) + "\n"


def read(folders: Sequence[Path]) -> list[Read]:
    """Read ``report.json`` of every folder.

    Raises:
        ArtifactError: one that is not there, or no report.
    """
    found = []
    for folder in folders:
        file = folder / "report.json"
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise ArtifactError(f"cannot read {file}: {error.strerror or error}") from None
        except ValueError as error:
            raise ArtifactError(f"{file}: not JSON: {error}") from None
        if not isinstance(content, dict) or content.get("format") != "steerkern.report":
            raise ArtifactError(f"{file} is no steerkern report")
        found.append(content)
    names = _names(folders)
    return [Read(name, folder, content) for name, folder, content in zip(names, folders, found, strict=True)]


def side_by_side(reports: Sequence[Read]) -> Comparison:
    """Headline numbers, the facts that differ, and every table that at least two reports have."""
    tables = [_headline(reports), _facts(reports)]
    names = dict.fromkeys(name for one in reports for name in one.content.get("tables", {}))
    for name in names:
        having = [one for one in reports if name in one.content["tables"]]
        if len(having) > 1 and (table := _shared(name, having)) is not None:
            tables.append(table)
    return Comparison(tuple(reports), tuple(table for table in tables if table.rows))


def _headline(reports: Sequence[Read]) -> Table:
    headlines = [one.content.get("headline", {}) for one in reports]
    keys = dict.fromkeys(key for headline in headlines for key in headline)
    rows: list[Row] = []
    for key in keys:
        row: dict[str, Value] = {"number": key.replace("_", " ")}
        row.update({one.name: headline.get(key) for one, headline in zip(reports, headlines, strict=True)})
        rows.append(row)
    columns = (Column("number", ""), *(Column(one.name, one.name, ".3f") for one in reports))
    return Table("headline", "Headline numbers", columns, tuple(rows))


def _facts(reports: Sequence[Read]) -> Table:
    rows: list[Row] = []
    for fact in FACTS:
        texts = [_text(one.content.get("provenance", {}).get(fact)) for one in reports]
        if len(set(texts)) > 1:
            rows.append({"fact": fact, **{one.name: text for one, text in zip(reports, texts, strict=True)}})
    columns = (Column("fact", ""), *(Column(one.name, one.name) for one in reports))
    return Table("facts", "What differs in how they were made", columns, tuple(rows))


def _shared(name: str, reports: Sequence[Read]) -> Table | None:
    """Numbers of one table in all reports: a row for each of its rows and columns that holds any."""
    tables = [one.content["tables"][name] for one in reports]
    first = tables[0]
    key = next(iter(first["columns"]))
    rows: list[Row] = []
    labels = list(dict.fromkeys(str(row.get(key)) for table in tables for row in table["rows"]))
    indexed = [{str(row.get(key)): row for row in table["rows"]} for table in tables]
    if any(len(index) < len(table["rows"]) for index, table in zip(indexed, tables, strict=True)):
        return None  # the first column does not tell its rows apart
    for label in labels:
        for column, title in first["columns"].items():
            values = [index.get(label, {}).get(column) for index in indexed]
            numeric = [isinstance(value, (int, float)) and not isinstance(value, bool) for value in values]
            if column == key or not any(numeric):
                continue
            shown = {one.name: value for one, value in zip(reports, values, strict=True)}
            rows.append({"row": label, "column": title, **shown})
    columns = (
        Column("row", first["columns"][key]),
        Column("column", ""),
        *(Column(one.name, one.name, ".3g") for one in reports),
    )
    return Table(name, str(first["title"]), columns, tuple(rows))


def _names(folders: Sequence[Path]) -> list[str]:
    """The last part of each path, or as many as tell all apart."""
    parts = [folder.resolve().parts for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(path[-count:]) for path in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{i + 1}: {path[-1]}" for i, path in enumerate(parts)]


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items())
    return str(value)[:40]
