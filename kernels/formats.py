"""The packed format: what every bit means, and nothing else.

Along K (the in features of a linear layer, the input channels of a convolution
at a fixed tap), each group of 4 weights keeps 2. A packed matrix stores the kept
values and, for each, its 2-bit position inside its group:

    dense   [ 0.  a  0.  b |  c  d  0. 0. ]        K = 8
    values  [ a   b  |  c   d ]                    4 of 8
    meta    0b01_00_11_01                          1 byte per 8 weights

Byte j of `meta` covers weights 8j .. 8j+7. Bits 0-1 and 2-3 are the first and
second kept position of group 2j; bits 4-5 and 6-7 those of group 2j+1. The two
positions of a group are always in ascending order, also when fewer than two
weights of the group are non-zero: the spare position is the lowest free one and
holds +0.0. -0.0 packs as +0.0. A K that is no multiple of 8 is padded with groups
of zeros; the true K is kept beside the tensors.

The other patterns (1:4, 1:8, 2:8, 4:8, written keep:group) have the same two
tensors, with a bit mask for a byte: bit i of byte j is set when weight 8j+i is
kept, and exactly `keep` bits are set in each group.

    dense   [ 0.  0.  0.  a  0.  0.  b  0. ]       keep 2 of a group of 8
    values  [ a   b ]
    meta    0b0100_1000
"""

from __future__ import annotations

import functools
import sys
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

BYTE_WEIGHTS = 8  # dense weights that one byte of meta covers, for every pattern
PATTERNS = ((2, 4), (1, 4), (1, 8), (2, 8), (4, 8))  # keep, group
LEAST_SAVING = 0.1  # a layer is packed when that saves at least this share of its weight's bytes


class Packed24(NamedTuple):
    """A weight with `keep` of every `group` values stored; [N, k] when dense.

    Args:
        values: [N, ceil(k/8) * 8 * keep / group], floating, row-major; ascending position.
        meta: uint8 [N, ceil(k/8)], row-major; bit order in the module docstring.
        k: dense columns, before padding to a multiple of 8.
        keep, group: 2:4 unless said otherwise.
    """

    values: Tensor
    meta: Tensor
    k: int
    keep: int = 2
    group: int = 4

    @property
    def shape(self) -> tuple[int, int]:
        """(N, k) of the dense weight."""
        return self.values.shape[0], self.k

    @property
    def nbytes(self) -> int:
        """Bytes of values and metadata together."""
        return self.values.nbytes + self.meta.nbytes

    @property
    def dense_nbytes(self) -> int:
        """Bytes of the dense weight in the same dtype."""
        return self.values.shape[0] * self.k * self.values.element_size()


def values_per_byte(keep: int, group: int) -> int:
    """Stored values per byte of meta (8 dense weights)."""
    return BYTE_WEIGHTS * keep // group


def check_pattern(keep: int, group: int) -> None:
    """Raise ValueError unless keep:group is one of PATTERNS."""
    if (keep, group) not in PATTERNS:
        known = ", ".join(f"{a}:{b}" for a, b in PATTERNS)
        raise ValueError(f"keep:group must be one of {known}, got {keep}:{group}")


def packed_shapes(n: int, k: int, keep: int, group: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of (values, meta) for a dense [n, k] weight."""
    columns = -(-k // BYTE_WEIGHTS)
    return (n, columns * values_per_byte(keep, group)), (n, columns)


def positions_of_byte(byte: int, keep: int, group: int) -> list[int] | None:
    """Kept positions (0..7, ascending) that a byte of meta names, or None if no valid byte."""
    if (keep, group) == (2, 4):
        a, b, c, d = (byte >> shift & 3 for shift in (0, 2, 4, 6))
        return [a, b, 4 + c, 4 + d] if a < b and c < d else None
    kept = [i for i in range(BYTE_WEIGHTS) if byte >> i & 1]
    full = all(
        sum(start <= i < start + group for i in kept) == keep
        for start in range(0, BYTE_WEIGHTS, group)
    )
    return kept if full else None


@functools.cache
def position_table(keep: int, group: int) -> Tensor:
    """int64 [256, values per byte]: kept positions of every byte, -1 where it is not valid."""
    check_pattern(keep, group)
    width = values_per_byte(keep, group)
    rows = [positions_of_byte(byte, keep, group) or [-1] * width for byte in range(256)]
    with _disable_current_modes():  # kept for every later caller, so never a fake or meta tensor
        return torch.tensor(rows, dtype=torch.int64, device="cpu")


@functools.cache
def pair_table(keep: int, group: int) -> Tensor:
    """int64 [65536, 2 * values per byte]: kept positions (0..15) of two bytes read as one uint16.

    -1 where a byte is not valid. 4 MiB for 2:4, and half the look-ups that `position_table` needs.
    """
    with _disable_current_modes():
        first = position_table(keep, group)
        second = torch.where(first < 0, first, first + BYTE_WEIGHTS)
        # The processor decides which of the two bytes is the high one of the number.
        axes = (0, 1) if sys.byteorder == "little" else (1, 0)
        both = [
            t.unsqueeze(axis).expand(256, 256, -1)
            for t, axis in zip((first, second), axes, strict=True)
        ]
        return torch.cat(both, -1).view(65536, -1)


@functools.cache
def byte_table(keep: int, group: int) -> Tensor:
    """uint8 [256]: the byte of meta for a mask of kept positions; 0 where no byte names it."""
    check_pattern(keep, group)
    masks = {}
    for byte in range(256):
        kept = positions_of_byte(byte, keep, group)
        if kept is not None:
            masks[sum(1 << i for i in kept)] = byte
    with _disable_current_modes():
        rows = [masks.get(mask, 0) for mask in range(256)]
        return torch.tensor(rows, dtype=torch.uint8, device="cpu")


def check_shapes(packed: Packed24) -> None:
    """Raise ValueError unless shapes, dtypes, devices and strides fit. Reads no element."""
    values, meta, k, keep, group = packed
    check_pattern(keep, group)
    if values.ndim != 2 or not values.dtype.is_floating_point:
        raise ValueError(
            f"values must be a floating matrix, got {values.dtype} {tuple(values.shape)}"
        )
    want_values, want_meta = packed_shapes(values.shape[0], k, keep, group)
    if k < 0 or values.shape != want_values:
        raise ValueError(
            f"values must be {list(want_values)} for k={k} at {keep}:{group}, "
            f"got {list(values.shape)}"
        )
    if meta.dtype != torch.uint8 or meta.shape != want_meta:
        raise ValueError(
            f"meta must be uint8 {list(want_meta)} for values {list(values.shape)}, "
            f"got {meta.dtype} {list(meta.shape)}"
        )
    if meta.device != values.device:
        raise ValueError(
            f"values and meta must be on one device, got {values.device} and {meta.device}"
        )
    for name, tensor in (("values", values), ("meta", meta)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be row-major, got strides {tensor.stride()}")


def check(packed: Packed24) -> None:
    """Raise ValueError unless `packed` is well formed, every byte of its metadata included.

    Reads the metadata once; on a GPU this waits for the device.
    """
    check_shapes(packed)
    meta, keep, group = packed.meta, packed.keep, packed.group
    valid = (position_table(keep, group)[:, 0] >= 0).to(meta.device)
    bad = ~valid.index_select(0, meta.reshape(-1).int())
    if not bool(bad.any()):
        return
    first = int(bad.int().argmax())
    row, column = divmod(first, meta.shape[1])
    byte = int(meta.reshape(-1)[first])
    why = (
        "its positions are not ascending" if (keep, group) == (2, 4) else f"no {keep}:{group} mask"
    )
    raise ValueError(
        f"meta is not valid in {int(bad.sum())} bytes: row {row}, byte {column} (weights "
        f"{8 * column}-{8 * column + 7}) is 0b{byte:08b}, {why}; "
        "the file or tensor is damaged, pack the dense weight again"
    )


class PackedMask(NamedTuple):
    """A mask at 1 bit per weight.

    Args:
        bits: uint8 [ceil(weights / 8)]; bit i of byte j is weight 8j + i in the memory order of a
            contiguous weight, 1 = kept. Unused bits of the last byte are 0.
        shape: shape of the weight.
    """

    bits: Tensor
    shape: tuple[int, ...]


class ChannelIndex(NamedTuple):
    """Which channels of a dense axis are kept: ascending, without repeats.

    Args:
        index: int64 [kept], any device; 0 <= index < width, ascending.
        width: channels of the dense axis.
    """

    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    width: int

    @property
    def kept(self) -> int:
        """Number of kept channels."""
        return self.index.numel()


def channel_index(
    index: Tensor | list[int] | range, width: int, name: str = "index"
) -> ChannelIndex:
    """A checked ChannelIndex.

    Raises:
        ValueError: an index is negative, repeated, out of order or not below `width`.
    """
    tensor = torch.as_tensor(list(index) if isinstance(index, range) else index)
    if tensor.numel() == 0:
        tensor = tensor.to(torch.int64)
    if tensor.ndim != 1 or tensor.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"{name} must be int64 of one dimension, got {tensor.dtype} {list(tensor.shape)}"
        )
    tensor = tensor.to(torch.int64)
    outside = (tensor < 0) | (tensor >= width)
    if bool(outside.any()):
        place = int(outside.int().argmax())
        raise ValueError(
            f"{name} must be in 0..{width - 1}, got {int(tensor[place])} at place {place}"
        )
    falling = tensor[1:] <= tensor[:-1]
    if bool(falling.any()):
        place = int(falling.int().argmax()) + 1
        raise ValueError(
            f"{name} must be ascending without repeats, got {int(tensor[place])} after "
            f"{int(tensor[place - 1])} at place {place}; sort it and drop the repeats"
        )
    return ChannelIndex(tensor, width)
