"""schedule: when how much is dropped: in rounds, gradually while training, or with rewinding.

One shot is `plan(...).apply(model)` and needs nothing from here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from slimgemm.pruning.allocate import ERK, LAMP, Amount, Global, Uniform, check_share
from slimgemm.pruning.inputs import Inputs, evaluating, run
from slimgemm.pruning.masks import masked_modules, set_mask, unpack_mask
from slimgemm.pruning.patterns import Channels, Pattern
from slimgemm.pruning.plan import Plan, plan

MakeAmount = Callable[[float], Amount] | type[Uniform] | type[Global] | type[ERK] | type[LAMP]


def rounds_to(share: float, rounds: int) -> tuple[float, ...]:
    """Shares after each of several rounds that all drop the same part of what is left.

    rounds_to(0.9, 3) keeps 0.464, 0.215 and 0.1.

    Raises:
        ValueError: share is not in [0, 1), or there is no round.
    """
    check_share(share, "share")
    if rounds < 1:
        raise ValueError(f"rounds must be 1 or more, got {rounds}")
    shares = [1 - (1 - share) ** (i / rounds) for i in range(1, rounds)]
    return (*shares, share)


def cubic(step: int, start: int, end: int, final: float, initial: float = 0.0) -> float:
    """The dropped share at a step: rises fast first, slowly at the end.

    final + (initial - final) * (1 - (step - start) / (end - start))**3, and constant outside.

    Source: Zhu & Gupta 2017, arXiv 1710.01878, equation 1.
    """
    if end <= start:
        raise ValueError(f"end must come after start, got {start} and {end}")
    done = min(max((step - start) / (end - start), 0.0), 1.0)
    return final + (initial - final) * (1 - done) ** 3


def iterate(
    model: nn.Module,
    example_inputs: Inputs,
    shares: Sequence[float],
    train: Callable[[nn.Module, int], None],
    *,
    amount: MakeAmount = Uniform,
    **options: Any,
) -> list[Plan]:
    """Prune, train, and again: each round drops up to its share and keeps what was dropped.

    Args:
        model: trained before; pruned in place.
        example_inputs: as for `plan`.
        shares: dropped share after each round, rising, as from `rounds_to`.
        train: called with (model, round) after each pruning; keeps masks (finetune does).
        amount: makes an amount from a share.
        options: pattern, score and so on, for `plan`.

    Returns:
        The plan of each round, applied.

    Raises:
        ValueError: shares do not rise, or the pattern fixes the share, or shrinks channels.
    """
    _check_pattern(options.get("pattern"), "iterate")
    if any(b <= a for a, b in pairwise(shares)):
        raise ValueError(f"shares must rise from round to round, got {list(shares)}")
    plans = []
    for turn, share in enumerate(shares):
        made = plan(model, example_inputs, amount=amount(share), **options)
        made.apply(model)
        plans.append(made)
        train(model, turn)
    return plans


def lottery_ticket(
    model: nn.Module,
    example_inputs: Inputs,
    shares: Sequence[float],
    train: Callable[[nn.Module, int], None],
    *,
    rewind_to: Mapping[str, Tensor],
    amount: MakeAmount = Uniform,
    **options: Any,
) -> list[Plan]:
    """Train, prune, go back to early weights with the mask, and again.

    Args:
        model: with the weights of `rewind_to` or later ones; ends rewound, masked, and trained.
        shares, amount, options: as for `iterate`.
        train: called with (model, round) before each pruning and once at the end.
        rewind_to: a state dict from the start or an early step, as `copy.deepcopy(state_dict())`.

    Source: Frankle & Carbin 2019, arXiv 1803.03635; rewinding to a later step: arXiv 1912.05671.
    """
    _check_pattern(options.get("pattern"), "lottery_ticket")
    plans = []
    for turn, share in enumerate(shares):
        train(model, turn)
        made = plan(model, example_inputs, amount=amount(share), **options)
        made.apply(model)
        plans.append(made)
        rewind(model, rewind_to)
    train(model, len(shares))
    return plans


def rewind(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a state dict and drop again what the model's masks drop."""
    model.load_state_dict(state)
    for _, module, packed in list(masked_modules(model)):
        set_mask(module, unpack_mask(packed))


@dataclass
class Gradual:
    """Prunes a little every few steps of training; call `step()` after each optimizer step.

    Args:
        model, example_inputs: as for `plan`.
        start, end: steps between which the share rises, by `cubic`.
        final, initial: share dropped at the end and at the start.
        every: steps between two prunings.
        amount: makes an amount from a share.
        options: pattern, score and so on, for `plan`.
    """

    model: nn.Module
    example_inputs: Inputs
    start: int
    end: int
    final: float
    initial: float = 0.0
    every: int = 100
    amount: MakeAmount = Uniform
    options: Mapping[str, Any] = field(default_factory=dict)
    steps: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        _check_pattern(self.options.get("pattern"), "Gradual")
        check_share(self.final, "final")
        check_share(self.initial, "initial")
        cubic(0, self.start, self.end, self.final)
        if self.every < 1 or self.final < self.initial:
            raise ValueError(
                f"every must be 1 or more and final at least initial, got {self.every}, "
                f"{self.final} and {self.initial}"
            )

    def step(self) -> float | None:
        """Count a step; where pruning is due, prune and return the share, else None."""
        step, self.steps = self.steps, self.steps + 1
        due = step == self.end or (step - self.start) % self.every == 0
        if not due or not self.start <= step <= self.end:
            return None
        share = cubic(step, self.start, self.end, self.final, self.initial)
        made = plan(self.model, self.example_inputs, amount=self.amount(share), **self.options)
        made.apply(self.model)
        return share


def _check_pattern(pattern: Pattern | None, name: str) -> None:
    if pattern is None:
        raise ValueError(f"{name} needs a pattern, as pattern=Unstructured()")
    if pattern.share is not None or isinstance(pattern, Channels):
        raise ValueError(
            f"{name} drops more and more, {pattern} cannot: use Unstructured, Block, Vector or "
            "Kernel, and the other pattern at the end"
        )


def recalibrate(model: nn.Module, batches: Sequence[Inputs]) -> None:
    """Batch-norm statistics anew: means over these batches, everything else in evaluation mode.

    Raises:
        ValueError: there is no batch.
    """
    if not batches:
        raise ValueError("recalibrate needs at least one batch of model inputs")
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    norms = [m for m in norms if m.track_running_stats]
    momenta = [m.momentum for m in norms]
    with evaluating(model), torch.no_grad():
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain mean over batches
            norm.train()
        try:
            for batch in batches:
                run(model, batch)
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
