"""conv2d_24 and its gradients: bits, algebra, twins, guard regions and refusals."""

import itertools
import math
import re

import pytest
import torch
import torch.nn.functional as F
import triton.language as tl
from helpers import assert_no_worse_than_dense, randn, random_24

from slimgemm.kernels import conv_24, conv_24_grad, reference_conv
from slimgemm.kernels.configs import Tile
from slimgemm.kernels.conv_24 import conv2d_24
from slimgemm.kernels.conv_24_grad import conv2d_24_dgrad, conv2d_24_wgrad
from slimgemm.kernels.conv_layout import conv_matrix, memory_format
from slimgemm.kernels.formats import PATTERNS, Packed24
from slimgemm.kernels.pack_conv import pack_conv, unpack_conv
from slimgemm.kernels.reference import ACTIVATIONS, activate, gather_24_ref
from slimgemm.kernels.reference_conv import pack_conv_ref, unpack_conv_ref

LAST, FIRST = torch.channels_last, torch.contiguous_format
TILE = Tile(32, 32, 64)
# name: (batch, channels, out, height, width, kernel), options of conv2d, parts, format of x and dy
SHAPES = {
    "one_by_one": ((2, 64, 32, 4, 4, (1, 1)), {}, 1, LAST),
    "three": ((1, 64, 16, 4, 3, (3, 3)), {"padding": 1}, 2, LAST),
    "nchw": ((2, 16, 17, 5, 4, (3, 3)), {"padding": 1}, 1, FIRST),
    "stride": ((2, 8, 16, 7, 6, (3, 3)), {"stride": 2, "padding": 1}, 3, LAST),
    "stride_past_kernel": ((1, 8, 5, 4, 5, (1, 2)), {"stride": (3, 4)}, 1, FIRST),
    "dilation": ((1, 12, 8, 7, 8, (3, 3)), {"padding": 2, "dilation": 2}, 1, LAST),
    "dilation_and_stride": (
        (1, 8, 8, 9, 11, (3, 2)),
        {"stride": (4, 3), "padding": (2, 3), "dilation": (2, 6)},
        2,
        LAST,
    ),
    "same_even": ((1, 8, 8, 4, 5, (2, 4)), {"padding": "same", "dilation": (1, 3)}, 1, LAST),
    "groups": ((1, 24, 10, 4, 3, (2, 2)), {"groups": 2}, 2, LAST),
    "depthwise": ((1, 3, 6, 4, 3, (3, 3)), {"padding": 1, "groups": 3}, 1, LAST),
    "ragged_c": ((1, 11, 37, 3, 4, (3, 3)), {"padding": "valid"}, 1, LAST),
    "one_pixel": ((1, 16, 40, 1, 1, (1, 1)), {}, 1, FIRST),
    "empty": ((0, 8, 8, 4, 4, (3, 3)), {}, 1, LAST),
    "many": ((3, 72, 40, 4, 4, (1, 1)), {"padding": 0}, 1, LAST),
}


def conv_weight_24(out, channels, kernel, dtype, keep=2, group=4, device="cpu"):
    """Random dense [out, channels, *kernel], keep:group along the channels of each tap."""
    rows = random_24(out * math.prod(kernel), channels, dtype, keep, group, 1, device)
    return rows.view(out, *kernel, channels).permute(0, 3, 1, 2).contiguous()


def embedded(t, margin=1):
    """`t`, its memory format and values, inside a larger tensor that holds NaN all around."""
    layout = memory_format(t)
    around = t.new_full([size + 2 * margin for size in t.shape], float("nan"))
    around = around.contiguous(memory_format=layout)
    inner = around[tuple(slice(margin, margin + size) for size in t.shape)]
    assert memory_format(inner) == layout or 0 in t.shape or 1 in t.shape
    return inner.copy_(t)


def embedded_packed(packed):
    """`packed` between NaN values and bytes of metadata that are not valid."""
    values = torch.full((packed.values.numel() + 128,), float("nan"), dtype=packed.values.dtype)
    meta = torch.full((packed.meta.numel() + 128,), 0xFF, dtype=torch.uint8)
    device = packed.values.device
    inner = [
        around.to(device)[64:-64].view(t.shape).copy_(t)
        for around, t in ((values, packed.values), (meta, packed.meta))
    ]
    return packed._replace(values=inner[0], meta=inner[1])


def operands(sizes, options, layout, dtype, device, keep=2, group=4):
    batch, channels, out, height, width, kernel = sizes
    channels_of_group = channels // options.get("groups", 1)
    w = conv_weight_24(out, channels_of_group, kernel, dtype, keep, group, device)
    x = randn(batch, channels, height, width, dtype=dtype, seed=2, device=device)
    x = x.contiguous(memory_format=layout)
    bias = randn(out, dtype=dtype, seed=4, device=device)
    shape = F.conv2d(x, w, **options).shape
    dy = randn(*shape, dtype=dtype, seed=3, device=device).contiguous(memory_format=layout)
    return w, embedded(x), bias, embedded(dy)


def dense_products(w, x, bias, dy, packed, options):
    """y, dx and dvalues by torch's own convolution and its autograd."""
    w, x = w.clone().requires_grad_(), x.clone().requires_grad_()
    y = F.conv2d(x, w, bias, **options)
    dx, dw = torch.autograd.grad(y, (x, w), dy)
    return y.detach(), dx, gather_24_ref(conv_matrix(dw), packed)


def check_products(products, w, x, bias, dy, packed, options):
    doubled = packed._replace(values=packed.values.double())
    exact = dense_products(*(t.double() for t in (w, x, bias, dy)), doubled, options)
    dense = dense_products(w, x, bias, dy, packed, options)
    for name, got, d, e in zip(("y", "dx", "dvalues"), products, dense, exact, strict=True):
        assert_no_worse_than_dense(got, d, e, name)


def run(w, x, bias, dy, packed, options, act="none", **launch):
    return (
        conv2d_24(x, packed, w.shape, bias, act=act, **options, **launch),
        conv2d_24_dgrad(dy, packed, w.shape, x.shape, **options, **launch),
        conv2d_24_wgrad(dy, x, packed, w.shape, **options, **launch),
    )


# ---- bits and algebra


def test_layout_is_the_documented_one(device):
    w = torch.zeros(1, 5, 1, 2, device=device)
    w[0, :, 0, 0] = torch.tensor([0.0, 1, 0, 2, 3])
    w[0, :, 0, 1] = torch.tensor([4.0, 0, 5, 0, 0])
    packed = pack_conv(w)
    assert packed.shape == (1, 16)
    assert packed.values.tolist() == [[1, 2, 3, 0, 4, 5, 0, 0]]
    assert packed.meta.tolist() == [[0b01_00_11_01, 0b01_00_10_00]]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("channels", [1, 3, 8, 13, 16])
def test_pack_and_unpack_are_inverse(pattern, channels, device):
    w = conv_weight_24(5, channels, (3, 2), torch.float16, *pattern, device)
    packed, twin = pack_conv(w, *pattern), pack_conv_ref(w, *pattern)
    assert packed[2:] == twin[2:] == (6 * -(-channels // 8) * 8, *pattern)
    assert torch.equal(packed.values, twin.values) and torch.equal(packed.meta, twin.meta)
    assert torch.equal(unpack_conv(packed, w.shape), w)
    assert torch.equal(unpack_conv_ref(packed, w.shape), w)


def test_every_pair_of_kept_channels_moves_pixels_exactly(device):
    pairs = list(itertools.combinations(range(4), 2))
    w = torch.zeros(len(pairs), 4, 1, 1, device=device)
    for row, (first, second) in enumerate(pairs):
        w[row, first], w[row, second] = 1, 2
    x = torch.arange(4 * 6.0, device=device).view(1, 4, 2, 3)
    y = conv2d_24(x, pack_conv(w), w.shape, tile=TILE)
    want = torch.stack([x[0, first] + 2 * x[0, second] for first, second in pairs])
    assert torch.equal(y[0], want)


def test_a_weight_of_zeros_gives_the_bias(device):
    w, bias = torch.zeros(3, 8, 2, 2, device=device), randn(3, device=device)
    y = conv2d_24(randn(1, 8, 3, 3, device=device), pack_conv(w), w.shape, bias, tile=TILE)
    assert torch.equal(y, bias.view(1, 3, 1, 1).expand(1, 3, 2, 2))


# ---- twins


@pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES.keys())
def test_products_match_float64(case, device):
    sizes, options, split, layout = case
    w, x, bias, dy = operands(sizes, options, layout, torch.float32, device)
    packed = embedded_packed(pack_conv(w))
    products = run(w, x, bias, dy, packed, options, tile=TILE, split=split)
    assert memory_format(products[0]) == memory_format(x) or 1 in sizes or 0 in sizes
    check_products(products, w, x, bias, dy, packed, options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES.keys())
def test_torch_twins_match_float64(case, dtype, device):
    sizes, options, _, layout = case
    w, x, bias, dy = operands(sizes, options, layout, dtype, device)
    packed = pack_conv_ref(w)
    products = (
        reference_conv.conv2d_24_ref(x, packed, w.shape, bias, **options),
        reference_conv.conv2d_24_dgrad_ref(dy, packed, w.shape, x.shape, **options),
        reference_conv.conv2d_24_wgrad_ref(dy, x, packed, w.shape, **options),
    )
    check_products(products, w, x, bias, dy, packed, options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["stride", "same_even", "groups"])
def test_16_bit_products_match_float64(name, dtype, device):
    sizes, options, split, layout = SHAPES[name]
    w, x, bias, dy = operands(sizes, options, layout, dtype, device)
    packed = embedded_packed(pack_conv(w))
    products = run(w, x, bias, dy, packed, options, tile=TILE, split=split)
    check_products(products, w, x, bias, dy, packed, options)


@pytest.mark.parametrize("pattern", PATTERNS[1:], ids=str)
def test_other_patterns_match_float64(pattern, device):
    options = {"padding": 1}
    sizes = (1, 20, 6, 3, 3, (2, 2))
    w, x, bias, dy = operands(sizes, options, LAST, torch.float32, device, *pattern)
    packed = embedded_packed(pack_conv(w, *pattern))
    products = run(w, x, bias, dy, packed, options, tile=TILE)
    check_products(products, w, x, bias, dy, packed, options)


@pytest.mark.parametrize("name", ["three", "depthwise", "stride_past_kernel"])
def test_tiles_of_the_launcher_match_float64(name, device, monkeypatch):
    monkeypatch.setattr(conv_24, "multiprocessors", lambda device: 64)
    monkeypatch.setattr(conv_24_grad, "multiprocessors", lambda device: 64)
    sizes, options, _, layout = SHAPES[name]
    w, x, bias, dy = operands(sizes, options, layout, torch.float16, device)
    packed = pack_conv(w)
    check_products(run(w, x, bias, dy, packed, options), w, x, bias, dy, packed, options)


@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activations_match_float64(act, split, device):
    w, x, bias, _ = operands((1, 72, 8, 2, 3, (1, 1)), {}, LAST, torch.float32, device)
    y = conv2d_24(x, pack_conv(w), w.shape, bias, act=act, tile=TILE, split=split)
    exact = activate(F.conv2d(x.double(), w.double(), bias.double()), act)
    assert_no_worse_than_dense(y, activate(F.conv2d(x, w, bias), act), exact, act)


def test_transposed_and_repeated_images(device):
    w = conv_weight_24(4, 8, (2, 2), torch.float32, device=device)
    packed = pack_conv(w)
    x = randn(3, 4, 8, device=device).permute(2, 1, 0).expand(2, 8, 4, 3)  # [2, 8, 4, 3]
    dy = randn(4, 1, 1, device=device).expand(2, 4, 3, 2)
    products = run(w, x, None, dy, packed, {}, tile=TILE)
    check_products(products, w, x, dy.new_zeros(4), dy, packed, {})


def test_four_paddings_are_top_bottom_left_right(device):
    w, x, *_ = operands((1, 8, 4, 3, 3, (2, 2)), {}, LAST, torch.float32, device)
    y = conv2d_24(x, pack_conv(w), w.shape, padding=(0, 1, 2, 3), tile=TILE)
    exact = F.conv2d(F.pad(x, (2, 3, 0, 1)).double(), w.double())
    assert_no_worse_than_dense(y, F.conv2d(F.pad(x, (2, 3, 0, 1)), w), exact, "y")


# ---- what kernels touch, and that they repeat


class Guards:
    """Outputs of the launchers, each between sentinels and full of NaN."""

    SENTINEL, WIDTH = 12345.0, 256

    def __init__(self):
        self.buffers = []

    def __call__(self, t):
        room = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
        around = t.new_full((room + 2 * self.WIDTH,), self.SENTINEL)
        self.buffers.append(around)
        return around.as_strided(t.shape, t.stride(), self.WIDTH).fill_(float("nan"))

    def check(self):
        for around in self.buffers:
            inner = around[self.WIDTH : -self.WIDTH]
            assert bool((around[: self.WIDTH] == self.SENTINEL).all())
            assert bool((around[-self.WIDTH :] == self.SENTINEL).all())
            assert not bool(inner.isnan().any())


@pytest.mark.parametrize("name", ["ragged_c", "groups", "dilation_and_stride"])
def test_kernels_write_all_of_their_outputs_and_nothing_else(name, device, monkeypatch):
    guards, new_images, empty_like = Guards(), conv_24.new_images, torch.empty_like

    def guarded_images(*args):
        images, target, strides = new_images(*args)
        whole = guards(images)
        return whole, whole if target is images else guards(target), strides

    for module in (conv_24, conv_24_grad):
        monkeypatch.setattr(module, "new_images", guarded_images)
    monkeypatch.setattr(torch, "empty_like", lambda t: guards(empty_like(t)))
    sizes, options, split, layout = SHAPES[name]
    w, x, bias, dy = operands(sizes, options, layout, torch.float32, device)
    run(w, x, bias, dy, embedded_packed(pack_conv(w)), options, tile=TILE, split=split)
    assert len(guards.buffers) == (3 if split == 1 else 5)
    guards.check()


def test_results_repeat_bit_for_bit_and_with_64_bit_pixels(device, monkeypatch):
    sizes, options, split, layout = SHAPES["stride"]
    w, x, bias, dy = operands(sizes, options, layout, torch.float16, device)
    packed = pack_conv(w)
    once = run(w, x, bias, dy, packed, options, tile=TILE, split=split)
    assert conv_24.index_type(2**31 - 64, 64) == tl.int64 != conv_24.index_type(2**20, 64)
    for module in (conv_24, conv_24_grad):
        monkeypatch.setattr(module, "index_type", lambda pixels, block: tl.int64)
    again = run(w, x, bias, dy, packed, options, tile=TILE, split=split)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def test_offsets_pass_two_to_the_31(device, monkeypatch):
    """Rows of x lie 2**30 elements apart; only the pages that are touched exist."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    far = torch.empty(2**31 + 64, dtype=torch.float16, device=device)
    x = far.as_strided((1, 8, 3, 2), (48, 1, 2**30, 8))
    x.copy_(randn(1, 8, 3, 2, seed=2))
    w = conv_weight_24(4, 8, (2, 1), torch.float16, device=device)
    packed, near = pack_conv(w), x.clone()
    dy = randn(1, 4, 2, 2, dtype=torch.float16, seed=3, device=device)
    y = conv2d_24(x, packed, w.shape, tile=TILE)
    dv = conv2d_24_wgrad(dy, x, packed, w.shape, tile=TILE)
    assert torch.equal(y, conv2d_24(near, packed, w.shape, tile=TILE))
    assert torch.equal(dv, conv2d_24_wgrad(dy, near, packed, w.shape, tile=TILE))


@pytest.mark.parametrize("layout", [LAST, FIRST], ids=str)
@pytest.mark.parametrize("shape", [(2, 8, 3, 4), (2, 1, 3, 4), (2, 8, 1, 1), (1, 8, 3, 1)], ids=str)
def test_outputs_have_the_memory_format_of_torch(shape, layout, device):
    x = randn(*shape, device=device).contiguous(memory_format=layout)
    w = conv_weight_24(4, shape[1], (1, 1), torch.float32, device=device)
    want = torch.empty_like(F.conv2d(x, w), memory_format=memory_format(x)).stride()
    packed = pack_conv(w)
    y = conv2d_24(x, packed, w.shape, tile=TILE)
    assert y.stride() == reference_conv.conv2d_24_ref(x, packed, w.shape).stride() == want
    for view in (x, x[:, :, :, :2], x[:, ::2], x[1:]):
        assert memory_format(view) == torch._prims_common.suggest_memory_format(view)


# ---- refusals


def test_a_weight_that_is_not_24_is_refused_by_place(device):
    w = torch.zeros(3, 6, 2, 3, device=device)
    w[1, 4:6, 1, 2] = 1
    pack_conv(w)
    w[2, 1:4, 1, 0] = 1
    place = re.escape("out channel 2, tap (1, 0), input channels 0-3 hold 3 nonzeros (1 such")
    for pack in (pack_conv, pack_conv_ref):
        with pytest.raises(ValueError, match=f"weight is not 2:4: {place} .*prune it first"):
            pack(w)
    place = re.escape("out channel 1, tap (1, 2), input channels 4-5 hold 2 nonzeros (2 such")
    with pytest.raises(ValueError, match=f"weight is not 1:4: {place}"):
        pack_conv(w, 1, 4)


BAD_WEIGHTS = {
    "must be floating .out, channels, height, width.": lambda w: pack_conv(w[0]),
    "keep:group must be one of": lambda w: pack_conv(w, 3, 4),
    "packed weight must be .4, 64. for a": lambda w: unpack_conv(pack_conv(w), (4, 16, 2, 2)),
    "weight_shape must be": lambda w: unpack_conv(pack_conv(w), (4, 8, 4)),
}


@pytest.mark.parametrize("text", BAD_WEIGHTS)
def test_bad_weights_are_refused(text, device):
    with pytest.raises(ValueError, match=text):
        BAD_WEIGHTS[text](conv_weight_24(4, 8, (2, 2), torch.float32, device=device))


# text: changes of the arguments of a valid call
BAD_CALLS = {
    "x must be .B, 8, H, W. for this weight": {"x": torch.zeros(1, 9, 4, 4)},
    "x must be torch.float32 on .* as the weight": {"x": torch.zeros(1, 8, 4, 4).half()},
    "x must be float16, bfloat16 or float32": {"x": torch.zeros(1, 8, 4, 4).double()},
    "stride must be one or two integers of at least 1": {"stride": 0},
    "dilation must be one or two integers of at least 1": {"dilation": (1, 2, 3)},
    "padding must be one or two integers of at least 0": {"padding": -1},
    "padding must be integers of at least 0": {"padding": (0, 0, -1, 0)},
    "padding must be 'same', 'valid' or integers": {"padding": "full"},
    "padding 'same' must have stride 1": {"padding": "same", "stride": 2},
    "groups must divide the 4 out channels": {"groups": 3},
    "x of 4 x 4 pixels must not be smaller than the kernel, which spans 5 x 5": {"dilation": 4},
    "packed weight must be .4, 24. for a": {"weight_shape": (4, 8, 1, 3)},
    "bias must be contiguous .4.": {"bias": torch.zeros(3)},
    "act must be one of": {"act": "tanh"},
}


def valid_call(device):
    w = conv_weight_24(4, 8, (2, 2), torch.float32, device=device)
    return {"x": torch.zeros(1, 8, 4, 4), "w": pack_conv(w), "weight_shape": w.shape}


@pytest.mark.parametrize("text", BAD_CALLS)
def test_bad_calls_are_refused(text, device):
    call = valid_call(device) | BAD_CALLS[text]
    placed = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in call.items()}
    with pytest.raises(ValueError, match=text):
        conv2d_24(**placed)


def test_bad_gradients_are_refused(device):
    call = valid_call(device)
    packed, shape = call["w"], call["weight_shape"]
    x, dy = call["x"].to(device), torch.zeros(1, 4, 3, 3, device=device)
    with pytest.raises(ValueError, match=r"dy must be .1, 4, 2, 2. for an input"):
        conv2d_24_dgrad(dy, packed, shape, (1, 8, 3, 3))
    with pytest.raises(ValueError, match=r"input shape must be .batch, 8, height, width."):
        conv2d_24_dgrad(dy, packed, shape, (1, 7, 4, 4))
    with pytest.raises(ValueError, match=r"dy must be .B, 4, H, W."):
        conv2d_24_dgrad(dy[:, :3], packed, shape, x.shape)
    with pytest.raises(ValueError, match=r"dy must be .2, 4, 3, 3. for an input"):
        conv2d_24_wgrad(dy, x.expand(2, -1, -1, -1), packed, shape)
    with pytest.raises(ValueError, match="meta must be uint8"):
        conv2d_24_wgrad(dy, x, Packed24(packed.values, packed.meta[:, :-1], packed.k), shape)


def test_a_nan_in_dy_leaves_the_padding_of_the_channels_zero(device):
    w = conv_weight_24(3, 5, (1, 1), torch.float32, device=device)
    packed = pack_conv(w)
    x = randn(2, 5, 4, 4, seed=2, device=device)
    dy = randn(2, 3, 4, 4, seed=3, device=device)
    dy[0, 1, 0, 0] = float("nan")
    got = conv2d_24_wgrad(dy, x, packed, w.shape)
    want = reference_conv.conv2d_24_wgrad_ref(dy, x, packed, w.shape)
    assert want.isnan().any() and torch.equal(got.isnan(), want.isnan())
