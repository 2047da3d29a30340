"""compress: what is swapped, what is left and why, and that nothing else changes."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_no_worse_than_dense, randn, random_24
from swap_cases import X, assert_untouched, everything, mlp, packed_names, pruned, reasons
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from slimgemm import pruning
from slimgemm.kernels import dispatch, tune_table
from slimgemm.kernels.timing import Times
from slimgemm.sparse_ops import (
    CompressReport,
    LayerReport,
    SparseLinear24,
    compress,
    decompress,
    swap,
)
from slimgemm.sparse_ops.swap import seen_inputs

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


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x):
        return self.mix(x, x, x)[0]


# model, example input, layer, why compress leaves it dense although the plan pruned it
MORE_BYTES = r"packed it would take {} bytes, dense it takes {}: a swap must save at least 10 %"
PRUNED_AND_DENSE = {
    "stem_of_3_channels": (
        lambda: nn.Sequential(nn.Conv2d(3, 16, 3)), (1, 3, 8, 8), "0", (2448, 1728)
    ),
    "tiny_layer": (lambda: nn.Sequential(nn.Linear(4, 4)), (1, 4), "0", (68, 64)),
    "depthwise": (
        lambda: nn.Sequential(nn.Conv2d(8, 8, 3, groups=8)), (1, 8, 8, 8), "0", (1224, 288)
    ),
    "attention_projection": (Attends, (1, 3, 16), "mix.out_proj", None),
}  # fmt: skip


@pytest.mark.parametrize("name", PRUNED_AND_DENSE)
def test_what_a_plan_may_prune_and_compress_leaves_dense_is_reported(name):
    make, shape, layer, sizes = PRUNED_AND_DENSE[name]
    model, x = make().eval(), randn(*shape)
    module = model.get_submodule(layer)
    pruning.plan(model, x, pattern=pruning.NofM(2, 4)).apply(model)
    with torch.no_grad():
        want = model(x)
    report = compress(model, x)
    (reason,) = (found.reason for found in report.layers if found.name == layer)
    if sizes is None:
        text = "its class NonDynamicallyQuantizableLinear is a subclass with a behaviour of its own"
        assert reason == text
    else:
        assert reason == MORE_BYTES.format(*sizes)
    assert model.get_submodule(layer) is module and not report.packed
    with torch.no_grad():
        assert torch.equal(model(x), want)
    assert "dense:" in str(report)


def fake_time_us(us, capturable, asked):
    """time_us that measures nothing: `us` of dense and packed."""

    def time_us(calls, device, *, graph=False):
        asked.append((graph, [call().shape for call in calls.values()]))
        if graph and not capturable:
            raise RuntimeError("operation not permitted when stream is capturing")
        return {name: Times(0.0, t, 9.0) for name, t in zip(calls, us, strict=True)}

    return time_us


@pytest.mark.parametrize("capturable", [True, False], ids=["graph", "eager"])
def test_layers_are_timed_in_graphs_and_in_eager_calls_where_that_fails(capturable, monkeypatch):
    asked = []
    monkeypatch.setattr(swap, "time_us", fake_time_us((7.0, 5.0), capturable, asked))
    dense = mlp()[0]
    times = swap.times_of(dense, SparseLinear24.from_dense(dense), X.half())
    assert times == (7.0, 5.0, "graph" if capturable else "eager")
    shapes = [torch.Size([4, 8])] * 2
    assert asked == [(True, shapes)] + ([] if capturable else [(False, shapes)])


def test_the_report_says_how_layers_were_timed():
    row = LayerReport("a", "2:4", (8, 16), True, "", 512, 272, 7.0, 5.0, "graph")
    text = str(CompressReport([row]))
    assert "Times are medians with L2 cold, in captured CUDA graphs." in text and "5.0" in text
    eager = dataclasses.replace(row, name="b", timing="eager")
    text = str(CompressReport([row, eager]))
    assert "in captured CUDA graphs; in eager calls, as no graph could be captured: b." in text
    assert "Times" not in str(CompressReport([dataclasses.replace(row, timing="")]))


def test_ignore_takes_names_and_regexes_and_no_string():
    model = mlp()
    report = compress(model, X, ignore=["re:[01]"])
    assert [r.name for r in report.layers if r.reason == "named in ignore"] == ["0"]
    with pytest.raises(ValueError, match="ignore must be a list of names, got the string '0'"):
        compress(mlp(), X, ignore="0")
    with pytest.raises(ValueError, match="is no regular expression"):
        compress(mlp(), X, ignore=["re:("])


# ---- tuning


def test_a_gpu_that_was_not_tuned_is_told_of_once(monkeypatch):
    asked = []
    note = "`slimgemm tune` was not run on this GPU"
    monkeypatch.setattr(swap, "untuned", lambda device: asked.append(device) or note)
    report = compress(mlp(), X)
    assert len(report.packed) == 2 and asked == [torch.device("cpu")]
    assert report.note == note and str(report).count(note) == 1
    monkeypatch.setattr(swap, "untuned", lambda device: "")
    assert "tune" not in str(compress(mlp(), X))


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_the_sentence_of_a_gpu_without_a_table_ends_the_report(monkeypatch, kind, tmp_path):
    """From the report down to the search for a table; only the GPU itself is a fake."""
    gpu = torch.device("cuda", 0)
    here = {"gpu": "NVIDIA Test 9000", "torch": "2", "triton": "3", "slimgemm": "0"}
    here["compute_capability"] = "9.0"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tune_table, "here", lambda device: here)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: here["gpu"])
    monkeypatch.setattr(swap, "untuned", lambda device: dispatch.untuned(gpu))
    weight = torch.randn(16, 64, 1, 1)
    weight[:, ::2] = 0
    model = mlp() if kind == "linear" else nn.Sequential(nn.Conv2d(64, 16, 1))
    if kind == "convolution":
        model[0].weight.data = weight
    dispatch.reload()
    try:
        text = str(compress(copy.deepcopy(model)))
        assert "`slimgemm tune` was not run on this GPU (NVIDIA Test 9000)" in text
        assert "2:4 layers run on the portable kernels, without sparse tensor cores." in text
        tune_table.save(tune_table.Table(here), tune_table.user_path(here))
        dispatch.reload()
        assert "slimgemm tune" not in str(compress(model))
    finally:
        dispatch.reload()


def test_a_layer_that_lost_its_timing_is_told_of_too(monkeypatch):
    """Tuning may turn it."""
    monkeypatch.setattr(swap, "untuned", lambda device: "not tuned")
    lost = swap.Choice(None, "dense is faster on this GPU", 1.0, 2.0)
    monkeypatch.setattr(swap, "choose", lambda *args: lost)
    assert compress(mlp(), X).note == "not tuned"
    monkeypatch.setattr(swap, "choose", lambda *args: swap.Choice(None, "not 2:4"))
    assert compress(mlp(), X).note == ""
