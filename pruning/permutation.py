"""permutation: an order of input channels in which 2:4 loses less.

    find_permutation(weight) -> order          weight[:, order] keeps more magnitude at 2:4
    permute(model, example_inputs)             the same order in the layers that make the channels

Search: groups of four columns are paired at random, and each pair takes the best of its 35 ways to
split eight columns into two groups. All pairs of a round are disjoint, so a round is one batch and
no round makes it worse. At rest, a few groups are mixed and the search goes on from there.
Source: Pool & Yu 2021, "Channel permutations for N:M sparsity", NeurIPS.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from torch import Tensor, nn

from slimgemm.pruning import channels
from slimgemm.pruning.coupling import Coupling
from slimgemm.pruning.inputs import Inputs, evaluating, run, tensors_of
from slimgemm.pruning.layers import check_finite, find_layers
from slimgemm.pruning.patterns import NofM, rows_of
from slimgemm.pruning.trace import trace

GROUP, WINDOW = 4, 8  # columns per group, and per pair of groups
LEAST_GAIN = 1e-6  # per row; below it rounding could make a search go round in circles
KICKED = 3  # groups mixed by a kick
BATCH_BYTES = 1 << 21  # pair sums and maxima of one batch; they are read 35 times, from the cache


@functools.cache
def splits() -> tuple[tuple[int, ...], ...]:
    """The 35 ways to put 8 columns into two groups; column 0 is in the first; (first, second)."""
    found = []
    for rest in combinations(range(1, WINDOW), GROUP - 1):
        first = (0, *rest)
        found.append(first + tuple(i for i in range(WINDOW) if i not in first))
    return tuple(found)


def kept_magnitude(weight: Tensor) -> float:
    """Magnitude that 2:4 keeps of a weight [N, K] or [O, I, kh, kw], in its present order."""
    size = weight.detach().double().abs()
    return float((size * NofM(2, 4).mask(size)).sum())


def _best_splits(windows: Tensor) -> tuple[Tensor, Tensor]:
    """(index into `splits`, gain) of each window [windows, 8, rows]; the identity is split 0."""
    columns = windows.unbind(1)
    sums = {p: columns[p[0]] + columns[p[1]] for p in combinations(range(WINDOW), 2)}
    tops = {p: torch.maximum(columns[p[0]], columns[p[1]]) for p in sums}
    values = []
    for split in splits():
        both = []
        for a, b, c, d in (split[:GROUP], split[GROUP:]):
            best = torch.maximum(sums[a, b], sums[c, d])
            both.append(torch.maximum(best, tops[a, b] + tops[c, d]))
        values.append(both[0].add_(both[1]).sum(1, dtype=torch.float64))
    stacked = torch.stack(values, 1)
    best = stacked.argmax(1)
    return best, stacked.gather(1, best[:, None]).squeeze(1) - stacked[:, 0]


@dataclass
class _Search:
    """Groups of four columns, and which pairs of groups may still gain."""

    size: Tensor  # [K, rows] magnitudes
    groups: Tensor  # int64 [groups, 4] columns
    generator: torch.Generator

    def __post_init__(self) -> None:
        whole = self.groups.shape[0]
        self.turn = 0
        self.changed = torch.zeros(whole, dtype=torch.int64)
        self.seen = torch.full((whole, whole), -1)
        self.batch = max(1, BATCH_BYTES // (self.size.shape[1] * 56 * 4))
        self.table = torch.tensor(splits())

    def pairs(self) -> Tensor:
        """int64 [pairs, 2]: disjoint pairs of groups that changed since they were looked at."""
        whole = self.groups.shape[0]
        due = torch.maximum(self.changed[:, None], self.changed[None]) > self.seen
        listed = due.triu(1).nonzero()
        listed = listed[torch.randperm(listed.shape[0], generator=self.generator)]
        free = [True] * whole
        chosen = []
        for a, b in listed.tolist():
            if free[a] and free[b]:
                free[a] = free[b] = False
                chosen.append((a, b))
                if len(chosen) == whole // 2:
                    break
        return torch.tensor(chosen, dtype=torch.int64).view(-1, 2)

    def improve(self, pairs: Tensor) -> None:
        """Give each pair of groups its best split."""
        self.turn += 1
        for part in pairs.split(self.batch):
            windows = self.groups[part].flatten(1)
            best, gain = _best_splits(self.size[windows.to(self.size.device)])
            better = (gain > LEAST_GAIN * self.size.shape[1]).cpu()
            self.seen[part[:, 0], part[:, 1]] = self.turn
            moved = windows.gather(1, self.table[best.cpu()])[better].view(-1, 2, GROUP)
            self.groups[part[better]] = moved
            self.changed[part[better].flatten()] = self.turn + 1

    def kept(self) -> float:
        """Magnitude that 2:4 keeps of the present groups."""
        columns = self.size[self.groups.to(self.size.device)]
        return float(columns.topk(2, dim=1).values.sum(dtype=torch.float64))

    def kick(self, groups: int) -> None:
        """Mix the columns of a few random groups, to leave a local best."""
        picked = torch.randperm(self.groups.shape[0], generator=self.generator)[:groups]
        columns = self.groups[picked].flatten()
        order = torch.randperm(columns.numel(), generator=self.generator)
        self.groups[picked] = columns[order].view(-1, GROUP)
        self.changed[picked] = self.turn + 1


def find_permutation(weight: Tensor, *, rounds: int = 300, seed: int = 0) -> Tensor:
    """An order of input channels that raises the magnitude kept at 2:4.

    Args:
        weight: [N, K], or [O, I, kh, kw] with groups along I at each tap.
        rounds: sets of disjoint pairs that are tried; a round takes time like N * K. Where the
            search has come to rest before, the rest is spent on kicks, kept where they help.
        seed: of pairs and kicks.

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
    generator = torch.Generator().manual_seed(seed)
    search = _Search(size, order[: whole * GROUP].view(whole, GROUP).clone(), generator)
    best, most = search.groups.clone(), search.kept()
    for _ in range(rounds):
        pairs = search.pairs()
        if pairs.numel():
            search.improve(pairs)
            continue
        if (found := search.kept()) > most:
            best, most = search.groups.clone(), found
        else:
            back = (search.groups != best).any(1)
            search.groups[back] = best[back]
            search.changed[back] = search.turn + 1
        search.kick(KICKED)
    if search.kept() > most:
        best = search.groups
    order[: whole * GROUP] = best.flatten()
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
    model: nn.Module, example_inputs: Inputs, *, rounds: int = 300, seed: int = 0
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
