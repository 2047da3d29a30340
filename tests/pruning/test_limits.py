import math
from dataclasses import replace

import pytest

from slimgemm.pruning.space import Allocation, Choices, Space
from slimgemm.pruning.task import Limits


@pytest.fixture
def costs(blobs):
    return Space(blobs.model, blobs.example, Choices()).costs(Allocation())


def test_limits_are_corrected_by_what_a_model_really_costs(costs):
    def of(latency_ms):
        return replace(costs, latency_ms=latency_ms)

    limits = Limits({"latency_ms": 10.0, "macs": 2 * costs.macs})
    higher = limits.corrected(of(9.0), of(6.0))  # said 9, was 6
    assert higher.costs == {"latency_ms": pytest.approx(10 * 9 / 6 * 0.99), "macs": 2 * costs.macs}
    assert limits.corrected(of(9.9), of(9.8)) == limits, "as predicted, and at the limit"
    assert limits.corrected(of(5.0), of(6.0)) == limits, "it costs more than predicted"
    assert limits.corrected(of(15.0), of(9.9)) == limits, "nothing is left to use"


def test_limits_hold_for_costs_and_metric(costs):
    limits = Limits({"macs": costs.macs}, max_drop=1.0)
    assert limits.held(costs, 1.0) and not limits.held(costs, 1.1)
    assert not limits.held(replace(costs, macs=costs.macs + 1), 0.0)
    free = Limits({"macs": costs.macs})
    assert free.held(costs, 99.0) and not free.held(costs, math.inf)
