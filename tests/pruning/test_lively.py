"""The proof runs a model in which no term is silent: what zeros, masks and halves would hide."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from slimgemm import pruning
from slimgemm.pruning.lively import lively
from slimgemm.pruning.proof import apply_surgery, difference
from tests.pruning.norm_models import make

HALF = {"pattern": pruning.Channels(), "amount": pruning.Uniform(0.5)}


class FourHeads(nn.Module):
    """Attention that writes its number of heads into the code, so that none may go."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.norm, self.head = nn.Embedding(9, 16), nn.LayerNorm(16), nn.Linear(16, 5)
        self.qkv, self.o = nn.ModuleList(nn.Linear(16, 16) for _ in range(3)), nn.Linear(16, 16)

    def forward(self, tokens):
        x = self.words(tokens)
        b, n, _ = x.shape
        q, k, v = (f(self.norm(x)).view(b, n, 4, -1).transpose(1, 2) for f in self.qkv)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, -1)
        return self.head(x + self.o(y))


class Scaled(nn.Module):
    """Divides by a width, so that none may go."""

    def __init__(self, way=lambda y: y):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm, self.b, self.way = (
            nn.Linear(6, 16),
            nn.LayerNorm(16),
            nn.Linear(16, 5),
            way,
        )

    def forward(self, x):
        return self.way(self.b(self.norm(self.a(x))) / self.norm.weight.numel())


def refused(model, x):
    """The model refuses to be cut, and is bit by bit as before, with its gradients and flags."""
    model.train()
    plan = pruning.plan(model, x, **HALF)
    before = copy.deepcopy(model.state_dict())
    grads = {name: p.grad for name, p in model.named_parameters()}
    held = {name: {*module.__dict__} for name, module in model.named_modules()}
    with pytest.raises(ValueError, match="could not be cut"):
        plan.apply(model)
    for name, value in model.state_dict().items():
        assert value.dtype == before[name].dtype and torch.equal(value, before[name])
    assert all(p.grad is grads[name] for name, p in model.named_parameters())
    assert all({*module.__dict__} == held[name] for name, module in model.named_modules())
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("size", [0, 1e-6])
def test_a_wrong_cut_behind_a_layer_that_adds_next_to_nothing_is_refused(size):
    model = FourHeads()
    model.o.weight.data *= size
    model.o.bias.data *= size
    refused(model, torch.randint(0, 9, (2, 5)))


@pytest.mark.parametrize("token", [0, 3])
def test_a_wrong_cut_that_equal_tokens_hide_is_refused(token):
    refused(FourHeads(), torch.full((2, 5), token))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_wrong_cut_within_the_rounding_of_halves_is_refused(dtype):
    model, tokens = FourHeads().to(dtype), torch.randint(0, 9, (2, 5))
    model(tokens).float().sum().backward()
    refused(model, tokens)


FIRST = torch.tensor([True, False, False, False, False])


@pytest.mark.parametrize("least", [torch.finfo(torch.float32).min, -1e9, -torch.inf])
def test_a_wrong_cut_beside_masked_outputs_is_refused(least, normal):
    refused(Scaled(lambda y: y.masked_fill(FIRST, least)), normal(4, 6))


def test_a_wrong_cut_of_a_model_that_gives_whole_numbers_is_refused(normal):
    refused(Scaled(lambda y: (y * 1e4).long()), normal(4, 6))


def test_masked_outputs_do_not_stop_a_cut(normal):
    class Masked(nn.Sequential):
        def forward(self, x):
            return super().forward(x).masked_fill(FIRST, -torch.inf)

    model = Masked(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5))
    pruning.plan(model, normal(4, 6), **HALF).apply(model)
    assert model[0].weight.shape == (4, 6)


def test_halves_with_gradients_are_cut_in_their_own_dtype(normal):
    model, x = make("layer norm").bfloat16(), normal(4, 6).bfloat16()
    model(x).sum().backward()
    pruning.plan(model, x, **HALF).apply(model)
    assert model.stem.weight.shape == (8, 6) and model.stem.weight.grad is None
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(x).dtype == torch.bfloat16


def test_models_that_cannot_be_made_lively_are_proved_as_they_are(normal):
    class Own(nn.Sequential):
        def forward(self, x):
            return super().forward(x.to(torch.bfloat16))  # a dtype in the code

    model = Own(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)).bfloat16()
    x = normal(4, 6)
    with lively(model, x) as inputs:
        assert inputs is x and model[0].weight.dtype == torch.bfloat16
    pruning.plan(model, x, **HALF).apply(model)
    assert model[0].weight.shape == (4, 6)

    table = nn.Embedding(1, 4)
    with lively(table, torch.zeros(3, dtype=torch.int64)) as inputs:
        assert not inputs.any()  # there is no row 1


def test_what_is_constant_becomes_random_and_comes_back():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.zeros, self.ones = nn.Parameter(torch.zeros(4, 8)), nn.Parameter(torch.ones(8))
            self.own = nn.Parameter(torch.arange(8.0))
            self.register_buffer("place", torch.zeros(8))

        def forward(self, x, tokens, mask, step):
            return x * self.ones + self.own

    model, own = Model(), {}
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        own[name] = tensor.data
    inputs = {
        "x": torch.zeros(3, 8),
        "tokens": torch.full((2, 9), 5),
        "mask": torch.ones(2, 9, dtype=torch.bool),
        "step": torch.tensor(3),
    }
    with lively(model, inputs) as changed:
        assert model.zeros.unique().numel() == 32 and model.ones.unique().numel() == 8
        assert bool((model.ones > 0).all())
        assert model.own.equal(own["own"]) and model.place.equal(own["place"])
        assert changed["x"].unique().numel() == 24 and changed["mask"] is inputs["mask"]
        assert {*changed["tokens"].flatten().tolist()} == {4, 5}
        assert changed["tokens"][:, 0].tolist() == [5, 5] and changed["step"] is inputs["step"]
    for name, data in own.items():
        assert getattr(model, name).data.data_ptr() == data.data_ptr()
    assert not model.zeros.any() and (model.ones == 1).all()


def test_empty_parameters_and_counters_are_left_as_they_are(normal):
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 2)
            self.empty = nn.Parameter(torch.empty(0, 3))
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return self.b(F.relu(self.a(x)))

    model = Counts()
    plan = pruning.plan(model, normal(4, 6), **HALF)
    calls = model.calls.item()
    plan.apply(model)
    assert model.a.weight.shape == (4, 6) and model.calls.item() == calls


def test_differences_of_other_than_plain_numbers():
    whole, inf = torch.arange(4), torch.tensor([torch.inf, 1.0])
    assert difference([whole], [whole]) is None and difference([inf], [inf]) is None
    assert difference([whole + 1], [whole]) == "output 0 differs in 4 of 4 elements"
    assert "differs by inf" in difference([-inf], [inf])
    assert "differs by nan" in difference([inf * 0], [inf])
    assert difference([], []) == "there is no output to compare"
    turned = torch.polar(torch.ones(3), torch.arange(3.0))
    assert difference([turned * (1 + 1e-6)], [turned]) is None
    assert "differs by" in difference([turned * 1.01], [turned])


def test_a_kill_in_the_middle_of_the_cut_leaves_the_model_as_it_was(normal, monkeypatch):
    model, x = make("layer norm"), normal(4, 6)
    plan = pruning.plan(model, x, **HALF)
    want, calls = model(x), []

    def once(*arguments):
        calls.append(arguments)
        real(*arguments)
        if len(calls) == 2:  # the first is the proof's
            raise KeyboardInterrupt

    real = apply_surgery.__globals__["shrink"]
    monkeypatch.setitem(apply_surgery.__globals__, "shrink", once)
    with pytest.raises(KeyboardInterrupt):
        plan.apply(model)
    assert len(calls) == 2 and model(x).equal(want)
    assert model.norm.normalized_shape == (16,) and "kept_out" not in model.norm.__dict__
