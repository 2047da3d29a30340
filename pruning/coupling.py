"""Coupling: which channels of a model can only be dropped together.

The model is traced with torch.export (pruning.trace). Every channel of every weight axis gets an
id; ids flow through the graph with the activations. Where two tensors are added their ids are
united, where they are concatenated the ids stand side by side, where an image is flattened each id
is repeated. What is left at the end: one unit per set of united ids, and all axes that carry it.

    conv 64 ──┬── conv 64 ── add ── flatten ── linear       ids of both convolutions are united,
              └───────────────┘                              the linear layer has each of them 49x

An operation without a rule, a softmax over channels, an ignored layer or the model's output pin the
ids that reach them: these channels stay, and the reason is kept. Nothing is guessed.

A normalisation over channels (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, a module that computes what
nn.RMSNorm does) lets channels go: **the norm of the smaller model takes its moments over the
channels that stay.** So the smaller model is the dense one with zeros only where the dense norms
take theirs over these channels too. pruning.proof proves it against that model; against the model
as it was its outputs change, and it wants fine-tuning. An ignored norm pins its channels, and so do
`F.layer_norm(x, (8,))`, whose width is a number in the code, and a mean over channels elsewhere.
A custom module counts as RMSNorm if its one parameter is `weight` [C] and its graph has the form
x * rsqrt(mean(x * x) + number); whatever else it does, its own operations say.

A parameter that is added, multiplied or concatenated (a position parameter [1, S, C], a class token
[1, 1, C], a layer scale [C]) makes channels as a layer does: along the dimension of the channels
that it meets; where it meets none, along its only long axis, else its last.

torch-pruning's DependencyGraph answers the same question from the autograd graph, and finds the
same groups for chains, residual adds, concatenation, depthwise convolutions, squeeze and
excitation, flattening and MLPs under a layer norm (tests/pruning/test_torch_pruning.py). It is not
used, because parameters without a gradient are not in its graph, and an operation that it does not
know counts as element-wise. Where the two differ:

    grouped convolution   here channel j of each group goes with channel j of the others
    attention             here heads go whole, a pair of key and value with all its queries;
                          there the caller passes the number of heads
    group norm            here channel j of each group goes with channel j of the others
    cumsum over channels  here they stay and the operation is named; there they go one by one
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Ids = NDArray[np.int64]
Rule = Callable[["Tracer", Any], Any]
# (name of a parameter, it is used as an activation) -> why its channels must stay, or None
Pinned = Callable[[str, bool], str | None]
FIXED = -1  # the id of an element that no weight made
OUTPUT = "it reaches the model's output"


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


@dataclass
class Norm:
    """A normalisation module and the ids [channels] of what it normalises.

    Args:
        mixes: its moments go over several channels; else only its width has to be rewritten.
    """

    module: str
    inputs: Ids
    mixes: bool


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
        scales: ids -> name of the batch normalisation's scale that they pass, in order.
        norms: modules that normalise; batch normalisations are in `axes` alone.
        rows: ids [rows, size]; in an order of channels, each stays in its row (an attention head).
        outputs: (place among the model's output tensors, dimension) -> ids along it.
    """

    sets: Sets = field(default_factory=Sets)
    axes: dict[tuple[str, int], Ids] = field(default_factory=dict)
    uses: list[Use] = field(default_factory=list)
    scales: list[tuple[Ids, str]] = field(default_factory=list)
    norms: list[Norm] = field(default_factory=list)
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
        [(left(ids), name) for ids, name in coupling.scales],
        [replace(norm, inputs=left(norm.inputs)) for norm in coupling.norms],
    )


class Tracer:
    """Walks an exported graph; `rules` go before those of pruning.flow for what a node does."""

    def __init__(self, model: nn.Module, pinned: Pinned, rules: Mapping[str, Rule]) -> None:
        self.found = Coupling()
        self.sets = self.found.sets
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.names: dict[str, str] = {}
        self.values: dict[Any, Any] = {}
        self.left_out: list[tuple[Ids, Ids, str]] = []
        self.rules = rules
        self._pinned = pinned
        self._weights: set[str] = set()  # parameters that a layer reads as its weight
        self._tables: set[str] = set()  # parameters whose rows are looked up
        self._alone: dict[str, int] = {}  # parameters used as an activation -> their axis
        self._fixed: dict[str, str] = {}  # those of them that have to stay -> why

    def parameter(self, node: Any) -> str | None:
        """Dotted name of the parameter or buffer that a graph node is, or None."""
        return self.names.get(getattr(node, "name", ""))

    def _ids(self, node: Any, axis: int) -> Ids:
        name = self.names[node.name]
        if (name, axis) not in self.found.axes:
            self.found.axes[name, axis] = self.sets.fresh(node.meta["val"].shape[axis])
        return self.found.axes[name, axis]

    def axis(self, node: Any, axis: int) -> Ids:
        """Ids along one axis of a layer's parameter; made when first asked for."""
        name = self.names[node.name]
        ids, reason = self._ids(node, axis), self._pinned(name, False)
        if reason is not None:
            self.sets.pin(ids, reason)
        if axis == 0 and name in self._tables:
            self.sets.pin(ids, "its rows are looked up")
        self._weights.add(name)
        if name in self._alone and node.meta["val"].ndim > 1:
            self.pin_parameter(node, f"{name} is used as a weight and as an activation")
        return ids

    def table(self, node: Any) -> Ids:
        """Ids of the channels of a table [rows, channels]; the rows themselves stay."""
        self._tables.add(self.names[node.name])
        if (self.names[node.name], 0) in self.found.axes:
            self.axis(node, 0)
        return self.axis(node, 1)

    def alone(self, node: Any, axis: int) -> Tracked | None:
        """A parameter as an activation with channels along one axis; None if it has to stay."""
        name = self.names[node.name]
        reason = self._pinned(name, True)
        several = name in self._weights or self._alone.setdefault(name, axis) != axis
        if several and node.meta["val"].ndim > 1:
            reason = f"{name} is used in several ways"
        if reason is not None:
            self.fix(node, reason)
            return None
        return Tracked((axis,), self._ids(node, axis))

    def fix(self, node: Any, reason: str) -> None:
        """A parameter used as an activation has to stay, and what it meets."""
        self._fixed.setdefault(self.names[node.name], reason)
        self.pin_parameter(node, reason)

    def pin_meeting(self, node: Any, source: Any, ids: Ids) -> None:
        """These ids stay: along their dimensions they meet a source that has none."""
        known = self._fixed.get(self.parameter(source) or "")
        why = f" ({known})" if known else ""
        self.sets.pin(ids, f"{place(node)} meets a tensor of fixed size{why}")

    def value(self, node: Any) -> Any:
        """What is known of an argument: Tracked, a list of them, or None."""
        if not isinstance(node, torch.fx.Node):
            return None
        if self.parameter(node) is None:
            return self.values.get(node)
        long = [axis for axis, size in enumerate(node.meta["val"].shape) if size > 1]
        return self.alone(node, long[-1]) if long else None

    def module(self, node: Any) -> tuple[str, nn.Module] | None:
        """The innermost module whose forward made a node, and one name of it."""
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        found = self.modules.get(stack[-1][0]) if stack else None
        if found is None:
            return None
        return next((name, m) for name, m in self.modules.items() if m is found)

    def norm(self, node: Any, ids: Ids, mixes: bool = True) -> None:
        """A normalisation module meets these ids; all its calls see the same channels."""
        found = self.module(node)
        assert found is not None
        reason = self._pinned(f"{found[0]}.weight", True)
        if reason is not None:
            self.sets.pin(ids, reason)
        for norm in self.found.norms:
            if norm.module == found[0]:
                self.sets.unite(norm.inputs, ids)
                return
        self.found.norms.append(Norm(found[0], ids, mixes))

    def pin_parameter(self, node: Any, reason: str) -> None:
        """All axes of a parameter stay."""
        for axis in range(node.meta["val"].ndim):
            self.sets.pin(self._ids(node, axis), reason)

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
        if not full.numel():
            return None
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
