"""compress and decompress of whole models: shared weights, residual networks, attention, masks."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_no_worse_than_dense, randn, random_24
from swap_cases import X, assert_untouched, everything, mlp, packed_names, pruned, reasons
from torch import nn

from slimgemm import pruning
from slimgemm.kernels.reference import gather_24_ref
from slimgemm.sparse_ops import SparseLinear24, compress, decompress
from slimgemm.sparse_ops.swap import modules_with_names

# ---- shared weights and modules


class Tied(nn.Module):
    """Two layers of one weight, and a third module under two names."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
        self.b.weight = self.a.weight
        self.c = self.again = nn.Linear(16, 4)

    def forward(self, x):
        return self.c(self.a(x)) + self.again(self.b(x))


def test_tied_layers_stay_tied_and_a_module_of_two_names_stays_one():
    torch.manual_seed(0)
    model = pruned(Tied())
    dense, want = copy.deepcopy(model), model(X)
    report = compress(model, X)
    assert packed_names(report) == ["a", "b", "c"]
    assert model.a.values is model.b.values and model.a.meta is model.b.meta
    assert model.c is model.again and type(model.c) is SparseLinear24
    assert_no_worse_than_dense(model(X), want, want.double(), "y")
    model(X).sum().backward()
    dense(X).sum().backward()
    exact = copy.deepcopy(dense).double()
    exact.zero_grad()
    exact(X.double()).sum().backward()
    wanted = [gather_24_ref(m.a.weight.grad, model.a.packed) for m in (dense, exact)]
    assert_no_worse_than_dense(model.a.values.grad, *wanted, "the sum of both gradients")
    decompress(model)
    assert model.a.weight is model.b.weight and model.c is model.again
    assert torch.equal(model.a.weight, dense.a.weight) and torch.equal(model(X), dense(X))


def test_tied_layers_stay_dense_together():
    model = pruned(Tied())
    report = compress(model, X, ignore=("b",))
    assert packed_names(report) == ["c"] and model.a.weight is model.b.weight
    assert reasons(report)["a"] == "its weight is shared with b, which stays dense"


def test_every_name_of_a_module_is_listed():
    model = Tied()
    assert modules_with_names(model)[model.c] == ["c", "again"]


# ---- decompress


def test_decompress_is_the_inverse():
    model = mlp()
    model[0].note = "kept"
    model[0].register_forward_hook(lambda *_: None)
    model.eval()
    model[2].weight.requires_grad_(False)
    dense, want = copy.deepcopy(model), model(X)
    before = {name: set(m.__dict__) for name, m in model.named_modules()}
    compress(model, X)
    assert decompress(model) is model
    assert {name: set(m.__dict__) for name, m in model.named_modules()} == before
    for mine, theirs in zip(model.modules(), dense.modules(), strict=True):
        assert type(mine) is type(theirs) and mine.training == theirs.training
    for (name, mine), (other, theirs) in zip(
        model.named_parameters(), dense.named_parameters(), strict=True
    ):
        assert name == other and torch.equal(mine, theirs)
        assert mine.requires_grad == theirs.requires_grad
    assert torch.equal(model(X), want) and model[0].note == "kept"
    assert packed_names(compress(model, X)) == ["0", "2"]


def test_decompress_of_a_dense_model_changes_nothing():
    model = mlp()
    before = everything(model)
    decompress(model)
    assert_untouched(model, before)


# ---- whole models


class Block(nn.Module):
    def __init__(self, cin, cout, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(cout), nn.BatchNorm2d(cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
        self.down = nn.Conv2d(cin, cout, 1, stride, bias=False) if stride > 1 else nn.Identity()

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.down(x))


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(4, 8, 3, padding=1)
        self.blocks = nn.Sequential(Block(8, 8, 1), Block(8, 16, 2))
        self.fc1, self.fc2 = nn.Linear(16, 24), nn.Linear(24, 10)

    def forward(self, x):
        y = self.blocks(F.relu(self.stem(x))).mean((2, 3))
        return self.fc2(F.relu(self.fc1(y)))


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        b, t, d = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(b, t, d))


class ViT(nn.Module):
    def __init__(self, dim=24):
        super().__init__()
        self.patch = nn.Conv2d(4, dim, 4, 4)
        self.position = nn.Parameter(torch.randn(1, 4, dim) / 4)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(5))
        self.attention = nn.ModuleList(Attention(dim, 2) for _ in range(2))
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
            for _ in range(2)
        )
        self.head = nn.Linear(dim, 10)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2) + self.position
        for i in range(2):
            x = x + self.attention[i](self.norms[2 * i](x))
            x = x + self.mlp[i](self.norms[2 * i + 1](x))
        return self.head(self.norms[4](x).mean(1))


def gradients(model, x, dy):
    """Output, gradient of the input, and of every parameter of the dense model by name."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = model(x)
    y.backward(dy.to(y.dtype))
    found = {"y": y.detach(), "x": x.grad}
    return found | {name: p.grad for name, p in model.named_parameters()}


def at_kept(module, gradient):
    """`gradient` of the dense weight that `module` packs, where the module stores values."""
    twin = copy.deepcopy(module)
    twin.values.data = torch.ones_like(twin.values)
    mask = twin.to_dense().weight.detach() != 0
    return gradient * mask.to(gradient.dtype)


@pytest.mark.parametrize("kind", [ResNet, ViT])
def test_whole_models_keep_outputs_and_gradients(kind):
    torch.manual_seed(0)
    model = pruned(kind())
    dense, x, dy = copy.deepcopy(model), randn(3, 4, 8, 8, seed=2), randn(3, 10, seed=3)
    report = compress(model, x)
    linears = {n for n, m in dense.named_modules() if isinstance(m, nn.Linear)}
    assert linears and linears <= set(packed_names(report))
    got, theirs = gradients(model, x, dy), gradients(dense, x, dy)
    exact = gradients(copy.deepcopy(dense).double(), x.double(), dy.double())
    for name in got:
        key = name.removesuffix("values")
        if key == name:
            mine, other, truth = got[name], theirs[name], exact[name]
        else:
            layer = model.get_submodule(key[:-1])
            store = copy.deepcopy(layer)
            store.values.data = got[name]
            mine = store.to_dense().weight.detach()
            other, truth = (at_kept(layer, grads[f"{key}weight"]) for grads in (theirs, exact))
        assert_no_worse_than_dense(mine, other, truth, name)
    decompress(model)
    for name, parameter in dense.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter)


def test_convolutions_and_lone_channels_are_swapped_and_come_back():
    model = nn.Sequential(
        nn.Conv2d(8, 16, 3, padding=1, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(256, 24)
    )
    rows = random_24(16 * 9, 8).view(16, 3, 3, 8)
    model[0].weight.data = rows.permute(0, 3, 1, 2).contiguous()
    with torch.no_grad():
        model[3].weight[:, 100:] = 0
        model[3].weight[3:9] = 0
        model[3].bias[3:9] = 0
    x = randn(2, 8, 8, 8, seed=5)
    dense = copy.deepcopy(model)
    report = compress(model, x)
    kinds = {r.name: r.kind for r in report.packed}
    assert kinds == {"0": "2:4", "3": "100 of 256 in, 18 of 24 out"}
    assert all(r.packed_bytes < r.dense_bytes for r in report.packed)
    exact = copy.deepcopy(dense).double()(x.double())
    assert_no_worse_than_dense(model(x), dense(x), exact, "swapped")
    decompress(model)
    for mine, theirs in zip(model.parameters(), dense.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert model[3].__dict__.keys() == dense[3].__dict__.keys()


def test_masks_of_dense_layers_are_kept_beside_packed_ones():
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    pruning.plan(model, X[:, :16], pattern=pruning.NofM(2, 4)).apply(model)
    report = compress(model, X[:, :16], ignore=["2"])
    assert [r.name for r in report.packed] == ["0"]
    assert pruning.mask_of(model[0]) is None and pruning.mask_of(model[2]).sum() == 128
    assert "build the optimizer now" in str(report)
    optimizer = pruning.keep_masks(torch.optim.SGD(model.parameters(), lr=0.1), model)
    before = model[0].values.detach().clone()
    model(X[:, :16]).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model[0].values, before)
    assert (model[2].weight != 0).sum() == 128
    pruning.load_masks(model, pruning.masks_state(model))
    decompress(model)
    pruning.plan(model, X[:, :16], pattern=pruning.NofM(2, 4)).apply(model)
    assert pruning.mask_of(model[0]).sum() == 128
