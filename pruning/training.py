"""training: losses, penalties and merges around pruned weights.

Penalties are callables model -> scalar for `finetune(penalty=...)` or a loop of your own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from slimgemm.pruning.inputs import evaluating, run
from slimgemm.pruning.layers import find_layers
from slimgemm.pruning.masks import mask_of, set_mask
from slimgemm.pruning.patterns import NofM, Pattern


def _weights(model: nn.Module) -> list[Tensor]:
    return [
        module.weight
        for module in model.modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and module.weight.requires_grad
    ]


@dataclass(frozen=True)
class Lp:
    """strength * sum |w|**p over Linear and Conv2d weights; p=1 makes weights small, p=2 even."""

    strength: float
    p: float = 1

    def __call__(self, model: nn.Module) -> Tensor:
        """A scalar."""
        return self.strength * sum(
            (w.abs().pow(self.p).sum() for w in _weights(model)), _zero(model)
        )


@dataclass(frozen=True)
class GroupLasso:
    """strength * sum over units sqrt(weights in unit) * ||unit||_2: whole units go to zero.

    Args:
        strength: factor.
        pattern: what a unit is; None is an output row.

    Source: Yuan & Lin 2006; Wen et al. 2016, arXiv 1608.03665, equation 1.
    """

    strength: float
    pattern: Pattern | None = None

    def __call__(self, model: nn.Module) -> Tensor:
        """A scalar; the gradient at an all-zero unit is zero."""
        total = _zero(model)
        for weight in _weights(model):
            square = weight.square()
            units = square.flatten(1).sum(1) if self.pattern is None else self.pattern.units(square)
            size = weight.numel() / units.numel()
            norms = torch.where(units > 0, units, 1.0).sqrt() * (units > 0)
            total = total + size**0.5 * norms.sum()
        return self.strength * total


@dataclass(frozen=True)
class BatchNormL1:
    """strength * sum |gamma| over batch normalisations (network slimming, arXiv 1708.06519)."""

    strength: float

    def __call__(self, model: nn.Module) -> Tensor:
        """A scalar."""
        scales = [
            m.weight
            for m in model.modules()
            if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.weight is not None
        ]
        return self.strength * sum((g.abs().sum() for g in scales), _zero(model))


def _zero(model: nn.Module) -> Tensor:
    return next(model.parameters()).new_zeros(())


@dataclass(frozen=True)
class Distillation:
    """share * T**2 * KL(teacher / T, outputs / T) + (1 - share) * loss(outputs, target).

    Call with (outputs, (target, teacher_outputs)); `with_teacher` makes such a loader.

    Args:
        loss: (outputs, target) -> scalar.
        temperature: T.
        share: weight of the teacher, in [0, 1].

    Source: Hinton et al. 2015, arXiv 1503.02531, section 2.
    """

    loss: Callable[[Tensor, Any], Tensor] = field(repr=False)
    temperature: float = 2.0
    share: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1 or not self.temperature > 0:
            raise ValueError(
                f"share must be in [0, 1] and temperature positive, got {self.share} and "
                f"{self.temperature}"
            )

    def __call__(self, outputs: Tensor, target: tuple[Any, Tensor]) -> Tensor:
        """A scalar; outputs are logits [..., classes]."""
        labels, teacher = target
        t = self.temperature
        soft = F.kl_div(
            (outputs / t).log_softmax(-1).flatten(0, -2),
            (teacher / t).log_softmax(-1).flatten(0, -2),
            reduction="batchmean",
            log_target=True,
        )
        return self.share * t * t * soft + (1 - self.share) * self.loss(outputs, labels)


@dataclass(frozen=True)
class with_teacher:
    """A loader of (inputs, (target, teacher outputs)) from one of (inputs, target)."""

    loader: Iterable[Any]
    teacher: nn.Module

    def __iter__(self) -> Iterator[Any]:
        for inputs, target in self.loader:
            with evaluating(self.teacher), torch.no_grad():
                outputs = run(self.teacher, inputs)
            yield inputs, (target, outputs)


class _StraightThrough(torch.autograd.Function):
    """w * mask forward; backward the gradient of all weights plus strength * dropped weights."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor, strength: float) -> Tensor:
        """Masked weight."""
        ctx.save_for_backward(weight, mask)
        ctx.strength = strength
        return weight.masked_fill(~mask, 0.0)

    @staticmethod
    def backward(ctx: Any, *dy: Tensor) -> tuple[Tensor, None, None]:
        """dw = dy + strength * (1 - mask) * w; mask and strength have no gradient."""
        weight, mask = ctx.saved_tensors
        return dy[0] + ctx.strength * weight.masked_fill(mask, 0.0), None, None


class SparseRefined(nn.Module):
    """A parametrization: the weight with its pattern's mask, chosen anew in each forward."""

    def __init__(self, pattern: NofM, strength: float) -> None:
        super().__init__()
        self.pattern, self.strength = pattern, strength

    def forward(self, weight: Tensor) -> Tensor:
        """The masked weight."""
        mask = self.pattern.mask(weight.detach().abs().float())
        masked: Tensor = _StraightThrough.apply(weight, mask, self.strength)
        return masked


def train_through_mask(
    model: nn.Module,
    pattern: NofM | None = None,
    strength: float = 2e-4,
    ignore: Sequence[str] = (),
) -> list[str]:
    """SR-STE: train all weights, compute with the masked ones; `settle` ends it.

    Uses torch.nn.utils.parametrize, so state dicts hold `parametrizations.weight.original`.

    Returns:
        Names of the layers.

    Raises:
        ValueError: no layer can take it.

    Source: Zhou et al. 2021, arXiv 2102.04010, equation 8.
    """
    chosen = [layer for layer in find_layers(model, ignore) if layer.refusal is None]
    if not chosen:
        raise ValueError("no layer can be trained through a mask; see the refusals of a plan")
    for layer in chosen:
        refined = SparseRefined(pattern or NofM(2, 4), strength)
        parametrize.register_parametrization(layer.module, "weight", refined)
    return [layer.name for layer in chosen]


def settle(model: nn.Module) -> list[str]:
    """End `train_through_mask`: weights become the masked ones, modules carry their masks.

    Returns:
        Names of the layers.
    """
    names = []
    for name, module in list(model.named_modules()):
        if not parametrize.is_parametrized(module, "weight"):
            continue
        listed = module.parametrizations["weight"]
        if len(listed) != 1 or not isinstance(listed[0], SparseRefined):
            continue
        mask = listed[0].pattern.mask(listed.original.detach().abs().float())
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
        set_mask(module, mask)
        names.append(name)
    return names


def merge_lora(module: nn.Linear, a: Tensor, b: Tensor, scale: float = 1.0) -> None:
    """W + mask * (scale * B A), in place: an adapter is merged and the pattern stays.

    Args:
        module: a Linear that carries a mask.
        a: [rank, K], b: [N, rank]: the adapter adds scale * x @ A.T @ B.T.
        scale: alpha / rank.

    Raises:
        ValueError: the module carries no mask, or the shapes do not fit; it is unchanged then.
    """
    mask = mask_of(module)
    if mask is None:
        raise ValueError("the module carries no mask; apply a plan, or restore it with load_masks")
    n, k = module.weight.shape
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != k or b.shape != (n, a.shape[0]):
        raise ValueError(
            f"adapter must be A [rank, {k}] and B [{n}, rank], got {list(a.shape)}, {list(b.shape)}"
        )
    with torch.no_grad():
        update = scale * (b.to(module.weight.device).float() @ a.to(module.weight.device).float())
        module.weight.add_(torch.where(mask, update, 0.0).to(module.weight.dtype))
