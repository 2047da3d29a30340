import copy

import pytest
import torch
from torch import nn

from slimgemm import pruning
from slimgemm.kernels.formats import ChannelIndex
from slimgemm.pruning.proof import difference

WIDTHS = (64, 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M")


def prune(model, x, **options):
    options = {"pattern": pruning.Channels(), "amount": pruning.Uniform(0.5), **options}
    plan = pruning.plan(model, x, **options)
    plan.apply(model)
    return plan


def assert_same_function(small, dense, x, rtol=1e-4):
    """`small` equals `dense` when every reader has zeros for what is missing."""
    for (name, layer), (_, big) in zip(small.named_modules(), dense.named_modules(), strict=True):
        kept = getattr(layer, "kept_in", None)
        if kept is None or (isinstance(big, nn.Conv2d) and big.groups > 1):
            continue
        gone = torch.ones(kept.width, dtype=torch.bool)
        gone[kept.index] = False
        assert big.weight.shape[1] == kept.width, name
        big.weight.data[:, gone] = 0
    small.eval(), dense.eval()
    want = dense(x)
    assert want.abs().max() > 0
    assert (small(x) - want).abs().max() <= rtol * want.abs().max()


def test_the_course_widths_and_macs(vgg, normal):
    model = vgg(*WIDTHS)
    prune(model, normal(1, 3, 32, 32), amount=pruning.PerLayer({"backbone.24": 0.0}, 0.3))
    widths = [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert widths == [45, 90, 179, 179, 358, 358, 358, 512]
    found = pruning.count_macs(model, normal(1, 3, 32, 32))
    assert (found.macs, found.macs_with_norm) == (305_097_920, 305_388_064)
    assert found.params == 5_013_666


def test_chain_with_flatten(normal):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(),
        nn.Linear(8 * 9, 10),
        nn.ReLU(),
        nn.Linear(10, 4),
    )
    dense = copy.deepcopy(model)
    x = normal(2, 3, 8, 8)
    prune(model, x)
    assert (model[0].out_channels, model[1].num_features, model[6].in_features) == (4, 4, 36)
    assert model[0].weight.shape == (4, 3, 3, 3) and model[8].weight.shape == (4, 5)
    kept = model[0].kept_out
    assert isinstance(kept, ChannelIndex) and kept.width == 8 and model[0].kept_in is None
    assert torch.equal(model[1].kept_out.index, kept.index)
    assert torch.equal(model[1].running_var, dense[1].running_var[kept.index])
    # channel c of the convolution is the block of features 9c .. 9c + 8
    features = (kept.index[:, None] * 9 + torch.arange(9)).flatten()
    assert torch.equal(model[6].kept_in.index, features) and model[6].kept_in.width == 72
    # the largest filters stayed
    size = dense[0].weight.abs().sum((1, 2, 3))
    assert kept.index.tolist() == sorted(size.topk(4).indices.tolist())
    assert model[8].kept_out is None and model[8].out_features == 4
    assert_same_function(model, dense, x)


def test_residual_concat_depthwise_grouped_and_squeeze(residual, normal):
    dense = copy.deepcopy(residual)
    x = normal(2, 3, 8, 8)
    prune(residual, x, pattern=pruning.Channels(multiple_of=4))
    m = residual
    assert m.stem.out_channels == m.b.out_channels == m.dw.groups == m.squeeze.in_features == 12
    assert torch.equal(m.stem.kept_out.index, m.b.kept_out.index)
    assert torch.equal(m.dw.kept_in.index, m.stem.kept_out.index)
    assert torch.equal(m.excite.kept_out.index, m.stem.kept_out.index)
    assert m.d.in_channels == m.c.out_channels + 12 and m.d.groups == 4
    assert m.d.weight.shape == (16, m.d.in_channels // 4, 3, 3)
    assert m.squeeze.out_features == 4  # half of 4 is 2, rounded up to the multiple
    # plan.apply proved it; here once more for the part without grouped convolutions
    dense.d.weight.data.zero_()
    residual.d.weight.data.zero_()
    dense.d.bias.data.fill_(1)
    residual.d.bias.data.fill_(1)
    assert_same_function(residual, dense, x)


def test_heads_of_grouped_attention(attention, normal):
    model = attention()
    dense = copy.deepcopy(model)
    x = normal(2, 5, 16)
    prune(model, x)
    # two pairs of heads become one: its two query heads stay with it
    assert model.q.out_features == 8 and model.k.out_features == model.v.out_features == 4
    assert model.o.in_features == 8 and model.up.out_features == 32
    pair = int(model.k.kept_out.index[0]) // 4
    assert model.k.kept_out.index.tolist() == list(range(4 * pair, 4 * pair + 4))
    assert model.q.kept_out.index.tolist() == list(range(8 * pair, 8 * pair + 8))
    assert model.norm.weight.shape == (16,) and model.o.out_features == 16
    assert_same_function(model, dense, x)


def test_a_width_in_the_code_is_found_and_put_back(attention, normal):
    model = attention(literal=True)
    before = copy.deepcopy(model.state_dict())
    x = normal(2, 5, 16)
    plan = pruning.plan(model, x, pattern=pruning.Channels(), amount=pruning.Uniform(0.5))
    text = r"channels of .*q.* could not be cut.*width written.*their number is -1, their size"
    with pytest.raises(ValueError, match=text):
        plan.apply(model)
    assert all(
        torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True)
    )
    assert model.q.out_features == 16 and not hasattr(model.q, "kept_out")
    prune(model, x, ignore=["q", "k", "v"])
    assert model.up.out_features == 32


def test_a_wrong_cut_is_refused_by_its_outputs(normal):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x):
            h = self.a(x)
            return self.b(h / h.shape[1])  # a width that the trace sees as a number

    torch.manual_seed(0)
    model = Scaled()
    plan = pruning.plan(
        model, normal(4, 8), pattern=pruning.Channels(), amount=pruning.Uniform(0.5)
    )
    with pytest.raises(ValueError, match=r"output 0 differs by .*The model is unchanged"):
        plan.apply(model)
    assert model.a.out_features == 8 and model.b.weight.shape == (2, 8)


def test_second_surgery_maps_to_the_first_axis(normal):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    dense = copy.deepcopy(model)
    prune(model, normal(2, 6))
    first = model[0].kept_out.index
    prune(model, normal(2, 6))
    kept = model[0].kept_out
    assert kept.width == 16 and kept.kept == 4 and set(kept.index.tolist()) < set(first.tolist())
    assert torch.equal(model[0].weight, dense[0].weight[kept.index])
    assert torch.equal(model[2].weight, dense[2].weight[:, model[2].kept_in.index])


def test_masks_are_cut_with_their_weights(normal):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    pruning.plan(model, normal(2, 8), pattern=pruning.NofM(2, 4)).apply(model)
    before = pruning.mask_of(model[2])
    prune(model, normal(2, 8))
    assert torch.equal(pruning.mask_of(model[2]), before[:, model[2].kept_in.index])
    assert torch.equal(pruning.mask_of(model[2]), model[2].weight != 0)


def test_ignore_protects_outputs_and_inputs(normal):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 8),
        nn.ReLU(),
        nn.Linear(8, 8),
        nn.ReLU(),
        nn.Linear(8, 8),
        nn.ReLU(),
        nn.Linear(8, 2),
    )
    plan = prune(model, normal(2, 6), ignore=["2"])
    assert model[2].weight.shape == (8, 8) and model[0].out_features == 8
    assert model[4].out_features == 4 and model[6].in_features == 4
    assert plan["0"].refusal == "2: ignored (2)"
    assert plan["4"].kept_shape == (4, 8)


def test_frozen_parameters_are_seen(normal):
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 2)).requires_grad_(False)
    prune(model, normal(2, 6))
    assert model[0].weight.shape == (4, 6) and not model[0].weight.requires_grad


@pytest.mark.parametrize(
    "operation, match",
    [
        (lambda x: x.sort(dim=1).values, r"no rule for sort.*test_channels.py"),
        (lambda x: nn.functional.layer_norm(x, (8,)), r"layer_norm.*normalises over its channels"),
        (lambda x: x.softmax(1), r"softmax.*mixes its channels"),
        (lambda x: x + torch.ones(2, 8), r"add.*meets a tensor of fixed size"),
        (lambda x: x.sum(1, keepdim=True).expand(2, 8), r"sum.*reduces over its channels"),
        (lambda x: x[:, :4].repeat(1, 2), "leaves it out"),
    ],
    ids=["unknown", "layer norm", "softmax", "constant", "sum", "slice"],
)
def test_what_mixes_channels_is_refused_by_name(operation, match, normal):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.b(operation(self.a(x)))

    if match == "leaves it out":  # only the channels that are sliced away have to stay
        plan = pruning.plan(
            Mixed(), normal(2, 6), pattern=pruning.Channels(), amount=pruning.Uniform(0.5)
        )
        assert plan["a"].kept_out.tolist()[-4:] == [4, 5, 6, 7]
        return
    with pytest.raises(ValueError, match=match):
        pruning.plan(Mixed(), normal(2, 6), pattern=pruning.Channels(), amount=pruning.Uniform(0.5))


def test_a_normalisation_that_changed_or_is_gone_is_refused(vgg, normal):
    model = vgg(8, 8)
    plan = pruning.plan(
        model, normal(1, 3, 4, 4), pattern=pruning.Channels(), amount=pruning.Uniform(0.5)
    )
    with torch.no_grad():
        model.backbone[1].bias[0] += 1
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"backbone.1.bias changed after the plan was made; make"):
        plan.apply(model)
    model.backbone[1] = nn.Identity()
    with pytest.raises(ValueError, match=r"backbone.1.bias is not in this model; make a plan for"):
        plan.apply(model)
    assert model.backbone[0].out_channels == 8
    assert torch.equal(model.backbone[0].weight, before["backbone.0.weight"])


def test_an_interrupt_during_the_proof_puts_the_channels_back(normal):
    class Interrupted(nn.Sequential):
        def forward(self, x):
            if self[0].out_features < 8:
                raise KeyboardInterrupt
            return super().forward(x)

    model = Interrupted(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    plan = pruning.plan(
        model, normal(2, 6), pattern=pruning.Channels(), amount=pruning.Uniform(0.5)
    )
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyboardInterrupt):
        plan.apply(model)
    assert model[0].out_features == 8 and model[2].in_features == 8
    assert all(torch.equal(model.state_dict()[k], before[k]) for k in before)
    assert not hasattr(model[0], "kept_out")


def test_a_model_that_cannot_be_traced_is_refused(normal):
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(6, 8)

        def forward(self, x):
            return self.a(x) if bool(x.sum() > 0) else x

    with pytest.raises(ValueError, match=r"torch.export cannot trace Branches"):
        pruning.plan(
            Branches(), normal(2, 6), pattern=pruning.Channels(), amount=pruning.Uniform(0.5)
        )


def test_floor_and_per_layer(normal):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 2))
    prune(
        model,
        normal(2, 6),
        pattern=pruning.Channels(floor=5),
        amount=pruning.PerLayer({"0": 0.9, "1": 0.25}),
    )
    assert (model[0].out_features, model[1].out_features) == (5, 12)


def test_a_width_that_had_to_be_rounded_up_is_noted(normal):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 2))
    options = {"example_inputs": normal(2, 6), "amount": pruning.Uniform(0.5)}
    plan = pruning.plan(model, pattern=pruning.Channels(multiple_of=8), **options)
    note = "0: keeps 16 of 24 units of coupled channels, the amount asked for 12"
    assert note in plan.notes[0] and "multiple of 8, floor 1" in str(plan)
    assert not pruning.plan(model, pattern=pruning.Channels(multiple_of=4), **options).notes


def test_norm_scales_leave_groups_without_a_norm_whole(normal):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
            self.b = nn.Conv2d(8, 8, 1)  # no norm of its own, but added to channels that have one
            self.c, self.head = nn.Linear(8, 6), nn.Linear(6, 2)

        def forward(self, x):
            x = self.norm(self.a(x)).relu()
            return self.head(self.c((x + self.b(x)).mean((2, 3))).relu())

    torch.manual_seed(0)
    model = Mixed().eval()
    nn.init.normal_(model.norm.weight)
    scales = model.norm.weight.detach().abs()
    x = normal(2, 3, 4, 4)
    dense, options = copy.deepcopy(model), {"amount": pruning.Uniform(0.5)}
    options |= {"pattern": pruning.Channels(), "score": pruning.BatchNormScale()}
    plan = pruning.plan(model, x, **options)
    plan.apply(model)
    assert torch.equal(plan["a"].kept_out, scales.topk(4).indices.sort().values)
    assert [tuple(m.weight.shape[:2]) for m in (model.a, model.b, model.c, model.head)] == [
        (4, 3), (4, 4), (6, 4), (2, 6),
    ]  # fmt: skip
    assert any("c: its channels stay: no batch normalisation" in note for note in plan.notes)
    assert "no batch normalisation" not in (plan["head"].refusal or "")
    with pytest.raises(ValueError, match="no batch normalisation with a scale follows"):
        pruning.plan(nn.Sequential(dense.c, dense.head), normal(2, 8), **options)


def test_training_goes_on_with_the_same_parameters(normal):
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(normal(3, 6)).sum().backward()
    prune(model, normal(2, 6))
    assert model[0].weight.grad is None
    before = model[0].bias.detach().clone()
    model(normal(3, 6)).sum().backward()
    optimizer.step()
    assert model[0].bias.shape == (4,) and not torch.equal(model[0].bias, before)


def test_proof_helpers():
    x = torch.arange(3.0)
    assert difference([x], [x]) is None
    assert "instead of [3]" in difference([x[:2]], [x])
    assert "differs by nan" in difference([x * float("nan")], [x])
    assert "differs by 0.1" in difference([x + 0.1], [x])


def test_rotary_embeddings_keep_heads_whole(normal):
    class Rotary(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 8), nn.Linear(16, 8)
            self.o = nn.Linear(16, 3)

        def turn(self, x):
            angle = torch.arange(x.shape[2])[:, None] * torch.tensor([1.0, 0.1, 1.0, 0.1])
            half = torch.cat([-x[..., 2:], x[..., :2]], -1)
            return x * angle.cos() + half * angle.sin()

        def forward(self, x):
            b, t, _ = x.shape
            q, k, v = (f(x).view(b, t, -1, 4).transpose(1, 2) for f in (self.q, self.k, self.v))
            k, v = (
                y[:, :, None].expand(-1, -1, 2, -1, -1).reshape(b, -1, t, 4)
                for y in (self.turn(k), v)
            )
            scores = self.turn(q) @ k.transpose(2, 3) / 2
            return self.o((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, t, -1))

    torch.manual_seed(0)
    model = Rotary()
    prune(model, normal(2, 5, 16))
    assert (model.q.out_features, model.k.out_features, model.o.in_features) == (8, 4, 8)
    pair = int(model.k.kept_out.index[0]) // 4
    assert model.q.kept_out.index.tolist() == list(range(8 * pair, 8 * pair + 8))
    assert model.v.kept_out.index.tolist() == list(range(4 * pair, 4 * pair + 4))
