"""wgmma_conv on the NumPy executor: geometries, boxes and epilogues against torch's conv2d."""

import gluon_numpy
import pytest
import torch
import torch.nn.functional as F
from gluon_numpy import Fault
from helpers import assert_no_worse_than_dense, randn

from slimgemm.kernels.conv_layout import convolution
from slimgemm.kernels.gluon import wgmma_conv, wgmma_image, wgmma_sp
from slimgemm.kernels.gluon.wgmma_image import boxes_of
from slimgemm.kernels.reference import activate
from slimgemm.kernels.reference_conv import pack_conv_ref

NHWC = torch.channels_last
GEOMETRIES = {  # (batch, channels, out, height, width, kernel), options
    "3x3": ((2, 64, 24, 9, 17, (3, 3)), dict(padding=1)),
    "1x1": ((1, 128, 130, 7, 5, (1, 1)), {}),
    "several images a box": ((3, 64, 16, 4, 5, (3, 3)), dict(padding=1)),
    "dilated": ((1, 64, 16, 12, 12, (3, 3)), dict(dilation=2, padding=2)),
    "sides differ": ((1, 192, 5, 6, 20, (2, 3)), dict(padding=(0, 2))),
    "K ends within a block": ((1, 64, 8, 4, 6, (1, 3)), dict(padding="same")),
}


def problem(shape, dtype=torch.float16):
    batch, channels, out, height, width, kernel = shape
    dense = randn(out, channels // 4, 4, *kernel, seed=1)
    dropped = randn(*dense.shape, seed=2).argsort(2) < 2
    w = dense.masked_fill(dropped, 0).reshape(out, channels, *kernel).to(dtype)
    x = randn(batch, channels, height, width, dtype=dtype, seed=3)
    return x.contiguous(memory_format=NHWC), w


def run(x, w, replace=None, programs=3, bias=None, act="none", **options):
    conv = convolution(w.shape, **options)
    launch = wgmma_conv.prepare(x, pack_conv_ref(w), conv, bias, act, programs=programs)
    gluon_numpy.run(
        wgmma_sp._wgmma_sp_kernel, launch.grid, *launch.args, replace=replace, **launch.constants
    )
    return launch.out


def check(shape, options, dtype=torch.float16, bias=None, act="none"):
    x, w = problem(shape, dtype)
    got = run(x, w, bias=bias, act=act, **options)
    same, wide = (b if b is None else b.to(t) for b, t in ((bias, dtype), (bias, torch.float64)))
    dense = activate(F.conv2d(x, w, same, **options), act)
    exact = activate(F.conv2d(x.double(), w.double(), wide, **options), act)
    assert got.is_contiguous(memory_format=NHWC)
    assert_no_worse_than_dense(got, dense, exact, "wgmma_conv")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_geometries(name, dtype):
    check(*GEOMETRIES[name], dtype)


@pytest.mark.parametrize("act", ["relu", "silu"])
def test_epilogues(act):
    check((1, 64, 20, 5, 6, (3, 3)), dict(padding=1), bias=randn(20, seed=5), act=act)


def test_infinity_beside_the_last_columns_of_k_stays_out():
    x, w = problem((1, 64, 8, 4, 6, (1, 3)))
    x[0, 0, 2, 3] = float("inf")
    got = run(x, w, padding="same")
    want = F.conv2d(x.double(), w.double(), padding="same")
    assert torch.equal(got.isfinite(), want.isfinite())


def test_one_image_may_have_any_pitch():
    """Torch calls it contiguous; TMA takes only pitches of whole 16 bytes."""
    x, w = problem((1, 64, 8, 4, 4, (3, 3)))
    pitched = x.as_strided(x.shape, (1025, *x.stride()[1:]))
    assert pitched.is_contiguous(memory_format=NHWC)
    assert torch.equal(run(pitched, w, padding=1), run(x, w, padding=1))


@pytest.mark.parametrize(
    ("batch", "height", "width", "count"),
    [(1, 56, 56, 28), (1, 14, 14, 2), (8, 7, 7, 4), (1, 1, 128, 1), (1, 128, 1, 1), (2, 8, 8, 1)],
)
def test_boxes_cover_the_output_with_few_programs(batch, height, width, count):
    boxes = boxes_of(convolution((8, 64, 1, 1)), batch, height, width)
    assert boxes.images * boxes.rows * boxes.columns == 128
    assert boxes.count <= count
    assert boxes.count * 128 >= batch * height * width


FAULTS = {
    "no padding": ("load_pixels", " - BOXES.top", " - 0 * BOXES.top"),
    "tap row and column": ("load_pixels", "tap % BOXES.kernel_width", "tap // BOXES.kernel_width"),
    "another box of X": ("load_pixels", "% BOXES.across * BOXES.columns", "% BOXES.across * 8"),
    "the tap of the other half": ("load_pixels", "half * 64\n", "(1 - half) * 64\n"),
    "rows of a box": ("pixel_of", "token // BOXES.columns % BOXES.rows", "token % BOXES.rows"),
    "pixels past the width": ("pixel_of", " & (pixel < BOXES.out_width)", ""),
    "rows past the height": ("pixel_of", " & (row < BOXES.out_height)", ""),
    "images past the batch": ("pixel_of", "(image < BOXES.batch) & ", ""),
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_seen(name):
    function, old, new = FAULTS[name]
    changed = gluon_numpy.mutated(getattr(wgmma_image, function), old, new)
    seen = False
    for shape in ((3, 64, 24, 6, 10, (3, 3)), (3, 64, 8, 4, 5, (3, 3)), (1, 64, 8, 3, 140, (3, 3))):
        x, w = problem(shape)
        exact = F.conv2d(x.double(), w.double(), padding=1)
        try:
            got = run(x, w, replace={function: changed}, padding=1)
        except Fault as fault:
            assert "y_ptr" in str(fault) or "stored twice" in str(fault)
            seen = True
        else:
            seen |= float((got.double() - exact).abs().max() / exact.abs().max()) > 0.05
    assert seen


def test_launcher_refuses_before_anything_runs():
    call = wgmma_conv.conv2d_24_wgmma
    x, w = problem((1, 64, 8, 4, 4, (3, 3)))
    packed = pack_conv_ref(w)
    with pytest.raises(ValueError, match="x must be on a GPU, got cpu"):
        call(x, packed, w.shape)
    with pytest.raises(ValueError, match=r"stride must be 1, got \(2, 2\); mma_conv takes any"):
        call(x, packed, w.shape, stride=2)
    with pytest.raises(ValueError, match="x must be channels_last"):
        call(x.contiguous(), packed, w.shape)
    assert not wgmma_conv.takes(x, packed, convolution(w.shape))  # not on a GPU
