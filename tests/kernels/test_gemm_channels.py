"""gemm_channels and gemm_channels_wgrad: layouts, twin, algebra, guards and refusals."""

import pytest
import torch
from helpers import assert_no_worse_than_dense, randn
from hypothesis import given, settings
from hypothesis import strategies as st

from slimgemm.kernels.channel_layout import (
    RAGGED,
    RANGE,
    ChannelLayout,
    channel_layout,
)
from slimgemm.kernels.configs import (
    GEMM_CHANNELS_RAGGED_TILES,
    GEMM_CHANNELS_TILES,
    Tile,
    gemm_channels_tile,
)
from slimgemm.kernels.formats import ChannelIndex, channel_index
from slimgemm.kernels.gemm_channels import gemm_channels
from slimgemm.kernels.gemm_channels_wgrad import gemm_channels_wgrad
from slimgemm.kernels.reference import ACTIVATIONS, activate
from slimgemm.kernels.reference_channels import gemm_channels_ref, gemm_channels_wgrad_ref

TILE = Tile(16, 16, 16)
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
BLOCKS = [*range(8, 16), *range(32, 48)]
# kind -> kept channels of an axis of 48
KEPT = {
    "all": None,
    "range": range(16, 40),
    "odd_range": range(5, 22),
    "blocked": BLOCKS,
    "ragged": [0, 3, 4, 9, 17, 18, 33, 46, 47],
    "one": [47],
}
# name: M, in kind, out kind, split
SHAPES = {
    "exact": (32, "all", "all", 1),
    "ragged_m": (19, "range", "blocked", 1),
    "ragged_n": (16, "blocked", "odd_range", 1),
    "ragged_k": (16, "odd_range", "blocked", 1),
    "ragged_index": (16, "ragged", "ragged", 1),
    "one_row": (1, "ragged", "range", 1),
    "one_channel": (3, "one", "one", 1),
    "no_rows": (0, "ragged", "ragged", 1),
    "split": (5, "all", "ragged", 3),
    "many": (40, "blocked", "blocked", 2),
}


def index(kind, width=48, device="cpu"):
    kept = KEPT[kind]
    return None if kept is None else channel_index(torch.tensor(list(kept), device=device), width)


def kept_list(kind, width=48):
    return list(range(width)) if KEPT[kind] is None else list(KEPT[kind])


def widen(y, kept, width):
    """`y` [..., kept] in a zero tensor [..., width]."""
    wide = y.new_zeros(*y.shape[:-1], width)
    wide[..., kept] = y
    return wide


@pytest.mark.parametrize(
    ("kept", "groups", "start", "run"),
    [
        (range(16, 40), 1, 16, RANGE),
        (range(8, 24), 1, 0, 8),  # aligned to 8 only: runs can be read 8 at a time
        (range(5, 22), 1, 5, RANGE),
        (BLOCKS, 1, 0, 8),
        ([*range(16), *range(32, 48)], 1, 0, 16),
        ([*range(9, 17), *range(32, 40)], 1, 0, RAGGED),  # runs, but not aligned
        ([0, 3], 1, 0, RAGGED),
        ([], 1, 0, RANGE),
        ([*range(4), *range(24, 28)], 2, 0, RAGGED),  # 4 channels a group: no run of 8
        ([*range(8), *range(24, 32)], 2, 0, 8),
    ],
)
def test_layout_kind(kept, groups, start, run):
    kept = list(kept)
    layout = channel_layout(channel_index(kept, 48), 0, "i", groups)
    assert (layout.start, layout.run, layout.kept) == (start, run, len(kept))


def test_layout_is_read_once_and_again_after_a_change(monkeypatch):
    kept = channel_index([1, 4, 6], 8)
    assert channel_layout(kept, 8, "i").run == RAGGED
    copies = []
    monkeypatch.setattr(Tensor := torch.Tensor, "cpu", lambda t: copies.append(t) or t.clone())
    assert channel_layout(kept, 8, "i").run == RAGGED and not copies
    kept.index.copy_(torch.tensor([2, 3, 4]))
    assert channel_layout(kept, 8, "i") == ChannelLayout(None, 8, 3, 2, RANGE) and copies
    kept.index[0] = 9
    with pytest.raises(ValueError, match=r"i must be in 0\.\.7, got 9 at place 0"):
        channel_layout(kept, 8, "i")
    assert Tensor is torch.Tensor


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_all_three_products_match_float64(shape, dtype, device):
    m, kind_in, kind_out, split = shape
    ins, outs = index(kind_in, device=device), index(kind_out, device=device)
    kept_in, kept_out = kept_list(kind_in), kept_list(kind_out)
    w = randn(len(kept_out), len(kept_in), dtype=dtype, seed=1, device=device)
    x = randn(m, 48, dtype=dtype, seed=2, device=device)
    dy = randn(m, 48, dtype=dtype, seed=3, device=device)
    bias = randn(len(kept_out), dtype=dtype, seed=4, device=device)
    y = gemm_channels(x, w, ins, outs, bias, tile=TILE, split=split)
    dx = gemm_channels(dy, w.t(), outs, ins, tile=TILE, split=split)
    dw = gemm_channels_wgrad(dy, x, ins, outs, tile=TILE, split=split)

    def products(x, w, dy, bias):
        x, dy = x[:, kept_in], dy[:, kept_out]
        return (
            widen(x @ w.t() + bias, kept_out, 48),
            widen(dy @ w, kept_in, 48),
            dy.t() @ x,
        )

    dense = products(x, w, dy, bias)
    exact = products(*(t.double() for t in (x, w, dy, bias)))
    for name, got, same, right in zip(("y", "dx", "dw"), (y, dx, dw), dense, exact, strict=True):
        assert_no_worse_than_dense(got, same, right, name)
    dropped_out = [c for c in range(48) if c not in kept_out]
    assert torch.equal(y[:, dropped_out], torch.zeros_like(y[:, dropped_out]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_all_kinds_give_the_same_bits(dtype, device):
    kept = channel_index(range(16, 32), 40)
    layouts = [
        ChannelLayout(kept.index.to(device), 40, 16, 16 if run == RANGE else 0, run)
        for run in (RANGE, RAGGED, 8, 16)
    ]
    w = randn(16, 16, dtype=dtype, seed=1, device=device)
    x = randn(9, 40, dtype=dtype, seed=2, device=device)
    results = [
        gemm_channels(x, w, ins, outs, tile=TILE)
        for ins, outs in zip(layouts, layouts[::-1], strict=True)
    ]
    gradients = [gemm_channels_wgrad(x, x, ins, ins, tile=TILE) for ins in layouts]
    assert all(torch.equal(y, results[0]) for y in results)
    assert all(torch.equal(dw, gradients[0]) for dw in gradients)


@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activations(act, split, device):
    ins, outs = index("ragged", device=device), index("odd_range", device=device)
    w, bias = randn(17, 9, seed=1, device=device), randn(17, seed=2, device=device)
    x = randn(6, 48, seed=3, device=device)
    got = gemm_channels(x, w, ins, outs, bias, act, tile=Tile(16, 16, 8), split=split)
    z = x[:, KEPT["ragged"]] @ w.t() + bias
    exact = x.double()[:, KEPT["ragged"]] @ w.double().t() + bias.double()
    dense = widen(activate(z, act), list(KEPT["odd_range"]), 48)
    exact = widen(activate(exact, act), list(KEPT["odd_range"]), 48)
    assert_no_worse_than_dense(got, dense, exact, act)


VIEWS = {
    "leading": lambda x: x.view(2, 3, 4, 48),
    "permuted": lambda x: x.view(2, 12, 48).transpose(0, 1),
    "three_strides": lambda x: x.view(2, 3, 4, 48).permute(2, 1, 0, 3),
    "transposed": lambda x: x.reshape(48, 24).t(),
    "every_second": lambda x: x[::2],
    "expanded": lambda x: x[:1].expand(7, 48),
    "reversed_columns": lambda x: x.repeat(1, 2)[:, ::2],
    "vector": lambda x: x[3],
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_any_strides_and_leading_dims(view, device):
    x = view(randn(24, 48, seed=1, device=device))
    ins, outs = index("ragged", device=device), index("blocked", device=device)
    w = randn(9, 24, seed=2, device=device).t()  # [24, 9], transposed
    got = gemm_channels(x, w, ins, outs, tile=TILE)
    copy = gemm_channels(x.contiguous(), w.contiguous(), ins, outs, tile=TILE)
    assert torch.equal(got, copy) and got.is_contiguous()
    assert got.shape == (*x.shape[:-1], 48)
    torch.testing.assert_close(got, gemm_channels_ref(x, w, ins, outs))
    dw = gemm_channels_wgrad(got, x, ins, outs, tile=TILE)
    torch.testing.assert_close(dw, gemm_channels_wgrad_ref(got, x, ins, outs))


def test_no_channels_at_all(device):
    none = channel_index([], 48)
    x = randn(4, 48, device=device)
    bias = randn(24, seed=1, device=device)
    y = gemm_channels(x, x.new_empty(24, 0), none, index("blocked", device=device), bias)
    assert torch.equal(y, widen(bias.expand(4, 24), BLOCKS, 48))
    assert torch.equal(gemm_channels(x, x.new_empty(0, 48), None, none), torch.zeros_like(x))
    assert gemm_channels_wgrad(x, x, none, none).shape == (0, 0)


def test_identity_weight_moves_channels_exactly(device):
    ins, outs = index("ragged", device=device), index("ragged", device=device)
    x = randn(5, 48, dtype=torch.bfloat16, device=device)
    y = gemm_channels(x, torch.eye(9, dtype=x.dtype, device=device), ins, outs, tile=TILE)
    kept = KEPT["ragged"]
    assert torch.equal(y, widen(x[:, kept], kept, 48))


def guarded(shape, dtype=torch.float32, seed=0, device="cpu"):
    """A random tensor inside a larger buffer of NaN: reads past its edge show."""
    outer = torch.full([s + 6 for s in shape], float("nan"), dtype=dtype, device=device)
    inner = outer[tuple(slice(3, 3 + s) for s in shape)]
    return inner.copy_(randn(*shape, dtype=dtype, seed=seed, device=device))


@pytest.mark.parametrize("kind", ["range", "odd_range", "blocked", "ragged"])
def test_dropped_channels_and_what_lies_around_are_never_read(kind, device):
    kept = list(KEPT[kind])
    w = guarded((len(kept), len(kept)), seed=1, device=device)
    x, dy = (guarded((19, 48), seed=s, device=device) for s in (2, 3))
    dropped = [c for c in range(48) if c not in kept]
    clean_x, clean_dy = x.clone(), dy.clone()
    x[:, dropped] = float("nan")
    dy[:, dropped] = float("inf")
    both = index(kind, device=device)
    for split in (1, 2):
        y = gemm_channels(x, w, both, both, tile=TILE, split=split)
        assert torch.equal(y, gemm_channels(clean_x, w, both, both, tile=TILE, split=split))
        dw = gemm_channels_wgrad(dy, x, both, both, tile=TILE, split=split)
        clean = gemm_channels_wgrad(clean_dy, clean_x, both, both, tile=TILE, split=split)
        assert torch.equal(dw, clean) and bool(dw.isfinite().all())


@pytest.mark.parametrize("split", [1, 3])
def test_nothing_is_written_outside_the_output(split, device, monkeypatch):
    """The output and the parts lie inside larger buffers of a sentinel, which must survive."""
    buffers, new_empty = [], torch.Tensor.new_empty

    def embedded(like, *shape, dtype=None, fill=float("nan"), **interpreter):
        if interpreter:
            return new_empty(like, *shape, dtype=dtype, **interpreter)
        shape = torch.Size(shape)
        outer = torch.full((shape.numel() + 512,), 77.0, dtype=dtype or like.dtype, device=device)
        buffers.append(outer)
        return outer[256 : 256 + shape.numel()].view(shape).fill_(fill)

    monkeypatch.setattr(torch.Tensor, "new_empty", embedded)
    monkeypatch.setattr(torch.Tensor, "new_zeros", lambda t, *s, **k: embedded(t, *s, **k, fill=0))
    x = randn(19, 48, seed=2, device=device)
    w = randn(9, 24, seed=1, device=device)
    ins, outs = index("blocked", device=device), index("ragged", device=device)
    y = gemm_channels(x, w, ins, outs, tile=TILE, split=split)
    dw = gemm_channels_wgrad(y, x, ins, outs, tile=TILE, split=split)
    assert bool(y.isfinite().all() & dw.isfinite().all())
    assert len(buffers) == (2 if split == 1 else 4)
    for outer in buffers:
        assert bool((outer[:256] == 77).all() & (outer[-256:] == 77).all())


@settings(max_examples=15, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_index_pattern(data):
    width = data.draw(st.integers(1, 40))
    channels = st.sets(st.integers(0, width - 1)).map(sorted)
    ins, outs = (channel_index(data.draw(channels), width) for _ in range(2))
    m, split = data.draw(st.integers(0, 5)), data.draw(st.integers(1, 3))
    w, x = randn(outs.kept, ins.kept, seed=1), randn(m, width, seed=2)
    y = gemm_channels(x, w, ins, outs, tile=TILE, split=split)
    torch.testing.assert_close(y, gemm_channels_ref(x, w, ins, outs))
    dw = gemm_channels_wgrad(y, x, ins, outs, tile=TILE, split=split)
    torch.testing.assert_close(dw, gemm_channels_wgrad_ref(y, x, ins, outs))


def test_runs_repeat_bit_for_bit_with_shipped_tiles(device):
    x, w = randn(33, 48, seed=1, device=device), randn(9, 24, seed=2, device=device)
    ins, outs = index("blocked", device=device), index("ragged", device=device)
    first = gemm_channels(x, w, ins, outs)
    assert torch.equal(first, gemm_channels(x, w, ins, outs))
    torch.testing.assert_close(first, gemm_channels_ref(x, w, ins, outs))
    assert torch.equal(gemm_channels_wgrad(x, x, ins, outs), gemm_channels_wgrad(x, x, ins, outs))


def test_tiles_by_rows_and_precision():
    def tile(rows, itemsize, scalar=False, ragged=False):
        return gemm_channels_tile(rows, itemsize, scalar, ragged)

    last = GEMM_CHANNELS_TILES[-1]
    assert tile(16, 2) == tile(1, 2) == GEMM_CHANNELS_TILES[0] and tile(9999, 2) == last
    assert tile(9999, 2, ragged=True) == GEMM_CHANNELS_RAGGED_TILES[-1]
    assert tile(16, 2, ragged=True) == GEMM_CHANNELS_RAGGED_TILES[0]
    assert tile(9999, 4) == last._replace(n=64, stages=3)
    assert tile(16, 4).k == GEMM_CHANNELS_TILES[0].k // 2
    assert tile(9999, 4, scalar=True) == Tile(64, 64, 16, 8)


def call(run, **changed):
    """`run` of good operands, some of them changed."""
    x = changed.pop("x", torch.zeros(2, 8))
    w = changed.pop("w", torch.zeros(4, 3))
    ins = changed.pop("ins", ChannelIndex(torch.tensor([0, 2, 5]), 8))
    outs = changed.pop("outs", ChannelIndex(torch.tensor([1, 2, 3, 7]), 8))
    return run(x, w, ins, outs, **changed)


def raw(*channels, width=8, dtype=torch.int64):
    """A ChannelIndex that nobody has checked."""
    return ChannelIndex(torch.tensor(channels, dtype=dtype), width)


REFUSED = {
    "negative": ({"ins": raw(-1, 2, 5)}, r"in_index must be in 0\.\.7, got -1 at place 0"),
    "too_large": ({"outs": raw(0, 1, 2, 8)}, r"out_index must be in 0\.\.7, got 8 at place 3"),
    "repeated": ({"ins": raw(2, 2, 5)}, "in_index must be ascending without repeats, got 2 after"),
    "unsorted": ({"ins": raw(2, 5, 3)}, "ascending without repeats, got 3 after 5 at place 2"),
    "float_index": ({"ins": raw(0, 1, 2, dtype=torch.float32)}, "in_index must be int64 of one"),
    "kept_in": ({"ins": raw(0, 1)}, "in_index must keep 3 channels as the weight, got 2"),
    "kept_out": ({"outs": raw(0, 1)}, "out_index must keep 4 channels as the weight, got 2"),
    "range_outside": (
        {"ins": ChannelLayout(None, 8, 3, 6)},
        r"in_index must lie in 0\.\.7, got 6\.\.8",
    ),
    "run": (
        {"ins": ChannelLayout(torch.arange(3), 8, 3, 0, 8)},
        "in runs of 8 or 16 that divide the 3 channels of a group, got runs of 8",
    ),
    "no_index": (
        {"ins": ChannelLayout(None, 8, 3, 0, RAGGED)},
        r"in_index must hold an int64 index \[3\], got None",
    ),
    "index_elsewhere": (
        {"ins": ChannelLayout(torch.arange(3, device="meta"), 8, 3, 0, RAGGED)},
        "in_index must be contiguous on cpu as the other operands, got meta",
    ),
    "x_width": ({"x": torch.zeros(2, 7)}, r"x must be \[\.\.\., 8\] for these in channels"),
    "x_scalar": ({"x": torch.tensor(1.0)}, r"x must be \[\.\.\., 8\]"),
    "x_dtype": ({"x": torch.zeros(2, 8).half()}, "x must be torch.float32 on cpu as w, got"),
    "w_dims": ({"w": torch.zeros(4, 3, 1)}, "w must be a floating matrix"),
    "w_int": ({"w": torch.zeros(4, 3).int()}, "w must be a floating matrix"),
    "bias_shape": ({"bias": torch.zeros(8)}, r"bias must be \[4\], one per kept out channel"),
    "bias_dtype": ({"bias": torch.zeros(4).half()}, "bias must be torch.float32 on cpu as x"),
    "act": ({"act": "tanh"}, "act must be one of none, relu, .* got 'tanh'"),
}


@pytest.mark.parametrize(("changed", "text"), REFUSED.values(), ids=REFUSED.keys())
@pytest.mark.parametrize("run", [gemm_channels, gemm_channels_ref], ids=["kernel", "twin"])
def test_refusals(run, changed, text):
    with pytest.raises(ValueError, match=text):
        call(run, **changed)


def test_kernels_refuse_float64():
    x = torch.zeros(2, 3).double()
    with pytest.raises(
        ValueError, match=r"x must be float16, bfloat16 or float32, got torch\.float64"
    ):
        gemm_channels(x, x)
    with pytest.raises(ValueError, match="dy must be float16, bfloat16 or float32"):
        gemm_channels_wgrad(x, x)


@pytest.mark.parametrize("run", [gemm_channels_wgrad, gemm_channels_wgrad_ref])
def test_wgrad_refusals(run):
    x = torch.zeros(2, 8)
    with pytest.raises(ValueError, match=r"same leading shape, got \[3, 8\] and \[2, 8\]"):
        run(torch.zeros(3, 8), x)
    with pytest.raises(ValueError, match=r"x must be \[\.\.\., 9\] for in_index, got \[2, 8\]"):
        run(x, x, raw(0, 1, width=9))
    with pytest.raises(ValueError, match=r"dy must be \[\.\.\., 9\] for out_index, got \[2, 8\]"):
        run(x, x, None, raw(0, 1, width=9))
    with pytest.raises(ValueError, match=r"dy must be torch\.float32 on cpu as x"):
        run(x.half(), x)
