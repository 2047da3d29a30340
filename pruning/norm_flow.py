"""norm_flow: what reductions and normalisations do to channel ids (see pruning.coupling).

Over other dimensions than that of the channels, channels pass; over those of a head, heads are
whole units. Over the channels themselves they stay, but for the modules whose smaller self takes
its moments over the channels that are left.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

from torch import nn

from slimgemm.pruning import nodes
from slimgemm.pruning.coupling import FIXED, Ids, Rule, Tracer, Tracked, place
from slimgemm.pruning.layers import NORMS

REDUCTIONS = ("mean", "sum", "amax", "amin", "max_dim", "var", "std", "norm", "prod", "logsumexp")
CASTS = ("to", "_to_copy", "float", "type_as")


def _per_channel(tracer: Tracer, node: Any) -> Tracked | None:
    """Batch and instance normalisation: each channel has moments of its own."""
    ids = _normalised(tracer, node, range(1, 5))
    if ids is None:
        return None
    found, scale = tracer.module(node), node.args[1]
    if nodes.name(node) == "batch_norm" and scale is not None and tracer.parameter(scale):
        tracer.found.scales.append((ids, tracer.names[scale.name]))
    elif found is not None and isinstance(found[1], NORMS):
        tracer.norm(node, ids, mixes=False)
    return Tracked((1,), ids)


def _normalised(tracer: Tracer, node: Any, slots: range) -> Ids | None:
    """Ids along dimension 1, united with the parameters in these slots; None if it is fixed."""
    ids = nodes.channels_of(tracer, node.args[0], 1)
    if (ids == FIXED).all():
        for source in node.args[slots.start : slots.stop]:
            if source is not None and tracer.parameter(source) is not None:
                tracer.pin_parameter(source, "its input has a fixed size")
        return None
    nodes.bias(tracer, node, ids, slots)
    return ids


def _group_norm(tracer: Tracer, node: Any) -> Tracked | None:
    """Every group stays as wide as the others: channel j of one takes j of all along."""
    found, groups = tracer.module(node), node.args[1]
    if found is None or not isinstance(found[1], nn.GroupNorm):
        return _fixed_norm(tracer, node, 1)
    ids = _normalised(tracer, node, range(2, 4))
    if ids is None:
        return None
    mixes = groups < ids.size  # else each channel is a group, and goes alone
    if mixes:
        by_group = ids.reshape(groups, -1)
        tracer.sets.unite(by_group, by_group[:1])
    tracer.norm(node, ids, mixes)
    return Tracked((1,), ids)


def _layer_norm(tracer: Tracer, node: Any) -> Tracked | None:
    """Of a module, over the channels alone: they go with its scale and shift."""
    x, sizes = node.args[:2]
    value, last = tracer.value(x), len(nodes.shape(x)) - 1
    found = tracer.module(node)
    known = found is not None and isinstance(found[1], (nn.LayerNorm, nn.RMSNorm))
    if not known or not isinstance(value, Tracked) or value.dims != (last,) or len(sizes) != 1:
        return _fixed_norm(tracer, node, last + 1 - len(sizes))
    nodes.bias(tracer, node, value.ids, (2,) if nodes.name(node) == "rms_norm" else (2, 3))
    tracer.norm(node, value.ids)
    return value


def _fixed_norm(tracer: Tracer, node: Any, first: int) -> Any:
    """Its width is a number, or it is over several dimensions: from `first` on, channels stay."""
    for source in node.all_input_nodes:
        if tracer.parameter(source) is not None:
            tracer.pin_parameter(source, f"{place(node)} normalises over it")
    last = range(first, len(nodes.shape(node)))
    return _mixes(tracer, node, last, "normalises over its channels")


def _mean(tracer: Tracer, node: Any) -> Any:
    if not _is_rms(tracer, node):
        return reduce(tracer, node)
    tracer.norm(node, tracer.value(node.args[0]).ids)
    return None


def _is_rms(tracer: Tracer, node: Any) -> bool:
    """The mean in x * rsqrt(mean(x * x) + number), over the channels, in a module of its own.

    Its only parameter is a weight of the channels; which operation reads it, the trace sees.
    """
    value, found = tracer.value(node.args[0]), tracer.module(node)
    last = len(nodes.shape(node.args[0])) - 1
    if found is None or not isinstance(value, Tracked) or value.dims != (last,):
        return False
    weights = [(name, tuple(p.shape)) for name, p in found[1].named_parameters()]
    over, keep = nodes.argument(node, 1, "dim", None), nodes.argument(node, 2, "keepdim", False)
    if weights != [("weight", (value.ids.size,))] or over not in ([-1], [last]) or not keep:
        return False
    root = _read_by(_read_by(node, "add", float), "rsqrt")
    product = _read_by(root, "mul")
    if product is None:
        return False
    return {_uncast(source) for source in product.args} == {_squared(node.args[0]), root}


def _squared(node: Any) -> Any:
    """x of x ** 2, square(x) or x * x, before casts; None for anything else."""
    name, args = nodes.name(node), node.args
    squares = name == "square" or args[1:] == ((2,) if name == "pow" else args[:1])
    return _uncast(args[0]) if squares and name in ("square", "pow", "mul") else None


def _uncast(node: Any) -> Any:
    while getattr(node, "op", "") == "call_function" and nodes.name(node) in CASTS:
        node = node.args[0]
    return node


def _read_by(node: Any, name: str, other: type = object) -> Any:
    """The one operation that reads a node, if it is this and its last argument such; or None."""
    readers = [] if node is None else list(node.users)
    readers = [reader for reader in readers if nodes.name(reader) != "_assert_tensor_metadata"]
    if len(readers) != 1 or nodes.name(readers[0]) != name:
        return None
    return readers[0] if isinstance(readers[0].args[-1], other) else None


def reduce(tracer: Tracer, node: Any) -> Any:
    """Means and sums: channels pass when another dimension is reduced."""
    slot = 2 if nodes.name(node) == "norm" else 1
    argument = nodes.argument(node, slot, "dim", None)
    if argument is not None and not isinstance(argument, (int, list, tuple)):
        return nodes.unknown(tracer, node)
    over = nodes.dims(node, argument)
    value = tracer.value(node.args[0])
    if isinstance(value, Tracked) and over & {*value.dims}:
        value = nodes.whole(tracer, value, over, f"{place(node)} reduces over its channels")
    if not isinstance(value, Tracked):
        return None
    if len(nodes.shape(node)) < len(nodes.shape(node.args[0])):
        value = Tracked(tuple(d - sum(o < d for o in over) for d in value.dims), value.ids)
    several = isinstance(node.meta["val"], (list, tuple))
    return [value] * len(node.meta["val"]) if several else value


def _over_dims(tracer: Tracer, node: Any) -> Any:
    over = nodes.dims(node, nodes.argument(node, 1, "dim", None))
    return _mixes(tracer, node, over, "mixes its channels")


def _mixes(tracer: Tracer, node: Any, over: Container[int], why: str) -> Any:
    """The result has all dimensions; along some it depends on all channels (of a head)."""
    value = tracer.value(node.args[0])
    if not isinstance(value, Tracked) or not any(d in over for d in value.dims):
        return value
    left = nodes.whole(tracer, value, over, f"{place(node)} {why}")
    return None if left is None else value


NORM_RULES: Mapping[str, Rule] = {
    **dict.fromkeys(REDUCTIONS, reduce),
    **dict.fromkeys(("softmax", "_softmax", "log_softmax", "_log_softmax", "cumsum"), _over_dims),
    **dict.fromkeys(("layer_norm", "rms_norm"), _layer_norm),
    **dict.fromkeys(("batch_norm", "instance_norm"), _per_channel),
    "group_norm": _group_norm,
    "mean": _mean,
}
