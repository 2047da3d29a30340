"""processes: calibration over torch.distributed, each process with batches of its own.

What one process lacks is asked of all at once, so that every one of them raises and none waits for
a sum that another will never join.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def in_processes() -> bool:
    """Whether this is one of the processes of torch.distributed, each with batches of its own."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def summed(count: int, device: torch.device) -> int:
    """A count added up over all processes."""
    if not in_processes():
        return count
    total = torch.tensor([count], dtype=torch.float64, device=device)
    torch.distributed.all_reduce(total)
    return int(total)


def lacking(has: bool, device: torch.device) -> list[int]:
    """Numbers of the processes that lack something; all ask at once, so that none waits alone."""
    if not in_processes():
        return [] if has else [0]
    lack = torch.zeros(torch.distributed.get_world_size(), device=device)
    lack[torch.distributed.get_rank()] = not has
    torch.distributed.all_reduce(lack)
    return lack.nonzero().flatten().tolist()


def check_batches(batches: Sequence[Any], what: str, device: torch.device) -> None:
    """Raise ValueError, in every process, where one has no calibration batch."""
    missing = lacking(bool(batches), device)
    if missing and not in_processes():
        raise ValueError(f"calibration is empty; pass an iterable of {what}")
    if missing:
        raise ValueError(
            f"processes {missing} of torch.distributed have no calibration batch; give each "
            f"process an iterable of {what} with at least one"
        )
