"""spmm_24, spmm_24_dgrad and spmm_24_wgrad: twin, algebra, memory and refusals."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_no_worse_than_dense, randn, random_24
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from spmm_24_cases import DTYPES, INF, NAN, TILE, each_pattern, kept, operands

from slimgemm.kernels import reference
from slimgemm.kernels.configs import SPMM_24_TILES, split_count, spmm_tile
from slimgemm.kernels.device import as_rows
from slimgemm.kernels.formats import PATTERNS, Packed24
from slimgemm.kernels.pack_24 import pack_24
from slimgemm.kernels.reference import ACTIVATIONS, activate
from slimgemm.kernels.spmm_24 import spmm_24
from slimgemm.kernels.spmm_24_dgrad import spmm_24_dgrad
from slimgemm.kernels.spmm_24_wgrad import spmm_24_wgrad

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
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())


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
    assert [spmm_tile(m, 2, False).m for m in counts] == [16, 16, 32, 32, 64, 64, 128, 128]
    assert [spmm_tile(m, 4, True).m for m in counts] == [16, 16, 32, 32, 32, 32, 32, 32]
    assert spmm_tile(64, 2, False).k == 2 * spmm_tile(64, 4, False).k  # as many bytes
    assert split_count(1, 64, 132) == 16 and split_count(1, 63, 132) == 8  # 4 steps a part
    assert split_count(1000, 64, 132) == 1 and split_count(1, 10**6, 132) == 16
    assert split_count(1, 0, 132) == 1


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
