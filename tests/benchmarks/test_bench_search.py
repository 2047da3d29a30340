"""The benchmark's own parts: what it compares, and what its tables say."""

import json

from slimgemm.benchmarks import bench_search_report

ROWS = [
    {"seed": s, "cost": "macs", "what": w, "limit": 50, "value": v, "dense": 100,
     "accuracy_percent": a, "method": "netadapt", "after": 60, "candidates": 5, "search_cpu_s": 7}
    for s, w, v, a in ((0, "searched", 49, 90.0), (0, "even", 48, 88.0), (1, "searched", 51, 91.0),
                       (1, "even", 47, 89.5))
]  # fmt: skip


def test_margins_are_seed_by_seed_and_limits_are_counted():
    (row,) = bench_search_report.summary(ROWS, "accuracy_percent")
    assert row["margin"] == "1.75 ± 0.35" and row["beyond_its_spread"] == "yes"
    assert row["limit_met_as_measured_again"] == "1 of 2" and row["searched"] == "90.50 ± 0.71"
    assert (row["method"], row["steps"], row["candidates"]) == ("netadapt", 60, "5 ± 0")
    assert row["search_cpu_s"] == "7 ± 0"
    without = [{k: v for k, v in r.items() if k != "search_cpu_s"} for r in ROWS]
    (bare,) = bench_search_report.summary(without, "accuracy_percent")
    assert bare["search_cpu_s"] == "not recorded"
    longer = [dict(r, after=300, accuracy_percent=92.0) for r in ROWS]
    rows = bench_search_report.summary([*ROWS, *longer], "accuracy_percent")
    assert [(r["steps"], r["margin"]) for r in rows] == [(60, row["margin"]), (300, "0.00 ± 0.00")]
    assert rows[1]["beyond_its_spread"] == "no"
    worse = [
        dict(r, accuracy_percent=r["accuracy_percent"] * (1 if r["seed"] else 0)) for r in ROWS
    ]
    (row,) = bench_search_report.summary(worse, "accuracy_percent")
    assert row["beyond_its_spread"] == "no"


def test_pages_hold_losses_failures_and_parts_not_run(tmp_path):
    unseen = [{"seed": 0, "what": "unseen", "error_percent": e} for e in (4.0, -12.0)]
    failed = [{"seed": 0, "cost": "energy_mj", "what": "searched", "failed": "too low"}]
    ended = {"seed": 0, "cost": "latency_ms", "method": "netadapt", "what": "searched",
             "after": "all", "steps": 70, "result": "half way", "accuracy_percent": 89.0,
             "limit": 2.0, "predicted": 1.8, "value": 2.0, "held_in_search": 1.9}  # fmt: skip
    dense = {"seed": 0, "what": "dense", "accuracy_percent": 92.0}
    rows = [*ROWS, *unseen, *failed, ended, dense]
    for turn in range(2):  # a run with the same command replaces the one before
        bench_search_report.record(tmp_path, "fashion", ["--part", "fashion"], {"turn": turn}, rows)
    data = json.loads((tmp_path / "search.json").read_text())
    assert len(data["fashion"]) == 1
    text = (tmp_path / "search.md").read_text()
    assert "median error 8.0 %, worst 12.0 %, within 10 %: 1 of 2" in text
    assert "Failed searches: energy_mj, seed 0: too low." in text
    assert "The best finalist at the end, latency_ms: half way (70 steps)." in text
    assert "as the search measured it: 1 of 1; its prediction was off by at most 10.0 %" in text
    assert "Dense: 92.00." in text and "Not run." in text and "1.75 ± 0.35" in text
