"""Whether a packed model computes what its weights say: against float64, by the tolerance rule."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimgemm import kernels
from slimgemm.kernels.reference import allowed_error, output_error

Args = tuple[Any, ...]


class RefusedModel(Exception):
    """The packed model's output is wrong."""

    def __init__(self, error: float, allowed: float) -> None:
        super().__init__(f"error {error:.2e} > {allowed:.2e} allowed; not timed")
        self.error, self.allowed = error, allowed


def layers_of(model: nn.Module) -> list[Any]:
    """Every linear and convolution."""
    return [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]


@torch.no_grad()
def prune_24(model: nn.Module) -> None:
    """Set the two smaller weights of every four to zero, in every linear and convolution."""
    for layer in layers_of(model):
        # The group axis is the input channels, at a fixed tap.
        rows = layer.weight.movedim(1, -1)
        pruned = kernels.prune_dense_24(rows.reshape(-1, rows.shape[-1]))
        layer.weight.copy_(pruned.view(rows.shape).movedim(-1, 1))


@contextlib.contextmanager
def in_float64(model: nn.Module) -> Iterator[None]:
    """Each layer computes in float64 while it runs, and has its own dtype again afterwards.

    Weights of 16 or 32 bits come back exactly, and only one layer at a time takes more memory.
    """
    leaves = [m for m in model.modules() if not list(m.children())]
    dtype = next(model.parameters()).dtype

    def before(module: nn.Module, args: Args) -> Args:
        module.double()
        return as_double(args)

    def after(module: nn.Module, args: Args, out: Any) -> None:
        module.to(dtype)

    hooks = [m.register_forward_pre_hook(before) for m in leaves]
    hooks += [m.register_forward_hook(after) for m in leaves]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def as_double(value: Any) -> Any:
    """Floating tensors of nested tuples and lists as float64."""
    if isinstance(value, (tuple, list)):
        return type(value)(as_double(v) for v in value)
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.double()
    return value


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy."""
    return F.cross_entropy(logits, labels)


def outputs_of(model: nn.Module, args: Args, train: bool) -> list[Tensor]:
    """What is checked: the output; of a training step the loss and the gradient of its input.

    `args` stay as they are, though a call may write to its cache.
    """
    args = copy.deepcopy(args)
    if not train:
        with torch.no_grad():
            return [model(*args)]
    x = args[0].requires_grad_()
    loss = loss_of(model(x), args[1])
    (gradient,) = torch.autograd.grad(loss, x)
    return [loss.detach(), gradient]


def exact_outputs(model: nn.Module, args: Args, train: bool) -> list[Tensor]:
    """outputs_of in float64."""
    if train:
        # Backward would meet the weights after they have their own dtype again.
        return outputs_of(copy.deepcopy(model).double(), as_double(args), train)
    with in_float64(model):
        return outputs_of(model, as_double(args), train)


def errors(
    got: Sequence[Tensor], dense: Sequence[Tensor], exact: Sequence[Tensor]
) -> tuple[float, float]:
    """(error, allowed error) of the output that comes closest to its tolerance, or passes it.

    Raises:
        RefusedModel: an output is wrong.
    """
    pairs = [
        (output_error(g, e), allowed_error(d, e)) for g, d, e in zip(got, dense, exact, strict=True)
    ]
    error, allowed = max(pairs, key=lambda p: math.inf if math.isnan(p[0]) else p[0] / p[1])
    if not error <= allowed:
        raise RefusedModel(error, allowed)
    return error, allowed
