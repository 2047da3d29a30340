"""sparsegpt: second-order pruning of one layer, with an update of the weights that stay.

Columns are dropped from left to right. When column j loses weights, the columns behind it take
over, by the row of the inverse Hessian of the layer's squared output error:

    W[:, j:] -= (w_j - q_j) / U[j, j] * U[j, j:]        U upper Cholesky factor of H**-1

Masks are chosen where they are needed, from the weights as updated so far: for each group of NofM
at its first column, for other patterns for a block of columns at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from slimgemm.pruning.activations import read
from slimgemm.pruning.calibrate import Gram, Statistic
from slimgemm.pruning.patterns import LOWEST, NofM, Pattern, like_weight, rows_of
from slimgemm.pruning.repair import LeastSquares, NotPositive, factor, revive
from slimgemm.pruning.scores import Context, Needs, Score


@dataclass(frozen=True)
class Solution:
    """What a solver decided for one layer: mask and new weight of the weight's shape, and notes."""

    mask: Tensor
    weight: Tensor
    notes: tuple[str, ...]


class Solver(Score):
    """A score that also gives kept weights new values; needs the Gram matrix of the inputs."""

    needs: ClassVar[Needs] = "inputs"

    def statistic(self, module: nn.Module) -> Statistic:
        """The Gram matrix."""
        return Gram(module)

    def refusal(self, weight: Tensor, pattern: Pattern) -> str | None:
        """Why the pattern cannot be solved for this weight, or None."""
        return None

    def rows(self, task: Task) -> tuple[Tensor, Tensor]:
        """(mask, new weight) of a matrix, both [rows, columns]."""
        raise NotImplementedError

    def solve(
        self,
        weight: Tensor,
        context: Context,
        pattern: Pattern,
        share: float,
        earlier: Tensor | None = None,
    ) -> Solution:
        """Mask and new weights of a layer.

        Args:
            weight: [N, K] or [O, I, kh, kw].
            context: its statistics are the Gram matrix.
            pattern, share: what is dropped, and which share of it.
            earlier: a mask whose dropped weights stay dropped, or None.

        Raises:
            ValueError: the pattern cannot be solved, or the Gram matrix cannot be factorised; the
                layer is named.
        """
        why = self.refusal(weight, pattern)
        if why is not None:
            raise ValueError(f"{context.name}: {why}")
        grams = read(context).to(weight.device)
        view = rows_of(weight)
        allowed = rows_of(torch.ones_like(weight, dtype=torch.bool) if earlier is None else earlier)
        notes: list[str] = []
        masks, weights = [], []
        step = view.shape[0] // grams.shape[0]
        for place, gram in enumerate(grams):
            rows = slice(place * step, (place + 1) * step)
            alive, dead = revive(gram)
            if bool(dead.any()):
                notes.append(f"{int(dead.sum())} of {dead.numel()} inputs are always zero")
            open_ = allowed[rows].flatten(1) & ~dead
            matrix = torch.where(open_, view[rows].flatten(1).double(), 0.0)
            task = Task(matrix, open_, alive, pattern, share, view.shape[1], notes)
            try:
                mask, solved = self.rows(task)
            except NotPositive as error:
                raise ValueError(f"{context.name}: {error}") from error
            masks.append(mask)
            weights.append(solved)
        shape = view.shape
        return Solution(
            like_weight(torch.cat(masks).view(shape), weight.shape).contiguous(),
            like_weight(torch.cat(weights).view(shape), weight.shape).to(weight.dtype).contiguous(),
            tuple(f"{context.name}: {note}" for note in notes),
        )


@dataclass(frozen=True)
class Task:
    """One matrix to solve.

    Args:
        matrix: float64 [rows, columns]; columns are (tap, input channel).
        open: bool like matrix: weights that an earlier mask and live inputs leave to choose from.
        gram: float64 [columns, columns], no zero on its diagonal.
        pattern, share: what is dropped, and which share.
        taps: taps per row.
        notes: gets lines for the report.
    """

    matrix: Tensor
    open: Tensor
    gram: Tensor
    pattern: Pattern
    share: float
    taps: int
    notes: list[str]

    def choose(self, scores: Tensor, columns: slice) -> Tensor:
        """Mask of some columns by their scores; what is not open goes first."""
        closed = scores.masked_fill(~self.open[:, columns], LOWEST)
        return self.pattern.mask(closed, round(self.share * self.pattern.units(closed).numel()))

    def slices(self, block: int) -> list[tuple[int, int]]:
        """Column ranges whose masks are chosen at once, in order."""
        columns = self.matrix.shape[1]
        per_tap = columns // self.taps
        if isinstance(self.pattern, NofM):
            return [
                (tap + start, tap + min(start + self.pattern.group, per_tap))
                for tap in range(0, columns, per_tap)
                for start in range(0, per_tap, self.pattern.group)
            ]
        unit = self.pattern.columns or 1
        step = -(-block // unit) * unit
        return [(start, min(start + step, columns)) for start in range(0, columns, step)]


@dataclass(frozen=True)
class SparseGPT(Solver):
    """Frantar & Alistarh's one-shot pruning; NofM, Unstructured, and on matrices Block and Vector.

    Args:
        damping: share of the Gram matrix's mean diagonal added to it; raised where that is too
            little, each step reported, then refused.
        block: columns that are updated together, and whose mask is chosen at once.

    Source: Frantar & Alistarh 2023, arXiv 2301.00774, algorithm 1.
    """

    damping: float = 0.01
    block: int = 128

    def refusal(self, weight: Tensor, pattern: Pattern) -> str | None:
        """Units must lie within a row of one tap."""
        if isinstance(pattern, NofM) or pattern.columns == 1:
            return None
        if pattern.columns is None or weight.ndim == 4:
            return (
                f"SparseGPT drops columns one after the other and cannot take {pattern} on "
                f"{list(weight.shape)}; use NofM or Unstructured"
            )
        return None

    def rows(self, task: Task) -> tuple[Tensor, Tensor]:
        """(mask, new weight), both [rows, columns]."""
        lower = factor(task.gram, self.damping, task.notes)
        upper = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
        w, mask = task.matrix.clone(), torch.zeros_like(task.open)
        pending = task.slices(self.block)
        while pending:
            start = stop = pending[0][0]
            here = []
            while pending and pending[0][1] - start <= max(self.block, pending[0][1] - stop):
                here.append(pending.pop(0))
                stop = here[-1][1]
            error = self._block(task, w, mask, upper, here)
            w[:, stop:] -= error @ upper[start:stop, stop:]
        return mask, torch.where(mask, w, 0.0)

    def _block(
        self, task: Task, w: Tensor, mask: Tensor, upper: Tensor, here: list[tuple[int, int]]
    ) -> Tensor:
        """Drop the columns of one block in place; [rows, width] errors for the columns behind."""
        start, stop = here[0][0], here[-1][1]
        u = upper[start:stop, start:stop]
        part = w[:, start:stop]
        error = torch.zeros_like(part)
        begins = dict(here)
        for j in range(stop - start):
            if start + j in begins:
                columns = slice(start + j, begins[start + j])
                inside = slice(j, columns.stop - start)
                scores = (part[:, inside] / u.diagonal()[inside]).square()
                mask[:, columns] = task.choose(scores, columns)
            gone = torch.where(mask[:, start + j], 0.0, part[:, j])
            error[:, j] = gone / u[j, j]
            part[:, j:] -= error[:, j : j + 1] * u[j, j:]
        return error


@dataclass(frozen=True)
class OptimalBrainSurgeon(Solver):
    """w**2 / (2 [H**-1]_jj), and the joint optimal update of all weights that stay.

    All weights of a layer go at once; the update is then the least-squares solution on the kept
    columns of each row, which is what the one-by-one update converges to.

    Args:
        damping: as for SparseGPT.

    Source: Hassibi & Stork 1993, "Second order derivatives for network pruning", equations 5, 6.
    """

    damping: float = 0.01

    def rows(self, task: Task) -> tuple[Tensor, Tensor]:
        """(mask, new weight), both [rows, columns]."""
        lower = factor(task.gram, self.damping, task.notes)
        inverse = torch.cholesky_inverse(lower).diagonal()
        scores = task.matrix.square() / (2 * inverse)
        shape = (task.matrix.shape[0], task.taps, -1)
        closed = scores.masked_fill(~task.open, LOWEST)
        # as a convolution of taps x 1, so that units keep to their tap
        weight = closed.view(shape).transpose(1, 2).unsqueeze(3).contiguous()
        weight = weight if task.taps > 1 else weight.flatten(1)
        drop = round(task.share * task.pattern.units(weight).numel())
        mask = rows_of(task.pattern.mask(weight, drop)).flatten(1)
        return mask, LeastSquares(self.damping)(task.matrix, mask, task.gram, task.notes)
