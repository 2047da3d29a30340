"""The demo's picture: training and pruning curves, and a 2:4 tile of a real weight."""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Module

from slimgemm import kernels
from slimgemm.benchmarks.demo import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette, told apart with every colour blindness; marks and dashes differ too.
BLACK, BLUE, ORANGE, GREY = "#000000", "#0072B2", "#D55E00", "#8C8C8C"
BRANCHES = (
    ("2:4", "pruned", "tuned", BLUE, "o", "-"),
    ("channels", "cut", "cut_tuned", ORANGE, "s", "--"),
)
ROWS, COLUMNS = 8, 16  # of the tile
LAYER = "wide1"


class PictureError(ValueError):
    """matplotlib is missing."""


def require() -> None:
    """Raise PictureError unless a picture can be drawn; asked before anything is trained."""
    if importlib.util.find_spec("matplotlib") is None:
        raise PictureError("matplotlib is missing; pip install 'slimgemm[demo]'")


def draw(result: Result, path: Path) -> None:
    """Write the picture as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(12, 7.2), dpi=110)
    FigureCanvasAgg(figure)
    parts: Any = figure.subfigures(2, 1, height_ratios=(1.75, 1))
    top, bottom = parts
    accuracy, loss = top.subplots(
        1, 2, gridspec_kw={"left": 0.06, "right": 0.98, "top": 0.85, "bottom": 0.13, "wspace": 0.18}
    )
    curve(accuracy, result, "accuracy", "test accuracy, %", ".1f")
    curve(loss, result, "loss", "test cross entropy, nats", ".3f")
    loss.set_yscale("log")
    loss.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    loss.yaxis.set_major_formatter("{x:g}")
    loss.yaxis.set_minor_formatter(NullFormatter())
    accuracy.legend(loc="lower right", title="last epoch", alignment="left")
    loss.legend(loc="upper right", title="last epoch", alignment="left")
    seeds = len(result.runs)
    spread = f"mean of {seeds} seeds, band from lowest to highest" if seeds > 1 else "1 seed"
    name = result.job.data.name
    top.suptitle(f"{name}: dense training, then two ways to prune ({spread})", y=0.97)
    tiles(bottom, result)
    figure.savefig(path, metadata={"Software": "slimgemm"})


def curve(axes: Axes, result: Result, what: str, label: str, digits: str) -> None:
    """One quantity over all epochs; the dotted line is where the model is pruned."""
    runs, epochs = result.runs, result.job.epochs
    dense = [[getattr(s, what) for s in run.curves["dense"]] for run in runs]
    _band(axes, range(1, epochs + 1), dense, BLACK, "^", "-", "dense", digits)
    for name, pruned, tuned, colour, mark, dash in BRANCHES:
        lines = [
            [getattr(run.stages["dense"], what), getattr(run.stages[pruned], what)]
            + [getattr(s, what) for s in run.curves[tuned]]
            for run in runs
        ]
        x = [epochs, epochs + 0.5, *(epochs + 1 + i for i in range(len(lines[0]) - 2))]
        _band(axes, x, lines, colour, mark, dash, name, digits)
    axes.axvline(epochs + 0.25, color=GREY, linewidth=1, linestyle=":")
    for x_text, text, side in (
        (epochs + 0.1, "train", "right"),
        (epochs + 0.4, "prune, fine-tune", "left"),
    ):
        axes.annotate(
            text,
            (x_text, 1.01),
            xycoords=("data", "axes fraction"),
            ha=side,
            color=GREY,
            fontsize=9,
        )
    axes.set_xlabel("epoch")
    axes.set_ylabel(label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#E5E5E5")


def _band(
    axes: Axes, x: Sequence[float], lines: Sequence[Sequence[float]], colour: str, mark: str,
    dash: str, name: str, digits: str,
) -> None:  # fmt: skip
    """Mean of the lines, and a band from the lowest to the highest."""
    points = list(zip(*lines, strict=True))
    means = [statistics.mean(p) for p in points]
    label = f"{name}: {means[-1]:{digits}}"
    axes.plot(x, means, color=colour, marker=mark, markersize=5, linestyle=dash, label=label)
    if len(lines) > 1:
        low, high = [min(p) for p in points], [max(p) for p in points]
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


def tiles(figure: Any, result: Result) -> None:
    """A tile of one weight: trained, then 2:4, then as it is stored."""
    models = result.runs[0].models
    dense, pruned = (_tile(models[name].get_submodule(LAYER).weight) for name in ("dense", "tuned"))
    packed = kernels.pack_24(pruned)
    half, meta = COLUMNS // 2, COLUMNS // 4
    axes = figure.subplots(
        1,
        3,
        width_ratios=(COLUMNS, COLUMNS, half + meta),
        gridspec_kw={"left": 0.02, "right": 0.9, "top": 0.74, "bottom": 0.02, "wspace": 0.06},
    )
    figure.suptitle(
        f"A tile of {LAYER}: rows 0-{ROWS - 1}, columns 0-{COLUMNS - 1}, seed 0", y=0.98
    )
    limit = float(torch.stack([dense.abs(), pruned.abs()]).max())
    kept = kernels.unpack_24(packed._replace(values=torch.ones_like(packed.values))) != 0
    _weights(axes[0], dense, limit, None)
    axes[0].set_title("trained: 16 weights a row", fontsize=10)
    _weights(axes[1], pruned, limit, kept)
    axes[1].set_title("2:4, fine-tuned: each group of 4 keeps 2", fontsize=10)
    image = _weights(axes[2], packed.values, limit, None, group=2)
    axes[2].set_xlim(-0.5, half + meta - 0.5)
    for row, column in torch.cartesian_prod(torch.arange(ROWS), torch.arange(packed.meta.shape[1])):
        byte = int(packed.meta[row, column])
        place = half + 2 * int(column) + 0.5
        axes[2].text(
            place, int(row), f"{byte:02x}", ha="center", va="center", fontsize=8, family="monospace"
        )
    axes[2].set_title("packed: 8 values, 2 bytes of positions (hex)", fontsize=10)
    bar = figure.colorbar(image, cax=figure.add_axes((0.915, 0.08, 0.012, 0.6)))
    bar.set_label("weight")


def _tile(weight: Tensor | Module) -> Tensor:
    assert isinstance(weight, Tensor)
    return weight.detach()[:ROWS, :COLUMNS].float().cpu()


def _weights(axes: Axes, tile: Tensor, limit: float, kept: Tensor | None, group: int = 4) -> Any:
    """Weights as coloured cells; dropped ones are grey with a cross; a line between groups."""
    from matplotlib.patches import Rectangle

    image = axes.imshow(tile.numpy(), cmap="PuOr", vmin=-limit, vmax=limit, aspect="equal")
    rows, columns = tile.shape
    for x in range(columns + 1):
        heavy = x % group == 0
        axes.plot([x - 0.5] * 2, [-0.5, rows - 0.5], color="black" if heavy else "white",
                  linewidth=1.2 if heavy else 0.5, zorder=3 if heavy else 2)  # fmt: skip
    if kept is not None:
        for row, column in (~kept).nonzero().tolist():
            axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, color="#D9D9D9", zorder=1.5))
            axes.text(column, row, "x", ha="center", va="center", color="#595959", fontsize=7)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    return image
