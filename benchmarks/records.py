"""Recorded files: a head of "# key: value" lines, then CSV with one Row a line.

A file is named after the device and the op (h200_spmm_24.csv) and is written whole after each
case, so that a run that is cut off keeps what it had.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from slimgemm.benchmarks import machine
from slimgemm.benchmarks.rows import Row

RESULTS = Path(__file__).parent / "results"
FIRST_LINE = "# slimgemm bench"
DIGITS = 6  # significant, of a recorded number


class Record(NamedTuple):
    """One recorded file."""

    head: dict[str, str]
    rows: list[Any]  # of the row class that it was read with


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.{DIGITS}g}" if isinstance(value, float) else str(value)


def as_csv(head: Mapping[str, str], rows: Iterable[Any], row_class: type = Row) -> str:
    """The text of a recorded file."""
    out = io.StringIO()
    out.write(FIRST_LINE + "\n")
    for key, value in head.items():
        out.write(f"# {key}: {' '.join(value.split())}\n")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([field.name for field in dataclasses.fields(row_class)])
    for row in rows:
        writer.writerow([_text(value) for value in dataclasses.astuple(row)])
    return out.getvalue()


def _value(kind: Any, text: str, column: str) -> Any:
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if not text and type(None) in kinds:
        return None
    if str in kinds:
        return text
    try:
        return int(text) if kinds[0] is int else float(text)
    except ValueError:
        raise ValueError(f"column {column} holds {text!r}, must be a number") from None


def from_csv(text: str, name: str = "the file", row_class: type = Row) -> Record:
    """Read what `as_csv` wrote.

    Raises:
        ValueError: not a recorded file, or columns other than those of `row_class`.
    """
    lines = text.splitlines()
    if not lines or lines[0] != FIRST_LINE:
        raise ValueError(f"{name} must begin with {FIRST_LINE!r}: it is no recorded file")
    top = [line[2:].partition(": ") for line in lines[1:] if line.startswith("# ")]
    table = list(csv.reader(line for line in lines if not line.startswith("# ")))
    kinds = typing.get_type_hints(row_class)
    columns = [field.name for field in dataclasses.fields(row_class)]
    if not table or table[0] != columns:
        got = ", ".join(table[0]) if table else "nothing"
        raise ValueError(f"{name} must have the columns {', '.join(columns)}; got {got}")
    rows = []
    for cells in table[1:]:
        pairs = zip(columns, cells, strict=True)
        rows.append(row_class(**{c: _value(kinds[c], cell, c) for c, cell in pairs}))
    return Record({key: value for key, _, value in top}, rows)


def read(path: Path, row_class: type = Row) -> Record:
    """Read a recorded file; ValueError if it is none."""
    return from_csv(path.read_text(encoding="utf-8"), path.name, row_class)


def write_text(path: Path, text: str) -> None:
    """Write a file of which no reader ever sees half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


class Recorder:
    """Writes one recorded file, again after each case, with the machine's state at that moment."""

    def __init__(
        self,
        folder: Path,
        op: str,
        device: torch.device,
        head: Mapping[str, str],
        row_class: type = Row,
    ) -> None:
        self.path = folder / f"{machine.slug(device)}_{op}.csv"
        self.device, self.head, self.row_class = device, dict(head), row_class
        self.rows: list[Any] = []

    def add(self, rows: Sequence[Any]) -> None:
        """Take `rows` and write the file."""
        self.rows += rows
        after = machine.state(self.device, "after")
        write_text(self.path, as_csv({**self.head, **after}, self.rows, self.row_class))
