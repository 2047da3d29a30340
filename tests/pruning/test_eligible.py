from types import SimpleNamespace

import pytest

from slimgemm import pruning
from slimgemm.kernels.timing import Times
from slimgemm.pruning import Channels, LatencyTable, NofM, Unstructured


class Known(LatencyTable):
    """A dense layer takes out * in / 10 us; packed, 20 us, however large it is."""

    def measure(self, wanted, after=None, also=None):
        for site, pattern, (out, into) in wanted:
            rows = self.times.setdefault(site.signature, {}).setdefault(pattern, {})
            rows[out, into] = Times(*[out * into / 10 if pattern == "dense" else 20.0] * 3)
        return {}


@pytest.fixture
def table(tmp_path):
    return Known(path=tmp_path / "t.json", twin=lambda layer, *pattern: layer)


def test_layers_whose_packed_kernel_does_not_win_stay_dense(mlp, normal, table):
    plan = pruning.plan(mlp, normal(3, 16), pattern=NofM(2, 4), latency=table)
    assert [e.name for e in plan.pruned] == ["0", "2"]
    assert (plan["0"].us, plan["0"].pruned_us) == (51.2, 20.0)
    assert plan["4"].refusal == "measured here, packed takes 20.0 µs and dense 19.2 µs"
    text = str(plan)
    assert "µs predicted" in text and "51.2 → 20.0" in text and "µs measured" not in text


def test_channels_are_predicted_at_both_widths(mlp, normal, table):
    plan = pruning.plan(
        mlp, normal(3, 16), pattern=Channels(), amount=pruning.Uniform(0.5), latency=table
    )
    assert plan["2"].kept_shape == (12, 16)
    assert (plan["2"].us, plan["2"].pruned_us) == (24 * 32 / 10, 12 * 16 / 10)


def test_patterns_without_a_kernel_have_no_prediction(mlp, normal, table):
    amount = pruning.Uniform(0.5)
    plan = pruning.plan(mlp, normal(3, 16), pattern=Unstructured(), amount=amount, latency=table)
    assert all(e.us != e.us for e in plan.entries) and "µs" not in str(plan).split("Predicted")[0]


def test_what_compress_measured_stands_beside_the_prediction(mlp, normal, table):
    plan = pruning.plan(mlp, normal(3, 16), pattern=NofM(2, 4), latency=table)
    rows = [
        SimpleNamespace(name="0", us_dense=48.0, us_packed=24.5),
        SimpleNamespace(name="2", us_dense=None, us_packed=None),
        SimpleNamespace(name="absent", us_dense=1.0, us_packed=1.0),
    ]
    both = plan.measured(rows)
    assert (both["0"].us_measured, both["0"].pruned_us_measured) == (48.0, 24.5)
    assert both["0"].pruned_us == 20.0 and both["2"].us_measured != both["2"].us_measured
    assert "48.0 → 24.5" in str(both) and plan["0"].us_measured != plan["0"].us_measured


def test_a_real_report_of_compress_fits(mlp, normal):
    from slimgemm import sparse_ops

    plan = pruning.plan(mlp, normal(3, 16), pattern=NofM(2, 4))
    plan.apply(mlp)
    report = sparse_ops.compress(mlp, normal(3, 16))
    assert [e.name for e in plan.measured(report.layers).entries] == ["0", "2", "4"]
