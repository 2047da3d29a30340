"""activations: scores that look at what flows into a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from slimgemm.pruning.calibrate import ColumnSquares, NonZero, Statistic
from slimgemm.pruning.patterns import like_weight, rows_of
from slimgemm.pruning.scores import Context, Needs, Score, as_float


def read(context: Context) -> Tensor:
    """The statistic of the layer, or ValueError."""
    if context.statistics is None:
        raise ValueError(f"{context.name}: this score needs calibration data; pass calibration=")
    return context.statistics


def per_column(values: Tensor, weight: Tensor) -> Tensor:
    """[groups, columns] in calibration order, repeated for each row: the weight's shape."""
    rows = rows_of(weight)
    repeated = values.repeat_interleave(weight.shape[0] // values.shape[0], 0)
    return like_weight(repeated.reshape(rows.shape), weight.shape)


@dataclass(frozen=True)
class Wanda(Score):
    """|w| times the L2 norm of its input.

    The norm is the root mean square over calibration rows: every weight of a layer has the same
    number of rows, so the order is that of the paper. The paper compares within output rows: use
    Unstructured(per_row=True), or NofM, whose groups lie within rows.

    Args:
        p: power of the product, as in Magnitude; it matters where weights go together.

    Source: Sun et al. 2023, arXiv 2306.11695, equation 1.
    """

    p: float = 1
    needs: ClassVar[Needs] = "inputs"

    def statistic(self, module: nn.Module) -> Statistic:
        """Mean square of each column's input."""
        return ColumnSquares(module)

    def __call__(self, weight: Tensor, context: Context) -> Tensor:
        """float64, shape of `weight`; `statistics` may be mean squares or a Gram matrix."""
        found = read(context)
        squares = found.diagonal(dim1=1, dim2=2) if found.ndim == 3 else found
        norm = per_column(squares.to(weight.device), weight).sqrt()
        return (as_float(weight).abs() * norm).pow(self.p)


@dataclass(frozen=True)
class ZeroActivations(Score):
    """How often the input of a weight is not zero; channels that are mostly zero go first.

    The average percentage of zeros of a channel is 1 minus this, counted where the channel is read
    (behind the activation and any pooling). With Channels the readers' columns decide.

    Source: Hu et al. 2016, arXiv 1607.03250, equation 1.
    """

    needs: ClassVar[Needs] = "inputs"
    axis: ClassVar[Literal["out", "in"]] = "in"

    def statistic(self, module: nn.Module) -> Statistic:
        """Share of values that are not zero, for each input channel."""
        return NonZero(module)

    def __call__(self, weight: Tensor, context: Context) -> Tensor:
        """float64; a column's scores sum to the share of its input that is not zero."""
        share = read(context).to(weight.device)
        groups = share.numel() // weight.shape[1]
        rows, taps, columns = rows_of(weight).shape
        per_row = share.view(groups, 1, columns).repeat_interleave(rows // groups, 0)
        spread = per_row.expand(rows, taps, columns) / (rows // groups * taps)
        return like_weight(spread, weight.shape)
