"""Channels: what a cut of coupled channels is in every parameter, buffer and module.

Channels that pruning.trace found coupled go as one unit. Which units go, pruning.channel_plan
decides; `cut` says what that means; pruning.proof does it, and proves that nothing else changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from slimgemm.pruning.coupling import Coupling, Ids, Pinned
from slimgemm.pruning.inputs import Inputs
from slimgemm.pruning.layers import NORMS, Layer, digest, matches, parameter_owners

WIDE = (nn.Linear, nn.Conv2d, *NORMS)  # modules that carry `kept_out`


@dataclass(frozen=True)
class Surgery:
    """What is cut, and what it was planned for.

    Args:
        slices: (name of a parameter or buffer, axis) -> int64 positions that stay.
        kept_in, kept_out: module name -> positions that stay on its present channel axes.
        readers: weight name -> positions on axis 1 whose weights are zero in the proof.
        digests: name of a parameter or buffer -> sha256 when planned.
        example_inputs: what the proof runs.
        weights: weight name -> new weight of a reader before it is cut, zero where it is dropped.
        norms: module name -> positions of its input over which the smaller model takes moments.
    """

    slices: Mapping[tuple[str, int], Tensor]
    kept_in: Mapping[str, Tensor]
    kept_out: Mapping[str, Tensor]
    readers: Mapping[str, Tensor]
    digests: Mapping[str, str]
    example_inputs: Inputs = field(repr=False)
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    norms: Mapping[str, Tensor] = field(default_factory=dict)


def pinned_by(model: nn.Module, layers: Sequence[Layer], ignore: Sequence[str]) -> Pinned:
    """The rule of `trace`: why a parameter's channels must stay, or None."""
    refusals = {layer.name: layer.refusal for layer in layers}
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters())
    owners = parameter_owners(model)

    def reason(name: str, alone: bool) -> str | None:
        owner = name.rpartition(".")[0]
        module = modules[owner]
        if alone and not isinstance(module, NORMS) and name not in parameters:
            return f"{name} is a buffer, only parameters shrink"
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            refusal = refusals.get(owner)
            return None if refusal is None else f"{owner}: {refusal}"
        if not isinstance(module, (*NORMS, nn.Embedding)) and not alone:
            if refusals.get(owner) is not None:
                return f"{owner}: {refusals[owner]}"
            return f"{name} belongs to a {type(module).__name__}, which cannot be rebuilt"
        if matches(owner, ignore) or matches(name, ignore):
            return f"{owner if matches(owner, ignore) else name} is ignored"
        places = owners.get(id(parameters.get(name)), [])
        others = ", ".join(place for holder, place in places if holder != id(module))
        return f"{name} is shared with {others}; untie it (clone it) first" if others else None

    return reason


def unit_scores(coupling: Coupling, scores: Mapping[str, Tensor], axis: str) -> dict[int, float]:
    """Unit (root id) -> sum of the scores of its rows ("out") or of the columns that read it."""
    totals: dict[int, float] = {}

    def add(ids: Ids, values: Tensor) -> None:
        for i, value in zip(coupling.sets.roots(ids).tolist(), values.tolist(), strict=True):
            totals[i] = totals.get(i, 0.0) + value

    wanted = 0 if axis == "out" else 1
    for name, score in scores.items():
        ids = coupling.axes.get((f"{name}.weight", wanted))
        if ids is not None:
            other = [d for d in range(score.ndim) if d != wanted]
            add(ids, score.double().sum(dim=other))
    return totals


@dataclass
class Group:
    """Channels that share a width: all units on the out axes of some layers."""

    layers: list[str]
    units: list[int]  # root ids that may go, ascending
    axes: list[Ids]  # roots along the out axis of each layer


def groups_of(coupling: Coupling, names: Sequence[str]) -> list[Group]:
    """Layers whose outputs share units, in the order of `names`."""
    groups: list[Group] = []
    for name in names:
        ids = coupling.axes.get((f"{name}.weight", 0))
        if ids is None:
            continue
        roots = coupling.sets.roots(ids)
        free = [i for i in np.unique(roots).tolist() if coupling.sets.reason(i) is None]
        merged = Group([name], free, [roots])
        for group in [g for g in groups if set(g.units) & set(merged.units)]:
            groups.remove(group)
            merged.layers = [*group.layers, *merged.layers]
            merged.units = sorted({*group.units, *merged.units})
            merged.axes = [*group.axes, *merged.axes]
        groups.append(merged)
    return [group for group in groups if group.units]


def why_kept(coupling: Coupling, name: str) -> str | None:
    """Why not one output channel of a layer may go, or None if some may."""
    ids = coupling.axes.get((f"{name}.weight", 0))
    if ids is None:
        return "it did not run on the example inputs"
    roots = np.unique(coupling.sets.roots(ids))
    reasons = [coupling.sets.reason(int(i)) for i in roots]
    if reasons == [None]:
        return f"its {ids.size} channels are coupled with each other and could only go together"
    return None if None in reasons else reasons[0]


def cut(
    model: nn.Module, coupling: Coupling, gone: Sequence[int], example_inputs: Inputs
) -> Surgery:
    """The surgery that drops these roots everywhere."""
    sets = coupling.sets

    def stays(ids: Ids) -> Tensor | None:
        keep = ~np.isin(sets.roots(ids), gone)
        return None if keep.all() else torch.from_numpy(np.flatnonzero(keep))

    slices = {key: kept for key, ids in coupling.axes.items() if (kept := stays(ids)) is not None}
    kept_in, readers = {}, {}
    for use in coupling.uses:
        kept = stays(use.inputs)
        if kept is None:
            continue
        owner = use.weight.rpartition(".")[0]
        if isinstance(model.get_submodule(owner), WIDE):
            kept_in[owner] = kept
        columns = coupling.axes.get((use.weight, 1))
        if not use.depthwise and columns is not None:
            dropped = np.flatnonzero(np.isin(sets.roots(columns), gone))
            readers[use.weight] = torch.from_numpy(dropped)
    kept_out, norms = {}, {}
    for (name, axis), kept in slices.items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if axis == 0 and leaf in ("weight", "running_mean") and isinstance(module, WIDE):
            kept_out[owner] = kept
    for norm in coupling.norms:
        kept = stays(norm.inputs)
        if kept is None:
            continue
        if norm.mixes:
            norms[norm.module] = kept
        if isinstance(model.get_submodule(norm.module), WIDE):
            kept_out[norm.module] = kept
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    names = {name for name, _ in slices} & parameters
    digests = {name: digest(tensor_named(model, name)) for name in sorted(names)}
    return Surgery(slices, kept_in, kept_out, readers, digests, example_inputs, norms=norms)


def tensor_named(model: nn.Module, name: str) -> Tensor:
    """A parameter or buffer by its dotted name, or ValueError."""
    owner, _, leaf = name.rpartition(".")
    value = getattr(model.get_submodule(owner), leaf, None)
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is not in this model; make a plan for the model that you prune")
    return value
