import copy

import pytest
import torch
from torch import nn

from slimgemm import pruning

LAB = [
    [-0.46, -0.40, 0.39, 0.19, 0.37],
    [0.00, 0.40, 0.17, -0.15, 0.16],
    [-0.20, -0.23, 0.36, 0.25, 0.03],
    [0.24, 0.41, 0.07, 0.13, -0.15],
    [0.48, -0.09, -0.36, 0.12, 0.45],
]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.values(), b.values(), strict=True))


def test_the_course_mask():
    model = nn.Linear(5, 5)
    model.weight.data = torch.tensor(LAB)
    plan = pruning.plan(
        nn.Sequential(model),
        torch.zeros(1, 5),
        pattern=pruning.Unstructured(),
        amount=pruning.Uniform(0.75),
    )
    kept = pruning.masks.unpack_mask(plan["0"].mask).nonzero().tolist()
    assert kept == [[0, 0], [0, 1], [1, 1], [3, 1], [4, 0], [4, 4]]
    assert plan["0"].kept == 0.24


def test_plan_changes_nothing_and_apply_prunes(mlp, normal):
    before = copy.deepcopy(mlp.state_dict())
    plan = pruning.plan(mlp, normal(2, 16), pattern=pruning.NofM(2, 4), ignore=["4"])
    assert same(mlp.state_dict(), before)
    assert [e.name for e in plan.pruned] == ["0", "2"] and plan["4"].refusal == "ignored (4)"
    plan.apply(mlp)
    for name in ("0", "2"):
        weight, dense = mlp.get_submodule(name).weight, before[f"{name}.weight"]
        groups = weight.reshape(-1, 4)
        assert ((groups != 0).sum(1) == 2).all()
        assert torch.equal(weight[weight != 0], dense[weight != 0])
        # the two largest of each group stay
        best = dense.reshape(-1, 4).abs().topk(2).values.sum(1)
        torch.testing.assert_close(groups.abs().sum(1), best)
    assert torch.equal(mlp[4].weight, before["4.weight"])
    assert torch.equal(mlp[0].bias, before["0.bias"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes(mlp, normal, dtype):
    mlp.to(dtype)
    plan = pruning.plan(mlp, normal(2, 16, dtype=dtype), pattern=pruning.NofM(2, 4))
    plan.apply(mlp)
    assert mlp[0].weight.dtype == dtype
    assert ((mlp[0].weight.reshape(-1, 4) != 0).sum(1) == 2).all()
    assert "NaN" not in str(plan)


def test_predicted_bytes_macs_and_energy(normal):
    model = nn.Sequential(nn.Linear(64, 16, bias=False)).half()
    plan = pruning.plan(model, normal(4, 64).half(), pattern=pruning.NofM(2, 4))
    entry = plan["0"]
    assert (entry.dense_bytes, entry.pruned_bytes) == (2048, 1152)  # 56.25 %
    assert (entry.macs, entry.pruned_macs) == (4 * 64 * 16, 2 * 64 * 16)
    activations = (4 * 64 + 4 * 16) * 2 / 4 * 5
    assert entry.energy_pj == pytest.approx(4096 * 1.5 + 512 * 640 + activations)
    assert entry.pruned_energy_pj == pytest.approx(2048 * 1.5 + 288 * 640 + activations)


@pytest.mark.parametrize("pattern", [pruning.NofM(3, 7), pruning.Block(2, 2)], ids=str)
def test_what_no_format_packs_is_predicted_at_its_dense_bytes(mlp, normal, pattern):
    amount = None if pattern.share else pruning.Uniform(0.5)
    plan = pruning.plan(mlp, normal(2, 16), pattern=pattern, amount=amount)
    assert all(entry.pruned_bytes == entry.dense_bytes for entry in plan.pruned)
    assert f"No format packs {pattern}: these weights keep their dense bytes" in str(plan)
    assert "packed are 2:4, 1:4, 1:8, 2:8, 4:8" in str(plan)
    assert "No format" not in str(pruning.plan(mlp, normal(2, 16), pattern=pruning.NofM(2, 4)))


def test_a_second_plan_drops_what_is_dropped_first(mlp, normal):
    x = normal(2, 16)
    options = {"pattern": pruning.Unstructured(), "score": pruning.Random()}
    pruning.plan(mlp, x, amount=pruning.Uniform(0.5), seed=1, **options).apply(mlp)
    first = pruning.mask_of(mlp[2])
    pruning.plan(mlp, x, amount=pruning.Uniform(0.75), seed=2, **options).apply(mlp)
    second = pruning.mask_of(mlp[2])
    assert int((second & ~first).sum()) == 0 and int(second.sum()) == 24 * 32 // 4


def test_same_seed_same_masks(mlp, normal):
    def masks(seed):
        plan = pruning.plan(
            mlp,
            normal(2, 16),
            pattern=pruning.NofM(1, 4),
            score=pruning.Random(),
            seed=seed,
        )
        return [e.mask.bits for e in plan.pruned]

    assert all(torch.equal(a, b) for a, b in zip(masks(1), masks(1), strict=True))
    assert not torch.equal(masks(1)[0], masks(2)[0])


def test_own_function_as_score(mlp, normal):
    plan = pruning.plan(
        mlp,
        normal(2, 16),
        pattern=pruning.NofM(1, 4),
        score=lambda weight, context: torch.arange(4.0).repeat(weight.numel() // 4).view_as(weight),
    )
    plan.apply(mlp)
    assert torch.equal(mlp[0].weight != 0, torch.tensor([False, False, False, True]).repeat(32, 4))


def test_batch_norm_scale_reads_the_norm_behind_each_layer(vgg, normal):
    model = vgg(8, 12, "M")
    plan = pruning.plan(
        model,
        normal(1, 3, 8, 8),
        pattern=pruning.Unstructured(),
        score=pruning.BatchNormScale(),
        amount=pruning.Uniform(0.5),
        ignore=["classifier"],
    )
    kept = pruning.masks.unpack_mask(plan["backbone.3"].mask).flatten(1).any(1)
    scales = model.backbone[4].weight.abs()
    assert int(kept.sum()) == 6 and scales[kept].min() > scales[~kept].max()


def refused(model, x, match, **options):
    before = copy.deepcopy(model.state_dict())
    options = {"pattern": pruning.NofM(2, 4), **options}
    with pytest.raises(ValueError, match=match):
        pruning.plan(model, x, **options)
    assert same(model.state_dict(), before)


def test_refused_requests(mlp, normal):
    x = normal(2, 16)
    refused(mlp, x, "2:4 drops 0.5 of every layer, .*0.7", amount=pruning.Uniform(0.7))
    refused(mlp, x, "of a layer or nothing", amount=pruning.PerLayer({"0": 0.4}))
    refused(mlp, x, "unstructured needs an amount", pattern=pruning.Unstructured())
    refused(mlp, x, "energy must be one of horowitz45, .*got 'x'", energy="x")
    refused(mlp, x, "nothing can be pruned: 0: ignored", ignore=["re:.*"])
    refused(
        mlp,
        x,
        "nothing can be pruned: 0: a linear layer has no",
        pattern=pruning.Kernel(),
        amount=pruning.Uniform(0.5),
    )
    pruning.plan(mlp, x, pattern=pruning.NofM(2, 4), amount=pruning.Uniform(0.5))


def test_nan_is_refused_with_its_place(mlp, normal):
    mlp[2].weight.data[3, 5] = float("nan")
    with pytest.raises(ValueError, match=r"2.weight\[3, 5\] is nan .*ignore the layer"):
        pruning.plan(mlp, normal(2, 16), pattern=pruning.NofM(2, 4))
    plan = pruning.plan(mlp, normal(2, 16), pattern=pruning.NofM(2, 4), ignore=["2"])
    assert len(plan.pruned) == 2


def test_apply_refuses_a_model_that_changed(mlp, normal):
    plan = pruning.plan(mlp, normal(2, 16), pattern=pruning.NofM(2, 4))
    other = copy.deepcopy(mlp)
    other[4].weight.data[0, 0] += 1
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"4.weight changed after the plan was made"):
        plan.apply(other)
    assert same(other.state_dict(), before) and pruning.mask_of(other[0]) is None
    other[4] = nn.Linear(24, 9)
    with pytest.raises(ValueError, match=r"4.weight was torch.float32 \[8, 24\].*is .*\[9, 24\]"):
        plan.apply(other)
    with pytest.raises(ValueError, match=r"0.weight was torch.float32 .* is torch.float16"):
        plan.apply(copy.deepcopy(mlp).half())
    with pytest.raises(ValueError, match="2 is not in this model"):
        plan.apply(nn.Sequential(copy.deepcopy(mlp[0])))
    plan.apply(mlp)
    with pytest.raises(ValueError, match="changed after the plan"):
        plan.apply(mlp)


def test_getitem_names_what_it_does_not_find(mlp, normal):
    plan = pruning.plan(mlp, normal(2, 16), pattern=pruning.NofM(2, 4))
    with pytest.raises(KeyError, match="nine"):
        plan["nine"]


def outputs_after(model, x, **options):
    model = copy.deepcopy(model)
    plan = pruning.plan(model, x, pattern=pruning.NofM(2, 4), **options)
    plan.apply(model)
    with torch.no_grad():
        return plan, model, model(x)


def test_methods_in_order_on_a_whole_model(mlp, normal):
    x = normal(300, 16) @ normal(16, 16, seed=1)
    with torch.no_grad():
        dense = mlp(x)
    results = {
        "magnitude": {},
        "wanda": {"score": pruning.Wanda(), "calibration": [x]},
        "sparsegpt": {"score": pruning.SparseGPT(), "calibration": [x[:150], x[150:]]},
        "admm": {"score": pruning.Wanda(), "repair": pruning.ADMM(), "calibration": [x]},
        "magnitude, least squares": {"repair": pruning.LeastSquares(), "calibration": [x]},
    }
    error = {}
    for name, options in results.items():
        plan, model, out = outputs_after(mlp, x, **options)
        error[name] = float((out - dense).square().mean())
        for entry in plan.pruned:
            weight = model.get_submodule(entry.name).weight
            kept = pruning.masks.unpack_mask(entry.mask)
            assert (kept.view(-1, 4).sum(1) == 2).all() and not weight[~kept].any()
            if entry.weight is not None:
                assert torch.equal(weight, entry.weight * kept)
    assert error["sparsegpt"] < 0.7 * error["wanda"]
    assert error["admm"] < 0.7 * error["wanda"]
    assert error["magnitude, least squares"] < 0.7 * error["magnitude"]


def test_solved_plans_are_the_same_twice_and_leave_the_model(mlp, normal):
    before = copy.deepcopy(mlp.state_dict())
    options = {"score": pruning.SparseGPT(), "calibration": [normal(64, 16)]}
    first, _, a = outputs_after(mlp, normal(8, 16), **options)
    second, _, b = outputs_after(mlp, normal(8, 16), **options)
    assert torch.equal(a, b) and same(mlp.state_dict(), before)
    assert torch.equal(first["2"].mask.bits, second["2"].mask.bits)


def test_later_layers_see_pruned_inputs(mlp, normal):
    """The second layer's decision is that of a model whose first layer is already pruned."""
    x = normal(64, 16)
    options = {"pattern": pruning.NofM(2, 4), "score": pruning.SparseGPT(), "calibration": [x]}
    whole = pruning.plan(mlp, x, **options)
    other = copy.deepcopy(mlp)
    pruning.plan(other, x, ignore=["2", "4"], **options).apply(other)
    alone = pruning.plan(other, x, ignore=["0", "4"], **options)
    torch.testing.assert_close(whole["2"].weight, alone["2"].weight)
    dense = pruning.plan(mlp, x, ignore=["0", "4"], **options)
    assert not torch.allclose(whole["2"].weight, dense["2"].weight)


def test_global_amount_over_layers(mlp, normal):
    mlp[0].weight.data *= 10
    plan = pruning.plan(
        mlp, normal(2, 16), pattern=pruning.Unstructured(), amount=pruning.Global(0.5)
    )
    kept = sum(e.kept * torch.Size(e.shape).numel() for e in plan.pruned)
    assert kept == pytest.approx((512 + 768 + 192) / 2, abs=1)
    assert plan["0"].kept > 0.9 > plan["2"].kept
    wanda = pruning.plan(
        mlp,
        normal(2, 16),
        pattern=pruning.Unstructured(),
        amount=pruning.Global(0.5),
        score=pruning.Wanda(),
        calibration=[normal(32, 16)],
    )
    assert wanda["0"].kept > 0.8 > wanda["2"].kept


def test_combinations_that_contradict(mlp, normal):
    x = normal(8, 16)
    refused(mlp, x, "SparseGPT.* needs calibration data", score=pruning.SparseGPT())
    refused(mlp, x, "ADMM.* needs calibration data", repair=pruning.ADMM())
    refused(
        mlp,
        x,
        "Global.* compares the scores of all layers",
        pattern=pruning.Unstructured(),
        amount=pruning.Global(0.5),
        score=pruning.SparseGPT(),
        calibration=[x],
    )
    refused(
        mlp,
        x,
        "Channels cannot be combined with a solver",
        pattern=pruning.Channels(),
        amount=pruning.Uniform(0.5),
        score=pruning.SparseGPT(),
        calibration=[x],
    )


def test_dead_inputs_are_in_the_report(mlp, normal, capsys):
    x = normal(64, 16)
    x[:, 3] = 0
    plan = pruning.plan(
        mlp, x, pattern=pruning.NofM(2, 4), score=pruning.SparseGPT(), calibration=[x]
    )
    assert "0: 1 of 16 inputs are always zero" in str(plan)
    assert "0: 1 of 16 inputs are always zero" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"pattern": "2:4"}, "pattern must be a pattern as NofM"),
        ({"score": "magnitude"}, "score must be a score as Magnitude"),
        ({"amount": 0.5}, "amount must be an amount as Uniform"),
        ({"ignore": ["re:("]}, "is no regular expression"),
        (
            {"score": lambda w, c: w * float("nan")},
            r"a score must hold no NaN, got one at \[0, 0\]",
        ),
    ],
    ids=["pattern", "score", "amount", "regex", "nan"],
)
def test_a_wrong_kind_is_refused_by_name(wrong, text):
    arguments = {"pattern": pruning.NofM(keep=2, group=4), **wrong}
    with pytest.raises(ValueError, match=text):
        pruning.plan(nn.Sequential(nn.Linear(8, 8)), torch.zeros(1, 8), **arguments)
