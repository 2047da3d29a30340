import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from slimgemm import pruning
from slimgemm.pruning.masks import PackedMask, pack_mask, set_mask, unpack_mask

OPTIMIZERS = {
    "sgd momentum decay": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
    "sgd nesterov foreach": lambda p: torch.optim.SGD(
        p, 0.1, momentum=0.9, nesterov=True, foreach=True
    ),
    "adam amsgrad foreach": lambda p: torch.optim.Adam(p, 1e-2, amsgrad=True, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, 1e-2, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-2, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 1e-2, initial_accumulator_value=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p),
    "lbfgs": lambda p: torch.optim.LBFGS(p, 0.1, max_iter=3),
}


@pytest.fixture
def pruned(mlp, normal):
    pruning.plan(mlp, normal(2, 16), pattern=pruning.NofM(2, 4)).apply(mlp)
    return mlp


def train(model, optimizer, x, steps=3, clip=None):
    norms = []

    def closure():
        optimizer.zero_grad()
        loss = (model(x) - 1).square().sum()
        loss.backward()
        if clip is not None:
            norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), clip)))
        return loss

    for _ in range(steps):
        optimizer.step(closure)
    return norms


def assert_masked(model, optimizer):
    for name in ("0", "2", "4"):
        layer = model.get_submodule(name)
        dropped = ~pruning.mask_of(layer)
        assert dropped.float().mean() == 0.5
        gone = layer.weight[dropped]
        assert (gone == 0).all() and not torch.signbit(gone).any()
        assert (layer.weight[~dropped] != 0).any()
        assert (layer.weight.grad[dropped] == 0).all()
        for value in optimizer.state[layer.weight].values():
            if isinstance(value, torch.Tensor) and value.shape == layer.weight.shape:
                assert (value[dropped] == 0).all()


@given(st.lists(st.booleans(), max_size=40))
@settings(max_examples=60, deadline=None)
def test_packed_masks_round_trip(kept):
    mask = torch.tensor(kept, dtype=torch.bool)
    packed = pack_mask(mask)
    assert packed.bits.numel() == -(-len(kept) // 8)
    assert torch.equal(unpack_mask(packed), mask)


def test_bit_i_of_byte_j_is_weight_8j_plus_i():
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[0, 1] = mask[1, 4] = True
    assert pack_mask(mask).bits.tolist() == [0b0000_0010, 0b0000_0010]


def test_pack_refuses_what_is_no_mask():
    with pytest.raises(ValueError, match="a mask is bool"):
        pack_mask(torch.ones(3))
    with pytest.raises(ValueError, match=r"uint8 \[2\] for a weight \[3, 3\]"):
        unpack_mask(PackedMask(torch.zeros(1, dtype=torch.uint8), (3, 3)))
    with pytest.raises(ValueError, match=r"mask is \[1, 2\], the weight is \[2, 2\]"):
        set_mask(nn.Linear(2, 2), torch.ones(1, 2, dtype=torch.bool))


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_everything_stays_masked(make, pruned, normal):
    optimizer = make(pruned.parameters())
    before = pruned[0].weight.detach().clone()
    assert pruning.keep_masks(optimizer, pruned) is optimizer
    train(pruned, optimizer, normal(4, 16))
    assert_masked(pruned, optimizer)
    assert not torch.equal(pruned[0].weight, before)


def test_training_equals_training_of_a_multiplied_mask(pruned, normal):
    """With hooks the weights take the path that W * mask in the forward would take."""
    reference = copy.deepcopy(pruned)
    masks = {n: pruning.mask_of(reference.get_submodule(n)) for n in ("0", "2", "4")}
    x = normal(4, 16)
    optimizer = torch.optim.Adam(pruned.parameters(), 1e-2)
    train(pruned, pruning.keep_masks(optimizer, pruned), x)
    plain = torch.optim.Adam(reference.parameters(), 1e-2)
    for _ in range(3):
        plain.zero_grad()
        weights = {f"{n}.weight": reference.get_submodule(n).weight * m for n, m in masks.items()}
        (torch.func.functional_call(reference, weights, x) - 1).square().sum().backward()
        plain.step()
    torch.testing.assert_close(pruned[2].weight, reference[2].weight * masks["2"])


def test_moments_from_before_pruning_are_masked_at_once(mlp, normal):
    x = normal(4, 16)
    optimizer = torch.optim.SGD(mlp.parameters(), 0.1, momentum=0.9)
    train(mlp, optimizer, x)
    pruning.plan(mlp, x, pattern=pruning.NofM(2, 4)).apply(mlp)
    pruning.keep_masks(optimizer, mlp)
    assert_masked(mlp, optimizer)


def test_clipping_sees_kept_weights_only(pruned, normal):
    x = normal(4, 16)
    optimizer = pruning.keep_masks(torch.optim.SGD(pruned.parameters(), 0.0), pruned)
    (norm,) = train(pruned, optimizer, x, steps=1, clip=1e9)
    (pruned(x) - 1).square().sum().backward()
    kept = sum(
        float(p.grad.masked_fill(~pruning.mask_of(m), 0).square().sum())
        for m in (pruned[0], pruned[2], pruned[4])
        for p in [m.weight]
    )
    biases = sum(float(m.bias.grad.square().sum()) for m in (pruned[0], pruned[2], pruned[4]))
    # the second backward added the same gradient again
    assert norm == pytest.approx(((kept + biases) / 4) ** 0.5, rel=1e-4)


def test_schedulers_scalers_and_groups_work(pruned, normal):
    optimizer = torch.optim.SGD([pruned[0].weight], 0.1, momentum=0.5)
    optimizer = pruning.keep_masks(optimizer, pruned)
    optimizer.add_param_group({"params": [pruned[2].weight, pruned[4].weight], "lr": 0.01})
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for _ in range(3):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = pruned(normal(4, 16)).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
    assert_masked(pruned, optimizer)
    assert scheduler.get_last_lr()[0] == pytest.approx(0.1 / 8)


def test_state_dicts(pruned, normal):
    plain = nn.Sequential(
        nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 8)
    )
    plain.load_state_dict(pruned.state_dict(), strict=True)  # the masks add no key
    optimizer = pruning.keep_masks(torch.optim.Adam(pruned.parameters()), pruned)
    train(pruned, optimizer, normal(4, 16))
    state = optimizer.state_dict()
    assert sum(bits.numel() for bits in state["masks"].values()) == (512 + 768 + 192) // 8
    fresh = copy.deepcopy(plain)
    pruning.load_masks(fresh, state["masks"])
    again = pruning.keep_masks(torch.optim.Adam(fresh.parameters()), fresh)
    again.load_state_dict(state)
    assert torch.equal(pruning.mask_of(fresh[2]), pruning.mask_of(pruned[2]))
    moment = again.state[fresh[2].weight]["exp_avg"]
    assert torch.equal(moment, optimizer.state[pruned[2].weight]["exp_avg"])
    assert (moment != 0).any()


def test_loading_a_state_moves_its_masks(pruned, normal):
    optimizer = pruning.keep_masks(torch.optim.SGD(pruned.parameters(), 0.1), pruned)
    state = optimizer.state_dict()
    set_mask(pruned[0], torch.zeros(32, 16, dtype=torch.bool))
    optimizer.load_state_dict(state)
    assert float(pruning.mask_of(pruned[0]).float().mean()) == 0.5


def test_deepcopy_takes_masks_along_and_apart(pruned, normal):
    other = copy.deepcopy(pruned)
    assert torch.equal(pruning.mask_of(other[0]), pruning.mask_of(pruned[0]))
    set_mask(other[0], torch.ones(32, 16, dtype=torch.bool))
    assert float(pruning.mask_of(pruned[0]).float().mean()) == 0.5


def test_a_later_plan_is_followed_and_a_second_call_changes_nothing(pruned, normal):
    x = normal(4, 16)
    optimizer = pruning.keep_masks(torch.optim.SGD(pruned.parameters(), 0.1), pruned)
    pruning.keep_masks(optimizer, pruned)
    assert len(optimizer._optimizer_step_post_hooks) == 1
    later = pruning.plan(pruned, x, pattern=pruning.Unstructured(), amount=pruning.Uniform(0.75))
    later.apply(pruned)
    train(pruned, optimizer, x)
    assert int((pruned[2].weight == 0).sum()) == 24 * 32 * 3 // 4


def test_refusals(pruned, mlp, normal):
    with pytest.raises(ValueError, match="no layer of this model carries a mask"):
        pruning.keep_masks(torch.optim.SGD([torch.ones(1)], 0.1), nn.Linear(2, 2))
    copied = copy.deepcopy(pruned)
    with pytest.raises(ValueError, match="updates none of the masked weights"):
        pruning.keep_masks(torch.optim.SGD(copied.parameters(), 0.1), pruned)
    optimizer = pruning.keep_masks(torch.optim.SGD(pruned.parameters(), 0.1), pruned)
    with pytest.raises(ValueError, match="masks of another model"):
        pruning.keep_masks(optimizer, copied)
    weights = copied[0].weight.clone()
    with pytest.raises(ValueError, match="'7', which is no layer"):
        pruning.load_masks(copied, {"0": torch.zeros(64, dtype=torch.uint8), "7": weights})
    with pytest.raises(ValueError, match=r"2: mask bits must be uint8.*another model"):
        pruning.load_masks(copied, {"2": torch.zeros(3, dtype=torch.uint8)})
    assert torch.equal(copied[0].weight, weights)


def test_a_new_weight_is_masked_and_hooked_like_the_one_before():
    """Nothing is remembered by the address of a tensor, which the next one may get."""
    torch.manual_seed(0)
    model = nn.Linear(8, 4)
    set_mask(model, model.weight > 0)
    optimizer = pruning.keep_masks(torch.optim.SGD(model.parameters(), 0.1), model)
    for seed in range(5):
        model.weight = nn.Parameter(
            torch.randn(4, 8, generator=torch.Generator().manual_seed(seed))
        )
        optimizer.param_groups[0]["params"][0] = model.weight
        mask = model.weight.detach() > 0.3 * seed
        set_mask(model, mask)
        pruning.keep_masks(optimizer, model)
        model(torch.ones(2, 8)).sum().backward()
        assert torch.equal(model.weight.grad != 0, mask)
        optimizer.step()
        assert not model.weight[~mask].any()
    keeper = optimizer.mask_keeper
    assert len(keeper._dropped) == len(keeper._hooked) == 1
