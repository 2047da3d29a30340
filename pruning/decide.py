"""decide: from layers, a pattern, a score and an amount to one decision per layer.

Scores that look at the weight alone, or at gradients, are taken for all layers at once. Scores
that look at inputs, solvers and repairs go through the model group by group; each group sees the
inputs that the pruned groups before it make. The model's weights come back at the end.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from slimgemm.pruning.allocate import Amount, Units
from slimgemm.pruning.calibrate import Calibration, Gram, Group, groups_of
from slimgemm.pruning.cost import Cost
from slimgemm.pruning.layers import Layer
from slimgemm.pruning.masks import PackedMask, mask_of, pack_mask, unpack_mask
from slimgemm.pruning.patterns import LOWEST, Pattern, like_weight, rows_of
from slimgemm.pruning.processes import in_processes
from slimgemm.pruning.scores import Context, Score
from slimgemm.pruning.sparsegpt import Solver
from slimgemm.pruning.store import Store, key_of

Repair = Callable[[Tensor, Tensor, Tensor, list[str]], Tensor]


@dataclass(frozen=True)
class Part:
    """What is kept of one layer: a mask (and new weights), channels, or all for a reason."""

    mask: PackedMask | None = None
    kept_out: Tensor | None = None
    kept_in: Tensor | None = None
    weight: Tensor | None = None
    refusal: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def packed(self) -> PackedMask:
        """The mask of a part that has one."""
        assert self.mask is not None
        return self.mask


@dataclass(frozen=True)
class Request:
    """What `plan` was asked, for the layers that can be pruned."""

    model: nn.Module
    layers: Sequence[Layer]
    pattern: Pattern
    score: Score
    amount: Amount
    contexts: Mapping[str, Context]
    batches: Sequence[Any] | None
    repair: Repair | None
    cost: Cost
    resume: str | os.PathLike[str] | None = None


def scored(layer: Layer, score: Score, context: Context) -> Tensor:
    """Scores of a layer; weights that an earlier plan dropped get the lowest."""
    found = score(layer.weight, context)
    earlier = mask_of(layer.module)
    return found if earlier is None else found.masked_fill(~earlier, LOWEST)


def drops_of(request: Request, scores: Mapping[str, Tensor]) -> dict[str, int]:
    """Layer name -> units to drop."""
    if request.pattern.share is not None:
        return {layer.name: 0 for layer in request.layers}
    units = [
        Units(
            layer.name,
            request.pattern.units(scores[layer.name]),
            tuple(layer.weight.shape),
            layer.weight.numel(),
        )
        for layer in request.layers
    ]
    counts = request.amount.drops(units)
    return {layer.name: drop for layer, drop in zip(request.layers, counts, strict=True)}


def decide(request: Request) -> dict[str, Part]:
    """Layer name -> decision, for patterns inside a layer."""
    if request.score.needs == "inputs" or request.repair is not None:
        if request.amount.reads_scores:
            return _all_at_once_with_inputs(request)
        return _streamed(request)
    return _cut_masks(request, scores_of_all(request))


def scores_of_all(request: Request) -> dict[str, Tensor]:
    """Layer name -> scores; those of inputs from the dense model, one group in memory at a time."""
    if request.score.needs != "inputs":
        return {
            la.name: scored(la, request.score, request.contexts[la.name]) for la in request.layers
        }
    assert request.batches is not None
    calibration = Calibration(request.model, request.batches)
    found = {}
    for group in _groups(request):
        statistics = calibration.gather(group, request.score.statistic, _calls(request))
        for layer in group.layers:
            context = replace(request.contexts[layer.name], statistics=statistics.pop(layer.name))
            found[layer.name] = scored(layer, request.score, context)
    return {layer.name: found[layer.name] for layer in request.layers}


def refitted(request: Request, readers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Layer name -> weight fitted to the dense outputs without the dropped columns.

    Args:
        readers: layer name -> positions on axis 1 that are dropped.
    """
    assert request.batches is not None and request.repair is not None
    calibration = Calibration(request.model, request.batches)
    found = {}
    for group in _groups(
        replace(request, layers=[la for la in request.layers if la.name in readers])
    ):
        statistics = calibration.gather(group, Gram, _calls(request))
        for layer in group.layers:
            context = replace(request.contexts[layer.name], statistics=statistics.pop(layer.name))
            mask = torch.ones(layer.weight.shape, dtype=torch.bool, device=layer.weight.device)
            mask[:, readers[layer.name].to(mask.device)] = False
            found[layer.name], notes = repaired(request.repair, layer.weight, mask, context)
            for note in notes:
                print(note, file=sys.stderr)
    return found


def _all_at_once_with_inputs(request: Request) -> dict[str, Part]:
    if isinstance(request.score, Solver) or request.repair is not None:
        raise ValueError(
            f"{request.amount} compares the scores of all layers, {request.score} and repairs "
            "decide layer by layer; use Uniform, PerLayer or ERK"
        )
    return _cut_masks(request, scores_of_all(request))


def _cut_masks(request: Request, scores: Mapping[str, Tensor]) -> dict[str, Part]:
    drops = drops_of(request, scores)
    return {
        name: Part(mask=pack_mask(request.pattern.mask(found, drops[name]).cpu()))
        for name, found in scores.items()
    }


def _groups(request: Request) -> list[Group]:
    """Groups in the order in which their layers run."""
    order = {name: place for place, name in enumerate(request.cost.layers)}
    missing = [layer.name for layer in request.layers if layer.name not in order]
    if missing:
        raise ValueError(
            f"{missing[0]} did not run on the example inputs, so it cannot be calibrated; ignore it"
        )
    return groups_of(request.model, sorted(request.layers, key=lambda layer: order[layer.name]))


def _calls(request: Request) -> dict[str, int]:
    return {name: layer.calls for name, layer in request.cost.layers.items()}


def _streamed(request: Request) -> dict[str, Part]:
    assert request.batches is not None
    zero = {la.name: torch.zeros(la.weight.shape) for la in request.layers}
    drops = drops_of(request, zero)
    calibration = Calibration(request.model, request.batches)
    statistic: Callable[[nn.Module], Any] = (
        Gram if request.repair is not None else request.score.statistic
    )
    groups = _groups(request)
    blocks = list(dict.fromkeys(group.block for group in groups if group.block is not None))
    store = _store(request, drops)
    parts: dict[str, Part] = {}
    with _weights_put_back(request.layers):
        for place, group in enumerate(groups):
            known = store.load(place, group.layers) if store is not None else None
            if known is None:
                found = calibration.gather(group, statistic, _calls(request))
                decided = {}
                for layer in group.layers:
                    context = replace(
                        request.contexts[layer.name], statistics=found.pop(layer.name)
                    )
                    decided[layer.name] = _one(request, layer, context, drops[layer.name])
                if store is not None:
                    store.save(
                        place, {n: (p.packed, p.weight, p.notes) for n, p in decided.items()}
                    )
            else:
                decided = {
                    name: Part(mask=mask, weight=weight, notes=notes)
                    for name, (mask, weight, notes) in known.items()
                }
            for layer in group.layers:
                # later groups must see the pruned layer; the dense weight comes back at the end
                layer.module.weight.data = _pruned(layer, decided[layer.name])
            parts.update(decided)
            if group.block is not None:
                calibration.advance(blocks, group.block)
    return {layer.name: parts[layer.name] for layer in request.layers}


def _pruned(layer: Layer, part: Part) -> Tensor:
    """A layer's weight as it will be."""
    dense = layer.weight
    new = dense if part.weight is None else part.weight.to(dense.device)
    return torch.where(unpack_mask(part.packed).to(dense.device), new, 0.0)


def _store(request: Request, drops: Mapping[str, int]) -> Store | None:
    if request.resume is None:
        return None
    if in_processes():
        raise ValueError(
            "resume= and torch.distributed cannot be combined: processes killed apart "
            "would wait for each other; leave one of them out"
        )
    assert request.batches is not None
    asked = [
        request.pattern,
        request.score,
        request.repair,
        sorted(drops.items()),
        torch.__version__,
    ]
    return Store(request.resume, key_of(asked, request.layers, request.batches))


def _one(request: Request, layer: Layer, context: Context, drop: int) -> Part:
    """The decision for a layer."""
    weight, pattern = layer.weight, request.pattern
    if isinstance(request.score, Solver):
        units = pattern.units(torch.zeros(weight.shape)).numel()
        solution = request.score.solve(
            weight, context, pattern, drop / max(units, 1), mask_of(layer.module)
        )
        mask, new, notes = solution.mask, solution.weight, solution.notes
    else:
        mask = pattern.mask(scored(layer, request.score, context), drop)
        new, notes = torch.where(mask, weight, 0.0), ()
    if request.repair is not None:
        new, more = repaired(request.repair, weight, mask, context)
        notes = (*notes, *more)
    for note in notes:
        print(note, file=sys.stderr)
    changed = isinstance(request.score, Solver) or request.repair is not None
    kept = new.cpu() if changed else None
    return Part(mask=pack_mask(mask.cpu()), weight=kept, notes=tuple(notes))


def repaired(
    repair: Repair, weight: Tensor, mask: Tensor, context: Context
) -> tuple[Tensor, tuple[str, ...]]:
    """(new weight, notes): a repair run on each convolution group of a layer."""
    assert context.statistics is not None
    grams = context.statistics.to(weight.device)
    view, kept = rows_of(weight), rows_of(mask)
    step = view.shape[0] // grams.shape[0]
    notes: list[str] = []
    solved = [
        repair(
            view[i * step : (i + 1) * step].flatten(1).double(),
            kept[i * step : (i + 1) * step].flatten(1),
            gram,
            notes,
        )
        for i, gram in enumerate(grams)
    ]
    new = like_weight(torch.cat(solved).view(view.shape), weight.shape).to(weight.dtype)
    return new.contiguous(), tuple(f"{context.name}: {note}" for note in notes)


@contextmanager
def _weights_put_back(layers: Sequence[Layer]) -> Iterator[None]:
    saved = [(layer.module.weight, layer.weight) for layer in layers]
    try:
        yield
    finally:
        for parameter, data in saved:
            parameter.data = data
