"""What a table may choose for spmm_24; every implementation reads the weight as it is stored.

Nothing is kept beside the weight, so nothing goes stale. The Gluon ones are imported at their first
use. `takes` may look at dtype, pattern, device, (N, K) and the layout of its operands, at nothing
else: dispatch.py asks once for all calls that agree in these.
"""

from __future__ import annotations

import functools
import importlib
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from slimgemm.kernels.formats import Packed24

# (x, packed weight, bias, scale, act) -> y
Run = Callable[..., Tensor]
# Fields of a tile, in the order of its class.
Fields = tuple[tuple[str, int], ...]


class Candidate(Protocol):
    """An implementation as dispatch and tuning see it."""

    def takes(self, x: Tensor, w: Packed24) -> bool:
        """True if it can run these operands."""

    def bind(self, tile: Fields | None, splits: int | None) -> Run:
        """Its function with this tile and number of parts of K; its own choice where None."""


@dataclass(frozen=True)
class Implementation:
    """A launcher in kernels/.

    Args:
        file, function: where it is.
        tile: "file.class" of its tiles, "" if it has none.
        splits: its keyword for the number of parts of K, "" if it has none.
        picky: its file has `takes(x, packed)`; else it takes what spmm_24 takes.
    """

    file: str
    function: str
    tile: str = ""
    splits: str = ""
    picky: bool = False

    def _module(self) -> types.ModuleType:
        return importlib.import_module(f"slimgemm.kernels.{self.file}")

    def takes(self, x: Tensor, w: Packed24) -> bool:
        return not self.picky or self._module().takes(x, w)

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
