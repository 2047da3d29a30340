import copy

import pytest
import torch
from torch import nn

from slimgemm import pruning
from slimgemm.pruning.schedule import (
    Gradual,
    cubic,
    iterate,
    lottery_ticket,
    recalibrate,
    rounds_to,
)

UNSTRUCTURED = {"pattern": pruning.Unstructured()}


def sparsity(model):
    weights = [model[i].weight for i in (0, 2, 4)]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def test_rounds_drop_the_same_part_of_what_is_left():
    kept = [1 - s for s in rounds_to(0.875, 3)]
    assert kept == pytest.approx([0.5, 0.25, 0.125]) and rounds_to(0.9, 1) == (0.9,)


def test_cubic_is_the_formula():
    assert [cubic(s, 10, 20, 0.8) for s in (0, 10, 20, 99)] == [0, 0, 0.8, 0.8]
    assert cubic(15, 10, 20, 0.8) == pytest.approx(0.8 * (1 - 0.5**3))
    assert cubic(15, 10, 20, 0.8, 0.4) == pytest.approx(0.8 - 0.4 / 8)


def test_iterate_prunes_and_trains_in_turn(mlp, normal):
    seen = []

    def train(model, turn):
        seen.append((turn, round(sparsity(model), 2)))
        optimizer = pruning.keep_masks(torch.optim.SGD(model.parameters(), 0.01), model)
        model(normal(8, 16)).square().sum().backward()
        optimizer.step()

    plans = iterate(mlp, normal(2, 16), (0.5, 0.75), train, **UNSTRUCTURED)
    assert seen == [(0, 0.5), (1, 0.75)] and sparsity(mlp) == pytest.approx(0.75)
    first, second = (pruning.masks.unpack_mask(p["2"].mask) for p in plans)
    assert not (second & ~first).any()


def test_lottery_ticket_rewinds_kept_weights(mlp, normal):
    start = copy.deepcopy(mlp.state_dict())
    at_train = []

    def train(model, turn):
        at_train.append(copy.deepcopy(model.state_dict()))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.0 + torch.rand(parameter.shape))
                parameter[parameter == 0] = 0

    plans = lottery_ticket(
        mlp, normal(2, 16), rounds_to(0.75, 2), train, rewind_to=start, **UNSTRUCTURED
    )
    assert len(at_train) == 3
    for state, plan in zip(at_train[1:], plans, strict=True):
        mask = pruning.masks.unpack_mask(plan["2"].mask)
        assert torch.equal(state["2.weight"], start["2.weight"] * mask)
    assert sparsity(mlp) == pytest.approx(0.75)


def test_gradual_follows_the_cubic(mlp, normal):
    gradual = Gradual(mlp, normal(2, 16), start=2, end=10, final=0.8, every=4, options=UNSTRUCTURED)
    shares = [gradual.step() for _ in range(14)]
    assert [i for i, s in enumerate(shares) if s is not None] == [2, 6, 10]
    assert shares[6] == pytest.approx(0.8 * 7 / 8) and shares[10] == 0.8
    assert sparsity(mlp) == pytest.approx(0.8, abs=0.01)


def test_recalibrate_gives_the_statistics_of_the_data(normal):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.9), nn.BatchNorm1d(4))
    batches = [normal(64, 4, seed=s) * 3 + 1 for s in range(2)]
    recalibrate(model, batches)
    with torch.no_grad():
        out = [model[0](b) for b in batches]
    torch.testing.assert_close(model[1].running_mean, torch.stack(out).mean((0, 1)))
    want = torch.stack([o.var(0) for o in out]).mean(0)
    torch.testing.assert_close(model[1].running_var, want)
    assert model[1].momentum == 0.1 and model.training
    # dropout is off meanwhile: the second normalisation sees normalised numbers
    torch.testing.assert_close(model[3].running_var, torch.ones(4), rtol=0.05, atol=0.05)


def test_refusals(mlp, normal):
    x = normal(2, 16)
    with pytest.raises(ValueError, match="rounds must be 1 or more"):
        rounds_to(0.5, 0)
    with pytest.raises(ValueError, match="end must come after start"):
        Gradual(mlp, x, start=5, end=5, final=0.5, options=UNSTRUCTURED)
    with pytest.raises(ValueError, match="final at least initial"):
        Gradual(mlp, x, start=0, end=5, final=0.5, initial=0.6, options=UNSTRUCTURED)
    with pytest.raises(ValueError, match=r"Gradual drops more and more, 2:4 cannot"):
        Gradual(mlp, x, start=0, end=5, final=0.5, options={"pattern": pruning.NofM(2, 4)})
    with pytest.raises(ValueError, match="iterate needs a pattern"):
        iterate(mlp, x, (0.5,), lambda m, t: None)
    with pytest.raises(ValueError, match="shares must rise"):
        iterate(mlp, x, (0.5, 0.5), lambda m, t: None, **UNSTRUCTURED)
    with pytest.raises(ValueError, match="at least one batch"):
        recalibrate(mlp, [])
    assert sparsity(mlp) == 0
