"""8-bit 2:4 weights: scales, rounding, canonical packing, and the twin of the scaled products."""

import pytest
import torch
from helpers import assert_no_worse_than_dense, randn, random_24

from slimgemm.kernels.quantize_24 import LARGEST, quantize_24, quantize_rows, scaled_spmm_24_ref
from slimgemm.kernels.reference import ACTIVATIONS, activate, pack_24_ref, unpack_24_ref

DTYPES = list(LARGEST)


def dense_of(packed):
    return unpack_24_ref(packed._replace(values=packed.values.double()))


def test_hand_computed_rows():
    rows = torch.tensor([[0.0, 2.54, -1.27, 0.03], [0.0, 0.0, 0.0, 0.0], [-896.0, 2.0, 7.0, 100.0]])
    numbers, scale = quantize_rows(rows[:2], torch.int8)
    # 2.54 becomes 127, so 1.27 is 63.5 (to even: 64) and 0.03 is 1.5 (to even: 2).
    assert numbers.tolist() == [[0, 127, -64, 2], [0, 0, 0, 0]]
    torch.testing.assert_close(scale[0], torch.tensor(0.02))
    numbers, scale = quantize_rows(rows[2], torch.float8_e4m3fn)
    # Halved: -448, 1, 3.5, 50, of which 50 has no 4-bit significand; 48 and 52 are as near.
    assert scale == 2 and numbers.float().tolist() == [-448.0, 1.0, 3.5, 48.0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k"), [(16, 64), (7, 36), (3, 333), (1, 1)], ids=str)
def test_weight_is_within_half_a_step_and_canonical(n, k, dtype):
    w = random_24(n, k, torch.bfloat16, seed=n)
    packed, scale = quantize_24(w, dtype)
    assert packed.values.dtype == dtype and scale.dtype == torch.float32
    assert packed.shape == (n, k) and scale.shape == (n,)
    numbers = dense_of(packed)
    error = (numbers * scale.double()[:, None] - w.double()).abs()
    # int8: half a step. e4m3: half of 2**-3 of the number, or of its smallest step, 2**-9.
    coarse = numbers.abs() * 2.0**-4 if dtype != torch.int8 else torch.zeros_like(numbers)
    step = 0.5 if dtype == torch.int8 else 2.0**-10
    assert (error <= (coarse + step) * scale.double()[:, None] * 1.0001).all()
    again = pack_24_ref(numbers.half())
    assert torch.equal(again.meta, packed.meta)
    assert torch.equal(again.values, packed.values.half())
    from_packed, same_scale = quantize_24(pack_24_ref(w), dtype)
    assert torch.equal(from_packed.values.float(), packed.values.float())
    assert torch.equal(from_packed.meta, packed.meta) and torch.equal(same_scale, scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_rows_and_tiny_rows_have_a_scale_to_divide_by(dtype):
    w = torch.zeros(2, 8)
    w[1, 0] = 1e-44
    packed, scale = quantize_24(w, dtype)
    assert (scale > 0).all() and not packed.values.float().any()


def test_refusals():
    w = random_24(4, 8)
    with pytest.raises(ValueError, match=r"dtype must be torch.int8 or torch\.float8_e4m3fn, got"):
        quantize_24(w, torch.uint8)
    with pytest.raises(ValueError, match=r"rows must be floating \[\.\.\., K\], got torch.int32"):
        quantize_rows(torch.zeros(4, 8, dtype=torch.int32), torch.int8)
    bad = w.clone()
    bad[2, 5] = float("inf")
    with pytest.raises(ValueError, match=r"must be finite to be quantized, got inf at \[2, 5\]"):
        quantize_24(bad, torch.int8)
    with pytest.raises(ValueError, match="weight is not 2:4: row 1, columns 4-7 hold 4 nonzeros"):
        quantize_24(torch.stack([w[0], torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 1])]), torch.int8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_twin_against_float64(dtype, act):
    packed, scale_w = quantize_24(random_24(24, 100, seed=1), dtype)
    x, scale_x = quantize_rows(randn(2, 5, 100, seed=2), dtype)
    bias = randn(24, seed=3)
    got = scaled_spmm_24_ref(x, packed, scale_x, scale_w, bias, act, torch.float32)
    exact = (x.double() @ dense_of(packed).t()) * scale_x.double()[..., None] * scale_w.double()
    exact = activate(exact + bias.double(), act)
    dense = activate(((x.float() @ dense_of(packed).float().t())
                      * scale_x[..., None] * scale_w + bias), act)  # fmt: skip
    assert got.shape == (2, 5, 24)
    assert_no_worse_than_dense(got, dense, exact, "scaled_spmm_24_ref")


def test_int8_sums_are_exact_where_fp32_ones_are_not():
    k = 4096
    w = torch.zeros(1, k)
    w[:, ::4] = 1.0
    w[:, 1::4] = 1.0
    packed, _ = quantize_24(w, torch.int8)
    x = torch.full((1, k), 127, dtype=torch.int8)
    x[0, 0] = 126
    one = torch.ones(1)
    got = scaled_spmm_24_ref(x, packed, one, one, out_dtype=torch.float32)
    assert got.item() == float(torch.tensor(127 * 127 * (k // 2) - 127, dtype=torch.float32))
