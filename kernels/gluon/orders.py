"""Hardware orders of a 2:4 weight: where every bit lies for mma.sp and for wgmma.sp.

Both multiply a compressed A by a dense B. Lane = 4 g + t (g = lane // 4, t = lane % 4). One
instruction takes 64 dense bytes of K (a step): 32 columns of a 16-bit type, 64 of an 8-bit one.

mma.sp, m16n8k32 on 16-bit types and m16n8k64 on 8-bit ones: a warp holds A as a compressed tile of
16 rows x 32 bytes. One b32 register is two values, or four; byte h (0 = lowest) of register r of a
lane is

    row  g + 8 (r % 2)        compressed byte  4 t + h + 16 (r // 2)

`MmaSp.values[tile, block, step, lane, r]`: rows 16 tile..., dense bytes 512 block + 64 step...
A lane reads its four registers of a step in one 16-byte load.

Metadata of 16-bit types: one b32 per lane feeds two steps. The step with selector 0 reads it from
the lanes with t in {0, 1}, selector 1 from t in {2, 3}. With c = 16 (t % 2), its first column of
the step:

    bits  0-15   row g,      columns c ... c + 15: four nibbles, first group lowest
    bits 16-31   row g + 8,  the same columns

A nibble is that of the canonical format: bits 0-1 the first kept position, bits 2-3 the second. So
a word is the canonical bytes [row g: 2 bytes][row g + 8: 2 bytes], lowest first.
`MmaSp.meta[tile, block, lane, j]`: steps 2 j (selector 0) and 2 j + 1 (selector 1). A lane reads
the four words of a 256-column block in one 16-byte load.

Worked word: tile 0, block 0, lane 5 (g = 1, t = 1), j = 0. Step 0, rows 1 and 9, columns 16-31:
canonical bytes meta[1, 2:4] = 44 E9 and meta[9, 2:4] = 94 4E (hex) give the word 0x4E94E944.

Metadata of 8-bit types: one b32 per lane feeds one step, all lanes are read (selector 0):

    bits  0-31   row g + 8 (t % 2),  columns 32 (t // 2) ... + 31: four canonical bytes

`MmaSp.meta[tile, block, half, lane, j]`: step 4 half + j of the block's eight (512 columns), again
four words in one 16-byte load.

Worked word: tile 0, block 0, half 0, lane 7 (g = 1, t = 3), j = 1. Step 1, row 9, columns 96-127:
canonical bytes meta[9, 12:16] = 44 E9 94 4E (hex) give the word 0x4E94E944.

wgmma.sp, m64nNk32 on 16-bit types and m64nNk64 on 8-bit ones: the values stay canonical, row-major,
read by TMA (only the row pitch is padded to 16 bytes). The metadata map is the mma.sp one for the
16 rows of each of the four warps: `WgmmaSp.meta[tile, block, group, thread, j]`: rows 128 tile +
64 group + 16 (thread // 32) + ..., dense bytes 256 block + ...; word j is for steps 2 j and 2 j + 1
of the block's four on 16-bit types, for step j on 8-bit ones.

Padding, inside, at pack time: rows to the tile and K to the block, with values +0.0 and the byte
0x44 of metadata (positions 0 and 1 twice): a zero nibble is not ascending, and the ordered form of
the instruction leaves its result undefined.

torch's CUTLASS order is the same words in another sequence. 16-bit types: int16 metadata, whose
int32 view is [K/32, N/32, g 8, tile 2, t 2] of steps, 32-row blocks, lanes. int8: int32 metadata,
[K/64, N/16, g 8, t 4] of steps, tiles, lanes.

Source: PTX ISA, "Matrix multiply-accumulate operation using mma.sp instruction", fragments of
m16n8k32 for .f16/.bf16 and of m16n8k64 for .s8/.e4m3 with the metadata figures; "Asynchronous
wgmma.sp", m64nNk32 and m64nNk64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from slimgemm.kernels.formats import Packed24, check_shapes

MMA_ROWS = 16  # rows of one mma.sp tile
MMA_BLOCK_BYTES = 512  # dense bytes of K that a lane reads the metadata of at a time
WGMMA_ROWS = 128  # rows of one tile: two warpgroups of 64
WGMMA_BLOCK_BYTES = 256  # dense bytes of one pipeline stage: one 128-byte swizzled row of values
STEP_BYTES = 64  # dense bytes of K that one instruction takes
EMPTY_BYTE = 0x44  # two groups that keep positions 0 and 1
DTYPES = (torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8)


class MmaSp(NamedTuple):
    """A 2:4 weight in the register order of mma.sp.

    Args:
        values: int32 [ceil(n/16), blocks, 8, 32, 4]: tile, block, step, lane, register; a block is
            256 columns of a 16-bit type, 512 of an 8-bit one.
        meta: int32 [ceil(n/16), blocks, 32, 4]: tile, block, lane, word. On 8-bit types
            [ceil(n/16), blocks, 2, 32, 4], with the half of the block before the lane.
        n, k: rows and dense columns before padding.
        dtype: float16, bfloat16, float8_e4m3fn or int8, what `values` holds in its registers.
    """

    values: Tensor
    meta: Tensor
    n: int
    k: int
    dtype: torch.dtype


class WgmmaSp(NamedTuple):
    """A 2:4 weight as wgmma.sp reads it.

    Args:
        values: float16 | bfloat16 [n, ceil(k/16) * 8], or float8_e4m3fn | int8
            [n, ceil(k/32) * 16]: canonical; a row is whole 16-byte units.
        meta: int32 [ceil(n/128), ceil(k/128), 2, 128, 2]: tile, block, warpgroup, thread, word; on
            8-bit types [ceil(n/128), ceil(k/256), 2, 128, 4].
        n, k: rows and dense columns before padding.
    """

    values: Tensor
    meta: Tensor
    n: int
    k: int


def check_packable(packed: Packed24) -> None:
    """Raise ValueError unless `packed` is well shaped, 2:4 and of a dtype in DTYPES."""
    integer = packed.values.dtype == torch.int8
    # The canonical format is one of floating values; int8 ones have the shapes of 8-bit floats.
    check_shapes(
        packed._replace(values=packed.values.view(torch.float8_e4m3fn)) if integer else packed
    )
    if (packed.keep, packed.group) != (2, 4):
        raise ValueError(
            f"keep:group must be 2:4 for a tensor core, got {packed.keep}:{packed.group}"
        )
    if packed.values.dtype not in DTYPES:
        raise ValueError(
            f"values must be float16, bfloat16, float8_e4m3fn or int8, got {packed.values.dtype}"
        )


def block_columns(block_bytes: int, dtype: torch.dtype) -> int:
    """Dense columns of a block of `block_bytes`."""
    return block_bytes // dtype.itemsize


def wgmma_columns(k: int, dtype: torch.dtype) -> int:
    """Stored values per row of WgmmaSp.values: whole 16-byte units."""
    return -(-k * dtype.itemsize // 32) * (16 // dtype.itemsize)


def _padded(packed: Packed24, rows: int, block_bytes: int) -> tuple[Tensor, Tensor]:
    """Bytes of values, and meta, of `packed`, padded to whole tiles of `rows` and blocks."""
    n, k = packed.shape
    block_k = block_columns(block_bytes, packed.values.dtype)
    pad_rows = -n % rows
    pad_bytes = (k + -k % block_k) // 8 - packed.meta.shape[1]
    size = packed.values.dtype.itemsize
    values = F.pad(packed.values.view(torch.uint8), (0, 4 * size * pad_bytes, 0, pad_rows))
    return values, F.pad(packed.meta, (0, pad_bytes, 0, pad_rows), value=EMPTY_BYTE)


def _trimmed(values: Tensor, meta: Tensor, n: int, k: int) -> Packed24:
    """The canonical Packed24 [n, k] inside padded canonical tensors."""
    columns = -(-k // 8)
    return Packed24(values[:n, : 4 * columns].contiguous(), meta[:n, :columns].contiguous(), k)


def _meta_to_words(meta: Tensor, tiles: int, blocks: int, words: int, size: int) -> Tensor:
    """uint8 [16 tiles, 8 words blocks] -> int32 [tiles, blocks, 32 lanes, words].

    `size`: bytes of a value.
    """
    if size == 2:
        # row half, g | block, word, selector, t % 2, byte of a half word
        parts = meta.view(tiles, 2, 8, blocks, words, 2, 2, 2).permute(0, 3, 2, 5, 6, 4, 1, 7)
    else:
        # row half, g | block, word, column half, byte of a word
        parts = meta.view(tiles, 2, 8, blocks, words, 2, 4).permute(0, 3, 2, 5, 1, 4, 6)
    return parts.reshape(-1, 4).view(torch.int32).view(tiles, blocks, 32, words)


def _words_to_meta(words: Tensor, size: int) -> Tensor:
    """Exact inverse of _meta_to_words."""
    tiles, blocks, _, count = words.shape
    parts = words.contiguous().view(torch.uint8)
    if size == 2:
        parts = parts.view(tiles, blocks, 8, 2, 2, count, 2, 2).permute(0, 6, 2, 1, 5, 3, 4, 7)
    else:
        parts = parts.view(tiles, blocks, 8, 2, 2, count, 4).permute(0, 4, 2, 1, 5, 3, 6)
    return parts.reshape(16 * tiles, 8 * count * blocks)


def to_mma_sp(packed: Packed24) -> MmaSp:
    """Packed24 -> the register order of mma.sp (module docstring), on any device.

    Raises:
        ValueError: not 2:4, a dtype that is not one of DTYPES, or shapes that do not fit.
    """
    check_packable(packed)
    values, meta = _padded(packed, MMA_ROWS, MMA_BLOCK_BYTES)
    size = packed.values.dtype.itemsize
    tiles, blocks = values.shape[0] // MMA_ROWS, 2 * values.shape[1] // MMA_BLOCK_BYTES
    # r % 2, g | block, step, r // 2, t
    parts = values.view(torch.int32).view(tiles, 2, 8, blocks, 8, 2, 4)
    registers = parts.permute(0, 3, 4, 2, 6, 5, 1).reshape(tiles, blocks, 8, 32, 4)
    words = _meta_to_words(meta, tiles, blocks, 8 // size, size)
    if size == 1:
        words = words.view(tiles, blocks, 32, 2, 4).transpose(2, 3).contiguous()
    return MmaSp(registers, words, *packed.shape, packed.values.dtype)


def from_mma_sp(weight: MmaSp) -> Packed24:
    """Exact inverse of to_mma_sp."""
    tiles, blocks = weight.values.shape[:2]
    size = weight.dtype.itemsize
    parts = weight.values.contiguous().view(tiles, blocks, 8, 8, 4, 2, 2)
    values = parts.permute(0, 6, 3, 1, 2, 5, 4).reshape(16 * tiles, 64 * blocks)
    words = weight.meta
    if size == 1:
        words = words.transpose(2, 3).reshape(tiles, blocks, 32, 8)
    meta = _words_to_meta(words, size)
    return _trimmed(values.view(weight.dtype), meta, weight.n, weight.k)


def to_wgmma_sp(packed: Packed24) -> WgmmaSp:
    """Packed24 -> what wgmma.sp reads (module docstring), on any device.

    `values` is the tensor of `packed` itself where its rows are whole 16-byte units: no second
    copy.

    Raises:
        ValueError: not 2:4, a dtype that is not one of DTYPES, or shapes that do not fit.
    """
    check_packable(packed)
    dtype = packed.values.dtype
    _, meta = _padded(packed, WGMMA_ROWS, WGMMA_BLOCK_BYTES)
    tiles = meta.shape[0] // WGMMA_ROWS
    blocks = 8 * meta.shape[1] // block_columns(WGMMA_BLOCK_BYTES, dtype)
    count = 4 // dtype.itemsize
    # 8 tiles: tile, group, warp
    words = _meta_to_words(meta, 8 * tiles, blocks, count, dtype.itemsize)
    words = words.view(tiles, 2, 4, blocks, 32, count).permute(0, 3, 1, 2, 4, 5)
    missing = wgmma_columns(packed.k, dtype) - packed.values.shape[1]
    values = wider(packed.values, missing)
    return WgmmaSp(values, words.reshape(tiles, blocks, 2, 128, count), *packed.shape)


def wider(values: Tensor, columns: int) -> Tensor:
    """`values` with that many columns of zeros more; itself where there are none."""
    if not columns:
        return values
    # As bytes: padding is not written for every 8-bit type.
    padded = F.pad(values.view(torch.uint8), (0, columns * values.element_size()))
    return padded.view(values.dtype)


def from_wgmma_sp(weight: WgmmaSp) -> Packed24:
    """Exact inverse of to_wgmma_sp."""
    tiles, blocks, _, _, count = weight.meta.shape
    words = weight.meta.view(tiles, blocks, 2, 4, 32, count).permute(0, 2, 3, 1, 4, 5)
    words = words.reshape(8 * tiles, blocks, 32, count)
    meta = _words_to_meta(words, weight.values.element_size())
    return _trimmed(weight.values, meta, weight.n, weight.k)


def to_cutlass_meta(packed: Packed24) -> Tensor:
    """The metadata of `packed` in torch's CUTLASS order.

    Returns:
        int16 [N, K/16] for 16-bit values, int32 [N, K/32] for int8 (and float8_e4m3fn) ones.
    Raises:
        ValueError: N or K does not divide into that order's blocks: multiples of 32 for 16-bit
            values, N of 16 and K of 64 for 8-bit ones.
    """
    check_packable(packed)
    n, k = packed.shape
    if packed.values.element_size() == 1:
        if n % 16 or k % 64:
            raise ValueError(
                f"weight must be [16 i, 64 j] for CUTLASS metadata of 8-bit values, got [{n}, {k}]"
            )
        # tile, row half, g | step, column half, byte
        parts = packed.meta.view(n // 16, 2, 8, k // 64, 2, 4)
        ordered = parts.permute(3, 0, 2, 4, 1, 5).reshape(-1, 4)
        return ordered.view(torch.int32).view(n, k // 32)
    if n % 32 or k % 32:
        raise ValueError(f"weight must be [32 i, 32 j] for CUTLASS metadata, got [{n}, {k}]")
    # block of 32 rows, tile, row half, g | step, t, byte
    parts = packed.meta.view(n // 32, 2, 2, 8, k // 32, 2, 2)
    ordered = parts.permute(4, 0, 3, 1, 5, 2, 6).reshape(-1, 4)
    return ordered.view(torch.int16).view(n, k // 16)


def from_cutlass_meta(values: Tensor, meta: Tensor) -> Packed24:
    """torch's CUTLASS pair -> Packed24.

    A group with fewer than two non-zeros may name other positions there than the canonical ones.

    Args:
        values: [N, K/2], 16-bit or int8.
        meta: int16 [N, K/16], or int32 [N, K/32] where `values` are int8.
    Raises:
        ValueError: shapes or dtypes that are not those of that order.
    """
    n, half = values.shape
    if values.dtype == torch.int8:
        if n % 16 or half % 32 or meta.dtype != torch.int32 or tuple(meta.shape) != (n, half // 16):
            raise ValueError(
                f"CUTLASS metadata must be int32 [{n}, {half // 16}] with N a multiple of 16 and K "
                f"of 64, got {meta.dtype} {list(meta.shape)}"
            )
        parts = meta.contiguous().view(torch.uint8).view(half // 32, n // 16, 8, 2, 2, 4)
        canonical = parts.permute(1, 4, 2, 0, 3, 5).reshape(n, half // 4)
        return Packed24(values.contiguous(), canonical, 2 * half)
    if n % 32 or half % 16 or meta.dtype != torch.int16 or tuple(meta.shape) != (n, half // 8):
        raise ValueError(
            f"CUTLASS metadata must be int16 [{n}, {half // 8}] with N and K multiples of 32, "
            f"got {meta.dtype} {list(meta.shape)}"
        )
    parts = meta.contiguous().view(torch.uint8).view(half // 16, n // 32, 8, 2, 2, 2, 2)
    canonical = parts.permute(1, 3, 5, 2, 0, 4, 6).reshape(n, half // 4)
    return Packed24(values.contiguous(), canonical, 2 * half)
