"""Which implementation runs an op: the Triton launcher on a GPU, the torch twin elsewhere.

The public functions of `slimgemm.kernels` are made here. Launchers are imported at their first
use, so that importing slimgemm needs neither Triton nor its import time.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from slimgemm.kernels import reference

# op -> the file in kernels/ that holds its launcher, where the names differ
FILES = {"prune_dense_24": "prune_24"}


def launcher(op: str) -> Callable[..., Any]:
    """The Triton launcher of `op`."""
    return getattr(importlib.import_module(f"slimgemm.kernels.{FILES.get(op, op)}"), op)


def implementation(op: str, device: torch.device) -> Callable[..., Any]:
    """The function that runs `op` on tensors of `device`."""
    return launcher(op) if device.type == "cuda" else getattr(reference, f"{op}_ref")
