"""compress and decompress: what is swapped, what is left and why, and that nothing else changes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_no_worse_than_dense, randn, random_24
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from slimgemm.kernels.reference import gather_24_ref, prune_dense_24_ref
from slimgemm.sparse_ops import SparseLinear24, compress, decompress
from slimgemm.sparse_ops.swap import modules_with_names, seen_inputs

X = randn(4, 16, seed=1)


def pruned(model, keep=2, group=4):
    """Every weight of a Linear, and of a Conv2d along its input channels, made keep:group."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and isinstance(module.weight, nn.Parameter):
            module.weight.data = prune_dense_24_ref(module.weight.data, keep, group)
        if isinstance(module, nn.Conv2d):
            taps = module.weight.data.permute(0, 2, 3, 1)
            kept = prune_dense_24_ref(taps.reshape(-1, taps.shape[-1]), keep, group)
            module.weight.data = kept.view(taps.shape).permute(0, 3, 1, 2).contiguous()
    return model


def mlp(seed=0):
    torch.manual_seed(seed)
    return pruned(nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)))


def packed_names(report):
    return [layer.name for layer in report.packed]


def reasons(report):
    return {layer.name: layer.reason for layer in report.layers if not layer.packed}


def own_parameters(module):
    return dict(module.named_parameters(recurse=False))


def everything(model):
    """All that compress must not change, or must bring back: a comparable picture of `model`."""
    return {
        name: (
            type(module),
            module.training,
            {k: (id(v), v.clone(), v.requires_grad) for k, v in own_parameters(module).items()},
            {k: v for k, v in module.__dict__.items() if not k.startswith("_")},
        )
        for name, module in model.named_modules(remove_duplicate=False)
    }  # fmt: skip


def assert_untouched(model, before):
    after = everything(model)
    assert after.keys() == before.keys()
    for name, (kind, training, parameters, attributes) in before.items():
        assert after[name][:2] == (kind, training) and after[name][3] == attributes
        for key, (identity, value, needs) in parameters.items():
            now = after[name][2][key]
            assert now[0] == identity and now[2] == needs and torch.equal(now[1], value)


# ---- what is swapped


def test_every_eligible_layer_is_swapped_and_reported():
    model = mlp()
    want = model(X).detach()
    report = compress(model, X)
    assert packed_names(report) == ["0", "2"] and not reasons(report)
    assert type(model[0]) is SparseLinear24 and type(model[2]) is SparseLinear24
    assert_no_worse_than_dense(model(X), want, want.double(), "y")
    first = report.layers[0]
    assert (first.kind, first.shape, first.dense_bytes) == ("2:4", (8, 16), 512)
    assert first.packed_bytes == model[0].packed.nbytes == 272
    text = str(report)
    assert "packed (2:4)" in text and "8x16" in text and "272" in text


@pytest.mark.parametrize("pattern", [(1, 4), (4, 8)], ids=str)
def test_other_patterns(pattern):
    torch.manual_seed(0)
    model = pruned(nn.Sequential(nn.Linear(16, 8)), *pattern)
    want = model(X)
    assert packed_names(compress(model, X, keep=pattern[0], group=pattern[1])) == ["0"]
    assert_no_worse_than_dense(model(X), want, want.double(), "y")


def test_inputs_as_a_tuple_a_list_or_a_dict():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(16, 4)

        def forward(self, a, *, b=None, scale=1.0):
            return self.fc(a if b is None else a + b) * scale

    for inputs in ((X,), [X], {"a": X, "b": X, "scale": 2.0}, X):
        model = pruned(Two())
        assert packed_names(compress(model, inputs)) == ["fc"]


def test_a_layer_called_with_a_keyword_was_seen():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(16, 4)

        def forward(self, x):
            return self.fc(input=x)

    model = pruned(Named())
    assert torch.equal(seen_inputs(model, [model.fc], X)[model.fc], X)
    assert "forward" not in model.fc.__dict__


# ---- what is left dense, and why


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Embedded(nn.Module):
    """A language model's head: one weight for the embedding and the last layer."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(12, 16)
        self.fc = nn.Linear(16, 16)
        self.head = nn.Linear(16, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.fc(self.embed(ids)))


def left_dense():
    """name -> model, inputs, layer, reason"""
    torch.manual_seed(0)
    unpruned = nn.Sequential(nn.Linear(16, 8))
    subclass = pruned(nn.Sequential(Doubled(16, 8)))
    with_parametrization = pruned(nn.Sequential(nn.Linear(16, 8)))
    parametrizations.weight_norm(with_parametrization[0])
    masked = pruned(nn.Sequential(nn.Linear(16, 8)))
    prune.identity(masked[0], "weight")
    spectral = pruned(nn.Sequential(nn.Linear(16, 8)))
    parametrize.register_parametrization(spectral[0], "weight", nn.Identity())
    buffered = mlp()
    buffered[0].register_buffer("calibration", torch.ones(3))
    replaced = mlp()
    replaced[0].forward = lambda x: F.linear(x, replaced[0].weight)
    unused = nn.ModuleDict({"a": mlp(), "b": mlp()})
    unused.forward = lambda x: unused["a"](x)
    attention = pruned(nn.Sequential(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)))
    return {
        "not_pruned": (unpruned, X, "0", "weight is not 2:4: row 0, columns 0-3 hold 4 nonzeros"),
        "subclass": (subclass, X, "0", "its class Doubled is a subclass with a behaviour of its"),
        "weight_norm": (with_parametrization, X, "0", "its weight is parametrized; remove the"),
        "parametrized": (spectral, X, "0", "its weight is parametrized; remove the"),
        "torch_prune": (masked, X, "0", "its weight is computed from weight_mask, weight_orig;"),
        "buffer": (buffered, X, "0", "it also holds calibration, which would be lost"),
        "forward": (replaced, X, "0", "its forward was replaced on this layer alone"),
        "unused": (unused, X, "b.0", "its forward did not run on the example inputs"),
        "embedding": (
            pruned(Embedded()),
            torch.arange(5),
            "head",
            "its weight is shared with embed, which needs it dense",
        ),
        "attention": (
            attention,
            X[None],
            "0.self_attn.out_proj",
            "its class NonDynamicallyQuantizableLinear is a subclass",
        ),
        "encoder_fast_path": (
            attention,
            X[None],
            "0.linear1",
            "its forward did not run on the example inputs, so another module may read its weight",
        ),
    }


@pytest.mark.parametrize(
    "name",
    ["not_pruned", "subclass", "weight_norm", "parametrized", "torch_prune", "buffer", "forward",
     "unused", "embedding", "attention", "encoder_fast_path"],
)  # fmt: skip
def test_left_dense_with_the_reason(name):
    model, inputs, layer, reason = left_dense()[name]
    model.eval()
    with torch.no_grad():
        want = model(inputs)
    report = compress(model, inputs)
    assert reasons(report)[layer].startswith(reason)
    assert not isinstance(model.get_submodule(layer), SparseLinear24)
    with torch.no_grad():
        assert_no_worse_than_dense(model(inputs), want, want.double(), name)
    assert "dense:" in str(report)


def test_old_weight_norm_is_left_dense():
    model = pruned(nn.Sequential(nn.Linear(16, 8)))
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(model[0])
    want = model(X)
    assert reasons(compress(model, X))["0"].startswith("its weight is computed from weight_g, wei")
    assert torch.equal(model(X), want)


def test_ignored_layers_stay_dense():
    model = mlp()
    report = compress(model, X, ignore=("2",))
    assert reasons(report) == {"2": "named in ignore"} and packed_names(report) == ["0"]


# ---- refusals, before anything changed


class Fails(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.rest = nn.Linear(16, 8), nn.Linear(8, 4)

    def forward(self, x):
        raise ArithmeticError(f"after {self.fc(x).shape}")


REFUSED = {
    "unknown_ignore": (mlp, {"ignore": ("2", "head")}, ValueError, r"ignore names no .*'head'"),
    "pattern": (mlp, {"keep": 3}, ValueError, r"keep:group must be one of .* got 3:4"),
    "root": (
        lambda: pruned(nn.Sequential(nn.Linear(16, 8)))[0],
        {},
        ValueError,
        "the model is itself a Linear; use from_dense",
    ),
    "forward_fails": (lambda: pruned(Fails()), {}, ArithmeticError, r"after torch.Size\(\[4, 8"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_anything_changed(name):
    make, options, error, text = REFUSED[name]
    model = make()
    model.train()
    before = everything(model)
    with pytest.raises(error, match=text):
        compress(model, X, **options)
    assert_untouched(model, before)


def test_an_error_at_the_last_layer_changes_nothing(monkeypatch):
    """Packing succeeds for the first layer and fails for the second with no ValueError."""
    plain = SparseLinear24.from_dense

    def second_fails(linear, **pattern):
        if linear.in_features == 8:
            raise MemoryError("no room")
        return plain(linear, **pattern)

    monkeypatch.setattr(SparseLinear24, "from_dense", second_fails)
    model = mlp()
    before = everything(model)
    with pytest.raises(MemoryError, match="no room"):
        compress(model, X)
    assert_untouched(model, before)


def test_decompress_refuses_damage_before_anything_changed():
    model = mlp()
    compress(model, X)
    model[2].meta[0, 0] = 0
    with pytest.raises(ValueError, match="its positions are not ascending"):
        decompress(model)
    assert type(model[0]) is SparseLinear24 and type(model[2]) is SparseLinear24
    with pytest.raises(ValueError, match="the model is itself a SparseLinear24; use its to_dense"):
        decompress(model[0])


# ---- what stays as it was


def test_names_modes_flags_and_attributes_stay():
    model = mlp()
    model.train()
    model[2].eval()
    model[0].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    model[0].note = {"layer": 1}
    biases = [model[0].bias, model[2].bias]
    compress(model, X)
    assert [name for name, _ in model.named_children()] == ["0", "1", "2"]
    assert model.training and model[0].training and not model[2].training
    assert not model[0].values.requires_grad and model[2].values.requires_grad
    assert not model[2].bias.requires_grad and model[0].note == {"layer": 1}
    assert model[0].bias is biases[0] and model[2].bias is biases[1]


def test_hooks_keep_running_and_stay_removable():
    model, ran = mlp(), []
    layer = model[0]
    note = lambda name: lambda *_: ran.append(name)  # noqa: E731
    handles = [
        layer.register_forward_pre_hook(note("pre")),
        layer.register_forward_hook(note("forward")),
        layer.register_forward_hook(lambda *_, **__: ran.append("kwargs"), with_kwargs=True),
        layer.register_full_backward_pre_hook(note("backward_pre")),
        layer.register_full_backward_hook(note("backward")),
        layer.register_state_dict_post_hook(note("state_dict")),
    ]
    compress(model)
    assert not ran
    for kind in (SparseLinear24, nn.Linear):
        assert type(model[0]) is kind
        del ran[:]
        model(X.clone().requires_grad_()).sum().backward()
        model.state_dict()
        names = ["pre", "forward", "kwargs", "backward_pre", "backward", "state_dict"]
        assert ran == names
        if kind is SparseLinear24:
            decompress(model)
    compress(model)
    for handle in handles:
        handle.remove()
    del ran[:]
    model(X.clone().requires_grad_()).sum().backward()
    model.state_dict()
    assert not ran


def test_hooks_see_the_example_inputs_once_and_modes_come_back():
    model, ran = mlp(), []
    model.train()
    model[1].eval()
    model[0].register_forward_hook(lambda m, *_: ran.append((m.training, torch.is_grad_enabled())))
    compress(model, X)
    assert ran == [(False, False)]
    assert [m.training for m in model] == [True, False, True]


def test_batch_norm_statistics_are_not_touched():
    model = pruned(nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8)))
    model.train()
    compress(model, X)
    assert int(model[1].num_batches_tracked) == 0 and not model[1].running_mean.any()


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


@pytest.mark.parametrize("example", [None, torch.zeros(3, 16)], ids=["none", "unbatched"])
def test_layers_whose_weights_may_be_read_stay_dense(example):
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    for linear in (layer.linear1, layer.linear2):
        linear.weight.data = random_24(*linear.weight.shape)
    model = nn.Sequential(nn.Linear(16, 16), layer).eval()
    model[0].weight.data = random_24(16, 16)
    report = compress(model, example)
    assert [r.name for r in report.packed] == ["0"]
    reasons = {r.name: r.reason for r in report.layers if not r.packed}
    assert "fast path of nn.TransformerEncoderLayer" in reasons["1.linear1"]
    with torch.no_grad():
        model(torch.zeros(1, 3, 16))


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


def test_a_layer_that_would_take_more_bytes_packed_stays_dense():
    model = nn.Sequential(nn.Conv2d(3, 16, 3))
    with torch.no_grad():
        model[0].weight[:, 2] = 0  # 2 of 3 channels: 2:4, but padded to 8
    (layer,) = compress(model, torch.zeros(1, 3, 8, 8)).layers
    assert not layer.packed and "bytes" in layer.reason
    assert type(model[0]) is nn.Conv2d


def test_ignore_takes_names_and_regexes_and_no_string():
    model = mlp()
    report = compress(model, X, ignore=["re:[01]"])
    assert [r.name for r in report.layers if r.reason == "named in ignore"] == ["0"]
    with pytest.raises(ValueError, match="ignore must be a list of names, got the string '0'"):
        compress(mlp(), X, ignore="0")
    with pytest.raises(ValueError, match="is no regular expression"):
        compress(mlp(), X, ignore=["re:("])


def test_masks_of_dense_layers_are_kept_beside_packed_ones():
    from slimgemm import pruning

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
