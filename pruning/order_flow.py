"""order_flow: what an operation does to channel ids where channels only change places.

A channel that changes its place is still there: a norm or a mean over channels stays what it is,
whatever its form. Inside an attention head the value channels may change places too, if the columns
of the output projection follow; the heads themselves, and the channels of queries and keys, stay.
These rules go before those of pruning.flow, which are for channels that are dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from slimgemm.pruning import nodes
from slimgemm.pruning.coupling import Rule, Tracer, Tracked, place
from slimgemm.pruning.norm_flow import NORM_RULES, REDUCTIONS, reduce


def _norm(tracer: Tracer, node: Any) -> Any:
    """Over the one tracked dimension alone, scale and shift go with their channels."""
    x = node.args[0]
    value, last = tracer.value(x), len(x.meta["val"].shape) - 1
    if not isinstance(value, Tracked) or value.dims != (last,) or len(node.args[1]) != 1:
        return NORM_RULES["layer_norm"](tracer, node)
    nodes.bias(tracer, node, value.ids, (2,) if nodes.name(node) == "rms_norm" else (2, 3))
    return value


def _reduce(tracer: Tracer, node: Any) -> Any:
    """Over all tracked dimensions: the result is the same in any order."""
    value = tracer.value(node.args[0])
    slot = 2 if nodes.name(node) == "norm" else 1
    over = nodes.argument(node, slot, "dim", None)
    known = over is None or isinstance(over, (int, list, tuple))
    if known and isinstance(value, Tracked) and set(value.dims) <= nodes.dims(node, over):
        return None
    return reduce(tracer, node)


def _product(tracer: Tracer, node: Any) -> Any:
    a, b = node.args[:2]
    shapes = [nodes.shape(s) for s in (a, b)]
    if any(tracer.parameter(s) is not None for s in (a, b)) or len(shapes[0]) != len(shapes[1]):
        return nodes.unknown(tracer, node)
    tracer.pin(tracer.value(a), f"{place(node)} sums over its channels")
    return _within_heads(tracer, node, b)


def _attention(tracer: Tracer, node: Any) -> Any:
    query, key, value = node.args[:3]
    for source in (query, key, nodes.argument(node, 3, "attn_mask", None)):
        tracer.pin(tracer.value(source), f"{place(node)} sums over its channels")
    found = _within_heads(tracer, node, value)
    heads = len(nodes.shape(value)) - 3
    if not isinstance(found, Tracked) or heads not in found.dims:
        return found
    times = nodes.shape(query)[heads] // nodes.shape(value)[heads]  # queries that share a value
    return Tracked(found.dims, np.repeat(found.ids, times, axis=found.dims.index(heads)))


def _within_heads(tracer: Tracer, node: Any, source: Any) -> Any:
    """Ids of the values of a weighted sum: all go on, each inside its head."""
    value = tracer.value(source)
    if not isinstance(value, Tracked):
        return None
    last = len(nodes.shape(source)) - 1
    if last not in value.dims or last - 1 in value.dims:
        tracer.pin(value, f"{place(node)} sums over its channels")
        return None
    ids = np.moveaxis(value.ids, value.dims.index(last), -1)
    tracer.found.rows.append(ids.reshape(-1, ids.shape[-1]))
    return value


ORDER_RULES: Mapping[str, Rule] = {
    "layer_norm": _norm,
    "rms_norm": _norm,
    "matmul": _product,
    "bmm": _product,
    "scaled_dot_product_attention": _attention,
    **{name: _reduce for name in REDUCTIONS if name != "max_dim"},
}
