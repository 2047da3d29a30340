"""reorder: the order of `find_permutation` in every layer that makes or reads the channels.

    permute(model, example_inputs)     2:4 keeps more magnitude, and the outputs stay what they were

What may change places:
    hidden channels           of a convolution or an MLP, at all their readers
    value channels            inside each attention head, with the columns of the output projection;
                              with grouped queries one order serves all query heads of a value head
    the residual stream       one order for embeddings, position parameters, norms and all layers
                              that read or write it, where it does not reach the model's output

A model that returns its residual stream (a sentence encoder) ties it to its output in every layer,
by the residual adds. `reorder_outputs` frees it: the outputs then come in another order, and
`Reordered.outputs` puts them back. Sums and cosines over channels are the same in any order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from slimgemm.pruning import channels
from slimgemm.pruning.allocate import Uniform
from slimgemm.pruning.column_groups import GROUP
from slimgemm.pruning.cost import count_macs
from slimgemm.pruning.coupling import FIXED, Coupling, Ids
from slimgemm.pruning.decide import Request, scores_of_all
from slimgemm.pruning.inputs import Inputs, evaluating, run, tensors_of
from slimgemm.pruning.layers import Layer, check_finite, find_layers
from slimgemm.pruning.lively import lively
from slimgemm.pruning.masks import masked_modules
from slimgemm.pruning.order_flow import ORDER_RULES
from slimgemm.pruning.patterns import NofM, rows_of
from slimgemm.pruning.permutation import find_permutation, kept_magnitude
from slimgemm.pruning.proof import difference
from slimgemm.pruning.scores import Context, Magnitude, Score
from slimgemm.pruning.sparsegpt import Solver
from slimgemm.pruning.trace import trace

Quads = list[tuple[int, ...]]


@dataclass(frozen=True)
class Reordered:
    """What `permute` did.

    Args:
        layers: reading layers whose input channels got another order.
        before, after: what 2:4 keeps of their scores together (of the magnitude, as it is asked).
        left: layer whose input channels all stay -> why.
        outputs: (place among the model's output tensors, dimension) -> int64 order; the output
            before is `output.index_select(dimension, order)`.
    """

    layers: tuple[str, ...]
    before: float
    after: float
    left: Mapping[str, str] = field(default_factory=dict)
    outputs: Mapping[tuple[int, int], Tensor] = field(default_factory=dict)


@dataclass
class Reader:
    """A layer, the units on its columns four by four, and their labels (see `_labels`)."""

    name: str
    fours: Quads
    labels: frozenset[int]


def permute(
    model: nn.Module,
    example_inputs: Inputs,
    *,
    score: Score | None = None,
    calibration: Iterable[Any] | None = None,
    rounds: int = 1000,
    seed: int = 0,
    ignore: Sequence[str] = (),
    reorder_outputs: bool = False,
) -> Reordered:
    """Reorder channels in place, so that 2:4 keeps more; outputs stay what they were.

    The layers that read channels in one order decide together on another; all parameters and
    buffers that carry these channels follow. Channels that an operation ties to their place stay.

    Args:
        model: dense, not pruned yet.
        example_inputs: as for `plan`; a proof runs them, with the tolerance of
            `proof.TOLERANCE`. A cache that the model returns is an output (use_cache=False).
        score: what 2:4 shall keep most of: Magnitude(p=1) (the default), or Wanda(), which also
            suits SparseGPT; of a weight, or of a weight and its inputs, and never negative.
        calibration: batches, each as example_inputs, for a score that looks at inputs.
        rounds, seed: of each search, see `find_permutation`.
        ignore: layers that do not decide (they are not to be 2:4), as for `plan`.
        reorder_outputs: the channels of outputs may change places too, see `Reordered.outputs`.

    Raises:
        ValueError: the model cannot be traced, carries masks, or its outputs would change, or the
            score does not suit; the model is unchanged then.
    """
    masked = next(masked_modules(model), None)
    if masked is not None:
        raise ValueError(f"{masked[0]} is pruned already; permute the dense model, then prune")
    layers = [layer for layer in find_layers(model, ignore) if layer.refusal is None]
    coupling = trace(model, example_inputs, lambda *_: None, ORDER_RULES, reorder_outputs)
    reading = [layer for layer in layers if (f"{layer.name}.weight", 1) in coupling.axes]
    sizes = _sizes(model, reading, example_inputs, score or Magnitude(), calibration)
    label = _labels(coupling)
    readers = [_reader(coupling, label, name) for name in sizes]
    source: dict[int, int] = {}
    changed: set[str] = set()
    for kind, quads in _alike(readers, label).items():
        able = [reader for reader in readers if kind in reader.labels]
        votes = {r.name: places for r in able if (places := _places(r, quads)).size}
        rows = [_columns(sizes[name], row) for name, places in votes.items() for row in places]
        order = find_permutation(torch.cat(rows), rounds=rounds, seed=seed)
        units = np.array(quads).flatten()
        source |= dict(zip(units.tolist(), units[order.numpy()].tolist(), strict=True))
        changed |= votes.keys()
    outputs = _reorder(model, example_inputs, coupling, source)
    found = [name for name in sizes if name in changed]
    after = 0.0
    for name in found:
        index = _index(coupling, coupling.axes[f"{name}.weight", 1], source)
        after += kept_magnitude(sizes[name] if index is None else sizes[name][:, index])
    before = sum(kept_magnitude(sizes[name]) for name in found)
    left = {la.name: _why(coupling, la.name) for la in layers if la.name not in changed}
    return Reordered(tuple(found), before, after, left, outputs)


def _sizes(
    model: nn.Module,
    layers: Sequence[Layer],
    example_inputs: Inputs,
    score: Score,
    calibration: Iterable[Any] | None,
) -> dict[str, Tensor]:
    """Layer name -> scores of its weights, float32 on the CPU.

    Raises:
        ValueError: the score is a solver, lacks its data, or is negative.
    """
    if isinstance(score, Solver) or score.needs not in ("weight", "inputs"):
        raise ValueError(
            f"permute needs a score of weights, or of weights and inputs, got {score}; Wanda() "
            "suits SparseGPT"
        )
    if score.needs == "inputs" and calibration is None:
        raise ValueError(f"{score} needs calibration data; pass calibration=, model inputs")
    for layer in layers:
        check_finite(layer.name, layer.weight)
    batches = None if calibration is None else list(calibration)
    contexts = {layer.name: Context(layer.name) for layer in layers}
    cost = count_macs(model, example_inputs)
    found = scores_of_all(
        Request(model, layers, NofM(), score, Uniform(), contexts, batches, None, cost)
    )
    sizes = {name: scores.detach().float().cpu() for name, scores in found.items()}
    for name, size in sizes.items():
        if bool((size < 0).any()):
            raise ValueError(f"{name}: {score} is negative; permute needs scores of at least 0")
    return sizes


def _labels(coupling: Coupling) -> NDArray[np.int64]:
    """Label of each id that is a root: units of one label may change places with each other.

    They appear equally often on the same axes, and in the same rows. Units that stay have label 0.
    """
    sets = coupling.sets
    axes = [sets.roots(ids) for ids in (*coupling.axes.values(), *coupling.outputs.values())]
    count = 1 + max((int(roots.max(initial=FIXED)) for roots in axes), default=FIXED)
    label = np.ones(count, np.int64)

    def refine(units: Ids, by: NDArray[np.int64]) -> None:
        _, found = np.unique(np.stack([label[units], by]), axis=1, return_inverse=True)
        label[units] = label.max() + 1 + found.reshape(-1)

    for roots in axes:
        units, times = np.unique(roots[roots != FIXED], return_counts=True)
        refine(units, times)
    for ids in coupling.rows:
        roots = sets.roots(ids)
        units, first = np.unique(roots, return_index=True)
        refine(units[units != FIXED], first[units != FIXED] // ids.shape[1])
    for unit in np.unique(np.concatenate([*axes, np.array([FIXED])])).tolist():
        if unit != FIXED and sets.reason(unit) is not None:
            label[unit] = 0
    return label


def _reader(coupling: Coupling, label: NDArray[np.int64], name: str) -> Reader:
    """What a layer reads; columns left over behind its groups of four are not listed."""
    roots = coupling.sets.roots(coupling.axes[f"{name}.weight", 1])
    roots = roots[: roots.size // GROUP * GROUP]
    labels = frozenset(label[roots[roots != FIXED]].tolist())
    return Reader(name, [tuple(four) for four in roots.reshape(-1, GROUP).tolist()], labels)


def _alike(readers: Sequence[Reader], label: NDArray[np.int64]) -> dict[int, Quads]:
    """Label -> groups of four units that may all change places with each other, two or more.

    The first layer that reads a unit says in which group it is.
    """
    found: dict[int, Quads] = {}
    seen: set[int] = {FIXED}
    for reader in readers:
        for four in reader.fours:
            labels = {int(label[unit]) for unit in four if unit != FIXED}
            if len(labels) == 1 and 0 not in labels and len({*four} - seen) == GROUP:
                found.setdefault(labels.pop(), []).append(four)
            seen |= {*four}
    return {kind: quads for kind, quads in found.items() if len(quads) > 1}


def _places(reader: Reader, quads: Quads) -> NDArray[np.int64]:
    """[times, units] columns of a reader that holds each of these groups whole, equally often.

    A layer that mixes the groups has no say, [0]; its columns follow.
    """
    order = {frozenset(quad): i for i, quad in enumerate(quads)}
    at: list[list[list[int]]] = [[] for _ in quads]
    members = {unit for quad in quads for unit in quad}
    for place, four in enumerate(reader.fours):
        known = order.get(frozenset(four))
        if known is not None:
            inside = {unit: GROUP * place + i for i, unit in enumerate(four)}
            at[known].append([inside[unit] for unit in quads[known]])
        elif members & {*four}:
            return np.empty(0, np.int64)
    if len({len(found) for found in at}) != 1 or not at[0]:
        return np.empty(0, np.int64)
    return np.array(at, np.int64).transpose(1, 0, 2).reshape(len(at[0]), -1)


def _columns(weight: Tensor, places: NDArray[np.int64]) -> Tensor:
    """[rows, columns] of scores, the taps of a convolution as rows."""
    return rows_of(weight).flatten(0, 1)[:, torch.from_numpy(places)]


def _reorder(
    model: nn.Module,
    example_inputs: Inputs,
    coupling: Coupling,
    source: Mapping[int, int],
) -> dict[tuple[int, int], Tensor]:
    """Put unit source[u] where unit u is, on every axis; orders that put outputs back."""
    moves = {
        key: index
        for key, ids in coupling.axes.items()
        if (index := _index(coupling, ids, source)) is not None
    }
    back = {
        key: index.argsort()
        for key, ids in coupling.outputs.items()
        if (index := _index(coupling, ids, source)) is not None
    }
    tensors = {name: channels.tensor_named(model, name) for name, _ in moves}
    with lively(model, example_inputs) as inputs:
        with evaluating(model), torch.no_grad():
            want = [t.clone() for t in tensors_of(run(model, inputs))]
        try:
            _move(tensors, moves)
            with evaluating(model), torch.no_grad():
                got = tensors_of(run(model, inputs))
            for (place, dim), order in back.items():
                got[place] = got[place].index_select(dim, order.to(got[place].device))
            failure = difference(got, want)
        except (RuntimeError, ValueError, IndexError) as error:
            failure = f"its forward failed: {type(error).__name__}: {error}"
    if failure is not None:
        raise ValueError(f"channels cannot be reordered in this model: {failure}; it is unchanged")
    _move(tensors, moves)
    return back


def _move(tensors: Mapping[str, Tensor], moves: Mapping[tuple[str, int], Tensor]) -> None:
    """Reorder tensors in place, each along some of its axes."""
    for (name, axis), index in moves.items():
        tensor = tensors[name]
        tensor.data = tensor.data.index_select(axis, index.to(tensor.device))


def _index(coupling: Coupling, ids: Ids, source: Mapping[int, int]) -> Tensor | None:
    """Where each place of an axis takes its channel from; k-th place of a unit to k-th place."""
    roots = coupling.sets.roots(ids)
    order = np.argsort(roots, kind="stable")
    units, first, times = np.unique(roots[order], return_index=True, return_counts=True)
    places = {
        unit: order[at : at + n] for unit, at, n in zip(units.tolist(), first, times, strict=True)
    }
    index = np.arange(roots.size)
    for unit in places.keys() & source.keys():
        index[places[unit]] = places[source[unit]]
    return None if (index == np.arange(roots.size)).all() else torch.from_numpy(index)


def _why(coupling: Coupling, name: str) -> str:
    """Why the input channels of a layer stay."""
    ids = coupling.axes.get((f"{name}.weight", 1))
    if ids is None:
        return "it did not run on the example inputs, or reads one input channel per output"
    found = [coupling.sets.reason(i) for i in np.unique(ids).tolist()]
    reasons = [reason for reason in found if reason is not None]
    return reasons[0] if reasons else "its columns are not two whole groups of four channels alike"
