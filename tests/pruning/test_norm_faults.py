"""Norms over channels: wrong cuts are caught and put back, other forms are refused by name."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from slimgemm import pruning
from slimgemm.pruning import proof, shrink
from tests.pruning.norm_models import MODELS, Mlp, Rms, lively, make, vit

HALF = {"pattern": pruning.Channels(), "amount": pruning.Uniform(0.5)}


def planted(normal, fault):
    """The message with which a model refuses a surgery that `fault` changed; it must be as before.

    The fault takes the surgery of the ViT and returns another one.
    """
    model, x = vit(), normal(2, 3, 8, 8)
    plan = pruning.plan(model, x, **HALF)
    before, text = copy.deepcopy(model.state_dict()), repr(model)
    with pytest.raises(ValueError, match="could not be cut") as caught:
        replace(plan, surgery=fault(plan.surgery)).apply(model)
    assert repr(model) == text
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    for module in model.modules():
        assert not {"forward", *shrink.CARRIED} & module.__dict__.keys()
    return str(caught.value)


def moved(kept):
    """As many positions, others: all that were dropped."""
    return torch.tensor([i for i in range(16) if i not in kept.tolist()])


@pytest.mark.parametrize(
    "key",
    [
        ("blocks.0.norm1.weight", 0),
        ("blocks.0.norm1.bias", 0),
        ("blocks.1.norm2.weight", 0),  # of the RMS kind
        ("norm.weight", 0),
        ("position", 2),
        ("token", 2),
        ("patches.weight", 0),
        ("blocks.0.o.bias", 0),
    ],
)
def test_channels_of_one_tensor_at_the_wrong_place_are_refused(key, normal):
    def fault(surgery):
        return replace(surgery, slices={**surgery.slices, key: moved(surgery.slices[key])})

    assert "output 0 differs by" in planted(normal, fault)


@pytest.mark.parametrize("name", ["blocks.0.norm1", "blocks.1.norm1", "norm"])
def test_moments_over_other_channels_are_refused(name, normal):
    def elsewhere(surgery):
        return replace(surgery, norms={**surgery.norms, name: moved(surgery.norms[name])})

    def everywhere(surgery):
        norms = {key: kept for key, kept in surgery.norms.items() if key != name}
        return replace(surgery, norms=norms)

    assert "output 0 differs by" in planted(normal, elsewhere)
    assert "output 0 differs by" in planted(normal, everywhere)


def test_a_norm_whose_width_is_not_rewritten_is_refused(normal, monkeypatch):
    rewrite = shrink._rewrite

    def partly(module, *kept):
        return None if isinstance(module, nn.LayerNorm) else rewrite(module, *kept)

    monkeypatch.setattr(shrink, "_rewrite", partly)
    assert "its forward failed: RuntimeError" in planted(normal, lambda surgery: surgery)


def test_widths_in_the_code_around_a_norm_are_found(normal):
    class Scaled(Mlp):
        def forward(self, x):
            return super().forward(x) / self.norm.weight.numel()

    torch.manual_seed(0)
    model = lively(Scaled(nn.LayerNorm(16)))
    plan = pruning.plan(model, normal(4, 6), **HALF)
    with pytest.raises(ValueError, match=r"output 0 differs by .*The model is unchanged"):
        plan.apply(model)
    assert model.norm.normalized_shape == (16,)


def test_a_model_that_fails_while_it_is_proved_keeps_its_norms(normal):
    model = make("layer norm")
    plan = pruning.plan(model, normal(4, 6), **HALF)
    model.head.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        plan.apply(model)
    assert "forward" not in model.norm.__dict__ and model.norm.normalized_shape == (16,)
    model.head._forward_hooks.clear()
    model.norm.forward = forward = model.norm.forward  # as accelerate's hooks do
    with proof._moments_over(model, {"norm": torch.arange(8)}):
        assert model.norm.__dict__["forward"] is not forward
    assert model.norm.__dict__["forward"] is forward


@pytest.mark.parametrize(
    "name, rule, reason",
    [
        ("layer norm", "norm", "norm is ignored"),
        ("without a scale", "norm", "norm is ignored"),
        ("rms norm by hand", "norm", "norm is ignored"),
        ("groups", "norm", "norm is ignored"),
        ("instance", "norm", "norm is ignored"),
        ("ViT", "position", "meets a tensor of fixed size (position is ignored)"),
        ("ViT", "re:.*norm2", "blocks.0.norm2 is ignored"),
    ],
)
def test_what_is_ignored_pins_the_stream(name, rule, reason, normal):
    dense, x = make(name), normal(*MODELS[name][1])
    plan = pruning.plan(dense, x, **HALF, ignore=[rule])
    stem = next(n for n in ("stem", "patches") if hasattr(dense, n))
    assert reason in plan[stem].refusal and all(reason in note for note in plan.notes)
    assert not plan.surgery.norms and plan.pruned


def test_names_that_ignore_does_not_know_are_refused(normal):
    for rule in ("nomr", "gelu", "position.weight"):
        with pytest.raises(ValueError, match=f"ignore has '{rule}', which covers no layer"):
            pruning.plan(vit(), normal(2, 3, 8, 8), **HALF, ignore=[rule])


class Odd(nn.Module):
    """A norm in a form that is not one of the known modules."""

    def __init__(self, way):
        super().__init__()
        self.a, self.b, self.way = nn.Linear(6, 8), nn.Linear(8, 2), way
        self.weight, self.norm = nn.Parameter(torch.ones(8)), nn.LayerNorm(8)
        self.register_buffer("place", torch.randn(4, 8))

    def forward(self, x):
        return self.b(self.way(self, self.a(x)))


def by_hand(self, x):
    return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


ODD = {
    "a literal": (lambda m, x: F.layer_norm(x, (8,)), "layer_norm.*normalises over its channels"),
    "another's scale": (
        lambda m, x: F.layer_norm(x, (8,), m.norm.weight),
        "layer_norm.*normalises over its channels",
    ),
    "a group norm": (lambda m, x: F.group_norm(x, 2), "group_norm.*normalises over its channels"),
    "no module of its own": (by_hand, "mean.*reduces over its channels"),
    "a mean": (lambda m, x: x - x.mean(-1, keepdim=True), "mean.*reduces over its channels"),
    "a buffer": (lambda m, x: x + m.place, "add.*fixed size .place is a buffer, only par"),
    "a joined constant": (
        lambda m, x: torch.cat([x, m.place], 0),
        "cat.*meets a tensor of fixed size .place is a buffer",
    ),
    "a weight added": (
        lambda m, x: x + m.b.weight[:1],
        "b.weight is used as a weight and as an activation",
    ),
}


@pytest.mark.parametrize("case", ODD)
def test_other_forms_are_refused_by_name(case, normal):
    way, match = ODD[case]
    with pytest.raises(ValueError, match=match):
        pruning.plan(Odd(way), normal(4, 6), **HALF)


class Almost(Rms):
    """Like Rms, but in one thing."""

    def __init__(self, way):
        super().__init__(16)
        self.way = way

    def forward(self, x):
        return self.weight * self.way(x)


ALMOST = {
    "cubes": lambda x: x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True) + 1e-6),
    "another product": lambda x: x.abs() * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
    "read twice": lambda x: (lambda v: x * torch.rsqrt(v + 1e-6) + v)(x.pow(2).mean(-1, True)),
    "of everything": lambda x: x * torch.rsqrt(x.pow(2).mean() + 1e-6),
    "a sum": lambda x: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6),
}


@pytest.mark.parametrize("case", ALMOST)
def test_what_is_almost_an_rms_norm_is_none(case, normal):
    model = Mlp(Almost(ALMOST[case]))
    plan = pruning.plan(model, normal(4, 6), **HALF)
    assert "reduces over its channels" in plan["stem"].refusal
    assert plan["down"].kept_shape == (16, 12)


def test_a_shared_parameter_stays(normal):
    model = vit()
    model.other = nn.Module()
    model.other.position = model.position
    plan = pruning.plan(model, normal(2, 3, 8, 8), **HALF)
    assert "position is shared with other.position; untie it" in plan["patches"].refusal


def test_a_parameter_that_is_a_weight_too_stays(normal):
    class Both(Mlp):
        def forward(self, x):
            x = self.stem(x) + self.table[:4]
            return self.head(F.linear(x, self.table))

        def __init__(self):
            super().__init__(nn.Identity())
            self.table = nn.Parameter(torch.randn(16, 16))

    with pytest.raises(ValueError, match="stem: table is used as a weight and as an activation"):
        pruning.plan(Both(), normal(4, 6), **HALF)
