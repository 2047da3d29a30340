"""mma_sp on the NumPy executor: every tile, shape class, epilogue and split against the twin."""

import pytest
import torch
from gluon_cases import SMALL
from gluon_cases import run_mma_sp as run
from helpers import assert_no_worse_than_dense, randn, random_24

from slimgemm.kernels.gluon import mma_sp, orders
from slimgemm.kernels.gluon.mma_tiles import MMA_SP_TILES, MmaTile, fits, mma_sp_tile
from slimgemm.kernels.reference import ACTIVATIONS, activate, pack_24_ref, spmm_24_ref

DTYPES = [torch.bfloat16, torch.float16]


def check(m, n, k, tile, dtype=torch.bfloat16, splits=1, x=None, name="mma_sp", **epilogue):
    packed = pack_24_ref(random_24(n, k, dtype, seed=n + k))
    x = randn(m, k, dtype=dtype, seed=m) if x is None else x
    got = run(x, orders.to_mma_sp(packed), tile, splits, **epilogue)
    exact = packed._replace(values=packed.values.double())
    if "scale" in epilogue:
        epilogue["scale"] = epilogue["scale"].expand(n)
    wide = {key: t.double() if torch.is_tensor(t) else t for key, t in epilogue.items()}
    same = {key: t.to(dtype) if torch.is_tensor(t) else t for key, t in wide.items()}
    assert_no_worse_than_dense(
        got, spmm_24_ref(x, packed, **same), spmm_24_ref(x.double(), exact, **wide), name
    )


@pytest.mark.parametrize("most", MMA_SP_TILES, ids=str)
def test_every_shipped_tile_exact_and_ragged(most):
    tile = MMA_SP_TILES[most]
    check(most, tile.rows, 256 * tile.warps_k, tile)
    check(most - 3, tile.rows + 24, 256 * tile.warps_k + 264, tile)


@pytest.mark.parametrize("tile", SMALL.values(), ids=SMALL)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [(1, 16, 256), (8, 40, 1024), (19, 17, 776), (3, 5, 8), (2, 33, 100), (5, 16, 333), (1, 1, 1)],
    ids=str,
)
def test_shapes_against_twin(m, n, k, dtype, tile):
    check(m, n, k, tile, dtype)


@pytest.mark.parametrize("splits", [2, 3, 8])
@pytest.mark.parametrize("name", ["one_warp", "k_warps"])
def test_split_k(splits, name):
    check(3, 33, 2100, SMALL[name], splits=splits)


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("scale", ["none", "scalar", "rows"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_epilogues(act, scale, bias):
    epilogue = {"act": act}
    if bias:
        epilogue["bias"] = randn(20, seed=5)
    if scale != "none":
        epilogue["scale"] = randn(1 if scale == "scalar" else 20, seed=6) * 0.1
    check(5, 20, 256, SMALL["wide"], torch.float16, **epilogue)


def test_activations_where_formulas_differ():
    """Large, tiny and special accumulators through the whole kernel: W is one, X the value."""
    points = torch.tensor([-80.0, -8.0, -1.0, -1e-3, 0.0, 1e-3, 1.0, 8.0, 80.0, float("nan")])
    x = torch.zeros(10, 8, dtype=torch.float16)
    x[:, 0] = points
    w = torch.zeros(16, 8, dtype=torch.float16)
    w[:, 0] = 1
    for act in ACTIVATIONS:
        got = run(x, orders.to_mma_sp(pack_24_ref(w)), SMALL["one_warp"], act=act)
        want = activate(x[:, :1].float(), act).expand(-1, 16)
        torch.testing.assert_close(got.float(), want, rtol=2e-3, atol=1e-6, equal_nan=True)


def test_strided_and_offset_inputs():
    base = randn(9, 512, dtype=torch.bfloat16, seed=1)
    check(9, 32, 256, SMALL["wide"], x=base[:, 256:])  # aligned rows with a pitch
    check(9, 32, 256, SMALL["wide"], x=base[:, 8:264])  # 16-byte offset
    check(9, 32, 256, SMALL["wide"], x=base[:, 3:259])  # odd offset: the 2-byte path
    check(4, 32, 256, SMALL["wide"], x=base[::2][:4, 256:])
    odd = randn(2, 257, dtype=torch.bfloat16, seed=1)
    check(1, 32, 256, SMALL["wide"], x=odd[:1, :256])  # the pitch of a single row is no matter
    check(2, 32, 256, SMALL["wide"], x=odd[:, :256])


def test_leading_dims_and_dtype_of_bias():
    packed = pack_24_ref(random_24(24, 64, torch.bfloat16))
    x, bias = randn(2, 3, 64, dtype=torch.bfloat16), randn(24, dtype=torch.bfloat16, seed=2)
    got = run(x, orders.to_mma_sp(packed), SMALL["wide"], bias=bias)
    flat = run(x.view(6, 64), orders.to_mma_sp(packed), SMALL["wide"], bias=bias.float())
    assert got.shape == (2, 3, 24)
    assert torch.equal(got.view(6, 24), flat)


def test_same_bytes_whatever_the_batch_beside_it():
    packed = orders.to_mma_sp(pack_24_ref(random_24(16, 512, torch.bfloat16)))
    x = randn(12, 512, dtype=torch.bfloat16)
    whole = run(x, packed, SMALL["k_warps"], splits=2)
    assert torch.equal(run(x[:1], packed, SMALL["k_warps"], splits=2), whole[:1])


def test_nan_in_one_token_stays_there():
    packed = pack_24_ref(random_24(16, 36, torch.bfloat16))
    x = randn(4, 36, dtype=torch.bfloat16)
    x[2] = float("nan")
    got = run(x, orders.to_mma_sp(packed), SMALL["k_warps"])
    assert got[2].isnan().all() and not got[[0, 1, 3]].isnan().any()


def test_fragment_layout_gives_each_lane_its_four_registers():
    """Inline PTX takes registers in the order of the layout: lane l, register r must be 4 l + r."""
    for tile in MMA_SP_TILES.values():
        layout = tile.fragment
        assert layout.order[0] == 5 and layout.size_per_thread[5] == 4
        assert layout.threads_per_warp == [1, 1, 1, 1, 1, 32]
        assert layout.warps_per_cta == [1, 1, tile.warps_n, tile.warps_m, tile.warps_k, 1]
        assert layout.size_per_thread[:5] == [tile.mt, tile.nt, 1, 1, 1]


def test_tile_table_is_legal_and_ordered():
    assert list(MMA_SP_TILES) == sorted(MMA_SP_TILES)
    for most, tile in MMA_SP_TILES.items():
        assert tile.tokens >= most or most == max(MMA_SP_TILES)
        assert all(fits(tile, arch) for arch in ("sm_80", "sm_86", "sm_89", "sm_90", "sm_120"))
        assert mma_sp_tile(most) is tile
    assert mma_sp_tile(1) is MMA_SP_TILES[8] and mma_sp_tile(5000) is MMA_SP_TILES[128]
    assert not fits(MmaTile(1, 8, 1, 1, 4, 8, 4, 1), "sm_86")
    assert not fits(MmaTile(1, 1, 1, 1, 1, 8, 1, 1), "sm_90")


def test_launcher_refuses_before_anything_runs():
    packed = orders.to_mma_sp(pack_24_ref(random_24(16, 64, torch.bfloat16)))
    x = randn(4, 64, dtype=torch.bfloat16)
    call = mma_sp.spmm_24_mma_sp
    with pytest.raises(ValueError, match=r"x must be \[..., 64\] for a \[16, 64\] weight"):
        call(x[:, :32], packed)
    with pytest.raises(ValueError, match=r"x must be torch.bfloat16 on cpu as the weight"):
        call(x.half(), packed)
    with pytest.raises(ValueError, match="x must have stride 1 along k"):
        call(randn(64, 4, dtype=torch.bfloat16).t(), packed)
    with pytest.raises(ValueError, match="x must have stride 1 along k"):
        call(randn(4, 4, 64, dtype=torch.bfloat16)[:, :3].transpose(0, 1), packed)
    with pytest.raises(ValueError, match="x must be on a GPU, got cpu"):
        call(x, packed)
    from slimgemm.kernels.gluon.launch import check_epilogue

    for name in ("bias", "scale"):
        both = {"bias": None, "scale": None}
        with pytest.raises(ValueError, match=rf"{name} must be contiguous \[16\]"):
            check_epilogue(16, x, **(both | {name: torch.zeros(15)}), act="none")
        with pytest.raises(ValueError, match=f"{name} must be float16, bfloat16 or float32"):
            check_epilogue(16, x, **(both | {name: torch.zeros(16).int()}), act="none")
    with pytest.raises(ValueError, match="act must be one of none, relu"):
        check_epilogue(16, x, None, None, "tanh")
