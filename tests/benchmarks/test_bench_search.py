"""The benchmark's own parts: what it compares, and what its tables say."""

import json

import pytest
import torch
from torch import nn

from slimgemm.benchmarks import bench_search, bench_search_report
from slimgemm.pruning import Channels
from slimgemm.pruning.space import Allocation, Choices, Space


@pytest.fixture
def space():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 40), nn.ReLU(), nn.Linear(40, 24), nn.ReLU(), nn.Linear(24, 3)
    )
    return Space(model, torch.randn(2, 8), Choices((Channels(multiple_of=4),)))


def test_even_cuts_end_just_below_the_limit(space):
    limit = bench_search.limit_of("macs", 0.4, space)
    dense, least = space.costs(Allocation()).macs, space.costs(space.least({})).macs
    assert limit == pytest.approx(least + 0.4 * (dense - least))
    flat = bench_search.even(space, "macs", limit)
    assert space.costs(flat).macs <= limit
    shares = {name: kept / len(space.groups[name].units) for name, kept in flat.channels.items()}
    assert len(shares) == 2 and max(shares.values()) - min(shares.values()) < 0.15
    wider = [space.uniform(share) for share in bench_search.EVEN]
    assert max(space.costs(a).macs for a in wider if space.costs(a).macs <= limit) == (
        space.costs(flat).macs
    )


ROWS = [
    {"seed": s, "cost": "macs", "what": w, "limit": 50, "value": v, "dense": 100,
     "accuracy_percent": a}
    for s, w, v, a in ((0, "searched", 49, 90.0), (0, "even", 48, 88.0), (1, "searched", 51, 91.0),
                       (1, "even", 47, 89.5))
]  # fmt: skip


def test_margins_are_seed_by_seed_and_limits_are_counted():
    (row,) = bench_search_report.summary(ROWS, "accuracy_percent")
    assert row["margin"] == "1.75 ± 0.35" and row["beyond_its_spread"] == "yes"
    assert row["limit_met_as_measured_again"] == "1 of 2" and row["searched"] == "90.50 ± 0.71"
    worse = [
        dict(r, accuracy_percent=r["accuracy_percent"] * (1 if r["seed"] else 0)) for r in ROWS
    ]
    (row,) = bench_search_report.summary(worse, "accuracy_percent")
    assert row["beyond_its_spread"] == "no"


def test_pages_hold_losses_failures_and_parts_not_run(tmp_path):
    unseen = [{"seed": 0, "what": "unseen", "error_percent": e} for e in (4.0, -12.0)]
    failed = [{"seed": 0, "cost": "energy_mj", "what": "searched", "failed": "too low"}]
    rows = [*ROWS, *unseen, *failed, {"seed": 0, "what": "dense", "accuracy_percent": 92.0}]
    for turn in range(2):  # a run with the same command replaces the one before
        bench_search_report.record(tmp_path, "fashion", ["--part", "fashion"], {"turn": turn}, rows)
    data = json.loads((tmp_path / "search.json").read_text())
    assert len(data["fashion"]) == 1
    text = (tmp_path / "search.md").read_text()
    assert "median error 8.0 %, worst 12.0 %, within 10 %: 1 of 2" in text
    assert "Failed searches: energy_mj, seed 0: too low." in text
    assert "Dense: 92.00." in text and "Not run." in text and "1.75 ± 0.35" in text
