"""Which implementation runs an op: a launcher on a GPU, the torch twin elsewhere.

Launchers are imported at their first use, so that importing slimgemm needs neither Triton nor its
import time.

spmm_24 has several implementations (implementations.py). On a GPU model for which a table of
checked and measured times exists (tune_table.py), the fastest one that takes the operands runs;
without a table, or with one of other versions, the portable kernel does: no sparse tensor core
kernel is chosen on a GPU model on which it has not been checked and timed. The table is read at
the first call on each GPU and kept until `reload`. A call then costs one look-up by dtype, shape
and alignment, on the host alone: no wait for the GPU, so it may be captured in a CUDA graph.

Memory: a call allocates its output; with K in several parts also an fp32 buffer [parts, M, N], and
`dense` the unpacked weight. Both are freed when the call returns, so torch's caching allocator
hands out the same memory again. No buffer is kept between calls: one per device and stream would
still be shared by CUDA graphs that were captured on one stream and replayed on two.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from slimgemm.kernels.formats import Packed24
from slimgemm.kernels.implementations import IMPLEMENTATIONS, Candidate, Run
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
    """spmm_24 on one GPU, dispatched from `table`; what was decided is kept by operand kind.

    Args:
        candidates: name in the table -> implementation.
    """

    def __init__(self, table: Table, candidates: Mapping[str, Candidate] = IMPLEMENTATIONS) -> None:
        self.table, self.candidates = table, candidates
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
            run = self.choose(x, w, rows)
            if len(self.kept) >= MOST_PLANS:
                self.kept.clear()
            self.kept[key] = run
        return run(x, w, bias, scale, act)

    def choose(self, x: Tensor, w: Packed24, rows: int) -> Run:
        """The fastest measured implementation that takes these operands, else the portable one.

        Raises:
            ValueError: x does not fit w.
        """
        from slimgemm.kernels.tune_table import DTYPES

        check_product("x", x, w.k, w)
        n, k = w.shape
        row = None
        if x.dtype in DTYPES and n:
            bucket = 1 << (rows - 1).bit_length()
            row = self.table.row_for("spmm_24", DTYPES[x.dtype], n, k, bucket)
        for result in row.ranked if row else ():
            name, tile, splits = result.choice
            candidate = self.candidates[name]
            if not candidate.takes(x, w):
                continue
            if not _laid_out_as_measured(x, w, row):
                tile, splits = None, None
            return candidate.bind(tile, splits)
        return launcher("spmm_24")


def _laid_out_as_measured(x: Tensor, w: Packed24, row: Row | None) -> bool:
    """True if loads are as wide as they were for `row`: its tile may not do for narrower ones."""
    aligned = all(t.data_ptr() % 16 == 0 for t in (x, w.values, w.meta))
    return row is not None and aligned and x.is_contiguous() and (row.k % 8 == 0) == (w.k % 8 == 0)


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
        "torch and triton: 2:4 linear layers run on the portable kernel, without sparse tensor "
        "cores."
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
    if op == "spmm_24":
        found = plans(index)
        run = run if found is None else found.spmm_24
    # Triton launches on the current device, whatever device the tensors are on.
    return run if index == current else functools.partial(_on_device, device, run)
