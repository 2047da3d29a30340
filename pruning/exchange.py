"""exchange: widths go from one group to another at the same cost, as long as the metric gains.

A greedy method never takes a step back, and an even cut looks at no group. So, from an allocation
within the limits, round by round:

    every group one option wider, and every group one narrower, each alone: what it gains or loses
    pairs, one wider and one as much narrower as fits; the most promising first
    the first that is better than what the round began with is where the next begins

Candidates are cut from the dense model and tuned for `short` steps, as those of the methods are.
"""

from __future__ import annotations

from collections.abc import Callable

from slimgemm.pruning.pool import Pool
from slimgemm.pruning.space import Allocation, Space
from slimgemm.pruning.task import Task

Fits = Callable[[Allocation], bool]


def exchanged(
    task: Task, start: Allocation, fits: Fits, failed: set[str], rounds: int
) -> Allocation:
    """What the exchanges lead to; `start` where none gains.

    Args:
        fits: whether an allocation is within the limits; `start` is.
        failed: keys of allocations that did not hold what they promised.
        rounds: at most; each evaluates up to three candidates per group.
    """
    from rich.progress import Progress

    pool = Pool(task, "exchange")
    with Progress(disable=not task.show) as bar:
        line = bar.add_task("Exchange", total=rounds)
        for _ in range(rounds):
            better = _better(pool, start, fits, failed)
            if better is None:
                break
            start = better
            bar.update(line, advance=1)
    return start


def stepped(space: Space, allocation: Allocation, group: str, steps: int) -> Allocation | None:
    """With a group this many options narrower, wider if below zero; None where there is none.

    What it keeps now need not be one of its options: a cut model offers others than the dense one.
    """
    total = len(space.groups[group].units)
    now = allocation.channels.get(group, total)
    widths = [total, *space.options[group]]  # falling
    ahead = [k for k in widths if k < now] if steps > 0 else [k for k in widths[::-1] if k > now]
    if abs(steps) > len(ahead):
        return None
    channels = {**allocation.channels, group: ahead[abs(steps) - 1]}
    return Allocation({g: k for g, k in channels.items() if k < len(space.groups[g].units)},
                      allocation.patterns)  # fmt: skip


def _better(pool: Pool, start: Allocation, fits: Fits, failed: set[str]) -> Allocation | None:
    """The first candidate of a round whose drop is below that of its start."""
    space, least = pool.space, pool.drop(start)
    wider = {g: a for g in space.options if (a := stepped(space, start, g, -1)) is not None}
    narrower = {g: a for g in space.options if (a := stepped(space, start, g, 1)) is not None}
    gains = {group: least - pool.drop(allocation) for group, allocation in wider.items()}
    losses = {group: pool.drop(allocation) - least for group, allocation in narrower.items()}
    promised: list[tuple[float, Allocation]] = []
    for more, allocation in wider.items():
        if fits(allocation):
            promised.append((gains[more], allocation))
            continue
        for less in narrower:
            steps = 1
            while less != more and (pair := stepped(space, allocation, less, steps)) is not None:
                if fits(pair):
                    promised.append((gains[more] - steps * losses[less], pair))
                    break
                steps += 1
    promised = [item for item in promised if item[1].key not in failed]
    promised.sort(key=lambda item: (-item[0], item[1].key))
    for _, allocation in promised[: len(space.options)]:
        if pool.drop(allocation) < least:
            return allocation
    return None
