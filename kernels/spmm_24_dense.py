"""spmm_24 by torch: unpack the weight, then the dense product and the epilogue.

Writes and reads the dense weight on every call, so it is bound by those bytes at few rows; many
rows pay for it where torch's dense product is faster than the packed kernels. It runs where a
measured table says that it wins (dispatch.py), and allocates [N, k] for the time of the call.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from slimgemm.kernels.formats import Packed24
from slimgemm.kernels.reference import activate, check_epilogue_ref, check_product
from slimgemm.kernels.unpack_24 import unpack_24


@torch.no_grad()
def spmm_24_dense(
    x: Tensor,
    w: Packed24,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    act: str = "none",
) -> Tensor:
    """act((x @ dense(w).T) * scale + bias), rounded to the dtype of x after each step.

    Args:
        x: [..., k], fp16, bf16 or fp32, on a GPU.
        w: packed weight [N, k] of the same dtype and device.
        bias, scale: [N], fp16, bf16 or fp32.
        act: none, relu, gelu, gelu_tanh, silu or relu2 (relu squared).
    Returns:
        [..., N], dtype of `x`.
    Raises:
        ValueError: a shape, dtype, device or activation is not as above.

    Twin: reference.spmm_24_ref.
    """
    check_product("x", x, w.k, w)
    check_epilogue_ref(w.shape[0], x, bias, scale, act)
    if torch.is_autocast_enabled(x.device.type):  # it would cast the product to another dtype
        with torch.autocast(x.device.type, enabled=False):
            return spmm_24_dense(x, w, bias, scale, act)
    inside = bias.to(x.dtype) if bias is not None and scale is None else None
    z = F.linear(x, unpack_24(w), inside)
    if scale is not None:
        z = z * scale.to(x.dtype)
        z = z if bias is None else z + bias.to(x.dtype)
    return activate(z, act)
