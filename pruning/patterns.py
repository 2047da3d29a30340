"""Patterns: which weights are dropped together, and how a mask is cut from scores.

A pattern reads scores as a tensor [rows, taps, columns]: a linear weight [N, K] is [N, 1, K], a
convolution weight [O, I, kh, kw] is [O, kh * kw, I], so groups run along the input channels at a
fixed tap (kh, kw), the order of the NHWC implicit GEMM. In a grouped convolution I is the number
of input channels of one group. A score never knows a pattern: a pattern sums the scores of the
weights that it drops together.

Masks are bool, True = kept. Of equal scores the one at the lower index is kept.
"""

from __future__ import annotations

import numbers
from dataclasses import dataclass

import torch
from torch import Tensor

from slimgemm.kernels.formats import LEAST_SAVING, PATTERNS
from slimgemm.pruning.transposable import transposable_mask

LOWEST = float("-inf")
SHORT = 16  # axes up to this length are ranked by comparing all pairs, without a sort


def check_whole(value: object, name: str, least: int = 1) -> None:
    """Raise ValueError unless `value` is a whole number (no bool) of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")


def rows_of(weight: Tensor) -> Tensor:
    """[N, K] or [O, I, kh, kw] as [rows, taps, columns]; a view where the strides allow it."""
    if weight.ndim == 2:
        return weight.unsqueeze(1)
    o, i = weight.shape[:2]
    return weight.flatten(2).transpose(1, 2).reshape(o, -1, i)


def like_weight(rows: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """[rows, taps, columns] back in the layout of a weight of this shape; inverse of `rows_of`."""
    if len(shape) == 2:
        return rows.squeeze(1)
    return rows.transpose(1, 2).reshape(shape)


def keep_highest(scores: Tensor, keep: int) -> Tensor:
    """bool like `scores`: the `keep` highest along the last axis; ties go to the lower index."""
    if scores.shape[-1] <= SHORT:
        return _rank(scores) < keep
    order = scores.sort(dim=-1, descending=True, stable=True).indices[..., :keep]
    return torch.zeros(scores.shape, dtype=torch.bool, device=scores.device).scatter_(
        -1, order, torch.ones_like(order, dtype=torch.bool)
    )


def _rank(scores: Tensor) -> Tensor:
    """uint8 like `scores`: how many of the last axis come before each; for short axes."""
    place = torch.arange(scores.shape[-1], device=scores.device)
    rank = torch.zeros(scores.shape, dtype=torch.uint8, device=scores.device)
    for j, other in enumerate(scores.unbind(-1)):
        column = other.unsqueeze(-1)
        rank += (column > scores) | ((column == scores) & (place > j))
    return rank


def _pad(rows: Tensor, r: int, c: int, value: float) -> Tensor:
    """Pad [rows, taps, columns] at the end, to whole blocks of r rows and c columns."""
    return torch.nn.functional.pad(
        rows, (0, -rows.shape[2] % c, 0, 0, 0, -rows.shape[0] % r), value=value
    )


class Pattern:
    """What every pattern answers. Subclasses are frozen dataclasses; they combine with any score.

    A unit is what is dropped together. `share` is the dropped share that the pattern itself fixes,
    or None where an amount decides.
    """

    share: float | None = None

    @property
    def columns(self) -> int | None:
        """Columns that a unit spans within a row at one tap; None where units span several taps."""
        return None

    def refusal(self, shape: tuple[int, ...]) -> str | None:
        """Why a weight of this shape cannot take the pattern, or None."""
        if len(shape) in (2, 4):
            return None
        return f"a weight of {len(shape)} dimensions is neither a matrix nor a 2-D convolution"

    def units(self, scores: Tensor) -> Tensor:
        """[units]: the sum of the scores of each unit, in ascending order of place."""
        raise NotImplementedError

    def expand(self, kept: Tensor, shape: tuple[int, ...]) -> Tensor:
        """bool [units] as a mask of the weight's shape."""
        raise NotImplementedError

    def mask(self, scores: Tensor, drop: int) -> Tensor:
        """bool, shape of `scores`: all but the `drop` units of the lowest score."""
        units = self.units(scores)
        return self.expand(keep_highest(units, units.numel() - drop), tuple(scores.shape))

    def stored_bytes(self, mask: Tensor, itemsize: int) -> int:
        """Bytes that a weight with this mask takes on disk: dense, where no format packs it."""
        return mask.numel() * itemsize


@dataclass(frozen=True)
class NofM(Pattern):
    """Keep `keep` of every `group` weights along the input channels; 2:4 is NofM(keep=2, group=4).

    Where `group` does not divide the number of input channels the last group is treated as padded
    with zeros: it keeps at most `keep` of the weights it has.

    Args:
        keep: weights kept per group, 1 <= keep < group.
        group: weights per group.
        transposable: 2:4 along the output channels too, so that the transposed weight packs as
            well; the exact best of the 90 masks of each 4x4 block.

    Raises:
        ValueError: keep and group are no whole numbers, keep is not in 1 .. group-1, or
            transposable with anything but 2:4.
    """

    keep: int = 2
    group: int = 4
    transposable: bool = False

    def __post_init__(self) -> None:
        check_whole(self.keep, "keep of NofM")
        check_whole(self.group, "group of NofM")
        if self.keep >= self.group:
            raise ValueError(
                f"NofM keeps 1 to group-1 weights of each group, got keep={self.keep}, "
                f"group={self.group}; keep counts the weights that stay"
            )
        if self.transposable and (self.keep, self.group) != (2, 4):
            raise ValueError(f"only 2:4 can be transposable here, got {self.keep}:{self.group}")

    @property
    def share(self) -> float:  # type: ignore[override]
        """Dropped share, 1 - keep / group."""
        return 1 - self.keep / self.group

    def density(self, rows: int, columns: int) -> float:
        """Share that stays of a matrix: of a last group that is cut short at most `keep` stay."""
        whole, rest = divmod(columns, self.group)
        if not self.transposable:
            return (whole * self.keep + min(rest, self.keep)) / columns
        corner = torch.ones(rows % self.group, rest)  # all but this block keeps half
        kept = int(self.mask(corner).sum()) if corner.numel() else 0
        return ((rows * columns - corner.numel()) / 2 + kept) / (rows * columns)

    @property
    def packs(self) -> bool:
        """Whether a format and kernels hold it packed; any other keep:group stays dense."""
        return (self.keep, self.group) in PATTERNS

    @property
    def columns(self) -> int:
        """A group."""
        return self.group

    def __str__(self) -> str:
        return f"{self.keep}:{self.group}" + (" transposable" if self.transposable else "")

    def units(self, scores: Tensor) -> Tensor:
        """One unit per weight: [weights], in the order of the weight's memory."""
        return scores.flatten()

    def mask(self, scores: Tensor, drop: int = 0) -> Tensor:
        """bool, shape of `scores`; `drop` is not read, the pattern fixes it."""
        rows = rows_of(scores)
        if self.transposable:
            both = transposable_mask(rows.transpose(0, 1)).transpose(0, 1)
            return like_weight(both, scores.shape).contiguous()
        padded = _pad(rows, 1, self.group, LOWEST).unflatten(2, (-1, self.group))
        kept = keep_highest(padded, self.keep).flatten(2)[..., : rows.shape[2]]
        return like_weight(kept, scores.shape).contiguous()

    def stored_bytes(self, mask: Tensor, itemsize: int) -> int:
        """Packed: `keep` values per group and one byte per 8 weights, K padded to 8.

        Dense where no format packs it, or where packing saves less than LEAST_SAVING.
        """
        dense = super().stored_bytes(mask, itemsize)
        if not self.packs:
            return dense
        rows = rows_of(mask)
        columns = rows.shape[1] * (-(-rows.shape[2] // 8) * 8)
        values = rows.shape[0] * -(-columns * self.keep // self.group)
        packed = values * itemsize + rows.shape[0] * columns // 8
        return packed if packed <= (1 - LEAST_SAVING) * dense else dense


@dataclass(frozen=True)
class Unstructured(Pattern):
    """Each weight alone: the lowest scores of the layer go, wherever they are.

    Args:
        per_row: every output row drops the same number (Wanda compares within rows).
    """

    per_row: bool = False

    @property
    def columns(self) -> int:
        """One."""
        return 1

    def __str__(self) -> str:
        return "unstructured per row" if self.per_row else "unstructured"

    def mask(self, scores: Tensor, drop: int) -> Tensor:
        """bool, shape of `scores`: `drop` weights fewer; per row, drop / rows of each, rounded."""
        if not self.per_row:
            return super().mask(scores, drop)
        rows = scores.flatten(1)
        return keep_highest(rows, rows.shape[1] - round(drop / rows.shape[0])).view(scores.shape)

    def units(self, scores: Tensor) -> Tensor:
        """One unit per weight: [weights], in the order of the weight's memory."""
        return scores.flatten()

    def expand(self, kept: Tensor, shape: tuple[int, ...]) -> Tensor:
        """bool [weights] as a mask of the weight's shape."""
        return kept.reshape(shape)


@dataclass(frozen=True)
class Block(Pattern):
    """Blocks of `r` output rows by `c` input channels, at a fixed tap of a convolution.

    Blocks at the lower and right edge may be partial; they compete with their sum as it is.

    Args:
        r: rows (out features) per block.
        c: columns (in features) per block.
    """

    r: int
    c: int

    def __post_init__(self) -> None:
        check_whole(self.r, "r of Block (rows)")
        check_whole(self.c, "c of Block (columns)")

    @property
    def columns(self) -> int:
        """Columns of a block."""
        return self.c

    def __str__(self) -> str:
        return f"block {self.r}x{self.c}"

    def units(self, scores: Tensor) -> Tensor:
        """[blocks]: sums, ordered by block row, tap, block column."""
        padded = _pad(rows_of(scores), self.r, self.c, 0.0)
        blocks = padded.unflatten(2, (-1, self.c)).unflatten(0, (-1, self.r))
        return blocks.sum(dim=(1, 4)).flatten()

    def expand(self, kept: Tensor, shape: tuple[int, ...]) -> Tensor:
        """bool [blocks] as a mask of the weight's shape."""
        n, taps, k = (*rows_shape(shape),)
        blocks = kept.reshape(-(-n // self.r), taps, -(-k // self.c))
        rows = blocks.repeat_interleave(self.r, 0).repeat_interleave(self.c, 2)
        return like_weight(rows[:n, :, :k], shape).contiguous()


@dataclass(frozen=True)
class Vector(Pattern):
    """A row of a convolution kernel (kw weights), or `length` weights along K of a matrix.

    Args:
        length: weights per vector of a linear layer; convolutions do not read it.
    """

    length: int = 8

    def __post_init__(self) -> None:
        check_whole(self.length, "length of Vector")

    def __str__(self) -> str:
        return f"vector {self.length}"

    def units(self, scores: Tensor) -> Tensor:
        """[vectors]: sums, in the order of the weight's memory."""
        if scores.ndim == 4:
            return scores.sum(dim=3).flatten()
        return Block(1, self.length).units(scores)

    def expand(self, kept: Tensor, shape: tuple[int, ...]) -> Tensor:
        """bool [vectors] as a mask of the weight's shape."""
        if len(shape) == 4:
            return kept.reshape(*shape[:3], 1).expand(shape).contiguous()
        return Block(1, self.length).expand(kept, shape)


@dataclass(frozen=True)
class Kernel(Pattern):
    """A 2-D slice [kh, kw] of a convolution: the connection of one input to one output channel."""

    def __str__(self) -> str:
        return "kernel"

    def refusal(self, shape: tuple[int, ...]) -> str | None:
        """Only convolutions have kernels."""
        return None if len(shape) == 4 else "a linear layer has no 2-D kernels; use Block or Vector"

    def units(self, scores: Tensor) -> Tensor:
        """[O * I]: sums over kh and kw."""
        return scores.sum(dim=(2, 3)).flatten()

    def expand(self, kept: Tensor, shape: tuple[int, ...]) -> Tensor:
        """bool [O * I] as a mask [O, I, kh, kw]."""
        return kept.reshape(*shape[:2], 1, 1).expand(shape).contiguous()


@dataclass(frozen=True)
class Channels(Pattern):
    """Whole channels; the layers really shrink (pruning.channels).

    Under a normalisation over channels (LayerNorm, RMSNorm, GroupNorm) they go too: the norm of the
    smaller model takes its moments over the channels that stay, so it wants fine-tuning. An ignored
    norm pins its channels. A norm over a single channel erases it: give a floor with large shares.

    Args:
        multiple_of: widths that remain are rounded up to a multiple of this.
        floor: channels that always remain in a coupled group.
    """

    multiple_of: int = 1
    floor: int = 1

    def __post_init__(self) -> None:
        check_whole(self.multiple_of, "multiple_of of Channels")
        check_whole(self.floor, "floor of Channels")

    def __str__(self) -> str:
        return "channels" if self.multiple_of == 1 else f"channels, multiple of {self.multiple_of}"


def rows_shape(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(rows, taps, columns) of a weight of this shape."""
    if len(shape) == 2:
        return shape[0], 1, shape[1]
    return shape[0], shape[2] * shape[3], shape[1]
