"""eligible: which layers a pattern takes: by shape, by the amount, and by what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

from slimgemm.pruning.allocate import Amount, PerLayer, Uniform
from slimgemm.pruning.inputs import Inputs
from slimgemm.pruning.latency import DENSE, LatencyTable
from slimgemm.pruning.layers import Layer
from slimgemm.pruning.patterns import Channels, NofM, Pattern
from slimgemm.pruning.sites import find_sites

if TYPE_CHECKING:
    from slimgemm.pruning.plan import LayerPlan

SHARE_DIGITS = 1e-6  # an amount equals the share that a pattern fixes up to this


def check_amount(pattern: Pattern, amount: Amount) -> None:
    """Raise ValueError where a pattern fixes a share and the amount asks for another."""
    if pattern.share is None:
        if isinstance(amount, Uniform) and amount.share is None:
            raise ValueError(f"{pattern} needs an amount, as amount=Uniform(0.5)")
        return
    fixed = amount.fixed()
    if isinstance(amount, PerLayer):
        wrong = {*amount.shares.values(), amount.default} - {0.0, pattern.share}
        if wrong:
            raise ValueError(
                f"{pattern} drops {pattern.share:g} of a layer or nothing, PerLayer asks for "
                f"{', '.join(f'{share:g}' for share in sorted(wrong))}"
            )
        return
    if not isinstance(amount, Uniform) or (
        fixed is not None and abs(fixed - pattern.share) > SHARE_DIGITS
    ):
        raise ValueError(
            f"{pattern} drops {pattern.share:g} of every layer, {amount} asks for something else; "
            "leave amount out, or choose another pattern"
        )


def with_pattern(layer: Layer, pattern: Pattern) -> Layer:
    """The layer, refused where the pattern cannot take its shape."""
    if layer.refusal is not None:
        return layer
    refusal = pattern.refusal(tuple(layer.weight.shape))
    return Layer(layer.name, layer.kind, layer.module, refusal)


def left_dense(layers: list[Layer], pattern: Pattern, amount: Amount) -> list[Layer]:
    """With a pattern that fixes its share, layers that PerLayer gives 0 are left alone."""
    if pattern.share is None or not isinstance(amount, PerLayer):
        return layers
    known = {layer.name for layer in layers if layer.refusal is None}
    unknown = sorted({*amount.shares} - known)
    if unknown:
        raise ValueError(
            f"PerLayer names {', '.join(unknown)}, which cannot be pruned here; layers are "
            f"{', '.join(sorted(known))}"
        )
    return [
        replace(layer, refusal="the amount leaves it dense")
        if layer.refusal is None and not amount.shares.get(layer.name, amount.default)
        else layer
        for layer in layers
    ]


def where_packed_wins(
    model: nn.Module,
    example_inputs: Inputs,
    layers: list[Layer],
    pattern: Pattern,
    table: LatencyTable | None,
) -> list[Layer]:
    """With a table, layers whose packed kernel is not faster than the dense one are left alone."""
    if table is None or not isinstance(pattern, NofM):
        return layers
    sites, word = find_sites(model, example_inputs), str(pattern)
    chosen = [layer for layer in layers if layer.refusal is None and layer.name in sites]
    widths = {layer.name: sites[layer.name].weight[:2] for layer in chosen}
    table.measure(
        (sites[name], kind, (out, into))
        for name, (out, into) in widths.items()
        for kind in (DENSE, word)
    )
    slower = {}
    for name, (out, into) in widths.items():
        dense, packed = (table.us(sites[name], (out, into), kind) for kind in (DENSE, word))
        if packed >= dense:
            slower[name] = f"measured here, packed takes {packed:.1f} µs and dense {dense:.1f} µs"
    return [
        replace(layer, refusal=slower[layer.name]) if layer.name in slower else layer
        for layer in layers
    ]


def with_times(
    model: nn.Module,
    example_inputs: Inputs,
    entries: Sequence[LayerPlan],
    pattern: Pattern,
    table: LatencyTable,
) -> tuple[LayerPlan, ...]:
    """Entries with predicted microseconds, for the patterns that have kernels."""
    if not isinstance(pattern, (Channels, NofM)):
        return tuple(entries)
    sites = find_sites(model, example_inputs)
    word = str(pattern) if isinstance(pattern, NofM) else DENSE
    asked = {e.name: e for e in entries if e.refusal is None and e.name in sites}
    both = {name: ((DENSE, e.shape[:2]), (word, e.kept_shape[:2])) for name, e in asked.items()}
    table.measure(
        (sites[name], kind, (shape[0], shape[1]))
        for name, pair in both.items()
        for kind, shape in pair
    )

    def us(name: str, kind: str, shape: Sequence[int]) -> float:
        return sites[name].calls * table.us(sites[name], (shape[0], shape[1]), kind)

    return tuple(
        replace(e, us=us(e.name, *both[e.name][0]), pruned_us=us(e.name, *both[e.name][1]))
        if e.name in both
        else e
        for e in entries
    )
