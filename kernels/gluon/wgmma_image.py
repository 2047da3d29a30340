"""Images as the X of wgmma_sp: boxes of 128 output pixels, fetched by TMA tap by tap.

A tile of 128 tokens is a box of images x rows x columns of the output. At one tap of a convolution
of stride 1, what it reads is a box of the input of the same form, somewhat shifted: one TMA copy of
64 channels. TMA writes zeros where that box leaves the image, which is the padding.
"""

from __future__ import annotations

import dataclasses
import itertools

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from slimgemm.kernels.conv_layout import Convolution
from slimgemm.kernels.gluon.compat import as_box, tma_load

BOX_PIXELS = 128


@dataclasses.dataclass(frozen=True)
class Boxes:
    """A convolution of stride 1 and how its output is cut into boxes; a constant of the build.

    Args:
        batch, channels, out_height, out_width: of the images; channels of the input.
        kernel_width, top, left, dilation_y, dilation_x: of the convolution.
        images, rows, columns: of a box; their product is 128.
    """

    batch: int
    channels: int
    out_height: int
    out_width: int
    kernel_width: int
    top: int
    left: int
    dilation_y: int
    dilation_x: int
    images: int
    rows: int
    columns: int

    @property
    def down(self) -> int:
        """Boxes along the height."""
        return -(-self.out_height // self.rows)

    @property
    def across(self) -> int:
        """Boxes along the width."""
        return -(-self.out_width // self.columns)

    @property
    def count(self) -> int:
        """Boxes in all."""
        return -(-self.batch // self.images) * self.down * self.across

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """What one TMA copy brings: images, rows, columns, channels."""
        return self.images, self.rows, self.columns, 64


def boxes_of(conv: Convolution, batch: int, height: int, width: int) -> Boxes:
    """The cut into the fewest boxes; of equals the widest, which reads the longest runs."""
    size = conv.output_size(height, width)
    sides = (1, 2, 4, 8, 16, 32, 64, 128)
    cuts = [
        Boxes(
            batch, conv.channels, *size, conv.kernel[1], *conv.corner, *conv.dilation,
            images, rows, BOX_PIXELS // (images * rows),
        )
        for images, rows in itertools.product(sides, sides)
        if images * rows <= BOX_PIXELS
    ]  # fmt: skip
    return min(cuts, key=lambda cut: (cut.count, -cut.columns, -cut.rows))


@gluon.jit
def load_pixels(desc, arena, unit, bar, tile, block, K, BOXES: gl.constexpr):
    """Start the two copies of X of one stage: 64 columns of K each, all of one tap."""
    image = tile // (BOXES.down * BOXES.across) * BOXES.images
    row = tile // BOXES.across % BOXES.down * BOXES.rows - BOXES.top
    pixel = tile % BOXES.across * BOXES.columns - BOXES.left
    for half in gl.static_range(2):
        column = block * 128 + half * 64
        tap = column // BOXES.channels
        # Past K an image that is not there: zeros, as X times the zeros of W may be NaN.
        at = [
            image + column // K * BOXES.batch,
            row + tap // BOXES.kernel_width * BOXES.dilation_y,
            pixel + tap % BOXES.kernel_width * BOXES.dilation_x,
            column % BOXES.channels,
        ]
        tma_load(desc, at, bar, as_box(arena.index(unit + half), desc))


@gluon.jit
def pixel_of(token, BOXES: gl.constexpr):
    """(line of Y, is there) of each token: its pixel's place in NHWC order."""
    tile = token // 128
    image = tile // (BOXES.down * BOXES.across) * BOXES.images
    image = image + token % 128 // (BOXES.rows * BOXES.columns)
    row = tile // BOXES.across % BOXES.down * BOXES.rows + token // BOXES.columns % BOXES.rows
    pixel = tile % BOXES.across * BOXES.columns + token % BOXES.columns
    on = (image < BOXES.batch) & (row < BOXES.out_height) & (pixel < BOXES.out_width)
    return (image * BOXES.out_height + row) * BOXES.out_width + pixel, on
