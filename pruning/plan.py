"""plan: decide what to drop, show it, then do it or raise before anything changes.

    plan(model, ...) -> Plan -> print(plan) -> plan.apply(model)

`plan` reads the model and leaves it as it was. `Plan.apply` checks that the model is still the one
that was planned, then writes zeros (and masks) or shrinks channels.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from slimgemm.pruning import channels, report
from slimgemm.pruning.allocate import Amount, Setting, Uniform
from slimgemm.pruning.channel_plan import norm_scales, plan_channels
from slimgemm.pruning.cost import ENERGY, Cost, EnergyTable, LayerCost, count_macs
from slimgemm.pruning.coupling import Coupling
from slimgemm.pruning.decide import Part, Repair, Request, decide
from slimgemm.pruning.eligible import (
    check_amount,
    left_dense,
    where_packed_wins,
    with_pattern,
    with_times,
)
from slimgemm.pruning.gradients import GradientScore, mean_gradients
from slimgemm.pruning.inputs import Inputs
from slimgemm.pruning.latency import LatencyTable
from slimgemm.pruning.layers import Layer, check_finite, digest, find_layers
from slimgemm.pruning.masks import PackedMask, set_mask, unpack_mask
from slimgemm.pruning.patterns import Channels, Pattern
from slimgemm.pruning.proof import apply_surgery
from slimgemm.pruning.scores import Context, Function, Magnitude, Score
from slimgemm.pruning.trace import trace

UNKNOWN = float("nan")


@dataclass(frozen=True)
class LayerPlan:
    """What the plan says about one layer.

    Args:
        name, kind: dotted name; "linear", "conv2d" or a class name.
        shape, dtype: of the weight.
        digest: sha256 of the weight that was planned; None where the layer is left alone.
        mask: what is kept, for patterns inside a layer; None for Channels.
        kept_out, kept_in: int64 positions on the present axes 0 and 1 that Channels keeps.
        weight: the weight to write, where the score updates kept weights; None otherwise.
        refusal: why the layer is left alone, or None.
        follows: shape afterwards of the parameter of a module that is not pruned itself, but loses
            the channels of layers that it is added to (an embedding); None for all others.
        kept: share of weights kept.
        dense_bytes, pruned_bytes: of the weight; pruned as it is saved: packed where a format holds
            the pattern, dense with its zeros otherwise.
        macs, pruned_macs: of one forward of the example inputs.
        energy_pj, pruned_energy_pj: of the same forward, relative (see pruning.cost).
        us, pruned_us: predicted microseconds of one forward, NaN without a latency table.
        us_measured, pruned_us_measured: from a report of compress, NaN before (Plan.measured).
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    digest: str | None = None
    mask: PackedMask | None = None
    kept_out: Tensor | None = None
    kept_in: Tensor | None = None
    weight: Tensor | None = None
    refusal: str | None = None
    follows: tuple[int, ...] | None = None
    kept: float = 1.0
    dense_bytes: int = 0
    pruned_bytes: int = 0
    macs: int = 0
    pruned_macs: int = 0
    energy_pj: float = 0.0
    pruned_energy_pj: float = 0.0
    us: float = UNKNOWN
    pruned_us: float = UNKNOWN
    us_measured: float = UNKNOWN
    pruned_us_measured: float = UNKNOWN

    @property
    def kept_shape(self) -> tuple[int, ...]:
        """Shape of the weight after Channels; the dense shape for every other pattern."""
        if self.follows is not None:
            return self.follows
        shape = list(self.shape)
        if self.kept_out is not None:
            shape[0] = self.kept_out.numel()
        if self.kept_in is not None:
            shape[1] = self.kept_in.numel()
        return tuple(shape)


@dataclass(frozen=True)
class Plan:
    """A decision about every layer; made by `plan`.

    Args:
        entries: one LayerPlan per module that owns a matrix, in the model's order.
        pattern, score, seed: what `plan` was asked.
        energy: name of the energy table.
        notes: lines that the table prints below itself.
        surgery: what Channels cuts, over all parameters and buffers; None for other patterns.
    """

    entries: tuple[LayerPlan, ...]
    pattern: Pattern
    score: str
    seed: int
    energy: str
    notes: tuple[str, ...] = ()
    surgery: channels.Surgery | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return report.plan_table(self)

    def __getitem__(self, name: str) -> LayerPlan:
        """The entry of a layer by its dotted name."""
        for entry in self.entries:
            if entry.name == name:
                return entry
        raise KeyError(name)

    @property
    def pruned(self) -> tuple[LayerPlan, ...]:
        """Entries that `apply` will change."""
        return tuple(entry for entry in self.entries if entry.refusal is None)

    @property
    def refused(self) -> tuple[LayerPlan, ...]:
        """Entries that are left alone, each with its reason."""
        return tuple(entry for entry in self.entries if entry.refusal is not None)

    def measured(self, rows: Iterable[Any]) -> Plan:
        """This plan with the times that compress measured, beside the predicted ones.

        Args:
            rows: `layers` of a sparse_ops.CompressReport: name, us_dense and us_packed of each.
        """
        times = {row.name: (row.us_dense, row.us_packed) for row in rows if row.us_dense}
        entries = tuple(
            replace(e, us_measured=times[e.name][0], pruned_us_measured=times[e.name][1] or UNKNOWN)
            if e.name in times
            else e
            for e in self.entries
        )
        return replace(self, entries=entries)

    def check(self, model: nn.Module) -> None:
        """Raise ValueError unless every planned weight of the model is the one that was planned."""
        modules = dict(model.named_modules())
        for entry in self.pruned:
            if entry.follows is not None:
                continue  # compared when it is cut
            weight = getattr(modules.get(entry.name), "weight", None)
            if not isinstance(weight, Tensor):
                raise ValueError(
                    f"{entry.name} is not in this model; make a plan for the model that you prune"
                )
            if tuple(weight.shape) != entry.shape or weight.dtype != entry.dtype:
                raise ValueError(
                    f"{entry.name}.weight was {entry.dtype} {list(entry.shape)} when planned, is "
                    f"{weight.dtype} {list(weight.shape)}; make a new plan"
                )
            if digest(weight) != entry.digest:
                raise ValueError(
                    f"{entry.name}.weight changed after the plan was made; make a new plan"
                )

    def apply(self, model: nn.Module) -> None:
        """Prune the model in place, exactly as planned.

        Masked weights become +0.0 and their modules carry `kept_weights` (see pruning.masks);
        channels are cut out of every tensor, and their modules carry `kept_in` and `kept_out`
        (`kept_parameters` where they are no layers, see pruning.shrink).

        Raises:
            ValueError: the model is not as it was planned, or channel surgery could not be proved;
                the model is unchanged then.
        """
        self.check(model)
        if self.surgery is not None:
            apply_surgery(model, self.surgery)
            return
        modules = dict(model.named_modules())
        for entry in self.pruned:
            assert entry.mask is not None
            module = modules[entry.name]
            if entry.weight is not None:
                assert isinstance(module.weight, Tensor)
                with torch.no_grad():
                    module.weight.copy_(entry.weight)
            set_mask(module, unpack_mask(entry.mask))


def layer_seed(seed: int, name: str) -> int:
    """A seed for one layer, from the plan's seed and the layer's name; stable across machines."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "big")


def _check_kinds(pattern: Any, score: Any, amount: Any) -> None:
    """Raise ValueError where a name or a number stands for a pattern, a score or an amount."""
    if isinstance(pattern, (str, int, float, type)):
        raise ValueError(f"pattern must be a pattern as NofM(keep=2, group=4), got {pattern!r}")
    if score is not None and (not callable(score) or isinstance(score, type)):
        raise ValueError(f"score must be a score as Magnitude(p=1) or a function, got {score!r}")
    if isinstance(amount, (str, int, float, type)):
        raise ValueError(f"amount must be an amount as Uniform(0.5), got {amount!r}")


def plan(
    model: nn.Module,
    example_inputs: Inputs,
    *,
    pattern: Pattern,
    score: Score | Callable[[Tensor, Context], Tensor] | None = None,
    amount: Amount | None = None,
    calibration: Iterable[Any] | None = None,
    repair: Repair | None = None,
    resume: str | os.PathLike[str] | None = None,
    ignore: Sequence[str] = (),
    seed: int = 0,
    energy: str = "horowitz45",
    latency: LatencyTable | None = None,
) -> Plan:
    """Decide what to drop; the model is left as it was.

    Args:
        model: any module; Linear and Conv2d layers are pruned, others are listed with the reason.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments.
        pattern: what is dropped together, as NofM(keep=2, group=4).
        score: what matters, as Magnitude(p=1) (the default); or a function (weight, context) ->
            scores of the weight's shape, higher is kept.
        amount: how much is dropped where, as Uniform(0.5); None where the pattern fixes it.
        calibration: batches, each as example_inputs; scores that need data refuse to go without.
        repair: new values for kept weights after the mask, as ADMM() or LeastSquares().
        resume: a folder where a calibrated plan leaves its decisions group by group; called again
            with the same arguments it goes on from there.
        ignore: names of layers or of their parents, or "re:" and a regex for the full name; a
            normalisation, or a parameter that is no layer's, so named keeps its channels.
        seed: of scores that draw random numbers.
        energy: name of the energy table in pruning.cost.ENERGY.
        latency: a table that layers are measured into; the plan then predicts microseconds, and a
            keep:group layer whose packed kernel is not faster there is left alone.

    Returns:
        A Plan: print it, then `apply` it.

    Raises:
        ValueError: an amount or pattern is out of range or they contradict each other, a weight
            holds NaN or infinity, `ignore` covers nothing, a score lacks its data, or no layer
            can be pruned. The message names the place and the cure.
    """
    _check_kinds(pattern, score, amount)
    scorer = score if isinstance(score, Score) else Function(score) if score else Magnitude()
    amount = amount if amount is not None else Uniform()
    if energy not in ENERGY:
        raise ValueError(f"energy must be one of {', '.join(ENERGY)}, got {energy!r}")
    batches = None if calibration is None else list(calibration)
    amount = amount.resolve(
        Setting(model, example_inputs, pattern, scorer, batches, tuple(ignore), seed)
    )
    check_amount(pattern, amount)
    if calibration is None and (scorer.needs in ("inputs", "gradients") or repair is not None):
        raise ValueError(
            f"{scorer if repair is None else repair} needs calibration data; pass calibration=, an "
            "iterable of model inputs (for scores of gradients, of pairs of inputs and target)"
        )
    layers = [with_pattern(layer, pattern) for layer in find_layers(model, ignore)]
    layers = left_dense(layers, pattern, amount)
    layers = where_packed_wins(model, example_inputs, layers, pattern, latency)
    chosen = [layer for layer in layers if layer.refusal is None]
    if not chosen:
        reasons = "; ".join(f"{layer.name}: {layer.refusal}" for layer in layers) or "no layers"
        raise ValueError(f"nothing can be pruned: {reasons}")
    for layer in chosen:
        check_finite(layer.name, layer.weight)
    coupling = None
    if isinstance(pattern, Channels) or scorer.needs == "norm":
        coupling = trace(model, example_inputs, channels.pinned_by(model, layers, ignore))
    contexts = contexts_of(model, chosen, scorer, coupling, batches, seed)
    cost = count_macs(model, example_inputs)
    request = Request(
        model, chosen, pattern, scorer, amount, contexts, batches, repair, cost, resume
    )
    surgery = None
    if isinstance(pattern, Channels):
        assert coupling is not None
        parts, surgery = plan_channels(request, coupling, pattern, example_inputs)
    else:
        parts = decide(request)
    entries = tuple(
        _other(layer, surgery)
        if layer.refusal is not None
        else _entry(layer, parts[layer.name], pattern, cost, ENERGY[energy])
        for layer in layers
    )
    if latency is not None:
        entries = with_times(model, example_inputs, entries, pattern, latency)
    notes = [note for part in parts.values() for note in part.notes]
    return Plan(
        entries,
        pattern,
        str(scorer),
        seed,
        energy,
        (*notes, *report.storage_notes(pattern, entries)),
        surgery,
    )


def contexts_of(
    model: nn.Module,
    layers: Sequence[Layer],
    score: Score,
    coupling: Coupling | None,
    batches: Sequence[Any] | None,
    seed: int,
) -> dict[str, Context]:
    """Layer name -> what a score may read, but for inputs, which are gathered group by group."""
    names = [layer.name for layer in layers]
    norms = norm_scales(model, coupling, names) if coupling else {}
    gradients: Mapping[str, Tensor] = {}
    if isinstance(score, GradientScore):
        assert batches is not None
        gradients = mean_gradients(model, layers, score, batches)
    return {n: Context(n, layer_seed(seed, n), gradients.get(n), norms.get(n)) for n in names}


def _other(layer: Layer, surgery: channels.Surgery | None) -> LayerPlan:
    """A module that is not pruned: left alone, or its parameter follows the channels of layers."""
    own = [(key, p) for key, p in layer.module.named_parameters(recurse=False) if p.ndim >= 2]
    for (name, axis), kept in surgery.slices.items() if surgery else ():
        for key, weight in own:
            if name != f"{layer.name}.{key}".lstrip("."):
                continue
            shape = (*weight.shape[:axis], kept.numel(), *weight.shape[axis + 1 :])
            share = _share(kept, weight.shape[axis])
            return LayerPlan(
                layer.name, layer.kind, tuple(weight.shape), weight.dtype, follows=shape,
                kept=share, dense_bytes=weight.nbytes, pruned_bytes=round(weight.nbytes * share),
                energy_pj=UNKNOWN, pruned_energy_pj=UNKNOWN,
            )  # fmt: skip
    return _left(layer, own[0][1], layer.refusal)


def _left(layer: Layer, weight: Tensor, refusal: str | None) -> LayerPlan:
    return LayerPlan(layer.name, layer.kind, tuple(weight.shape), weight.dtype, refusal=refusal)


def _entry(layer: Layer, part: Part, pattern: Pattern, cost: Cost, table: EnergyTable) -> LayerPlan:
    weight = layer.weight
    if part.refusal is not None:
        return _left(layer, weight, part.refusal)
    used = cost.layers.get(layer.name, LayerCost(0, 0, 0, 0, 0))
    read, written = _share(part.kept_in, weight.shape[1]), _share(part.kept_out, weight.shape[0])
    if part.mask is not None:
        mask = unpack_mask(part.mask)
        kept = float(mask.sum()) / mask.numel()
        pruned_bytes = pattern.stored_bytes(mask, weight.element_size())
    else:
        kept = read * written
        pruned_bytes = round(weight.nbytes * kept)
    depthwise = getattr(layer.module, "groups", 1) > 1 and weight.shape[1] == 1  # inputs go along
    after = used.input_bytes * (written if depthwise else read) + used.output_bytes * written
    before = used.input_bytes + used.output_bytes
    return LayerPlan(
        name=layer.name,
        kind=layer.kind,
        shape=tuple(weight.shape),
        dtype=weight.dtype,
        digest=digest(weight),
        mask=part.mask,
        kept_out=part.kept_out,
        kept_in=part.kept_in,
        weight=part.weight,
        kept=kept,
        dense_bytes=weight.nbytes,
        pruned_bytes=pruned_bytes,
        macs=used.macs,
        pruned_macs=round(used.macs * kept),
        energy_pj=table.layer(used.macs, weight.nbytes, before, weight.dtype),
        pruned_energy_pj=table.layer(used.macs * kept, pruned_bytes, after, weight.dtype),
    )


def _share(kept: Tensor | None, width: int) -> float:
    return 1.0 if kept is None else kept.numel() / width
