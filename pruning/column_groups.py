"""column_groups: columns of a weight in groups of four, moved so that 2:4 keeps more.

Two moves. A swap of column i of one group with column j of another is cheap to weigh: with t1 >= t2
the two largest of the three that stay in a row, 2:4 keeps t1 + max(t2, x) once x joins them, so

    kept = sum(t1) + (sum(t2) + sum(x) + |t2 - x|) / 2

and the 16 swaps of a pair of groups are distances of 4 by 4 vectors. A split takes the best of the
35 ways to put eight columns into two groups. `anneal` draws swaps by heat bath at a falling
temperature, which passes the local optima that swaps and splits of the best gain end in; `settle`
then takes splits until no pair of groups gains. Pairs of a round are disjoint: a round is a batch.

Sources: Pool & Yu 2021, "Channel permutations for N:M sparsity", NeurIPS (swaps, splits);
Kirkpatrick et al. 1983, "Optimization by simulated annealing", Science 220.
"""

from __future__ import annotations

import functools
from itertools import combinations

import torch
from torch import Tensor

GROUP, WINDOW = 4, 8  # columns per group, and per pair of groups
SWAPS = GROUP * GROUP
# Temperatures relative to the mean size of the gain of a swap in the order given. Above the first
# nearly every swap is taken, below the second nearly none that loses (normal and log-normal
# weights of 64 to 1024 columns).
HOT, COLD = 0.25, 0.06
LEAST_GAIN = 1e-6  # per row; below it rounding could make a search go round in circles
BATCH_BYTES = 1 << 22  # of the columns that a batch of pairs reads, so that they stay in the cache


@functools.cache
def splits() -> tuple[tuple[int, ...], ...]:
    """The 35 ways to put 8 columns into two groups; column 0 is in the first; (first, second)."""
    found = []
    for rest in combinations(range(1, WINDOW), GROUP - 1):
        first = (0, *rest)
        found.append(first + tuple(i for i in range(WINDOW) if i not in first))
    return tuple(found)


def best_splits(windows: Tensor) -> tuple[Tensor, Tensor]:
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


def two_of_others(columns: Tensor) -> tuple[Tensor, Tensor]:
    """(largest, second largest) of the three other columns of a group; [groups, 4, rows] each."""
    largest, second = [], []
    for left in range(GROUP):
        x, y, z = (columns[:, i] for i in range(GROUP) if i != left)
        high, low = torch.maximum(x, y), torch.minimum(x, y)
        largest.append(torch.maximum(high, z))
        second.append(torch.maximum(low, torch.minimum(high, z)))
    return torch.stack(largest, 1), torch.stack(second, 1)


class ColumnGroups:
    """Groups of four columns, what 2:4 keeps of each, and what it would keep after a swap.

    Args:
        size: float32 [K, rows] magnitudes, a column per row of this tensor.
        groups: int64 [groups, 4] columns; changed in place.
        seed: of pairs and swaps.
    """

    def __init__(self, size: Tensor, groups: Tensor, seed: int) -> None:
        self.size, self.groups = size, groups
        self.generator = torch.Generator().manual_seed(seed)
        self.totals = size.sum(1)
        whole, rows = groups.shape[0], size.shape[1]
        self.first = size.new_empty(whole, GROUP)  # sum over rows of the largest of the others
        self.second = size.new_empty(whole, GROUP, rows)
        self.second_sum = size.new_empty(whole, GROUP)
        self.kept_each = size.new_empty(whole)
        self.batch = max(1, BATCH_BYTES // (4 * WINDOW * rows))
        for part in torch.arange(whole).split(self.batch):
            self._read(part)

    def kept(self) -> float:
        """Magnitude that 2:4 keeps of the present groups, summed in float64."""
        parts = self.groups.split(self.batch)
        sums = [self.size[p].topk(2, dim=1).values.sum(dtype=torch.float64) for p in parts]
        return float(torch.stack(sums).sum())

    def _read(self, part: Tensor) -> None:
        """Compute anew what is known of some groups."""
        columns = self.size[self.groups[part]]
        largest, second = two_of_others(columns)
        self.first[part], self.second[part] = largest.sum(2), second
        self.second_sum[part] = second.sum(2)
        self.kept_each[part] = self.first[part, 0] + torch.maximum(second[:, 0], columns[:, 0]).sum(
            1
        )

    def swap_gains(self, a: Tensor, b: Tensor) -> Tensor:
        """float32 [pairs, 16]: gain of swapping column i of a with column j of b, at 4i + j."""
        xa, xb = self.size[self.groups[a]], self.size[self.groups[b]]
        apart = torch.cdist(self.second[a], xb, p=1) + torch.cdist(xa, self.second[b], p=1)
        of_a = 2 * self.first[a] + self.second_sum[a] + self.totals[self.groups[a]]
        of_b = 2 * self.first[b] + self.second_sum[b] + self.totals[self.groups[b]]
        after = (apart + of_a[:, :, None] + of_b[:, None, :]) / 2
        return after.flatten(1) - (self.kept_each[a] + self.kept_each[b])[:, None]

    def pairs(self) -> tuple[Tensor, Tensor]:
        """A random half of the groups, and a partner in the other half for each."""
        order = torch.randperm(self.groups.shape[0], generator=self.generator)
        half = order.numel() // 2
        return order[:half], order[half : 2 * half]

    def anneal(self, rounds: int) -> None:
        """Swaps between random pairs of groups at a falling temperature."""
        a, b = self.pairs()
        gains = [
            self.swap_gains(*p) for p in zip(a.split(self.batch), b.split(self.batch), strict=True)
        ]
        scale = float(torch.cat(gains).abs().mean())
        for turn in range(rounds):
            cold = turn / max(1, rounds - 1)
            self._round(scale * HOT ** (1 - cold) * COLD**cold)

    def _round(self, temperature: float) -> None:
        """One swap, or none, for each pair: with probability exp(gain / temperature) / sum."""
        a, b = self.pairs()
        drawn = torch.rand(a.numel(), 1 + SWAPS, generator=self.generator, dtype=torch.float64)
        # The largest of log-probabilities with Gumbel noise is a draw from them.
        noise = -(-drawn.clamp(1e-12, 1 - 1e-12).log()).log() * temperature
        parts = (t.split(self.batch) for t in (a, b, noise.to(self.size)))
        for first, second, chance in zip(*parts, strict=True):
            gains = self.swap_gains(first, second)
            stay = gains.new_zeros(gains.shape[0], 1)
            choice = (torch.cat([stay, gains], 1) + chance).argmax(1).to(first.device) - 1
            moved = choice >= 0
            if bool(moved.any()):
                self._swap(first[moved], second[moved], choice[moved])

    def _swap(self, a: Tensor, b: Tensor, choice: Tensor) -> None:
        i, j = choice // GROUP, choice % GROUP
        leaving = self.groups[a, i].clone()
        self.groups[a, i] = self.groups[b, j]
        self.groups[b, j] = leaving
        self._read(torch.cat([a, b]))

    def settle(self, rounds: int) -> None:
        """Best splits of pairs of groups, until none gains or `rounds` are over.

        Invalidates what `anneal` knows of the groups: it comes last.
        """
        whole, rows = self.groups.shape[0], self.size.shape[1]
        changed = torch.zeros(whole, dtype=torch.int64)
        seen = torch.full((whole, whole), -1)
        table = torch.tensor(splits())
        step = max(1, self.batch // 16)  # 56 pair sums and maxima are kept of every window
        for turn in range(1, rounds + 1):
            due = self._due(torch.maximum(changed[:, None], changed[None]) > seen)
            if not due.numel():
                return
            for part in due.split(step):
                windows = self.groups[part].flatten(1)
                best, gain = best_splits(self.size[windows])
                better = (gain > LEAST_GAIN * rows).cpu()
                seen[part[:, 0], part[:, 1]] = turn
                moved = windows.gather(1, table[best.cpu()])[better].view(-1, 2, GROUP)
                self.groups[part[better]] = moved
                changed[part[better].flatten()] = turn + 1

    def _due(self, due: Tensor) -> Tensor:
        """int64 [pairs, 2]: disjoint pairs of groups among those marked in [groups, groups]."""
        whole = due.shape[0]
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
