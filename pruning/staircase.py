"""staircase: how long a layer takes at each width, and the multiple that costs nothing.

A kernel works in tiles, so that its time rises in steps: 65 channels may take as long as 80. The
suggested multiple is the largest one to which widths can be rounded up (almost) for free.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from slimgemm.kernels.timing import Times
from slimgemm.pruning.latency import LatencyTable
from slimgemm.pruning.sites import Site

MULTIPLES = (64, 32, 16, 8, 4, 2)
TOLERANCE = 0.03  # share of time that rounding a width up may cost


def sweep(table: LatencyTable, site: Site, widths: Sequence[int]) -> dict[int, Times]:
    """Width of axis 0 -> measured times of the dense layer; axis 1 stays as it is."""
    into = site.weight[1]
    table.measure((site, "dense", (width, into)) for width in widths)
    return {width: table.times[site.signature]["dense"][width, into] for width in widths}


def suggest_multiple(times: Mapping[int, Times], tolerance: float = TOLERANCE) -> int:
    """The largest of 64, 32, ... 2 to which rounding up costs at most `tolerance` on average.

    Args:
        times: a gapless sweep; widths whose multiple was not measured are not compared.
        tolerance: share of time.

    Raises:
        ValueError: fewer than four widths were measured.
    """
    if len(times) < 4:
        raise ValueError(f"a staircase needs four widths or more, got {len(times)}")
    for multiple in MULTIPLES:
        pairs = [(w, -(-w // multiple) * multiple) for w in times if w % multiple]
        extra = [times[up].p50 / times[w].p50 - 1 for w, up in pairs if up in times]
        if extra and sum(extra) / len(extra) <= tolerance:
            return multiple
    return 1


def draw_staircase(
    sweeps: Mapping[str, Mapping[int, Times]],
    path: str | os.PathLike[str],
    title: str,
    tolerance: float = TOLERANCE,
) -> None:
    """Write a picture: median time against width for each layer, p20 to p80 as a band."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, times in sweeps.items():
        widths = sorted(times)
        label = f"{name}: multiple of {suggest_multiple(times, tolerance)}"
        axes.step(widths, [times[w].p50 for w in widths], where="mid", label=label)
        low, high = ([times[w][i] for w in widths] for i in (0, 2))
        axes.fill_between(widths, low, high, step="mid", alpha=0.2)
    axes.set(xlabel="output channels", ylabel="time, µs", title=title)
    axes.set_ylim(bottom=0)
    axes.legend(title="rounding up is free to a")
    figure.savefig(path)
