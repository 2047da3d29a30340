"""Every pattern with every score on layers of any shape: what a plan may and may not do."""

import copy

import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from slimgemm import pruning
from slimgemm.pruning import Block, Kernel, NofM, Unstructured, Vector
from slimgemm.pruning.patterns import rows_of

PATTERNS = [
    NofM(2, 4), NofM(1, 4), NofM(1, 8), NofM(2, 8), NofM(4, 8), NofM(3, 7), NofM(transposable=True),
    Unstructured(), Unstructured(per_row=True), Block(2, 3), Block(1, 4), Vector(4), Kernel(),
]  # fmt: skip


SCORES = [
    pruning.Magnitude(p=1), pruning.Magnitude(p=2), pruning.Magnitude(p=float("inf")),
    pruning.Random(), pruning.GeometricMedian(), pruning.Wanda(), pruning.ZeroActivations(),
    pruning.Taylor(F.mse_loss), pruning.OptimalBrainDamage(F.mse_loss),
    lambda weight, context: weight.float().cos(), pruning.SparseGPT(),
]  # fmt: skip


@st.composite
def layers(draw):
    """A linear layer or a convolution of any small shape, its inputs and targets."""
    torch.manual_seed(draw(st.integers(0, 99)))
    n, k = draw(st.integers(2, 12)), draw(st.integers(4, 20))
    if draw(st.booleans()):
        layer, x = nn.Linear(k, n), torch.randn(9, k)
    else:
        taps = draw(st.sampled_from([(1, 1), (3, 3), (1, 3), (2, 1)]))
        layer, x = nn.Conv2d(k, n, taps), torch.randn(3, k, 4, 5)
    model = nn.Sequential(nn.Identity(), layer)
    return model, x, torch.randn_like(model(x))


@given(
    layers(), st.sampled_from(PATTERNS), st.sampled_from(SCORES), st.sampled_from([0.25, 0.5, 0.7])
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_what_is_dropped_is_zero_and_nothing_else_moves(made, pattern, score, share):
    model, x, target = made
    layer = model[1]
    solver = isinstance(score, pruning.SparseGPT)
    assume(not pattern.refusal(tuple(layer.weight.shape)))
    assume(not solver or isinstance(pattern, (NofM, Unstructured)))
    before = copy.deepcopy(model)

    def planned(model):
        return pruning.plan(
            model, x, pattern=pattern, score=score,
            amount=None if pattern.share is not None else pruning.Uniform(share),
            calibration=[(x, target)] if needs_target(score) else [x],
        )  # fmt: skip

    plan = planned(model)
    assert same_state(model, before), "a plan changes nothing"
    plan.apply(model)
    mask = pruning.mask_of(layer)
    assert mask.shape == layer.weight.shape
    assert not layer.weight[~mask].any()
    if not solver:
        assert torch.equal(layer.weight[mask], before[1].weight[mask])
    assert torch.equal(layer.bias, before[1].bias)
    check_pattern(pattern, mask, share)
    planned(before).apply(before)
    assert same_state(model, before), "the same plan for the same seed"


def needs_target(score):
    return isinstance(score, (pruning.Taylor, pruning.OptimalBrainDamage))


def same_state(a, b):
    mine, theirs = a.state_dict(), b.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


def check_pattern(pattern, mask, share):
    """The mask has the structure and the number of weights that were asked for."""
    rows = rows_of(mask)
    if isinstance(pattern, NofM):
        for start in range(0, rows.shape[2], pattern.group):
            group = rows[:, :, start : start + pattern.group]
            kept = group.sum(2)
            assert int(kept.max()) <= pattern.keep
            if not pattern.transposable:
                assert int(kept.min()) == min(pattern.keep, group.shape[2])
        if pattern.transposable:
            for start in range(0, rows.shape[0], 4):
                assert int(rows[start : start + 4].sum(0).max()) <= 2
        return
    if isinstance(pattern, Unstructured) and pattern.per_row:
        each = mask.flatten(1).sum(1)
        assert int(each.max()) == int(each.min())
        return
    units = pattern.units(mask.float())
    kept = units > 0
    assert int((~kept).sum()) == round(units.numel() * share)
    assert torch.equal(pattern.expand(kept, tuple(mask.shape)), mask), "whole units"
