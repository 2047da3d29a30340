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
    # whole models take 1000 us whatever their layers take
    assert space.costs(Allocation()).latency_ms == pytest.approx(1.0, rel=1e-3)
    assert space.costs(space.uniform(0.5)).latency_ms == pytest.approx(1.0, rel=1e-3)


def test_without_a_twin_only_dense_layers_are_measured(space, tmp_path):
    table = Linearly(path=tmp_path / "t.json")
    assert {word for _, word, _ in wanted_times(space)} == {"dense", "2:4"}
    measure_latency(space, table)
    assert all(set(patterns) == {"dense"} for patterns in table.times.values())


def test_what_whole_models_add_to_their_layers_is_fitted():
    layers, activations = [100.0, 200, 300, 150], [4000.0, 5000, 9000, 1000]
    latency = ModelLatency(None)
    assert latency.whole_us(100, 4000) == 100
    us = [50 + 0.002 * b + 1.25 * a for a, b in zip(layers, activations, strict=True)]
    latency.fit(layers, activations, us)
    assert latency.us == pytest.approx(50, rel=0.01)
    assert latency.per_byte == pytest.approx(0.002, rel=0.01)
    assert latency.factor == pytest.approx(1.25, rel=0.01)
    # none goes below zero: models that get slower with fewer bytes have no term of bytes
    us = [500 + a - 0.01 * b for a, b in zip(layers, activations, strict=True)]
    latency.fit(layers, activations, us)
    assert latency.per_byte == 0 and latency.us > 0 and latency.factor > 0


def test_one_whole_model_keeps_layers_at_what_they_take_alone():
    latency = ModelLatency(None)
    latency.fit([100.0], [4000.0], [150.0])
    assert latency.factor == pytest.approx(1, abs=0.01)
    assert latency.whole_us(100, 4000) == pytest.approx(150)
    latency.fit([100.0], [4000.0], [80.0])
    assert latency.whole_us(100, 4000) == pytest.approx(80, rel=1e-3)


def test_models_and_layers_are_timed_one_by_one(tmp_path, normal):
    now = [0]

    class Ticking(nn.Linear):
        """Takes a microsecond per output."""

        def forward(self, x):
            now[0] += 1000 * self.out_features
            return super().forward(x)

    torch.manual_seed(0)
    x = normal(2, 8)
    table = LatencyTable(path=tmp_path / "t.json", rounds=3, clock=lambda: now[0])
    models = {
        name: nn.Sequential(Ticking(8, width), nn.ReLU(), Ticking(width, 4))
        for name, width in (("small", 8), ("wide", 32))
    }
    times = forward_times(models, x, table)
    assert times == {"small": Times(12, 12, 12), "wide": Times(36, 36, 36)}
    assert all(model.training for model in models.values())
    layers = layer_times(models, x, ["0", "2"], table)
    assert {m: {n: t.p50 for n, t in rows.items()} for m, rows in layers.items()} == {
        "small": {"0": 8, "2": 4}, "wide": {"0": 32, "2": 4}
    }  # fmt: skip
    # 3 rounds of warm-up and 20 of whole models, one forward that notes inputs, 3 and 3 of layers;
    # in each round an untimed run comes first
    assert now[0] == 1000 * (12 + 36) * (2 * (3 + 20) + 1 + 2 * (3 + 3))


def test_a_measured_model_has_a_latency(tmp_path, normal):
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4))
    space = Space(model, normal(2, 8), Choices((Channels(multiple_of=16),)))
    table = LatencyTable(path=tmp_path / "t.json", rounds=3)
    space.geometry.latency = measure_latency(space, table, points=3)
    site = space.geometry.sites["0"]
    widths = {(16, 8), (32, 8), (64, 8), (4, 16), (4, 32), (4, 64)}
    assert set(table.times[site.signature]["dense"]) == widths
    assert 0 < space.costs(space.least({})).latency_ms < float("inf")
    with pytest.raises(ValueError, match="outside what was measured"):
        table.us(site, (2, 8))
