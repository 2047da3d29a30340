"""geometry: what a model would cost after a choice of channels and patterns, without cutting it.

Conventions. MACs: convolutions and linear layers, one forward of the example inputs; a 2:4 layer
counts the products that it keeps. Parameters: kept ones. Bytes: parameters and buffers as stored,
2:4 packed. Moved bytes: weights once, layer inputs and outputs once. Energy: see pruning.energy.
Latency: layers measured alone, and how whole models relate to them (see ModelLatency).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from torch import nn

from slimgemm.kernels.timing import Times
from slimgemm.pruning.cost import count_macs
from slimgemm.pruning.coupling import FIXED, Coupling, Ids
from slimgemm.pruning.energy import HOROWITZ45, EnergyTable
from slimgemm.pruning.inputs import Inputs
from slimgemm.pruning.latency import DENSE, LatencyTable
from slimgemm.pruning.patterns import NofM
from slimgemm.pruning.sites import Site, find_sites
from slimgemm.pruning.trace import first_names

UNITS = {
    "macs": "MACs",
    "params": "parameters",
    "bytes": "bytes",
    "moved_bytes": "bytes moved",
    "energy_mj": "mJ",
    "latency_ms": "ms",
}

PRIOR = 1e-3  # weight of factor = 1 against a whole model's relative error


@dataclass(frozen=True)
class Costs:
    """Costs of one forward; `latency_ms` is None where nothing was measured."""

    macs: float
    params: float
    bytes: float
    moved_bytes: float
    energy_mj: float
    latency_ms: float | None = None

    def get(self, name: str) -> float:
        """A cost by name.

        Raises:
            ValueError: it is a latency and there is no latency table.
        """
        value = getattr(self, name)
        if value is None:
            raise ValueError(
                "there is no latency without a table; pass latency=LatencyTable(device)"
            )
        return float(value)

    def as_dict(self) -> dict[str, float]:
        """The costs that are known, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class LayerCosts:
    """Costs of one layer at the widths chosen; `us` is NaN without a latency table."""

    shape: tuple[int, ...]
    pattern: str
    macs: float
    weight_bytes: float
    moved_bytes: float
    energy_mj: float
    us: float


@dataclass
class ModelLatency:
    """Microseconds of a forward: us + per_byte * activation bytes + factor * layers alone.

    Normalisations, activations and sums are not in the table, and a layer in a model does not meet
    the caches that it meets alone; the three numbers are fitted to measured whole models.

    Args:
        table: of the layers.
        us: microseconds of every forward, whatever its widths.
        per_byte: microseconds per byte that layers read and write.
        factor: time of layers inside a model over their time alone.
        dense_us: microseconds of the dense model, measured along with the layers; NaN if not.
        others: times of other calls that were measured along with them.
    """

    table: LatencyTable
    us: float = 0.0
    per_byte: float = 0.0
    factor: float = 1.0
    dense_us: float = math.nan
    others: dict[str, Times] = field(default_factory=dict)

    def pace(self, dense_us: float) -> float:
        """Microseconds now over those when the table was measured, by the dense model's time now.

        Clocks and neighbours change; times that are divided by it are as of the table.
        """
        return dense_us / self.dense_us if self.dense_us > 0 else 1.0

    def whole_us(self, layers_us: float, activation_bytes: float) -> float:
        """Microseconds of a model whose layers take this long alone."""
        return self.us + self.per_byte * activation_bytes + self.factor * layers_us

    def fit(self, layers_us: Sequence[float], bytes_: Sequence[float], us: Sequence[float]) -> None:
        """Set the three numbers, none below zero: least squares of relative errors of whole models.

        Few models leave them open; then the factor stays near 1, and the rest is shared evenly.
        """
        whole = np.asarray(us, dtype=np.float64)
        columns = [np.ones_like(whole), np.asarray(bytes_, float), np.asarray(layers_us, float)]
        sizes = np.array([max(float(np.mean(c)), 1e-30) for c in columns])
        rows = np.stack(columns, 1) / sizes / whole[:, None]
        # The last row holds factor = 1, so lightly that a few models outweigh it.
        rows = np.vstack([rows, [0, 0, PRIOR / sizes[2]]])
        target = np.append(np.ones_like(whole), PRIOR)
        best, least = np.zeros(3), float("inf")
        for used in ([0, 1, 2], [0, 2], [1, 2], [2], [0, 1], [0], [1]):
            found = np.zeros(3)
            found[used] = np.linalg.lstsq(rows[:, used], target, rcond=None)[0]
            error = float(np.square(rows @ found - target).sum())
            if (found >= 0).all() and error < least:
                best, least = found, error
        self.us, self.per_byte, self.factor = (float(x) for x in best / sizes)


class Geometry:
    """Shapes and costs of a model at any choice of dropped units and patterns.

    Args:
        model, example_inputs: as for `plan`; one forward runs.
        coupling: from `trace`, or None where no channels are dropped.
        energy: table of the predicted energy.
        latency: of the predicted latency, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Inputs,
        coupling: Coupling | None = None,
        energy: EnergyTable = HOROWITZ45,
        latency: ModelLatency | None = None,
    ) -> None:
        self.sites = find_sites(model, example_inputs)
        # Of convolutions that cannot be pruned, as transposed ones.
        counted = sum(site.macs for site in self.sites.values())
        self._other_macs = count_macs(model, example_inputs).macs - counted
        self.energy, self.latency = energy, latency
        self.tensors: dict[str, tuple[tuple[int, ...], int, bool]] = {}
        for name, tensor in model.named_parameters():
            self.tensors[name] = (tuple(tensor.shape), tensor.element_size(), True)
        for name, buffer in model.named_buffers():
            self.tensors[name] = (tuple(buffer.shape), buffer.element_size(), False)
        self._first = first_names(model)  # a shared tensor has one entry in `tensors`
        self.roots: dict[tuple[str, int], Ids] = {}
        self.inputs: dict[str, Ids] = {}
        if coupling is not None:
            self.roots = {key: coupling.sets.roots(ids) for key, ids in coupling.axes.items()}
            for use in coupling.uses:
                self.inputs.setdefault(use.weight, coupling.sets.roots(use.inputs))
        self._ids = 1 + max((int(r.max()) for r in self.roots.values() if r.size), default=0)

    def _flags(self, gone: Iterable[int]) -> np.ndarray:
        """bool [ids + 1], True = kept; the last is FIXED."""
        flags = np.ones(self._ids + 1, dtype=bool)
        flags[list(gone)] = False
        assert FIXED == -1
        return flags

    def _shape(self, name: str, flags: np.ndarray) -> tuple[int, ...]:
        """Shape of a parameter or buffer afterwards."""
        name = self._first[name]
        shape = list(self.tensors[name][0])
        for axis in range(len(shape)):
            ids = self.roots.get((name, axis))
            if ids is not None:
                shape[axis] = int(flags[ids].sum())
        return tuple(shape)

    def shapes(self, gone: Iterable[int] = ()) -> dict[str, tuple[int, ...]]:
        """Layer name -> shape of its weight afterwards."""
        flags = self._flags(gone)
        return {name: self._shape(f"{name}.weight", flags) for name in self.sites}

    def _activations(
        self, site: Site, shape: tuple[int, ...], flags: np.ndarray
    ) -> tuple[float, float]:
        """(input bytes, output bytes) of a layer afterwards."""
        ids = self.inputs.get(self._first[f"{site.name}.weight"])
        read = 1.0 if ids is None or not ids.size else float(flags[ids].mean())
        return site.input_bytes * read, site.output_bytes * shape[0] / site.weight[0]

    def layers(
        self, gone: Iterable[int] = (), patterns: Mapping[str, NofM] | None = None
    ) -> dict[str, LayerCosts]:
        """Layer name -> its costs."""
        flags, patterns = self._flags(gone), patterns or {}
        found = {}
        for name, site in self.sites.items():
            shape, pattern = self._shape(f"{name}.weight", flags), patterns.get(name)
            kept = 1.0 if pattern is None else pattern.density(shape[0], shape[1])
            macs = site.macs * shape[0] / site.weight[0] * shape[1] / site.weight[1] * kept
            weight = _stored(shape, site.dtype, pattern)
            moved = weight + sum(self._activations(site, shape, flags))
            pj = self.energy.layer(macs, weight, moved - weight, site.dtype)
            us = float("nan")
            if self.latency is not None:
                word = DENSE if pattern is None else str(pattern)
                us = site.calls * self.latency.table.us(site, (shape[0], shape[1]), word)
            found[name] = LayerCosts(
                shape, DENSE if pattern is None else str(pattern), macs, weight, moved, pj / 1e9, us
            )
        return found

    def activation_bytes(self, gone: Iterable[int] = ()) -> float:
        """Bytes that layers read and write in one forward."""
        flags = self._flags(gone)
        return sum(
            sum(self._activations(site, self._shape(f"{name}.weight", flags), flags))
            for name, site in self.sites.items()
        )

    def costs(self, gone: Sequence[int] = (), patterns: Mapping[str, NofM] | None = None) -> Costs:
        """Costs of the whole model."""
        flags, patterns = self._flags(gone), patterns or {}
        layers = self.layers(gone, patterns)
        params = stored = 0.0
        for name, (_, itemsize, is_parameter) in self.tensors.items():
            shape = self._shape(name, flags)
            size = float(torch.Size(shape).numel())
            owner, _, leaf = name.rpartition(".")
            pattern = patterns.get(owner) if leaf == "weight" else None
            if is_parameter:
                params += size * (1 if pattern is None else pattern.density(shape[0], shape[1]))
            if pattern is None:
                stored += size * itemsize
            else:
                stored += _stored(shape, self.sites[owner].dtype, pattern)
        latency = None
        if self.latency is not None:
            us = sum(layer.us for layer in layers.values())
            latency = self.latency.whole_us(us, self.activation_bytes(gone)) / 1e3
        return Costs(
            macs=sum(layer.macs for layer in layers.values()) + self._other_macs,
            params=params,
            bytes=stored,
            moved_bytes=sum(layer.moved_bytes for layer in layers.values()),
            energy_mj=sum(layer.energy_mj for layer in layers.values()),
            latency_ms=latency,
        )


def _stored(shape: tuple[int, ...], dtype: torch.dtype, pattern: NofM | None) -> float:
    """Bytes of a weight of this shape."""
    mask = torch.empty(shape, dtype=torch.bool, device="meta")
    if pattern is None:
        return float(mask.numel() * dtype.itemsize)
    return float(pattern.stored_bytes(mask, dtype.itemsize))
