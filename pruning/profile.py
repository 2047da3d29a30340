"""profile: measures on this device what a predicted latency needs, and what it then really is.

Layers are timed alone on a grid of widths; a few whole models, cut evenly and at random, are timed
to learn what the rest takes. All of them are timed in turn, so that they meet the same machine.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from slimgemm.kernels.timing import Times
from slimgemm.pruning.geometry import ModelLatency
from slimgemm.pruning.inputs import Inputs, run
from slimgemm.pruning.latency import DENSE, LatencyTable, Width, grid
from slimgemm.pruning.sites import Site, inputs_of
from slimgemm.pruning.space import Allocation, Space

SHARES = (0.0, 0.25, 0.5, 0.75)  # of evenly cut models that are timed whole
WHOLE = 8  # models with random widths that are timed whole beside them
POINTS = 9  # widths per axis of a layer's grid


def wanted_times(space: Space, points: int = POINTS) -> list[tuple[Site, str, Width]]:
    """Every (site, pattern, widths) that a prediction inside the space can ask for."""
    smallest = space.geometry.shapes(space.gone(space.least().channels))
    pattern = space.choices.widths
    multiple = 1 if pattern is None else pattern.multiple_of
    found = []
    for name, site in space.geometry.sites.items():
        low, high = smallest[name], site.weight
        outs, ins = (grid(low[axis], high[axis], points, multiple) for axis in (0, 1))
        words = [DENSE, *space.maskable.get(name, [])]
        found += [(site, word, (out, into)) for word in words for out in outs for into in ins]
    return found


def measure_latency(
    space: Space,
    table: LatencyTable,
    *,
    points: int = POINTS,
    whole: int = WHOLE,
    after: Callable[[int, int], None] | None = None,
    also: Mapping[str, Callable[[], Any]] | None = None,
) -> ModelLatency:
    """Measure what `space.costs` needs for a latency.

    Args:
        space: of the dense model.
        table: gains what is missing.
        points: widths per axis of a layer's grid; where a layer has no more, all of them.
        whole: models with random widths that are timed beside evenly cut ones.
        after: called with (layers done, layers in all).
        also: other calls, timed in the same rounds; their times are in `others` of the answer.
    """
    wanted = wanted_times(space, points)
    if table.twin is None:
        wanted = [item for item in wanted if item[1] == DENSE]
    luck = random.Random(space.choices.seed)
    asked = [*map(space.uniform, SHARES), space.least({}), *(space.any(luck) for _ in range(whole))]
    allocations = {allocation.key: allocation for allocation in asked}
    models = {key: space.apply(allocation)[0].eval() for key, allocation in allocations.items()}
    calls = {key: forward_of(model, space.example_inputs) for key, model in models.items()}
    told = None if after is None else lambda n: after(n, len(wanted))
    times = table.measure(wanted, told, {**calls, **(also or {})})
    others = {name: times[name] for name in also or {}}
    latency = ModelLatency(table, dense_us=table.of(times[Allocation().key]), others=others)
    gone = [space.gone(allocation.channels) for allocation in allocations.values()]
    latency.fit(
        [_layers_us(space, table, units) for units in gone],
        [space.geometry.activation_bytes(units) for units in gone],
        [table.of(times[key]) for key in allocations],
    )
    return latency


def _layers_us(space: Space, table: LatencyTable, gone: Sequence[int]) -> float:
    """Microseconds of all layers of a forward, each alone."""
    shapes = space.geometry.shapes(gone)
    return sum(
        site.calls * table.us(site, (shapes[name][0], shapes[name][1]))
        for name, site in space.geometry.sites.items()
    )


def forward_times(
    models: Mapping[str, nn.Module], example_inputs: Inputs, table: LatencyTable
) -> dict[str, Times]:
    """Microseconds of one forward of each model, in turn, in evaluation mode."""
    flags = [(m, m.training) for model in models.values() for m in model.modules()]
    try:
        for model in models.values():
            model.eval()
        calls = {name: forward_of(model, example_inputs) for name, model in models.items()}
        return table.timed(calls, 20)
    finally:
        for module, training in flags:
            module.training = training


def forward_of(model: nn.Module, example_inputs: Inputs) -> Callable[[], Any]:
    """One forward as a call, in whatever mode the model is then."""

    def forward() -> Any:
        with torch.inference_mode():
            return run(model, example_inputs)

    return forward


def layer_times(
    models: Mapping[str, nn.Module],
    example_inputs: Inputs,
    names: Sequence[str],
    table: LatencyTable,
) -> dict[str, dict[str, Times]]:
    """Model -> layer -> microseconds of one call alone, on the input that it sees in its model.

    Args:
        models: dense, cut or packed; each has the layers of these names.
        names: of layers that run on the example inputs.
        table: its device and rounds are used.
    """
    calls = {}
    for title, model in models.items():
        inputs = inputs_of(model, dict.fromkeys(names), example_inputs)
        for name in names:
            module = copy.deepcopy(model.get_submodule(name)).eval()
            calls[f"{title} {name}"] = _alone(module, inputs[name])
    found = table.timed(calls)
    return {title: {name: found[f"{title} {name}"] for name in names} for title in models}


def _alone(module: nn.Module, x: Any) -> Callable[[], Any]:
    def call() -> Any:
        with torch.inference_mode():
            return module(x)

    return call


def predicted(space: Space, allocation: Allocation) -> dict[str, float]:
    """Layer name -> predicted microseconds of one forward."""
    layers = space.geometry.layers(space.gone(allocation.channels), space.nofm(allocation))
    return {name: layer.us for name, layer in layers.items()}
