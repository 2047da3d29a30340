"""finalists: what a method found beside plainer models of no more cost, each trained as long.

A method ranks after few steps of training, and step by step; a greedy choice of that kind may be
behind an even cut that is simply trained as long. So the end of a search is a comparison by the
metric, after equally many steps:

    searched   as the method made it, cut little by little, with the long fine-tuning
    at once    the same allocation, cut from the dense model in one go
    half way   each group between what the method keeps and what an even cut keeps
    even       every group without the same share
    exchanged  from the best of these, widths exchanged between groups (exchange.py)

Even cuts as a baseline that is hard to beat: Liu et al. 2019, arXiv 1810.05270, section 4.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

from torch import nn

from slimgemm.kernels.timing import Times
from slimgemm.pruning.exchange import exchanged
from slimgemm.pruning.geometry import Costs
from slimgemm.pruning.pool import Pool
from slimgemm.pruning.snapshot import Snapshot
from slimgemm.pruning.space import Allocation, Space
from slimgemm.pruning.task import Limits, Task

SHARES = 128  # steps of the share of an even cut
WEIGHTS = {"half way": 0.5, "even": 0.0}  # of the method's allocation


class End(NamedTuple):
    """A finished model; its number, the name of the finalist, and what it came to."""

    number: int
    name: str
    done: Snapshot
    drop: float
    measured: Costs
    times: dict[str, Times]

    @property
    def model(self) -> nn.Module:
        return self.done.model


def between(space: Space, chosen: Allocation, weight: float, share: float) -> Allocation:
    """Every group at weight * (what `chosen` keeps) + (1 - weight) * (1 - share) of its units, as
    near as its options allow; the patterns of `chosen` where anything of it is in."""
    widths = {}
    for name, options in space.options.items():
        total = len(space.groups[name].units)
        wanted = weight * chosen.channels.get(name, total) + (1 - weight) * (1 - share) * total
        best = min([total, *options], key=lambda k: abs(k - wanted))
        if best < total:
            widths[name] = best
    return Allocation(widths, chosen.patterns if weight else {})


def finalist_allocations(
    task: Task, chosen: Allocation, limits: Limits, failed: set[str]
) -> dict[str, Allocation]:
    """Name -> allocation of no more cost than asked: at once, half way, even and exchanged, as far
    as they exist and differ from those before. Without limits of cost, no dearer than `chosen`."""
    space = task.dense_space
    known = task.costs(space, chosen)

    def fits(allocation: Allocation) -> bool:
        costs = task.costs(space, allocation)
        if limits.costs:
            return limits.met(costs)
        return costs.get(limits.minimise) <= known.get(limits.minimise)

    found = {"at once": chosen}
    for name, weight in WEIGHTS.items():
        for step in range(SHARES):
            allocation = between(space, chosen, weight, step / SHARES)
            if fits(allocation):
                if allocation.key not in {*failed, *(a.key for a in found.values())}:
                    found[name] = allocation
                break
    if task.exchange and len(space.options) > 1:
        pool = Pool(task, "exchange")
        start = min(found.values(), key=pool.drop)
        allocation = exchanged(task, start, fits, failed, task.exchange)
        if allocation.key not in {a.key for a in found.values()}:
            found["exchanged"] = allocation
    return found


def best_finalist(
    task: Task, chosen: Snapshot, limits: Limits, failed: set[str], number: int
) -> tuple[str, Snapshot]:
    """The name and the model of the least drop; ties to the first. All steps of each are logged."""
    steps = chosen.trained + task.long
    makers: dict[str, Callable[[], Snapshot]] = {}

    def searched() -> Snapshot:
        model = copy.deepcopy(chosen.model)
        task.tuned(model, task.long, f"finish {number}")
        return replace(chosen, model=model, trained=steps)

    def cut(allocation: Allocation) -> Snapshot:
        model, surgery = task.dense_space.apply(allocation)
        task.tuned(model, steps, f"finish {number}")
        return Snapshot(model, surgery, allocation, math.nan, steps)

    makers["searched"] = searched
    allocations: Mapping[str, Allocation] = {"searched": chosen.allocation}
    if chosen.allocation.channels:
        others = finalist_allocations(task, chosen.allocation, limits, failed)
        if task.tune is None or chosen.trained <= task.short:
            del others["at once"]  # it is what the method made
        makers |= {name: lambda a=a: cut(a) for name, a in others.items()}  # type: ignore[misc]
        allocations = {**allocations, **others}

    best, drop, kept = "searched", math.inf, None
    for name, maker in makers.items():
        made: list[Snapshot] = []

        def make(maker: Callable[[], Snapshot] = maker, made: list[Snapshot] = made):
            made.append(maker())
            return made[0].model

        about = {"kind": "finalist", "allocation": allocations[name].as_dict(), "steps": steps}
        value = task.candidate(f"finish {number} {name}", make, about)
        if task.drop(value) < drop:
            best, drop, kept = name, task.drop(value), made[0] if made else None
    value = float(task.journal[f"finish {number} {best}"]["value"])
    return best, replace(kept or makers[best](), value=value)


def why_not_own(task: Task, name: str, number: int) -> str:
    """What is said where finalist `name` and not the method's own model is the result."""
    best, own = (
        task.drop(task.journal[f"finish {number} {n}"]["value"]) for n in (name, "searched")
    )
    how = {
        "at once": "its allocation cut in one go",
        "half way": "widths half way between its own and an even cut",
        "even": "an even cut",
        "exchanged": "widths exchanged between groups",
    }[name]
    return (
        f"The result is not the model that the method made but {how}, of no more cost and trained "
        f"as long: a drop of {best:.4g} against {own:.4g}"
    )
