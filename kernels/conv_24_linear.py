"""conv2d_24 of one tap as a linear layer: pixels are rows, and NHWC images are such a matrix.

    Y [B * H * W, O] = act(X [B * H * W, C] @ W.T + bias)

Images and results are views, so this costs what the linear layer costs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from slimgemm.kernels.conv_layout import Convolution, Padding, is_nhwc
from slimgemm.kernels.formats import Packed24


def takes(x: Tensor, conv: Convolution) -> bool:
    """True if `conv` reads one pixel for each it writes, and `x` is dense NHWC in memory."""
    one = conv.kernel == conv.stride == (1, 1)
    return one and not any(conv.padding) and conv.groups == 1 and is_nhwc(x)


def conv2d_24_linear(
    spmm_24: Callable[..., Tensor],
    x: Tensor, w: Packed24, weight_shape: Sequence[int], bias: Tensor | None = None,
    stride: int | Sequence[int] = 1, padding: Padding = 0, dilation: int | Sequence[int] = 1,
    groups: int = 1, act: str = "none",
) -> Tensor:  # fmt: skip
    """conv2d_24 for what `takes` says yes to, whose answer is not asked for again here.

    Args:
        spmm_24: (x, w, bias, scale, act) -> y, which refuses what does not fit.
        x: [B, C, H, W], channels_last; the other arguments are those of conv2d_24.
    Returns:
        [B, O, H, W], channels_last.

    Twin: reference_conv.conv2d_24_ref.
    """
    channels = x.shape[1]
    # The packed matrix counts its padding to whole bytes of metadata as columns; x has none.
    weight = w if w.k == channels else w._replace(k=channels)
    return spmm_24(x.permute(0, 2, 3, 1), weight, bias, None, act).permute(0, 3, 1, 2)
