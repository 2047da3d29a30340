import pytest
from torch import nn

from slimgemm.kernels.timing import Times
from slimgemm.pruning.latency import LatencyTable
from slimgemm.pruning.sites import find_sites
from slimgemm.pruning.staircase import draw_staircase, suggest_multiple, sweep


@pytest.fixture
def site(normal):
    return find_sites(nn.Linear(16, 32), normal(4, 16))[""]


@pytest.fixture
def table(tmp_path):
    return LatencyTable(path=tmp_path / "times.json", rounds=2)


def stairs(step):
    return {w: Times(*[10.0 * -(-w // step)] * 3) for w in range(1, 129)}


@pytest.mark.parametrize("step", [1, 8, 32])
def test_the_multiple_is_the_width_of_a_step(step):
    assert suggest_multiple(stairs(step)) == step


def test_a_flat_line_and_too_few_widths():
    assert suggest_multiple({w: Times(1, 1, 1) for w in range(1, 129)}) == 64
    with pytest.raises(ValueError, match="four widths or more, got 1"):
        suggest_multiple({1: Times(1, 1, 1)})


def test_a_sweep_is_measured_and_drawn(table, site, tmp_path):
    pytest.importorskip("matplotlib")
    times = sweep(table, site, range(4, 10))
    assert list(times) == list(range(4, 10)) and all(t.p50 > 0 for t in times.values())
    draw_staircase({"layer": times, "steps": stairs(8)}, tmp_path / "s.png", "a device")
    assert (tmp_path / "s.png").read_bytes()[:4] == b"\x89PNG"
