"""Hardware orders of a 2:4 weight: where every bit lies for mma.sp and for wgmma.sp.

Both multiply a compressed A by a dense B. Lane = 4 g + t (g = lane // 4, t = lane % 4).

mma.sp m16n8k32, 16-bit types: a warp holds A as a compressed 16 x 16 tile. One b32 register is two
values; half h (0 = low 16 bits) of register r of a lane is

    row  g + 8 (r % 2)        compressed column  2 t + h + 8 (r // 2)

`MmaSp.values[tile, block, step, lane, r]`: rows 16 tile..., dense columns 256 block + 32 step...
A lane reads its four registers of a step in one 16-byte load.

Metadata: one b32 per lane feeds two steps. The step with selector 0 reads it from the lanes with t
in {0, 1}, selector 1 from t in {2, 3}. With c = 16 (t % 2), its first column of the step:

    bits  0-15   row g,      columns c ... c + 15: four nibbles, first group lowest
    bits 16-31   row g + 8,  the same columns

A nibble is that of the canonical format: bits 0-1 the first kept position, bits 2-3 the second. So
a word is the canonical bytes [row g: 2 bytes][row g + 8: 2 bytes], lowest first.
`MmaSp.meta[tile, block, lane, j]`: steps 2 j (selector 0) and 2 j + 1 (selector 1). A lane reads
the four words of a 256-column block in one 16-byte load.

Worked word: tile 0, block 0, lane 5 (g = 1, t = 1), j = 0. Step 0, rows 1 and 9, columns 16-31:
canonical bytes meta[1, 2:4] = 44 E9 and meta[9, 2:4] = 94 4E (hex) give the word 0x4E94E944.

wgmma.sp m64nNk32: the values stay canonical, [N, K/2] row-major, read by TMA (only the row pitch is
padded to 16 bytes). The metadata map is the mma.sp one for the 16 rows of each of the four warps:
`WgmmaSp.meta[tile, block, group, thread, j]`: rows 128 tile + 64 group + 16 (thread // 32) + ...,
dense columns 128 block + ..., word j for steps 2 j and 2 j + 1 of the block's four.

Padding, inside, at pack time: rows to the tile and K to the block, with values +0.0 and the byte
0x44 of metadata (positions 0 and 1 twice): a zero nibble is not ascending, and the ordered form of
the instruction leaves its result undefined.

torch's CUTLASS order (int16 metadata) is the same words in another sequence:
int32 view [K/32, N/32, g 8, tile 2, t 2] of steps, 32-row blocks, lanes.

Source: PTX ISA, "Matrix multiply-accumulate operation using mma.sp instruction", fragments of
m16n8k32 for .f16/.bf16 and the metadata figures; "Asynchronous wgmma.sp", m64nNk32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from slimgemm.kernels.formats import Packed24, check_shapes

MMA_ROWS = 16  # rows of one mma.sp tile
MMA_BLOCK_K = 256  # dense columns whose metadata a lane reads in one 16-byte load
WGMMA_ROWS = 128  # rows of one tile: two warpgroups of 64
WGMMA_BLOCK_K = 128  # dense columns of one pipeline stage: one 128-byte swizzled row of values
STEP_K = 32  # dense columns of one instruction on 16-bit types
EMPTY_BYTE = 0x44  # two groups that keep positions 0 and 1


class MmaSp(NamedTuple):
    """A 2:4 weight in the register order of mma.sp m16n8k32.

    Args:
        values: int32 [ceil(n/16), ceil(k/256), 8, 32, 4]: tile, block, step, lane, register.
        meta: int32 [ceil(n/16), ceil(k/256), 32, 4]: tile, block, lane, word.
        n, k: rows and dense columns before padding.
        dtype: torch.float16 or torch.bfloat16, what the 16-bit halves of `values` are.
    """

    values: Tensor
    meta: Tensor
    n: int
    k: int
    dtype: torch.dtype


class WgmmaSp(NamedTuple):
    """A 2:4 weight as wgmma.sp reads it.

    Args:
        values: float16 | bfloat16 [n, ceil(k/16) * 8], canonical; a row is whole 16-byte units.
        meta: int32 [ceil(n/128), ceil(k/128), 2, 128, 2]: tile, block, warpgroup, thread, word.
        n, k: rows and dense columns before padding.
    """

    values: Tensor
    meta: Tensor
    n: int
    k: int


def check_packable(packed: Packed24) -> None:
    """Raise ValueError unless `packed` is well shaped, 2:4 and of 16-bit values."""
    check_shapes(packed)
    if (packed.keep, packed.group) != (2, 4):
        raise ValueError(
            f"keep:group must be 2:4 for a tensor core, got {packed.keep}:{packed.group}"
        )
    if packed.values.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"values must be float16 or bfloat16, got {packed.values.dtype}")


def _padded(packed: Packed24, rows: int, block_k: int) -> tuple[Tensor, Tensor]:
    """values and meta of `packed`, padded to whole tiles of `rows` and blocks of `block_k`."""
    n, k = packed.shape
    pad_rows = -n % rows
    pad_bytes = (k + -k % block_k) // 8 - packed.meta.shape[1]
    values = F.pad(packed.values, (0, 4 * pad_bytes, 0, pad_rows))
    return values, F.pad(packed.meta, (0, pad_bytes, 0, pad_rows), value=EMPTY_BYTE)


def _trimmed(values: Tensor, meta: Tensor, n: int, k: int) -> Packed24:
    """The canonical Packed24 [n, k] inside padded canonical tensors."""
    columns = -(-k // 8)
    return Packed24(values[:n, : 4 * columns].contiguous(), meta[:n, :columns].contiguous(), k)


def _meta_to_words(meta: Tensor, tiles: int, blocks: int, words: int) -> Tensor:
    """uint8 [16 tiles, 8 words blocks] -> int32 [tiles, blocks, 32 lanes, words]."""
    # row half, g | block, word, selector, t % 2, byte of a half word
    parts = meta.view(tiles, 2, 8, blocks, words, 2, 2, 2)
    ordered = parts.permute(0, 3, 2, 5, 6, 4, 1, 7).reshape(-1, 4)
    return ordered.view(torch.int32).view(tiles, blocks, 32, words)


def _words_to_meta(words: Tensor) -> Tensor:
    """Exact inverse of _meta_to_words."""
    tiles, blocks, _, count = words.shape
    parts = words.contiguous().view(torch.uint8).view(tiles, blocks, 8, 2, 2, count, 2, 2)
    return parts.permute(0, 6, 2, 1, 5, 3, 4, 7).reshape(16 * tiles, 8 * count * blocks)


def to_mma_sp(packed: Packed24) -> MmaSp:
    """Packed24 -> the register order of mma.sp m16n8k32 (module docstring), on any device.

    Raises:
        ValueError: not 2:4, not 16-bit, or shapes that do not fit the format.
    """
    check_packable(packed)
    values, meta = _padded(packed, MMA_ROWS, MMA_BLOCK_K)
    tiles, blocks = values.shape[0] // MMA_ROWS, 2 * values.shape[1] // MMA_BLOCK_K
    # r % 2, g | block, step, r // 2, t, h
    parts = values.view(torch.int16).view(tiles, 2, 8, blocks, 8, 2, 4, 2)
    ordered = parts.permute(0, 3, 4, 2, 6, 5, 1, 7).reshape(-1, 2)
    registers = ordered.view(torch.int32).view(tiles, blocks, 8, 32, 4)
    words = _meta_to_words(meta, tiles, blocks, 4)
    return MmaSp(registers, words, *packed.shape, packed.values.dtype)


def from_mma_sp(weight: MmaSp) -> Packed24:
    """Exact inverse of to_mma_sp."""
    tiles, blocks = weight.values.shape[:2]
    parts = weight.values.contiguous().view(torch.int16).view(tiles, blocks, 8, 8, 4, 2, 2, 2)
    values = parts.permute(0, 6, 3, 1, 2, 5, 4, 7).reshape(16 * tiles, 128 * blocks)
    return _trimmed(values.view(weight.dtype), _words_to_meta(weight.meta), weight.n, weight.k)


def to_wgmma_sp(packed: Packed24) -> WgmmaSp:
    """Packed24 -> what wgmma.sp m64nNk32 reads (module docstring), on any device.

    `values` is the tensor of `packed` itself where ceil(k/8) is even: no second copy.

    Raises:
        ValueError: not 2:4, not 16-bit, or shapes that do not fit the format.
    """
    check_packable(packed)
    _, meta = _padded(packed, WGMMA_ROWS, WGMMA_BLOCK_K)
    tiles, blocks = meta.shape[0] // WGMMA_ROWS, 8 * meta.shape[1] // WGMMA_BLOCK_K
    words = _meta_to_words(meta, 8 * tiles, blocks, 2)  # [8 tiles: tile, group, warp]
    words = words.view(tiles, 2, 4, blocks, 32, 2).permute(0, 3, 1, 2, 4, 5)
    odd = packed.values.shape[1] % 8
    values = F.pad(packed.values, (0, 8 - odd)) if odd else packed.values
    return WgmmaSp(values, words.reshape(tiles, blocks, 2, 128, 2), *packed.shape)


def from_wgmma_sp(weight: WgmmaSp) -> Packed24:
    """Exact inverse of to_wgmma_sp."""
    tiles, blocks = weight.meta.shape[:2]
    words = weight.meta.view(tiles, blocks, 2, 4, 32, 2).permute(0, 2, 3, 1, 4, 5)
    meta = _words_to_meta(words.reshape(8 * tiles, blocks, 32, 2))
    return _trimmed(weight.values, meta, weight.n, weight.k)


def to_cutlass_meta(packed: Packed24) -> Tensor:
    """The metadata of `packed` in torch's CUTLASS order: int16 [N, K/16].

    Raises:
        ValueError: N or K is no multiple of 32, which that order cannot hold.
    """
    check_packable(packed)
    n, k = packed.shape
    if n % 32 or k % 32:
        raise ValueError(f"weight must be [32 i, 32 j] for CUTLASS metadata, got [{n}, {k}]")
    # block of 32 rows, tile, row half, g | step, t, byte
    parts = packed.meta.view(n // 32, 2, 2, 8, k // 32, 2, 2)
    ordered = parts.permute(4, 0, 3, 1, 5, 2, 6).reshape(-1, 4)
    return ordered.view(torch.int16).view(n, k // 16)


def from_cutlass_meta(values: Tensor, meta: Tensor) -> Packed24:
    """torch's CUTLASS pair (values [N, K/2], int16 metadata [N, K/16]) -> Packed24.

    A group with fewer than two non-zeros may name other positions there than the canonical ones.

    Raises:
        ValueError: shapes or dtypes that are not those of that order.
    """
    n, half = values.shape
    if n % 32 or half % 16 or meta.dtype != torch.int16 or tuple(meta.shape) != (n, half // 8):
        raise ValueError(
            f"CUTLASS metadata must be int16 [{n}, {half // 8}] with N and K multiples of 32, "
            f"got {meta.dtype} {list(meta.shape)}"
        )
    parts = meta.contiguous().view(torch.uint8).view(half // 16, n // 32, 8, 2, 2, 2, 2)
    canonical = parts.permute(1, 3, 5, 2, 0, 4, 6).reshape(n, half // 4)
    return Packed24(values.contiguous(), canonical, 2 * half)
