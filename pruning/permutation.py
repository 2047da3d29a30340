"""permutation: an order of input channels in which 2:4 loses less.

    find_permutation(weight) -> order          weight[:, order] keeps more magnitude at 2:4
    permute(model, example_inputs)             the same order in the layers that make the channels

The search anneals swaps of columns between groups of four and ends with best splits of pairs of
groups (pruning.column_groups). What an order can gain at all falls with the number of rows, since
one order serves every row: on independent normal weights no order of a 1024 x 1024 matrix is
expected to go further than 22 % of the way to dropping half of each row freely (first-moment
bound over all orders, benchmarks.pruning_permutation). Where channels differ in size the search
goes much further.
Source: Pool & Yu 2021, "Channel permutations for N:M sparsity", NeurIPS.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from slimgemm.pruning import channels
from slimgemm.pruning.column_groups import GROUP, ColumnGroups
from slimgemm.pruning.coupling import Coupling
from slimgemm.pruning.inputs import Inputs, evaluating, run, tensors_of
from slimgemm.pruning.layers import check_finite, find_layers
from slimgemm.pruning.patterns import NofM, rows_of
from slimgemm.pruning.trace import trace

SETTLE = 300  # most rounds of best splits after annealing


def kept_magnitude(weight: Tensor) -> float:
    """Magnitude that 2:4 keeps of a weight [N, K] or [O, I, kh, kw], in its present order."""
    size = weight.detach().double().abs()
    return float((size * NofM(2, 4).mask(size)).sum())


def find_permutation(weight: Tensor, *, rounds: int = 1000, seed: int = 0) -> Tensor:
    """An order of input channels that raises the magnitude kept at 2:4.

    Args:
        weight: [N, K], or [O, I, kh, kw] with groups along I at each tap.
        rounds: of annealing, each with a swap between every group and another one; a round takes
            time like N * K. At most as many rounds of best splits follow, and at most 300.
        seed: of pairs and swaps.

    Returns:
        int64 [K] (or [I]): `weight[:, order]` keeps at least what `weight` does. Where 4 does not
        divide K the last K % 4 columns stay in place.

    Raises:
        ValueError: the weight is no matrix or 2-D convolution, or holds NaN or infinity.
    """
    if weight.ndim not in (2, 4):
        raise ValueError(f"weight must be [N, K] or [O, I, kh, kw], got {list(weight.shape)}")
    check_finite("weight", weight.detach())
    size = rows_of(weight.detach()).flatten(0, 1).abs().float().T.contiguous()  # [K, rows]
    whole = size.shape[0] // GROUP
    order = torch.arange(size.shape[0])
    if whole < 2:
        return order
    search = ColumnGroups(size, order[: whole * GROUP].view(whole, GROUP).clone(), seed)
    default = search.kept()
    search.anneal(rounds)
    search.settle(min(rounds, SETTLE))
    if search.kept() > default:
        order[: whole * GROUP] = search.groups.flatten()
    return order


@dataclass(frozen=True)
class Reordered:
    """What `permute` did.

    Args:
        layers: reading layers whose input channels got another order.
        before, after: magnitude that 2:4 keeps of their weights together.
    """

    layers: tuple[str, ...]
    before: float
    after: float


def permute(
    model: nn.Module, example_inputs: Inputs, *, rounds: int = 1000, seed: int = 0
) -> Reordered:
    """Reorder hidden channels in place, so that 2:4 keeps more; outputs stay what they were.

    For each set of coupled channels the layers that read them one column per channel decide; all
    parameters and buffers that carry them follow. Channels that a trace pins (see
    pruning.coupling) and channels of layers that cannot be pruned stay in place.

    Raises:
        ValueError: the model cannot be traced, or its outputs would change; it is unchanged then.
    """
    layers = find_layers(model)
    names = [layer.name for layer in layers if layer.refusal is None]
    coupling = trace(model, example_inputs, channels.pinned_by(model, layers, ()))
    tensors = {name: channels._tensor(model, name) for name, _ in coupling.axes}
    weights = {name: tensors[f"{name}.weight"] for name in names if f"{name}.weight" in tensors}
    before = {name: kept_magnitude(weight) for name, weight in weights.items()}
    inputs = channels.lively(example_inputs)
    with evaluating(model), torch.no_grad():
        want = [t.clone() for t in tensors_of(run(model, inputs))]
    saved = {name: tensor.data for name, tensor in tensors.items()}
    changed: list[str] = []
    for group in channels.groups_of(coupling, names):
        readers = _readers(coupling, names, group.units)
        if not readers:
            continue
        stacked = torch.cat([rows_of(w).flatten(0, 1) for w in _columns(weights, readers)])
        order = find_permutation(stacked.detach(), rounds=rounds, seed=seed)
        first = readers[0][1]
        _reorder(coupling, tensors, dict(zip(first, [first[i] for i in order], strict=True)))
        changed += [name for name, _ in readers]
    try:
        with evaluating(model), torch.no_grad():
            failure = channels.difference(tensors_of(run(model, inputs)), want)
    except (RuntimeError, ValueError, IndexError) as error:
        failure = f"its forward failed: {type(error).__name__}: {error}"
    if failure is not None:
        for name, data in saved.items():
            tensors[name].data = data
        raise ValueError(f"channels cannot be reordered in this model: {failure}; it is unchanged")
    after = {name: kept_magnitude(weights[name]) for name in changed}
    return Reordered(
        tuple(changed), sum(before[n] for n in changed), sum(after[n] for n in changed)
    )


def _readers(coupling: Coupling, names: list[str], units: list[int]) -> list[tuple[str, list[int]]]:
    """(layer, unit of each column) of layers whose columns are these units, one each, in one order.

    Only layers that see the units in the order of the first one found can be searched together;
    the others follow.
    """
    found: list[tuple[str, list[int]]] = []
    for name in names:
        ids = coupling.axes.get((f"{name}.weight", 1))
        if ids is None:
            continue
        columns = coupling.sets.roots(ids).tolist()
        if sorted(columns) == units and (not found or found[0][1] == columns):
            found.append((name, columns))
    return found


def _columns(weights: dict[str, Tensor], readers: list[tuple[str, list[int]]]) -> list[Tensor]:
    """Weights of the readers as [rows, K, 1, 1]."""
    return [rows_of(weights[n]).flatten(0, 1)[:, :, None, None] for n, _ in readers]


def _reorder(coupling: Coupling, tensors: dict[str, Tensor], source: dict[int, int]) -> None:
    """Put unit source[u] where unit u is, on every axis; its k-th place goes to the k-th place."""
    for (name, axis), ids in coupling.axes.items():
        roots = coupling.sets.roots(ids)
        places = {u: np.flatnonzero(roots == u) for u in np.unique(roots).tolist() if u in source}
        if not places:
            continue
        index = np.arange(roots.size)
        for unit, place in places.items():
            index[place] = places[source[unit]]
        tensor = tensors[name]
        tensor.data = tensor.data.index_select(axis, torch.from_numpy(index).to(tensor.device))
