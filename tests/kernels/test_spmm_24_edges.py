"""spmm_24, spmm_24_dgrad and spmm_24_wgrad: NaN and infinity, memory, and refusals."""

import pytest
import torch
from helpers import assert_no_worse_than_dense, randn, random_24
from spmm_24_cases import INF, NAN, TILE, each_pattern, kept, operands

from slimgemm.kernels import reference
from slimgemm.kernels.formats import Packed24
from slimgemm.kernels.pack_24 import pack_24
from slimgemm.kernels.spmm_24 import spmm_24
from slimgemm.kernels.spmm_24_dgrad import spmm_24_dgrad
from slimgemm.kernels.spmm_24_wgrad import spmm_24_wgrad

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
