import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from slimgemm import pruning
from slimgemm.pruning.training import (
    BatchNormL1,
    Distillation,
    GroupLasso,
    Lp,
    merge_lora,
    settle,
    train_through_mask,
    with_teacher,
)


def test_penalties_are_their_formulas(vgg):
    model = vgg(4, 6)
    weights = [model.backbone[0].weight, model.backbone[3].weight, model.classifier.weight]
    torch.testing.assert_close(Lp(0.5)(model), 0.5 * sum(w.abs().sum() for w in weights))
    torch.testing.assert_close(Lp(2.0, p=2)(model), 2 * sum(w.square().sum() for w in weights))
    rows = [w.flatten(1) for w in weights]
    want = sum(r.shape[1] ** 0.5 * r.norm(dim=1).sum() for r in rows)
    torch.testing.assert_close(GroupLasso(1.0)(model), want)
    scales = [model.backbone[1].weight, model.backbone[4].weight]
    torch.testing.assert_close(BatchNormL1(3.0)(model), 3 * sum(s.abs().sum() for s in scales))


def test_group_lasso_of_blocks_has_a_gradient_at_zero():
    layer = nn.Linear(4, 4)
    layer.weight.data[:2, :2] = 0
    GroupLasso(1.0, pruning.Block(2, 2))(layer).backward()
    assert torch.isfinite(layer.weight.grad).all()
    block = layer.weight[2:, 2:].detach()
    torch.testing.assert_close(layer.weight.grad[2:, 2:], 2 * block / block.norm())


def test_distillation_is_its_formula_and_reaches_the_teacher(mlp, normal):
    x, y = normal(6, 16), torch.tensor([0, 1, 2, 3, 4, 5])
    teacher = copy.deepcopy(mlp)
    teacher[0].weight.data *= 2
    loss = Distillation(F.cross_entropy, temperature=3.0, share=0.25)
    ((inputs, target),) = list(with_teacher([(x, y)], teacher))
    assert teacher.training and not target[1].requires_grad
    p, q = (teacher(x) / 3).softmax(1), (mlp(x) / 3).log_softmax(1)
    want = 0.25 * 9 * (p * (p.log() - q)).sum(1).mean() + 0.75 * F.cross_entropy(mlp(x), y)
    torch.testing.assert_close(loss(mlp(inputs), target), want)
    pure = Distillation(F.cross_entropy, share=1.0)
    with torch.no_grad():
        assert float(pure(teacher(x), target)) == pytest.approx(0, abs=1e-6)
    optimizer = torch.optim.Adam(mlp.parameters(), 1e-2)
    losses = pruning.finetune(mlp, optimizer, with_teacher([(x, y)], teacher), pure, 20, show=False)
    assert losses[-1] < losses[0] / 2
    with pytest.raises(ValueError, match=r"share must be in \[0, 1\]"):
        Distillation(F.cross_entropy, share=1.5)


def test_straight_through_gradient(normal):
    layer, x = nn.Linear(8, 4, bias=False), normal(3, 8)
    dense = layer.weight.detach().clone()
    assert train_through_mask(nn.Sequential(layer), strength=0.1) == ["0"]
    mask = pruning.NofM(2, 4).mask(dense.abs())
    torch.testing.assert_close(layer(x), x @ (dense * mask).T)
    layer(x).sum().backward()
    want = x.sum(0).expand(4, 8) + 0.1 * dense * ~mask
    torch.testing.assert_close(layer.parametrizations.weight.original.grad, want)


def test_training_through_a_mask_then_settle(mlp, normal):
    torch.manual_seed(0)
    x = normal(32, 16)
    y = x[:, :8] * 2
    names = train_through_mask(mlp, ignore=["4"])
    optimizer = torch.optim.Adam(mlp.parameters(), 1e-2)
    first = pruning.NofM(2, 4).mask(mlp[0].parametrizations.weight.original.detach().abs())
    losses = pruning.finetune(mlp, optimizer, [(x, y)], F.mse_loss, 30, show=False)
    assert losses[-1] < losses[0] / 2
    before = mlp(x)
    assert settle(mlp) == names == ["0", "2"]
    torch.testing.assert_close(mlp(x), before)
    assert ((mlp[2].weight.view(-1, 4) != 0).sum(1) == 2).all()
    assert torch.equal(pruning.mask_of(mlp[0]), mlp[0].weight != 0)
    assert not torch.equal(pruning.mask_of(mlp[0]), first)  # masks moved while training
    assert set(mlp.state_dict()) == {f"{i}.{p}" for i in (0, 2, 4) for p in ("weight", "bias")}
    with pytest.raises(ValueError, match="no layer can be trained"):
        train_through_mask(nn.ReLU())


def test_lora_merge_keeps_the_pattern(mlp, normal):
    pruning.plan(mlp, normal(2, 16), pattern=pruning.NofM(2, 4)).apply(mlp)
    layer = mlp[2]
    before, mask = layer.weight.detach().clone(), pruning.mask_of(layer)
    a, b = normal(3, 32), normal(24, 3, seed=1)
    merge_lora(layer, a, b, scale=0.5)
    torch.testing.assert_close(layer.weight.detach(), before + mask * (0.5 * b @ a))
    assert ((layer.weight.view(-1, 4) != 0).sum(1) == 2).all()
    with pytest.raises(ValueError, match=r"A \[rank, 32\] and B \[24, rank\]"):
        merge_lora(layer, b, a)
    with pytest.raises(ValueError, match="carries no mask"):
        merge_lora(nn.Linear(2, 2), torch.ones(1, 2), torch.ones(2, 1))
