"""channel_plan: which channels a plan drops, and what each layer's entry says of it.

Units of coupled channels (pruning.channels) are scored together, over all layers that share them;
the amount says how many go; `multiple_of` and the floor say how many stay at least.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from slimgemm.pruning.allocate import Amount, Units
from slimgemm.pruning.channels import (
    Group,
    Surgery,
    cut,
    groups_of,
    tensor_named,
    unit_scores,
    why_kept,
)
from slimgemm.pruning.coupling import OUTPUT, Coupling
from slimgemm.pruning.decide import Part, Request, refitted, scores_of_all
from slimgemm.pruning.inputs import Inputs
from slimgemm.pruning.patterns import Channels, keep_highest
from slimgemm.pruning.sparsegpt import Solver

MOST_NAMES = 3  # that a note lists
NO_NORM = "its channels stay: no batch normalisation with a scale follows them"


def plan_channels(
    request: Request, coupling: Coupling, pattern: Channels, example_inputs: Inputs
) -> tuple[dict[str, Part], Surgery]:
    """(layer name -> decision, the surgery that carries all of them out).

    Raises:
        ValueError: the score is a solver, or no channel of any layer may go.
    """
    if isinstance(request.score, Solver):
        raise ValueError(
            "Channels cannot be combined with a solver, which keeps a layer's shape; use another "
            "score, and repair=LeastSquares() for new weights"
        )
    scores = _channel_scores(request, coupling)
    notes: list[str] = []
    gone = dropped_roots(coupling, scores, request.score.axis, request.amount, pattern, notes)
    surgery = cut(request.model, coupling, gone, example_inputs)
    if request.repair is not None:
        dropped = {name.rpartition(".")[0]: gone for name, gone in surgery.readers.items()}
        weights = refitted(request, dropped)
        surgery = replace(surgery, weights={f"{n}.weight": w for n, w in weights.items()})
    notes += _moments(surgery)
    parts = {}
    for layer in request.layers:
        parts[layer.name] = _channel_part(layer.name, surgery, coupling, layer.name in scores)
        if layer.name not in scores and why_kept(coupling, layer.name) is None:
            notes.append(f"{layer.name}: {NO_NORM}")
    notes += _staying([name for name, part in parts.items() if part.refusal is None], coupling)
    last = request.layers[-1].name
    parts[last] = replace(parts[last], notes=tuple(notes))
    return parts, surgery


def _moments(surgery: Surgery) -> list[str]:
    """What a user of normalisations over channels should know."""
    if not surgery.norms:
        return []
    names = list(surgery.norms)
    notes = [
        f"Normalisations that will take their moments over the channels that stay: {len(names)} "
        f"({_listed(names)}). The smaller model is not the dense one with zeros: fine-tune it"
    ]
    lone = [name for name, kept in surgery.norms.items() if kept.numel() == 1]
    if lone:
        notes.append(
            f"Normalisations left with a single channel, whose value they erase: {_listed(lone)}; "
            "give Channels a floor"
        )
    return notes


def _staying(names: Sequence[str], coupling: Coupling) -> list[str]:
    """Why output channels of layers that shrink have to stay; of the model's output nobody asks."""
    found: dict[str, list[str]] = {}
    for name in names:
        ids = coupling.axes[f"{name}.weight", 0]
        reasons = [coupling.sets.reason(int(i)) for i in ids]
        if None in reasons and (together := why_kept(coupling, name)):
            reasons = [together] * ids.size
        for reason in dict.fromkeys(reasons):
            if reason not in (None, OUTPUT):
                found.setdefault(reason, []).append(
                    f"{name} ({reasons.count(reason)} of {ids.size})"
                )
    return [f"Output channels that stay: {_listed(who)}: {why}" for why, who in found.items()]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:MOST_NAMES]) + (" ..." if len(names) > MOST_NAMES else "")


def _channel_scores(request: Request, coupling: Coupling) -> dict[str, Tensor]:
    """Layer name -> scores. Of a score of norms, layers without one add nothing to a group that has
    one, and a group that has none is left whole: its layers are not in the result.
    """
    bare = [la for la in request.layers if request.contexts[la.name].norm is None]
    if request.score.needs != "norm" or len(bare) == len(request.layers):
        return scores_of_all(request)
    normed = [layer for layer in request.layers if layer not in bare]
    found = scores_of_all(replace(request, layers=normed))
    names = [layer.name for layer in request.layers]
    for group in groups_of(coupling, names):
        if found.keys() & set(group.layers):
            found |= {
                layer.name: torch.zeros_like(layer.weight, dtype=torch.float32)
                for layer in bare
                if layer.name in group.layers
            }
    return {name: found[name] for name in names if name in found}


def _channel_part(name: str, surgery: Surgery, coupling: Coupling, scored: bool) -> Part:
    kept_out = surgery.slices.get((f"{name}.weight", 0))
    kept_in = surgery.slices.get((f"{name}.weight", 1))
    if kept_out is None and kept_in is None:
        rest = "the amount drops none of its channels" if scored else NO_NORM
        return Part(refusal=why_kept(coupling, name) or rest)
    return Part(kept_out=kept_out, kept_in=kept_in)


def kept_units(group: Group, scores: Tensor, drop: int, pattern: Channels) -> list[int]:
    """Units that stay: all but the `drop` lowest; more, until every width fits `multiple_of`."""
    keep = min(max(len(group.units) - drop, pattern.floor), len(group.units))
    for count in range(keep, len(group.units)):
        mask = keep_highest(scores, count).tolist()
        gone = [u for u, kept in zip(group.units, mask, strict=True) if not kept]
        widths = [int((~np.isin(axis, gone)).sum()) for axis in group.axes]
        if all(width and width % pattern.multiple_of == 0 for width in widths):
            return [u for u, kept in zip(group.units, mask, strict=True) if kept]
    return list(group.units)


def dropped_roots(
    coupling: Coupling,
    scores: Mapping[str, Tensor],
    axis: str,
    amount: Amount,
    pattern: Channels,
    notes: list[str],
) -> list[int]:
    """Root ids to drop, over all groups; `notes` gets a line where more stay than asked for.

    Raises:
        ValueError: no channel of any layer may go; each layer's reason is named.
    """
    groups = groups_of(coupling, list(scores))
    if not groups:
        reasons = "; ".join(f"{name}: {why_kept(coupling, name)}" for name in scores)
        raise ValueError(f"no channels can be dropped: {reasons}")
    totals = unit_scores(coupling, scores, axis)
    values = [
        torch.tensor([totals.get(u, 0.0) for u in g.units], dtype=torch.float64) for g in groups
    ]
    units = [
        Units(
            " + ".join(group.layers),
            value,
            tuple(scores[group.layers[0]].shape),
            sum(scores[name].numel() for name in group.layers),
        )
        for group, value in zip(groups, values, strict=True)
    ]
    gone: list[int] = []
    for group, value, drop in zip(groups, values, amount.drops(units), strict=True):
        stay = set(kept_units(group, value, drop, pattern))
        asked, all_ = len(group.units) - drop, len(group.units)
        if len(stay) > asked:
            notes.append(
                f"{' + '.join(group.layers)}: keeps {len(stay)} of {all_} units of coupled "
                f"channels, the amount asked for {asked} ({pattern}, floor {pattern.floor})"
            )
        gone.extend(u for u in group.units if u not in stay)
    return sorted(gone)


def norm_scales(model: nn.Module, coupling: Coupling, names: Sequence[str]) -> dict[str, Tensor]:
    """Layer name -> [N] scale of the batch normalisation that its outputs meet first."""
    first: dict[int, tuple[str, int]] = {}
    for ids, norm in coupling.scales:
        for position, i in enumerate(ids.tolist()):
            first.setdefault(i, (norm, position))
    found = {}
    for name in names:
        found_ids = coupling.axes.get((f"{name}.weight", 0))
        places = [None] if found_ids is None else [first.get(i) for i in found_ids.tolist()]
        known = [place for place in places if place is not None]
        if len(known) == len(places):
            scales = [tensor_named(model, norm).detach()[position] for norm, position in known]
            found[name] = torch.stack(scales)
    return found
