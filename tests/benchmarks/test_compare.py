"""What `slimgemm bench --compare` takes for slower, and what for noise."""

import dataclasses

import pytest

from slimgemm.benchmarks.bench_model import ModelRow
from slimgemm.benchmarks.compare import SLOWER, compare, twice_slower
from slimgemm.benchmarks.records import Record
from slimgemm.benchmarks.rows import Row

HEAD = {"device": "AMD EPYC"}


def row(us=10.0, layer="a", implementation="slimgemm spmm_24", **changes):
    made = Row(
        "spmm_24", layer, "m 1, n 2, k 4", "fp32", implementation, "timed", "", 1e-7, 2e-7, 2,
        us * 0.98, us, us * 1.02, rate_from="eager", moved_bytes=100, tb_per_s=1e-5,
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


def torch_row(us=10.0, layer="a"):
    return row(us, layer, "torch dense")


def compared(old, new, device="AMD EPYC"):
    return compare(Record(HEAD, old), Record({"device": device}, new))


def test_planted_slower_rows_are_found_and_no_others():
    old = [row(layer=name) for name in "abcd"]
    new = [
        row(10.0 * SLOWER - 0.1, "a"),
        row(12.0, "b"),
        row(12.0, "c", eager_us_p20=9.0),  # the ranges overlap: noise
        row(5.0, "d"),
        row(99.0, "e"),  # not measured before
    ]
    found = compared(old, new)
    (change,) = found.slower
    assert change.key[1] == "b" and (change.old_us, change.new_us) == (10.0, 12.0)
    assert "10.0 us before, now 12.0 us (1.20 of it)" in str(change)
    assert str(found) == "compared 4 rows of ours, 1 slower"


def test_rows_of_torch_are_never_complained_of():
    found = compared([row(), torch_row()], [row(), torch_row(30.0)])
    assert not found.slower and found.rows == 1


def test_a_machine_that_is_slower_is_no_regression_of_ours():
    old = [row(), torch_row(), row(layer="b"), torch_row(layer="b")]
    new = [row(20.0), torch_row(20.0), row(21.5, "b"), torch_row(19.0, "b")]
    found = compared(old, new)
    assert not found.slower and found.moved == 2.0
    assert str(found).endswith("0 slower; rows of torch took up to 2.00 of theirs")
    # beyond what torch's rows moved it is ours
    (change,) = compared(old, [*new[:2], row(24.0, "b"), new[3]]).slower
    assert change.key[1] == "b"


def test_a_machine_that_is_faster_lets_nothing_pass():
    assert compared([row(), torch_row()], [row(12.0), torch_row(5.0)]).slower


def model_row(us, variant):
    return ModelRow(
        "tiny", "decode", "fp32", variant, "timed",
        eager_us_p20=us * 0.98, eager_us_p50=us, eager_us_p80=us * 1.02, rate_from="eager",
    )  # fmt: skip


def test_of_models_the_packed_variants_are_ours():
    old = [model_row(10.0, name) for name in ("dense", "channels", "2:4", "channels and 2:4")]
    found = compared(old, [model_row(15.0, "2:4"), *old[:2], old[3]])
    assert [change.key[-1] for change in found.slower] == ["2:4"] and found.rows == 2
    assert not compared(old, [model_row(15.0, "channels"), old[0], *old[2:]]).slower


def test_a_row_that_is_no_longer_timed_is_a_regression():
    (found,) = compared([row()], [row(status="refused", reason="error 1e-2 > 1e-3")]).slower
    assert "10.0 us before, now refused: error 1e-2 > 1e-3" in str(found)
    was = row(rate_from="graph", graph_us_p50=3.0)
    (found,) = compared([was], [row(reason="no graph: x")]).slower
    assert "timed as eager: no graph: x" in str(found)
    gone = dataclasses.replace(torch_row(), status="missing")
    assert not compared([row(), torch_row()], [row(), gone]).slower


def test_runs_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match="device AMD EPYC, measured with NVIDIA H200"):
        compared([row()], [row()], device="NVIDIA H200")
    with pytest.raises(ValueError, match="clock wall, measured with None"):
        compare(Record({**HEAD, "clock": "wall"}, [row()]), Record(HEAD, [row()]))
    with pytest.raises(ValueError, match="no timed row of ours in common"):
        compared([row(), torch_row()], [row(layer="b"), torch_row()])
    # where nothing of ours could be timed, as without a GPU, there is nothing to compare
    missing = row(status="missing")
    assert compared([missing, torch_row()], [missing, torch_row()]).rows == 0


def test_rows_count_only_where_a_second_measurement_finds_them_too():
    old = Record(HEAD, [row(), row(layer="b"), row(layer="c")])
    first = Record(HEAD, [row(20.0), row(20.0, "b"), row(layer="c")])
    said = []
    again = lambda: Record(HEAD, [row(19.0), row(10.0, "b"), row(30.0, "c")])  # noqa: E731
    (line,) = twice_slower(old, first, again, said.append)
    assert line.startswith("slower: spmm_24, a,")
    assert said == [
        "compared 3 rows of ours, 2 slower",
        "measuring again, for 2 that may be slower",
    ]
    # a run that was cut off before them cannot acquit them
    assert len(twice_slower(old, first, lambda: Record(HEAD, []), said.append)) == 2


def test_nothing_is_measured_again_without_need():
    def never():
        raise AssertionError("measured again")

    old = Record(HEAD, [row()])
    assert not twice_slower(old, old, never, print)
    gone = Record(HEAD, [row(status="failed", reason="x")])
    (line,) = twice_slower(old, gone, never, print)
    assert "now failed: x" in line
