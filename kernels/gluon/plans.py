"""What is the same in every launch of operands that lie alike, kept from the first of them.

The first launch checks its operands and works out grid, constants and sizes; the next ones look
those up. A key holds all of the operands that a check or a launch depends on, but what they
contain and where they are: so what was refused once is refused every time.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from slimgemm.kernels.formats import Packed24

MOST_PLANS = 4096  # kept per kernel; all are dropped and made again beyond that

Plan = TypeVar("Plan")


def layout(t: Tensor | None) -> Hashable:
    """How `t` lies: dtype, device, shape, strides, and its address within 16 bytes."""
    if t is None:
        return None
    return t.dtype, t.get_device(), t.shape, t.stride(), t.data_ptr() & 15


def layouts(x: Tensor, w: Packed24, bias: Tensor | None, scale: Tensor | None) -> Hashable:
    """How all operands lie."""
    return layout(x), layout(w[0]), layout(w[1]), w[2:], layout(bias), layout(scale)


class Plans(Generic[Plan]):
    """key -> plan, bounded."""

    def __init__(self) -> None:
        self.kept: dict[Hashable, Plan] = {}

    def add(self, key: Hashable, plan: Plan) -> Plan:
        """Keep `plan`."""
        if len(self.kept) >= MOST_PLANS:
            self.kept.clear()
        self.kept[key] = plan
        return plan


def on_device_of(x: Tensor, run: Callable[[], Any]) -> None:
    """`run` with the GPU of `x` current, on which Triton launches."""
    if x.get_device() == torch.cuda.current_device():  # a context manager takes microseconds
        run()
    else:
        with torch.cuda.device(x.device):
            run()
