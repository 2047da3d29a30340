"""Cuts that are easily wrong or refused: joined inputs, equal parts, odd norms, shared tensors."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from slimgemm import pruning
from slimgemm.pruning import channels
from slimgemm.pruning.cost import ENERGY, count_macs
from slimgemm.pruning.geometry import Geometry
from slimgemm.pruning.layers import find_layers
from slimgemm.pruning.trace import trace
from tests.pruning.norm_models import lively

HALF = {"pattern": pruning.Channels(), "amount": pruning.Uniform(0.5)}
IMAGES = (2, 3, 4, 4)


def cut(model, x):
    """The plan that was carried out, proof and all."""
    plan = pruning.plan(lively(model), x, **HALF)
    plan.apply(model)
    return plan


def test_channels_joined_with_the_models_input_are_cut_again_and_again(normal):
    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(14, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.c(F.relu(self.b(torch.cat([F.relu(self.a(x)), x], -1))))

    torch.manual_seed(0)
    model, x = Joined(), normal(4, 6)
    cut(model, x)
    assert (model.b.out_features, model.b.in_features) == model.b.weight.shape == (4, 10)
    assert model.b.kept_in.width == 14 and model.b.kept_in.index[4:].tolist() == [*range(8, 14)]
    cut(model, x)
    assert model.b.weight.shape == (2, 8)
    assert model.b.kept_in.width == 14 and model.b.kept_in.index[2:].tolist() == [*range(8, 14)]


def test_parts_of_a_chunk_stay_equal(normal):
    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(4, 3), nn.Linear(4, 3)
            self.a.weight.data[:4] *= 1e-2  # alone, all of the first part would go

        def forward(self, x):
            left, right = self.a(x).chunk(2, -1)
            return self.b(left) + self.c(right)

    torch.manual_seed(0)
    model = Parts()
    cut(model, normal(4, 6))
    assert [tuple(m.weight.shape) for m in (model.a, model.b, model.c)] == [(4, 6), (3, 2), (3, 2)]


@pytest.mark.parametrize("base", [nn.LayerNorm, nn.RMSNorm])
def test_a_norm_module_may_take_means_over_tokens(base, normal):
    class Centred(base):
        def forward(self, x):
            return super().forward(x - x.mean(dim=1, keepdim=True))

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), Centred(16), nn.Linear(16, 3))
    cut(model, normal(2, 4, 6))
    assert model[1].normalized_shape == (8,)


def test_a_batch_norm_without_any_tensor_says_its_width(normal):
    bare = nn.BatchNorm2d(8, affine=False, track_running_stats=False)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), bare, nn.Conv2d(8, 2, 1))
    cut(model, normal(*IMAGES))
    assert bare.num_features == 4 and bare.kept_out.kept == 4


def test_groups_that_leave_nothing_to_choose_are_told(normal):
    class Groups(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 8, 1), nn.Conv2d(8, 2, 1)
            self.threes, self.fours = nn.GroupNorm(3, 12), nn.GroupNorm(4, 12)

        def forward(self, x):
            return self.c(F.relu(self.b(self.fours(self.threes(self.a(x))))))

    plan = pruning.plan(Groups(), normal(*IMAGES), **HALF)
    assert plan["a"].refusal == (
        "its 12 channels are coupled with each other and could only go together"
    )
    assert plan["b"].kept_shape == (4, 12, 1, 1)


def test_groups_that_leave_nothing_to_choose_are_told_of_a_layer_that_loses_inputs(normal):
    model = nn.Sequential(nn.Conv2d(3, 12, 1), nn.Conv2d(12, 12, 1, groups=3))
    model.extend([nn.GroupNorm(4, 12), nn.Conv2d(12, 2, 1)])
    plan = pruning.plan(model, normal(*IMAGES), **HALF)
    assert plan["1"].kept_shape == (12, 2, 1, 1)
    assert plan.notes == (
        "Output channels that stay: 1 (12 of 12): its 12 channels are coupled with each other and "
        "could only go together",
    )


def test_a_norm_that_is_left_with_one_channel_is_told(normal):
    model = nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4), nn.Linear(4, 3))
    options = {"amount": pruning.Uniform(0.75)}
    for floor, lone in ((1, True), (2, False)):
        plan = pruning.plan(model, normal(4, 6), pattern=pruning.Channels(floor=floor), **options)
        found = (
            "Normalisations left with a single channel, whose value they erase: 1; give Channels"
        )
        assert any(found in note for note in plan.notes) is lone


class Tied(nn.Module):
    """An embedding whose table is the head's weight, and an MLP."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.norm = nn.Embedding(9, 16), nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)
        self.head = nn.Linear(16, 9, bias=False)
        self.head.weight = self.words.weight

    def forward(self, tokens):
        x = self.words(tokens)
        return self.head(self.norm(x + self.down(F.gelu(self.up(self.norm(x))))))


TOKENS = torch.arange(8).reshape(2, 4)


def test_why_a_layer_that_shrinks_keeps_its_outputs_is_told():
    plan = pruning.plan(Tied(), TOKENS, **HALF)
    assert plan["down"].kept_shape == (16, 12)
    assert plan.notes == (
        "Output channels that stay: down (16 of 16): words.weight is shared with head.weight; "
        "untie it (clone it) first",
    )


def test_costs_of_a_model_with_a_shared_tensor():
    model = Tied().eval()
    coupling = trace(model, TOKENS, channels.pinned_by(model, find_layers(model), ()))
    plan = pruning.plan(model, TOKENS, **HALF)
    roots = coupling.sets.roots(coupling.axes["up.weight", 0])
    gone = {*roots} - {*roots[plan["up"].kept_out.numpy()]}
    before, want = (Geometry(model, TOKENS, coupling).costs([*lost]) for lost in ((), gone))
    plan.apply(model)
    assert Geometry(model, TOKENS).costs() == want
    assert want.params == sum(p.numel() for p in model.parameters()) < before.params


def test_energy_of_a_depthwise_convolution_counts_the_inputs_that_are_left(normal):
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU())
    model.append(nn.Conv2d(8, 2, 1))
    x = normal(*IMAGES)
    plan = cut(model, x)
    used, weight = count_macs(model, x).layers["1"], model[1].weight
    moved = used.input_bytes + used.output_bytes
    want = ENERGY["horowitz45"].layer(used.macs, weight.nbytes, moved, weight.dtype)
    assert plan["1"].pruned_energy_pj == pytest.approx(want)
