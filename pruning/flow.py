"""Flow: what each operation of an exported graph does to channel ids (see pruning.coupling).

Five families: layers (convolution, linear, batch normalisation), element-wise operations,
operations that only move elements (run on the ids themselves), reductions and normalisations
over some dimensions, and products of two activations (attention). Everything else pins.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from slimgemm.pruning.coupling import FIXED, Ids, Tracer, Tracked, Use, place


def _names(listed: str) -> frozenset[str]:
    return frozenset(listed.split())


ELEMENTWISE = _names(
    """
    relu gelu silu sigmoid tanh hardtanh hardswish hardsigmoid leaky_relu elu selu celu mish
    softplus relu6 threshold logsigmoid softsign log_sigmoid dropout feature_dropout
    alpha_dropout clone contiguous to _to_copy type_as detach alias neg exp log abs sqrt
    rsqrt reciprocal square erf sin cos clamp clamp_min clamp_max add sub rsub mul div
    true_divide pow maximum minimum where masked_fill float bool half bfloat16
    lift_fresh_copy
    """
)
MOVES = _names(
    """
    view reshape _unsafe_view flatten unflatten squeeze unsqueeze permute transpose t
    movedim swapaxes expand expand_as repeat repeat_interleave cat concat stack chunk split
    split_with_sizes tensor_split select slice narrow unbind flip roll pixel_shuffle
    pixel_unshuffle numpy_T mT adjoint view_as reshape_as channel_shuffle
    """
)
SPATIAL = _names(
    """
    max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d
    adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d
    upsample_nearest1d upsample_nearest2d upsample_bilinear2d upsample_bicubic2d
    """
)
REDUCTIONS = _names(
    """
    mean sum amax amin max_dim var std norm prod logsumexp
    """
)
OVER_DIMS = _names(
    """
    softmax _softmax log_softmax _log_softmax cumsum
    """
)
NORMS = _names(
    """
    layer_norm rms_norm native_layer_norm
    """
)


def follow(tracer: Tracer, node: Any) -> Any:
    """Ids of a node's result: Tracked, a list for several results, or None where none flow."""
    if node.target is operator.getitem:
        value = tracer.value(node.args[0])
        return value[node.args[1]] if isinstance(value, list) else value
    name = _name(node)
    rule = tracer.rules.get(name) or _RULES.get(name)
    if rule is None:
        rule = next((r for names, r in _FAMILIES if name in names), _unknown)
    return rule(tracer, node)


def _name(node: Any) -> str:
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return str(getattr(node.target, "__name__", node.target))
    name = str(schema.name).rpartition("::")[2]
    return name if name.startswith("__") else (name.rstrip("_") or name)


def _unknown(tracer: Tracer, node: Any) -> Any:
    """No rule: every channel that arrives stays."""
    for source in node.all_input_nodes:
        if tracer.parameter(source) is not None:
            tracer.pin_parameter(source, f"no rule for {place(node)}")
        else:
            tracer.pin(tracer.value(source), f"no rule for {place(node)}")
    return None


def _shape(node: Any) -> tuple[int, ...]:
    value = node.meta["val"]
    return tuple((value[0] if isinstance(value, (list, tuple)) else value).shape)


def _channels_of(tracer: Tracer, node: Any, dim: int) -> Ids:
    """Ids along one dimension of an activation; whatever else it tracks must stay."""
    size = _shape(node)[dim]
    value = tracer.value(node)
    if not isinstance(value, Tracked):
        return np.full(size, FIXED, dtype=np.int64)
    if value.dims != (dim,):
        tracer.pin(value, "its channels lie along several dimensions here")
        return np.full(size, FIXED, dtype=np.int64)
    return value.ids


def _argument(node: Any, place: int, name: str, default: Any) -> Any:
    if len(node.args) > place:
        return node.args[place]
    return node.kwargs.get(name, default)


def _bias(tracer: Tracer, node: Any, out: Ids, slots: range | tuple[int, ...]) -> None:
    """Unite one-dimensional parameters with the channels that they belong to."""
    for slot in slots:
        source = node.args[slot] if len(node.args) > slot else None
        if source is None:
            continue
        if tracer.parameter(source) is None:
            tracer.pin(Tracked((0,), out), f"{place(node)} reads a computed tensor")
        else:
            tracer.sets.unite(out, tracer.axis(source, 0))


def _linear(tracer: Tracer, node: Any) -> Tracked | None:
    x, weight = node.args[:2]
    if tracer.parameter(weight) is None:
        return _unknown(tracer, node)
    dim = len(_shape(x)) - 1
    value = tracer.value(x)
    if isinstance(value, Tracked) and dim not in value.dims:
        tracer.pin(value, f"{place(node)} mixes another dimension")
    inputs = _channels_of(tracer, x, dim)
    out, columns = tracer.axis(weight, 0), tracer.axis(weight, 1)
    tracer.sets.unite(columns, inputs)
    _bias(tracer, node, out, (2,))
    tracer.found.uses.append(Use(tracer.names[weight.name], inputs, depthwise=False))
    return _made(tracer, dim, out)


def _made(tracer: Tracer, dim: int, ids: Ids) -> Tracked | None:
    """The output of a layer; a lone channel has to stay."""
    if ids.size > 1:
        return Tracked((dim,), ids)
    tracer.sets.pin(ids, "it is the only channel")
    return None


def _convolution(tracer: Tracer, node: Any) -> Tracked | None:
    x, weight = node.args[:2]
    if tracer.parameter(weight) is None:
        return _unknown(tracer, node)
    groups = _argument(node, 6, "groups", 1)
    shape = _shape(weight)
    dim = len(_shape(x)) - len(shape) + 1
    inputs, out = _channels_of(tracer, x, dim), tracer.axis(weight, 0)
    depthwise = groups > 1 and shape[1] == 1 and groups == inputs.size
    if depthwise:
        tracer.sets.unite(out, np.repeat(inputs, out.size // groups))
    elif groups == 1:
        tracer.sets.unite(tracer.axis(weight, 1), inputs)
    else:
        # Every group must stay as wide as the others: channel j of one takes j of all along.
        tracer.sets.unite(inputs.reshape(groups, -1), tracer.axis(weight, 1))
        by_group = out.reshape(groups, -1)
        tracer.sets.unite(by_group, by_group[:1])
    _bias(tracer, node, out, (2,))
    tracer.found.uses.append(Use(tracer.names[weight.name], inputs, depthwise))
    return _made(tracer, dim, out)


def _batch_norm(tracer: Tracer, node: Any) -> Tracked | None:
    x = node.args[0]
    ids = _channels_of(tracer, x, 1)
    if (ids == FIXED).all():
        for source in node.args[1:5]:
            if source is not None and tracer.parameter(source) is not None:
                tracer.pin_parameter(source, "its input has a fixed size")
        return None
    _bias(tracer, node, ids, range(1, 5))
    if node.args[1] is not None and tracer.parameter(node.args[1]) is not None:
        tracer.found.norms.append((ids, tracer.names[node.args[1].name]))
    return Tracked((1,), ids)


def _elementwise(tracer: Tracer, node: Any) -> Tracked | None:
    """Unite what meets; ids that meet a tensor of that size without ids are pinned."""
    shape = _shape(node)
    sources = [s for s in node.all_input_nodes if hasattr(s.meta.get("val"), "shape")]
    tracked = []
    for source in sources:
        value = tracer.value(source)
        if isinstance(value, Tracked):
            shift = len(shape) - len(_shape(source))
            tracked.append((source, tuple(d + shift for d in value.dims), value.ids))
    if not tracked:
        return None
    dims = tuple(sorted({d for _, found, _ in tracked for d in found}))
    views = []
    for _, found, ids in tracked:
        order = np.argsort(found)
        sizes = [shape[d] if d in found else 1 for d in dims]
        views.append(ids.transpose(order).reshape(sizes))
    for view in views[1:]:
        tracer.sets.unite(views[0], view)
    joint = np.broadcast_to(views[0], [shape[d] for d in dims])
    if len(views) > 1:
        joint = np.maximum.reduce([np.broadcast_to(v, joint.shape) for v in views])
    others = [source for source in sources if source not in [s for s, _, _ in tracked]]
    for source in others:
        _meet_fixed(tracer, node, source, dims, joint)
    return Tracked(dims, joint)


def _meet_fixed(tracer: Tracer, node: Any, source: Any, dims: tuple[int, ...], ids: Ids) -> None:
    """A tensor without ids spans some tracked dimensions: along these, all stay or all go.

    Rotary embeddings span the size of a head, so that heads are whole units. Where every tracked
    dimension is spanned, everything has to stay.
    """
    found = _shape(source)
    shift = len(_shape(node)) - len(found)
    spanned = tuple(i for i, d in enumerate(dims) if d >= shift and found[d - shift] > 1)
    if len(spanned) == len(dims):
        tracer.sets.pin(ids, f"{place(node)} meets a tensor of fixed size")
    elif spanned:
        first = tuple(slice(0, 1) if i in spanned else slice(None) for i in range(len(dims)))
        tracer.sets.unite(ids, ids[first])


def _move(tracer: Tracer, node: Any) -> Any:
    """Run the operation on the ids of every element."""
    tensors = [s for s in node.all_input_nodes if hasattr(s.meta.get("val"), "shape")]
    if not any(isinstance(tracer.value(s), Tracked) for s in tensors):
        return None

    def ids(argument: Any) -> Any:
        if isinstance(argument, torch.fx.Node):
            return tracer.full(argument) if argument in tensors else argument.meta["val"]
        if isinstance(argument, (list, tuple)):
            return [ids(item) for item in argument]
        return argument

    args = [ids(a) for a in node.args]
    result = node.target(*args, **{k: ids(v) for k, v in node.kwargs.items()})
    results = list(result) if isinstance(result, (list, tuple)) else [result]
    before = np.concatenate([np.unique(tracer.full(s).numpy()) for s in tensors])
    after = np.concatenate([np.unique(r.numpy()) for r in results])
    tracer.left_out.append((before, after, f"{place(node)} leaves it out"))
    found = [tracer.compress(r) for r in results]
    return found if isinstance(result, (list, tuple)) else found[0]


def _spatial(tracer: Tracer, node: Any) -> Any:
    """Pooling and interpolation: over the last dimensions only, channels pass."""
    x = node.args[0]
    name = _name(node)
    last = len(_shape(x)) - int(next(c for c in name if c.isdigit()))
    return _pass_unless(tracer, node, lambda d: d >= last, "pools over its channels")


def _pass_unless(tracer: Tracer, node: Any, mixed: Callable[[int], bool], why: str) -> Any:
    value = tracer.value(node.args[0])
    if not isinstance(value, Tracked):
        return None
    if any(mixed(d) for d in value.dims):
        tracer.pin(value, f"{place(node)} {why}")
        return None
    several = isinstance(node.meta["val"], (list, tuple))
    return [value] * len(node.meta["val"]) if several else value


def _dims(node: Any, argument: Any) -> set[int]:
    n = len(_shape(node.args[0]))
    if argument is None or argument == []:
        return set(range(n))
    listed = argument if isinstance(argument, (list, tuple)) else [argument]
    return {d % n for d in listed}


def _reduce(tracer: Tracer, node: Any) -> Any:
    """Means and sums: channels pass when another dimension is reduced."""
    slot = 2 if _name(node) == "norm" else 1
    argument = _argument(node, slot, "dim", None)
    if argument is not None and not isinstance(argument, (int, list, tuple)):
        return _unknown(tracer, node)
    over = _dims(node, argument)
    value = _pass_unless(tracer, node, over.__contains__, "reduces over its channels")
    if not isinstance(value, Tracked) or len(_shape(node)) == len(_shape(node.args[0])):
        return value
    return Tracked(tuple(d - sum(o < d for o in over) for d in value.dims), value.ids)


def _over_dims(tracer: Tracer, node: Any) -> Any:
    over = _dims(node, _argument(node, 1, "dim", None))
    return _pass_unless(tracer, node, over.__contains__, "mixes its channels")


def _norm(tracer: Tracer, node: Any) -> Any:
    """Layer normalisation: the mean over channels would change with their number."""
    n = len(_shape(node.args[0])) - len(node.args[1])
    for source in node.all_input_nodes:
        if tracer.parameter(source) is not None:
            tracer.pin_parameter(source, f"{place(node)} normalises over it")
    return _pass_unless(tracer, node, lambda d: d >= n, "normalises over its channels")


def _pad(tracer: Tracer, node: Any) -> Any:
    x, padding = node.args[:2]
    last = len(_shape(x)) - len(padding) // 2
    return _pass_unless(tracer, node, lambda d: d >= last, "pads its channels")


def _heads(tracer: Tracer, node: Any, source: Any, last: tuple[int, ...]) -> Tracked | None:
    """Unite the ids along `last` dimensions (a head stays whole); what is left are its heads."""
    value = tracer.value(source)
    if not isinstance(value, Tracked):
        return None
    kept = [i for i, d in enumerate(value.dims) if d not in last]
    gone = [i for i, d in enumerate(value.dims) if d in last]
    ids = value.ids.transpose(kept + gone).reshape([value.ids.shape[i] for i in kept] + [-1])
    tracer.sets.unite(ids, ids[..., :1])
    if not kept:
        tracer.pin(value, f"{place(node)} sums over its channels")
        return None
    return Tracked(tuple(value.dims[i] for i in kept), ids[..., 0])


def _unite_heads(tracer: Tracer, node: Any, heads: list[tuple[Any, Tracked | None]]) -> Any:
    """Unite the heads of all factors of a product; the result carries them."""
    known = [h for _, h in heads if h is not None]
    if not known:
        return None
    first = known[0]
    for source, other in heads:
        if other is not None and other.dims == first.dims and other.ids.size == first.ids.size:
            tracer.sets.unite(first.ids, other.ids)
        elif other is not None or any(_shape(source)[d] > 1 for d in first.dims):
            tracer.pin(first, f"{place(node)} meets heads of fixed number")
            tracer.pin(other, f"{place(node)} meets heads of fixed number")
    return first


def _product(tracer: Tracer, node: Any) -> Any:
    a, b = node.args[:2]
    if any(tracer.parameter(s) is not None for s in (a, b)) or len(_shape(a)) != len(_shape(b)):
        return _unknown(tracer, node)
    n = len(_shape(a))
    heads = [(s, _heads(tracer, node, s, (n - 2, n - 1))) for s in (a, b)]
    return _unite_heads(tracer, node, heads)


def _attention(tracer: Tracer, node: Any) -> Any:
    query, key, value = node.args[:3]
    n = len(_shape(query))
    heads = [(s, _heads(tracer, node, s, (n - 2, n - 1))) for s in (query, key, value)]
    mask = _argument(node, 3, "attn_mask", None)
    if _shape(query)[:-2] != _shape(key)[:-2]:  # grouped queries share a key
        times = _shape(query)[-3] // _shape(key)[-3]
        heads[1:] = [
            (query, h and Tracked(h.dims, np.repeat(h.ids, times, axis=-1))) for _, h in heads[1:]
        ]
    found = _unite_heads(tracer, node, heads)
    if isinstance(found, Tracked) and isinstance(mask, torch.fx.Node):
        shift = n - len(_shape(mask))
        if any(d >= shift and _shape(mask)[d - shift] > 1 for d in found.dims if d == n - 3):
            tracer.pin(found, f"{place(node)} has a mask for each head")
    return found


_RULES: dict[str, Callable[[Tracer, Any], Any]] = {
    "linear": _linear,
    "conv1d": _convolution,
    "conv2d": _convolution,
    "conv3d": _convolution,
    "batch_norm": _batch_norm,
    "pad": _pad,
    "constant_pad_nd": _pad,
    "matmul": _product,
    "bmm": _product,
    "scaled_dot_product_attention": _attention,
    "_assert_tensor_metadata": lambda tracer, node: None,  # it has no result
}
_FAMILIES: tuple[tuple[frozenset[str], Callable[[Tracer, Any], Any]], ...] = (
    (ELEMENTWISE, _elementwise),
    (MOVES, _move),
    (SPATIAL, _spatial),
    (REDUCTIONS, _reduce),
    (OVER_DIMS, _over_dims),
    (NORMS, _norm),
)
