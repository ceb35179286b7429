"""Prompt files: one prompt per line (``.txt``), per object (``.jsonl``) or per row (``.csv``)."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import ArtifactError

Record = dict[str, str]
MAX_BYTES = 64 << 20
MAX_PROMPTS = 1_000_000
COLUMNS = ("prompt", "instruction", "text", "question", "goal", "behavior")
"""Names of the prompt's column, in the order in which they are looked for; capitals do not matter."""


def read_prompts(path: str | os.PathLike[str], column: str | None = None) -> list[str]:
    """Prompts of a UTF-8 file, in its order, without surrounding space; empty lines and empty prompts are skipped.

    Args:
        path: ``.txt``, ``.jsonl`` or ``.csv``, at most 64 MiB.
        column: key (JSONL) or column (CSV) of the prompt, spelt as in the file; without it the first of
            ``prompt, instruction, text, question, goal, behavior`` that is there.

    Raises:
        ArtifactError: naming the file, where it can the line, and what is wrong.
    """
    file = Path(path)
    readers = {".txt": _txt, ".jsonl": _jsonl, ".csv": _csv}
    read = readers.get(file.suffix.lower())
    if read is None:
        raise ArtifactError(f"{file.name}: prompt files end in {', '.join(readers)}")
    if column is not None and read is _txt:
        raise ArtifactError(f"{file.name}: a .txt file has no column {column!r}")
    prompts: list[str] = []
    for prompt in read(file.name, _text(file), column):
        if prompt := prompt.strip():
            prompts.append(prompt)
        if len(prompts) > MAX_PROMPTS:
            raise ArtifactError(f"{file.name} holds more than {MAX_PROMPTS} prompts")
    if not prompts:
        raise ArtifactError(f"{file.name} holds no prompts")
    return prompts


def read_records(path: str | os.PathLike[str], columns: Sequence[str], optional: Sequence[str] = ()) -> list[Record]:
    """Texts of several columns of a ``.jsonl`` or ``.csv`` file, without surrounding space, one dict per record.

    Each record has a text in every one of ``columns``; those in ``optional`` are "" where the file has none.

    Raises:
        ArtifactError: naming the file, where it can the line, and what is wrong.
    """
    file = Path(path)
    readers: dict[str, Callable[[str, str], Iterator[tuple[str, Mapping[str, Any]]]]]
    readers = {".jsonl": _objects, ".csv": _rows}
    read = readers.get(file.suffix.lower())
    if read is None:
        raise ArtifactError(f"{file.name}: files with columns end in {', '.join(readers)}")
    records: list[Record] = []
    for where, given in read(file.name, _text(file)):
        record = {name: given.get(name, "") for name in (*columns, *optional)}
        for name, text in record.items():
            if name in columns and name not in given:
                raise ArtifactError(f"{where}: no column {name!r}, there are {_listed(list(given))}")
            if not isinstance(text, str) or (name in columns and not text.strip()):
                raise ArtifactError(f"{where}: {name!r} must be a text that is not empty")
        records.append({name: text.strip() for name, text in record.items()})
        if len(records) > MAX_PROMPTS:
            raise ArtifactError(f"{file.name} holds more than {MAX_PROMPTS} records")
    if not records:
        raise ArtifactError(f"{file.name} holds no records")
    return records


def _text(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise ArtifactError(f"cannot read {file}: {error.strerror or error}") from None
    if len(data) > MAX_BYTES:
        raise ArtifactError(f"{file.name} is larger than {MAX_BYTES} bytes")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ArtifactError(f"{file.name} line {line}: not UTF-8 (byte 0x{data[error.start]:02x})") from None
    return text.replace("\r\n", "\n")


def _txt(name: str, text: str, column: str | None) -> Iterator[str]:
    # str.splitlines would also break at U+2028 and at form feeds
    yield from text.split("\n")


def _jsonl(name: str, text: str, column: str | None) -> Iterator[str]:
    for where, record in _objects(name, text):
        value = record[_choose(where, record, column)]
        if not isinstance(value, str):
            raise ArtifactError(f"{where}: the prompt must be text, got {type(value).__name__}")
        yield value


def _objects(name: str, text: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{name} line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ArtifactError(f"{where}: not JSON: {error}") from None
        if not isinstance(record, dict):
            raise ArtifactError(f"{where}: must be an object, got {type(record).__name__}")
        yield where, record


def _csv(name: str, text: str, column: str | None) -> Iterator[str]:
    table = _table(name, text)
    _, header = next(table)
    index = header.index(_choose(f"{name} line 1", header, column))
    for _, row in table:
        yield row[index]


def _rows(name: str, text: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    table = _table(name, text)
    _, header = next(table)
    for where, row in table:
        yield where, dict(zip(header, row, strict=True))


def _table(name: str, text: str) -> Iterator[tuple[str, list[str]]]:
    """The header, then every row that is not empty, with where it stands."""
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = next(rows, [])
        if len(set(header)) != len(header):
            raise ArtifactError(f"{name} line 1: a column name stands twice")
        yield f"{name} line 1", header
        for row in rows:
            where = f"{name} line {rows.line_num}"
            if row and len(row) != len(header):
                raise ArtifactError(f"{where}: {len(row)} columns, the header has {len(header)}")
            if row:
                yield where, row
    except csv.Error as error:
        raise ArtifactError(f"{name} line {rows.line_num}: not CSV: {error}") from None


def _choose(where: str, names: Iterable[str], column: str | None) -> str:
    present = list(names)
    if column is not None:
        if column in present:
            return column
        raise ArtifactError(f"{where}: no column {column!r}, there are {_listed(present)}")
    lowered = {name.strip().lower(): name for name in reversed(present)}
    for known in COLUMNS:
        if known in lowered:
            return lowered[known]
    raise ArtifactError(f"{where}: none of {', '.join(COLUMNS)} among {_listed(present)}; name the column")


def _listed(names: list[str]) -> str:
    return ", ".join(repr(name[:40]) for name in names[:10]) or "none"
