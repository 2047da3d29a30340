import random

import numpy as np
import pytest
import torch
from torch import nn

from slimgemm.pruning.geometry import Costs
from slimgemm.pruning.task import Limits, differing_outputs, seeded


def costs(macs, params=1.0):
    return Costs(macs, params, 0.0, 0.0, 0.0)


def test_work_counts_what_is_above_a_limit_and_nothing_below():
    limits, dense = Limits({"macs": 50.0, "params": 4.0}), costs(100.0, 8.0)
    assert limits.work(dense, dense) == 4.0
    assert limits.work(costs(25.0, 8.0), dense) == 3.0
    assert limits.work(costs(25.0, 4.0), dense) == 2.0 == limits.work(costs(1.0, 1.0), dense)
    assert limits.met(costs(50.0, 4.0)) and not limits.met(costs(50.0, 4.1))
    only_drop = Limits({}, max_drop=1.0, minimise="params")
    assert only_drop.work(costs(100.0, 2.0), dense) == 0.25 and only_drop.met(dense)
    with pytest.raises(ValueError, match="no latency without a table"):
        Limits({"latency_ms": 1.0}).met(dense)


def test_tightening_takes_off_what_was_too_much():
    limits = Limits({"macs": 50.0, "params": 4.0}).tightened(costs(100.0, 3.0), margin=0.0)
    assert limits.costs == {"macs": 25.0, "params": 4.0}
    assert str(Limits({"macs": 50.0}, 1.5)) == "50 MACs and a drop of 1.5"


def test_seeded_numbers_repeat_and_leave_no_trace():
    def draw():
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    want = draw()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    with seeded(5):
        first = draw()
    with seeded(5):
        assert draw() == first
    assert draw() == want != first


def test_differing_outputs():
    class Noise(nn.Module):
        def forward(self, x):
            return x + torch.rand_like(x)

    class Grows(nn.Module):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return x.repeat(self.calls)

    x = torch.ones(3)
    assert differing_outputs(nn.Dropout(), x) is None  # evaluation mode
    assert differing_outputs(Noise(), x).startswith("by up to 0.")
    assert differing_outputs(Grows(), x) == "outputs of shape [3] and [6]"
