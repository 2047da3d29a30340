"""The recorded comparison of packed and dense layers on a CPU: what is written, what is refused."""

import json

import pytest
import torch

from slimgemm.benchmarks import bench_cpu


def test_rows_say_what_was_measured(tmp_path, capsys):
    path = tmp_path / "new" / "cpu.json"
    before = torch.get_num_threads()
    arguments = ["--threads", "1", "--largest", "0", "--seconds", "0.01", "--out", str(path)]
    assert bench_cpu.main(arguments) == 0
    assert torch.get_num_threads() == before
    found = json.loads(path.read_text())
    assert found["head"]["command"].endswith(".bench_cpu " + " ".join(arguments[:-2]))
    assert {"load_average_before", "load_average_after"} <= found["head"].keys()
    (row,) = found["rows"]
    assert row["case"].startswith("conv2d forward") and (row["threads"], row["clock"]) == (
        1,
        "cpu time",
    )
    assert row["rounds"] >= bench_cpu.LEAST_ROUNDS
    assert 0 < row["packed_us_p20"] <= row["packed_us_p50"] <= row["packed_us_p80"]
    ratio = row["packed_us_p50"] / row["dense_us_p50"]
    assert row["packed_over_dense_p50"] == pytest.approx(ratio, abs=0.01)
    assert "1 threads  conv2d forward" in capsys.readouterr().out


@pytest.mark.parametrize("training", [False, True], ids=["forward", "step"])
def test_a_wrong_layer_is_not_timed(training):
    dense, packed = bench_cpu.linear_pair(16)
    x = torch.randn(4, 16)
    bench_cpu.check(bench_cpu.Case("same", dense, packed, x, training))
    assert dense.weight.dtype == torch.float32
    packed.values.data[0, 0] += 1
    with pytest.raises(AssertionError, match=r"other: error .* not timed"):
        bench_cpu.check(bench_cpu.Case("other", dense, packed, x, training))
