import time

import pytest
import torch
from torch import nn

from slimgemm import pruning
from slimgemm.pruning.calibrate import Gram
from slimgemm.pruning.scores import Context


def textbook(weight, x, keep=None, group=None, sparsity=None, blocksize=128, percdamp=0.01):
    """The authors' published procedure, in float64, without the lazy tricks of the package."""
    w = weight.double().clone()
    h = 2 / x.shape[0] * x.double().T @ x.double()
    h.diagonal().add_(percdamp * h.diagonal().mean())
    hinv = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    mask = torch.ones_like(w, dtype=torch.bool)
    for i1 in range(0, w.shape[1], blocksize):
        i2 = min(i1 + blocksize, w.shape[1])
        w1, u = w[:, i1:i2].clone(), hinv[i1:i2, i1:i2]
        err = torch.zeros_like(w1)
        if sparsity is not None:
            saliency = w1**2 / u.diagonal() ** 2
            drop = saliency.flatten().sort().indices[: round(sparsity * saliency.numel())]
            flat = torch.ones(saliency.numel(), dtype=torch.bool)
            flat[drop] = False
            mask[:, i1:i2] = flat.view_as(saliency)
        for i in range(i2 - i1):
            if keep is not None and i % group == 0:
                saliency = w1[:, i : i + group] ** 2 / u.diagonal()[i : i + group] ** 2
                drop = saliency.topk(group - keep, dim=1, largest=False).indices
                mask[:, i1 + i : i1 + i + group] = True
                mask[:, i1 + i : i1 + i + group].scatter_(1, drop, False)
            q = w1[:, i].clone()
            q[~mask[:, i1 + i]] = 0
            e = (w1[:, i] - q) / u[i, i]
            w1[:, i:] -= e[:, None] * u[i, i:][None]
            err[:, i] = e
        w[:, i1:i2] = w1
        w[:, i2:] -= err @ hinv[i1:i2, i2:]
    return mask, w * mask


def gram_of(module, x):
    statistic = Gram(module)
    statistic.add(x)
    return Context("layer", statistics=statistic.result())


def correlated(normal, rows, columns, dtype=torch.float64):
    return (normal(rows, columns, dtype=dtype) @ normal(columns, columns, seed=9, dtype=dtype)) / 8


@pytest.mark.parametrize("keep, group", [(2, 4), (1, 4), (4, 8), (2, 8)], ids=str)
def test_agrees_with_the_textbook_on_n_of_m(keep, group, normal):
    weight, x = normal(24, 160, dtype=torch.float64), correlated(normal, 400, 160)
    context = gram_of(nn.Linear(160, 24), x)
    got = pruning.SparseGPT().solve(weight, context, pruning.NofM(keep, group), 0.0)
    mask, new = textbook(weight, x, keep, group)
    assert torch.equal(got.mask, mask)
    torch.testing.assert_close(got.weight, new, rtol=1e-6, atol=1e-9)
    assert got.notes == ()


@pytest.mark.parametrize("share", [0.5, 0.8])
def test_agrees_with_the_textbook_unstructured(share, normal):
    weight, x = normal(16, 150, dtype=torch.float64), correlated(normal, 300, 150)
    context = gram_of(nn.Linear(150, 16), x)
    got = pruning.SparseGPT(block=64).solve(weight, context, pruning.Unstructured(), share)
    mask, new = textbook(weight, x, sparsity=share, blocksize=64)
    assert torch.equal(got.mask, mask)
    torch.testing.assert_close(got.weight, new, rtol=1e-6, atol=1e-9)


def output_error(weight, new, x):
    return float(((weight - new).double() @ x.double().T).square().sum())


@pytest.mark.parametrize("pattern", [pruning.NofM(2, 4), pruning.Block(4, 4)], ids=str)
def test_order_of_methods_by_output_error(pattern, normal):
    weight, x = normal(32, 64, dtype=torch.float64), correlated(normal, 500, 64)
    context = gram_of(nn.Linear(64, 32), x)
    drop = pattern.units(weight).numel() // 2
    magnitude = weight * pattern.mask(weight.abs(), drop)
    wanda = weight * pattern.mask(pruning.Wanda()(weight, context), drop)
    found = pruning.SparseGPT().solve(weight, context, pattern, 0.5)
    surgeon = pruning.OptimalBrainSurgeon().solve(weight, context, pattern, 0.5)
    errors = [output_error(weight, w, x) for w in (magnitude, wanda, found.weight, surgeon.weight)]
    assert errors[2] < 0.8 * errors[1] < 0.8 * errors[0]
    assert errors[3] < 0.8 * errors[1]
    assert abs(float(found.mask.double().mean()) - 0.5) < 1e-9


def test_convolution_groups_keep_to_their_tap_and_group(normal):
    torch.manual_seed(0)
    layer = nn.Conv2d(12, 8, 3, padding=1, groups=2).double()
    x = normal(6, 12, 7, 7, dtype=torch.float64)
    x[:, 3] += x[:, 1]
    pattern = pruning.NofM(2, 4)
    context = gram_of(layer, x)
    assert context.statistics.shape == (2, 54, 54)
    found = pruning.SparseGPT().solve(layer.weight.detach(), context, pattern, 0.0)
    rows = found.mask.permute(0, 2, 3, 1)  # 6 input channels: a group of 4 and one of 2
    assert (rows[..., :4].sum(-1) == 2).all() and rows[..., 4:].all()
    dense = layer(x).detach()
    magnitude = layer.weight.detach() * pattern.mask(layer.weight.detach().abs())

    def error(weight):
        new = torch.nn.functional.conv2d(x, weight, layer.bias.detach(), padding=1, groups=2)
        return float((new - dense).square().sum())

    assert error(found.weight) < 0.8 * error(magnitude)
    surgeon = pruning.OptimalBrainSurgeon().solve(layer.weight.detach(), context, pattern, 0.0)
    assert (surgeon.mask.permute(0, 2, 3, 1)[..., :4].sum(-1) == 2).all()
    assert error(surgeon.weight) < 0.9 * error(magnitude)


def test_dead_inputs_are_reported_and_dropped(normal):
    x = normal(50, 8, dtype=torch.float64)
    x[:, 2] = 0
    weight = torch.ones(3, 8, dtype=torch.float64)
    found = pruning.SparseGPT().solve(weight, gram_of(nn.Linear(8, 3), x), pruning.NofM(2, 4), 0.0)
    assert found.notes == ("layer: 1 of 8 inputs are always zero",)
    assert not found.mask[:, 2].any() and (found.mask.sum(1) == 4).all()


def test_damping_rises_step_by_step_then_names_the_layer():
    gram = torch.eye(4, dtype=torch.float64)
    gram[0, 1] = gram[1, 0] = 1.05  # no Gram matrix of real inputs, but nearly
    weight = torch.ones(2, 4, dtype=torch.float64)
    solve = pruning.SparseGPT().solve
    found = solve(weight, Context("fc", statistics=gram[None]), pruning.NofM(2, 4), 0.0)
    assert found.notes == ("fc: damping 0.01 is too small for the Gram matrix",)
    gram[0, 1] = gram[1, 0] = 100
    with pytest.raises(ValueError, match=r"fc: .*not positive definite even with damping 10"):
        solve(weight, Context("fc", statistics=gram[None]), pruning.NofM(2, 4), 0.0)


def test_earlier_masks_stay_dropped(normal):
    weight, x = normal(8, 16, dtype=torch.float64), correlated(normal, 100, 16)
    context = gram_of(nn.Linear(16, 8), x)
    earlier = pruning.NofM(2, 4).mask(normal(8, 16, seed=5))
    for solver in (pruning.SparseGPT(), pruning.OptimalBrainSurgeon()):
        found = solver.solve(weight, context, pruning.NofM(1, 4), 0.0, earlier)
        assert not (found.mask & ~earlier).any()
        assert (found.mask.view(-1, 4).sum(1) == 1).all()


def test_patterns_over_several_taps_are_refused():
    context = Context("conv", statistics=torch.eye(8)[None])
    with pytest.raises(ValueError, match=r"conv: SparseGPT drops columns .* kernel"):
        pruning.SparseGPT().solve(torch.ones(2, 2, 2, 2), context, pruning.Kernel(), 0.5)
    with pytest.raises(ValueError, match="layer: this score needs calibration data"):
        pruning.SparseGPT().solve(torch.ones(2, 4), Context("layer"), pruning.NofM(), 0.5)


def test_a_wide_layer_in_time(normal):
    import time

    weight, x = normal(1536, 576), normal(1024, 576)
    context = gram_of(nn.Linear(576, 1536), x)
    start = time.process_time()
    pruning.SparseGPT().solve(weight, context, pruning.NofM(2, 4), 0.0)
    # The target is 2 s on two cores; process time, so that a busy machine does not fail it.
    assert time.process_time() - start < 4


@pytest.mark.slow
def test_two_of_four_of_a_large_layer_within_two_seconds(normal):
    weight, x = normal(1536, 576), normal(1024, 576, seed=1)
    score, context = pruning.SparseGPT(), Context("layer", statistics=(x.T @ x).double()[None])
    seconds = []
    for _ in range(2):
        start = time.process_time()
        found = score.solve(weight, context, pruning.NofM(2, 4), 0.5)
        seconds.append(time.process_time() - start)
    assert bool((found.mask.view(-1, 4).sum(1) == 2).all())
    assert min(seconds) < 2  # processor seconds
