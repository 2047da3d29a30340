"""SparseConv2d24 and its operators: contract, gradients, and all that torch does to a layer."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_no_worse_than_dense, randn, random_24
from torch import nn

from slimgemm.kernels.formats import PATTERNS
from slimgemm.sparse_ops import library_conv
from slimgemm.sparse_ops.conv import SparseConv2d24

# name: arguments of nn.Conv2d, input shape
LAYERS = {
    "one_by_one": ((16, 8, 1), {}, (2, 16, 3, 4)),
    "three": ((8, 5, 3), {"padding": 1}, (2, 8, 4, 5)),
    "stride": ((6, 4, (3, 2)), {"stride": (2, 3), "padding": (1, 0)}, (1, 6, 7, 8)),
    "dilation": ((4, 4, 3), {"dilation": 2, "padding": "same"}, (1, 4, 5, 4)),
    "same_even": ((4, 3, (2, 4)), {"padding": "same", "bias": False}, (1, 4, 3, 5)),
    "depthwise": ((3, 6, 3), {"groups": 3, "padding": "valid"}, (2, 3, 4, 4)),
    "groups": ((10, 4, 2), {"groups": 2}, (1, 10, 3, 3)),
    "empty": ((4, 3, 2), {}, (0, 4, 3, 3)),
}
layers = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())


def sparse(arguments, options, dtype=torch.float32, device="cpu", **pattern):
    torch.manual_seed(1)
    return SparseConv2d24(*arguments, **options, dtype=dtype, device=device, **pattern)


def small(dtype=torch.float32, device="cpu"):
    """A layer and an input for it."""
    module = sparse((6, 4, 3), {"padding": 1, "stride": 2}, dtype, device)
    return module, randn(2, 6, 5, 4, dtype=dtype, seed=2, device=device)


def operator_arguments(dtype=torch.float64, act="none", device="cpu"):
    """Arguments of the operators conv2d_24, its dgrad and its wgrad, all requiring gradients."""
    module, x = small(dtype, device)
    geometry = (module.weight_shape, module.stride, (1, 0, 2, 1), module.dilation, 1, 2, 4)
    x, values, bias = (t.detach().requires_grad_() for t in (x, module.values, module.bias))
    with torch.no_grad():
        y = library_conv.conv2d_24(x, values, module.meta, bias, *geometry, act)
    dy = randn(*y.shape, dtype=dtype, seed=3, device=device).requires_grad_()
    return (
        (x, values, module.meta, bias, *geometry, act),
        (dy, values, module.meta, x.shape, *geometry),
        (dy, x, values, module.meta, *geometry),
    )


# ---- operators

NAMES = ("conv2d_24", "conv2d_24_dgrad", "conv2d_24_wgrad")
OPERATORS = [getattr(torch.ops.slimgemm, name).default for name in NAMES]


@pytest.mark.parametrize("index", range(3), ids=NAMES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_operators_pass_opcheck(index, layout, device):
    arguments = [
        t.detach().contiguous(memory_format=layout).requires_grad_()
        if isinstance(t, torch.Tensor) and t.ndim == 4
        else t
        for t in operator_arguments(torch.float32, device=device)[index]
    ]
    torch.library.opcheck(OPERATORS[index], arguments)


@pytest.mark.parametrize("index", range(3), ids=NAMES)
def test_gradients_and_double_gradients_in_float64(index):
    arguments = operator_arguments()[index]
    places = [i for i, t in enumerate(arguments) if getattr(t, "requires_grad", False)]

    def call(*tensors):
        given = list(arguments)
        for place, tensor in zip(places, tensors, strict=True):
            given[place] = tensor
        return OPERATORS[index](*given)

    tensors = [arguments[place] for place in places]
    assert torch.autograd.gradcheck(call, tensors)
    assert torch.autograd.gradgradcheck(call, tensors, fast_mode=True)


@pytest.mark.parametrize("act", ["relu", "gelu", "gelu_tanh", "silu", "relu2"])
def test_gradients_of_activations_in_float64(act):
    x, values, meta, bias, *rest = operator_arguments(act=act)[0]

    def call(x, values, bias):
        return library_conv.conv2d_24(x, values, meta, bias, *rest)

    assert torch.autograd.gradcheck(call, (x, values, bias), fast_mode=True)
    assert torch.autograd.gradgradcheck(call, (x, values, bias), fast_mode=True)


def test_operators_refuse_what_does_not_fit():
    module, x = small()
    geometry = (module.weight_shape, (1, 1), (0, 0, 0, 0), (1, 1), 1, 2, 4)
    call = functools.partial(library_conv.conv2d_24, meta=module.meta, bias=None, act="none")
    names = ("weight_shape", "stride", "padding", "dilation", "groups", "keep", "group")
    options = dict(zip(names, geometry, strict=True))
    with pytest.raises(ValueError, match=r"x must be .B, 6, H, W. for this weight"):
        call(x[:, :5], module.values, **options)
    with pytest.raises(ValueError, match=r"x must be torch.float32 on cpu as the weight"):
        call(x.double(), module.values, **options)
    with pytest.raises(ValueError, match="x of 2 x 4 pixels must not be smaller than the kernel"):
        call(x[:, :, :2], module.values, **options)
    with pytest.raises(ValueError, match=r"dy must be .2, 4, 3, 2. for an input"):
        library_conv.conv2d_24_dgrad(
            torch.zeros(2, 4, 2, 2), module.values, module.meta, x.shape, *geometry
        )
    with pytest.raises(ValueError, match=r"dy must be .2, 4, 3, 2. for an input"):
        library_conv.conv2d_24_wgrad(
            torch.zeros(2, 4, 2, 2), x, module.values, module.meta, *geometry
        )


# ---- the module beside nn.Conv2d


@layers
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_dense_and_back_is_exact(layer, pattern, device):
    arguments, options, _ = layer
    module = sparse(arguments, options, torch.float16, device, keep=pattern[0], group=pattern[1])
    dense = module.to_dense()
    again = SparseConv2d24.from_dense(dense, keep=pattern[0], group=pattern[1])
    assert torch.equal(again.values, module.values) and torch.equal(again.meta, module.meta)
    assert again.bias is dense.bias is module.bias
    assert torch.equal(again.to_dense().weight, dense.weight)
    assert repr(dense) == repr(nn.Conv2d(*arguments, **options))


@layers
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_outputs_and_gradients_match_float64(layer, dtype, device):
    arguments, options, shape = layer
    module = sparse(arguments, options, dtype, device)
    dense = module.to_dense()
    exact = copy.deepcopy(dense).double()
    x = randn(*shape, dtype=dtype, seed=2, device=device)
    results = []
    for layer_ in (module, dense, exact):
        layer_.zero_grad()
        mine = x.detach().to(torch.float64 if layer_ is exact else dtype).requires_grad_()
        y = layer_(mine)
        y.backward(randn(*y.shape, dtype=dtype, seed=3, device=device).to(y.dtype))
        weight = module.values if layer_ is module else layer_.weight
        bias = [] if layer_.bias is None else [layer_.bias.grad]
        results.append([y.detach(), mine.grad, weight.grad, *bias])
    kept = SparseConv2d24.from_dense(nn_conv_of(module, torch.ones_like(module.values)))
    got = results[0]
    got[2] = nn_conv_of(module, got[2]).weight.detach()
    mask = kept.to_dense().weight.detach().bool()
    for result in results[1:]:
        result[2] = result[2] * mask
    for name, g, d, e in zip(("y", "dx", "dw", "db"), *results, strict=False):
        assert_no_worse_than_dense(g, d, e, name)


def nn_conv_of(module, values):
    """The nn.Conv2d of `module` with other stored values."""
    other = copy.deepcopy(module)
    other.values = nn.Parameter(values.detach().clone())
    return other.to_dense()


def test_a_new_layer_has_the_bounds_and_zeros_of_its_pattern(device):
    for keep, group in PATTERNS:
        module = sparse((24, 16, 3), {}, device=device, keep=keep, group=group)
        weight = module.to_dense().weight.detach()
        bound = 1 / (24 * 9) ** 0.5
        assert 0.9 * bound < float(weight.abs().max()) <= bound
        assert float(module.bias.detach().abs().max()) <= bound
        groups = (weight != 0).permute(0, 2, 3, 1).reshape(-1, group)
        assert int(groups.sum(-1).max()) == keep
    torch.manual_seed(1)
    first = SparseConv2d24(8, 8, 3)
    torch.manual_seed(1)
    assert torch.equal(first.values, SparseConv2d24(8, 8, 3).values)


def test_one_image_without_a_batch():
    module, x = small()
    assert torch.equal(module(x[0]), module.to_dense()(x[0]))
    assert module(x[0]).shape == module(x).shape[1:]


def test_repr_says_pattern_and_bytes():
    module = SparseConv2d24(16, 8, 3, stride=2, padding=1, keep=1, group=8)
    assert repr(module) == (
        "SparseConv2d24(16, 8, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), bias=True, "
        "kept 1 of 8, 720 bytes (dense 4608))"
    )


REFUSED = {
    "padding_mode must be 'zeros', got 'circular'; pad in front": {"padding_mode": "circular"},
    "groups must divide the 6 in channels, got 4": {"groups": 4},
    "groups must divide the 4 out channels, got 3": {"groups": 3},
    "keep:group must be one of": {"keep": 3},
    "padding 'same' must have stride 1": {"padding": "same", "stride": 2},
    "padding must be one or two integers": {"padding": (1, 2, 3, 4)},
    "kernel_size must be one or two integers of at least 1": {"kernel_size": 0},
}


@pytest.mark.parametrize("text", REFUSED)
def test_bad_arguments_are_refused(text):
    arguments = {"in_channels": 6, "out_channels": 4, "kernel_size": 3} | REFUSED[text]
    with pytest.raises(ValueError, match=text):
        SparseConv2d24(**arguments)


def test_from_dense_refuses_what_is_not_pruned_and_changes_nothing():
    dense = nn.Conv2d(8, 4, 3)
    before = copy.deepcopy(dense.state_dict())
    with pytest.raises(ValueError, match=r"out channel 0, tap .0, 0., input channels 0-3 hold 4 "):
        SparseConv2d24.from_dense(dense)
    assert all(torch.equal(v, before[k]) for k, v in dense.state_dict().items())
    with pytest.raises(ValueError, match=r"conv must be a torch.nn.Conv2d, got Linear"):
        SparseConv2d24.from_dense(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="padding_mode must be 'zeros'"):
        SparseConv2d24.from_dense(nn.Conv2d(4, 4, 1, padding_mode="reflect"))


def test_from_dense_keeps_what_is_frozen_and_the_mode():
    dense = sparse((8, 4, 3), {}).to_dense().eval().requires_grad_(False)
    module = SparseConv2d24.from_dense(dense)
    assert not module.training and not module.values.requires_grad and not module.bias.requires_grad
    assert not module.to_dense().weight.requires_grad


# ---- state


def test_state_dict_has_the_documented_keys_and_round_trips():
    module, x = small()
    state = module.state_dict()
    assert list(state) == ["values", "bias", "meta"]
    assert state["values"].shape == (4, 9 * 4) and state["meta"].shape == (4, 9)
    other = SparseConv2d24(6, 4, 3, padding=1, stride=2)
    other.load_state_dict(state)
    assert torch.equal(other(x), module(x))


def test_damaged_metadata_is_refused_and_nothing_is_loaded():
    module, x = small()
    before = module(x)
    state = copy.deepcopy(module.state_dict())
    state["meta"][2, 5] = 0xFF
    state["values"].zero_()
    with pytest.raises(RuntimeError, match="meta is not valid in 1 bytes: row 2, byte 5"):
        module.load_state_dict(state)
    assert torch.equal(module(x), before)


def test_values_of_channels_that_do_not_exist_are_refused():
    module, x = small()
    before = module(x)
    state = copy.deepcopy(module.state_dict())
    state["values"][1, 3] = 1  # channels 4-7 of the first tap; the layer has 6
    state["meta"][1, 0] = 0b11_00_01_00
    with pytest.raises(RuntimeError, match="1 values lie past the 6 input channels of a tap"):
        module.load_state_dict(state)
    assert torch.equal(module(x), before)


def test_copies_dtypes_and_functional_calls():
    module, x = small()
    twin = copy.deepcopy(module)
    twin.values.data.zero_()
    assert float(module.values.detach().abs().max()) > 0
    half = copy.deepcopy(module).to(torch.float16)
    assert half.meta.dtype == torch.uint8 and half(x.half()).dtype == torch.float16
    doubled = {"values": module.values * 2, "bias": module.bias * 2}
    y = torch.func.functional_call(module, doubled, (x,))
    assert torch.equal(y, module(x) * 2)


def test_training_switches():
    module, x = small()
    with torch.no_grad():
        assert not module(x).requires_grad
    module.requires_grad_(False)
    assert not module(x).requires_grad
    y = module(x.requires_grad_())
    y.sum().backward()
    assert x.grad is not None and module.values.grad is None
    module.requires_grad_(True)
    seen = []
    module.values.register_hook(lambda grad: seen.append(grad.shape))
    module.zero_grad()
    (module(x) + module(2 * x)).sum().backward()
    once = module.values.grad.clone()
    module.zero_grad()
    module(x).sum().backward()
    module(2 * x).sum().backward()
    torch.testing.assert_close(once, module.values.grad)
    assert set(seen) == {module.values.shape}


def test_autocast_casts_as_the_dense_layer_does():
    module, x = small()
    dense = module.to_dense()
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
        arguments = (module.values, module.meta, module.bias, module.weight_shape)
        plain = library_conv.conv2d_24(x, *arguments, (2, 2), (1,) * 4, (1, 1), 1, 2, 4, "none")
        assert y.dtype == dense(x).dtype == torch.bfloat16
        assert plain.dtype == torch.float32
        y.float().sum().backward()
    assert module.values.grad.dtype == torch.float32
    low = F.conv2d(x.bfloat16(), dense.weight.bfloat16(), dense.bias.bfloat16(), 2, 1)
    exact = F.conv2d(x.double(), dense.weight.double(), dense.bias.double(), 2, 1)
    assert_no_worse_than_dense(y.detach(), low.detach(), exact.detach(), "autocast")


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_compile_without_graph_breaks(layout):
    module, x = small()
    x = x.contiguous(memory_format=layout)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for batch in (x, x[:1], torch.cat([x, x])):
        assert torch.equal(compiled(batch), module(batch))
    compiled(x).square().sum().backward()
    grad = module.values.grad.clone()
    module.zero_grad()
    module(x).square().sum().backward()
    torch.testing.assert_close(grad, module.values.grad)


def test_export_with_any_batch():
    module, x = small()
    model = nn.Sequential(module, nn.ReLU())
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    more = torch.cat([x, x, x])
    assert torch.equal(exported.module()(more), model(more))


def test_random_24_weights_of_a_dense_layer_are_taken():
    dense = nn.Conv2d(12, 4, 3)
    rows = random_24(4 * 9, 12, seed=5).view(4, 3, 3, 12).permute(0, 3, 1, 2)
    dense.weight.data.copy_(rows)
    assert torch.equal(SparseConv2d24.from_dense(dense).to_dense().weight, dense.weight)
