import pytest
import torch

from slimgemm.pruning import BatchNormScale, Context, GeometricMedian, Magnitude, Random
from slimgemm.pruning.scores import Function, spread

LAYER = Context("fc", seed=3)


def test_magnitude_is_the_power_of_the_size():
    weight = torch.tensor([[-2.0, 3.0]])
    assert Magnitude(1)(weight, LAYER).tolist() == [[2, 3]]
    assert Magnitude(2)(weight, LAYER).tolist() == [[4, 9]]


def test_half_precision_does_not_overflow():
    score = Magnitude(2)(torch.full((1, 1), 6e4, dtype=torch.float16), LAYER)
    assert score.dtype == torch.float32 and torch.isfinite(score).all()


def test_random_follows_the_seed_only():
    weight = torch.zeros(5, 5)
    assert torch.equal(Random()(weight, LAYER), Random()(weight + 1, LAYER))
    assert not torch.equal(Random()(weight, LAYER), Random()(weight, Context("fc", seed=4)))


def test_geometric_median_sums_to_the_distances():
    weight = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 1.0]])
    got = GeometricMedian()(weight, LAYER).sum(1)
    want = [5 + 1, 5 + 18**0.5, 1 + 18**0.5]
    torch.testing.assert_close(got, torch.tensor(want))


def test_batch_norm_scale_is_spread_over_the_row():
    context = Context("c", norm=torch.tensor([-2.0, 0.5]))
    score = BatchNormScale()(torch.zeros(2, 3, 1, 1), context)
    torch.testing.assert_close(score.sum((1, 2, 3)), torch.tensor([2.0, 0.5]))
    with pytest.raises(ValueError, match="c: no batch normalisation"):
        BatchNormScale()(torch.zeros(2, 3), Context("c"))


def test_spread_sums_back():
    weight = torch.zeros(2, 3, 2, 2)
    torch.testing.assert_close(
        spread(torch.tensor([1.0, 6.0]), weight).sum((1, 2, 3)), torch.tensor([1.0, 6.0])
    )


def test_own_function_is_called_and_checked():
    score = Function(lambda weight, context: weight * context.seed)
    assert score(torch.ones(1, 2), LAYER).tolist() == [[3, 3]]
    with pytest.raises(ValueError, match=r"fc: .*shape \[1, 2\], got \[2\]"):
        Function(lambda weight, context: weight[0])(torch.ones(1, 2), LAYER)
    with pytest.raises(ValueError, match="got float"):
        Function(lambda weight, context: 1.0)(torch.ones(1, 2), LAYER)


def test_p_must_be_positive():
    with pytest.raises(ValueError, match="p must be positive, got 0"):
        Magnitude(0)
