"""Bars: which are reached, by how much, over how many layers; which of our kernels wins where."""

import dataclasses

import pytest

from slimgemm.benchmarks import records, report, report_bars
from slimgemm.benchmarks.report_bars import against_bars, fastest_of_ours, with_autotuned
from slimgemm.benchmarks.rows import Row, with_ratios
from slimgemm.benchmarks.shapes import SETS, SPARSE_TENSOR_CORES

LAYERS = [layer.name for layer in SPARSE_TENSOR_CORES]


def row(implementation, us, layer, m, **changes):
    made = Row(
        "spmm_24", layer, f"m {m}, n 64, k 64", "bf16", implementation, "timed",
        graph_us_p20=us, graph_us_p50=us, graph_us_p80=us, rate_from="graph", host_us_p50=us,
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


def case(layer, m, dense=10.0, ours=6.0, rival=6.3, compiled=None):
    """The rows of one layer, their ratios filled in."""
    us = {"slimgemm spmm_24": ours, "slimgemm mma_sp": ours - 1, "slimgemm portable": 9.0}
    us |= {"torch dense": dense, "torch dense compiled": compiled, "torch cusparselt": rival}
    rows = [row(name, value, layer, m) for name, value in us.items() if value]
    rows[0] = dataclasses.replace(rows[0], reason="dispatched to portable")
    return with_ratios(rows)


def every(m, **us):
    return [row for layer in LAYERS for row in case(layer, m, **us)]


def test_the_layers_and_tokens_of_the_bars_are_a_set_of_shapes():
    tokens = {m for bar in report_bars.BARS for m in bar.tokens}
    for name in ("main", "check"):
        assert set(SETS[name].tokens) == tokens == {1, 8, 16, 32, 64, 4096, 8192}
        assert SETS[name].linears == SPARSE_TENSOR_CORES
    assert len(LAYERS) == len(set(LAYERS)) == 8


@pytest.mark.parametrize(
    ("m", "us", "line"),
    [
        (8, {}, ["8 of 8", "0 of 8", "1.67", "1.5", "1.67", "1.05", "", "reached"]),
        (64, {"dense": 8.3}, ["8 of 8", "0 of 8", "1.38", "1.4", "1.38", "1.05", "", "short"]),
        (4096, {"dense": 8.4}, ["8 of 8", "0 of 8", "1.40", "1.3", "1.40", "1.05", "1", "reached"]),
        (4096, {"rival": 5.9}, ["8 of 8", "0 of 8", "1.67", "1.3", "1.67", "0.98", "1", "short"]),
        # Of eager and max-autotune the better one counts.
        (1, {"compiled": 8.0}, ["8 of 8", "8 of 8", "1.33", "1.5", "1.33", "1.05", "", "short"]),
        (8192, {"rival": None}, ["8 of 8", "0 of 8", "1.67", "1.3", "1.67", "", "1",
                                 "dense reached, cuSPARSELt was not timed at every layer"]),
    ],
)  # fmt: skip
def test_a_bar_is_reached_or_not(m, us, line):
    assert against_bars(every(m, **us)) == [["bf16", str(m), *line]]


def test_one_layer_that_is_slower_than_dense_misses_the_bar_though_the_mean_is_above():
    rows = [r for r in every(16, dense=20.0) if r.layer != LAYERS[3]]
    (line,) = against_bars([*rows, *case(LAYERS[3], 16, dense=5.9)])
    assert line[2:] == ["8 of 8", "0 of 8", "2.86", "1.5", "0.98", "1.05", "", "short"]


def test_a_mean_over_some_of_the_layers_reaches_nothing():
    rows = [r for r in every(1) if r.layer != LAYERS[0]]
    assert against_bars(rows)[0][-1] == "7 of 8 layers measured"
    # Other layers, and tokens without a bar, are no part of it.
    assert against_bars(case("bert.o", 1)) == [] and against_bars(every(128)) == []


def test_times_of_two_kinds_are_not_compared():
    rows = every(4096)
    eager = {"rate_from": "eager", "eager_us_p50": 1.0, "graph_us_p50": None}
    rows = [
        dataclasses.replace(r, **eager) if "cusparselt" in r.implementation else r for r in rows
    ]
    (line,) = against_bars(rows)
    assert line[7] == "" and "cuSPARSELt was not timed" in line[-1]


def test_cases_that_torch_compile_was_timed_in_replace_those_without_it():
    rows, compiled = every(8), [*case(LAYERS[0], 8, compiled=4.0), *case(LAYERS[1], 8, dense=1.0)]
    merged = with_autotuned(rows, compiled)
    assert len(merged) == len(rows) + 1  # only the first of the two has torch.compile
    (line,) = against_bars(merged)
    assert line[2:4] == ["8 of 8", "1 of 8"] and line[6] == "0.67"


def test_the_fastest_of_our_kernels_stands_beside_what_dispatch_took():
    rows = [*case(LAYERS[1], 64), *case(LAYERS[0], 8)]
    names = sorted([["bf16", "8", LAYERS[0]], ["bf16", "64", LAYERS[1]]], key=lambda n: int(n[1]))
    assert fastest_of_ours(rows) == [[*name, "mma_sp", "2.00", "portable"] for name in names]


def test_packing_is_judged_by_its_worst_layer_against_a_copy():
    def pack(layer, order, us):
        return [
            row(f"slimgemm {order} order", us, layer, 1, op="pack_24"),
            row(f"slimgemm {order} order from packed", 99.0, layer, 1, op="pack_24"),
            row("torch dense clone", 10.0, layer, 1, op="pack_24"),
        ]

    rows = [*pack("a", "mma_sp", 12.0), *pack("b", "mma_sp", 19.9), *pack("a", "wgmma_sp", 20.1)]
    assert report_bars.packing(rows) == [
        ["bf16", "slimgemm mma_sp order", "2", "1.99", "2", "reached"],
        ["bf16", "slimgemm wgmma_sp order", "1", "2.01", "2", "short"],
    ]


def test_the_host_may_take_ten_microseconds_more_than_for_torch():
    def call(layer, ours):
        return [
            row(f"slimgemm {layer}", ours, layer, 1, op="overhead"),
            row("torch dense", 5.0, layer, 1, op="overhead"),
        ]

    rows = [*call("spmm_24", 14.5), *call("gemm_channels", 15.5)]
    assert report_bars.overhead(rows) == [
        ["spmm_24", "14.5", "5.0", "9.5", "10", "reached"],
        ["gemm_channels", "15.5", "5.0", "10.5", "10", "short"],
    ]


def test_both_readmes_show_the_bars_and_hold_no_other_number(tmp_path):
    head = {
        "device": "NVIDIA H200", "compute_capability": "9.0", "driver": "580.1", "torch": "2.11.0",
        "triton": "3.6.0", "date": "2026-11-22", "command": "slimgemm bench --op spmm_24",
    }  # fmt: skip
    (tmp_path / "cpu_demo.json").write_text((records.RESULTS / "cpu_demo.json").read_text())
    (tmp_path / "h200_spmm_24.csv").write_text(records.as_csv(head, every(8)))
    compiled = records.as_csv(head, case(LAYERS[0], 8, compiled=4.0))
    (tmp_path / "h200_spmm_24_compiled.csv").write_text(compiled)
    section = report.readme_section(tmp_path)
    line = "| bf16 | 8 | 8 of 8 | 1 of 8 | 1.49 | 1.5 | 0.67 | 1.05 |  | short |"
    assert line in section and report.unrecorded(section, tmp_path) == []
    text = report.results_readme(report.load(tmp_path), [])
    assert text.count(line) == 1
    assert f"| bf16 | 8 | {LAYERS[1]} | mma_sp | 2.00 | portable |" in text
