import time
from itertools import permutations

import pytest
import torch

from slimgemm import pruning
from slimgemm.benchmarks.pruning_permutation import efficacy, group_sample, most_efficacy
from slimgemm.pruning.column_groups import ColumnGroups, splits
from slimgemm.pruning.permutation import kept_magnitude


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


def half_normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).abs()


@pytest.fixture(scope="module")
def sample():
    return group_sample(half_normal)


def test_small_random_matrix(normal, sample):
    weight = normal(128, 64)
    order = pruning.find_permutation(weight)
    assert order.dtype == torch.int64 and order.sort().values.tolist() == list(range(64))
    assert (
        0.33
        < efficacy(weight, order)
        < most_efficacy(sample, 128, 64)
        == pytest.approx(0.411, abs=0.005)
    )
    assert torch.equal(order, pruning.find_permutation(weight))


def test_efficacy_is_one_where_every_group_keeps_what_a_free_row_would():
    weight = torch.tensor([[4.0, 3, 2, 2, 1, 1, 0, 0], [8.0, 8, 4, 4, 2, 2, 1, 1]])
    assert efficacy(weight, torch.arange(8)) == 0
    assert efficacy(weight, torch.tensor([0, 1, 4, 5, 2, 3, 6, 7])) == 1


def test_the_bound_holds_for_every_order_of_tiny_matrices(sample):
    gains = []
    for seed in range(20):
        weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(seed))
        most = max(kept_magnitude(weight[:, torch.tensor(split)]) for split in splits())
        gains.append(most - kept_magnitude(weight))
    reached = sum(gains) / len(gains) / (2 * 4 * sample[1])  # 2 groups, 4 rows
    assert 0.3 < reached < most_efficacy(sample, 4, 8)


def test_no_order_of_a_large_normal_matrix_goes_a_third_of_the_way(sample):
    assert most_efficacy(sample, 1024, 1024) == pytest.approx(0.216, abs=0.004)
    assert most_efficacy(sample, 4096, 1024) == pytest.approx(0.110, abs=0.004)


@pytest.mark.slow
def test_large_random_matrix_within_a_minute(normal):
    weight = normal(1024, 1024)
    start = time.process_time()
    order = pruning.find_permutation(weight)
    assert time.process_time() - start < 120  # processor seconds: a minute of two cores
    assert efficacy(weight, order) > 0.155


def test_wide_matrix_with_channels_of_different_size(normal):
    weight = normal(256, 256) * normal(1, 256, seed=1).exp()
    assert efficacy(weight, pruning.find_permutation(weight, rounds=200)) > 0.6


def test_gains_of_swaps_are_those_of_the_swapped_groups(normal):
    size = normal(16, 9).abs()
    search = ColumnGroups(size, torch.arange(16).view(4, 4), seed=0)
    gains = search.swap_gains(torch.tensor([2, 0]), torch.tensor([1, 3]))
    for pair, (a, b) in enumerate(((2, 1), (0, 3))):
        for i in range(4):
            for j in range(4):
                order = torch.arange(16)
                order[4 * a + i], order[4 * b + j] = 4 * b + j, 4 * a + i
                gain = kept_magnitude(size[order].T) - kept_magnitude(size.T)
                assert float(gains[pair, 4 * i + j]) == pytest.approx(gain, abs=1e-4)


def test_what_is_known_of_groups_follows_the_swaps(normal):
    size = normal(32, 20).abs()
    search = ColumnGroups(size, torch.arange(32).view(8, 4), seed=0)
    search.anneal(30)
    fresh = ColumnGroups(size, search.groups.clone(), seed=0)
    assert not torch.equal(search.groups, torch.arange(32).view(8, 4))
    for name in ("first", "second", "second_sum", "kept_each"):
        torch.testing.assert_close(getattr(search, name), getattr(fresh, name))
    assert float(search.kept_each.sum()) == pytest.approx(search.kept(), rel=1e-6)


def test_weights_of_one_size_stay_in_order():
    assert pruning.find_permutation(torch.ones(8, 16), rounds=5).tolist() == list(range(16))


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


def test_refusals():
    with pytest.raises(ValueError, match=r"weight must be \[N, K\] or"):
        pruning.find_permutation(torch.zeros(3))
    with pytest.raises(ValueError, match=r"weight.weight\[0, 1\] is nan"):
        pruning.find_permutation(torch.tensor([[0.0, float("nan")]]))
