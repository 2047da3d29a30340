import pytest
import torch

from slimgemm import pruning
from slimgemm.pruning.transposable import block_masks, transposable_mask


def test_there_are_90_masks_all_valid_and_different():
    masks = block_masks()
    assert masks.shape == (90, 4, 4)
    assert (masks.sum(1) == 2).all() and (masks.sum(2) == 2).all()
    assert masks.flatten(1).unique(dim=0).shape[0] == 90


def test_exact_against_brute_force(normal):
    scores = normal(4, 4, dtype=torch.float64).abs()
    bits = torch.arange(1 << 16)[:, None] >> torch.arange(16) & 1
    every = bits.view(-1, 4, 4)
    valid = (every.sum(1) == 2).all(1) & (every.sum(2) == 2).all(1)
    best = float((every[valid] * scores).sum((1, 2)).max())
    assert float(scores[transposable_mask(scores)].sum()) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("shape", [(8, 16), (5, 7), (1, 4), (2, 6, 9)], ids=str)
def test_two_of_four_both_ways(shape, normal):
    mask = transposable_mask(normal(*shape).abs())
    assert mask.shape == shape
    n, k = shape[-2] // 4 * 4, shape[-1] // 4 * 4
    for start in range(0, k, 4):
        assert (mask[..., start : start + 4].sum(-1) == 2).all() or shape[-2] % 4
        assert (mask[..., start : start + 4].sum(-1) <= 2).all()
    for start in range(0, n, 4):
        assert (mask[..., start : start + 4, :k].sum(-2) == 2).all()


def test_ties_take_the_first_mask_and_dropped_weights_go_first():
    assert transposable_mask(torch.ones(4, 4)).int().tolist() == [
        [1, 1, 0, 0],
        [1, 1, 0, 0],
        [0, 0, 1, 1],
        [0, 0, 1, 1],
    ]
    scores = torch.ones(4, 4)
    scores[0, 0] = scores[3, 3] = float("-inf")
    mask = transposable_mask(scores)
    assert not mask[0, 0] and not mask[3, 3] and (mask.sum(0) == 2).all()


def test_as_a_pattern_on_layers(normal):
    pattern = pruning.NofM(2, 4, transposable=True)
    mask = pattern.mask(normal(8, 12).abs())
    assert (mask.view(8, 3, 4).sum(2) == 2).all() and (mask.T.reshape(12, 2, 4).sum(2) == 2).all()
    taps = pattern.mask(normal(8, 4, 3, 3).abs())
    assert (taps.sum(1) == 2).all() and (taps.view(2, 4, 4, 3, 3).sum(1) == 2).all()
    with pytest.raises(ValueError, match="only 2:4 can be transposable here, got 1:4"):
        pruning.NofM(1, 4, transposable=True)
