"""repair: new values for kept weights, so that a layer's outputs change least.

Both solve min || (W - V) X ||**2 over V with the given zeros, for each row on its own, from the
Gram matrix X XT of the calibration inputs. A small multiple of the mean diagonal is added to it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DAMPING_STEPS = (1, 10, 100, 1000)  # multiples of the damping that are tried one after the other


class NotPositive(ValueError):
    """A Gram matrix could not be factorised with any damping."""


def factor(gram: Tensor, damping: float, notes: list[str]) -> Tensor:
    """Lower Cholesky factor of gram + damping * mean(diagonal) * I; more damping where it fails.

    Args:
        gram: float64 [columns, columns], symmetric.
        damping: share of the mean diagonal that is added.
        notes: gets a line for each raised step.

    Raises:
        NotPositive: no step of DAMPING_STEPS makes it positive definite.
    """
    mean = float(gram.diagonal().mean())
    for times in DAMPING_STEPS:
        damped = gram.clone()
        damped.diagonal().add_(damping * times * mean)
        lower, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0 and bool(torch.isfinite(lower).all()):
            return lower
        notes.append(f"damping {damping * times:g} is too small for the Gram matrix")
    raise NotPositive(
        f"the Gram matrix of the calibration inputs is not positive definite even with damping "
        f"{damping * DAMPING_STEPS[-1]:g}; use more calibration data, or ignore the layer"
    )


def revive(gram: Tensor) -> tuple[Tensor, Tensor]:
    """(gram with 1 on the diagonal of dead, all-zero inputs; bool [columns], True = dead)."""
    dead = gram.diagonal() == 0
    alive = gram.clone()
    alive.diagonal()[dead] = 1
    return alive, dead


@dataclass(frozen=True)
class LeastSquares:
    """The exact minimum for each row: V_S = (G_SS)**-1 (G W)_S over the kept columns S.

    Costs one factorisation of the kept columns per row.

    Args:
        damping: share of the mean diagonal added to the Gram matrix.
        rows: rows solved at once; bounds memory to rows * columns**2 numbers.
    """

    damping: float = 0.01
    rows: int = 64

    def __call__(self, weight: Tensor, mask: Tensor, gram: Tensor, notes: list[str]) -> Tensor:
        """New weights.

        Args:
            weight, mask: float64 and bool [rows, columns].
            gram: float64 [columns, columns].
            notes: gets a line where damping had to be raised.
        """
        gram, _ = revive(gram)
        damped = gram.clone()
        damped.diagonal().add_(self.damping * float(gram.diagonal().mean()))
        target = weight @ damped
        result = torch.zeros_like(weight)
        identity = torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
        for start in range(0, weight.shape[0], self.rows):
            kept = mask[start : start + self.rows]
            both = kept.unsqueeze(1) & kept.unsqueeze(2)
            # Dropped columns become rows of the identity: their solution is zero.
            system = torch.where(both, damped, identity)
            goal = torch.where(kept, target[start : start + self.rows], 0.0)
            lower = torch.linalg.cholesky(system)
            solved = torch.cholesky_solve(goal.unsqueeze(2), lower).squeeze(2)
            result[start : start + self.rows] = torch.where(kept, solved, 0.0)
        return result


@dataclass(frozen=True)
class ADMM:
    """Alternating directions: one factorisation for all rows, then cheap steps.

    Args:
        iterations: steps.
        damping: share of the mean diagonal added to the Gram matrix.
        rho: penalty, relative to a Gram matrix with a diagonal of one.

    Source: Boza 2024, arXiv 2401.02938, algorithm 1.
    """

    iterations: int = 30
    damping: float = 0.01
    rho: float = 1.0

    def __call__(self, weight: Tensor, mask: Tensor, gram: Tensor, notes: list[str]) -> Tensor:
        """New weights; arguments as for LeastSquares."""
        gram, _ = revive(gram)
        scale = gram.diagonal().sqrt()
        scaled = gram / scale / scale.unsqueeze(1)
        damped = scaled + self.damping * torch.eye(
            scaled.shape[0], dtype=scaled.dtype, device=scaled.device
        )
        lower = factor(damped, self.rho, notes)  # damped has a mean diagonal of about one
        penalty = self.rho * float(damped.diagonal().mean())
        w = weight * scale
        target = w @ damped
        z, u = torch.where(mask, w, 0.0), torch.zeros_like(w)
        for _ in range(self.iterations):
            v = torch.cholesky_solve((target + penalty * (z - u)).T, lower).T
            z = torch.where(mask, v + u, 0.0)
            u = u + v - z
        return z / scale
