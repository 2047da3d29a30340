"""Channel operators and modules: gradients, opcheck, from and to dense, loading, torch's tools."""

import copy
import math

import pytest
import torch
from helpers import assert_no_worse_than_dense, randn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from slimgemm.kernels.channel_layout import RAGGED, ChannelLayout, channel_layout
from slimgemm.kernels.formats import ChannelIndex, channel_index
from slimgemm.kernels.reference import ACTIVATIONS
from slimgemm.sparse_ops import library_channels as library
from slimgemm.sparse_ops.channels import ChannelConv2d, ChannelLinear

OPS = torch.ops.slimgemm
INS, OUTS = [0, 2, 3, 6], [1, 2, 5, 7, 8]


def channels(ins=INS, outs=OUTS, width_in=8, width_out=9, groups=1):
    """The four arguments that name the channels to an operator."""
    arguments = []
    for index, width in ((ins, width_in), (outs, width_out)):
        kept = None if index is None else channel_index(index, width)
        arguments += library.parts(channel_layout(kept, width, "index", groups))
    return arguments


def leaf(*shape, seed, dtype=torch.float64):
    return randn(*shape, dtype=dtype, seed=seed).requires_grad_()


GEOMETRY = {
    "plain": ([1, 1], [0, 0, 0, 0], [1, 1]),
    "all": ([2, 1], [1, 0, 2, 1], [1, 2]),
}
KINDS = {"ragged": (INS, OUTS), "ranges": (range(1, 5), range(4)), "all": (None, None)}


def gemm_operands(kind, dtype=torch.float64):
    ins, outs = KINDS[kind]
    n, k = 9 if outs is None else len(outs), 8 if ins is None else len(ins)
    tensors = [leaf(3, 8, seed=1, dtype=dtype), leaf(n, k, seed=2, dtype=dtype)]
    return [*tensors, leaf(n, seed=3, dtype=dtype)], channels(ins, outs)


def conv_operands(kind, dtype=torch.float64):
    ins, outs = KINDS[kind]
    n, k = 9 if outs is None else len(outs), 8 if ins is None else len(ins)
    tensors = [leaf(2, 8, 4, 5, seed=1, dtype=dtype), leaf(n, k, 2, 3, seed=2, dtype=dtype)]
    return [*tensors, leaf(n, seed=3, dtype=dtype)], channels(ins, outs)


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_gemm_gradients(kind, act):
    tensors, named = gemm_operands(kind)

    def run(*leaves):
        return library.gemm_channels(*leaves, *named, act)

    assert torch.autograd.gradcheck(run, tensors)
    if act in ("none", "silu", "gelu"):
        assert torch.autograd.gradgradcheck(run, tensors)


@pytest.mark.parametrize("act", ["none", "relu", "silu"])
@pytest.mark.parametrize("geometry", GEOMETRY.values(), ids=GEOMETRY)
@pytest.mark.parametrize("kind", ["ragged", "all"])
def test_conv_gradients(kind, geometry, act):
    tensors, named = conv_operands(kind)

    def run(*leaves):
        return library.conv2d_channels(*leaves, *named, *geometry, 1, act)

    assert torch.autograd.gradcheck(run, tensors, fast_mode=True)
    if act == "none":
        assert torch.autograd.gradgradcheck(run, tensors, fast_mode=True)


def test_grouped_conv_gradients():
    named = channels([0, 3, 4, 6], [1, 3, 6, 7], 8, 8, groups=2)
    tensors = [leaf(1, 8, 4, 3, seed=1), leaf(4, 2, 2, 2, seed=2), leaf(4, seed=3)]

    def run(*leaves):
        return library.conv2d_channels(*leaves, *named, [1, 1], [1, 1, 0, 0], [1, 1], 2, "none")

    assert torch.autograd.gradcheck(run, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, tensors, fast_mode=True)


@pytest.mark.parametrize(("kind", "act"), [("ragged", "gelu"), ("ranges", "none"), ("all", "none")])
def test_opcheck_gemm(kind, act):
    tensors, named = gemm_operands(kind, torch.float32)
    torch.library.opcheck(OPS.gemm_channels.default, (*tensors, *named, act))
    torch.library.opcheck(OPS.gemm_channels.default, (*tensors[:2], None, *named, act))


def test_opcheck_gemm_wgrad():
    dy, x = leaf(3, 9, seed=1), leaf(3, 8, seed=2)
    torch.library.opcheck(OPS.gemm_channels_wgrad.default, (dy, x, *channels()))
    ranges = channels(range(4), range(3, 9))
    torch.library.opcheck(OPS.gemm_channels_wgrad.default, (dy, x, *ranges))


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("kind", ["ragged", "all"])
def test_opcheck_conv(kind, last):
    (x, w, bias), named = conv_operands(kind, torch.float32)
    geometry = (*GEOMETRY["all"], 1)
    if last:
        x = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    y = library.conv2d_channels(x, w, bias, *named, *geometry, "none")
    assert y.is_contiguous(memory_format=torch.channels_last) == last
    dy = torch.ones_like(y).detach().requires_grad_()
    torch.library.opcheck(OPS.conv2d_channels.default, (x, w, bias, *named, *geometry, "silu"))
    torch.library.opcheck(OPS.conv2d_channels_dgrad.default, (dy, w, [4, 5], *named, *geometry))
    torch.library.opcheck(OPS.conv2d_channels_wgrad.default, (dy, x, [2, 3], *named, *geometry))


def test_operators_refuse_on_fake_tensors_too():
    (x, w, bias), named = gemm_operands("ragged", torch.float32)
    (images, kernels, _), _ = conv_operands("ragged", torch.float32)
    x, w, bias, images, kernels = (t.detach().to("meta") for t in (x, w, bias, images, kernels))
    named = [t.to("meta") if isinstance(t, torch.Tensor) else t for t in named]
    with pytest.raises(ValueError, match=r"x must be \[\.\.\., 8\]"):
        library.gemm_channels(x[:, 1:], w, bias, *named, "none")
    with pytest.raises(ValueError, match="act must be one of"):
        library.gemm_channels(x, w, bias, *named, "tanh")
    with pytest.raises(ValueError, match="x must have 8 channels for in_index, got 7"):
        library.conv2d_channels(
            images[:, 1:], kernels, None, *named, [1, 1], [0, 0, 0, 0], [1, 1], 1, "none"
        )


# ---- modules
def zero_channels(module, ins, outs, groups=1):
    """`module` with zeros in in channels `ins` and out channels `outs`."""
    width = module.weight.shape[1]
    with torch.no_grad():
        per_out = module.weight.shape[0] // groups
        for c in ins:
            rows = slice(c // width * per_out, (c // width + 1) * per_out)
            module.weight[rows, c % width] = 0
        module.weight[outs] = 0
        if module.bias is not None:
            module.bias[outs] = 0
    return module


def pruned_linear(bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    return zero_channels(nn.Linear(8, 9, bias=bias, dtype=dtype), [1, 4, 5, 7], [0, 3, 4, 6])


def pruned_conv(groups=1, **options):
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 12, 3, groups=groups, **options)
    ins = [c for c in range(8) if c % (8 // groups) == 1 % (8 // groups)] if groups < 8 else []
    outs = [c for c in range(12) if c % (12 // groups) == 0] if groups < 8 else []
    return zero_channels(conv, ins, outs, groups)


MODULES = {
    "linear": (pruned_linear, (5, 8)),
    "linear_no_bias": (lambda: pruned_linear(bias=False), (2, 3, 8)),
    "conv": (lambda: pruned_conv(padding=1), (2, 8, 5, 4)),
    "conv_strided": (lambda: pruned_conv(stride=2, padding=(1, 0), bias=False), (2, 8, 6, 5)),
    "conv_same": (lambda: pruned_conv(padding="same", dilation=2), (1, 8, 5, 5)),
    "conv_groups": (lambda: pruned_conv(groups=2), (1, 8, 4, 5)),
    "conv_image": (lambda: pruned_conv(groups=4), (8, 4, 5)),
}


def both(name):
    make, shape = MODULES[name]
    dense = make()
    kind = ChannelLinear if isinstance(dense, nn.Linear) else ChannelConv2d
    return dense, kind.from_dense(dense), randn(*shape, seed=1)


@pytest.mark.parametrize("name", MODULES)
def test_module_equals_its_dense_layer(name):
    dense, module, x = both(name)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    exact = copy.deepcopy(dense).double()
    right = x.double().requires_grad_()
    y, same, best = module(leaves[0]), dense(leaves[1]), exact(right)
    assert_no_worse_than_dense(y.detach(), same.detach(), best.detach(), "y")
    dy = randn(*y.shape, seed=2)
    for out, seed in ((y, dy), (same, dy), (best, dy.double())):
        out.backward(seed)
    assert_no_worse_than_dense(leaves[0].grad, leaves[1].grad, right.grad, "dx")
    module.weight.data.copy_(module.weight.grad)
    if module.bias is not None:
        module.bias.data.copy_(module.bias.grad)
    grads = module.to_dense()  # the gradients in the places of the weights
    kept = exact.weight != 0
    assert_no_worse_than_dense(
        grads.weight.detach()[kept], dense.weight.grad[kept], exact.weight.grad[kept], "dw"
    )
    if module.bias is not None:
        kept = exact.bias != 0
        assert_no_worse_than_dense(
            grads.bias.detach()[kept], dense.bias.grad[kept], exact.bias.grad[kept], "db"
        )


@pytest.mark.parametrize("name", MODULES)
def test_to_dense_is_exact(name):
    dense, module, _ = both(name)
    back = module.to_dense()
    assert type(back) is type(dense) and repr(back) == repr(dense)
    assert torch.equal(back.weight, dense.weight)
    assert (back.bias is None) == (dense.bias is None)
    assert back.bias is None or torch.equal(back.bias, dense.bias)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_round_trip_of_any_pattern(data):
    dropped = st.sets(st.integers(0, 7)).map(sorted)
    groups = data.draw(st.sampled_from([1, 2, 4]))
    ins, outs = data.draw(dropped), data.draw(dropped)
    torch.manual_seed(0)
    conv = zero_channels(nn.Conv2d(8, 8, (1, 2), groups=groups), ins, outs, groups)
    if not conv.weight.flatten(1).any(1).all() or ins:
        try:
            module = ChannelConv2d.from_dense(conv)
        except ValueError as refusal:
            # Every group is as wide as the fullest, so nothing can go.
            assert groups > 1 and "there is no channel to drop" in str(refusal)
            return
        assert torch.equal(module.to_dense().weight, conv.weight)
        assert torch.equal(module.to_dense().bias, conv.bias)
        x = randn(1, 8, 2, 3, seed=1)
        torch.testing.assert_close(module(x), conv(x))


def test_found_channels_and_state_dict_keys():
    _, module, _ = both("linear")
    assert module.kept_in.index.tolist() == INS and module.kept_in.width == 8
    assert module.kept_out.index.tolist() == OUTS and module.kept_out.width == 9
    shapes = {key: (t.dtype, tuple(t.shape)) for key, t in module.state_dict().items()}
    assert shapes == {
        "weight": (torch.float32, (5, 4)),
        "bias": (torch.float32, (5,)),
        "in_index": (torch.int64, (4,)),
        "out_index": (torch.int64, (5,)),
    }
    only_in = ChannelLinear.from_dense(pruned_linear(), INS, range(9))
    assert only_in.kept_out.kept == 9
    whole = ChannelConv2d(4, 6, 3)
    assert list(whole.state_dict()) == ["weight", "bias"]
    assert whole.kept_in is None and whole.kept_out is None
    grouped = ChannelConv2d.from_dense(pruned_conv(groups=2))
    assert list(grouped.state_dict()) == ["weight", "bias", "in_index", "out_index"]
    assert grouped.weight.shape == (10, 3, 3, 3)


def test_groups_with_different_numbers_keep_as_many_as_the_fullest():
    conv = zero_channels(nn.Conv2d(8, 4, 1, groups=2), [0, 1, 4], [], 2)
    module = ChannelConv2d.from_dense(conv)
    assert module.kept_in.index.tolist() == [0, 2, 3, 5, 6, 7]
    assert torch.equal(module.to_dense().weight, conv.weight)


def test_a_row_with_a_bias_is_kept_and_a_whole_bias_is_shared():
    linear = zero_channels(nn.Linear(4, 3), [1], [0])
    with torch.no_grad():
        linear.bias[0] = 2.0
    module = ChannelLinear.from_dense(linear)
    assert module.kept_out is None and module.bias is linear.bias
    assert module.to_dense().bias is linear.bias
    with pytest.raises(ValueError, match=r"out channel 0 is dropped but holds 1 nonzeros"):
        ChannelLinear.from_dense(linear, kept_out=[1, 2])


def test_all_zero_layer():
    linear = zero_channels(nn.Linear(4, 3), range(4), range(3))
    module = ChannelLinear.from_dense(linear)
    assert module.weight.shape == (0, 0)
    assert torch.equal(module(randn(2, 4)), torch.zeros(2, 3))
    assert torch.equal(module.to_dense().weight, linear.weight)
    conv = zero_channels(nn.Conv2d(4, 2, 3), range(4), range(2))
    module = ChannelConv2d.from_dense(conv)
    x = randn(1, 4, 5, 5).requires_grad_()
    y = module(x)
    y.sum().backward()
    assert torch.equal(y, torch.zeros(1, 2, 3, 3)) and torch.equal(x.grad, torch.zeros_like(x))


def test_nan_in_dropped_channels_does_not_leak():
    _, module, x = both("linear")
    x[:, [1, 4, 5, 7]] = float("nan")
    y = module(x)
    assert bool(y.isfinite().all())
    assert torch.equal(y[:, [0, 3, 4, 6]], torch.zeros(5, 4))


def test_from_dense_refusals():
    linear = pruned_linear()
    text = r"in channel 2 is dropped but holds 5 nonzeros \(2 such channels in all\); keep it"
    with pytest.raises(ValueError, match=text):
        ChannelLinear.from_dense(linear, kept_in=[0, 3])
    with pytest.raises(ValueError, match=r"out channel 1 is dropped but holds 5 nonzeros"):
        ChannelLinear.from_dense(linear, kept_out=[2, 5, 7, 8])
    with pytest.raises(ValueError, match="there is no channel to drop"):
        ChannelLinear.from_dense(nn.Linear(3, 4))
    with pytest.raises(ValueError, match="there is no channel to drop"):
        ChannelConv2d.from_dense(nn.Conv2d(3, 4, 3))
    with pytest.raises(ValueError, match=r"linear must be a torch\.nn\.Linear, got Conv2d"):
        ChannelLinear.from_dense(nn.Conv2d(3, 4, 3))
    with pytest.raises(ValueError, match=r"conv must be a torch\.nn\.Conv2d, got Linear"):
        ChannelConv2d.from_dense(linear)
    with pytest.raises(ValueError, match="padding_mode must be 'zeros', got 'reflect'"):
        ChannelConv2d.from_dense(pruned_conv(padding=1, padding_mode="reflect"))


def test_constructor_refusals():
    with pytest.raises(ValueError, match=r"kept_in must be in 0\.\.7, got 8 at place 1"):
        ChannelLinear(8, 4, kept_in=[0, 8])
    with pytest.raises(ValueError, match="kept_out must be ascending without repeats"):
        ChannelLinear(8, 4, kept_out=torch.tensor([2, 1]))
    with pytest.raises(ValueError, match="kept_in must be an index of 8 channels, got one of 6"):
        ChannelLinear(8, 4, kept_in=channel_index([0], 6))
    with pytest.raises(ValueError, match="kept_in must keep the same number of channels in each"):
        ChannelConv2d(8, 4, 3, groups=2, kept_in=[0, 1, 4])
    with pytest.raises(ValueError, match="groups must divide 8 in and 5 out channels, got 2"):
        ChannelConv2d(8, 5, 3, groups=2)
    with pytest.raises(ValueError, match="padding_mode must be 'zeros', got 'circular'"):
        ChannelConv2d(8, 4, 3, padding_mode="circular")


BAD_INDEX = {
    "negative": ([-1, 2, 3, 6], r"in_index must be in 0\.\.7, got -1 at place 0"),
    "outside": ([0, 2, 3, 8], r"in_index must be in 0\.\.7, got 8 at place 3"),
    "repeated": ([0, 2, 2, 6], "in_index must be ascending without repeats, got 2 after 2"),
    "unsorted": ([0, 3, 2, 6], "in_index must be ascending without repeats, got 2 after 3"),
    "dtype": (torch.tensor(INS, dtype=torch.int32), r"in_index must be int64, got torch\.int32"),
    "size": ([0, 2, 3], "size mismatch for 0.in_index"),
}


@pytest.mark.parametrize(("index", "text"), BAD_INDEX.values(), ids=BAD_INDEX)
@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
def test_loading_refuses_a_bad_index(index, text, assign):
    _, module, x = both("linear")
    before = module(x)
    state = {f"0.{key}": t.clone() for key, t in module.state_dict().items()}
    state["0.in_index"] = torch.as_tensor(index)
    with pytest.raises(RuntimeError, match=text):
        nn.Sequential(module).load_state_dict(state, assign=assign)
    assert module.kept_in.index.tolist() == INS and torch.equal(module(x), before)


def test_loading_a_grouped_index_that_crosses_groups_is_refused():
    module = ChannelConv2d.from_dense(pruned_conv(groups=2))
    state = module.state_dict()
    state["in_index"] = torch.tensor([0, 1, 2, 3, 4, 5])
    with pytest.raises(RuntimeError, match="in_index must keep the same number of channels"):
        module.load_state_dict(state)


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
def test_state_dict_round_trip_changes_the_kind_of_index(assign):
    _, module, x = both("linear")
    other = ChannelLinear(8, 9, kept_in=range(4), kept_out=range(2, 7))  # ranges: no index is read
    other.load_state_dict(copy.deepcopy(module.state_dict()), assign=assign)
    assert torch.equal(other(x), module(x))
    back = ChannelLinear(8, 9, kept_in=INS, kept_out=OUTS)
    ranges = ChannelLinear(8, 9, kept_in=range(4), kept_out=range(2, 7))
    back.load_state_dict(ranges.state_dict(), assign=assign)
    assert torch.equal(back(x), ranges(x))


def test_meta_device_then_load():
    _, module, x = both("conv")
    with torch.device("meta"):
        empty = ChannelConv2d(
            8, 12, 3, padding=1, kept_in=module.kept_in.index, kept_out=module.kept_out.index
        )
    assert empty.in_index.is_meta and empty.weight.is_meta
    empty.load_state_dict(module.state_dict(), assign=True)
    assert torch.equal(empty(x), module(x))


def test_new_module_starts_as_torch_does():
    torch.manual_seed(0)
    module = ChannelLinear(64, 32, kept_in=range(0, 64, 4))
    bound = 1 / math.sqrt(16)
    for parameter in (module.weight, module.bias):
        assert 0.5 * bound < float(parameter.abs().max()) <= bound
    assert ChannelLinear(8, 4, bias=False).bias is None
    assert ChannelLinear(8, 4, dtype=torch.float16).weight.dtype == torch.float16


def test_repr_says_kept_and_bytes():
    _, module, _ = both("linear")
    # 5 x 4 weights and 5 biases of 4 bytes, 9 indices of 8; dense 9 x 8 weights and 9 biases
    assert repr(module) == (
        "ChannelLinear(in_features=8, out_features=9, bias=True, kept in 4 of 8, "
        "kept out 5 of 9, 172 bytes (dense 324))"
    )
    conv = repr(both("conv_groups")[1])
    assert conv.startswith(
        "ChannelConv2d(8, 12, kernel_size=(3, 3), groups=2, bias=True, kept in 6"
    )


@pytest.mark.parametrize("name", ["linear", "conv", "conv_groups"])
def test_compile_and_export(name):
    _, module, x = both(name)
    eager = [x.clone().requires_grad_() for _ in range(2)]
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    y, same = compiled(eager[0]), module(eager[1])
    torch.testing.assert_close(y, same)
    y.sum().backward()
    same.sum().backward()
    torch.testing.assert_close(eager[0].grad, eager[1].grad)
    exported = torch.export.export(module, (x,)).module()
    torch.testing.assert_close(exported(x), module(x))


def test_dynamic_batch():
    _, module, x = both("conv")
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (2, 3, 5):
        images = x[:1].expand(batch, -1, -1, -1)
        torch.testing.assert_close(compiled(images), module(images))


@pytest.mark.parametrize("name", ["linear", "conv"])
def test_autocast_casts_as_the_dense_layer_does(name):
    dense, module, x = both(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, same = module(x), dense(x)
    assert y.dtype == same.dtype == torch.bfloat16
    exact = copy.deepcopy(dense).double()(x.double())
    assert_no_worse_than_dense(y.detach(), same.detach(), exact.detach(), name)
    y.float().sum().backward()
    assert module.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("name", ["linear", "conv"])
def test_torch_tools(name):
    _, module, x = both(name)
    y = module(x)
    twin = copy.deepcopy(module)
    assert torch.equal(twin(x), y) and twin.weight is not module.weight
    state = dict(module.state_dict())
    doubled = {**state, "weight": state["weight"] * 2, "bias": state["bias"] * 2}
    torch.testing.assert_close(torch.func.functional_call(module, doubled, (x,)), 2 * y)
    half = copy.deepcopy(module).to(torch.float64)
    assert half.in_index.dtype == torch.int64 and half(x.double()).dtype == torch.float64
    with torch.no_grad():
        assert torch.equal(module(x), y)
    module.requires_grad_(False)
    assert not module(x).requires_grad
    assert module.to("meta").kept_in.index.is_meta


def test_train_state_and_requires_grad_follow():
    linear = pruned_linear().eval().requires_grad_(False)
    module = ChannelLinear.from_dense(linear)
    assert not module.training and not module.weight.requires_grad and not module.bias.requires_grad
    back = module.to_dense()
    assert not back.training and not back.weight.requires_grad


def test_a_layer_used_twice_adds_its_gradients():
    module = ChannelLinear(6, 6, kept_in=[0, 2, 3], kept_out=[1, 2, 3])
    x = randn(4, 6, seed=1)
    module(module(x)).sum().backward()
    dense = module.to_dense()
    dense(dense(x)).sum().backward()
    torch.testing.assert_close(module.weight.grad, dense.weight.grad[[1, 2, 3]][:, [0, 2, 3]])


def test_unchecked_layout_is_refused_by_the_operator():
    layout = ChannelLayout(torch.tensor([0, 1]), 8, 2, 0, RAGGED)
    with pytest.raises(ValueError, match="in_index must keep 4 channels as the weight, got 2"):
        library.gemm_channels(
            randn(1, 8), randn(5, 4), None, *library.parts(layout), *channels()[2:], "none"
        )
    assert isinstance(ChannelLinear(4, 4, kept_in=[1]).kept_in, ChannelIndex)
