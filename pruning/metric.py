"""metric: the number that pruning must not make much worse, as the user's function gives it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from slimgemm.pruning.inputs import evaluating

Evaluate = Callable[[nn.Module], float]


def name_of(evaluate: Evaluate) -> str:
    """What messages call a metric."""
    return getattr(evaluate, "__name__", None) or str(evaluate)


def value_of(evaluate: Evaluate, model: nn.Module) -> float:
    """The metric of a model, in evaluation mode and without gradients.

    Raises:
        ValueError: it gave something that is no number.
    """
    with evaluating(model), torch.no_grad():
        found = evaluate(model)
    try:
        return float(found)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"the metric {name_of(evaluate)} gave a {type(found).__name__}, it must give one number"
        ) from None


def dense_value_of(evaluate: Evaluate, model: nn.Module) -> float:
    """The metric of the dense model.

    Raises:
        ValueError: it is not finite, so that nothing could be compared with it.
    """
    value = value_of(evaluate, model)
    if not math.isfinite(value):
        raise ValueError(
            f"the metric {name_of(evaluate)} of the dense model is {value}, which nothing can be "
            "compared with; look for an empty test set, a division by zero, an overflow of "
            "half precision or weights that were never trained"
        )
    return value
