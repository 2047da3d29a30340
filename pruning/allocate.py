"""Amounts: how many units each layer drops.

An amount sees the unit scores of all layers and answers with one count per layer. Shares are of
units (weights, blocks, channels), in [0, 1), and count what is dropped.
"""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slimgemm.pruning.inputs import Inputs
from slimgemm.pruning.patterns import Pattern
from slimgemm.pruning.scores import Score


@dataclass(frozen=True)
class Units:
    """The units of one layer or of one group of coupled channels.

    Args:
        name: what messages call it.
        scores: [units], float.
        shape: shape of the weight (of the first one, for coupled channels).
        weights: weights in all units together.
    """

    name: str
    scores: Tensor
    shape: tuple[int, ...]
    weights: int


@dataclass(frozen=True)
class Setting:
    """What `plan` was asked, for amounts that look at the whole model."""

    model: nn.Module
    example_inputs: Inputs
    pattern: Pattern
    score: Score
    calibration: Sequence[Any] | None
    ignore: Sequence[str]
    seed: int


class Amount:
    """What every amount answers."""

    def resolve(self, setting: Setting) -> Amount:
        """An amount that only counts; itself, but for amounts that evaluate the model."""
        return self

    def drops(self, layers: Sequence[Units]) -> list[int]:
        """Units to drop in each layer, 0 <= drop < units."""
        raise NotImplementedError

    def fixed(self) -> float | None:
        """The share, where it is the same for all layers; None otherwise."""
        return None

    @property
    def reads_scores(self) -> bool:
        """True where counts depend on scores, so that all layers must be scored before any."""
        return False


def check_share(share: float, name: str) -> None:
    """Raise ValueError unless `share` is a number and 0 <= share < 1."""
    number = isinstance(share, numbers.Real) and not isinstance(share, bool)
    if not number or not 0 <= share < 1:
        raise ValueError(
            f"{name} must be in [0, 1), got {share!r}; it is the dropped share, 0.9 keeps a tenth"
        )


def count(units: int, share: float) -> int:
    """round(units * share), at most all but one."""
    return min(round(units * share), max(units - 1, 0))


@dataclass(frozen=True)
class Uniform(Amount):
    """The same share everywhere.

    Args:
        share: dropped share in [0, 1), or None for patterns that fix it themselves.
    """

    share: float | None = None

    def __post_init__(self) -> None:
        if self.share is not None:
            check_share(self.share, "Uniform")

    def fixed(self) -> float | None:
        """The share."""
        return self.share

    def drops(self, layers: Sequence[Units]) -> list[int]:
        """round(units * share) in each layer."""
        if self.share is None:
            raise ValueError("Uniform() needs a share for this pattern, as in Uniform(0.5)")
        return [count(layer.scores.numel(), self.share) for layer in layers]


@dataclass(frozen=True)
class PerLayer(Amount):
    """A share for each layer by name; layers without one use `default`.

    Args:
        shares: name of a layer (for coupled channels: of any layer in the group) -> dropped share.
        default: share of the layers that `shares` does not name.
    """

    shares: Mapping[str, float]
    default: float = 0.0

    def __post_init__(self) -> None:
        check_share(self.default, "PerLayer default")
        if not isinstance(self.shares, Mapping):
            raise ValueError(
                f"PerLayer needs a share for each layer as {{'fc1': 0.5}}, got {self.shares!r}; "
                "the same share everywhere is Uniform"
            )
        for name, share in self.shares.items():
            check_share(share, f"PerLayer share of {name}")

    def drops(self, layers: Sequence[Units]) -> list[int]:
        """round(units * share of the layer).

        Raises:
            ValueError: a named layer is not among the layers that can be pruned, or two names of
                one coupled group ask for different shares.
        """
        left = set(self.shares)
        result = []
        for layer in layers:
            names = layer.name.split(" + ")
            asked = {self.shares[name] for name in names if name in self.shares}
            if len(asked) > 1:
                raise ValueError(
                    f"{layer.name} are coupled and drop one share, got {sorted(asked)}; "
                    "name one of them"
                )
            left -= set(names)
            result.append(count(layer.scores.numel(), asked.pop() if asked else self.default))
        if left:
            known = ", ".join(layer.name for layer in layers)
            raise ValueError(
                f"PerLayer names {', '.join(sorted(left))}, which cannot be pruned here; "
                f"layers are {known}"
            )
        return result


@dataclass(frozen=True)
class Global(Amount):
    """One threshold for all layers: the units of the lowest score go, wherever they are.

    Args:
        share: dropped share of all weights together.
        floor: share of its units that every layer keeps at least; it keeps layers alive.
        mean: compare a unit's score per weight; layers with larger units are not favoured then.
    """

    share: float
    floor: float = 0.05
    mean: bool = True

    def __post_init__(self) -> None:
        check_share(self.share, "Global")
        check_share(self.floor, "Global floor")

    @property
    def reads_scores(self) -> bool:
        """Always."""
        return True

    def normalised(self, layer: Units) -> Tensor:
        """[units] float64: what is compared across layers."""
        size = layer.weights / max(layer.scores.numel(), 1)
        return layer.scores.double().cpu() / (size if self.mean else 1.0)

    def drops(self, layers: Sequence[Units]) -> list[int]:
        """Counts whose weights add up to the share, as nearly as whole units allow.

        Raises:
            ValueError: the floors keep more than the share leaves.
        """
        scores = torch.cat([self.normalised(layer) for layer in layers])
        sizes = torch.cat(
            [torch.full((la.scores.numel(),), la.weights / la.scores.numel()) for la in layers]
        )
        owner = torch.cat([torch.full((la.scores.numel(),), i) for i, la in enumerate(layers)])
        most = [
            min(la.scores.numel() - 1, int(la.scores.numel() * (1 - self.floor))) for la in layers
        ]
        # Ties: the higher index goes first, so that the lower one stays.
        order = (scores.numel() - 1) - scores.flip(0).sort(stable=True).indices
        place = torch.zeros_like(owner)
        for i in range(len(layers)):
            mine = owner[order] == i
            place[mine] = torch.arange(int(mine.sum()))
        allowed = place < torch.tensor(most)[owner[order]]
        budget = self.share * float(sizes.double().sum())
        taken = torch.where(allowed, sizes[order], 0.0).double().cumsum(0)
        if float(taken[-1]) < budget - float(sizes.max()):
            raise ValueError(
                f"Global({self.share}) cannot be reached: a floor of {self.floor} in every layer "
                f"leaves at most {float(taken[-1] / sizes.double().sum()):.3g} to drop"
            )
        chosen = allowed & (taken <= budget + 1e-6)
        return torch.bincount(owner[order][chosen], minlength=len(layers)).tolist()


@dataclass(frozen=True)
class LAMP(Global):
    """Global, on scores relative to what is left of their layer: s_u / sum of all s_v >= s_u.

    With Magnitude(p=2) this is layer-adaptive magnitude pruning.

    Source: Lee et al. 2021, arXiv 2010.07611, equation 3.
    """

    floor: float = 0.0

    def normalised(self, layer: Units) -> Tensor:
        """[units] float64: the LAMP score of each unit."""
        scores = layer.scores.double().cpu()
        order = scores.sort(descending=True, stable=True).indices
        left = scores[order].cumsum(0).clamp_min(1e-300)
        return torch.empty_like(scores).scatter_(0, order, scores[order] / left)


@dataclass(frozen=True)
class ERK(Amount):
    """Erdos-Renyi-Kernel: a layer's density is proportional to sum(shape) / prod(shape).

    Small layers stay dense, wide ones get sparse; layers that would be more than dense are dense
    and the others share the rest.

    Args:
        share: dropped share of all weights together.

    Source: Evci et al. 2020, arXiv 1911.11134, section 3.
    """

    share: float

    def __post_init__(self) -> None:
        check_share(self.share, "ERK")

    def densities(self, layers: Sequence[Units]) -> list[float]:
        """Kept share of each layer, in (0, 1]."""
        raw = [sum(la.shape) / float(torch.Size(la.shape).numel()) for la in layers]
        dense = [False] * len(layers)
        while True:
            keep = (1 - self.share) * sum(la.weights for la in layers)
            keep -= sum(la.weights for la, full in zip(layers, dense, strict=True) if full)
            rest = [
                r * la.weights for r, la, full in zip(raw, layers, dense, strict=True) if not full
            ]
            scale = keep / sum(rest) if rest else 0.0
            over = [not full and scale * r > 1 for r, full in zip(raw, dense, strict=True)]
            if not any(over):
                return [1.0 if full else scale * r for r, full in zip(raw, dense, strict=True)]
            dense = [full or more for full, more in zip(dense, over, strict=True)]

    def drops(self, layers: Sequence[Units]) -> list[int]:
        """round(units * (1 - density))."""
        return [
            count(layer.scores.numel(), 1 - density)
            for layer, density in zip(layers, self.densities(layers), strict=True)
        ]
