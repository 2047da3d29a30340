"""8-bit 2:4 weights: how they are made, and what a product with them is.

    W [N, K]  ~  scale_w [N] * Q [N, K]        Q int8 in -127...127, or float8_e4m3fn up to 448
    X [M, K]  ~  scale_x [M] * R [M, K]
    Y [M, N]  =  act((R @ Q.T) * scale_x * scale_w + bias)

Scales are symmetric, one per row: the largest magnitude of a row becomes the largest number of the
8-bit type. The packed weight is a Packed24 whose values are 8-bit: 0.625 bytes per dense weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slimgemm.kernels.dispatch import implementation
from slimgemm.kernels.formats import Packed24
from slimgemm.kernels.reference import activate, unpack_24_ref

# dtype -> largest magnitude that a scaled row takes
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def quantize_rows(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Each row of `rows` as 8-bit numbers and one scale: the activations of a product, per token.

    Args:
        rows: [..., K], floating.
        dtype: torch.int8 or torch.float8_e4m3fn.
    Returns:
        (contiguous [..., K] of `dtype`, rounded to nearest even; scale [...] fp32): rows are about
        their product.
    Raises:
        ValueError: another dtype, or rows that hold NaN or infinity.
    """
    if dtype not in LARGEST:
        raise ValueError(f"dtype must be torch.int8 or torch.float8_e4m3fn, got {dtype}")
    if rows.ndim < 1 or not rows.dtype.is_floating_point:
        raise ValueError(f"rows must be floating [..., K], got {rows.dtype} {list(rows.shape)}")
    wide = rows.detach().float()
    finite = wide.isfinite()
    if not bool(finite.all()):
        place = [int(i) for i in (~finite).nonzero()[0]]
        raise ValueError(
            f"rows must be finite to be quantized, got {wide[tuple(place)]} at {place}"
        )
    largest = wide.abs().amax(-1) if wide.shape[-1] else wide.new_zeros(wide.shape[:-1])
    # A row of zeros, or of numbers too small to divide by, keeps a scale that can be divided by.
    scale = (largest / LARGEST[dtype]).clamp_min(torch.finfo(torch.float32).tiny)
    scaled = (wide / scale[..., None]).clamp(-LARGEST[dtype], LARGEST[dtype])
    return (scaled.round() if dtype == torch.int8 else scaled).to(dtype), scale


def quantize_24(weight: Tensor | Packed24, dtype: torch.dtype) -> tuple[Packed24, Tensor]:
    """A 2:4 weight with 8-bit values and one scale per out feature.

    Args:
        weight: dense [N, K] that is 2:4 along K, or its Packed24; floating, any device.
        dtype: torch.int8 or torch.float8_e4m3fn.
    Returns:
        (Packed24 with values [N, ceil(k/8) * 4] of `dtype`, scale fp32 [N]). A weight that rounds
        to zero is packed as the zero it is.
    Raises:
        ValueError: not 2:4 (the place is named), not finite, or another dtype.

    Source: bit layout, kernels/formats.py.
    """
    if isinstance(weight, Packed24):
        dense: Tensor = implementation("unpack_24", weight.values.device)(weight)
    else:
        dense = weight
    numbers, scale = quantize_rows(dense, dtype)
    # fp16 holds every int8 and every e4m3 number exactly.
    packed = implementation("pack_24", dense.device)(numbers.half())
    return packed._replace(values=packed.values.to(dtype)), scale


@torch.no_grad()
def scaled_spmm_24_ref(
    x: Tensor,
    w: Packed24,
    scale_x: Tensor,
    scale_w: Tensor,
    bias: Tensor | None = None,
    act: str = "none",
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Twin of the scaled_spmm_24 launchers: act((x @ dense(w).T) * scale_x * scale_w + bias).

    x [..., k] and the values of `w` are int8 or float8_e4m3fn; int8 sums are exact integers, e4m3
    ones fp32, and so is all that follows them.
    """
    # float64 holds every sum of int8 products that int32 holds.
    wide = torch.float64 if x.dtype == torch.int8 else torch.float32
    dense = unpack_24_ref(w._replace(values=w.values.to(wide)))
    z = (x.to(wide) @ dense.t()).float() * scale_x.float()[..., None] * scale_w.float()
    z = z if bias is None else z + bias.float()
    return activate(z, act).to(out_dtype)
