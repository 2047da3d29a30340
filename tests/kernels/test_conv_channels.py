"""conv2d_channels and its two gradients: twin, geometry, groups, guards and refusals."""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_no_worse_than_dense, randn
from hypothesis import given, settings
from hypothesis import strategies as st

from slimgemm.kernels.channel_layout import RAGGED, RANGE, ChannelLayout
from slimgemm.kernels.configs import Tile
from slimgemm.kernels.conv_channels import conv2d_channels, conv2d_channels_dgrad, per_tap
from slimgemm.kernels.conv_channels_wgrad import conv2d_channels_wgrad
from slimgemm.kernels.formats import ChannelIndex, channel_index
from slimgemm.kernels.reference_channels import (
    conv2d_channels_dgrad_ref,
    conv2d_channels_ref,
    conv2d_channels_wgrad_ref,
    conv_geometry,
    memory_format,
)

TILE = Tile(16, 16, 16)
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
RAGGED_IN, RAGGED_OUT = [0, 3, 4, 9], [1, 2, 7, 8, 10]
BLOCKED = [*range(8, 16), *range(24, 32)]
# name: x shape, out width, kernel, kept in, kept out, options, split
SHAPES = {
    "exact": ((1, 16, 4, 4), 16, (1, 1), None, None, {}, 1),
    "ragged": ((2, 10, 5, 4), 11, (3, 3), RAGGED_IN, RAGGED_OUT, {"padding": 1}, 1),
    "blocked": ((1, 40, 3, 5), 40, (1, 1), BLOCKED, BLOCKED, {}, 2),
    "range": ((1, 40, 4, 4), 20, (2, 3), range(3, 22), range(4, 9), {}, 1),
    "stride": ((1, 10, 7, 6), 11, (3, 2), RAGGED_IN, RAGGED_OUT, {"stride": (2, 3)}, 2),
    "dilation": ((1, 10, 7, 6), 11, (3, 2), RAGGED_IN, None, {"dilation": (2, 3)}, 1),
    "everything": (
        (2, 10, 7, 5), 11, (2, 3), RAGGED_IN, RAGGED_OUT,
        {"stride": (3, 2), "padding": (2, 1), "dilation": (1, 2)}, 1,
    ),
    "same_even": ((1, 10, 4, 3), 11, (4, 2), RAGGED_IN, RAGGED_OUT, {"padding": "same"}, 1),
    "four_paddings": ((1, 10, 3, 3), 11, (3, 3), None, RAGGED_OUT, {"padding": (2, 0, 1, 3)}, 1),
    "one_pixel": ((1, 10, 1, 1), 11, (1, 1), RAGGED_IN, RAGGED_OUT, {}, 1),
    "no_images": ((0, 10, 4, 4), 11, (3, 3), RAGGED_IN, RAGGED_OUT, {}, 1),
    "groups": (
        (1, 8, 4, 4), 12, (3, 3), [0, 3, 4, 6], [1, 5, 6, 11], {"groups": 2, "padding": 1}, 1,
    ),
    "depthwise": ((1, 6, 5, 4), 6, (3, 3), [0, 3, 5], [1, 2, 4], {"groups": 3, "padding": 1}, 2),
    "many": ((2, 20, 4, 5), 24, (1, 2), range(0, 18), range(2, 20), {"stride": 1}, 2),
}  # fmt: skip


def make(shape, dtype, device, channels_last=False):
    size, out, kernel, kept_in, kept_out, options, _ = shape
    groups = options.get("groups", 1)
    ins, outs = (
        None if kept is None else channel_index(torch.tensor(list(kept), device=device), width)
        for kept, width in ((kept_in, size[1]), (kept_out, out))
    )
    x = randn(*size, dtype=dtype, seed=1, device=device)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    k = size[1] if ins is None else ins.kept
    n = out if outs is None else outs.kept
    w = randn(n, k // groups, *kernel, dtype=dtype, seed=2, device=device)
    return x, w, randn(n, dtype=dtype, seed=3, device=device), ins, outs


def dense_weight(w, ins, outs, in_width, out_width, groups):
    """The dense weight whose dropped channels are zero; differentiable."""
    kept_in = list(range(in_width)) if ins is None else ins.index.tolist()
    kept_out = list(range(out_width)) if outs is None else outs.index.tolist()
    dense = w.new_zeros(out_width, in_width // groups, *w.shape[2:])
    per_in, per_out = len(kept_in) // groups, len(kept_out) // groups
    for n, out in enumerate(kept_out):
        group = n // per_out
        places = [c % (in_width // groups) for c in kept_in[group * per_in : (group + 1) * per_in]]
        dense[out, places] = w[n]
    return dense


def dense_products(x, w, bias, dy, ins, outs, out_width, options):
    """y, dx, dw, db by torch's dense convolution and autograd."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, w, bias)]
    x, w, bias = leaves
    options = {"groups": 1, **options}
    dense = dense_weight(w, ins, outs, x.shape[1], out_width, options["groups"])
    kept_out = slice(None) if outs is None else outs.index
    wide_bias = bias.new_zeros(out_width)
    wide_bias[kept_out] = bias
    padding = options.pop("padding", 0)
    if isinstance(padding, tuple) and len(padding) == 4:
        top, bottom, left, right = padding
        x, padding = F.pad(x, (left, right, top, bottom)), 0
    y = F.conv2d(x, dense, wide_bias, padding=padding, **options)
    y.backward(dy.to(y.dtype))
    return y.detach(), leaves[0].grad, leaves[1].grad


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # torch's own
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_all_three_products_match_float64(shape, dtype, device):
    size, out, kernel, _, _, options, split = shape
    channels_last = dtype == torch.float16
    x, w, bias, ins, outs = make(shape, dtype, device, channels_last)
    y = conv2d_channels(x, w, ins, outs, bias, **options, tile=TILE, split=split)
    assert y.is_contiguous(memory_format=memory_format(x))
    dy = randn(*y.shape, dtype=dtype, seed=4, device=device)
    common = {**options, "tile": TILE, "split": split}
    dx = conv2d_channels_dgrad(dy, w, size[2:], ins, outs, **common)
    dw = conv2d_channels_wgrad(dy, x, kernel, ins, outs, **common)
    rest = (ins, outs, out, options)
    dense = dense_products(x, w, bias, dy, *rest)
    exact = dense_products(*(t.double() for t in (x, w, bias, dy)), *rest)
    for name, got, same, right in zip(("y", "dx", "dw"), (y, dx, dw), dense, exact, strict=True):
        assert_no_worse_than_dense(got, same, right, name)


def products(x, w, bias, dy, ins, outs, options, run=None):
    """y, dx, dw by the kernels, or by the twins."""
    kernel, size = tuple(w.shape[2:]), tuple(x.shape[2:])
    if run == "twin":
        return (
            conv2d_channels_ref(x, w, ins, outs, bias, **options),
            conv2d_channels_dgrad_ref(dy, w, size, ins, outs, **options),
            conv2d_channels_wgrad_ref(dy, x, kernel, ins, outs, **options),
        )
    return (
        conv2d_channels(x, w, ins, outs, bias, **options, tile=TILE),
        conv2d_channels_dgrad(dy, w, size, ins, outs, **options, tile=TILE),
        conv2d_channels_wgrad(dy, x, kernel, ins, outs, **options, tile=TILE),
    )


VIEWS = {
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "sliced": lambda x: x.repeat(1, 2, 1, 1)[:, ::2],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "expanded": lambda x: x[:1].expand(2, -1, -1, -1),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_any_strides(view, device):
    x, w, bias, ins, outs = make(SHAPES["ragged"], torch.float32, device)
    x, w = view(x), w.to(memory_format=torch.channels_last)
    dy = view(randn(2, 11, 5, 4, seed=4, device=device))
    options = {"padding": 1}
    got = products(x, w, bias, dy, ins, outs, options)
    twins = products(x, w, bias, dy, ins, outs, options, "twin")
    for mine, twin in zip(got, twins, strict=True):
        torch.testing.assert_close(mine, twin)
        assert mine.stride() == twin.stride()


def test_all_kinds_give_the_same_bits(device):
    kept = torch.arange(16, 32, device=device)
    layouts = [
        ChannelLayout(kept, 40, 16, 16 if run == RANGE else 0, run)
        for run in (RANGE, RAGGED, 8, 16)
    ]
    x, dy = (randn(1, 40, 3, 3, dtype=torch.float16, seed=s, device=device) for s in (1, 2))
    w = randn(16, 16, 2, 2, dtype=torch.float16, seed=3, device=device)
    options = {"padding": (1, 0, 0, 1)}
    results = [products(x, w, None, dy, one, one, options) for one in layouts]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize("act", ["relu", "gelu", "relu2"])
def test_activations(act, split, device):
    x, w, bias, ins, outs = make(SHAPES["ragged"], torch.float32, device)
    got = conv2d_channels(x, w, ins, outs, bias, padding=1, act=act, tile=TILE, split=split)
    torch.testing.assert_close(got, conv2d_channels_ref(x, w, ins, outs, bias, padding=1, act=act))


def guarded(*shape, seed=0, device="cpu"):
    """A random tensor inside a larger buffer of NaN: reads past its edge show."""
    outer = torch.full([s + 4 for s in shape], float("nan"), device=device)
    inner = outer[tuple(slice(2, 2 + s) for s in shape)]
    return inner.copy_(randn(*shape, seed=seed, device=device))


@pytest.mark.parametrize("groups", [1, 2])
def test_dropped_channels_and_what_lies_around_are_never_read(groups, device):
    kept = [0, 3, 4, 7]
    both = channel_index(torch.tensor(kept, device=device), 8)
    w = guarded(4, 4 // groups, 3, 2, seed=1, device=device)
    x, dy = guarded(1, 8, 5, 4, seed=2, device=device), guarded(1, 8, 3, 2, seed=3, device=device)
    options = {"stride": 2, "padding": (1, 0), "groups": groups}
    clean = products(x.clone(), w.clone(), None, dy.clone(), both, both, options)
    dropped = [1, 2, 5, 6]
    x[:, dropped] = float("nan")
    dy[:, dropped] = float("inf")
    for got, same in zip(products(x, w, None, dy, both, both, options), clean, strict=True):
        assert torch.equal(got, same) and bool(got.isfinite().all())


def test_nothing_is_written_outside_the_output(device, monkeypatch):
    """The outputs lie inside larger buffers of a sentinel, which must survive."""
    x, w, bias, ins, outs = make(SHAPES["ragged"], torch.float32, device)
    dy = randn(2, 11, 5, 4, seed=4, device=device)
    buffers, empty = [], torch.empty

    def embedded(shape, dtype, device, memory_format):
        strides = empty(shape, device="meta", memory_format=memory_format).stride()
        count = torch.Size(shape).numel()
        buffers.append(torch.full((count + 512,), 77.0, dtype=dtype, device=device))
        return buffers[-1].as_strided(shape, strides, 256)

    monkeypatch.setattr("slimgemm.kernels.conv_channels.torch.empty", embedded)
    conv2d_channels(x, w, ins, outs, bias, padding=1, tile=TILE, split=2)
    conv2d_channels_dgrad(dy, w, (5, 4), ins, outs, padding=1, tile=TILE)
    monkeypatch.undo()
    assert len(buffers) == 2
    for outer in buffers:
        assert bool((outer[:256] == 77).all() & (outer[-256:] == 77).all())
        assert bool((outer[256:-256] != 77).all() & outer.isfinite().all())


@settings(max_examples=10, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_geometry_and_index_pattern(data):
    number = st.integers
    groups = data.draw(number(1, 2))
    kept = [data.draw(number(0 if groups == 1 else 1, 3)) for _ in range(2)]
    parts = [
        sorted(data.draw(st.sets(number(0, 4), min_size=k, max_size=k))) for k in kept for _ in "ab"
    ]
    pairs = [[c + 5 * g for g in range(groups) for c in parts[2 * side + g]] for side in range(2)]
    ins, outs = (channel_index(index, 5 * groups) for index in pairs)
    kernel = data.draw(number(1, 3)), data.draw(number(1, 2))
    options = {
        "stride": data.draw(number(1, 3)),
        "padding": tuple(data.draw(number(0, 2)) for _ in range(4)),
        "dilation": data.draw(number(1, 2)),
        "groups": groups,
    }
    x = randn(1, 5 * groups, data.draw(number(5, 6)), 4, seed=1)
    w = randn(outs.kept, ins.kept // groups, *kernel, seed=2)
    y = conv2d_channels_ref(x, w, ins, outs, None, **options)
    dy = randn(*y.shape, seed=3)
    got = products(x, w, None, dy, ins, outs, options)
    for mine, twin in zip(got, products(x, w, None, dy, ins, outs, options, "twin"), strict=True):
        torch.testing.assert_close(mine, twin)


def test_shipped_tiles(device):
    x, w, bias, ins, outs = make(SHAPES["ragged"], torch.float32, device)
    y = conv2d_channels(x, w, ins, outs, bias)
    torch.testing.assert_close(y, conv2d_channels_ref(x, w, ins, outs, bias))
    dw = conv2d_channels_wgrad(y, x, (3, 3), ins, outs)
    torch.testing.assert_close(dw, conv2d_channels_wgrad_ref(y, x, (3, 3), ins, outs))


def test_steps_are_cut_at_taps_where_that_wastes_little():
    assert per_tap(3, 1, 64) and per_tap(64, 9, 64) and per_tap(60, 9, 64)
    assert not per_tap(3, 49, 64) and not per_tap(70, 9, 64)


def test_geometry_as_torch_has_it():
    assert conv_geometry((3, 4), padding="same", dilation=2).padding == (2, 2, 3, 3)
    assert conv_geometry((2, 4), padding="same").padding == (0, 1, 1, 2)
    assert conv_geometry((3, 3), padding="valid").padding == (0, 0, 0, 0)
    assert conv_geometry((3, 3), 2, (1, 2), (1, 3), 4) == ((2, 2), (1, 1, 2, 2), (1, 3), 4)


def raw(*channels, width=8):
    """A ChannelIndex that nobody has checked."""
    return ChannelIndex(torch.tensor(channels), width)


REFUSED = {
    "negative": ({"ins": raw(-1, 2)}, r"in_index must be in 0\.\.7, got -1 at place 0"),
    "repeated": ({"outs": raw(2, 2)}, "out_index must be ascending without repeats, got 2 after 2"),
    "groups_differ": (
        {"ins": raw(1, 5, 6, 7), "groups": 2},
        "same number of channels in each of 2 groups, got 1 in group 0 and 3 in group 1",
    ),
    "groups_width": (
        {"ins": raw(0, 1, 2, 4, width=7), "groups": 2},
        "a width that 2 groups divide",
    ),
    "groups_out": (
        {"w": torch.zeros(3, 2, 3, 3), "groups": 2},
        "out channels that 2 groups divide",
    ),
    "groups_zero": ({"groups": 0}, "groups must be at least 1, got 0"),
    "kept_in": ({"ins": raw(0, 1, 2)}, "in_index must keep 2 channels as the weight, got 3"),
    "x_dims": ({"x": torch.zeros(8, 5, 5)}, r"x must be \[B, C, H, W\], got \[8, 5, 5\]"),
    "x_channels": ({"x": torch.zeros(1, 9, 5, 5)}, "x must have 8 channels for in_index, got 9"),
    "x_dtype": ({"x": torch.zeros(1, 8, 5, 5).half()}, r"x must be torch\.float32 on cpu as w"),
    "w_dims": ({"w": torch.zeros(2, 2)[..., None]}, "w must be floating .kept_out, kept_in"),
    "w_kernel": ({"w": torch.zeros(2, 2, 0, 3)}, "w must have a kernel of at least 1 x 1"),
    "bias": ({"bias": torch.zeros(8)}, r"bias must be \[2\], one per kept out channel"),
    "act": ({"act": "tanh"}, "act must be one of none, relu, .* got 'tanh'"),
    "stride": ({"stride": 0}, "stride must be one or two integers of at least 1, got 0"),
    "padding": ({"padding": (-1, 0)}, "padding must be one or two integers of at least 0"),
    "padding_word": ({"padding": "full"}, "padding must be 'same', 'valid' or integers"),
    "same_stride": ({"padding": "same", "stride": 2}, "padding 'same' must have stride 1"),
    "too_small": ({"dilation": 3}, r"kernel \(3, 3\) with dilation \(3, 3\) is larger than the"),
}


@pytest.mark.parametrize(("changed", "text"), REFUSED.values(), ids=REFUSED.keys())
@pytest.mark.parametrize("run", [conv2d_channels, conv2d_channels_ref], ids=["kernel", "twin"])
def test_refusals(run, changed, text):
    arguments = {
        "x": torch.zeros(1, 8, 5, 5),
        "w": torch.zeros(2, 2, 3, 3),
        "ins": raw(0, 5),
        "outs": raw(1, 7),
        **changed,
    }
    ins, outs = arguments.pop("ins"), arguments.pop("outs")
    with pytest.raises(ValueError, match=text):
        run(**arguments, in_index=ins, out_index=outs)


def test_gradient_refusals():
    w, both = torch.zeros(2, 2, 3, 3), raw(0, 5)
    for dgrad in (conv2d_channels_dgrad, conv2d_channels_dgrad_ref):
        with pytest.raises(ValueError, match=r"dy must be \[B, 8, 3, 3\], got \[1, 8, 4, 3\]"):
            dgrad(torch.zeros(1, 8, 4, 3), w, (5, 5), both, both)
    for wgrad in (conv2d_channels_wgrad, conv2d_channels_wgrad_ref):
        with pytest.raises(ValueError, match=r"dy must be \[1, 8, 3, 3\] for this x, got"):
            wgrad(torch.zeros(2, 8, 3, 3), torch.zeros(1, 8, 5, 5), (3, 3), both, both)
        with pytest.raises(ValueError, match=r"x must be \[B, C, H, W\], got \[8, 5, 5\]"):
            wgrad(torch.zeros(1, 8, 3, 3), torch.zeros(8, 5, 5), (3, 3), both, both)


def test_kernels_refuse_float64():
    x = torch.zeros(1, 2, 3, 3).double()
    with pytest.raises(ValueError, match="x must be float16, bfloat16 or float32"):
        conv2d_channels(x, x[:, :, :1, :1].expand(2, 2, 1, 1))
    with pytest.raises(ValueError, match="dy must be float16, bfloat16 or float32"):
        conv2d_channels_wgrad(x, x, (1, 1))
