"""amc: an agent walks over the groups, says for each how much to drop, and learns from the metric.

State of group t, each part divided by its largest: (t, n, c, h, w, stride, k, cost, cost reduced so
far, cost of the rest, last action). Action: dropped share in [0, 1]. Under a limit of cost actions
are bounded so that it can still be met, and the reward is -error; without one it is
-error * log(cost). A layer that may take a pattern is a step of its own: it does above a half.

Source: He et al. 2018, arXiv 1802.03494, sections 3.1 to 3.3 and algorithm 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from slimgemm.pruning.ddpg import Agent, Transition
from slimgemm.pruning.geometry import Costs
from slimgemm.pruning.pool import Pool
from slimgemm.pruning.snapshot import Snapshot
from slimgemm.pruning.space import Allocation
from slimgemm.pruning.task import Limits, Task

FEATURES = 11
PARTS = 1000  # of the dense cost; log(cost) is positive for any unit then


@dataclass(frozen=True)
class AMC:
    """Options of the method.

    Args:
        explore: episodes with constant noise.
        exploit: episodes after them, with noise that decays.
        sigma, decay: standard deviation of the noise, and its factor per episode of exploit.
        perfect: the metric without any error; None is 100 where higher is better (accuracy in
            percent) and 0 otherwise (a loss).
    """

    explore: int = 100
    exploit: int = 300
    sigma: float = 0.5
    decay: float = 0.99
    perfect: float | None = None

    def __post_init__(self) -> None:
        if self.explore + self.exploit < 1 or not 0 < self.decay <= 1 or self.sigma < 0:
            raise ValueError(
                f"AMC needs an episode, 0 < decay <= 1 and a sigma of 0 or more, got {self}"
            )

    def begin(self, task: Task) -> AMCSearch:
        """A search that offers one snapshot after the other."""
        return AMCSearch(self, task)


class AMCSearch:
    """The episodes are played when the first snapshot is asked for."""

    def __init__(self, options: AMC, task: Task) -> None:
        self.options, self.task = options, task
        self.pool = Pool(task, "amc")
        space = self.pool.space
        self.dense = task.costs(space, Allocation())
        self.groups = [name for name, found in space.options.items() if found]
        self.masks = [(n, words[0]) for n in space.maskable if (words := task.words(space, n))]
        self.sites = [*self.groups, *(f"{name} {word}" for name, word in self.masks)]
        self.features = self._fixed_features()
        least = {name: space.options[name][-1] for name in self.groups}
        self.least = Allocation(least, dict(self.masks))

    def choose(self, limits: Limits, failed: set[str]) -> Snapshot:
        """The best episode within the limits that has not failed.

        Raises:
            Infeasible: no episode is within.
        """
        if not self.pool.tried:
            self._play()
        return self.pool.pick(limits, failed)

    def _fixed_features(self) -> Tensor:
        """[sites, 8]: t, n, c, h, w, stride, k, cost; each divided by its largest."""
        rows = []
        sites = self.pool.space.geometry.sites
        layers = self.pool.space.geometry.layers()
        for t, name in enumerate([*self.groups, *(name for name, _ in self.masks)]):
            site = sites[name.split(" + ")[0]]
            height, width = site.input[-2:] if site.conv else (1, 1)
            stride = site.conv[0][0] if site.conv else 1
            kernel = site.weight[2] if site.conv else 1
            cost = sum(layers[layer].macs for layer in name.split(" + "))
            rows.append(
                [t + 1, site.weight[0], site.weight[1], height, width, stride, kernel, cost]
            )
        table = torch.tensor(rows, dtype=torch.float32)
        return table / table.amax(0).clamp_min(1e-12)

    def _play(self) -> None:
        from rich.progress import Progress

        options, total = self.options, self.options.explore + self.options.exploit
        agent = Agent(FEATURES, self.task.seed)
        with Progress(disable=not self.task.show) as bar:
            line = bar.add_task("AMC", total=total)
            for number in range(total):
                late = max(0, number - options.explore + 1)
                steps, allocation = self._episode(agent, options.sigma * options.decay**late)
                reward = self._reward(allocation)
                following = [*(state for state, _ in steps[1:]), None]
                agent.learn(
                    [
                        Transition(state, action, reward, after)
                        for (state, action), after in zip(steps, following, strict=True)
                    ],
                    len(steps),
                )
                bar.update(line, advance=1, description=f"AMC, reward {reward:.4g}")

    def _reward(self, allocation: Allocation) -> float:
        """-error under a limit of cost, -error * log(cost) without one."""
        self.pool.drop(allocation)
        _, value, costs = self.pool.tried[allocation.key]
        perfect = self.options.perfect
        if perfect is None:
            perfect = 100.0 if self.task.higher_is_better else 0.0
        error = abs(perfect - value) if math.isfinite(value) else 1e6
        if self.task.limits.costs:
            return -error
        share = self._work(costs)
        return -error * math.log(1 + PARTS * share)

    def _work(self, costs: Costs) -> float:
        """The limited or minimised cost as a share of dense."""
        name = next(iter(self.task.limits.costs), self.task.limits.minimise)
        return costs.get(name) / self.dense.get(name)

    def _episode(self, agent: Agent, sigma: float) -> tuple[list[tuple[Tensor, float]], Allocation]:
        """States and actions along the sites, and the allocation that they make."""
        space, task = self.pool.space, self.task
        channels: dict[str, int] = {}
        patterns: dict[str, str] = {}
        steps: list[tuple[Tensor, float]] = []
        last = 1.0
        for t, site in enumerate(self.sites):
            now = self._work(task.costs(space, Allocation(channels, patterns)))
            rest = float(self.features[t + 1 :, 7].sum() / self.features[:, 7].sum())
            state = torch.cat([self.features[t], torch.tensor([1 - now, rest, last])])
            last = agent.act(state, sigma)
            if t < len(self.groups):
                units = len(space.groups[site].units)
                options = [units, *space.options[site]]
                first = min(range(len(options)), key=lambda i: abs(options[i] - units * (1 - last)))
                keep = self._bounded(channels, patterns, site, options[first:])
                last = 1 - keep / units
                if keep < units:
                    channels[site] = keep
            else:
                name, word = self.masks[t - len(self.groups)]
                if last > 0.5 or not self._reachable(channels, patterns, site):
                    patterns[name] = word
            steps.append((state, last))
        return steps, Allocation(channels, patterns)

    def _bounded(
        self, channels: dict[str, int], patterns: dict[str, str], site: str, options: list[int]
    ) -> int:
        """The first of falling widths with which the limits can still be met; the last if none."""
        for keep in options:
            if self._reachable({**channels, site: keep}, patterns, site):
                return keep
        return options[-1]

    def _reachable(self, channels: dict[str, int], patterns: dict[str, str], site: str) -> bool:
        """Whether the limits are met with every later site at its least."""
        later = self.sites[self.sites.index(site) + 1 :]
        space = self.pool.space
        widths = {**channels, **{n: self.least.channels[n] for n in later if n in self.groups}}
        widths = {n: keep for n, keep in widths.items() if keep < len(space.groups[n].units)}
        masks = {**patterns, **{n: w for n, w in self.masks if f"{n} {w}" in later}}
        return self.task.limits.met(self.task.costs(space, Allocation(widths, masks)))
