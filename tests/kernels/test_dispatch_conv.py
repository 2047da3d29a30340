"""Which implementation conv2d_24 is dispatched to; a convolution of one tap as a linear layer."""

import inspect
import math
import timeit

import pytest
import torch
from helpers import assert_no_worse_than_dense, randn, random_24
from tune_fakes import HEAD, Fake, ok, table_of

from slimgemm.kernels import conv_24_dense, dispatch, implementations, tune_table
from slimgemm.kernels.conv_layout import convolution
from slimgemm.kernels.reference import spmm_24_ref
from slimgemm.kernels.reference_conv import conv2d_24_ref, pack_conv_ref, unpack_conv_ref
from slimgemm.kernels.tune_table import Choice, Row, Table
from slimgemm.sparse_ops import library_conv

BF16, LAST = torch.bfloat16, torch.channels_last


def weight_24(out, channels, kernel=(1, 1), dtype=BF16):
    """2:4 along the channels, small whole numbers: every sum of them is exact in 16 bits."""
    rows = random_24(out * math.prod(kernel), channels, seed=1).mul(2).round().clamp(-2, 2)
    return rows.view(out, *kernel, channels).permute(0, 3, 1, 2).to(dtype)


def images(batch, channels, height, width, layout=LAST, dtype=BF16):
    """Whole numbers from -2 to 2."""
    x = randn(batch, channels, height, width).mul(2).round().clamp(-2, 2).to(dtype)
    return torch.empty_like(x, memory_format=layout).copy_(x)


def row_of(conv, m, times):
    results = [ok(Choice(c) if isinstance(c, str) else c, us) for c, us in times.items()]
    return Row("conv2d_24", "bf16", conv.out, conv.k, m, tuple(results), conv)


def plans_of(*rows, **convolutions):
    """Plans of rows for conv2d_24 and (n, k, m, times) for spmm_24; Fakes of both ops."""
    linear = table_of(*[row for row in rows if not isinstance(row, Row)]).rows
    table = Table(HEAD, (*linear, *[row for row in rows if isinstance(row, Row)]))
    fakes = {name: Fake() for name in implementations.IMPLEMENTATIONS}
    convs = {name: Fake(conv2d_24_ref) for name in implementations.CONVOLUTIONS} | convolutions
    return dispatch.Plans(table, fakes, convs), fakes, convs


@pytest.fixture
def portable(monkeypatch):
    """The portable launchers are Fakes, by op."""
    found = {"spmm_24": Fake(spmm_24_ref), "conv2d_24": Fake(conv2d_24_ref)}
    monkeypatch.setattr(dispatch, "launcher", lambda op: found[op].bind(None, None))
    return found


def ran(fakes):
    return [name for name, fake in fakes.items() if fake.calls]


def strides_of_the_operator(x, out, size):
    return library_conv.images(x.to("meta"), out, size).stride()


THREE = convolution((32, 64, 3, 3), padding=1)
FASTEST_FIRST = {"mma_sp": 1.0, "dense": 2.0, "portable": 3.0}


def run_three(plans, x=None, w=None, conv=THREE):
    w = weight_24(conv.out, conv.channels, conv.kernel) if w is None else w
    x = images(1, conv.channels, 4, 4) if x is None else x
    packed, options = pack_conv_ref(w), (conv.stride, conv.padding, conv.dilation, conv.groups)
    y = plans.conv2d_24(x, packed, conv.weight_shape, None, *options, "relu")
    assert torch.equal(y, conv2d_24_ref(x, packed, conv.weight_shape, None, *options, "relu"))
    return y


@pytest.mark.parametrize("rejecting", [(), ("mma_sp",), ("mma_sp", "dense")], ids=len)
def test_the_fastest_that_takes_the_operands_runs(portable, rejecting):
    rejects = {name: Fake(conv2d_24_ref, takes=False) for name in rejecting}
    plans, _, convs = plans_of(row_of(THREE, 16, FASTEST_FIRST), **rejects)
    run_three(plans)
    assert ran(convs) == [[*FASTEST_FIRST][len(rejecting)]] and not ran(portable)


def test_when_none_takes_them_the_portable_one_runs(portable):
    plans, _, convs = plans_of(
        row_of(THREE, 16, {"mma_sp": 1.0}), mma_sp=Fake(conv2d_24_ref, takes=False)
    )
    run_three(plans)
    assert not ran(convs) and portable["conv2d_24"].calls == 1


OTHERS = {
    "the same": (THREE, True),
    "twice the channels": (convolution((64, 128, 3, 3), padding=1), True),
    "too many channels": (convolution((32, 192, 3, 3), padding=1), False),
    "stride": (convolution((32, 64, 3, 3), padding=1, stride=2), False),
    "padding": (convolution((32, 64, 3, 3), padding=2), False),
    "one side's padding": (convolution((32, 64, 3, 3), padding=(1, 1, 1, 0)), False),
    "dilation": (convolution((32, 64, 3, 3), padding=1, dilation=2), False),
    "kernel": (convolution((32, 64, 1, 3), padding=1), False),
    "groups": (convolution((32, 64, 3, 3), padding=1, groups=2), False),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_row_speaks_for_its_own_geometry_and_near_channels(portable, name):
    conv, served = OTHERS[name]
    plans, _, convs = plans_of(row_of(THREE, 16, FASTEST_FIRST), (32, 576, 16, {"dense": 1.0}))
    run_three(plans, images(1, conv.channels * conv.groups, 4, 4), conv=conv)
    assert ran(convs) == (["mma_sp"] if served else [])
    assert portable["conv2d_24"].calls == (not served)


def test_pixels_pick_the_row():
    few, many = row_of(THREE, 12, {"dense": 1.0}), row_of(THREE, 100, {"mma_sp": 1.0})
    for height, name in ((3, "dense"), (4, "dense"), (5, "mma_sp"), (50, "mma_sp")):
        plans, _, convs = plans_of(few, many)
        run_three(plans, images(1, 64, height, 4))
        assert ran(convs) == [name], height  # 12 and 16 pixels are of one bucket, 20 are not


KINDS = ["as measured", "x", "values", "meta", "nchw", "gaps", "few channels", "odd channels"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_measured_tile_serves_only_operands_that_lie_as_they_did(kind):
    tile, conv = (("mt", 2),), THREE
    conv = conv._replace(out=8, channels=8) if kind == "few channels" else conv
    conv = conv._replace(channels=60) if kind == "odd channels" else conv
    measured = conv._replace(out=16, channels=16) if kind == "few channels" else THREE
    plans, _, convs = plans_of(row_of(measured, 16, {Choice("mma_sp", tile, 4): 1.0}))

    def shifted(t):
        moved = torch.zeros(t.numel() + 1, dtype=t.dtype)[1:]
        return moved.view_as(t).copy_(t)

    x, w = images(1, conv.channels, 4, 4), pack_conv_ref(weight_24(*conv.weight_shape[:2], (3, 3)))
    x = shifted(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if kind == "x" else x
    x = images(1, 64, 4, 4, torch.contiguous_format) if kind == "nchw" else x
    x = images(1, 128, 4, 4)[:, :64] if kind == "gaps" else x
    w = w._replace(**{kind: shifted(getattr(w, kind))}) if kind in ("values", "meta") else w
    plans.conv2d_24(x, w, conv.weight_shape, None, 1, 1)
    assert convs["mma_sp"].bound == [(tile, 4) if kind == "as measured" else (None, None)]


def test_what_was_decided_is_kept_by_kind_of_operand_and_bounded(monkeypatch):
    plans, _, convs = plans_of(row_of(THREE, 16, FASTEST_FIRST))
    for _ in range(3):
        run_three(plans)
    w = pack_conv_ref(weight_24(32, 64, (3, 3)))
    lists = [[32, 64, 3, 3], None, [1, 1], [1, 1, 1, 1], [1, 1], 1, "none"]  # as operators pass
    for _ in range(2):
        plans.conv2d_24(images(1, 64, 4, 4), w, *lists)
    assert convs["mma_sp"].asked == 1 and convs["mma_sp"].calls == 5
    run_three(plans, images(2, 64, 4, 4))
    run_three(plans, images(1, 64, 4, 4, torch.contiguous_format))
    assert convs["mma_sp"].asked == 3 and len(plans.kept) == 3
    monkeypatch.setattr(dispatch, "MOST_PLANS", 3)
    run_three(plans, images(3, 64, 4, 4))
    assert len(plans.kept) == 1


@pytest.mark.parametrize("kind", ["1:4", "float64", "no images"])
def test_what_no_table_covers_runs_on_the_portable_one(portable, kind):
    plans, _, convs = plans_of(row_of(THREE, 16, FASTEST_FIRST))
    x, w = images(0 if kind == "no images" else 1, 64, 4, 4), weight_24(32, 64, (3, 3))
    if kind == "float64":
        x, w = x.double(), w.double()
    if kind == "1:4":
        w = random_24(32 * 9, 64, BF16, keep=1).view(32, 3, 3, 64).permute(0, 3, 1, 2)
    packed = pack_conv_ref(w, 1 if kind == "1:4" else 2)
    plans.conv2d_24(x, packed, w.shape, None, 1, 1)
    assert not ran(convs) and portable["conv2d_24"].calls == 1


def test_operands_that_do_not_fit_are_refused():
    plans, _, _ = plans_of(row_of(THREE, 16, FASTEST_FIRST))
    packed = pack_conv_ref(weight_24(32, 64, (3, 3)))
    with pytest.raises(ValueError, match=r"x must be \[B, 64, H, W\] for this weight"):
        plans.conv2d_24(images(1, 32, 4, 4), packed, (32, 64, 3, 3))
    with pytest.raises(ValueError, match="packed weight must be"):
        plans.conv2d_24(images(1, 64, 4, 4), packed, (32, 64, 3, 1))
    with pytest.raises(ValueError, match="x of 1 x 1 pixels must not be smaller than the kernel"):
        plans.conv2d_24(images(1, 64, 1, 1), packed, (32, 64, 3, 3))


# ---- one tap as a linear layer
ONE_TAP = {
    "aligned": (2, 64, 24, 3, 5),
    "one image": (1, 16, 8, 4, 4),
    "one pixel": (3, 16, 8, 1, 1),
    "one out channel": (2, 16, 1, 3, 2),
    "padded channels": (2, 12, 8, 3, 3),
    "odd channels": (1, 5, 3, 2, 3),
}


@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("name", ONE_TAP)
def test_a_linear_layer_gives_the_same_bits_and_strides(portable, name, with_bias):
    batch, channels, out, height, width = ONE_TAP[name]
    seen = {}

    def spmm(x, w, bias, scale, act):
        seen.update(x=x, k=w.k, scale=scale, act=act, y=spmm_24_ref(x, w, bias, scale, act))
        return seen["y"]

    plans, fakes, convs = plans_of((out, channels, 64, {"mma_sp": 1.0}))
    fakes["mma_sp"].run = spmm
    x, w = images(batch, channels, height, width), weight_24(out, channels)
    assert x.stride() == (height * width * channels, 1, width * channels, channels)
    bias = torch.arange(-2.0, out - 2) if with_bias else None
    packed = pack_conv_ref(w)
    got = plans.conv2d_24(x, packed, w.shape, bias, act="relu")
    assert torch.equal(got, conv2d_24_ref(x, packed, w.shape, bias, act="relu"))
    assert got.stride() == strides_of_the_operator(x, out, (height, width))
    assert ran(fakes) == ["mma_sp"] and not ran(convs) and not ran(portable)
    # Views on both sides: no copy of the images, none of the result.
    assert seen["x"].shape == (batch, height, width, channels) and seen["x"].is_contiguous()
    assert seen["x"].data_ptr() == x.data_ptr() and seen["y"].data_ptr() == got.data_ptr()
    assert (seen["k"], seen["scale"], seen["act"]) == (channels, None, "relu")
    pixel = got.permute(0, 2, 3, 1)[-1, -1, 0]
    by_hand = torch.relu(
        w[:, :, 0, 0].float() @ x[-1, :, -1, 0].float() + (0 if bias is None else bias)
    )
    assert torch.equal(pixel.float(), by_hand)


NOT_LINEAR = {
    "nchw": dict(layout=torch.contiguous_format),
    "gaps": dict(cut=True),
    "one pixel, contiguous": dict(layout=torch.contiguous_format, size=(1, 1)),
    "stride": dict(stride=2),
    "padding": dict(padding=1),
    "one side's padding": dict(padding=(0, 0, 0, 1)),
    "groups": dict(groups=2),
    "three taps": dict(kernel=(1, 3)),
}


@pytest.mark.parametrize("name", NOT_LINEAR)
def test_what_is_no_linear_layer_stays_a_convolution(portable, name):
    case = NOT_LINEAR[name]
    kernel, groups = case.get("kernel", (1, 1)), case.get("groups", 1)
    x = images(2, 32 * groups, *case.get("size", (3, 4)), case.get("layout", LAST))
    x = images(2, 64, 3, 4)[:, :32] if case.get("cut") else x
    plans, fakes, convs = plans_of((16, 32, 32, {"mma_sp": 1.0}))
    w = weight_24(16, 32, kernel)
    options = (case.get("stride", 1), case.get("padding", 0), 1, groups)
    got = plans.conv2d_24(x, pack_conv_ref(w), w.shape, None, *options)
    assert torch.equal(got, conv2d_24_ref(x, pack_conv_ref(w), w.shape, None, *options))
    assert portable["conv2d_24"].calls == 1 and not ran(fakes) and not ran(convs)


def test_without_a_row_for_the_linear_layer_the_portable_convolution_runs(portable):
    plans, fakes, _ = plans_of((256, 32, 32, {"mma_sp": 1.0}))
    plans.conv2d_24(images(2, 32, 3, 4), pack_conv_ref(weight_24(16, 32)), (16, 32, 1, 1))
    assert portable["conv2d_24"].calls == 1 and not ran(fakes)


@pytest.mark.parametrize("fastest", ["linear", "dense"])
def test_a_row_of_its_own_decides_whether_it_is_a_linear_layer(portable, fastest):
    conv = convolution((16, 32, 1, 1))
    slower = {"linear": "dense", "dense": "linear"}[fastest]
    row = row_of(conv, 32, {fastest: 1.0, slower: 2.0})
    plans, fakes, convs = plans_of(row, (16, 32, 32, {"mma_sp": 1.0}))
    plans.conv2d_24(images(2, 32, 3, 4), pack_conv_ref(weight_24(16, 32)), (16, 32, 1, 1))
    assert ran(fakes) == (["mma_sp"] if fastest == "linear" else [])
    assert ran(convs) == (["dense"] if fastest == "dense" else []) and not ran(portable)
    # NCHW images are no linear layer, whatever the row says.
    x = images(2, 32, 3, 4, torch.contiguous_format)
    plans.conv2d_24(x, pack_conv_ref(weight_24(16, 32)), (16, 32, 1, 1))
    assert ran(convs) == ["dense"]


@pytest.mark.parametrize("layout", [LAST, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3)], ids=str)
def test_through_the_operator_strides_are_what_its_fake_says(monkeypatch, kernel, layout):
    """Lists arrive as arguments, and torch.compile relies on the strides."""
    conv = convolution((16, 32, *kernel))
    plans, fakes, _ = plans_of(row_of(THREE, 16, {"dense": 1.0}), (16, 32, 32, {"dense": 1.0}))
    portable = {"spmm_24": spmm_24_ref, "conv2d_24": conv2d_24_ref}
    monkeypatch.setattr(dispatch, "launcher", portable.get)
    monkeypatch.setattr(library_conv, "implementation", lambda op, device: plans.conv2d_24)
    w = pack_conv_ref(weight_24(16, 32, kernel))
    x = images(2, 32, 4, 4, layout)
    arguments = (w.values, w.meta, None, (16, 32, *kernel), (1, 1), (0, 0, 0, 0), (1, 1), 1, 2, 4)
    got = library_conv.conv2d_24(x, *arguments, "none")
    size = conv.output_size(4, 4)
    assert got.stride() == strides_of_the_operator(x, 16, size)
    assert torch.equal(got, conv2d_24_ref(x, w, (16, 32, *kernel)))
    assert bool(fakes["dense"].calls) == (kernel == (1, 1) and layout is LAST)


def test_a_gpu_with_a_table_dispatches(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tune_table, "here", lambda device: HEAD)
    gpu = torch.device("cuda", 0)
    dispatch.reload()
    try:
        assert dispatch.implementation("conv2d_24", gpu) is dispatch.launcher("conv2d_24")
        tune_table.save(
            Table(HEAD, (row_of(THREE, 16, FASTEST_FIRST),)), tune_table.user_path(HEAD)
        )
        dispatch.reload()
        assert dispatch.implementation("conv2d_24", gpu) == dispatch.plans(0).conv2d_24
        for op in ("conv2d_24_dgrad", "unpack_conv"):
            assert dispatch.implementation(op, gpu) is dispatch.launcher(op)
    finally:
        dispatch.reload()


# ---- the implementations
DENSE = {
    "one_side": ((8, 8, 2, 3), dict(padding=(1, 0, 0, 2))),
    "groups": ((8, 4, 3, 3), dict(padding=1, groups=2, stride=2)),
    "same": ((5, 12, 3, 3), dict(padding="same", dilation=2)),
}


@pytest.mark.parametrize("layout", [LAST, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, BF16, torch.float32], ids=str)
@pytest.mark.parametrize("name", DENSE)
def test_dense_is_right(monkeypatch, name, dtype, layout):
    monkeypatch.setattr(conv_24_dense, "unpack_conv", unpack_conv_ref)
    shape, options = DENSE[name]
    w = pack_conv_ref(weight_24(*shape[:2], shape[2:], dtype))
    x = randn(2, shape[1] * options.get("groups", 1), 6, 7, dtype=dtype)
    x = x.contiguous(memory_format=layout)
    bias = randn(shape[0], seed=1)
    got = conv_24_dense.conv2d_24_dense(x, w, shape, bias, act="gelu", **options)
    wide = w._replace(values=w.values.double())
    exact = conv2d_24_ref(x.double(), wide, shape, bias.double(), act="gelu", **options)
    twin = conv2d_24_ref(x, w, shape, bias, act="gelu", **options)
    assert_no_worse_than_dense(got, twin, exact, "dense")
    assert got.stride() == strides_of_the_operator(x, shape[0], got.shape[2:])
    with torch.autocast("cpu", dtype=BF16):
        cast = conv_24_dense.conv2d_24_dense(x, w, shape, bias, act="gelu", **options)
    assert torch.equal(cast, got)


def test_dense_refuses():
    w, call = pack_conv_ref(weight_24(8, 8)), conv_24_dense.conv2d_24_dense
    with pytest.raises(ValueError, match="act must be one of none"):
        call(images(1, 8, 2, 2), w, (8, 8, 1, 1), act="tanh")
    with pytest.raises(ValueError, match=r"bias must be floating \[8\]"):
        call(images(1, 8, 2, 2), w, (8, 8, 1, 1), torch.zeros(4))
    with pytest.raises(ValueError, match=r"x must be \[B, 8, H, W\]"):
        call(images(1, 16, 2, 2), w, (8, 8, 1, 1))


@pytest.mark.parametrize("name", implementations.CONVOLUTIONS)
def test_what_a_table_names_exists_with_the_arguments_of_conv2d_24(name):
    found = implementations.CONVOLUTIONS[name]
    pytest.importorskip(f"slimgemm.kernels.{found.file}")
    run = found.bind(None, None)
    parameters = list(inspect.signature(run).parameters)
    assert parameters[:9] == list(inspect.signature(conv2d_24_ref).parameters)
    assert bool(found.tile) == ("tile" in parameters)
    assert (found.splits in parameters) == bool(found.splits)
    x, w = images(1, 64, 4, 4), pack_conv_ref(weight_24(32, 64, (3, 3)))
    assert not found.picky or found.takes(x, w, THREE) is False  # no GPU holds them


def test_a_linear_layer_has_no_tile_here():
    linear = implementations.Linear(spmm_24_ref)
    assert implementations.BY_OP["conv2d_24"] == (*implementations.CONVOLUTIONS, "linear")
    with pytest.raises(ValueError, match=r"linear has no tiles and splits, got \(\('m', 16\),\)"):
        linear.bind((("m", 16),), None)


def test_a_decision_costs_the_host_little():
    """Generous, as the machine may be busy."""
    nothing = type("Nothing", (Fake,), {"bind": lambda self, tile, splits: lambda *args: None})
    plans, _, _ = plans_of(row_of(THREE, 16, FASTEST_FIRST), mma_sp=nothing())
    x, w = images(1, 64, 4, 4), pack_conv_ref(weight_24(32, 64, (3, 3)))
    options = [32, 64, 3, 3], None, [1, 1], [1, 1, 1, 1], [1, 1], 1, "none"
    call = lambda: plans.conv2d_24(x, w, *options)  # noqa: E731
    call()
    us = min(timeit.repeat(call, number=2000, repeat=5)) / 2000 * 1e6
    print(f"{us:.2f} us")
    assert us < 30, f"{us:.2f} us"
