"""mma_conv on the NumPy executor: geometries, tiles, splits, epilogues against torch's conv2d."""

import inspect
import re

import gluon_numpy
import pytest
import torch
import torch.nn.functional as F
from gluon_numpy import Fault
from helpers import assert_no_worse_than_dense, randn

from slimgemm.kernels.conv_layout import convolution
from slimgemm.kernels.gluon import mma_conv, mma_packed_kernel
from slimgemm.kernels.gluon.mma_packed_tiles import MMA_PACKED_TILES, PackedTile
from slimgemm.kernels.gluon.mma_tiles import fits
from slimgemm.kernels.reference import ACTIVATIONS, activate
from slimgemm.kernels.reference_conv import pack_conv_ref

NHWC = torch.channels_last
SMALL = {
    "one_warp": PackedTile(1, 1, 1, 1, 1, 2, 3, 2),
    "k_warps": PackedTile(1, 2, 1, 1, 4, 2, 2, 8),
    "token_warps": PackedTile(2, 1, 1, 2, 2, 2, 4, 6),
}
GEOMETRIES = {  # (batch, channels, out, height, width, kernel), options
    "3x3": ((2, 64, 24, 5, 4, (3, 3)), dict(padding=1)),
    "1x1": ((1, 128, 16, 3, 5, (1, 1)), {}),
    "strided 1x1": ((2, 64, 8, 5, 5, (1, 1)), dict(stride=2)),
    "strided": ((1, 64, 33, 9, 7, (3, 3)), dict(stride=2, padding=1)),
    "dilated": ((1, 64, 16, 8, 8, (3, 3)), dict(dilation=2, padding=2)),
    "sides differ": ((1, 192, 5, 6, 7, (2, 3)), dict(stride=(1, 2), padding=(0, 2))),
    "same": ((1, 64, 8, 4, 6, (4, 3)), dict(padding="same")),
}


def problem(shape, dtype, seed=0):
    batch, channels, out, height, width, kernel = shape
    dense = randn(out, channels // 4, 4, *kernel, seed=seed + 1)
    dropped = randn(*dense.shape, seed=seed + 2).argsort(2) < 2
    w = dense.masked_fill(dropped, 0).reshape(out, channels, *kernel).to(dtype)
    x = randn(batch, channels, height, width, dtype=dtype, seed=seed + 3)
    return x.contiguous(memory_format=NHWC), w


def run(x, w, tile, splits=1, replace=None, act="none", bias=None, kernel=None, **options):
    conv = convolution(w.shape, **options)
    launch = mma_conv.prepare(x, pack_conv_ref(w), conv, bias, act, tile=tile, splits=splits)
    kernel = kernel or mma_packed_kernel._mma_packed_kernel
    gluon_numpy.run(kernel, launch.grid, *launch.args, replace=replace, **launch.constants)
    if launch.parts is None:
        return launch.out
    total = launch.parts[0]
    for part in launch.parts[1:]:
        total = total + part
    mma_conv.pixels_of(launch.out).copy_(total)
    return launch.out


def check(shape, options, tile, dtype=torch.bfloat16, **more):
    x, w = problem(shape, dtype)
    bias, act = more.get("bias"), more.get("act", "none")
    got = run(x, w, tile, **more, **options)
    sides = [b if b is None else b.to(dtype) for b in (bias,)]
    dense = activate(F.conv2d(x, w, *sides, **options), act)
    wide = [b if b is None else b.double() for b in (bias,)]
    exact = activate(F.conv2d(x.double(), w.double(), *wide, **options), act)
    assert got.is_contiguous(memory_format=NHWC)
    assert_no_worse_than_dense(got, dense, exact, "mma_conv")


@pytest.mark.parametrize("tile", SMALL.values(), ids=SMALL)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_geometries(geometry, tile):
    shape, options = GEOMETRIES[geometry]
    check(shape, options, tile)


@pytest.mark.parametrize("most", MMA_PACKED_TILES, ids=str)
def test_every_shipped_tile(most):
    tile = mma_conv.mma_conv_tile(most)
    assert fits(tile, "sm_86") and tile.steps == 2
    check((1, 64, tile.rows + 8, 6, 11, (3, 3)), dict(padding=1), tile, torch.float16)


@pytest.mark.parametrize("splits", [2, 5])
def test_split_k(splits):
    check((1, 128, 24, 4, 4, (3, 3)), dict(padding=1), SMALL["one_warp"], splits=splits)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_epilogues(act):
    check((1, 64, 20, 3, 4, (3, 3)), dict(padding=1), SMALL["one_warp"], torch.float16,
          act=act, bias=randn(20, seed=5))  # fmt: skip


def mutated_error(old, new):
    """The largest error with one change in the source of copy_pixels."""
    (function,) = [
        f
        for f in (mma_packed_kernel.copy_pixels, mma_packed_kernel._mma_packed_kernel)
        if old in inspect.getsource(f.fn)
    ]
    x, w = problem((2, 64, 24, 5, 5, (3, 3)), torch.float16)
    changed = gluon_numpy.mutated(function, old, new)
    if function is mma_packed_kernel.copy_pixels:
        got = run(x, w, SMALL["k_warps"], replace={"copy_pixels": changed}, stride=2, padding=1)
    else:
        got = run(x, w, SMALL["k_warps"], kernel=changed, stride=2, padding=1)
    exact = F.conv2d(x.double(), w.double(), stride=2, padding=1)
    return float((got.double() - exact).abs().max() / exact.abs().max())


WRONG = {
    "row and column of a tap": ("tap // IMAGE.kernel_width", "tap % IMAGE.kernel_width + 0 * tap"),
    "no left padding": (" - IMAGE.left", " - 0 * IMAGE.left"),
    "stride": ("place % IMAGE.out_width * IMAGE.stride_x", "place % IMAGE.out_width"),
    "left edge": (" & (pixel >= 0)", ""),
    "right edge": (" & (pixel < IMAGE.width)", ""),
    "another image": ("image.to(gl.int64)", "(image * 0).to(gl.int64)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_planted_wrong_address_gives_a_wrong_result(name):
    try:
        assert mutated_error(*WRONG[name]) > 0.05
    except Fault as fault:
        assert re.search("x_ptr", str(fault))


def test_reads_past_the_images_are_caught():
    with pytest.raises(Fault, match="x_ptr"):
        mutated_error(" & (row >= 0)", "")
    with pytest.raises(Fault, match="x_ptr"):
        mutated_error(" & (row < IMAGE.height)", "")


def test_unchanged_kernel_is_right_there():
    assert mutated_error("tap < IMAGE.taps", "tap < IMAGE.taps + 0") < 1e-2


def test_launcher_refuses_before_anything_runs():
    call = mma_conv.conv2d_24_mma
    x, w = problem((1, 64, 8, 4, 4, (3, 3)), torch.float16)
    packed = pack_conv_ref(w)
    with pytest.raises(ValueError, match="x must be on a GPU, got cpu"):
        call(x, packed, w.shape)
    with pytest.raises(ValueError, match="x must be channels_last and 16-byte aligned"):
        call(x.contiguous(), packed, w.shape)
    with pytest.raises(ValueError, match=r"x must be \[B, 64, H, W\] for this weight"):
        call(x[:, :32], packed, w.shape)
    few = torch.zeros(8, 32, 1, 1, dtype=torch.float16)
    with pytest.raises(ValueError, match="input channels must be a multiple of 64, got 32"):
        call(x[:, :32], pack_conv_ref(few), few.shape)
    grouped = torch.zeros(8, 64, 1, 1, dtype=torch.float16)
    with pytest.raises(ValueError, match="groups must be 1, got 2"):
        call(torch.cat([x, x], 1), pack_conv_ref(grouped), grouped.shape, groups=2)
    assert not mma_conv.takes(x, packed, convolution(w.shape))  # not on a GPU
