import pytest
import torch

from slimgemm import pruning
from slimgemm.pruning.gradients import mean_gradients
from slimgemm.pruning.layers import find_layers
from slimgemm.pruning.scores import Context


def mse(out, y):
    return (out - y).square().mean()


@pytest.fixture
def data(normal):
    return [(normal(8, 16, seed=s), normal(8, 8, seed=s + 10)) for s in range(3)]


def test_means_over_batches(mlp, data):
    layers = find_layers(mlp)
    found = mean_gradients(mlp, layers, pruning.Taylor(mse), data)
    squares = mean_gradients(mlp, layers, pruning.OptimalBrainDamage(mse), data)
    want, want_squares = torch.zeros(24, 32), torch.zeros(24, 32)
    for x, y in data:
        (gradient,) = torch.autograd.grad(mse(mlp(x), y), mlp[2].weight)
        want += gradient / 3
        want_squares += gradient**2 / 3
    torch.testing.assert_close(found["2"], want)
    torch.testing.assert_close(squares["2"], want_squares)


def test_scores():
    weight, statistic = torch.tensor([[2.0, -3.0]]), torch.tensor([[-1.0, 4.0]])
    context = Context("fc", statistics=statistic)
    assert pruning.Taylor(mse)(weight, context).tolist() == [[2, 12]]
    assert pruning.Taylor(mse, p=2)(weight, context).tolist() == [[4, 144]]
    assert pruning.OptimalBrainDamage(mse)(weight, context).tolist() == [[-2, 18]]


def test_first_order_change_is_predicted(mlp, data):
    """Taking a weight out by a small part changes the loss by that part of w * g."""
    score = mean_gradients(mlp, find_layers(mlp), pruning.Taylor(mse), data)["2"]
    weight = mlp[2].weight

    def loss():
        with torch.no_grad():
            return sum(mse(mlp(x).double(), y.double()) for x, y in data) / 3

    place = divmod(int((score * weight).abs().argmax()), 32)
    before, step = loss(), 0.01
    change = step * float(weight.detach()[place] * score[place])
    weight.data[place] *= 1 - step
    assert float(before - loss()) == pytest.approx(change, rel=0.1)


def test_frozen_weights_are_seen_and_gradients_stay(mlp, data):
    mlp.requires_grad_(False)
    mlp[4].weight.requires_grad_(True)
    mlp[4].weight.grad = torch.ones(8, 24)
    found = mean_gradients(mlp, find_layers(mlp), pruning.Taylor(mse), data)
    assert (found["0"] != 0).any()
    assert not mlp[0].weight.requires_grad and mlp[0].weight.grad is None
    assert (mlp[4].weight.grad == 1).all() and mlp.training


def test_a_plan_from_gradients_hurts_less_than_a_random_one(mlp, data):
    def loss_after(score):
        import copy

        model = copy.deepcopy(mlp)
        pruning.plan(
            model,
            data[0][0],
            pattern=pruning.Unstructured(),
            score=score,
            amount=pruning.Global(0.3),
            calibration=data,
        ).apply(model)
        with torch.no_grad():
            dense = [mlp(x) for x, _ in data]
            pairs = zip(data, dense, strict=True)
            return sum(float((model(x) - d).square().sum()) for (x, _), d in pairs)

    random = loss_after(pruning.Random())
    assert loss_after(pruning.OptimalBrainDamage(mse)) < random / 2
    assert loss_after(pruning.Taylor(mse)) < random / 2


def test_refusals(mlp, data):
    layers = find_layers(mlp)
    with pytest.raises(ValueError, match="Taylor needs calibration batches"):
        mean_gradients(mlp, layers, pruning.Taylor(mse), [data[0][0]])
    with pytest.raises(ValueError, match="calibration is empty"):
        mean_gradients(mlp, layers, pruning.Taylor(mse), [])
    with pytest.raises(ValueError, match="4 does not reach the loss"):
        score = pruning.Taylor(lambda out, y: mlp[0].weight.sum() + mlp[2].weight.sum())
        mean_gradients(mlp, layers, score, data)
    with pytest.raises(ValueError, match="0 has a gradient that is not finite, in batch 0"):
        score = pruning.Taylor(lambda out, y: mse(out, y) * float("inf"))
        mean_gradients(mlp, layers, score, data)
    with pytest.raises(ValueError, match="needs calibration data; pass calibration="):
        pruning.plan(mlp, data[0][0], pattern=pruning.NofM(2, 4), score=pruning.Taylor(mse))
