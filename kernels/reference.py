"""Plain torch twins of the launchers: `<op>_ref` takes the same arguments and runs on any device.

They define what a kernel must compute, and they are what a CPU runs.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from slimgemm.kernels.formats import (
    BYTE_WEIGHTS,
    Packed24,
    byte_table,
    check_pattern,
    check_shapes,
    packed_shapes,
    position_table,
    values_per_byte,
)

ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu", "relu2")


def activate(z: Tensor, act: str) -> Tensor:
    """The activation `act` (one of ACTIVATIONS; relu2 is relu squared) of `z`."""
    if act == "none":
        return z
    if act == "relu":
        return F.relu(z)
    if act == "gelu":
        return F.gelu(z)
    if act == "gelu_tanh":
        return F.gelu(z, approximate="tanh")
    if act == "silu":
        return F.silu(z)
    if act == "relu2":
        return F.relu(z).square()
    raise ValueError(f"act must be one of {', '.join(ACTIVATIONS)}, got {act!r}")


def check_dense(w: Tensor) -> None:
    """Raise ValueError unless `w` is a floating matrix."""
    if w.ndim != 2 or not w.dtype.is_floating_point:
        raise ValueError(f"weight must be a floating matrix [N, K], got {w.dtype} {list(w.shape)}")


def raise_not_packable(
    keep: int, group: int, groups: int, count: int, first: int, nonzeros: int
) -> None:
    """Raise the error of a weight that has more than `keep` non-zeros in a group.

    Args:
        groups: groups per row; first: row-major number of the first bad one; count: bad ones.
        nonzeros: non-zeros in the first bad group.
    """
    row, g = divmod(first, groups)
    raise ValueError(
        f"weight is not {keep}:{group}: row {row}, columns {g * group}-{g * group + group - 1} "
        f"hold {nonzeros} nonzeros ({count} such groups in all); prune it first "
        "(slimgemm.pruning.plan)"
    )


def _kept_mask(w: Tensor, keep: int, group: int) -> Tensor:
    """bool [N, groups, group]: the `keep` largest |w|, NaN above all, ties to the lower index."""
    order = w.abs().sort(dim=-1, descending=True, stable=True).indices
    return torch.zeros_like(w, dtype=torch.bool).scatter_(-1, order[..., :keep], True)


def _pack(w: Tensor, keep: int, group: int, prune: bool) -> Packed24:
    check_dense(w)
    check_pattern(keep, group)
    n, k = w.shape
    (_, stored), (_, columns) = packed_shapes(n, k, keep, group)
    groups = F.pad(w.detach(), (0, columns * BYTE_WEIGHTS - k)).view(
        n, columns * BYTE_WEIGHTS // group, group
    )
    kept = _kept_mask(groups, keep, group)
    if not prune:
        bad = ((groups != 0) & ~kept).any(-1).reshape(-1)
        if bool(bad.any()):
            first = int(bad.int().argmax())
            nonzeros = int((groups.reshape(-1, group)[first] != 0).sum())
            raise_not_packable(keep, group, groups.shape[1], int(bad.sum()), first, nonzeros)
    values = groups[kept].view(n, stored) + 0.0  # + 0.0 turns -0.0 into +0.0
    bits = kept.view(n, columns, BYTE_WEIGHTS) << torch.arange(BYTE_WEIGHTS, device=w.device)
    mask = bits.sum(-1).to(torch.int32)
    meta = byte_table(keep, group).to(w.device).index_select(0, mask.view(-1)).view(n, columns)
    return Packed24(values, meta, k, keep, group)


def pack_24_ref(w: Tensor, keep: int = 2, group: int = 4) -> Packed24:
    """Twin of pack_24: dense [N, K] that already is keep:group -> Packed24."""
    return _pack(w, keep, group, prune=False)


def prune_24_ref(w: Tensor, keep: int = 2, group: int = 4) -> Packed24:
    """Twin of prune_24: keep the `keep` largest |w| of each group and pack them."""
    return _pack(w, keep, group, prune=True)


def prune_dense_24_ref(w: Tensor, keep: int = 2, group: int = 4) -> Tensor:
    """Twin of prune_dense_24: `w` with the dropped weights of each group set to +0.0."""
    return unpack_24_ref(prune_24_ref(w, keep, group))


@functools.cache
def _table_on(device: torch.device, keep: int, group: int) -> Tensor:
    return position_table(keep, group).to(device)


def _positions(meta: Tensor, keep: int, group: int) -> Tensor:
    """int64 [bytes of meta, values per byte]: where in its 8 lanes each stored value goes."""
    return _table_on(meta.device, keep, group).index_select(0, meta.reshape(-1).int())


def unpack_24_ref(packed: Packed24) -> Tensor:
    """Twin of unpack_24: Packed24 -> dense [N, k]."""
    check_shapes(packed)
    values, meta, k, keep, group = packed
    positions = _positions(meta, keep, group)
    lanes = values.new_zeros(positions.shape[0], BYTE_WEIGHTS)
    dense = lanes.scatter_(1, positions, values.reshape(-1, values_per_byte(keep, group)))
    return dense.view(values.shape[0], meta.shape[1] * BYTE_WEIGHTS)[:, :k]


def gather_24_ref(dense: Tensor, packed: Packed24) -> Tensor:
    """Entries of a dense [N, k] at the kept positions of `packed`: [N, stored], 0 in padding."""
    _, meta, k, keep, group = packed
    positions = _positions(meta, keep, group)
    padded = F.pad(dense, (0, meta.shape[1] * BYTE_WEIGHTS - k))
    return padded.reshape(-1, BYTE_WEIGHTS).gather(1, positions).view(packed.values.shape)


def check_product(name: str, x: Tensor, columns: int, w: Packed24) -> None:
    """Raise ValueError unless `x` [..., columns] can meet `w` in one product. Reads no element."""
    check_shapes(w)
    if x.ndim < 1 or x.shape[-1] != columns:
        raise ValueError(
            f"{name} must be [..., {columns}] for a {list(w.shape)} weight, got {list(x.shape)}"
        )
    if w.values.dtype != x.dtype or w.values.device != x.device:
        raise ValueError(
            f"{name} must be {w.values.dtype} on {w.values.device} as the weight, "
            f"got {x.dtype} on {x.device}"
        )


def check_same_rows(dy: Tensor, x: Tensor) -> None:
    """Raise ValueError unless `dy` and `x` have the same leading shape."""
    if dy.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"dy and x must have the same leading shape, got {list(dy.shape)} and {list(x.shape)}"
        )


def check_epilogue_ref(
    n: int, x: Tensor, bias: Tensor | None, scale: Tensor | None, act: str
) -> None:
    """Raise ValueError unless bias and scale are floating [n] beside `x`, and `act` is known."""
    if act not in ACTIVATIONS:
        raise ValueError(f"act must be one of {', '.join(ACTIVATIONS)}, got {act!r}")
    for name, t in (("bias", bias), ("scale", scale)):
        if t is None:
            continue
        if t.shape != (n,) or not t.dtype.is_floating_point:
            raise ValueError(f"{name} must be floating [{n}], got {t.dtype} {list(t.shape)}")
        if t.device != x.device:
            raise ValueError(f"{name} must be on {x.device} as x, got {t.device}")


def spmm_24_ref(
    x: Tensor,
    w: Packed24,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    act: str = "none",
) -> Tensor:
    """Twin of spmm_24: act((x @ dense(w).T) * scale + bias), x [..., k] -> [..., N]."""
    n, k = w.shape
    check_product("x", x, k, w)
    check_epilogue_ref(n, x, bias, scale, act)
    dense = unpack_24_ref(w)
    bias = None if bias is None else bias.to(x.dtype)
    if scale is None:
        return activate(F.linear(x, dense, bias), act)
    z = F.linear(x, dense) * scale.to(x.dtype)
    return activate(z if bias is None else z + bias, act)


def spmm_24_dgrad_ref(dy: Tensor, w: Packed24) -> Tensor:
    """Twin of spmm_24_dgrad: dy [..., N] @ dense(w) -> [..., k]."""
    check_product("dy", dy, w.shape[0], w)
    return dy @ unpack_24_ref(w)


def spmm_24_wgrad_ref(dy: Tensor, x: Tensor, w: Packed24) -> Tensor:
    """Twin of spmm_24_wgrad: (dy.T @ x) at the kept positions of `w`, [N, stored]."""
    check_product("dy", dy, w.shape[0], w)
    check_product("x", x, w.k, w)
    check_same_rows(dy, x)
    rows = math.prod(dy.shape[:-1])  # said, since a reshape to -1 rows fails with no columns
    dw = dy.reshape(rows, dy.shape[-1]).t() @ x.reshape(rows, x.shape[-1])
    return gather_24_ref(dw, w)


def output_error(got: Tensor, exact: Tensor) -> float:
    """Largest difference over the largest magnitude of `exact` (float64); NaN if `got` has one."""
    if got.numel() == 0:
        return 0.0
    scale = exact.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    return float((got.double() - exact).abs().max() / scale)


def allowed_error(dense: Tensor, exact: Tensor, slack: float = 2.0) -> float:
    """The tolerance rule: `slack` x the error that torch's dense op makes in the same dtype.

    Torch's error counts as at least one rounding of the output, and one of an fp32 sum: small
    products can be exact by luck.

    Args:
        dense: torch's result in the dtype under test; exact: the same in float64.
    """
    rounding = max(torch.finfo(dense.dtype).eps / 2, torch.finfo(torch.float32).eps)
    if dense.dtype == torch.float64:
        rounding = torch.finfo(torch.float64).eps
    return slack * max(output_error(dense, exact), rounding)
