"""How a kernel addresses the kept channels of an axis: as a range, as aligned runs, one by one.

    kept                      start  run     a kernel reads
    0 1 2 ... 47              0      RANGE   start + position                  no index
    16..31, 64..79            -      16      index[position // 16 * 16] + position % 16
    0 3 4 9                   -      RAGGED  index[position]

A run is 8 or 16 channels long, aligned to its length, so a thread can read 16 bytes at once. The
kind is found once, when the index is checked: on a GPU that waits for the device, later calls do
not. All kinds give the same result.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from slimgemm.kernels.formats import ChannelIndex, channel_index

RANGE, RAGGED = 0, 1  # values of `run` that are no length
RUNS = (16, 8)


class ChannelLayout(NamedTuple):
    """A checked ChannelIndex and how to address it; made by `channel_layout`.

    Args:
        index: int64 [kept], ascending; None only where run is RANGE.
        width: channels of the dense axis.
        kept: kept channels.
        start: first kept channel, if run is RANGE.
        run: RANGE, RAGGED, or the length of the aligned runs.
    """

    index: Tensor | None  # type: ignore[assignment]  # hides tuple.index
    width: int
    kept: int
    start: int = 0
    run: int = RANGE


def every_channel(width: int) -> ChannelLayout:
    """The layout that keeps all of `width` channels."""
    return ChannelLayout(None, width, width)


# Of each index seen, while it lives: (version of the tensor, width, groups) and (start, run).
_SEEN: WeakIdKeyDictionary = WeakIdKeyDictionary()


def check_groups(index: ChannelIndex, groups: int, name: str) -> None:
    """Raise ValueError unless each of `groups` parts of the axis keeps the same number."""
    if index.width % groups:
        raise ValueError(f"{name} must have a width that {groups} groups divide, got {index.width}")
    counts = torch.bincount(index.index.cpu() // max(index.width // groups, 1), minlength=groups)
    if bool((counts != counts[0]).any()):
        place = int((counts != counts[0]).int().argmax())
        raise ValueError(
            f"{name} must keep the same number of channels in each of {groups} groups, got "
            f"{int(counts[0])} in group 0 and {int(counts[place])} in group {place}"
        )


def addressing(index: Tensor, groups: int = 1) -> tuple[int, int]:
    """(start, run) of a checked int64 index; a run never crosses a group."""
    kept = index.numel()
    if kept == 0:
        return 0, RANGE
    values = index.cpu()
    start = int(values[0])
    contiguous = int(values[-1]) - start + 1 == kept
    # Triton knows a start to be aligned if 16 divides it; other ranges are better as runs.
    if contiguous and start % 16 == 0:
        return start, RANGE
    for run in RUNS:
        if kept // groups % run == 0:
            blocks = values.view(-1, run)
            whole = (blocks[:, -1] - blocks[:, 0] == run - 1) & (blocks[:, 0] % run == 0)
            if bool(whole.all()):
                return 0, run
    return (start, RANGE) if contiguous else (0, RAGGED)


def channel_layout(
    index: ChannelIndex | ChannelLayout | None, width: int, name: str, groups: int = 1
) -> ChannelLayout:
    """The layout of `index`, checked once per tensor; None keeps all of `width` channels.

    Raises:
        ValueError: an index is negative, repeated, out of order or not below its width, or the
            groups keep different numbers of channels.
    """
    if index is None:
        return every_channel(width)
    if isinstance(index, ChannelLayout):
        return index
    tensor = index.index
    # The version of an inference tensor is not counted, so such an index is read at each call.
    key = None if tensor.is_inference() else (tensor._version, index.width, groups)
    seen = _SEEN.get(tensor)
    if key is None or seen is None or seen[0] != key:
        checked = channel_index(tensor, index.width, name)
        check_groups(checked, groups, name)
        seen = key, addressing(checked.index, groups)
        if key is not None:
            _SEEN[tensor] = seen
    start, run = seen[1]
    return ChannelLayout(
        None if run == RANGE else tensor.to(torch.int64), index.width, tensor.numel(), start, run
    )


def check_layout(
    name: str, layout: ChannelLayout, kept: int, device: torch.device, groups: int = 1
) -> None:
    """Raise ValueError unless `layout` keeps `kept` channels and its index is where it is read."""
    index, width, count, start, run = layout
    if count != kept:
        raise ValueError(f"{name} must keep {kept} channels as the weight, got {count}")
    if run == RANGE:
        if start < 0 or start + count > width:
            raise ValueError(f"{name} must lie in 0..{width - 1}, got {start}..{start + count - 1}")
        return
    if run != RAGGED and (run not in RUNS or count // groups % run):
        raise ValueError(
            f"{name} must be read one by one or in runs of 8 or 16 that divide the "
            f"{count // groups} channels of a group, got runs of {run}"
        )
    if index is None or index.dtype != torch.int64 or tuple(index.shape) != (count,):
        got = None if index is None else f"{index.dtype} {list(index.shape)}"
        raise ValueError(f"{name} must hold an int64 index [{count}], got {got}")
    if index.device != device or not index.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous on {device} as the other operands, got {index.device} "
            f"{index.stride()}; move the index once"
        )
