"""Executes the inline PTX of the Gluon kernels on NumPy, register by register (gluon_numpy).

Every operand number of the asm text is resolved through the constraint string, as the compiler
does, so a wrong operand, selector or step offset gives a wrong result. Fragment maps are written
here from the PTX pages, independently of kernels/gluon/orders.py.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from gluon_tensors import Fault, Tensor, array

SMEM_BASE = 0x2000  # where `global_smem` lies; only its alignment matters
LANE = np.arange(32)
G, T = LANE // 4, LANE % 4


def halves(words: np.ndarray, kind: str) -> np.ndarray:
    """b32 registers -> float32 [..., 2], low half first."""
    bits = np.ascontiguousarray(words.astype(np.int64).astype(np.uint32))
    if kind == "f16":
        pairs = bits.view(np.float16).reshape(*bits.shape, 2)
        return pairs.astype(np.float32)
    return np.stack([bits << 16, bits & np.uint32(0xFFFF0000)], -1).view(np.float32)


def expand(compressed: np.ndarray, words: np.ndarray, selector: int) -> np.ndarray:
    """Dense [..., 16, 32] of a compressed [..., 16, 16] and its metadata words [..., 32 lanes]."""
    dense = np.zeros((*compressed.shape[:-1], 32), np.float32)
    rows, groups = np.meshgrid(np.arange(16), np.arange(8), indexing="ij")
    lanes = 4 * (rows % 8) + 2 * selector + groups // 4
    shifts = 16 * (rows // 8) + 4 * (groups % 4)
    nibbles = words.astype(np.int64)[..., lanes] >> shifts & 15
    first, second = nibbles & 3, nibbles >> 2
    if (first >= second).any():
        raise Fault("ordered metadata must be ascending")
    for position, half in ((first, 0), (second, 1)):
        columns = (4 * np.arange(8) + position).reshape(*dense.shape[:-1], 8)
        np.put_along_axis(dense, columns, compressed[..., half::2], -1)
    return dense


def mma_sp(kind, a, b, c, words, selector):
    """m16n8k32: lists of 4 registers [..., 32 lanes] -> list of 4 results."""
    a = [halves(r, kind) for r in a]
    b = [halves(r, kind) for r in b]
    lead = a[0].shape[:-2]
    compressed, right = np.zeros((*lead, 16, 16), np.float32), np.zeros((*lead, 32, 8), np.float32)
    for r in range(4):
        for h in range(2):
            compressed[..., G + 8 * (r % 2), 2 * T + h + 8 * (r // 2)] = a[r][..., h]
            right[..., 2 * T + h + 8 * r, G] = b[r][..., h]
    product = expand(compressed, words, selector) @ right
    return [c[r] + product[..., G + 8 * (r // 2), 2 * T + r % 2] for r in range(4)]


def matrix(block, descriptor: int, rows: int, kind: str) -> np.ndarray:
    """float32 [rows, rest of the 128-byte row] behind a K-major 128-byte-swizzled descriptor."""
    if descriptor >> 62 != 1 or descriptor >> 32 & 0x3FFF != 64:
        raise Fault(f"descriptor {descriptor:#x} is not K-major with a 128-byte swizzle")
    address = ((descriptor & 0x3FFF) << 4) - SMEM_BASE
    row, byte = np.arange(rows)[:, None], np.arange(0, 128 - address % 128, 2)[None, :]
    place = address + row // 8 * 1024 + row % 8 * 128 + byte
    place = place ^ (place >> 7 & 7) << 4
    words = block.arena.read(place // 2, block).astype(np.int16)
    if kind == "f16":
        return words.view(np.float16).astype(np.float32)
    return (words.astype(np.int32) << 16).view(np.float32)


def wgmma_sp(block, kind, n, acc, a, b, words, selector):
    """m64n{n}k32 on registers [128 threads]: acc list of n/2, descriptors, metadata."""
    left = matrix(block, a, 64, kind)[:, :16].reshape(4, 16, 16)
    right = matrix(block, b, n, kind)[:, :32]
    dense = expand(left, words.reshape(4, 32), selector)
    product = (dense.reshape(64, 32) @ right.T).astype(np.float32)
    rows, columns = accumulator_map(n)
    product = product[rows, columns]
    return [acc[r] + product[:, r] for r in range(n // 2)]


def accumulator_map(n: int) -> tuple[np.ndarray, np.ndarray]:
    """(row, column) of register r of thread i in an m64n{n} accumulator: two [128, n/2] arrays."""
    thread, r = np.arange(128)[:, None], np.arange(n // 2)[None, :]
    rows = 16 * (thread // 32) + thread % 32 // 4 + 8 * (r // 2 % 2)
    return rows, 8 * (r // 4) + 2 * (thread % 4) + r % 2


MMA = re.compile(
    r"mma\.sp::ordered_metadata\.sync\.aligned\.m16n8k32\.row\.col\.f32\.(bf16|f16)\.\1\.f32 "
    r"\{(.*?)\}, \{(.*?)\}, \{(.*?)\}, \{(.*?)\}, (\$\d+), (?:0x)?([01])"
)
WGMMA = re.compile(
    r"wgmma\.mma_async\.sp\.sync\.aligned\.m64n(\d+)k32\.f32\.(bf16|f16)\.\2 "
    r"\{(.*?)\}, (\w+), (\w+), (\$\d+), ([01]), 1, 1, 1, 0, 0"
)


def execute(block, text, constraints, args, dtype, pack) -> Any:
    """gl.inline_asm_elementwise: the text, by statement, on the registers of every thread."""
    kinds = constraints.split(",")
    outputs = sum(kind.startswith("=") for kind in kinds)
    shape = np.broadcast_shapes(*(array(a).shape for a in args)) if args else ()
    wide = "wgmma" in text
    registers: dict[str, Any] = {}
    for index, arg in enumerate(args):
        value = array(arg)
        whole = np.broadcast_to(value, shape)
        if wide:
            split = whole[accumulator_map(shape[1])]
        else:
            split = whole.reshape(*shape[:-1], shape[-1] // pack, pack)
            if shape[-1] != 32 * pack:
                raise Fault("an mma fragment must be 32 lanes of 4 registers")
        for p in range(pack):
            name = f"${outputs + index * pack + p}"
            registers[name] = int(value) if wide and not value.ndim else split[..., p]
    for i, kind in enumerate(kinds[outputs:]):
        if kind.isdigit():
            registers[f"${kind}"] = registers[f"${outputs + i}"]
    order = [text.find(name) for name in ("wgmma.fence", "mma_async", "commit_group", "wait_group")]
    if wide and (order != sorted(order) or order[0] < 0):
        raise Fault("wgmma must be fenced before, committed and waited for after")
    for statement in text.split(";"):
        step(block, statement.strip(" {}\n"), statement.strip(), registers)
    results = [registers[f"${i}"] for i in range(outputs)]
    if not args:
        return Tensor(np.asarray(results[0]).astype(dtype.storage), dtype)
    if not wide:
        return Tensor(np.stack(results, -1).reshape(shape).astype(np.float32), dtype)
    out = np.empty(shape, np.float32)
    out[accumulator_map(shape[1])] = np.stack(results, -1)
    return Tensor(out, dtype)


def step(block, bare: str, statement: str, registers: dict[str, Any]) -> None:
    """One PTX statement; `registers` holds operands and named registers."""

    def listed(group):
        return [registers[name.strip()] for name in group.split(",")]

    if match := MMA.match(statement):
        kind, d, a, b, c, e, selector = match.groups()
        results = mma_sp(kind, listed(a), listed(b), listed(c), registers[e], int(selector))
        registers.update(zip((name.strip() for name in d.split(",")), results, strict=True))
    elif match := WGMMA.match(statement):
        n, kind, d, a, b, e, selector = match.groups()
        results = wgmma_sp(
            block, kind, int(n), listed(d), registers[a], registers[b], registers[e], int(selector)
        )
        registers.update(zip((name.strip() for name in d.split(",")), results, strict=True))
    elif match := re.match(r"add\.s64 (\w+), (\$?\w+), (-?\d+)$", bare):
        registers[match[1]] = registers[match[2]] + int(match[3])
    elif match := re.match(r"mov\.u64 (\w+), global_smem$", bare):
        registers[match[1]] = SMEM_BASE
    elif match := re.match(r"cvt\.u32\.u64 (\$?\w+), (\w+)$", bare):
        registers[match[1]] = registers[match[2]]
    elif bare and not re.match(r"\.reg |wgmma\.(fence|commit_group|wait_group)", bare):
        raise Fault(f"no emulation of PTX {bare!r}")
