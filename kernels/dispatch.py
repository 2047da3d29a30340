"""Which implementation runs an op: a launcher on a GPU, the torch twin elsewhere.

Launchers are imported at their first use, so that importing slimgemm needs neither Triton nor its
import time.

spmm_24 and conv2d_24 have several implementations (implementations.py). On a GPU model for which a
table of checked and measured times exists (tune_table.py), the fastest one that takes the operands
runs; without a table, or with one of other versions, the portable kernel does: no sparse tensor
core kernel is chosen on a GPU model on which it has not been checked and timed. A convolution of
one tap that has no row of its own runs as a linear layer where the table has a row for that one.
The table is read at the first call on each GPU and kept until `reload`. A call then costs one
look-up by dtype, shape and alignment, on the host alone: no wait for the GPU, so it may be captured
in a CUDA graph.

Memory: a call allocates its output; with K in several parts also an fp32 buffer [parts, M, N], and
`dense` the unpacked weight. Both are freed when the call returns, so torch's caching allocator
hands out the same memory again. No buffer is kept between calls: one per device and stream would
still be shared by CUDA graphs that were captured on one stream and replayed on two.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from slimgemm.kernels.configs import few_channels
from slimgemm.kernels.conv_layout import (
    Convolution,
    Padding,
    check_image,
    check_weight,
    convolution,
    frozen,
    is_nhwc,
)
from slimgemm.kernels.formats import Packed24
from slimgemm.kernels.implementations import (
    CONVOLUTIONS,
    IMPLEMENTATIONS,
    Candidate,
    Linear,
    Run,
)
from slimgemm.kernels.reference import check_product

if TYPE_CHECKING:  # read when a GPU is first used
    from slimgemm.kernels.tune_table import Row, Table

MOST_PLANS = 4096  # kept per GPU; all are dropped and made again beyond that

# op -> file in kernels/ with its launcher, file in kernels/ with its twin
OPS = {
    "pack_24": ("pack_24", "reference"),
    "unpack_24": ("unpack_24", "reference"),
    "prune_24": ("prune_24", "reference"),
    "prune_dense_24": ("prune_24", "reference"),
    "spmm_24": ("spmm_24", "reference"),
    "spmm_24_dgrad": ("spmm_24_dgrad", "reference"),
    "spmm_24_wgrad": ("spmm_24_wgrad", "reference"),
    "pack_conv": ("pack_conv", "reference_conv"),
    "unpack_conv": ("pack_conv", "reference_conv"),
    "conv2d_24": ("conv_24", "reference_conv"),
    "conv2d_24_dgrad": ("conv_24_grad", "reference_conv"),
    "conv2d_24_wgrad": ("conv_24_grad", "reference_conv"),
    "gemm_channels": ("gemm_channels", "reference_channels"),
    "gemm_channels_wgrad": ("gemm_channels_wgrad", "reference_channels"),
    "conv2d_channels": ("conv_channels", "reference_channels"),
    "conv2d_channels_dgrad": ("conv_channels", "reference_channels"),
    "conv2d_channels_wgrad": ("conv_channels_wgrad", "reference_channels"),
}


@functools.cache
def launcher(op: str) -> Callable[..., Any]:
    """The Triton launcher of `op`."""
    return getattr(importlib.import_module(f"slimgemm.kernels.{OPS[op][0]}"), op)


@functools.cache
def twin(op: str) -> Callable[..., Any]:
    """The plain torch twin of `op`, for any device."""
    return getattr(importlib.import_module(f"slimgemm.kernels.{OPS[op][1]}"), f"{op}_ref")


class Plans:
    """spmm_24 and conv2d_24 on one GPU, dispatched from `table`; decisions are kept by operands.

    Args:
        candidates, convolutions: name in the table -> implementation, of spmm_24 and of conv2d_24,
            to which this one's own spmm_24 is added as `linear`.
    """

    def __init__(
        self,
        table: Table,
        candidates: Mapping[str, Candidate] = IMPLEMENTATIONS,
        convolutions: Mapping[str, Candidate] = CONVOLUTIONS,
    ) -> None:
        self.table, self.candidates = table, candidates
        self.convolutions = {**convolutions, "linear": Linear(self.spmm_24)}
        self.kept: dict[tuple[Any, ...], Run] = {}

    def spmm_24(
        self,
        x: Tensor,
        w: Packed24,
        bias: Tensor | None = None,
        scale: Tensor | None = None,
        act: str = "none",
    ) -> Tensor:
        """spmm_24 by the implementation that the table names; see kernels/spmm_24.py."""
        values, meta, k, keep, group = w
        rows = x.numel() // k if k > 0 else 0
        if rows == 0 or keep != 2 or group != 4:
            return launcher("spmm_24")(x, w, bias, scale, act)
        if not x.is_contiguous():  # what is taken then depends on every stride
            return self.choose(x, w, rows)(x, w, bias, scale, act)
        low = x.data_ptr() & 15 | (values.data_ptr() & 15) << 4 | (meta.data_ptr() & 15) << 8
        key = (x.dtype, values.shape, k, (rows - 1).bit_length(), low)
        run = self.kept.get(key)
        if run is None:
            run = self.keep(key, self.choose(x, w, rows))
        return run(x, w, bias, scale, act)

    def conv2d_24(
        self, x: Tensor, w: Packed24, weight_shape: Sequence[int], bias: Tensor | None = None,
        stride: int | Sequence[int] = 1, padding: Padding = 0, dilation: int | Sequence[int] = 1,
        groups: int = 1, act: str = "none",
    ) -> Tensor:  # fmt: skip
        """conv2d_24 by the implementation that the table names; see kernels/conv_24.py."""
        values, meta, k, keep, group = w
        low = x.data_ptr() & 15 | (values.data_ptr() & 15) << 4 | (meta.data_ptr() & 15) << 8
        geometry = (weight_shape, stride, padding, dilation)
        key = (
            x.dtype, x.shape, x.stride(), values.shape, k, keep, group, low, groups,
            *map(frozen, geometry),
        )  # fmt: skip
        run = self.kept.get(key)
        if run is None:
            conv = convolution(*geometry, groups)
            run = self.keep(key, self.choose_conv(x, w, conv))
        return run(x, w, weight_shape, bias, stride, padding, dilation, groups, act)

    def keep(self, key: tuple[Any, ...], run: Run) -> Run:
        """Remember `run` for `key`."""
        if len(self.kept) >= MOST_PLANS:
            self.kept.clear()
        self.kept[key] = run
        return run

    def choose(self, x: Tensor, w: Packed24, rows: int) -> Run:
        """The fastest measured implementation that takes these operands, else the portable one.

        Raises:
            ValueError: x does not fit w.
        """
        from slimgemm.kernels.tune_table import DTYPES

        check_product("x", x, w.k, w)
        row = None
        if x.dtype in DTYPES and w.shape[0]:
            row = self.table.row_for("spmm_24", DTYPES[x.dtype], *w.shape, rows)
        as_measured = row is not None and _aligned(x, w) and x.is_contiguous()
        as_measured = as_measured and row is not None and (row.k % 8 == 0) == (w.k % 8 == 0)
        run = _fastest(row, self.candidates, (x, w), as_measured)
        return run or launcher("spmm_24")

    def choose_conv(self, x: Tensor, w: Packed24, conv: Convolution) -> Run:
        """As `choose`, for conv2d_24; a linear layer where only that one was measured.

        Raises:
            ValueError: x or w does not fit `conv`.
        """
        from slimgemm.kernels.tune_table import DTYPES

        check_weight(w, conv)
        check_image("x", x, conv.channels * conv.groups, w.values)
        height, width = conv.output_size(*x.shape[2:])
        pixels = x.shape[0] * height * width
        portable = launcher("conv2d_24")
        if not pixels or (w.keep, w.group) != (2, 4) or x.dtype not in DTYPES:
            return portable
        dtype, n = DTYPES[x.dtype], conv.out
        row = self.table.row_for("conv2d_24", dtype, n, conv.k, pixels, conv)
        if row is not None:
            as_measured = _aligned(x, w) and is_nhwc(x) and _alike(conv, row.conv)
            return _fastest(row, self.convolutions, (x, w, conv), as_measured) or portable
        linear = self.convolutions["linear"]
        if linear.takes(x, w, conv) and self.table.row_for(
            "spmm_24", dtype, n, conv.channels, pixels
        ):
            return linear.bind(None, None)
        return portable


def _fastest(
    row: Row | None,
    candidates: Mapping[str, Candidate],
    operands: tuple[Any, ...],
    as_measured: bool,
) -> Run | None:
    """The fastest of `row` that takes the operands; with the row's tile if they lie as they did."""
    for result in row.ranked if row else ():
        name, tile, splits = result.choice
        if candidates[name].takes(*operands):
            return candidates[name].bind(*((tile, splits) if as_measured else (None, None)))
    return None


# A row's tile may not do where loads are narrower than they were when it was measured.
def _aligned(x: Tensor, w: Packed24) -> bool:
    """True if every operand begins at a multiple of 16 bytes."""
    return all(t.data_ptr() % 16 == 0 for t in (x, w.values, w.meta))


def _alike(conv: Convolution, row: Convolution | None) -> bool:
    """True if the channels of `conv` are loaded and multiplied as those of `row`."""

    def kind(of: Convolution) -> tuple[bool, bool]:
        return of.channels % 8 == 0, few_channels(of.channels, of.out // of.groups)

    return row is not None and kind(conv) == kind(row)


@functools.cache
def plans(device: int) -> Plans | None:
    """The plans of CUDA device number `device`, or None where no table is for it.

    Raises:
        ValueError: a table is there and damaged.
    """
    from slimgemm.kernels import tune_table

    table = tune_table.find(tune_table.here(device))
    return None if table is None else Plans(table)


def reload() -> None:
    """Read the tables again at the next call: after `slimgemm tune` in a process that goes on.

    A CUDA graph that was captured before keeps the kernels that it holds.
    """
    plans.cache_clear()


def untuned(device: torch.device) -> str:
    """Why `device` has no table to dispatch from, in a sentence for reports; "" if it has one."""
    if device.type != "cuda":
        return ""
    index = torch.cuda.current_device() if device.index is None else device.index
    if plans(index) is not None:
        return ""
    return (
        f"`slimgemm tune` was not run on this GPU ({torch.cuda.get_device_name(index)}) with this "
        "torch and triton: 2:4 layers run on the portable kernels, without sparse tensor cores."
    )


def _on_device(device: torch.device, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with torch.cuda.device(device):
        return run(*args, **kwargs)


def implementation(op: str, device: torch.device) -> Callable[..., Any]:
    """The function that runs `op` on tensors of `device`.

    Raises:
        ValueError: the table of this GPU is damaged.
    """
    if device.type != "cuda":
        return twin(op)
    current = torch.cuda.current_device()
    index = current if device.index is None else device.index
    run = launcher(op)
    if op in ("spmm_24", "conv2d_24"):
        found = plans(index)
        run = run if found is None else getattr(found, op)
    # Triton launches on the current device, whatever device the tensors are on.
    return run if index == current else functools.partial(_on_device, device, run)
