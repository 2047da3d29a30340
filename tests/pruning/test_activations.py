import torch
from torch import nn

from slimgemm import pruning
from slimgemm.pruning.calibrate import ColumnSquares, Gram, NonZero
from slimgemm.pruning.masks import unpack_mask
from slimgemm.pruning.scores import Context


def context(kind, module, x):
    statistic = kind(module)
    statistic.add(x)
    return Context("layer", statistics=statistic.result())


def test_wanda_agrees_with_the_textbook(normal):
    """|W| * ||X||_2 in float64, the lowest half of each row; the same masks."""
    layer, x = nn.Linear(64, 16), normal(40, 64) * torch.linspace(0.1, 3, 64)
    weight = layer.weight.detach()
    metric = weight.double().abs() * x.double().norm(dim=0)
    score = pruning.Wanda()(weight, context(ColumnSquares, layer, x))
    torch.testing.assert_close(score, metric / 40**0.5)
    drop = metric.sort(dim=1, stable=True).indices[:, :32]
    want = torch.ones_like(metric, dtype=torch.bool).scatter_(1, drop, False)
    assert torch.equal(pruning.Unstructured(per_row=True).mask(score, 16 * 32), want)
    drop = metric.view(16, 16, 4).topk(2, dim=2, largest=False).indices
    want = torch.ones(16, 16, 4, dtype=torch.bool).scatter_(2, drop, False).view(16, 64)
    assert torch.equal(pruning.NofM(2, 4).mask(score), want)


def test_wanda_reads_a_gram_matrix_as_well(normal):
    layer, x = nn.Conv2d(4, 6, 3, groups=2), normal(2, 4, 5, 5)
    weight = layer.weight.detach()
    squares = pruning.Wanda()(weight, context(ColumnSquares, layer, x))
    torch.testing.assert_close(squares, pruning.Wanda()(weight, context(Gram, layer, x)))
    windows = nn.functional.unfold(x, 3).view(2, 4, 9, 9)  # batch, channel, tap, place
    norm = windows.double().square().mean((0, 3)).sqrt()
    want = weight[5].double().abs() * norm[2:].view(2, 3, 3)  # row 5 reads channels 2 and 3
    torch.testing.assert_close(squares[5], want)


def test_the_course_example_of_zero_activations():
    """Of three channels with 11, 12 and 14 zeros in 32 the third goes."""
    x = torch.ones(3, 32)
    for channel, zeros in enumerate((11, 12, 14)):
        x[channel, :zeros] = 0
    x = x.view(3, 2, 4, 4).transpose(0, 1)
    layer = nn.Conv2d(3, 5, 1)
    score = pruning.ZeroActivations()(layer.weight.detach(), context(NonZero, layer, x))
    by_channel = score.sum((0, 2, 3))
    torch.testing.assert_close(by_channel, torch.tensor([21, 20, 18]).double() / 32)


def test_zero_activations_drop_channels_where_they_are_read(normal):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    model[0].bias.data = torch.tensor([-9.0, 9, -9, 9, -9, 9])
    plan = pruning.plan(
        model,
        normal(2, 8),
        pattern=pruning.Channels(),
        score=pruning.ZeroActivations(),
        amount=pruning.Uniform(0.5),
        calibration=[normal(50, 8)],
    )
    assert plan["0"].kept_out.tolist() == [1, 3, 5]


def test_wanda_plan_keeps_weights_of_busy_inputs(normal):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8))
    x = normal(64, 16) * torch.tensor([1.0, 1, 100, 100]).repeat(4)
    plan = pruning.plan(
        model, x, pattern=pruning.NofM(2, 4), score=pruning.Wanda(), calibration=[x]
    )
    kept = unpack_mask(plan["0"].mask).view(8, 4, 4)
    assert kept[..., 2:].float().mean() > 0.9
    assert plan["0"].weight is None
