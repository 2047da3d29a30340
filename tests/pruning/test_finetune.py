import pytest
import torch
import torch.nn.functional as F
from torch import nn

from slimgemm import pruning
from slimgemm.pruning import FineTune


def loader(normal, batches=4):
    x = normal(batches * 8, 16)
    y = x[:, :8] * 2
    return [(x[i * 8 : i * 8 + 8], y[i * 8 : i * 8 + 8]) for i in range(batches)]


def test_loss_falls_and_masks_stay(mlp, normal):
    data = loader(normal)
    pruning.plan(mlp, data[0][0], pattern=pruning.NofM(2, 4)).apply(mlp)
    mlp[1].eval()
    seen = []
    optimizer = torch.optim.Adam(mlp.parameters(), 1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 6, gamma=0.1)
    losses = pruning.finetune(
        mlp,
        optimizer,
        data,
        nn.functional.mse_loss,
        epochs=10,
        scheduler=scheduler,
        after_epoch=lambda epoch, loss: seen.append((epoch, loss)),
        show=False,
    )
    assert losses[-1] < 0.8 * losses[0] and seen == list(enumerate(losses))
    assert ((mlp[2].weight.reshape(-1, 4) != 0).sum(1) <= 2).all()
    assert mlp.training and not mlp[1].training
    assert scheduler.get_last_lr()[0] == pytest.approx(1e-3)


def test_without_masks_it_is_plain_training(mlp, normal):
    pruning.finetune(
        mlp, torch.optim.SGD(mlp.parameters(), 0.01), loader(normal), nn.functional.mse_loss, 1
    )
    assert (mlp[0].weight != 0).all()


def test_penalty_and_clip_reach_the_gradient(mlp, normal):
    optimizer = torch.optim.SGD(mlp.parameters(), 1.0)
    before = mlp[0].weight.detach().clone()
    pruning.finetune(
        mlp,
        optimizer,
        loader(normal, 1),
        lambda out, y: 0 * out.sum(),
        epochs=1,
        penalty=lambda m: 1e3 * m[0].weight.square().sum(),
        clip=0.5,
        show=False,
    )
    step = before - mlp[0].weight
    assert float(step.detach().norm()) == pytest.approx(0.5, rel=1e-3)
    torch.testing.assert_close(step / step.norm(), before / before.norm())


def test_refusals(mlp, normal):
    optimizer = torch.optim.SGD(mlp.parameters(), 0.01)
    mse = nn.functional.mse_loss
    with pytest.raises(ValueError, match="epochs must be 0 or more"):
        pruning.finetune(mlp, optimizer, [], mse, -1)
    with pytest.raises(ValueError, match="loader is empty"):
        pruning.finetune(mlp, optimizer, [], mse, 1, show=False)
    with pytest.raises(ValueError, match="loss is nan in epoch 0, step 0"):
        pruning.finetune(
            mlp, optimizer, loader(normal), lambda o, y: o.sum() * float("nan"), 1, show=False
        )
    assert mlp.training


def test_fine_tuning_by_steps_repeats_with_its_seed():
    x, y = torch.randn(64, 4), torch.randint(3, (64,))
    data = torch.utils.data.TensorDataset(x, y)
    own = torch.Generator()
    batches = torch.utils.data.DataLoader(data, 16, shuffle=True, generator=own)
    tune = FineTune(batches, F.cross_entropy, 1e-2)

    def tuned(seed):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
        torch.manual_seed(seed)
        tune(model, 7)  # more than an epoch
        return model

    first, second, other = tuned(1), tuned(1), tuned(2)
    assert torch.equal(first[0].weight, second[0].weight)
    assert not torch.equal(first[0].weight, other[0].weight)
    # batch-norm statistics are those of the tuned model, not a moving average on the way there
    with torch.no_grad():
        exact = first[0](x).mean(0)
    assert torch.allclose(first[1].running_mean, exact, atol=0.1)
    before = first[0].weight.clone()
    tune(first, 0)
    assert torch.equal(before, first[0].weight)
    with pytest.raises(ValueError, match="the loader is empty"):
        FineTune([], F.cross_entropy)(first, 1)
    for rate in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="rate must be a positive learning rate, got"):
            FineTune([], F.cross_entropy, rate)


def test_without_steps_only_batch_norm_statistics_are_renewed(normal):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    weight = model[0].weight.clone()
    x = 5 + normal(32, 4)
    batches = [(part, None) for part in x.split(8)]
    FineTune(batches, lambda out, y: pytest.fail("no step, no loss"), recalibrate=2)(model, 0)
    assert torch.equal(model[0].weight, weight)
    seen = model[0](x[:16]).unflatten(0, (2, 8)).mean(1).mean(0)  # of the first two batches
    torch.testing.assert_close(model[1].running_mean, seen)
    before = model[1].running_mean.clone()
    FineTune(batches, F.cross_entropy, recalibrate=0)(model, 0)
    FineTune([], F.cross_entropy)(nn.Linear(4, 3), 0)  # nothing to renew, nothing is read
    assert torch.equal(model[1].running_mean, before)
