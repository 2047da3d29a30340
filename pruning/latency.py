"""latency: a table of microseconds measured on this device, per layer, width and pattern.

    table[signature][pattern][(out, in)] = p20, p50, p80

Between measured widths it interpolates bilinearly; outside them it refuses. The table lies in the
user's cache folder under the name of the device and the versions that measured it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import platform
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slimgemm.kernels.timing import Times, time_us
from slimgemm.pruning.masks import set_mask
from slimgemm.pruning.patterns import NofM
from slimgemm.pruning.sites import Site

DENSE = "dense"
# Layers timed in turn in one round: many, so that all meet the same clocks and the same load; but
# they are all in memory at once.
TOGETHER, TOGETHER_BYTES = 1024, 1 << 30
Twin = Callable[[nn.Module, int, int], nn.Module]
Width = tuple[int, int]


def cache_folder() -> Path:
    """SLIMGEMM_CACHE, or slimgemm under XDG_CACHE_HOME, or ~/.cache/slimgemm."""
    own = os.environ.get("SLIMGEMM_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(own) if own else Path(base) / "slimgemm"


def identity(device: torch.device | str) -> dict[str, str]:
    """What a time depends on beside the layer: device name, threads, versions, state of caches."""
    device = torch.device(device)
    found = {"caches": "warm", "torch": torch.__version__, "python": platform.python_version()}
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
        found["cuda"] = str(torch.version.cuda or torch.version.hip)
    else:
        info = Path("/proc/cpuinfo")
        text = info.read_text() if info.is_file() else ""
        name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
        found["device"] = name[1].strip() if name else platform.machine()
        found["threads"] = str(torch.get_num_threads())
    for package in ("slimgemm", "triton"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


class LatencyTable:
    """Measured times of layers on one device.

    Args:
        device: where layers are timed.
        path: the file; None is one in the cache folder, named by device and versions.
        twin: (layer, keep, group) -> packed module of a layer that is keep:group already, as
            SparseLinear24.from_dense makes; without it only dense layers are measured.
        rounds: measured rounds per layer.
        statistic: which of p20, p50 and p80 a time is; p20 on a machine with other work, whose
            median moves with that work.
        clock: nanoseconds, of calls on a CPU; timing.cpu_clock() where other work takes turns with
            this process.

    Raises:
        ValueError: the file was measured on another device or with other versions.
    """

    def __init__(
        self,
        device: torch.device | str = "cpu",
        *,
        path: str | os.PathLike[str] | None = None,
        twin: Twin | None = None,
        rounds: int = 20,
        statistic: str = "p50",
        clock: Callable[[], int] = time.perf_counter_ns,
    ) -> None:
        if statistic not in Times._fields:
            raise ValueError(f"statistic must be p20, p50 or p80, got {statistic!r}")
        self.device, self.twin, self.rounds = torch.device(device), twin, rounds
        self.statistic, self.clock = statistic, clock
        self.identity = identity(device)
        key = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()
        default = cache_folder() / "latency" / f"{self.device.type}-{key[:16]}.json"
        self.path = default if path is None else Path(path)
        self.times: dict[str, dict[str, dict[Width, Times]]] = {}
        self._found: dict[tuple[str, str, Width], float] = {}
        if self.path.is_file():
            self._read()

    def _read(self) -> None:
        try:
            data = json.loads(self.path.read_text())
            theirs = data["measured_on"]
            times = {
                signature: {
                    pattern: {(int(out), int(into)): Times(*us) for out, into, us in rows}
                    for pattern, rows in patterns.items()
                }
                for signature, patterns in data["us"].items()
            }
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path} is damaged ({error}); delete it") from error
        if theirs != self.identity:
            differ = [k for k in {*theirs, *self.identity} if theirs.get(k) != self.identity.get(k)]
            raise ValueError(
                f"{self.path} was measured with another {', '.join(sorted(differ))}: "
                f"{ {k: theirs.get(k) for k in sorted(differ)} }; measure anew in another file"
            )
        self.times = times

    def save(self) -> None:
        """Write the file, whole or not at all."""
        data = {
            "measured_on": self.identity,
            "us": {
                signature: {
                    pattern: [[*width, list(us)] for width, us in sorted(rows.items())]
                    for pattern, rows in patterns.items()
                }
                for signature, patterns in self.times.items()
            },
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(f".{os.getpid()}.part")
        beside.write_text(json.dumps(data, indent=0) + "\n")
        os.replace(beside, self.path)

    def measure(
        self,
        wanted: Iterable[tuple[Site, str, Width]],
        after: Callable[[int], None] | None = None,
        also: Mapping[str, Callable[[], Any]] | None = None,
    ) -> dict[str, Times]:
        """Time what is not in the table yet.

        Args:
            wanted: (site, pattern, (out, in)); pattern is "dense" or as "2:4".
            after: called with the number of layers done so far.
            also: calls timed in the same rounds as the layers, as whole models.
        Returns:
            The times of `also`.

        Raises:
            ValueError: a pattern other than "dense" without a `twin`.
        """
        missing: dict[tuple[str, str, Width], Site] = {}
        for site, pattern, width in wanted:
            if width not in self.times.get(site.signature, {}).get(pattern, {}):
                missing[site.signature, pattern, width] = site
        items, done, others = list(missing.items()), 0, {**(also or {})}
        found: dict[Any, Times] = {}
        while items or others:
            calls: dict[Any, Callable[[], Any]] = {f"also {n}": c for n, c in others.items()}
            part: list[tuple[str, str, Width]] = []
            held = 0
            while items and len(part) < TOGETHER and held < TOGETHER_BYTES:
                key, site = items.pop(0)
                part.append(key)
                made = self._call(site, *key[1:])
                if made is not None:
                    held += made[1]
                    calls[str(len(part) - 1)] = made[0]
            found |= self.timed(calls)
            others = {}
            for i, (signature, pattern, width) in enumerate(part):
                rows = self.times.setdefault(signature, {}).setdefault(pattern, {})
                # A layer that cannot be packed runs dense, so it never wins by the pattern.
                rows[width] = found.pop(str(i), Times(*[float("inf")] * 3))
            done += len(part)
            self._found = {}
            self.save()
            if after is not None:
                after(done)
        return {name: found[f"also {name}"] for name in also or {}}

    def timed(self, calls: Mapping[str, Callable[[], Any]], rounds: int = 0) -> dict[str, Times]:
        """Times of calls in turn, by the table's clock, over its own rounds or more.

        Caches are warm: in a model a layer finds its input there. Of a layer alone among many it
        would not, which made models of thin layers look slower than they are.
        """
        if not calls:
            return {}
        rounds = max(rounds, self.rounds)
        return time_us(calls, self.device, rounds=rounds, clock=self.clock, warm=True)

    def _call(self, site: Site, pattern: str, width: Width) -> tuple[Callable[[], Any], int] | None:
        """A forward of the layer and the bytes that it holds; None where it cannot be packed."""
        module, x = site.make(*width)
        if pattern != DENSE:
            if self.twin is None:
                raise ValueError(
                    f"times of {pattern} layers need LatencyTable(twin=...), which packs a layer, "
                    "as lambda layer, keep, group: sparse_ops.SparseLinear24.from_dense(layer)"
                )
            keep, group = (int(part) for part in pattern.split(":"))
            set_mask(module, NofM(keep, group).mask(module.weight.abs().float()))  # type: ignore
            try:
                module = self.twin(module, keep, group)
            except ValueError:
                return None

        def call() -> Any:
            with torch.inference_mode():
                return module(x)

        return call, x.nbytes + sum(p.nbytes for p in module.parameters())

    def of(self, times: Times) -> float:
        """The statistic of some times."""
        return float(getattr(times, self.statistic))

    def us(self, site: Site, width: Width, pattern: str = DENSE) -> float:
        """Microseconds of one call at these widths (axes 0 and 1 of the weight).

        Raises:
            ValueError: the widths are outside what was measured, or nothing was.
        """
        rows = self.times.get(site.signature, {}).get(pattern, {})
        if width in rows:
            return self.of(rows[width])
        place = (site.signature, pattern, width)
        if place not in self._found:
            known = {w: self.of(us) for w, us in rows.items()}
            self._found[place] = interpolate(known, width, f"{site.name} {pattern}")
        return self._found[place]


def interpolate(rows: Mapping[Width, float], width: Width, name: str = "the layer") -> float:
    """Bilinear between the corners of the smallest measured cell of (out, in) around the widths.

    Raises:
        ValueError: no four measured corners surround the widths.
    """
    sides: list[list[tuple[int, int]]] = []
    for value, axis, word in zip(width, (0, 1), ("out", "in"), strict=True):
        known = sorted({w[axis] for w in rows})
        if not known or not known[0] <= value <= known[-1]:
            span = f"{known[0]} to {known[-1]}" if known else "nothing"
            raise ValueError(
                f"{name}: {word} width {value} is outside what was measured ({span}); "
                "measure it, a table is never extrapolated"
            )
        pairs = [(low, high) for low in known for high in known if low <= value <= high]
        sides.append(sorted(pairs, key=lambda pair: pair[1] - pair[0]))
    cells = sorted(
        itertools.product(*sides), key=lambda c: (c[0][1] - c[0][0] + 1) * (c[1][1] - c[1][0] + 1)
    )
    for outs, ins in cells:
        if all((out, into) in rows for out in outs for into in ins):
            return sum(
                a * b * rows[out, into]
                for out, a in _weights(width[0], *outs)
                for into, b in _weights(width[1], *ins)
            )
    raise ValueError(f"{name}: no measured widths surround {width}; measure a grid")


def _weights(value: int, low: int, high: int) -> list[tuple[int, float]]:
    """The two ends of an interval, and how much each counts at a value between them."""
    share = 0.0 if low == high else (value - low) / (high - low)
    return [(low, 1 - share), (high, share)]


def grid(smallest: int, largest: int, points: int, multiple_of: int = 1) -> list[int]:
    """`points` widths from smallest to largest, evenly spaced, inner ones multiples."""
    if smallest >= largest:
        return [largest]
    inner = (
        round((smallest + (largest - smallest) * i / (points - 1)) / multiple_of) * multiple_of
        for i in range(1, points - 1)
    )
    return sorted({smallest, largest, *(w for w in inner if smallest < w < largest)})


def packed_wins(table: LatencyTable, site: Site, pattern: str, widths: Sequence[Width]) -> bool:
    """Whether the packed layer was faster than the dense one at all of these measured widths."""
    return all(table.us(site, w, pattern) < table.us(site, w) for w in widths)
