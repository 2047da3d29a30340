"""Convolutions of groups with few channels: the launchers against torch, alone and beside dots."""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_no_worse_than_dense, randn, random_24
from hypothesis import given, settings
from hypothesis import strategies as st

from slimgemm.kernels import conv_24, conv_24_grad, conv_channels, conv_channels_wgrad, conv_few
from slimgemm.kernels.configs import FEW_CHANNELS, few_channels
from slimgemm.kernels.conv_24 import conv2d_24
from slimgemm.kernels.conv_24_grad import conv2d_24_dgrad, conv2d_24_wgrad
from slimgemm.kernels.conv_channels import conv2d_channels, conv2d_channels_dgrad
from slimgemm.kernels.conv_channels_wgrad import conv2d_channels_wgrad
from slimgemm.kernels.conv_layout import conv_matrix
from slimgemm.kernels.formats import PATTERNS, channel_index
from slimgemm.kernels.pack_conv import pack_conv
from slimgemm.kernels.reference import gather_24_ref
from slimgemm.kernels.reference_channels import (
    conv2d_channels_dgrad_ref,
    conv2d_channels_ref,
    conv2d_channels_wgrad_ref,
)

LAST, FIRST = torch.channels_last, torch.contiguous_format
# name: (batch, channels, out) of a group, groups, image, kernel, options
SHAPES = {
    "depthwise": ((2, 1, 1), 20, (5, 4), (3, 3), {"padding": 1}),
    "two_tiles": ((1, 1, 1), 70, (3, 2), (1, 1), {}),
    "multiplier": ((1, 1, 3), 6, (4, 5), (3, 2), {}),
    "ragged": ((1, 3, 2), 7, (6, 5), (3, 3), {"padding": (1, 2)}),
    "most": ((1, FEW_CHANNELS, FEW_CHANNELS), 3, (4, 4), (1, 1), {}),
    "one_group": ((1, 5, 4), 1, (5, 5), (2, 3), {"padding": 1}),
    "stride": ((2, 4, 4), 3, (7, 8), (3, 3), {"stride": 2, "padding": 1}),
    "stride_past_kernel": ((1, 2, 3), 2, (7, 8), (2, 1), {"stride": (3, 2)}),
    "dilation_and_stride": (
        (1, 2, 2), 4, (9, 8), (3, 2), {"stride": (4, 2), "dilation": (2, 3), "padding": (2, 1)},
    ),
    "four_paddings": ((1, 2, 2), 2, (4, 3), (3, 3), {"padding": (2, 0, 1, 3)}),
    "no_images": ((0, 2, 2), 2, (4, 3), (3, 3), {}),
}  # fmt: skip


def operands(shape, dtype, device, layout=LAST, pattern=None):
    """w, x, bias, dy and the options with groups; `w` is kept to `pattern` where one is given."""
    (batch, channels, out), groups, size, kernel, options = shape
    if pattern is None:
        w = randn(out * groups, channels, *kernel, dtype=dtype, seed=1, device=device)
    else:
        taps = kernel[0] * kernel[1]
        w = random_24(out * groups * taps, channels, dtype, *pattern, seed=1, device=device)
        w = w.view(out * groups, *kernel, channels).permute(0, 3, 1, 2).contiguous()
    x = randn(batch, channels * groups, *size, dtype=dtype, seed=2, device=device)
    x = x.contiguous(memory_format=layout)
    bias = randn(out * groups, dtype=dtype, seed=3, device=device)
    options = {**options, "groups": groups}
    y = conv2d_channels_ref(x, w, None, None, bias, **options)
    dy = randn(*y.shape, dtype=dtype, seed=4, device=device).contiguous(memory_format=layout)
    return w, x, bias, dy, options


def dense(w, x, bias, dy, options):
    """y, dx and dw by torch's convolution and autograd."""
    w, x = w.clone().requires_grad_(), x.clone().requires_grad_()
    options, padded = dict(options), x
    padding = options.pop("padding", 0)
    if isinstance(padding, tuple) and len(padding) == 4:
        top, bottom, left, right = padding
        padded, padding = F.pad(x, (left, right, top, bottom)), 0
    y = F.conv2d(padded, w, bias, padding=padding, **options)
    return y.detach(), *torch.autograd.grad(y, (x, w), dy)


def check(names, products, w, x, bias, dy, options, of_dw=lambda dw: dw):
    low = dense(w, x, bias, dy, options)
    exact = dense(*(t.double() for t in (w, x, bias, dy)), options)
    for name, got, a, b in zip(names, products, low, exact, strict=True):
        turn = of_dw if name.startswith("d") and name != "dx" else lambda t: t
        assert_no_worse_than_dense(got, turn(a), turn(b), name)


@pytest.fixture
def no_dot(monkeypatch):
    """A launch of a kernel with a dot fails."""
    for module, name in (
        (conv_24, "_conv2d_24_kernel"),
        (conv_24_grad, "_conv2d_24_dgrad_kernel"),
        (conv_24_grad, "_conv2d_24_wgrad_kernel"),
        (conv_channels, "_conv_channels_kernel"),
        (conv_channels_wgrad, "_conv_channels_wgrad_kernel"),
    ):
        monkeypatch.setattr(module, name, None)


CASES = [(name, torch.float32) for name in SHAPES]
CASES += [("ragged", torch.float16), ("stride", torch.bfloat16)]


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_packed_products_match_float64(name, dtype, device, no_dot):
    shape, layout = SHAPES[name], FIRST if dtype == torch.bfloat16 else LAST
    w, x, bias, dy, options = operands(shape, dtype, device, layout, (2, 4))
    packed = pack_conv(w)
    products = (
        conv2d_24(x, packed, w.shape, bias, **options),
        conv2d_24_dgrad(dy, packed, w.shape, x.shape, **options),
        conv2d_24_wgrad(dy, x, packed, w.shape, **options),
    )
    kept = lambda dw: gather_24_ref(conv_matrix(dw), packed)  # noqa: E731
    check(("y", "dx", "dvalues"), products, w, x, bias, dy, options, kept)


@pytest.mark.parametrize("pattern", PATTERNS[1:], ids=str)
def test_other_patterns_match_float64(pattern, device, no_dot):
    w, x, bias, dy, options = operands(SHAPES["most"], torch.float32, device, LAST, pattern)
    packed = pack_conv(w, *pattern)
    products = (
        conv2d_24(x, packed, w.shape, bias, **options),
        conv2d_24_dgrad(dy, packed, w.shape, x.shape, **options),
        conv2d_24_wgrad(dy, x, packed, w.shape, **options, split=2),
    )
    kept = lambda dw: gather_24_ref(conv_matrix(dw), packed)  # noqa: E731
    check(("y", "dx", "dvalues"), products, w, x, bias, dy, options, kept)


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_pruned_channels_match_float64(name, dtype, device, no_dot):
    """Here all channels are kept; the next test drops some."""
    w, x, bias, dy, options = operands(SHAPES[name], dtype, device)
    kernel, size = tuple(w.shape[2:]), tuple(x.shape[2:])
    products = (
        conv2d_channels(x, w, None, None, bias, **options),
        conv2d_channels_dgrad(dy, w, size, None, None, **options),
        conv2d_channels_wgrad(dy, x, kernel, None, None, **options),
    )
    check(("y", "dx", "dw"), products, w, x, bias, dy, options)


def channel_products(x, w, bias, dy, both, options, split=None, twin=False):
    size, kernel = tuple(x.shape[2:]), tuple(w.shape[2:])
    run = (conv2d_channels, conv2d_channels_dgrad, conv2d_channels_wgrad)
    if twin:
        run = (conv2d_channels_ref, conv2d_channels_dgrad_ref, conv2d_channels_wgrad_ref)
    return (
        run[0](x, w, *both, bias, **options, act="gelu"),
        run[1](dy, w, size, *both, **options),
        run[2](dy, x, kernel, *both, **options, **({} if twin else {"split": split})),
    )


@settings(max_examples=6, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_few_channels_and_geometry(data):
    """Against the twins; dropped channels hold NaN, which nothing may read."""
    number = st.integers
    groups, width = data.draw(number(1, 4)), data.draw(number(2, 5))
    per_in, per_out = (data.draw(number(1, width)) for _ in range(2))
    indices = []
    for per in (per_in, per_out):
        parts = [
            data.draw(st.sets(number(0, width - 1), min_size=per, max_size=per))
            for _ in range(groups)
        ]
        indices.append(
            channel_index([c + width * g for g, p in enumerate(parts) for c in sorted(p)],
                          width * groups)
        )  # fmt: skip
    kernel = data.draw(number(1, 3)), data.draw(number(1, 3))
    options = {
        "stride": (data.draw(number(1, 4)), data.draw(number(1, 3))),
        "padding": tuple(data.draw(number(0, 2)) for _ in range(4)),
        "dilation": data.draw(number(1, 2)),
        "groups": groups,
    }
    x = randn(2, width * groups, data.draw(number(5, 7)), 5, seed=1)
    w = randn(per_out * groups, per_in, *kernel, seed=2)
    dy = randn(*conv2d_channels_ref(x, w, *indices, **options).shape, seed=3)
    for t, index in ((x, indices[0]), (dy, indices[1])):
        dropped = torch.ones(index.width, dtype=torch.bool)
        dropped[index.index] = False
        t[:, dropped] = float("nan")
    bias = randn(per_out * groups, seed=4)
    split = data.draw(st.sampled_from([1, 3]))
    got = channel_products(x, w, bias, dy, indices, options, split)
    twins = channel_products(x, w, bias, dy, indices, options, twin=True)
    for mine, twin in zip(got, twins, strict=True):
        torch.testing.assert_close(mine, twin)
        assert mine.stride() == twin.stride()


def test_parts_of_the_pixels_repeat_bit_for_bit(device):
    _, x, _, dy, options = operands(SHAPES["depthwise"], torch.float16, device)
    options |= {"split": 3}
    once, again = (conv2d_channels_wgrad(dy, x, (3, 3), **options) for _ in range(2))
    assert torch.equal(once, again)


def test_a_tile_spans_groups_and_holds_no_channels_that_do_not_exist():
    assert few_channels(8, 8) and not few_channels(9, 1) and not few_channels(1, 9)
    assert conv_few.few_tile(512) == (16, 64) and conv_few.few_tile(5) == (128, 8)


def test_the_values_of_a_padded_group_get_no_gradient(device):
    w, x, _, dy, options = operands(SHAPES["ragged"], torch.float32, device, LAST, (2, 4))
    packed = pack_conv(w)
    dy[0, 3, 1, 1] = float("nan")
    got = conv2d_24_wgrad(dy, x, packed, w.shape, **options)
    want = gather_24_ref(conv_matrix(dense(w, x, torch.zeros(14), dy, options)[2]), packed)
    assert got[3].isnan().any() and torch.equal(got.isnan(), want.isnan())
