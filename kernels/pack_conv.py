"""pack_conv, unpack_conv: a convolution's weight [O, C, kh, kw] to and from its packed matrix.

Torch permutes and pads the weight (kernels/conv_layout.py); pack_24 and unpack_24 do the rest.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from slimgemm.kernels.conv_layout import check_weight, conv_weight, convolution, packable_matrix
from slimgemm.kernels.device import check_operand
from slimgemm.kernels.formats import Packed24
from slimgemm.kernels.pack_24 import pack_24
from slimgemm.kernels.unpack_24 import unpack_24


def pack_conv(w: Tensor, keep: int = 2, group: int = 4) -> Packed24:
    """Pack a convolution's weight that already is keep:group along its input channels.

    Args:
        w: [O, C, kh, kw], C channels per group, fp16, bf16 or fp32, any strides, on a GPU.
    Returns:
        The matrix [O, kh * kw * Cp] packed; Cp is C rounded up to a multiple of 8.
    Raises:
        ValueError: a group holds more than `keep` non-zeros (out channel, tap and input channels
            are named), or dtype, rank or device are not as above.

    Source: layout, kernels/conv_layout.py. Twin: reference_conv.pack_conv_ref.
    """
    check_operand("weight", w)
    return pack_24(packable_matrix(w, keep, group), keep, group)


def unpack_conv(packed: Packed24, weight_shape: Sequence[int]) -> Tensor:
    """Expand a packed convolution weight to dense [O, C, kh, kw], exactly.

    Raises:
        ValueError: `packed` is not a weight of that shape.

    Source: layout, kernels/conv_layout.py. Twin: reference_conv.unpack_conv_ref.
    """
    check_weight(packed, convolution(weight_shape))
    return conv_weight(unpack_24(packed), weight_shape)
