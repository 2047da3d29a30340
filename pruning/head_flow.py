"""head_flow: what products of two activations (attention) do to channel ids: heads go whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from slimgemm.pruning import nodes
from slimgemm.pruning.coupling import Rule, Tracer, Tracked, place


def _heads(tracer: Tracer, node: Any, source: Any, last: tuple[int, ...]) -> Tracked | None:
    """What is left without the `last` dimensions are heads, which stay whole."""
    value = tracer.value(source)
    if not isinstance(value, Tracked):
        return None
    return nodes.whole(tracer, value, last, f"{place(node)} sums over its channels")


def _unite_heads(tracer: Tracer, node: Any, heads: list[tuple[Any, Tracked | None]]) -> Any:
    """Unite the heads of all factors of a product; the result carries them."""
    known = [h for _, h in heads if h is not None]
    if not known:
        return None
    first = known[0]
    for source, other in heads:
        if other is not None and other.dims == first.dims and other.ids.size == first.ids.size:
            tracer.sets.unite(first.ids, other.ids)
        elif other is not None or any(nodes.shape(source)[d] > 1 for d in first.dims):
            tracer.pin(first, f"{place(node)} meets heads of fixed number")
            tracer.pin(other, f"{place(node)} meets heads of fixed number")
    return first


def _product(tracer: Tracer, node: Any) -> Any:
    a, b = node.args[:2]
    n = len(nodes.shape(a))
    if any(tracer.parameter(s) is not None for s in (a, b)) or n != len(nodes.shape(b)):
        return nodes.unknown(tracer, node)
    heads = [(s, _heads(tracer, node, s, (n - 2, n - 1))) for s in (a, b)]
    return _unite_heads(tracer, node, heads)


def _attention(tracer: Tracer, node: Any) -> Any:
    query, key, value = node.args[:3]
    n = len(nodes.shape(query))
    heads = [(s, _heads(tracer, node, s, (n - 2, n - 1))) for s in (query, key, value)]
    mask = nodes.argument(node, 3, "attn_mask", None)
    if nodes.shape(query)[:-2] != nodes.shape(key)[:-2]:  # grouped queries share a key
        times = nodes.shape(query)[-3] // nodes.shape(key)[-3]
        heads[1:] = [
            (query, h and Tracked(h.dims, np.repeat(h.ids, times, axis=-1))) for _, h in heads[1:]
        ]
    found = _unite_heads(tracer, node, heads)
    if isinstance(found, Tracked) and isinstance(mask, torch.fx.Node):
        shift = n - len(nodes.shape(mask))
        if any(d >= shift and nodes.shape(mask)[d - shift] > 1 for d in found.dims if d == n - 3):
            tracer.pin(found, f"{place(node)} has a mask for each head")
    return found


HEAD_RULES: Mapping[str, Rule] = {
    "matmul": _product,
    "bmm": _product,
    "scaled_dot_product_attention": _attention,
}
