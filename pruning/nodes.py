"""nodes: what the rules of a trace read from a graph node, and what they share (pruning.flow)."""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

import numpy as np

from slimgemm.pruning.coupling import FIXED, Ids, Tracer, Tracked, place


def name(node: Any) -> str:
    """The operation, without namespace and the underscore of writing in place."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return str(getattr(node.target, "__name__", node.target))
    found = str(schema.name).rpartition("::")[2]
    return found if found.startswith("__") else (found.rstrip("_") or found)


def unknown(tracer: Tracer, node: Any) -> Any:
    """No rule: every channel that arrives stays."""
    for source in node.all_input_nodes:
        if tracer.parameter(source) is not None:
            tracer.pin_parameter(source, f"no rule for {place(node)}")
        else:
            tracer.pin(tracer.value(source), f"no rule for {place(node)}")
    return None


def shape(node: Any) -> tuple[int, ...]:
    """Of a node's result, the first of several."""
    value = node.meta["val"]
    return tuple((value[0] if isinstance(value, (list, tuple)) else value).shape)


def channels_of(tracer: Tracer, node: Any, dim: int) -> Ids:
    """Ids along one dimension of an activation; whatever else it tracks must stay."""
    size = shape(node)[dim]
    value = tracer.value(node)
    if not isinstance(value, Tracked):
        return np.full(size, FIXED, dtype=np.int64)
    if value.dims != (dim,):
        tracer.pin(value, "its channels lie along several dimensions here")
        return np.full(size, FIXED, dtype=np.int64)
    return value.ids


def argument(node: Any, place: int, name: str, default: Any) -> Any:
    if len(node.args) > place:
        return node.args[place]
    return node.kwargs.get(name, default)


def bias(tracer: Tracer, node: Any, out: Ids, slots: range | tuple[int, ...]) -> None:
    """Unite one-dimensional parameters with the channels that they belong to."""
    for slot in slots:
        source = node.args[slot] if len(node.args) > slot else None
        if source is None:
            continue
        if tracer.parameter(source) is None:
            tracer.pin(Tracked((0,), out), f"{place(node)} reads a computed tensor")
        else:
            tracer.sets.unite(out, tracer.axis(source, 0))


def pass_unless(tracer: Tracer, node: Any, mixed: Callable[[int], bool], why: str) -> Any:
    value = tracer.value(node.args[0])
    if not isinstance(value, Tracked):
        return None
    if any(mixed(d) for d in value.dims):
        tracer.pin(value, f"{place(node)} {why}")
        return None
    several = isinstance(node.meta["val"], (list, tuple))
    return [value] * len(node.meta["val"]) if several else value


def dims(node: Any, argument: Any) -> set[int]:
    n = len(shape(node.args[0]))
    if argument is None or argument == []:
        return set(range(n))
    listed = argument if isinstance(argument, (list, tuple)) else [argument]
    return {d % n for d in listed}


def whole(tracer: Tracer, value: Tracked, over: Container[int], reason: str) -> Tracked | None:
    """Along these dimensions all channels stay or all go; what is left is without them.

    Where no other dimension is tracked, all have to stay for this reason.
    """
    kept = [i for i, d in enumerate(value.dims) if d not in over]
    gone = [i for i, d in enumerate(value.dims) if d in over]
    ids = value.ids.transpose(kept + gone).reshape([value.ids.shape[i] for i in kept] + [-1])
    tracer.sets.unite(ids, ids[..., :1])
    if not kept:
        tracer.pin(value, reason)
        return None
    return Tracked(tuple(value.dims[i] for i in kept), ids[..., 0])
