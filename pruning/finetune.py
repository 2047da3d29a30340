"""finetune: a plain training loop with a progress bar; masks stay."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from slimgemm.pruning.inputs import run, to_device
from slimgemm.pruning.masks import keep_masks, masked_modules
from slimgemm.pruning.schedule import recalibrate


def finetune(
    model: nn.Module,
    optimizer: Optimizer,
    loader: Iterable[Any],
    loss: Callable[[Any, Any], Tensor],
    epochs: int,
    *,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    penalty: Callable[[nn.Module], Tensor] | None = None,
    clip: float | None = None,
    after_epoch: Callable[[int, float], None] | None = None,
    show: bool = True,
) -> list[float]:
    """Train in place; where the model carries masks, they are kept.

    Args:
        model: trained in training mode; every module's own flag comes back afterwards.
        optimizer: over the model's parameters.
        loader: yields (inputs, target); inputs as for `plan`, moved to the device of the model.
        loss: (outputs, target) -> scalar.
        epochs: passes over the loader.
        scheduler: stepped once an epoch.
        penalty: added to the loss, as pruning.Lp(1e-5).
        clip: largest norm of all gradients together, or None.
        after_epoch: called with (epoch, mean loss).
        show: a progress bar on a terminal or log.

    Returns:
        Mean loss of each epoch.

    Raises:
        ValueError: epochs is negative, the loader is empty, or the loss is not finite (the epoch
            and step are named).
    """
    if epochs < 0:
        raise ValueError(f"epochs must be 0 or more, got {epochs}")
    if any(True for _ in masked_modules(model)):
        keep_masks(optimizer, model)
    from rich.progress import Progress

    flags = [(module, module.training) for module in model.modules()]
    means: list[float] = []
    try:
        model.train()
        with Progress(disable=not show) as bar:
            steps = len(loader) if isinstance(loader, Sized) else None
            task = bar.add_task("fine-tune", total=None if steps is None else steps * epochs)
            for epoch in range(epochs):
                losses = []
                for step, batch in enumerate(loader):
                    place = f"epoch {epoch}, step {step}"
                    losses.append(_step(model, optimizer, batch, loss, penalty, clip, place))
                    bar.update(task, advance=1, description=f"epoch {epoch}, loss {losses[-1]:.4f}")
                if not losses:
                    raise ValueError("the loader is empty, nothing was trained")
                means.append(sum(losses) / len(losses))
                if scheduler is not None:
                    scheduler.step()
                if after_epoch is not None:
                    after_epoch(epoch, means[-1])
    finally:
        for module, training in flags:
            module.training = training
    return means


def _step(
    model: nn.Module,
    optimizer: Optimizer,
    batch: Any,
    loss: Callable[[Any, Any], Tensor],
    penalty: Callable[[nn.Module], Tensor] | None,
    clip: float | None,
    place: str,
) -> float:
    """One optimizer step; the loss before the penalty."""
    device = next(model.parameters()).device
    inputs, target = (to_device(part, device) for part in batch)
    optimizer.zero_grad()
    value = loss(run(model, inputs), target)
    full = value if penalty is None else value + penalty(model)
    if not bool(torch.isfinite(full)):
        raise ValueError(
            f"loss is {float(full.detach())} in {place}; lower the learning rate or clip the "
            "gradients"
        )
    full.backward()
    if clip is not None:
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    return float(value.detach())


CHUNKS = 20  # the learning rate falls in at most this many steps


@dataclass(frozen=True)
class FineTune:
    """Fine-tuning by number of steps, as a search wants it: (model, steps) -> None.

    Adam, or another optimizer, with a learning rate that falls to zero along a half cosine. A
    loader with a `generator` is seeded from torch's global seed at each call, so that the same
    seed gives the same batches.

    Args:
        loader: yields (inputs, target); begun anew when it ends.
        loss: (outputs, target) -> scalar.
        rate: highest learning rate.
        optimizer: (parameters, lr=rate) -> optimizer.
        recalibrate: batches over which batch-norm statistics are taken anew at the end, the last
            that were trained on; without steps the first of the loader. Those of the dense model
            say little of a smaller one, and candidates would be ranked by chance (Li et al. 2020,
            arXiv 2007.02491, section 3.2).
    """

    loader: Iterable[Any] = field(repr=False)
    loss: Callable[[Any, Any], Tensor] = field(repr=False)
    rate: float = 1e-3
    optimizer: Callable[..., Optimizer] = torch.optim.Adam
    recalibrate: int = 8

    def __post_init__(self) -> None:
        if not 0 < self.rate < math.inf:
            raise ValueError(f"rate must be a positive learning rate, got {self.rate}")

    def __call__(self, model: nn.Module, steps: int) -> None:
        """Train in place for this many optimizer steps, perhaps none; masks are kept."""
        norms = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
        if steps < 1 and not (norms and self.recalibrate):
            return
        generator = getattr(self.loader, "generator", None)
        if isinstance(generator, torch.Generator):
            generator.manual_seed(torch.initial_seed())
        batches = _endless(self.loader)
        if steps < 1:
            self._recalibrate(model, [next(batches) for _ in range(self.recalibrate)])
            return
        chunks = min(steps, CHUNKS)
        sizes = [steps * (i + 1) // chunks - steps * i // chunks for i in range(chunks)]
        optimizer = self.optimizer(model.parameters(), lr=self.rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, chunks)
        seen: list[Any] = []
        for size in sizes:
            part = [next(batches) for _ in range(size)]
            finetune(model, optimizer, part, self.loss, 1, scheduler=schedule, show=False)
            seen = [*seen, *part][-self.recalibrate :] if self.recalibrate else []
        if seen and norms:
            self._recalibrate(model, seen)

    def _recalibrate(self, model: nn.Module, batches: Sequence[Any]) -> None:
        device = next(model.parameters()).device
        recalibrate(model, [to_device(inputs, device) for inputs, _ in batches])


def _endless(loader: Iterable[Any]) -> Iterator[Any]:
    """Batch after batch, over and over.

    Raises:
        ValueError: the loader is empty.
    """
    while True:
        empty = True
        for batch in loader:
            empty = False
            yield batch
        if empty:
            raise ValueError("the loader is empty, nothing was trained")
