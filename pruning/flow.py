"""Flow: what each operation of an exported graph does to channel ids (see pruning.coupling).

Here: layers (convolution, linear, embedding), element-wise operations, and operations that only
move elements (run on the ids themselves). Reductions and normalisations are in pruning.norm_flow,
products of two activations (attention) in pruning.head_flow. Everything else pins.
"""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch

from slimgemm.pruning import nodes
from slimgemm.pruning.coupling import Ids, Rule, Tracer, Tracked, Use, place
from slimgemm.pruning.head_flow import HEAD_RULES
from slimgemm.pruning.norm_flow import NORM_RULES


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
    movedim swapaxes expand expand_as repeat repeat_interleave stack chunk split
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


def follow(tracer: Tracer, node: Any) -> Any:
    """Ids of a node's result: Tracked, a list for several results, or None where none flow."""
    if node.target is operator.getitem:
        value = tracer.value(node.args[0])
        return value[node.args[1]] if isinstance(value, list) else value
    name = nodes.name(node)
    return (tracer.rules.get(name) or RULES.get(name) or nodes.unknown)(tracer, node)


def _linear(tracer: Tracer, node: Any) -> Tracked | None:
    x, weight = node.args[:2]
    if tracer.parameter(weight) is None:
        return nodes.unknown(tracer, node)
    dim = len(nodes.shape(x)) - 1
    value = tracer.value(x)
    if isinstance(value, Tracked) and dim not in value.dims:
        tracer.pin(value, f"{place(node)} mixes another dimension")
    inputs = nodes.channels_of(tracer, x, dim)
    out, columns = tracer.axis(weight, 0), tracer.axis(weight, 1)
    tracer.sets.unite(columns, inputs)
    nodes.bias(tracer, node, out, (2,))
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
        return nodes.unknown(tracer, node)
    groups = nodes.argument(node, 6, "groups", 1)
    shape = nodes.shape(weight)
    dim = len(nodes.shape(x)) - len(shape) + 1
    inputs, out = nodes.channels_of(tracer, x, dim), tracer.axis(weight, 0)
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
    nodes.bias(tracer, node, out, (2,))
    tracer.found.uses.append(Use(tracer.names[weight.name], inputs, depthwise))
    return _made(tracer, dim, out)


def _embedding(tracer: Tracer, node: Any) -> Tracked | None:
    """Rows of a table: its last axis makes channels, in any order."""
    weight = node.args[0]
    if tracer.parameter(weight) is None:
        return nodes.unknown(tracer, node)
    return _made(tracer, len(nodes.shape(node)) - 1, tracer.table(weight))


def _elementwise(tracer: Tracer, node: Any) -> Tracked | None:
    """Unite what meets; ids that meet a tensor of that size without ids are pinned."""
    shape = nodes.shape(node)
    sources = [s for s in node.all_input_nodes if hasattr(s.meta.get("val"), "shape")]
    tracked = _known(tracer, sources, len(shape))
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


def _known(tracer: Tracer, sources: list[Any], ndim: int) -> list[tuple[Any, tuple[int, ...], Ids]]:
    """(source, its dimensions with ids in a result of `ndim` dimensions, ids) of those with ids."""
    found: list[tuple[Any, tuple[int, ...], Ids]] = []
    # Parameters last: activations say along which of their dimensions channels lie.
    for source in sorted(sources, key=lambda s: tracer.parameter(s) is not None):
        met = {d for _, dims, _ in found for d in dims}
        shift = ndim - len(nodes.shape(source))
        if met and tracer.parameter(source) is not None:
            value = _beside(tracer, source, {d - shift for d in met})
        else:
            value = tracer.value(source)
        if isinstance(value, Tracked):
            found.append((source, tuple(d + shift for d in value.dims), value.ids))
    return found


def _beside(tracer: Tracer, parameter: Any, axes: set[int]) -> Tracked | None:
    """A parameter that meets channels along these of its axes (below 0: it has not so many)."""
    sizes = nodes.shape(parameter)
    spanned = [axis for axis in axes if axis >= 0 and sizes[axis] > 1]
    if not spanned:
        return None
    if len(axes) == 1:
        return tracer.alone(parameter, spanned[0])
    tracer.fix(parameter, "its channels lie along several dimensions here")
    return None


def _meet_fixed(tracer: Tracer, node: Any, source: Any, dims: tuple[int, ...], ids: Ids) -> None:
    """A tensor without ids spans some tracked dimensions: along these, all stay or all go.

    Rotary embeddings span the size of a head, so that heads are whole units. Where every tracked
    dimension is spanned, everything has to stay.
    """
    found = nodes.shape(source)
    shift = len(nodes.shape(node)) - len(found)
    spanned = tuple(i for i, d in enumerate(dims) if d >= shift and found[d - shift] > 1)
    if len(spanned) == len(dims):
        tracer.pin_meeting(node, source, ids)
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
    if not any(r.numel() for r in results):
        return None  # what a rotary embedding of whole heads leaves as it is
    before = np.concatenate([np.unique(tracer.full(s).numpy()) for s in tensors])
    after = np.concatenate([np.unique(r.numpy()) for r in results])
    tracer.left_out.append((before, after, f"{place(node)} leaves it out"))
    if nodes.name(node) in ("chunk", "tensor_split") and len({r.shape for r in results}) == 1:
        for r in results[1:]:  # parts of the same width stay so
            tracer.sets.unite(results[0].numpy(), r.numpy())
    found = [tracer.compress(r) for r in results]
    return found if isinstance(result, (list, tuple)) else found[0]


def _join(tracer: Tracer, node: Any) -> Any:
    """Concatenation along another dimension than that of the channels: what is joined is united."""
    tensors = [s for s in node.args[0] if 0 not in nodes.shape(s)]
    dim = nodes.argument(node, 1, "dim", 0) % len(nodes.shape(node))
    values = [tracer.value(s) for s in tensors]
    known = [value for value in values if isinstance(value, Tracked)]
    if len({value.dims for value in known}) != 1 or dim in known[0].dims:
        return _move(tracer, node)
    for value in known[1:]:
        tracer.sets.unite(known[0].ids, value.ids)
    for source, value in zip(tensors, values, strict=True):
        if not isinstance(value, Tracked):
            tracer.pin_meeting(node, source, known[0].ids)
    return known[0]


def _spatial(tracer: Tracer, node: Any) -> Any:
    """Pooling and interpolation: over the last dimensions only, channels pass."""
    x = node.args[0]
    name = nodes.name(node)
    last = len(nodes.shape(x)) - int(next(c for c in name if c.isdigit()))
    return nodes.pass_unless(tracer, node, lambda d: d >= last, "pools over its channels")


def _pad(tracer: Tracer, node: Any) -> Any:
    x, padding = node.args[:2]
    last = len(nodes.shape(x)) - len(padding) // 2
    return nodes.pass_unless(tracer, node, lambda d: d >= last, "pads its channels")


RULES: dict[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    **dict.fromkeys(MOVES, _move),
    **dict.fromkeys(("cat", "concat", "concatenate"), _join),
    **dict.fromkeys(SPATIAL, _spatial),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolution),
    **dict.fromkeys(("pad", "constant_pad_nd"), _pad),
    **NORM_RULES,
    **HEAD_RULES,
    "linear": _linear,
    "embedding": _embedding,
    "_assert_tensor_metadata": lambda tracer, node: None,  # it has no result
}
