"""Amounts: how many units each layer drops.

An amount sees the unit scores of all layers and answers with one count per layer. Shares are of
units (weights, blocks, channels), in [0, 1), and count what is dropped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor


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


class Amount:
    """What every amount answers."""

    def drops(self, layers: Sequence[Units]) -> list[int]:
        """Units to drop in each layer, 0 <= drop < units."""
        raise NotImplementedError

    def fixed(self) -> float | None:
        """The share, where it is the same for all layers; None otherwise."""
        return None


def check_share(share: float, name: str) -> None:
    """Raise ValueError unless 0 <= share < 1."""
    if not 0 <= share < 1:
        raise ValueError(
            f"{name} must be in [0, 1), got {share}; it is the dropped share, 0.9 keeps a tenth"
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
