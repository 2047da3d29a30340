import copy
from itertools import combinations

import pytest
import torch
from torch import nn

from slimgemm import pruning
from slimgemm.pruning.calibrate import Gram
from slimgemm.pruning.reconstruction import greedy_order, interaction, lasso_entry
from slimgemm.pruning.scores import Context


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return nn.Conv2d(6, 5, 3, bias=False).double()


def gram(layer, x):
    statistic = Gram(layer)
    statistic.add(x)
    return statistic.result()


def test_interaction_predicts_the_error_of_any_set(layer, normal):
    x = normal(2, 6, 6, 6, dtype=torch.float64)
    weight = layer.weight.detach()
    columns = weight.flatten(2).transpose(1, 2).flatten(1)
    a = interaction(columns, gram(layer, x)[0], taps=9)
    for dropped in ([0], [1, 4], [0, 2, 3, 5]):
        x_without = x.clone()
        x_without[:, dropped] = 0
        change = (layer(x) - layer(x_without)).detach().square().sum() / (2 * 16)
        torch.testing.assert_close(a[dropped][:, dropped].sum(), change)


def test_greedy_drops_copies_that_cancel_first():
    # channels 0 and 1 cancel: dropping both costs nothing, dropping one costs 1
    a = torch.tensor([[1.0, -1, 0], [-1, 1, 0], [0, 0, 0.9]], dtype=torch.float64)
    assert greedy_order(a).tolist() == [2, 1, 0]
    a[2, 2] = 1.5
    assert greedy_order(a).tolist() == [1, 0, 2]


@pytest.mark.parametrize("method", ["greedy", "lasso"])
def test_both_methods_beat_most_sets(method, layer, normal):
    x = normal(8, 6, 6, 6, dtype=torch.float64)
    x[:, 1] = 0.1 * x[:, 1]
    x[:, 4] = -x[:, 2] + 0.1 * x[:, 4]
    weight = layer.weight.detach()
    context = Context("c", statistics=gram(layer, x))
    score = pruning.Reconstruction(method)(weight, context)
    by_channel = score.sum((0, 2, 3))
    a = interaction(weight.flatten(2).transpose(1, 2).flatten(1), context.statistics[0], 9)
    errors = {c: float(a[list(c)][:, list(c)].sum()) for c in combinations(range(6), 2)}
    chosen = tuple(sorted(by_channel.sort().indices[:2].tolist()))
    assert 1 in chosen
    assert sorted(errors.values()).index(errors[chosen]) <= 2
    assert by_channel.max() == pytest.approx(1.0)


def test_lasso_of_independent_channels_enters_by_size():
    entry = lasso_entry(torch.diag(torch.tensor([1.0, 4.0, 0.0, 2.0], dtype=torch.float64)))
    assert entry.argsort(descending=True).tolist() == [1, 3, 0, 2] and entry[2] == 0
    torch.testing.assert_close(entry[:2], torch.tensor([1.0, 4.0]).double(), rtol=0.2, atol=0)
    assert not lasso_entry(torch.zeros(2, 2, dtype=torch.float64)).any()


def test_grouped_convolutions_are_judged_group_by_group(normal):
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 4, 1, groups=2)
    x = normal(4, 8, 3, 3)
    x[:, [1, 6]] *= 1e-3
    context = Context("c", statistics=gram(layer, x))
    score = pruning.Reconstruction()(layer.weight.detach(), context)
    assert score[:2].sum((0, 2, 3)).argmin() == 1 and score[2:].sum((0, 2, 3)).argmin() == 2


def test_channels_with_least_squares_keep_the_outputs(normal):
    """Half of the hidden channels are mixtures of the others: reconstruction loses nothing."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 5))
    mix = normal(6, 6)
    model[0].weight.data[6:] = mix @ model[0].weight.data[:6]
    model[0].bias.data[6:] = mix @ model[0].bias.data[:6]
    x = normal(64, 8)
    dense = model(x).detach()

    def error(**options):
        small = copy.deepcopy(model)
        plan = pruning.plan(
            small, x, pattern=pruning.Channels(), amount=pruning.Uniform(0.5), **options
        )
        plan.apply(small)
        assert small[0].out_features == 6 and small[1].weight.shape == (5, 6)
        return float((small(x) - dense).detach().square().mean())

    plain = error()
    fitted = error(repair=pruning.LeastSquares(damping=1e-7), calibration=[x])
    both = error(
        score=pruning.Reconstruction(),
        repair=pruning.LeastSquares(damping=1e-7),
        calibration=[x[:32], x[32:]],
    )
    assert fitted < 1e-2 * plain and both < 1e-3 * plain


def test_refusals():
    with pytest.raises(ValueError, match="method must be 'greedy' or 'lasso', got 'best'"):
        pruning.Reconstruction("best")
    with pytest.raises(ValueError, match="c: this score needs calibration data"):
        pruning.Reconstruction()(torch.ones(2, 2), Context("c"))
