"""spmm_24, spmm_24_dgrad and spmm_24_wgrad: twin, algebra, memory and refusals."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_no_worse_than_dense, randn, random_24
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slimgemm.kernels import reference
from slimgemm.kernels.configs import SPMM_24_TILES, Tile, split_count, spmm_tile
from slimgemm.kernels.device import as_rows
from slimgemm.kernels.formats import PATTERNS, Packed24
from slimgemm.kernels.pack_24 import pack_24
from slimgemm.kernels.reference import ACTIVATIONS, activate
from slimgemm.kernels.spmm_24 import spmm_24
from slimgemm.kernels.spmm_24_dgrad import spmm_24_dgrad
from slimgemm.kernels.spmm_24_wgrad import spmm_24_wgrad

TILE = Tile(32, 32, 64)
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
NAN, INF = float("nan"), float("inf")
# name: M, N, K, split
SHAPES = {
    "exact": (32, 64, 64, 1),
    "ragged_m": (39, 32, 64, 1),
    "ragged_n": (32, 37, 64, 1),
    "ragged_k": (32, 32, 75, 1),
    "one_row": (1, 40, 72, 1),
    "no_rows": (0, 32, 32, 1),
    "no_k": (4, 32, 0, 1),
    "no_n": (4, 0, 32, 1),
    "split": (16, 33, 140, 3),
    "more_parts_than_steps": (5, 9, 40, 7),
    "many": (40, 70, 90, 2),
}
# Layouts of x [M, K] or dy [M, N]: the same values at other strides, or fewer values.
LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.t().contiguous().t(),
    "every_second": lambda x: torch.stack([x, x + 1], -1).flatten(1)[:, ::2],
    "every_third_row": lambda x: torch.stack([x, x, x + 1], 1).flatten(0, 1)[::3],
    "one_row_expanded": lambda x: x[:1].expand(x.shape),
    "one_column_expanded": lambda x: x[:, :1].expand(x.shape),
    "one_value_expanded": lambda x: x[:1, :1].expand(x.shape),
    # [2, M/2, K] and 4-D operands with axes out of order
    "batch_second": lambda x: x.view(-1, 2, x.shape[1]).transpose(0, 1),
    "four_axes": lambda x: x.view(2, 2, -1, x.shape[1]),
    "three_strides": lambda x: x.view(2, 2, -1, x.shape[1]).permute(2, 1, 0, 3),
    "size_one_axes": lambda x: x.view(1, x.shape[0], 1, x.shape[1]),
    "middle_expanded": lambda x: x[:, None].expand(-1, 3, -1),
    "one_axis": lambda x: x[0],
}
each_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: f"{p[0]}:{p[1]}")
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())


def operands(m, n, k, dtype, device, keep=2, group=4, seed=0):
    w = random_24(n, k, dtype, keep, group, seed=seed + 1, device=device)
    x = randn(m, k, dtype=dtype, seed=seed + 2, device=device)
    dy = randn(m, n, dtype=dtype, seed=seed + 3, device=device)
    bias = randn(n, dtype=dtype, seed=seed + 4, device=device)
    return w, x, dy, bias


def kept(dense, packed):
    """Entries of `dense` where `packed` stores a value."""
    return reference.gather_24_ref(dense, packed)


def assert_products(w, x, dy, bias, pattern=(2, 4), tile=TILE, split=1):
    """All three launchers against torch in the same dtype and in float64."""
    packed = pack_24(w, *pattern)
    y = spmm_24(x, packed, bias, tile=tile, split=split)
    dx = spmm_24_dgrad(dy, packed, tile=tile)
    dv = spmm_24_wgrad(dy, x, packed, tile=tile, split=split)
    xd, wd, dyd = (t.double() for t in (x, w, dy))
    exact = F.linear(xd, wd, None if bias is None else bias.double())
    assert_no_worse_than_dense(y, F.linear(x, w, bias), exact, "y")
    assert_no_worse_than_dense(dx, dy @ w, dyd @ wd, "dx")
    rows = dy[..., 0].numel() if dy.shape[-1] else 0
    flat, flat_x = dy.reshape(rows, dy.shape[-1]), x.reshape(rows, x.shape[-1])
    dense, exact = flat.t() @ flat_x, flat.double().t() @ flat_x.double()
    assert_no_worse_than_dense(dv, kept(dense, packed), kept(exact, packed), "dvalues")
    for t in (y, dx, dv):
        assert t.is_contiguous()


# --- twin


@each_dtype
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_all_three_products_match_float64(shape, dtype, device):
    m, n, k, split = shape
    if n == 0:
        w, x, dy, bias = operands(m, n, k, dtype, device)
        packed = reference.pack_24_ref(w)
        assert spmm_24(x, packed, bias).shape == (m, 0)
        assert spmm_24_wgrad(dy, x, packed).shape == packed.values.shape
        assert torch.equal(spmm_24_dgrad(dy, packed, tile=TILE), torch.zeros_like(x))
    else:
        assert_products(*operands(m, n, k, dtype, device), split=split)


@each_pattern
@each_dtype
def test_every_pattern(pattern, dtype, device):
    w, x, dy, _ = operands(18, 30, 76, dtype, device, *pattern)
    assert_products(w, x, dy, None, pattern)


@pytest.mark.parametrize("tile", SPMM_24_TILES, ids=str)
def test_every_shipped_tile(tile, device):
    assert_products(*operands(tile.m + 1, tile.n + 1, tile.k + 8, torch.float16, device), tile=tile)


def test_the_launchers_choose_a_tile_themselves(device):
    w, x, dy, bias = operands(33, 70, 72, torch.float16, device)
    assert_products(w, x, dy, bias, tile=None, split=None)


@each_layout
def test_strided_inputs(layout, device):
    w, x, dy, bias = operands(12, 40, 44, torch.float16, device)
    assert_products(w, layout(x), layout(dy), bias, split=2)
    packed = pack_24(w)
    plain = spmm_24(layout(x).contiguous(), packed, bias, tile=TILE)
    assert torch.equal(spmm_24(layout(x), packed, bias, tile=TILE), plain)
    plain = spmm_24_dgrad(layout(dy).contiguous(), packed, tile=TILE)
    assert torch.equal(spmm_24_dgrad(layout(dy), packed, tile=TILE), plain)


@pytest.mark.parametrize("layout", ["transposed", "batch_second", "middle_expanded"])
def test_dy_and_x_of_different_strides(layout, device):
    w, x, dy, _ = operands(12, 40, 44, torch.float32, device)
    packed = pack_24(w)
    moved, same = LAYOUTS[layout](x), LAYOUTS[layout](dy).contiguous()
    got = spmm_24_wgrad(same, moved, packed, tile=TILE)
    assert torch.equal(got, spmm_24_wgrad(same, moved.contiguous(), packed, tile=TILE))


@pytest.mark.parametrize("layout", LAYOUTS.keys())
def test_rows_are_a_view_unless_three_strides_are_needed(layout):
    x = LAYOUTS[layout](randn(12, 8))
    rows = as_rows(x)
    assert (rows.tensor is x) == (layout != "three_strides")
    outer = rows.count // rows.inner
    shape = (outer, rows.inner, x.shape[-1])
    strides = (rows.stride_outer, rows.stride_inner, rows.stride_column)
    seen = torch.as_strided(rows.tensor, shape, strides, rows.tensor.storage_offset())
    assert torch.equal(seen.reshape(x.shape), x)


@each_dtype
@pytest.mark.parametrize("split", [1, 3], ids="split={}".format)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_scale_bias_and_activation(act, split, dtype, device):
    w, x, _, bias = operands(9, 30, 130, dtype, device)
    packed = pack_24(w)
    scale = randn(30, seed=6, device=device)
    for b, s in ((bias, None), (None, scale), (bias.float(), scale.to(dtype))):
        got = spmm_24(x, packed, b, s, act, tile=TILE, split=split)
        twin = reference.spmm_24_ref(x, packed, b, s, act)
        z = x.double() @ w.double().t()
        z = z if s is None else z * s.double()
        z = z if b is None else z + b.double()
        exact = activate(z, act)
        assert_no_worse_than_dense(got, twin, exact, f"{act} {b is None} {s is None}")


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activations_at_the_ends(act, device):
    """Large values, infinities and NaN through the epilogue, as torch.nn.functional has them."""
    z = torch.tensor([0.0, -0.0, 1e-30, 30, -30, 1e18, -1e18, INF, -INF, NAN], device=device)
    packed = pack_24(torch.eye(10, device=device))
    got = spmm_24(z.diag().nan_to_num(0.0, INF, -INF).clamp(-1e18, 1e18), packed, None, None, act)
    want = activate(z.nan_to_num(0.0, INF, -INF).clamp(-1e18, 1e18), act)
    assert_no_worse_than_dense(got.diag(), want, want.double(), act)
    for value in (INF, -INF, NAN):
        one = pack_24(torch.ones(1, 1, device=device))
        x = torch.full((1, 1), value, device=device)
        mine, torchs = spmm_24(x, one, None, None, act), activate(x, act)
        assert torch.equal(mine.isnan(), torchs.isnan()) and torch.equal(
            mine.nan_to_num(), torchs.nan_to_num()
        )


# --- algebra


@each_pattern
def test_multiplying_by_the_identity_unpacks(pattern, device):
    """Exact: one product per sum, so a kept value at a wrong place cannot hide."""
    w = random_24(24, 40, torch.float16, *pattern, seed=5, device=device)
    packed = pack_24(w, *pattern)
    eye = lambda size: torch.eye(size, dtype=w.dtype, device=device)  # noqa: E731
    assert torch.equal(spmm_24(eye(40), packed, tile=TILE), w.t())
    assert torch.equal(spmm_24_dgrad(eye(24), packed, tile=TILE), w)
    assert torch.equal(spmm_24_wgrad(eye(24), w, packed, tile=TILE), packed.values)


def test_all_six_kept_pairs_and_zero_groups(device):
    pairs = list(itertools.combinations(range(4), 2))
    w = torch.zeros(len(pairs) * len(pairs), 16, device=device)
    for row, (low, high) in enumerate(itertools.product(pairs, pairs)):
        w[row, list(low)] = torch.tensor([3.0, 5.0], device=device)
        w[row, [4 + p for p in high]] = torch.tensor([7.0, 11.0], device=device)
    packed = pack_24(w)
    x = torch.arange(1.0, 17.0, device=device).view(1, 16) ** 2
    assert torch.equal(spmm_24(x, packed, tile=TILE), x @ w.t())
    dy = torch.arange(1.0, 37.0, device=device).view(1, 36)
    assert torch.equal(spmm_24_dgrad(dy, packed, tile=TILE), dy @ w)
    got = spmm_24_wgrad(dy, x, packed, tile=TILE)
    assert torch.equal(got, kept(dy.t() @ x, packed))


@pytest.mark.parametrize("split", [2, 5], ids="split={}".format)
def test_parts_add_up_and_repeat_bit_for_bit(split, device):
    w, x, dy, bias = operands(70, 30, 200, torch.float32, device)
    packed = pack_24(w)
    runs = []
    for _ in range(2):
        torch.empty(1 << 16, device=device).normal_(generator=None)  # other bytes in free memory
        y = spmm_24(x, packed, bias, None, "gelu", tile=TILE, split=split)
        runs.append((y, spmm_24_wgrad(dy, x, packed, tile=TILE, split=split)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    exact = F.gelu(F.linear(x.double(), w.double(), bias.double()))
    assert_no_worse_than_dense(
        runs[0][0], spmm_24(x, packed, bias, None, "gelu", tile=TILE, split=1), exact, "y"
    )
    whole = spmm_24_wgrad(dy, x, packed, tile=TILE, split=1)
    exact = kept(dy.double().t() @ x.double(), packed)
    assert_no_worse_than_dense(runs[0][1], whole, exact, "dvalues")


def test_how_tiles_and_parts_are_chosen():
    counts = (1, 16, 17, 32, 33, 64, 65, 10**6)
    assert [spmm_tile(m, False).m for m in counts] == [16, 16, 32, 32, 64, 64, 128, 128]
    assert [spmm_tile(m, True).m for m in counts] == [16, 16, 32, 32, 32, 32, 32, 32]
    assert split_count(1, 64, 132) == 16 and split_count(1, 63, 132) == 8  # 4 steps a part
    assert split_count(1000, 64, 132) == 1 and split_count(1, 10**6, 132) == 16
    assert split_count(1, 0, 132) == 1


# --- values that are not finite


@each_pattern
@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
def test_nan_and_infinity_spread_as_in_the_dense_product(value, pattern, device):
    """A dropped weight counts as the number zero: 0 * NaN and 0 * Inf are NaN, as dense has it.

    So a NaN in x is never hidden by the pruning, and it stays in its row.
    """
    w, x, dy, _ = operands(5, 24, 44, torch.float32, device, *pattern)
    packed = pack_24(w, *pattern)
    x[2, 7], dy[3, 11] = value, value
    for got, dense in (
        (spmm_24(x, packed, tile=TILE), x @ w.t()),
        (spmm_24_dgrad(dy, packed, tile=TILE), dy @ w),
        # The padding of K gets no gradient, whatever dy holds.
        (spmm_24_wgrad(dy, x, packed, tile=TILE), kept(dy.t() @ x, packed)),
    ):
        assert got.isnan().any() or got.isinf().any()
        assert torch.equal(got.isnan(), dense.isnan())
        assert torch.equal(got.isinf(), dense.isinf())
    y = spmm_24(x, packed, tile=TILE)
    assert y[[0, 1, 3, 4]].isfinite().all()


def test_nan_in_a_kept_weight_stays_in_its_out_feature(device):
    w, x, dy, _ = operands(5, 40, 44, torch.float32, device)
    packed = pack_24(w)
    packed.values[17, 3] = NAN
    y, dx = spmm_24(x, packed, tile=TILE), spmm_24_dgrad(dy, packed, tile=TILE)
    assert y[:, 17].isnan().all() and int(y.isnan().sum()) == 5
    assert int(dx.isnan().any(0).sum()) == 1 and dx.isnan().any(1).all()


# --- memory

GUARD = 257  # elements of sentinel on each side


@pytest.fixture
def guards(monkeypatch):
    """What launchers allocate lies between sentinels; the list of (buffer, untouched copy)."""
    made = []

    def guarded(size, device=None):
        if size.numel() == 0 or device is not None:  # the interpreter's own
            return size
        buffer = torch.full((size.numel() + 2 * GUARD,), 113, dtype=size.dtype, device=size.device)
        if size.dtype.is_floating_point:
            buffer[GUARD:-GUARD] = NAN  # a skipped place is seen
        made.append((buffer, buffer.clone()))
        return buffer[GUARD:-GUARD].view(size.shape)

    plain, like = torch.Tensor.new_empty, torch.empty_like
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda *a, **kw: guarded(plain(*a, **kw), kw.get("device"))
    )
    monkeypatch.setattr(torch, "empty_like", lambda *a, **kw: guarded(like(*a, **kw)))
    return made


def surrounded(tensor, sentinel):
    """`tensor`, contiguous, inside a buffer of `sentinel`."""
    buffer = torch.full((tensor.numel() + 2 * GUARD,), sentinel, dtype=tensor.dtype)
    buffer = buffer.to(tensor.device)
    buffer[GUARD:-GUARD] = tensor.flatten()
    return buffer[GUARD:-GUARD].view(tensor.shape)


def in_a_field(x, sentinel=NAN):
    """`x` [M, K] as a window of a larger matrix of `sentinel`: NaN on all four sides."""
    m, k = x.shape
    field = torch.full((m + 70, k + 70), sentinel, dtype=x.dtype, device=x.device)
    field[3 : 3 + m, 5 : 5 + k] = x
    return field[3 : 3 + m, 5 : 5 + k]


@each_pattern
@pytest.mark.parametrize("split", [1, 3], ids="split={}".format)
@pytest.mark.parametrize("shape", [(17, 33, 70), (1, 1, 1)], ids=str)
def test_nothing_outside_is_read_or_written(shape, split, pattern, guards, device):
    w, x, dy, bias = operands(*shape, torch.float32, device, *pattern)
    packed = reference.pack_24_ref(w, *pattern)
    inside = Packed24(surrounded(packed.values, NAN), surrounded(packed.meta, 255), *packed[2:])
    bias, scale = surrounded(bias, NAN), surrounded(bias + 2, NAN)
    near = in_a_field(x), in_a_field(dy)
    del guards[:]
    y = spmm_24(near[0], inside, bias, scale, tile=TILE, split=split)
    dx = spmm_24_dgrad(near[1], inside, tile=TILE)
    dv = spmm_24_wgrad(near[1], near[0], inside, tile=TILE, split=split)
    assert len(guards) == (3 if split == 1 else 5)
    for buffer, before in guards:
        assert torch.equal(buffer[:GUARD], before[:GUARD])
        assert torch.equal(buffer[-GUARD:], before[-GUARD:])
        assert not buffer[GUARD:-GUARD].isnan().any()
    xd, wd, dyd, bd, sd = (t.double() for t in (x, w, dy, bias, scale))
    assert_no_worse_than_dense(y, (x @ w.t()) * scale + bias, (xd @ wd.t()) * sd + bd, "y")
    assert_no_worse_than_dense(dx, dy @ w, dyd @ wd, "dx")
    exact = kept(dyd.t() @ xd, packed)
    assert_no_worse_than_dense(dv, kept(dy.t() @ x, packed), exact, "dvalues")


def test_operands_are_left_as_they_are(device):
    w, x, dy, bias = operands(17, 33, 44, torch.float16, device)
    packed = pack_24(w)
    tensors = (x, dy, bias, packed.values, packed.meta)
    before = [t.clone() for t in tensors]
    spmm_24(x, packed, bias, bias, "silu", tile=TILE, split=2)
    spmm_24_dgrad(dy, packed, tile=TILE)
    spmm_24_wgrad(dy, x, packed, tile=TILE, split=2)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


# --- any shape


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    m=st.integers(0, 20),
    n=st.integers(1, 40),
    k=st.integers(0, 50),
    pattern=st.sampled_from(PATTERNS),
    dtype=st.sampled_from(DTYPES),
    layouts=st.tuples(*[st.sampled_from(["contiguous", "transposed", "every_second"])] * 2),
    split=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_any_shape_pattern_and_stride(m, n, k, pattern, dtype, layouts, split, seed, device):
    # Quarters: sums are exact, so that one output that nearly cancels cannot fail the rule.
    w, x, dy, bias = (
        (t * 4).round() / 4 for t in operands(m, n, k, dtype, device, *pattern, seed=seed)
    )
    x, dy = LAYOUTS[layouts[0]](x), LAYOUTS[layouts[1]](dy)
    assert_products(w, x, dy, bias, pattern, split=split)


# --- the torch twins, which a CPU runs


@each_pattern
def test_twins_take_what_the_launchers_take(pattern, device):
    """fp32 bias and scale beside fp16 x, and the dtype of x back."""
    w, x, dy, bias = operands(6, 24, 44, torch.float16, device, *pattern)
    packed = pack_24(w, *pattern)
    for b, s in ((bias.float(), None), (bias.float(), bias.float()), (None, bias.float())):
        assert reference.spmm_24_ref(x, packed, b, s).dtype == torch.float16
    for launch, twin, args in (
        (spmm_24, reference.spmm_24_ref, (x, packed, bias.float())),
        (spmm_24_dgrad, reference.spmm_24_dgrad_ref, (dy, packed)),
        (spmm_24_wgrad, reference.spmm_24_wgrad_ref, (dy, x, packed)),
    ):
        wide = [
            a._replace(values=a.values.double()) if isinstance(a, Packed24) else a.double()
            for a in args
        ]
        assert_no_worse_than_dense(launch(*args), twin(*args), twin(*wide), launch.__name__)


@pytest.mark.parametrize("shape", [(0, 8, 16), (3, 0, 16), (3, 8, 0), (0, 0, 0)], ids=str)
def test_twins_of_empty_operands(shape, device):
    m, n, k = shape
    packed = reference.pack_24_ref(torch.zeros(n, k, device=device))
    x, dy = torch.zeros(m, k, device=device), torch.zeros(m, n, device=device)
    assert torch.equal(reference.spmm_24_ref(x, packed), torch.zeros(m, n, device=device))
    assert torch.equal(reference.spmm_24_dgrad_ref(dy, packed), torch.zeros(m, k, device=device))
    assert torch.equal(reference.spmm_24_wgrad_ref(dy, x, packed), torch.zeros_like(packed.values))


# --- refusals


def good(device):
    w, x, dy, bias = operands(4, 24, 40, torch.float16, device)
    return {"x": x, "dy": dy, "w": reference.pack_24_ref(w), "bias": bias, "scale": bias}


REFUSED_BY_ALL = {
    "x_columns": ("x", lambda g: g["x"][:, :39], r"x must be \[\.\.\., 40\] for a \[24, 40\]"),
    "x_scalar": ("x", lambda g: g["x"][0, 0], r"x must be \[\.\.\., 40\].*got \[\]"),
    "x_dtype": ("x", lambda g: g["x"].float(), "x must be torch.float16 on .* as the weight, got"),
    "dy_columns": ("dy", lambda g: g["dy"][:, :23], r"dy must be \[\.\.\., 24\] for a \[24, 40\]"),
    "dy_dtype": ("dy", lambda g: g["dy"].bfloat16(), "dy must be torch.float16 on"),
    "dy_rows": ("dy", lambda g: g["dy"][:3], "dy and x must have the same leading shape, got"),
    "bias_size": ("bias", lambda g: g["bias"][:23], r"bias must be .*\[24\], got .*\[23\]"),
    "bias_matrix": ("bias", lambda g: g["bias"][None], r"bias must be .*\[24\], got .*\[1, 24\]"),
    "bias_dtype": ("bias", lambda g: g["bias"].int(), "bias must be float"),
    "scale_size": ("scale", lambda g: g["scale"][:1], r"scale must be .*\[24\], got .*\[1\]"),
    "act": ("act", lambda g: "tanh", "act must be one of none, relu, .* got 'tanh'"),
    "values_dtype": (
        "w",
        lambda g: g["w"]._replace(values=g["w"].values.int()),
        "values must be a floating matrix, got torch.int32",
    ),
    "values_shape": (
        "w",
        lambda g: g["w"]._replace(k=48),
        r"values must be \[24, 24\] for k=48 at 2:4, got \[24, 20\]",
    ),
    "meta_dtype": (
        "w",
        lambda g: g["w"]._replace(meta=g["w"].meta.int()),
        r"meta must be uint8 \[24, 5\] .* got torch.int32",
    ),
    "meta_shape": (
        "w",
        lambda g: g["w"]._replace(meta=g["w"].meta[:, :4]),
        r"meta must be uint8 \[24, 5\] .* got torch.uint8 \[24, 4\]",
    ),
    "values_strides": (
        "w",
        lambda g: g["w"]._replace(values=g["w"].values.t().contiguous().t()),
        "values must be row-major, got strides",
    ),
    "pattern": ("w", lambda g: g["w"]._replace(keep=3), "keep:group must be one of .* got 3:4"),
}  # fmt: skip


def run_all(ops, x, dy, w, bias, scale, act="none"):
    forward, dgrad, wgrad = ops
    forward(x, w, bias, scale, act)
    dgrad(dy, w)
    wgrad(dy, x, w)


@pytest.mark.parametrize("kind", ["launcher", "twin"])
@pytest.mark.parametrize("name", REFUSED_BY_ALL)
def test_wrong_operands_are_refused(name, kind, device):
    twins = (reference.spmm_24_ref, reference.spmm_24_dgrad_ref, reference.spmm_24_wgrad_ref)
    ops = (spmm_24, spmm_24_dgrad, spmm_24_wgrad) if kind == "launcher" else twins
    operand, spoil, text = REFUSED_BY_ALL[name]
    run_all(ops, **good(device))
    wrong = good(device)
    wrong[operand] = spoil(wrong)
    with pytest.raises(ValueError, match=text):
        run_all(ops, **wrong)


def test_the_launchers_refuse_float64_and_integers(device):
    w, x, dy, bias = operands(4, 24, 40, torch.float64, device)
    packed = reference.pack_24_ref(w)
    for run in (
        lambda: spmm_24(x, packed),
        lambda: spmm_24_dgrad(dy, packed),
        lambda: spmm_24_wgrad(dy, x, packed),
    ):
        with pytest.raises(ValueError, match="must be float16, bfloat16 or float32, got"):
            run()
    g = good(device)
    with pytest.raises(ValueError, match="bias must be float16, bfloat16 or float32, got"):
        spmm_24(g["x"], g["w"], bias)
    with pytest.raises(ValueError, match=r"bias must be contiguous \[24\], got \[24\] \(2,\)"):
        spmm_24(g["x"], g["w"], g["bias"].repeat_interleave(2)[::2])


def test_other_devices_are_refused(device):
    g = good(device)
    away = g["w"]._replace(meta=g["w"].meta.to("meta"))
    with pytest.raises(ValueError, match="values and meta must be on one device, got"):
        spmm_24(g["x"], away)
    away = Packed24(g["w"].values.to("meta"), g["w"].meta.to("meta"), *g["w"][2:])
    with pytest.raises(ValueError, match=r"x must be torch.float16 on meta as the weight"):
        spmm_24(g["x"], away)
    with pytest.raises(ValueError, match=r"bias must be on .* as the other operands, got meta"):
        spmm_24(g["x"], g["w"], g["bias"].to("meta"))
    with pytest.raises(ValueError, match=r"scale must be on .* as x, got meta"):
        reference.spmm_24_ref(g["x"], g["w"], None, g["bias"].to("meta"))


def test_rows_may_lie_more_than_two_to_the_31_elements_apart(device):
    far = torch.zeros(2**31 + 64, dtype=torch.float16, device=device)  # pages untouched on a CPU
    x = far.as_strided((2, 48), (2**31, 1))
    x.copy_(randn(2, 48, dtype=torch.float16, seed=2))
    w = random_24(40, 48, torch.float16, seed=1, device=device)
    packed = pack_24(w)
    near = x.clone()
    assert torch.equal(spmm_24(x, packed), spmm_24(near, packed))
    dy = far.as_strided((2, 40), (2**31, 1))
    dv = spmm_24_wgrad(dy, x, packed)
    assert torch.equal(dv, spmm_24_wgrad(dy.clone(), near, packed))
    assert torch.equal(spmm_24_dgrad(dy, packed), spmm_24_dgrad(dy.clone(), packed))
    assert spmm_24(near, packed).abs().max() > 0 and dv.abs().max() > 0


def test_rows_without_elements_need_no_strides(device):
    packed = pack_24(random_24(8, 8, device=device))
    x = torch.randn(2, 0, 2, 0, 2, 8, device=device)
    assert spmm_24(x, packed).shape == spmm_24_dgrad(x, packed).shape == x.shape
