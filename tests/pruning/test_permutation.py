import copy
from itertools import permutations

import pytest
import torch
from torch import nn

from slimgemm import pruning
from slimgemm.pruning.permutation import kept_magnitude, splits


def efficacy(weight, order):
    """Share of the way from the default order to dropping half of each row freely."""
    default, found = kept_magnitude(weight), kept_magnitude(weight[:, order])
    free = weight.abs().sort(1, descending=True).values[:, : weight.shape[1] // 2].double().sum()
    return (found - default) / (float(free) - default)


def test_35_splits():
    assert len(splits()) == 35 and splits()[0] == tuple(range(8))
    halves = {frozenset((frozenset(s[:4]), frozenset(s[4:]))) for s in splits()}
    assert len(halves) == 35 and all(sorted(s) == list(range(8)) for s in splits())


def test_two_groups_are_solved_exactly(normal):
    weight = normal(5, 8)
    best = max(
        kept_magnitude(weight[:, torch.tensor(p)])
        for p in permutations(range(8))
        if p[0] < p[1] < p[2] < p[3] and p[4] < p[5] < p[6] < p[7]
    )
    got = kept_magnitude(weight[:, pruning.find_permutation(weight, rounds=4)])
    assert got == pytest.approx(best, rel=1e-6)


def test_small_random_matrix(normal):
    weight = normal(128, 64)
    order = pruning.find_permutation(weight)
    assert order.dtype == torch.int64 and order.sort().values.tolist() == list(range(64))
    assert efficacy(weight, order) > 0.30
    assert torch.equal(order, pruning.find_permutation(weight))


def test_wide_matrix_with_channels_of_different_size(normal):
    weight = normal(256, 256) * normal(256, seed=1).square()
    assert efficacy(weight, pruning.find_permutation(weight, rounds=30)) > 0.5


@pytest.mark.parametrize("k", [3, 4, 7, 10, 13])
def test_odd_widths_never_lose_and_leave_the_rest_in_place(k, normal):
    weight = normal(6, k)
    order = pruning.find_permutation(weight, rounds=20)
    assert order.sort().values.tolist() == list(range(k))
    assert order[k // 4 * 4 :].tolist() == list(range(k // 4 * 4, k))
    assert kept_magnitude(weight[:, order]) >= kept_magnitude(weight) - 1e-6


def test_convolution_groups_lie_at_each_tap(normal):
    weight = normal(8, 16, 3, 3)
    order = pruning.find_permutation(weight, rounds=50)
    assert kept_magnitude(weight[:, order]) > 1.01 * kept_magnitude(weight)


def test_permute_keeps_the_outputs_and_raises_what_is_kept(residual, normal):
    x = normal(2, 3, 8, 8)
    residual.eval()
    dense, before = copy.deepcopy(residual), residual(x)
    found = pruning.permute(residual, x, rounds=20)
    torch.testing.assert_close(residual(x), before)
    assert {"b", "g"} <= set(found.layers) and found.after > found.before
    assert kept_magnitude(residual.b.weight) > kept_magnitude(dense.b.weight)
    assert not torch.equal(residual.bn.running_mean, dense.bn.running_mean)
    dense.load_state_dict(residual.state_dict())
    torch.testing.assert_close(dense(x), before)


def test_permute_attention_moves_hidden_units(attention, normal):
    model, x = attention(), normal(2, 5, 16)
    before = model(x)
    found = pruning.permute(model, x, rounds=20)
    torch.testing.assert_close(model(x), before)
    assert found.layers == ("down",) and found.after > found.before


def test_permute_puts_back_what_it_cannot_prove(normal):
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.calls = nn.Linear(8, 8), nn.Linear(8, 8), 0

        def forward(self, x):
            self.calls += 1
            return self.b(self.a(x)) * self.calls  # not the same function twice

    model = Fixed()
    weight = model.a.weight.detach().clone()
    with pytest.raises(ValueError, match=r"cannot be reordered in this model: output 0 differs"):
        pruning.permute(model, normal(2, 8))
    assert torch.equal(model.a.weight, weight)


def test_refusals():
    with pytest.raises(ValueError, match=r"weight must be \[N, K\] or"):
        pruning.find_permutation(torch.zeros(3))
    with pytest.raises(ValueError, match=r"weight.weight\[0, 1\] is nan"):
        pruning.find_permutation(torch.tensor([[0.0, float("nan")]]))
