"""What a table may choose for spmm_24 and conv2d_24; each reads the weight as it is stored.

Nothing is kept beside the weight, so nothing goes stale. The Gluon ones are imported at their first
use. `takes` may look at dtype, pattern, device, shapes and the layout of its operands, at nothing
else: dispatch.py asks once for all calls that agree in these. To add an implementation is one row
here, and what is tried of it in tune_tiles.py or tune_conv.py.
"""

from __future__ import annotations

import functools
import importlib
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from slimgemm.kernels import conv_24_linear
from slimgemm.kernels.conv_layout import Convolution
from slimgemm.kernels.formats import Packed24

# The arguments of the op -> y
Run = Callable[..., Tensor]
# Fields of a tile, in the order of its class.
Fields = tuple[tuple[str, int], ...]


class Candidate(Protocol):
    """An implementation as dispatch and tuning see it."""

    def takes(self, x: Tensor, w: Packed24, *conv: Convolution) -> bool:
        """True if it can run these operands; `conv` is one of a convolution, else none."""

    def bind(self, tile: Fields | None, splits: int | None) -> Run:
        """Its function with this tile and number of parts of K; its own choice where None."""


@dataclass(frozen=True)
class Implementation:
    """A launcher in kernels/.

    Args:
        file, function: where it is.
        tile: "file.class" of its tiles, "" if it has none.
        splits: its keyword for the number of parts of K, "" if it has none.
        picky: its file has `takes(x, packed, *conv)`; else it takes what the op takes.
    """

    file: str
    function: str
    tile: str = ""
    splits: str = ""
    picky: bool = False

    def _module(self) -> types.ModuleType:
        return importlib.import_module(f"slimgemm.kernels.{self.file}")

    def takes(self, x: Tensor, w: Packed24, *conv: Convolution) -> bool:
        return not self.picky or self._module().takes(x, w, *conv)

    def bind(self, tile: Fields | None, splits: int | None) -> Run:
        """Its function; ValueError for a tile or splits that it has no word for."""
        run, options = getattr(self._module(), self.function), dict[str, Any]()
        if tile is not None:
            options["tile"] = self._tile(tile)
        if splits is not None:
            if not self.splits:
                raise ValueError(f"{self.function} has no splits, got {splits}")
            options[self.splits] = splits
        return functools.partial(run, **options) if options else run

    def _tile(self, fields: Fields) -> Any:
        file, _, name = self.tile.rpartition(".")
        if not name:
            raise ValueError(f"{self.function} has no tiles, got {dict(fields)}")
        try:
            return getattr(importlib.import_module(f"slimgemm.kernels.{file}"), name)(
                **dict(fields)
            )
        except TypeError as error:
            raise ValueError(f"{dict(fields)} is no {name}: {error}") from None


IMPLEMENTATIONS: Mapping[str, Implementation] = types.MappingProxyType(
    {
        "portable": Implementation("spmm_24", "spmm_24", "configs.Tile", "split"),
        "mma_sp": Implementation(
            "gluon.mma_packed", "spmm_24_mma_packed", "gluon.mma_packed.PackedTile", "splits", True
        ),
        "wgmma_sp": Implementation(
            "gluon.wgmma_packed", "spmm_24_wgmma_packed", "gluon.wgmma_tiles.WgmmaTile", "", True
        ),
        "dense": Implementation("spmm_24_dense", "spmm_24_dense"),
    }
)

CONVOLUTIONS: Mapping[str, Implementation] = types.MappingProxyType(
    {
        "portable": Implementation("conv_24", "conv2d_24", "configs.Tile", "split"),
        "mma_sp": Implementation(
            "gluon.mma_conv", "conv2d_24_mma", "gluon.mma_packed_tiles.PackedTile", "splits", True
        ),
        "wgmma_sp": Implementation("gluon.wgmma_conv", "conv2d_24_wgmma", "", "", True),
        "dense": Implementation("conv_24_dense", "conv2d_24_dense"),
    }
)


@dataclass(frozen=True)
class Linear:
    """conv2d_24 of one tap as a linear layer.

    Args:
        spmm_24: what runs the linear layer.
    """

    spmm_24: Run

    def takes(self, x: Tensor, w: Packed24, *conv: Convolution) -> bool:
        return conv_24_linear.takes(x, *conv)

    def bind(self, tile: Fields | None, splits: int | None) -> Run:
        """conv2d_24 by spmm_24, whose own rows have its tile; ValueError for a tile or splits."""
        if tile is not None or splits is not None:
            raise ValueError(f"linear has no tiles and splits, got {tile} and {splits}")
        return functools.partial(conv_24_linear.conv2d_24_linear, self.spmm_24)


# op -> names that its rows may hold
BY_OP: Mapping[str, tuple[str, ...]] = types.MappingProxyType(
    {"spmm_24": (*IMPLEMENTATIONS,), "conv2d_24": (*CONVOLUTIONS, "linear")}
)
