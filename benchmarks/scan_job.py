"""scan_job: what `slimgemm scan` and `slimgemm staircase` do, from a user's model to a picture."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn

from slimgemm.benchmarks.prune_check import check_folder, pattern_of
from slimgemm.benchmarks.prune_job import can_draw, line
from slimgemm.benchmarks.user_code import told
from slimgemm.benchmarks.user_data import Made, Source
from slimgemm.kernels.timing import Times
from slimgemm.pruning.latency import LatencyTable
from slimgemm.pruning.patterns import Channels
from slimgemm.pruning.sensitivity import Scan, scan
from slimgemm.pruning.sites import Site, find_sites
from slimgemm.pruning.space import Choices, Space
from slimgemm.pruning.staircase import draw_staircase, suggest_multiple, sweep

SCAN, STAIRCASE = "scan", "staircase"  # in the folder of a run
POINTS, TIMES = "points.jsonl", "latency.json"
LEAST = 4  # widths of a staircase
LAYERS = 4  # of a model, where none is named


@dataclass(frozen=True)
class ScanJob:
    """One `slimgemm scan`; see its options."""

    source: Source
    out: Path
    patterns: tuple[str, ...]
    multiple_of: int
    ratios: tuple[float, ...]
    max_drop: float
    ignore: tuple[str, ...]
    debug: bool

    def run(self, console: Console) -> Scan:
        """Scan, print the table, draw the curves.

        Raises:
            ValueError: bad input, or the folder holds another scan.
        """
        folder = self.out / SCAN
        patterns = [pattern_of(word, self.multiple_of) for word in self.patterns]
        made = self.source.load(lambda: check_folder(folder))
        with told(folder, self.debug):
            found = scan(
                made.model, made.example, made.metric, patterns=patterns, ratios=self.ratios,
                ignore=self.ignore, higher_is_better=self.source.higher_is_better,
                seed=self.source.seed, log=folder / POINTS, tag=self.source.tag,
                show=console.is_terminal,
                say=None if console.is_terminal else functools.partial(line, console),
            )  # fmt: skip
        line(console, found.table(self.max_drop).rstrip())
        _written(console, folder / "scan.png", lambda path: found.draw(path, self.max_drop))
        return found


@dataclass(frozen=True)
class StaircaseJob:
    """One `slimgemm staircase`; see its options."""

    source: Source
    out: Path
    layers: tuple[str, ...]
    span: int
    rounds: int
    tolerance: float
    debug: bool

    def run(self, console: Console) -> dict[str, int]:
        """Layer -> the multiple to which its width can be rounded up for free; all is printed.

        Raises:
            ValueError: bad input, no layer to time, or times of another device or versions.
        """
        folder = self.out / STAIRCASE
        made = self.source.load(lambda: check_folder(folder))
        with told(folder, self.debug):
            return self._timed(made, folder, console)

    def _timed(self, made: Made, folder: Path, console: Console) -> dict[str, int]:
        sites = find_sites(made.model, made.example)
        if self.layers:
            sites = named_sites(sites, self.layers)
        else:
            sites = largest_sites(sites, cut_layers(made.model, made.example))
        device = next(made.model.parameters()).device
        table = LatencyTable(device, path=folder / TIMES, rounds=self.rounds)
        sweeps: dict[str, dict[int, Times]] = {}
        with Progress(console=console, disable=not console.is_terminal) as bar:
            task = bar.add_task(STAIRCASE, total=len(sites))
            for name, site in sites.items():
                bar.update(task, description=f"{name}, {site.weight[0]} wide")
                width = site.weight[0]
                sweeps[name] = sweep(table, site, range(max(1, width - self.span + 1), width + 1))
                bar.update(task, advance=1)
        multiples = {name: suggest_multiple(us, self.tolerance) for name, us in sweeps.items()}
        console.print(_table(sites, sweeps, multiples, self.tolerance))
        line(console, _advice(sites, multiples))
        title = f"{table.identity['device']}, torch {table.identity['torch']}"
        _written(
            console, folder / "staircase.png",
            lambda path: draw_staircase(sweeps, path, title, self.tolerance),
        )  # fmt: skip
        return multiples


def _sweepable(site: Site) -> bool:
    """Whether every width up to its own makes a layer."""
    groups = site.conv[3] if site.conv else 1
    return groups == 1 or (site.depthwise and groups == site.weight[0])


def named_sites(sites: Mapping[str, Site], names: tuple[str, ...]) -> dict[str, Site]:
    """The sites of these names.

    Raises:
        ValueError: there is no such layer, its widths rise by groups, or it is too narrow.
    """
    for name in names:
        if name not in sites:
            raise ValueError(f"--layer {name} is no layer that runs; layers are {', '.join(sites)}")
        if not _sweepable(sites[name]):
            raise ValueError(
                f"--layer {name} has {sites[name].conv[3]} groups, so that most widths make no "
                "layer; name one without groups"
            )
        if sites[name].weight[0] < LEAST:
            raise ValueError(f"--layer {name} is less than {LEAST} wide; name a wider one")
    return {name: sites[name] for name in names}


def cut_layers(model: nn.Module, example: Any) -> set[str]:
    """Layers whose output channels pruning can drop; ValueError where the model has none."""
    try:
        groups = Space(model, example, Choices((Channels(),))).groups
    except ValueError as error:
        raise ValueError(f"{error}. A layer named by --layer can be timed") from error
    return {layer for name in groups for layer in name.split(" + ")}


def largest_sites(sites: Mapping[str, Site], cut: Collection[str]) -> dict[str, Site]:
    """Of the sites whose width can be cut the LAYERS that do most work, each shape once.

    Raises:
        ValueError: there is none.
    """
    once: dict[Any, str] = {}
    for name, site in sorted(sites.items(), key=lambda item: -item[1].macs):
        if name in cut and _sweepable(site) and site.weight[0] >= LEAST:
            once.setdefault((site.signature, site.weight), name)
    if not once:
        raise ValueError(
            f"no layer that can be cut is without groups and {LEAST} wide or more; name one by "
            "--layer"
        )
    return {name: sites[name] for name in [*once.values()][:LAYERS]}


def _advice(sites: Mapping[str, Site], multiples: Mapping[str, int]) -> str:
    """What to do; layers whose times do not depend on their widths have no say."""
    flat = [name for name, multiple in multiples.items() if multiple >= sites[name].weight[0]]
    some = [multiple for name, multiple in multiples.items() if name not in flat]
    whose = "its" if len(flat) == 1 else "the"
    said = [f"Cutting {', '.join(flat)} saves no time here, up to {whose} whole width."]
    said *= bool(flat)
    if some and min(some) == 1:
        named = ", ".join(name for name, multiple in multiples.items() if multiple == 1)
        said.append(f"Rounding the width of {named} up costs time: slimgemm prune --multiple-of 1.")
    elif some:
        who = "all others" if flat else "all"
        said.append(f"Rounding up is free to {who} with slimgemm prune --multiple-of {min(some)}.")
    return " ".join(said)


def _table(
    sites: Mapping[str, Site],
    sweeps: Mapping[str, Mapping[int, Times]],
    multiples: Mapping[str, int],
    tolerance: float,
) -> Table:
    table = Table(title=f"median times; rounding up costs at most {100 * tolerance:g} % on average")
    headings = ("layer", "widths", "µs, narrowest", "µs, as it is", "free multiple")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "layer" else "right")
    for name, us in sweeps.items():
        low, high = min(us), max(us)
        table.add_row(
            f"{name}: {sites[name].signature}", f"{low} to {high}", f"{us[low].p50:.1f}",
            f"{us[high].p50:.1f}", str(multiples[name]),
        )  # fmt: skip
    return table


def _written(console: Console, path: Path, draw: Callable[[Path], None]) -> None:
    """Draw a picture where that can be, and say where it is."""
    if not can_draw():
        line(console, f"Wrote {path.parent}; a picture needs pip install 'slimgemm[search]'")
        return
    draw(path)
    line(console, f"Wrote {path.parent}, with {path.name}")
