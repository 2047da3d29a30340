"""Plain torch twins of the launchers: `<op>_ref` takes the same arguments and runs on any device.

They define what a kernel must compute, and they are what a CPU runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

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
    pair_table,
    position_table,
    values_per_byte,
)

# Dense weights that a twin decodes at a time: 4 MiB in fp32, and twice that for their positions.
# On one core of an EPYC, a product of 256 rows with a 4096 x 4096 weight took 1.15 of dense so, and
# 1.92 when the weight was decoded whole; smaller blocks cost more in the matrix library.
BLOCK_WEIGHTS = 2**20
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
    keep: int, group: int, groups: int, count: int, first: int, nonzeros: int, k: int
) -> None:
    """Raise the error of a weight that has more than `keep` non-zeros in a group.

    Args:
        groups: groups per row; first: row-major number of the first bad one; count: bad ones.
        nonzeros: non-zeros in the first bad group.
        k: columns of the weight, which the last group may reach past.
    """
    row, g = divmod(first, groups)
    last = min(g * group + group, k) - 1
    raise ValueError(
        f"weight is not {keep}:{group}: row {row}, columns {g * group}-{last} "
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
            raise_not_packable(keep, group, groups.shape[1], int(bad.sum()), first, nonzeros, k)
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


def _computed_positions(meta: Tensor, keep: int, group: int) -> Tensor:
    """int64 [bytes, values per byte]: kept positions 0..7 of every byte, by arithmetic.

    Reads no table: a CUDA graph cannot be captured while one is copied to the GPU.
    """
    m = meta.reshape(-1).int()
    if (keep, group) == (2, 4):
        places = [(m >> shift & 3) + shift // 4 * 4 for shift in (0, 2, 4, 6)]
        return torch.stack(places, -1).long()
    places = []
    for _ in range(values_per_byte(keep, group)):
        low = m & -m  # the lowest bit that is set; its number in binary, digit by digit:
        digits = [((low & mask) != 0).int() * 2**i for i, mask in enumerate((0xAA, 0xCC, 0xF0))]
        places.append(sum(digits[1:], digits[0]))
        m = m ^ low
    return torch.stack(places, -1).long()


def _positions(meta: Tensor, keep: int, group: int) -> tuple[Tensor, int]:
    """Where the stored values go: int64 [rows, values of a row], and how many weights a row has."""
    flat = meta.reshape(-1)
    if meta.device.type != "cpu":
        return _computed_positions(flat, keep, group), BYTE_WEIGHTS
    if flat.numel() % 2 or flat.storage_offset() % 2:
        return position_table(keep, group).index_select(0, flat.int()), BYTE_WEIGHTS
    pairs = flat.view(torch.uint16).int()
    return pair_table(keep, group).index_select(0, pairs), 2 * BYTE_WEIGHTS


def unpack_24_ref(packed: Packed24) -> Tensor:
    """Twin of unpack_24: Packed24 -> dense [N, k]."""
    check_shapes(packed)
    return _dense(packed)


def _dense(packed: Packed24) -> Tensor:
    """The dense [N, k] of a checked weight, decoded at once where it is small."""
    n, columns = packed.meta.shape
    values = packed.values.detach()
    dense = values.new_empty(n, columns * BYTE_WEIGHTS)
    if _is_one_block(packed):
        _decode(values, packed, packed.meta, dense)
    else:
        for rows in _blocks(packed):
            _decode(values[rows], packed, packed.meta[rows], dense[rows])
    return dense if packed.k == dense.shape[1] else dense[:, : packed.k]


def _block_rows(packed: Packed24) -> int:
    return max(64, BLOCK_WEIGHTS // max(1, packed.k))


def _is_one_block(packed: Packed24) -> bool:
    return packed.values.shape[0] <= _block_rows(packed)


def _blocks(packed: Packed24) -> Iterator[slice]:
    n, rows = packed.values.shape[0], _block_rows(packed)
    return (slice(start, min(start + rows, n)) for start in range(0, n, rows))


def _decode(values: Tensor, packed: Packed24, meta: Tensor, out: Tensor) -> None:
    """Write the dense weights of some rows of `packed` to `out` [rows, padded k]."""
    positions, lanes = _positions(meta, packed.keep, packed.group)
    out.zero_().view(-1, lanes).scatter_(1, positions, values.view(positions.shape))


def dense_blocks(packed: Packed24) -> Iterator[tuple[slice, Tensor]]:
    """(rows, dense [rows, k]) of a packed weight, block by block in one buffer that is reused."""
    n, k = packed.shape
    values = packed.values.detach()
    shape = min(n, _block_rows(packed)), packed.meta.shape[1] * BYTE_WEIGHTS
    buffer = values.new_empty(shape)
    for rows in _blocks(packed):
        block = buffer[: rows.stop - rows.start]
        _decode(values[rows], packed, packed.meta[rows], block)
        yield rows, block[:, :k]


def gather_24_ref(dense: Tensor, packed: Packed24) -> Tensor:
    """Entries of a dense [N, k] at the kept positions of `packed`: [N, stored], 0 in padding."""
    _, meta, k, keep, group = packed
    positions, lanes = _positions(meta, keep, group)
    missing = meta.shape[1] * BYTE_WEIGHTS - k
    padded = F.pad(dense, (0, missing)) if missing else dense
    return padded.reshape(-1, lanes).gather(1, positions).view(packed.values.shape)


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


def _as_matrix(x: Tensor) -> Tensor:
    """`x` [..., columns] as a matrix. The rows are said, since -1 fails with no columns."""
    return x if x.ndim == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


@torch.no_grad()
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
    rows = _as_matrix(x)
    added = None if bias is None else bias.to(x.dtype)
    fused = None if scale is not None else added
    if _is_one_block(w):
        z = F.linear(rows, _dense(w), fused)
    else:
        z = rows.new_empty(rows.shape[0], n)
        for out, dense in dense_blocks(w):
            if fused is None:
                torch.mm(rows, dense.t(), out=z[:, out])
            else:
                torch.addmm(fused[out], rows, dense.t(), out=z[:, out])
    if scale is not None:
        z = z * scale.to(x.dtype)
        z = z if added is None else z + added
    y = activate(z, act)
    return y if x.ndim == 2 else y.view(*x.shape[:-1], n)


@torch.no_grad()
def spmm_24_dgrad_ref(dy: Tensor, w: Packed24) -> Tensor:
    """Twin of spmm_24_dgrad: dy [..., N] @ dense(w) -> [..., k]."""
    check_product("dy", dy, w.shape[0], w)
    # Sums over blocks would be rounded to 16 bits once per block.
    whole = _is_one_block(w) or dy.element_size() < 4
    rows = _as_matrix(dy)
    if whole:
        return (rows @ _dense(w)).view(*dy.shape[:-1], w.k)
    dx = rows.new_zeros(rows.shape[0], w.k)
    for n, dense in dense_blocks(w):
        dx.addmm_(rows[:, n], dense)
    return dx.view(*dy.shape[:-1], w.k)


@torch.no_grad()
def spmm_24_wgrad_ref(dy: Tensor, x: Tensor, w: Packed24) -> Tensor:
    """Twin of spmm_24_wgrad: (dy.T @ x) at the kept positions of `w`, [N, stored]."""
    check_product("dy", dy, w.shape[0], w)
    check_product("x", x, w.k, w)
    check_same_rows(dy, x)
    left, right = _as_matrix(dy).t(), _as_matrix(x)
    if _is_one_block(w):
        return gather_24_ref(left @ right, w)
    dvalues = torch.empty_like(w.values)
    for n in _blocks(w):
        part = w._replace(values=w.values[n], meta=w.meta[n])
        dvalues[n] = gather_24_ref(left[n] @ right, part)
    return dvalues


def output_error(got: Tensor, exact: Tensor) -> float:
    """Largest difference over the largest magnitude of `exact` (float64); NaN if `got` has one."""
    if got.numel() == 0:
        return 0.0
    got, exact = got.detach(), exact.detach()
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
