"""Which implementation runs an op: the Triton launcher on a GPU, the torch twin elsewhere.

Launchers are imported at their first use, so that importing slimgemm needs neither Triton nor its
import time.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch

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


def launcher(op: str) -> Callable[..., Any]:
    """The Triton launcher of `op`."""
    return getattr(importlib.import_module(f"slimgemm.kernels.{OPS[op][0]}"), op)


def twin(op: str) -> Callable[..., Any]:
    """The plain torch twin of `op`, for any device."""
    return getattr(importlib.import_module(f"slimgemm.kernels.{OPS[op][1]}"), f"{op}_ref")


def _on_device(device: torch.device, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with torch.cuda.device(device):
        return run(*args, **kwargs)


def implementation(op: str, device: torch.device) -> Callable[..., Any]:
    """The function that runs `op` on tensors of `device`."""
    if device.type != "cuda":
        return twin(op)
    if device.index in (None, torch.cuda.current_device()):
        return launcher(op)
    # Triton launches on the current device, whatever device the tensors are on.
    return functools.partial(_on_device, device, launcher(op))
