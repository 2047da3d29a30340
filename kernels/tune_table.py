"""The table of measured times that 2:4 products are dispatched from: one JSON file per GPU model.

A file holds a head (what it was measured on, and with which versions) and rows; a row is one shape
with every candidate that competed, the losers and the wrong ones too. `find` gives the user's file
(`slimgemm tune` writes it under the cache folder) before the one that came with the package
(kernels/tables/), and only a file of this GPU, torch, triton and slimgemm.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from slimgemm.kernels.conv_layout import Convolution, convolution
from slimgemm.kernels.implementations import BY_OP, Fields

FORMAT = 2
DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
# What must be as it was when the times were taken: dispatch ignores a table where it is not.
SAME = ("gpu", "compute_capability", "torch", "triton", "slimgemm")
# ... and what must be so as well for a row to count as finished when tuning goes on.
HEAD = (*SAME, "driver", "commit")
OK, WRONG, FAILED = "ok", "wrong", "failed"
NEAR = 2.0  # an (N, K) that was not measured is served by one within this factor in each


class Choice(NamedTuple):
    """An implementation, its tile and its parts of K; None leaves them to the implementation."""

    implementation: str
    tile: Fields | None = None
    splits: int | None = None

    def __str__(self) -> str:
        tile = " ".join(f"{name}={value}" for name, value in self.tile or ())
        splits = f"splits={self.splits}" if self.splits else ""
        return " ".join(part for part in (self.implementation, tile, splits) if part)


class Result(NamedTuple):
    """What became of one candidate.

    Args:
        verdict: ok (checked, then timed), wrong (never timed) or failed; `reason` says why.
        us_p50: microseconds per call, median, as a CUDA graph with a cold L2; None if not timed.
        error, allowed: largest error relative to the largest exact output, and the bound for it.
    """

    choice: Choice
    verdict: str
    us_p50: float | None = None
    error: float | None = None
    allowed: float | None = None
    reason: str = ""


# (op, dtype, n, k, m, conv) of a Row
Shape = tuple[str, str, int, int, int, Convolution | None]


class Row(NamedTuple):
    """One shape of one op: y [m, n] = x [m, k] @ w.T; `results` fastest first, then the rest.

    Args:
        conv: of a convolution; its packed weight is [n, k], and m counts output pixels.
    """

    op: str
    dtype: str
    n: int
    k: int
    m: int
    results: tuple[Result, ...]
    conv: Convolution | None = None

    @property
    def shape(self) -> Shape:
        """What is measured once."""
        return self.op, self.dtype, self.n, self.k, self.m, self.conv

    @property
    def ranked(self) -> list[Result]:
        """The candidates that may be dispatched, fastest first."""
        return [r for r in self.results if r.verdict == OK]


class Table(NamedTuple):
    """A file of measured rows.

    Args:
        head: gpu, compute_capability, driver, torch, triton, slimgemm, commit, date, command.
        stopped: (op, dtype, choice) whose run never came back: they are not tried again.
    """

    head: Mapping[str, str]
    rows: tuple[Row, ...] = ()
    stopped: tuple[tuple[str, str, Choice], ...] = ()

    def agrees(self, head: Mapping[str, str], keys: Iterable[str] = SAME) -> bool:
        """True if this table is of the same GPU and versions as `head`."""
        return all(self.head.get(key) == head.get(key) for key in keys)

    def row_for(
        self, op: str, dtype: str, n: int, k: int, m: int, conv: Convolution | None = None
    ) -> Row | None:
        """The row that speaks for this shape, or None.

        Its (N, K) is the same, or the nearest one in log distance within NEAR in each, and all else
        of a convolution (kernel, stride, padding, dilation, groups) is the same. Its m is, both
        rounded up to powers of two, the smallest measured one not below `m`, or the largest.
        """
        rows = [
            row
            for row in self.rows
            if row.op == op and row.dtype == dtype and _same_walk(row.conv, conv) and row.ranked
        ]
        nearest = min({(row.n, row.k) for row in rows}, key=lambda p: _far(p, n, k), default=None)
        if nearest is None or math.isinf(_far(nearest, n, k)[0]):
            return None
        of_shape = sorted((r for r in rows if (r.n, r.k) == nearest), key=lambda r: r.m)
        return next((row for row in of_shape if bucket(row.m) >= bucket(m)), of_shape[-1])


def bucket(rows: int) -> int:
    """`rows` rounded up to a power of two: calls of one bucket run the same implementation."""
    return 1 << (rows - 1).bit_length()


def _same_walk(a: Convolution | None, b: Convolution | None) -> bool:
    """True if `a` and `b` differ in their channels at most, or neither is a convolution."""
    if a is None or b is None:
        return a is b
    return a._replace(out=b.out, channels=b.channels) == b


def _far(pair: tuple[int, int], n: int, k: int) -> tuple[float, int, int]:
    """Log distance of (N, K) pairs, infinite beyond NEAR; ties go to the smaller pair."""
    steps = abs(math.log2(pair[0] / n)), abs(math.log2(pair[1] / k))
    distance = math.hypot(*steps) if max(steps) <= math.log2(NEAR) else math.inf
    return (distance, *pair)


def version(package: str) -> str:
    """The installed version of `package`, or "unknown"."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


def here(device: int) -> dict[str, str]:
    """The part of a head that dispatch compares, of CUDA device number `device`."""
    major, minor = torch.cuda.get_device_capability(device)
    return {
        "gpu": torch.cuda.get_device_name(device),
        "compute_capability": f"{major}.{minor}",
        "torch": str(torch.__version__),
        "triton": version("triton"),
        "slimgemm": version("slimgemm"),
    }


def slug(gpu: str) -> str:
    """A GPU's name as part of a file name: h200, a100_sxm4_80gb, geforce_rtx_4090."""
    return re.sub(r"[^a-z0-9]+", "_", gpu.removeprefix("NVIDIA ").lower()).strip("_")


def user_path(head: Mapping[str, str]) -> Path:
    """Where `slimgemm tune` writes: $XDG_CACHE_HOME or ~/.cache, /slimgemm/tune/."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    name = f"{slug(head['gpu'])}-{head['torch']}-{head['triton']}.json"
    return Path(os.path.expanduser(cache)) / "slimgemm" / "tune" / name


def shipped_path(head: Mapping[str, str]) -> Path:
    """The table that came with the package for this GPU."""
    return Path(__file__).parent / "tables" / f"{slug(head['gpu'])}.json"


def find(head: Mapping[str, str]) -> Table | None:
    """The table for this GPU and these versions: the user's, else the package's, else None.

    Raises:
        ValueError: the file is there and damaged.
    """
    for path in (user_path(head), shipped_path(head)):
        if path.is_file():
            table = load(path)
            if table.agrees(head):
                return table
    return None


def save(table: Table, path: Path) -> None:
    """Write `table`, all or nothing: a reader sees the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stopped = [{"op": op, "dtype": d, **choice_to_json(choice)} for op, d, choice in table.stopped]
    rows = [_row_to_json(row) for row in table.rows]
    content = {"format": FORMAT, "head": dict(table.head), "rows": rows, "stopped": stopped}
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def load(path: Path) -> Table:
    """Read a table.

    Raises:
        ValueError: the file cannot be read, is no table, or holds what no table can; names it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']!r}, not {FORMAT}")
        head = {str(key): _text(value, "head") for key, value in content["head"].items()}
        missing = [key for key in SAME if key not in head]
        if missing:
            raise ValueError(f"its head lacks {', '.join(missing)}")
        rows = tuple(_row_from_json(row) for row in content["rows"])
        stopped = tuple(stopped_from_json(entry) for entry in content["stopped"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(
            f"{path} is no table of measured times: {why}; delete it and run `slimgemm tune` again"
        ) from None
    return Table(head, rows, stopped)


def choice_to_json(choice: Choice) -> dict[str, Any]:
    """A Choice as it is written; choice_from_json reads it."""
    tile = None if choice.tile is None else dict(choice.tile)
    return {"implementation": choice.implementation, "tile": tile, "splits": choice.splits}


def _row_to_json(row: Row) -> dict[str, Any]:
    conv = None if row.conv is None else row.conv._asdict()
    return {**row._asdict(), "results": [_result_to_json(r) for r in row.results], "conv": conv}


def _result_to_json(result: Result) -> dict[str, Any]:
    rest = {k: v for k, v in result._asdict().items() if k != "choice"}
    return {**choice_to_json(result.choice), **rest}


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} must be text, got {value!r}")
    return value


def _dtype(value: Any) -> str:
    if value not in DTYPES.values():
        raise ValueError(f"dtype must be one of {', '.join(DTYPES.values())}, got {value!r}")
    return value


def _count(value: Any, name: str) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} must be a whole number from 1, got {value!r}")
    return value


def _measured(value: Any, name: str, least: float) -> float | None:
    if value is None:
        return None
    if type(value) not in (int, float) or not math.isfinite(value) or value < least:
        raise ValueError(f"{name} must be a number, got {value!r}")
    return float(value)


def choice_from_json(found: Mapping[str, Any], op: str) -> Choice:
    """A Choice of a known implementation of `op`, with whole numbers in it."""
    name, tile, splits = found["implementation"], found["tile"], found["splits"]
    if name not in BY_OP[op]:
        known = ", ".join(BY_OP[op])
        raise ValueError(f"implementation of {op} must be one of {known}, got {name!r}")
    if tile is not None:
        tile = tuple((key, _count(value, f"tile {key}")) for key, value in tile.items())
    return Choice(name, tile, None if splits is None else _count(splits, "splits"))


def stopped_from_json(found: Mapping[str, Any]) -> tuple[str, str, Choice]:
    """(op, dtype, choice) of a candidate that did not come back."""
    op = _op(found["op"])
    return op, _dtype(found["dtype"]), choice_from_json(found, op)


def _op(value: Any) -> str:
    if value not in BY_OP:
        raise ValueError(f"op must be one of {', '.join(BY_OP)}, got {value!r}")
    return value


def _row_from_json(found: Mapping[str, Any]) -> Row:
    op = _op(found["op"])
    n, k, m = (_count(found[name], name) for name in ("n", "k", "m"))
    conv = None if found["conv"] is None else _conv_from_json(found["conv"])
    if (conv is None) != (op == "spmm_24"):
        raise ValueError(f"conv of {op} must be {'null' if conv else 'a geometry'}")
    if conv is not None and (n, k) != (conv.out, conv.k):
        raise ValueError(f"n and k must be {conv.out} and {conv.k} for its conv, got {n} and {k}")
    results = [_result_from_json(result, op) for result in found["results"]]
    rank = {OK: 0, FAILED: 1, WRONG: 1}
    results.sort(key=lambda r: (rank[r.verdict], r.us_p50 or 0.0))
    return Row(op, _dtype(found["dtype"]), n, k, m, tuple(results), conv)


def _conv_from_json(found: Mapping[str, Any]) -> Convolution:
    """A Convolution as _asdict wrote it."""
    lengths = {"kernel": 2, "stride": 2, "padding": 4, "dilation": 2}
    for name, length in lengths.items():
        # `convolution` says what is too small; it would take other lengths and words too.
        if not isinstance(found[name], list) or len(found[name]) != length:
            raise ValueError(f"conv {name} must be {length} whole numbers, got {found[name]!r}")
    numbers = [v for value in found.values() for v in (value if type(value) is list else [value])]
    if any(type(number) is not int for number in numbers):
        raise ValueError(f"conv must hold whole numbers, got {dict(found)}")
    shape = (found["out"], found["channels"], *found["kernel"])
    return convolution(shape, found["stride"], found["padding"], found["dilation"], found["groups"])


def _result_from_json(found: Mapping[str, Any], op: str) -> Result:
    choice, verdict = choice_from_json(found, op), found["verdict"]
    if verdict not in (OK, WRONG, FAILED):
        raise ValueError(f"verdict must be {OK}, {WRONG} or {FAILED}, got {verdict!r}")
    us = _measured(found["us_p50"], "us_p50", 0.0)
    error, allowed = (_measured(found[name], name, 0.0) for name in ("error", "allowed"))
    if verdict == OK and (not us or error is None or allowed is None or error > allowed):
        raise ValueError(f"{choice} is ok without a time, or beyond the allowed error")
    return Result(choice, verdict, us, error, allowed, _text(found["reason"], "reason"))
