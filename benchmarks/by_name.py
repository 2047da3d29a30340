"""Every implementation that dispatch may choose as a row of its own, on its best measured tile.

Which one wins at a shape is then read from the rows, whatever the dispatcher would have taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from slimgemm import kernels
from slimgemm.benchmarks.harness import Implementation, Missing
from slimgemm.benchmarks.peers import need_gpu
from slimgemm.kernels.conv_layout import Convolution
from slimgemm.kernels.dispatch import plans
from slimgemm.kernels.formats import Packed24
from slimgemm.kernels.implementations import CONVOLUTIONS, IMPLEMENTATIONS, Candidate, Linear
from slimgemm.kernels.timing import Call
from slimgemm.kernels.tune_table import DTYPES, Choice, Row


class Operands(NamedTuple):
    """What an implementation is asked about, and the arguments it is called with.

    Args:
        x, w: activations or images, and the packed weight.
        conv: of a convolution; rows: rows of the product, which are pixels there.
        more: arguments behind x and w.
    """

    x: Tensor
    w: Packed24
    rows: int
    conv: tuple[Convolution] | tuple[()] = ()
    more: tuple[Any, ...] = ()


def candidates(convolution: bool) -> Mapping[str, Candidate]:
    """Name in a table -> implementation, of conv2d_24 or of spmm_24."""
    if not convolution:
        return IMPLEMENTATIONS
    return {**CONVOLUTIONS, "linear": Linear(kernels.spmm_24)}


def measured(of: Operands) -> Row | None:
    """The row that this GPU's table has for these operands."""
    found = plans(of.x.get_device()) if of.x.is_cuda else None
    if found is None or of.x.dtype not in DTYPES:
        return None
    op, conv = ("conv2d_24", of.conv[0]) if of.conv else ("spmm_24", None)
    return found.table.row_for(op, DTYPES[of.x.dtype], *of.w.shape, of.rows, conv)


def choice_of(name: str, of: Operands) -> Choice:
    """The fastest measured tile of `name` for these operands; its own choice where none was."""
    row = measured(of)
    choices = (result.choice for result in (row.ranked if row else ()))
    return next((c for c in choices if c.implementation == name), Choice(name))


def dispatched(of: Operands) -> str:
    """What the dispatcher takes for these operands, as a note."""
    row, known = measured(of), candidates(bool(of.conv))
    for result in row.ranked if row else ():
        if known[result.choice.implementation].takes(of.x, of.w, *of.conv):
            return f"dispatched to {result.choice}"
    return "dispatched to portable, no table" if of.x.is_cuda else ""


class Named:
    """One implementation by its name in the tables; keeps which tile it took, for the note."""

    def __init__(self, name: str, operands: Callable[[Any], Operands]) -> None:
        self.name, self.operands, self.took = name, operands, ""

    def __call__(self, given: Any) -> Call:
        """The call of this implementation on one input set.

        Raises:
            Missing: no GPU, or the implementation refuses this GPU, dtype or shape.
        """
        of = self.operands(given)
        need_gpu(of.x, self.name)
        one = candidates(bool(of.conv))[self.name]
        arguments = (of.x, of.w, *of.more)
        if not one.takes(of.x, of.w, *of.conv):
            try:
                one.bind(None, None)(*arguments)
            except ValueError as why:
                raise Missing(str(why)) from None
            raise Missing(f"{self.name} does not take these operands")
        choice = choice_of(self.name, of)
        run = one.bind(choice.tile, choice.splits)
        self.took = "" if choice == Choice(self.name) else str(choice)
        return lambda: run(*arguments)

    def note(self) -> str:
        """The measured tile that was taken, "" where the implementation chose itself."""
        return self.took


def named(
    operands: Callable[[Any], Operands], moved_bytes: int, convolution: bool = False
) -> list[Implementation]:
    """An Implementation for each name that dispatch may choose."""
    rows = [Named(name, operands) for name in candidates(convolution)]
    return [Implementation(f"slimgemm {n.name}", n, moved_bytes, note=n.note) for n in rows]


class Dispatched:
    """The op as users call it; keeps what it was dispatched to, for the note."""

    def __init__(self, run: Callable[..., Tensor], operands: Callable[[Any], Operands]) -> None:
        self.run, self.operands, self.took = run, operands, ""

    def __call__(self, given: Any) -> Call:
        of = self.operands(given)
        self.took = dispatched(of)
        return lambda: self.run(of.x, of.w, *of.more)

    def note(self) -> str:
        """What it was dispatched to; "" on a CPU."""
        return self.took
