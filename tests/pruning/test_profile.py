import pytest
import torch
from torch import nn

from slimgemm.kernels.timing import Times
from slimgemm.pruning import Channels, NofM
from slimgemm.pruning.geometry import ModelLatency
from slimgemm.pruning.latency import LatencyTable
from slimgemm.pruning.profile import (
    forward_times,
    layer_times,
    measure_latency,
    predicted,
    wanted_times,
)
from slimgemm.pruning.space import Allocation, Choices, Space


class Linearly(LatencyTable):
    """Times that are known: a layer takes 2 out + 3 in microseconds, 2:4 half of it."""

    def measure(self, wanted, after=None, also=None):
        for site, pattern, (out, into) in wanted:
            rows = self.times.setdefault(site.signature, {}).setdefault(pattern, {})
            rows[out, into] = Times(*[(2.0 * out + 3 * into) / (1 + (pattern != "dense"))] * 3)
        return {name: Times(*[1000.0] * 3) for name in also or {}}


@pytest.fixture
def space(residual, normal):
    return Space(residual, normal(2, 3, 8, 8), Choices((Channels(), NofM(2, 4))))


def test_what_is_measured_covers_every_allocation(space, tmp_path):
    table = Linearly(path=tmp_path / "t.json", twin=lambda layer, *pattern: layer)
    space.geometry.latency = measure_latency(space, table)
    halves = {n: "2:4" for n, words in space.maskable.items() if words}
    for allocation in (Allocation(), space.uniform(0.3), space.least(), Allocation({}, halves)):
        us = predicted(space, allocation)
        shapes = space.geometry.shapes(space.gone(allocation.channels))
        for name, shape in shapes.items():
            share = 2 if name in allocation.patterns else 1
            assert us[name] == pytest.approx((2 * shape[0] + 3 * shape[1]) / share)
    # whole models take 1000 us, so that what the dense model's layers do not take is the rest
    assert space.costs(Allocation()).latency_ms == pytest.approx(1.0)
    assert space.costs(space.uniform(0.5)).latency_ms == pytest.approx(1.0)


def test_without_a_twin_only_dense_layers_are_measured(space, tmp_path):
    table = Linearly(path=tmp_path / "t.json")
    assert {word for _, word, _ in wanted_times(space)} == {"dense", "2:4"}
    measure_latency(space, table)
    assert all(set(patterns) == {"dense"} for patterns in table.times.values())


def test_the_rest_is_interpolated_inside_what_was_measured():
    latency = ModelLatency(None, {100: 10.0, 200: 30.0})
    assert latency.rest_us(150) == 20 and latency.rest_us(200) == 30
    with pytest.raises(ValueError, match="outside the measured"):
        latency.rest_us(300)
    with pytest.raises(ValueError, match="nothing"):
        ModelLatency(None).rest_us(1)


def test_really_measured_times(tmp_path, normal):
    torch.manual_seed(0)
    small, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), normal(2, 8)
    wide = nn.Sequential(nn.Linear(8, 4096), nn.ReLU(), nn.Linear(4096, 4))
    table = LatencyTable(path=tmp_path / "t.json", rounds=3)
    times = forward_times({"small": small, "wide": wide}, x, table)
    assert 0 < times["small"].p20 < times["wide"].p20
    assert small.training and wide.training
    layers = layer_times({"small": small, "wide": wide}, x, ["0", "2"], table)
    assert set(layers["wide"]) == {"0", "2"} and small.training
    assert 0 < layers["small"]["0"].p20 < layers["wide"]["0"].p20
    space = Space(wide, x, Choices((Channels(multiple_of=1024),)))
    space.geometry.latency = measure_latency(space, table, points=3)
    assert 0 < space.costs(space.least({})).latency_ms < 1e3
