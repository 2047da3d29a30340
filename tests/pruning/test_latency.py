import json

import pytest
import torch
from torch import nn

from slimgemm.kernels.timing import Times
from slimgemm.pruning.latency import (
    LatencyTable,
    cache_folder,
    grid,
    identity,
    interpolate,
    packed_wins,
)
from slimgemm.pruning.masks import mask_of
from slimgemm.pruning.sites import find_sites


@pytest.fixture
def site(normal):
    return find_sites(nn.Linear(16, 32), normal(4, 16))[""]


@pytest.fixture
def table(tmp_path):
    return LatencyTable(path=tmp_path / "times.json", rounds=2)


def test_cells_are_bilinear_and_nothing_is_extrapolated():
    rows = {(a, b): 10.0 * a + b for a in (2, 4, 8) for b in (1, 5)}
    assert interpolate(rows, (4, 5)) == 45
    assert interpolate(rows, (3, 3)) == pytest.approx(33)
    assert interpolate(rows, (8, 2)) == pytest.approx(82)
    with pytest.raises(ValueError, match=r"out width 9 is outside what was measured \(2 to 8\)"):
        interpolate(rows, (9, 2))
    with pytest.raises(ValueError, match=r"in width 0 is outside"):
        interpolate(rows, (3, 0))
    with pytest.raises(ValueError, match=r"outside what was measured \(nothing\)"):
        interpolate({}, (1, 1))
    # the smallest whole cell, where a corner of a smaller one is missing
    del rows[4, 5]
    assert interpolate(rows | {(4, 1): 0.0}, (3, 3)) == pytest.approx(33)
    rows = {(2, 1): 1.0, (8, 5): 2.0}
    with pytest.raises(ValueError, match=r"no measured widths surround \(3, 3\)"):
        interpolate(rows, (3, 3))


def test_grids_hold_both_ends_and_multiples_between():
    assert grid(3, 64, 5, 8) == [3, 16, 32, 48, 64]
    assert grid(7, 7, 5) == [7] and grid(1, 2, 5) == [1, 2]


def test_measures_once_and_reads_its_file(table, site, monkeypatch):
    wanted = [(site, "dense", (out, into)) for out in (8, 32) for into in (4, 16)]
    seen = []
    assert table.measure(wanted, seen.append) == {} and seen == [4]
    also = {"one": lambda: seen.append("ran")}
    assert table.measure(wanted, also=also)["one"].p50 > 0
    assert seen.count("ran") == 2 * (2 + 3)  # 3 rounds of warm-up; each measurement after a run
    again = LatencyTable(path=table.path)
    assert again.times == table.times
    assert again.us(site, (8, 4)) == table.times[site.signature]["dense"][8, 4].p50 > 0
    low, high = sorted((again.us(site, (8, 4)), again.us(site, (32, 4))))
    assert low <= again.us(site, (20, 4)) <= high
    data = json.loads(table.path.read_text())
    assert data["measured_on"]["torch"] == torch.__version__
    data["measured_on"]["torch"] = "0.1"
    table.path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"measured with another torch: .*0\.1"):
        LatencyTable(path=table.path)
    table.path.write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        LatencyTable(path=table.path)


def test_the_file_lies_in_the_cache_folder_by_device_and_versions(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("SLIMGEMM_CACHE", raising=False)
    assert cache_folder() == tmp_path / "slimgemm"
    first = LatencyTable().path
    assert first.is_relative_to(tmp_path / "slimgemm") and first.name.startswith("cpu-")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert LatencyTable().path != first
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setenv("SLIMGEMM_CACHE", str(tmp_path / "own"))
    assert LatencyTable().path.parent.parent == tmp_path / "own"
    assert {"device", "torch", "threads"} <= identity("cpu").keys()


def test_the_statistic_is_one_that_is_measured(tmp_path, site):
    with pytest.raises(ValueError, match="statistic must be p20, p50 or p80, got 'mean'"):
        LatencyTable(path=tmp_path / "times.json", statistic="mean")
    for statistic, us in (("p20", 1.0), ("p50", 2.0), ("p80", 3.0)):
        table = LatencyTable(path=tmp_path / "times.json", statistic=statistic)
        table.times = {site.signature: {"dense": {(8, 16): Times(1.0, 2.0, 3.0)}}}
        assert table.us(site, (8, 16)) == us


def test_packed_layers_go_through_the_callable(tmp_path, table, site):
    with pytest.raises(ValueError, match=r"2:4 layers need LatencyTable\(twin=...\)"):
        table.measure([(site, "2:4", (8, 16))])
    seen = []

    def twin(layer, keep, group):
        seen.append(mask_of(layer).float().mean().item())
        if layer.out_features == 4:
            raise ValueError("too small")
        return layer

    packing = LatencyTable(path=tmp_path / "p.json", rounds=2, twin=twin)
    packing.measure([(site, w, (o, 16)) for w in ("dense", "2:4") for o in (4, 8)])
    assert seen == [0.5, 0.5]
    assert packing.us(site, (4, 16), "2:4") == float("inf")
    assert not packed_wins(packing, site, "2:4", [(4, 16)])
    packing.times[site.signature]["2:4"][8, 16] = Times(0.0, 0.0, 0.0)
    assert packed_wins(packing, site, "2:4", [(8, 16)])
    assert LatencyTable(path=packing.path).us(site, (4, 16), "2:4") == float("inf")
