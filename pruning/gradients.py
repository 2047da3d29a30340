"""gradients: scores that look at how the loss depends on each weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from slimgemm.pruning.activations import read
from slimgemm.pruning.inputs import evaluating, run, to_device
from slimgemm.pruning.layers import Layer
from slimgemm.pruning.processes import check_batches, in_processes, summed
from slimgemm.pruning.scores import Context, Needs, Score, as_float

Loss = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class GradientScore(Score):
    """A score from the gradients of a loss; calibration batches are (inputs, target).

    Args:
        loss: (outputs, target) -> scalar, a mean over the batch.
    """

    loss: Loss = field(repr=False)
    needs: ClassVar[Needs] = "gradients"

    def summand(self, gradient: Tensor) -> Tensor:
        """What is averaged over batches."""
        raise NotImplementedError


@dataclass(frozen=True)
class Taylor(GradientScore):
    """|w * dL/dw|**p: the first-order change of the loss when the weight goes.

    Args:
        p: power, as in Magnitude.

    Source: Molchanov et al. 2019, arXiv 1906.10771, equation 8 (p=2); connection sensitivity of
    Lee et al. 2019, arXiv 1810.02340 (p=1).
    """

    p: float = 1

    def summand(self, gradient: Tensor) -> Tensor:
        """The gradient."""
        return gradient

    def __call__(self, weight: Tensor, context: Context) -> Tensor:
        """|w g|**p, g the mean gradient."""
        return (as_float(weight) * read(context).to(weight.device)).abs().pow(self.p)


@dataclass(frozen=True)
class OptimalBrainDamage(GradientScore):
    """h w**2 / 2 with the diagonal of the empirical Fisher information for h.

    h is the mean over batches of the squared gradient: batches of one sample give the empirical
    Fisher information, larger batches less of it at less cost.

    Source: LeCun et al. 1989, "Optimal Brain Damage", equation 6.
    """

    def summand(self, gradient: Tensor) -> Tensor:
        """The squared gradient."""
        return gradient.square()

    def __call__(self, weight: Tensor, context: Context) -> Tensor:
        """h w**2 / 2."""
        return as_float(weight).square() * read(context).to(weight.device) / 2


def mean_gradients(
    model: nn.Module, layers: Sequence[Layer], score: GradientScore, batches: Sequence[Any]
) -> Mapping[str, Tensor]:
    """Layer name -> mean over batches of the score's summand, shape of the weight.

    With torch.distributed over the batches of all processes.

    The model runs in evaluation mode; frozen weights are seen; gradients that it holds stay.

    Raises:
        ValueError: a batch is not (inputs, target), a weight does not reach the loss, or a
            gradient is not finite.
    """
    device = next(model.parameters()).device
    check_batches(batches, "(inputs, target)", device)
    weights = [layer.module.weight for layer in layers]
    frozen = [w for w in weights if isinstance(w, Tensor) and not w.requires_grad]
    sums: dict[str, Tensor] = {}
    try:
        for weight in frozen:
            weight.requires_grad_(True)
        with evaluating(model), torch.enable_grad():
            for place, batch in enumerate(batches):
                for name, gradient in _gradients(model, layers, score, batch, place, device):
                    part = score.summand(as_float(gradient))
                    sums[name] = sums[name].add_(part) if name in sums else part.clone()
    finally:
        for weight in frozen:
            weight.requires_grad_(False)
    if in_processes():
        for layer in layers:
            torch.distributed.all_reduce(sums[layer.name])
    count = summed(len(batches), device)
    return {name: total / count for name, total in sums.items()}


def _gradients(
    model: nn.Module,
    layers: Sequence[Layer],
    score: GradientScore,
    batch: Any,
    place: int,
    device: torch.device,
) -> list[tuple[str, Tensor]]:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise ValueError(f"{type(score).__name__} needs calibration batches (inputs, target)")
    inputs, target = to_device(batch, device)
    value = score.loss(run(model, inputs), target)
    weights = [layer.module.weight for layer in layers]
    found = torch.autograd.grad(value, weights, allow_unused=True)  # type: ignore[arg-type]
    for layer, gradient in zip(layers, found, strict=True):
        if gradient is None:
            raise ValueError(f"{layer.name} does not reach the loss; ignore the layer")
        if not bool(torch.isfinite(gradient).all()):
            raise ValueError(f"{layer.name} has a gradient that is not finite, in batch {place}")
    return [(la.name, g) for la, g in zip(layers, found, strict=True)]
