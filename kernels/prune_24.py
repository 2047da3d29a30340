"""prune_24: dense [N, K] -> its `keep` largest |w| of every `group`, packed or dense. One pass.

The kernel is that of pack_24: reads each weight once, writes the result once. Ties keep the
lower index; NaN ranks above infinity, so that it is never dropped unseen.
"""

from __future__ import annotations

from torch import Tensor

from slimgemm.kernels.formats import Packed24
from slimgemm.kernels.pack_24 import launch_pack


def prune_24(w: Tensor, keep: int = 2, group: int = 4) -> Packed24:
    """Keep the `keep` largest magnitudes of every `group` along the last axis, and pack them.

    Args:
        w: [N, K], fp16, bf16 or fp32, any strides, on a GPU.
    Returns:
        The pruned weight in the format of kernels/formats.py.
    Raises:
        ValueError: dtype, rank, pattern or device are not as above.

    Source: magnitude 2:4, arXiv 2104.08378 section 3. Twin: reference.prune_24_ref.
    """
    packed, _ = launch_pack(w, keep, group, dense=False, count=False)
    assert isinstance(packed, Packed24)
    return packed


def prune_dense_24(w: Tensor, keep: int = 2, group: int = 4) -> Tensor:
    """As prune_24, but the result is dense [N, K] with +0.0 in the dropped places.

    Twin: reference.prune_dense_24_ref.
    """
    dense, _ = launch_pack(w, keep, group, dense=True, count=False)
    assert isinstance(dense, Tensor)
    return dense
