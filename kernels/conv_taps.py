"""Which taps of a convolution's kernel an output pixel reads, forward and backward.

Row p of an output reads, at tap t, row (p * MUL + ADD + t * TAP) / DIV of its source, where the
division is whole:

    forward   MUL = stride  ADD = -padding  TAP = dilation   DIV = 1
    dX        MUL = 1       ADD = padding   TAP = -dilation  DIV = stride

Output rows with the same p mod DIV, a class, are reached by the same taps, PERIOD apart: row i of a
class reads row i * MUL + base + j * STEP at its j-th tap, and no tap is walked to be masked away.
Columns follow the same rule.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl


def period_and_inverse(stride: int, dilation: int) -> tuple[int, int]:
    """Taps that reach one pixel lie `period` apart; `inverse` solves for the first of them."""
    divisor = math.gcd(stride, dilation)
    period = stride // divisor
    return period, pow(dilation // divisor, -1, period)


def tap_constants(
    stride: tuple[int, int], corner: tuple[int, int], dilation: tuple[int, int], forward: bool
) -> dict[str, int]:
    """MUL, ADD, TAP, DIV, PERIOD, INVERSE and STEP of both axes, as a kernel's constants.

    Args:
        corner: padding above and to the left.
    """
    constants: dict[str, int] = {}
    for axis, s, p, d in zip("HW", stride, corner, dilation, strict=True):
        if forward:
            names = {"MUL": s, "ADD": -p, "TAP": d, "DIV": 1, "PERIOD": 1, "INVERSE": 0, "STEP": d}
        else:
            period, inverse = period_and_inverse(s, d)
            names = {"MUL": 1, "ADD": p, "TAP": -d, "DIV": s, "PERIOD": period, "INVERSE": inverse}
            names["STEP"] = -d * period // s
        constants |= {f"{name}_{axis}": value for name, value in names.items()}
    return constants


def index_type(pixels: int, block: int) -> tl.dtype:
    """The integer that numbers `pixels` pixels in tiles of `block`."""
    return tl.int32 if pixels + block < 2**31 else tl.int64


@triton.jit
def pixel_of(offs, height, width):
    """(image int64, row, column) of pixels numbered row by row, image by image."""
    lines = offs // width
    row, column = lines % height, offs % width
    return (lines // height).to(tl.int64), row.to(tl.int32), column.to(tl.int32)


@triton.jit
def reaching_taps(offset, taps, stride, dilation, period, inverse):
    """(first, count) of the taps t, `period` apart, where stride divides offset - t * dilation."""
    divisor = stride // period  # the greatest common divisor of stride and dilation
    first = tl.where(offset % divisor == 0, offset // divisor * inverse % period, taps)
    return first, (taps - first + period - 1) // period


@triton.jit
def class_taps(
    pid_class, taps: tl.constexpr, ADD: tl.constexpr, TAP: tl.constexpr, DIV: tl.constexpr,
    PERIOD: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """(base, first, count) of a class of rows: the source row and the tap of its first tap."""
    if DIV == 1:
        base, first, count = ADD, 0, taps
    else:
        offset = pid_class + ADD
        first, count = reaching_taps(offset, taps, DIV, -TAP, PERIOD, INVERSE)
        base = (offset + first * TAP) // DIV  # exact where a tap reaches the class at all
    return base, first, count
