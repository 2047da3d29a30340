"""Channels: layers that really shrink, and the proof that nothing else changed.

Channels that pruning.trace found coupled go as one unit; `cut` says what a set of units is in every
parameter and buffer. Which units go, pruning.channel_plan decides. `apply_surgery` cuts, then runs
the model: its outputs must equal those of the dense model in which the layers that read the
dropped channels have zeros in their place. If they do not, everything is put back and the cut is
refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from slimgemm.kernels.formats import ChannelIndex, channel_index
from slimgemm.pruning.coupling import FIXED, Coupling, Ids
from slimgemm.pruning.inputs import Inputs, evaluating, run, tensors_of
from slimgemm.pruning.layers import Layer, digest, matches
from slimgemm.pruning.masks import PackedMask, mask_of, pack_mask

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

# Largest difference between the two models, relative to the largest output: summing fewer terms
# in another order moves the last bits, a wrong cut moves the first.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}


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
    """

    slices: Mapping[tuple[str, int], Tensor]
    kept_in: Mapping[str, Tensor]
    kept_out: Mapping[str, Tensor]
    readers: Mapping[str, Tensor]
    digests: Mapping[str, str]
    example_inputs: Inputs = field(repr=False)
    weights: Mapping[str, Tensor] = field(default_factory=dict)


def pinned_by(
    model: nn.Module, layers: Sequence[Layer], ignore: Sequence[str]
) -> Callable[[str], str | None]:
    """The rule of `trace`: why a parameter's channels must stay, or None."""
    refusals = {layer.name: layer.refusal for layer in layers}
    modules = dict(model.named_modules())

    def reason(name: str) -> str | None:
        owner = name.rpartition(".")[0]
        if owner in refusals:
            refusal = refusals[owner]
            return None if refusal is None else f"{owner}: {refusal}"
        if not isinstance(modules[owner], NORMS):
            return f"{name} belongs to a {type(modules[owner]).__name__}, which cannot be rebuilt"
        return f"{owner} is ignored" if matches(owner, ignore) else None

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
    reasons = [coupling.sets.reason(int(i)) for i in np.unique(ids)]
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
        kept = stays(use.inputs) if (use.inputs != FIXED).all() else None
        if kept is None:
            continue
        kept_in[use.weight.rpartition(".")[0]] = kept
        columns = coupling.axes.get((use.weight, 1))
        if not use.depthwise and columns is not None:
            dropped = np.flatnonzero(np.isin(sets.roots(columns), gone))
            readers[use.weight] = torch.from_numpy(dropped)
    kept_out = {
        name.rpartition(".")[0]: kept
        for (name, axis), kept in slices.items()
        if axis == 0 and name.rpartition(".")[2] in ("weight", "running_mean")
    }
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    names = {name for name, _ in slices} & parameters
    digests = {name: digest(tensor_named(model, name)) for name in sorted(names)}
    return Surgery(slices, kept_in, kept_out, readers, digests, example_inputs)


def apply_surgery(model: nn.Module, surgery: Surgery) -> None:
    """Cut the model in place; put everything back if the proof fails.

    Raises:
        ValueError: a tensor changed since the plan, or the outputs of the smaller model are not
            those of the dense one with zeros; the model is unchanged then.
    """
    for name, known in surgery.digests.items():
        if digest(tensor_named(model, name)) != known:
            raise ValueError(f"{name} changed after the plan was made; make a new plan")
    inputs = lively(surgery.example_inputs)
    want = _zeroed_outputs(model, surgery, inputs)
    undo = _Undo(model, surgery)
    failure: str | None
    try:
        shrink(model, surgery)
        with evaluating(model), torch.no_grad():
            failure = difference(tensors_of(run(model, inputs)), want)
    except (RuntimeError, ValueError, IndexError, AssertionError, TypeError) as error:
        first = (str(error).strip().splitlines() or [""])[0]
        failure = f"its forward failed: {type(error).__name__}: {first}"
    except BaseException:
        undo.restore()
        raise
    if failure is not None:
        undo.restore()
        cut_layers = ", ".join(surgery.kept_out)
        raise ValueError(
            f"channels of {cut_layers} could not be cut: the smaller model is not the dense one "
            f"with zeros, {failure}. A width written as a number in forward (view, reshape, scale) "
            "does this: read it from the tensor, or ignore these layers. The model is unchanged"
        )


def lively(inputs: Inputs) -> Inputs:
    """Example inputs for a proof: constant floating tensors, which prove little, become random."""

    def swap(value: object) -> object:
        if isinstance(value, Tensor):
            if not value.is_floating_point() or bool((value != value.flatten()[:1]).any()):
                return value
            generator = torch.Generator().manual_seed(0)
            return torch.randn(value.shape, generator=generator).to(value)
        if isinstance(value, Mapping):
            return {key: swap(item) for key, item in value.items()}
        return tuple(swap(item) for item in value) if isinstance(value, (tuple, list)) else value

    return swap(inputs)  # type: ignore[return-value]


def difference(got: Sequence[Tensor], want: Sequence[Tensor]) -> str | None:
    """What differs between two lists of outputs beyond TOLERANCE, or None."""
    for place, (a, b) in enumerate(zip(got, want, strict=True)):
        if a.shape != b.shape:
            return f"output {place} is {list(a.shape)} instead of {list(b.shape)}"
        if not a.is_floating_point():
            continue
        worst = float((a.double() - b.double()).abs().max()) if a.numel() else 0.0
        allowed = TOLERANCE[b.dtype] * max(
            float(b.double().abs().max()) if b.numel() else 0.0, 1e-30
        )
        if not worst <= allowed:  # also catches NaN
            return f"output {place} differs by {worst:.3g}, allowed are {allowed:.3g}"
    return None


def tensor_named(model: nn.Module, name: str) -> Tensor:
    """A parameter or buffer by its dotted name, or ValueError."""
    owner, _, leaf = name.rpartition(".")
    value = getattr(model.get_submodule(owner), leaf, None)
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is not in this model; make a plan for the model that you prune")
    return value


def _zeroed_outputs(model: nn.Module, surgery: Surgery, inputs: Inputs) -> list[Tensor]:
    """Outputs of the dense model whose readers have zeros for the dropped channels."""
    saved = {name: tensor_named(model, name).data for name in surgery.readers}
    try:
        for name, columns in surgery.readers.items():
            weight = surgery.weights.get(name, saved[name]).clone().to(saved[name].device)
            weight[:, columns.to(weight.device)] = 0
            tensor_named(model, name).data = weight
        with evaluating(model), torch.no_grad():
            return [t.clone() for t in tensors_of(run(model, inputs))]
    finally:
        for name, data in saved.items():
            tensor_named(model, name).data = data


ATTRIBUTES = (
    "in_features",
    "out_features",
    "in_channels",
    "out_channels",
    "num_features",
    "groups",
)


class _Undo:
    """What `restore` puts back: tensor contents by reference, attributes by value."""

    def __init__(self, model: nn.Module, surgery: Surgery) -> None:
        names = {name for name, _ in surgery.slices}
        self._tensors = [(t, t.data, t.grad) for t in (tensor_named(model, n) for n in names)]
        touched = {*surgery.kept_in, *surgery.kept_out}
        self._modules = [
            (
                module,
                {k: module.__dict__[k] for k in (*ATTRIBUTES, *CARRIED) if k in module.__dict__},
            )
            for module in (model.get_submodule(name) for name in touched)
        ]

    def restore(self) -> None:
        """Put everything back."""
        for tensor, data, grad in self._tensors:
            tensor.data = data
            tensor.grad = grad
        for module, saved in self._modules:
            for key in CARRIED:
                module.__dict__.pop(key, None)
            module.__dict__.update(saved)


CARRIED = ("kept_in", "kept_out", "kept_weights")


def shrink(model: nn.Module, surgery: Surgery) -> None:
    """Cut without a proof: for a surgery that was proved on these shapes before."""
    masks = {
        name: mask
        for name in {*surgery.kept_in, *surgery.kept_out}
        if (mask := mask_of(model.get_submodule(name))) is not None
    }
    for name, weight in surgery.weights.items():
        tensor = tensor_named(model, name)
        tensor.data = weight.to(tensor.device)
    for (name, axis), kept in surgery.slices.items():
        tensor = tensor_named(model, name)
        tensor.data = tensor.data.index_select(axis, kept.to(tensor.device))
        tensor.grad = None
        owner, _, leaf = name.rpartition(".")
        if leaf == "weight" and owner in masks:
            masks[owner] = masks[owner].index_select(axis, kept.to(masks[owner].device))
    for name in {*surgery.kept_in, *surgery.kept_out}:
        module = model.get_submodule(name)
        _carry(module, "kept_out", surgery.kept_out.get(name), _widths(module)[0])
        if not isinstance(module, NORMS):
            _carry(module, "kept_in", surgery.kept_in.get(name), _widths(module)[1])
        _rewrite(module, surgery.kept_in.get(name), surgery.kept_out.get(name))
        if name in masks:
            packed: PackedMask = pack_mask(masks[name].cpu())
            module.kept_weights = packed  # type: ignore[assignment]


def _widths(module: nn.Module) -> tuple[int, int]:
    """(out, in) channels as the attributes say, before `_rewrite`."""
    for out, inp in (("out_features", "in_features"), ("out_channels", "in_channels")):
        if hasattr(module, out):
            return int(getattr(module, out)), int(getattr(module, inp))
    return int(module.num_features), 0  # type: ignore[arg-type]


def _carry(module: nn.Module, key: str, kept: Tensor | None, width: int) -> None:
    """Set module.kept_in or kept_out: positions on the axis as it was before any pruning."""
    earlier = getattr(module, key, None)
    index: ChannelIndex | None = earlier if isinstance(earlier, ChannelIndex) else None
    if kept is not None:
        kept = kept.cpu()
        if index is None:
            index = channel_index(kept, width, key)
        else:
            index = channel_index(index.index[kept], index.width, key)
    setattr(module, key, index)


def _rewrite(module: nn.Module, kept_in: Tensor | None, kept_out: Tensor | None) -> None:
    """Attributes of a shrunk module say what its tensors are."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Conv2d):
        depthwise = module.groups > 1 and module.groups == module.in_channels
        if kept_in is not None:
            module.in_channels = kept_in.numel()
        if depthwise:
            module.groups = module.in_channels
        module.out_channels = module.weight.shape[0]
    elif isinstance(module, NORMS) and kept_out is not None:
        module.num_features = kept_out.numel()
