"""journal: what a long run has found so far, one JSON line each, so that a kill costs one line.

The first line holds a digest of everything that the results depend on. A run that finds a journal
of its own reads it and asks it before it computes; a journal of another run is refused. A last
line that was cut off in the middle is dropped.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from slimgemm.pruning.inputs import tensors_of
from slimgemm.pruning.layers import digest

Record = dict[str, Any]
TRYING = "while trying "  # how a note on an exception begins that says of which record it is


def run_key(asked: Sequence[Any], model: nn.Module, inputs: Any = None) -> str:
    """sha256 of what was asked (by repr), of every weight and buffer, and of example inputs."""
    found = hashlib.sha256(repr([str(item) for item in asked]).encode())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        found.update(f"{name} {digest(tensor)}".encode())
    for tensor in tensors_of(inputs):
        found.update(digest(tensor).encode())
    return found.hexdigest()


@contextmanager
def trying(key: str) -> Iterator[None]:
    """Exceptions that come out of the block say which record they are of."""
    try:
        yield
    except Exception as error:
        error.add_note(f"{TRYING}{key}")
        raise


class Journal:
    """Records by key; in memory where there is no path.

    Args:
        path: a file of JSON lines, made with its folder, or None.
        key: of the run, from `run_key`.

    Raises:
        ValueError: the file is another run's, or damaged.
    """

    def __init__(self, path: str | os.PathLike[str] | None, key: str) -> None:
        self.path = None if path is None else Path(path)
        self._records: dict[str, Record] = {}
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.is_file() and self._read(key):
            return
        self.path.write_text("")
        self._write({"run": key})

    def _read(self, key: str) -> bool:
        """Whether the file held a whole first line."""
        assert self.path is not None
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            with self.path.open("r+b") as file:
                file.truncate(len(whole))
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
            if not lines:
                return False
            theirs = lines[0]["run"]
            self._records = {line["key"]: line for line in lines[1:]}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path} is damaged ({error}); delete it") from error
        if theirs != key:
            raise ValueError(
                f"{self.path} is of another run (model, example inputs, options or versions "
                "differ); give another folder, or delete it"
            )
        return True

    def _write(self, record: Record) -> None:
        assert self.path is not None
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def __contains__(self, key: str) -> bool:
        return key in self._records

    def __getitem__(self, key: str) -> Record:
        return self._records[key]

    def get(self, key: str, default: Record) -> Record:
        """The record, or the default."""
        return self._records.get(key, default)

    def __iter__(self) -> Iterator[Record]:
        return iter(self._records.values())

    def add(self, key: str, record: Record) -> Record:
        """Keep a record; it is on disk when this returns."""
        full = {"key": key, **record}
        if self.path is not None:
            self._write(full)
        # Through JSON, so that a record reads the same whether it was just made or found.
        self._records[key] = json.loads(json.dumps(full))
        return self._records[key]
