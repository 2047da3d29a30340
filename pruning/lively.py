"""lively: a model and inputs for a proof, in which no term is silent and half precision is single.

A branch that ends in zeros, as many blocks begin, or constant inputs show nothing of a wrong cut.
So constant inputs and parameters, and parameters that are small throughout, become random while the
proof runs, and float16 and bfloat16 become float32, whose rounding is far smaller than the effect
of one channel.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from slimgemm.pruning.inputs import Inputs, evaluating, run, tensors_of

SMALL = 1e-2


@contextmanager
def lively(model: nn.Module, inputs: Inputs) -> Iterator[Inputs]:
    """The model with other tensors, and inputs to go with them; its own come back afterwards.

    A model that then fails or gives NaN (an index beyond a table, a dtype named in forward) is
    left as it is, with the inputs as they are.
    """
    tensors = [*model.parameters(), *model.buffers()]
    saved = [(tensor, tensor.data, tensor.grad) for tensor in tensors]

    def restore() -> None:
        for tensor, data, grad in saved:
            tensor.data, tensor.grad = data, grad

    generator = torch.Generator().manual_seed(0)
    try:
        for tensor in tensors:
            data = tensor.data
            if not isinstance(tensor, nn.Parameter):
                data = data.clone()  # forward may write to it
            elif data.is_floating_point() and _silent(data):
                data = _like(data, generator)
            tensor.grad = None  # its dtype would be another
            tensor.data = _single(data)
        changed = _inputs(inputs, generator)
        if not _runs(model, changed):
            restore()
            changed = inputs
        yield changed
    finally:
        restore()


def _runs(model: nn.Module, inputs: Inputs) -> bool:
    try:
        with evaluating(model), torch.no_grad():
            found = tensors_of(run(model, inputs))
    except Exception:
        return False
    return not any(bool(tensor.isnan().any()) for tensor in found)


def _constant(tensor: Tensor) -> bool:
    return not tensor.numel() or bool((tensor == tensor.flatten()[0]).all())


def _silent(tensor: Tensor) -> bool:
    """It shows nothing of its own order, or so little reaches the outputs as of a layer scale."""
    return _constant(tensor) or bool((tensor.abs() < SMALL).all())


def _single(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Weights that keep the size of what they multiply; of one dimension, factors around 1."""
    if tensor.ndim > 1:
        values = torch.randn(tensor.shape, generator=generator) / tensor.shape[-1] ** 0.5
    else:
        values = torch.rand(tensor.shape, generator=generator) + 0.5
    return values.to(tensor)


def _inputs(value: object, generator: torch.Generator) -> Inputs:
    if isinstance(value, Tensor):
        constant = value.numel() > 1 and _constant(value)
        if value.is_floating_point():
            found = torch.randn(value.shape, generator=generator).to(value) if constant else value
            return _single(found)
        if value.dtype == torch.bool or not constant:
            return value
        # 0 or 1 for zeros, else one less here and there: still in a table, or a mask.
        step = 1 if not value.any() else -1
        other = torch.randint(0, 2, value.shape, generator=generator).to(value)
        other[..., :1] = 0  # no row of a mask is empty
        return value + step * other
    if isinstance(value, Mapping):
        return {key: _inputs(item, generator) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(_inputs(item, generator) for item in value)
    return value  # type: ignore[return-value]
