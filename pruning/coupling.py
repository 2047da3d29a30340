"""Coupling: which channels of a model can only be dropped together.

The model is traced with torch.export (pruning.trace). Every channel of every weight axis gets an
id; ids flow through the graph with the activations. Where two tensors are added their ids are
united, where they are concatenated the ids stand side by side, where an image is flattened each id
is repeated. What is left at the end: one unit per set of united ids, and all axes that carry it.

    conv 64 ──┬── conv 64 ── add ── flatten ── linear       ids of both convolutions are united,
              └───────────────┘                              the linear layer has each of them 49x

An operation without a rule, a layer norm over channels, an ignored layer or the model's output pin
the ids that reach them: these channels stay, and the reason is kept. Nothing is guessed.

torch-pruning's DependencyGraph answers the same question from the autograd graph, and finds the
same groups for chains, residual adds, concatenation, depthwise convolutions, squeeze and
excitation, flattening and MLPs (tests/pruning/test_torch_pruning.py). It is not used, because
parameters without a gradient are not in its graph, and an operation that it does not know counts
as element-wise. Where the two differ:

    grouped convolution   here channel j of each group goes with channel j of the others
    attention             here heads go whole, a pair of key and value with all its queries;
                          there the caller passes the number of heads
    layer norm            here its channels stay; there they go, and its moments change
    cumsum over channels  here they stay and the operation is named; there they go one by one
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ids = NDArray[np.int64]
Rule = Callable[["Tracer", Any], Any]
FIXED = -1  # the id of an element that no weight made


@dataclass(frozen=True)
class Tracked:
    """Ids of an activation: ids.shape[i] is the size of dimension dims[i]; others carry none."""

    dims: tuple[int, ...]
    ids: Ids


@dataclass
class Use:
    """How a layer's weight is used: its parameter's name and the ids along its channel axes."""

    weight: str
    inputs: Ids  # [in channels] of the activation, all groups of a convolution
    depthwise: bool


class Sets:
    """Union-find over ids, with the reason of every set that must stay."""

    def __init__(self) -> None:
        self._parent: list[int] = []
        self._reason: dict[int, str] = {}

    def fresh(self, n: int) -> Ids:
        """n new ids, each alone."""
        start = len(self._parent)
        self._parent.extend(range(start, start + n))
        return np.arange(start, start + n, dtype=np.int64)

    def root(self, i: int) -> int:
        """The set of an id."""
        while self._parent[i] != i:
            self._parent[i] = i = self._parent[self._parent[i]]
        return i

    def roots(self, ids: Ids) -> Ids:
        """The sets of ids; FIXED stays FIXED."""
        found = {int(i): self.root(int(i)) if i != FIXED else FIXED for i in np.unique(ids)}
        if not found:
            return ids
        keys = np.fromiter(found, np.int64)
        values = np.fromiter(found.values(), np.int64)
        return values[np.searchsorted(keys, ids)]

    def unite(self, a: Ids, b: Ids) -> None:
        """Unite pairwise after broadcasting; an id that meets FIXED is pinned."""
        pairs = np.unique(np.stack([x.ravel() for x in np.broadcast_arrays(a, b)]), axis=1)
        for x, y in pairs.T.tolist():
            if FIXED in (x, y):
                self.pin([max(x, y)], "it meets a tensor of fixed size")
                continue
            x, y = self.root(x), self.root(y)
            if x != y:
                low, high = min(x, y), max(x, y)
                self._parent[high] = low
                if high in self._reason:
                    self._reason.setdefault(low, self._reason.pop(high))

    def pin(self, ids: Iterable[int] | Ids, reason: str) -> None:
        """These channels stay; the first reason is kept."""
        for i in np.unique(np.asarray(ids, dtype=np.int64)).tolist():
            if i != FIXED:
                self._reason.setdefault(self.root(i), reason)

    def reason(self, i: int) -> str | None:
        """Why the set of an id must stay, or None."""
        return self._reason.get(self.root(i))


@dataclass
class Coupling:
    """Ids of every parameter axis of a model after tracing.

    Args:
        sets: which ids belong together and which stay.
        axes: (name of a parameter or buffer, axis) -> ids along it.
        uses: each use of a Linear or convolution weight, in order of execution.
        norms: ids -> name of the batch normalisation's scale that they pass, in order.
        rows: ids [rows, size]; in an order of channels, each stays in its row (an attention head).
        outputs: (place among the model's output tensors, dimension) -> ids along it.
    """

    sets: Sets = field(default_factory=Sets)
    axes: dict[tuple[str, int], Ids] = field(default_factory=dict)
    uses: list[Use] = field(default_factory=list)
    norms: list[tuple[Ids, str]] = field(default_factory=list)
    rows: list[Ids] = field(default_factory=list)
    outputs: dict[tuple[int, int], Ids] = field(default_factory=dict)


def without(coupling: Coupling, kept: Mapping[tuple[str, int], Tensor]) -> Coupling:
    """The coupling of the model after a cut, without tracing it again.

    Args:
        kept: (name of a parameter or buffer, axis) -> int64 positions that stay.
    """
    sets = coupling.sets
    gone: set[int] = set()
    for key, stays in kept.items():
        roots = sets.roots(coupling.axes[key])
        gone |= {*roots.tolist()} - {*roots[stays.cpu().numpy()].tolist()}
    lost = sorted(gone)

    def left(ids: Ids) -> Ids:
        return ids[~np.isin(sets.roots(ids), lost)]

    return Coupling(
        sets,
        {key: left(ids) for key, ids in coupling.axes.items()},
        [replace(use, inputs=left(use.inputs)) for use in coupling.uses],
        [(left(ids), name) for ids, name in coupling.norms],
    )


class Tracer:
    """Walks an exported graph; `rules` go before those of pruning.flow for what a node does."""

    def __init__(self, pinned: Callable[[str], str | None], rules: Mapping[str, Rule]) -> None:
        self.found = Coupling()
        self.sets = self.found.sets
        self.names: dict[str, str] = {}
        self.values: dict[Any, Any] = {}
        self.left_out: list[tuple[Ids, Ids, str]] = []
        self.rules = rules
        self._pinned = pinned

    def parameter(self, node: Any) -> str | None:
        """Dotted name of the parameter or buffer that a graph node is, or None."""
        return self.names.get(getattr(node, "name", ""))

    def axis(self, node: Any, axis: int) -> Ids:
        """Ids along one axis of a parameter; made when first asked for."""
        name = self.names[node.name]
        if (name, axis) not in self.found.axes:
            ids = self.sets.fresh(node.meta["val"].shape[axis])
            reason = self._pinned(name)
            if reason is not None:
                self.sets.pin(ids, reason)
            self.found.axes[name, axis] = ids
        return self.found.axes[name, axis]

    def value(self, node: Any) -> Any:
        """What is known of an argument: Tracked, a list of them, or None."""
        if not isinstance(node, torch.fx.Node):
            return None
        if self.parameter(node) is not None:
            if node.meta["val"].ndim == 1:
                return Tracked((0,), self.axis(node, 0))
            self.pin_parameter(node, f"it is used by {self.parameter(node)}")
            return None
        return self.values.get(node)

    def pin_parameter(self, node: Any, reason: str) -> None:
        """All axes of a parameter stay."""
        for axis in range(node.meta["val"].ndim):
            self.sets.pin(self.axis(node, axis), reason)

    def pin(self, value: Any, reason: str) -> None:
        """All ids of a value stay."""
        if isinstance(value, Tracked):
            self.sets.pin(value.ids, reason)
        elif isinstance(value, (list, tuple)):
            for item in value:
                self.pin(item, reason)

    def finish(self) -> None:
        """Pin channels that an operation left out (a slice), so that positions keep their meaning.

        At the end, because what is united with a channel that is left goes with it: half of a
        head, sliced for a rotary embedding, is not left out.
        """
        for before, after, reason in self.left_out:
            self.sets.pin(np.setdiff1d(self.sets.roots(before), self.sets.roots(after)), reason)

    def full(self, node: Any) -> Tensor:
        """int64 of the activation's whole shape: the id of each element."""
        shape = tuple(node.meta["val"].shape)
        value = self.value(node)
        if not isinstance(value, Tracked):
            return torch.full((1,) * len(shape), FIXED).expand(shape)
        spread = [size if dim in value.dims else 1 for dim, size in enumerate(shape)]
        order = np.argsort(value.dims)
        ids = torch.from_numpy(value.ids.transpose(order).copy())
        return ids.reshape(spread).expand(shape).contiguous()

    def compress(self, full: Tensor) -> Tracked | None:
        """Only the dimensions along which ids vary; a lone id is pinned."""
        dims = []
        for dim in range(full.ndim):
            first = full.narrow(dim, 0, 1)
            if bool((full == first).all()):
                full = first
            else:
                dims.append(dim)
        ids = full.reshape([full.shape[dim] for dim in dims]).numpy()
        if not dims:
            self.sets.pin(ids.reshape(-1), "it is the only channel")
            return None
        return Tracked(tuple(dims), ids)


def place(node: Any) -> str:
    """The operation and the line of user code that called it."""
    lines = [
        line.strip()
        for line in (node.meta.get("stack_trace") or "").splitlines()
        if line.strip().startswith("File ")
    ]
    name = getattr(node.target, "__name__", str(node.target))
    return f"{name} ({lines[-1].removeprefix('File ')})" if lines else name
