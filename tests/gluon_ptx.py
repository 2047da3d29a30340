"""Executes the inline PTX of the Gluon kernels on NumPy, register by register (gluon_numpy).

Every operand number of the asm text is resolved through the constraint string, as the compiler
does, so a wrong operand, selector or step offset gives a wrong result. Fragment maps are written
here from the PTX pages, independently of kernels/gluon/orders.py.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import numpy as np
from gluon_tensors import Fault, Tensor, array

SMEM_BASE = 0x2000  # where `global_smem` lies; only its alignment matters
LANE = np.arange(32)
G, T = LANE // 4, LANE % 4


class Kind(NamedTuple):
    """An element type of the instructions: how many in 64 dense bytes of K, and of what sums."""

    columns: int
    sums: str
    bits: np.dtype

    @property
    def per(self) -> int:
        """Values in a b32 register."""
        return self.columns // 16


KINDS = {
    "f16": Kind(32, "f32", np.dtype(np.float16)),
    "bf16": Kind(32, "f32", np.dtype(np.int16)),
    "e4m3": Kind(64, "f32", np.dtype(np.uint8)),
    "s8": Kind(64, "s32", np.dtype(np.int8)),
}


def decoded(bits: np.ndarray, kind: str) -> np.ndarray:
    """Numbers of an array of KINDS[kind].bits: int64 of s8, float32 of all others."""
    if kind == "s8":
        return bits.astype(np.int64)
    if kind == "f16":
        return bits.astype(np.float32)
    if kind == "bf16":
        return (bits.astype(np.int32) << 16).view(np.float32)
    # 1 sign, 4 exponent (bias 7), 3 mantissa bits; all ones are NaN, exponent 0 is subnormal.
    exponent, mantissa = (bits >> 3 & 15).astype(np.int32), (bits & 7).astype(np.float32)
    normal = np.ldexp(1 + mantissa / 8, exponent - 7)
    number = np.where(exponent == 0, np.ldexp(mantissa / 8, -6), normal)
    number = np.where(bits & 0x7F == 0x7F, np.nan, number)
    return np.where(bits >> 7, -number, number).astype(np.float32)


def unpacked(words: np.ndarray, kind: str) -> np.ndarray:
    """b32 registers -> numbers [..., 2 or 4], low bits first."""
    bits = np.ascontiguousarray(words.astype(np.int64).astype(np.uint32))
    return decoded(bits.view(KINDS[kind].bits).reshape(*bits.shape, -1), kind)


def expand(compressed: np.ndarray, words: np.ndarray, selector: int) -> np.ndarray:
    """Dense [..., 16, columns] of a compressed half as wide and its metadata words [..., 32 lanes].

    32 columns (16-bit types): two lanes of a quad, picked by the selector, hold both rows g and
    g + 8. 64 columns (8-bit types): all four lanes, each one row and one half of the columns.
    """
    groups_per_row = compressed.shape[-1] // 2
    dense = np.zeros((*compressed.shape[:-1], 4 * groups_per_row), compressed.dtype)
    rows, groups = np.meshgrid(np.arange(16), np.arange(groups_per_row), indexing="ij")
    if groups_per_row == 8:
        lanes = 4 * (rows % 8) + 2 * selector + groups // 4
        shifts = 16 * (rows // 8) + 4 * (groups % 4)
    else:
        if selector:
            raise Fault(f"the selector of an 8-bit type must be 0, got {selector}")
        lanes = 4 * (rows % 8) + rows // 8 + 2 * (groups // 8)
        shifts = 4 * (groups % 8)
    nibbles = words.astype(np.int64)[..., lanes] >> shifts & 15
    first, second = nibbles & 3, nibbles >> 2
    if (first >= second).any():
        raise Fault("ordered metadata must be ascending")
    for position, half in ((first, 0), (second, 1)):
        columns = (4 * np.arange(groups_per_row) + position).reshape(*dense.shape[:-1], -1)
        np.put_along_axis(dense, columns, compressed[..., half::2], -1)
    return dense


def added(c: np.ndarray, product: np.ndarray, kind: str) -> np.ndarray:
    """c + product in the type of the sums; Fault where int32 overflows."""
    if kind != "s8":
        return c + product.astype(np.float32)
    total = c.astype(np.int64) + product
    if total.size and (total.max() >= 2**31 or total.min() < -(2**31)):
        raise Fault("an int32 sum of products overflows")
    return total.astype(np.int32)


def mma_sp(kind, a, b, c, words, selector):
    """m16n8k32 or m16n8k64: lists of 4 registers [..., 32 lanes] -> list of 4 results."""
    a = [unpacked(r, kind) for r in a]
    b = [unpacked(r, kind) for r in b]
    lead, columns, per = a[0].shape[:-2], KINDS[kind].columns, KINDS[kind].per
    compressed = np.zeros((*lead, 16, columns // 2), a[0].dtype)
    right = np.zeros((*lead, columns, 8), a[0].dtype)
    for r in range(4):
        for h in range(per):
            column = per * T + h + 4 * per * (r // 2)
            compressed[..., G + 8 * (r % 2), column] = a[r][..., h]
            right[..., per * T + h + 4 * per * r, G] = b[r][..., h]
    product = expand(compressed, words, selector) @ right
    return [added(c[r], product[..., G + 8 * (r // 2), 2 * T + r % 2], kind) for r in range(4)]


def matrix(block, descriptor: int, rows: int, kind: str) -> np.ndarray:
    """float32 [rows, rest of the 128-byte row] behind a K-major 128-byte-swizzled descriptor."""
    if descriptor >> 62 != 1 or descriptor >> 32 & 0x3FFF != 64:
        raise Fault(f"descriptor {descriptor:#x} is not K-major with a 128-byte swizzle")
    address = ((descriptor & 0x3FFF) << 4) - SMEM_BASE
    row, byte = np.arange(rows)[:, None], np.arange(0, 128 - address % 128, 2)[None, :]
    place = address + row // 8 * 1024 + row % 8 * 128 + byte
    place = place ^ (place >> 7 & 7) << 4
    words = block.arena.read(place // 2, block).astype(np.int16)
    return decoded(words.view(KINDS[kind].bits), kind)


def wgmma_sp(block, kind, n, acc, a, b, words, selector):
    """m64n{n}k32 or k64 on registers [128 threads]: acc list of n/2, descriptors, metadata."""
    columns = KINDS[kind].columns
    left = matrix(block, a, 64, kind)[:, : columns // 2].reshape(4, 16, columns // 2)
    right = matrix(block, b, n, kind)[:, :columns]
    dense = expand(left, words.reshape(4, 32), selector)
    rows, tokens = accumulator_map(n)
    product = (dense.reshape(64, columns) @ right.T)[rows, tokens]
    return [added(acc[r], product[:, r], kind) for r in range(n // 2)]


def accumulator_map(n: int) -> tuple[np.ndarray, np.ndarray]:
    """(row, column) of register r of thread i in an m64n{n} accumulator: two [128, n/2] arrays."""
    thread, r = np.arange(128)[:, None], np.arange(n // 2)[None, :]
    rows = 16 * (thread // 32) + thread % 32 // 4 + 8 * (r // 2 % 2)
    return rows, 8 * (r // 4) + 2 * (thread % 4) + r % 2


MMA = re.compile(
    r"mma\.sp::ordered_metadata\.sync\.aligned\.m16n8k(\d+)\.row\.col\.(\w+)\.(\w+)\.\3\.\2 "
    r"\{(.*?)\}, \{(.*?)\}, \{(.*?)\}, \{(.*?)\}, (\$\d+), (?:0x)?([01])"
)
WGMMA = re.compile(
    r"wgmma\.mma_async\.sp\.sync\.aligned\.m64n(\d+)k(\d+)\.(\w+)\.(\w+)\.\4 "
    r"\{(.*?)\}, (\w+), (\w+), (\$\d+), ([01]), (1[\d, ]*)$"
)
# What follows the selector: keep D; signs of A and B (floats); both K-major (16-bit types).
WGMMA_TAIL = {"bf16": "1, 1, 1, 0, 0", "f16": "1, 1, 1, 0, 0", "e4m3": "1, 1, 1", "s8": "1"}


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
        return Tensor(np.stack(results, -1).reshape(shape).astype(dtype.storage), dtype)
    out = np.empty(shape, dtype.storage)
    out[accumulator_map(shape[1])] = np.stack(results, -1)
    return Tensor(out, dtype)


def check_kind(kind: str, columns: str, sums: str) -> None:
    """Raise Fault unless the instruction exists."""
    if kind not in KINDS or (KINDS[kind].columns, KINDS[kind].sums) != (int(columns), sums):
        raise Fault(f"no instruction k{columns} of {kind} with {sums} sums")


def step(block, bare: str, statement: str, registers: dict[str, Any]) -> None:
    """One PTX statement; `registers` holds operands and named registers."""

    def listed(group):
        return [registers[name.strip()] for name in group.split(",")]

    if match := MMA.match(statement):
        columns, sums, kind, d, a, b, c, e, selector = match.groups()
        check_kind(kind, columns, sums)
        results = mma_sp(kind, listed(a), listed(b), listed(c), registers[e], int(selector))
        registers.update(zip((name.strip() for name in d.split(",")), results, strict=True))
    elif match := WGMMA.match(statement):
        n, columns, sums, kind, d, a, b, e, selector, tail = match.groups()
        check_kind(kind, columns, sums)
        if tail != WGMMA_TAIL[kind]:
            raise Fault(f"wgmma.sp on {kind} must end in {WGMMA_TAIL[kind]}, got {tail}")
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
