"""pool: allocations of the dense model that a method has tried, and which of them to finish."""

from __future__ import annotations

from torch import nn

from slimgemm.pruning.geometry import Costs
from slimgemm.pruning.snapshot import Snapshot
from slimgemm.pruning.space import Allocation
from slimgemm.pruning.task import Infeasible, Limits, Task

REACH = 1.5  # without a limit of cost, of max_drop before the last fine-tuning, which recovers some


class Pool:
    """What was tried; each allocation is evaluated once, whoever asks how often."""

    def __init__(self, task: Task, method: str) -> None:
        self.task, self.method = task, method
        self.space = task.dense_space
        self.tried: dict[str, tuple[Allocation, float, Costs]] = {}

    def made(self, allocation: Allocation) -> nn.Module:
        """Cut and fine-tuned briefly, all over the same batches; the same bytes each time."""
        model, _ = self.space.apply(allocation)
        self.task.tuned(model, self.task.short, self.method)
        return model

    def drop(self, allocation: Allocation) -> float:
        """How much worse than dense it is."""
        costs = self.task.costs(self.space, allocation)
        about = {
            "kind": "candidate",
            "allocation": allocation.as_dict(),
            "costs": costs.as_dict(),
        }
        value = self.task.candidate(
            f"{self.method} {allocation.key}", lambda: self.made(allocation), about
        )
        self.tried[allocation.key] = (allocation, value, costs)
        return self.task.drop(value)

    def pick(self, limits: Limits, failed: set[str]) -> Snapshot:
        """Within the limits of cost the least drop; without them the least cost within reach.

        Raises:
            Infeasible: nothing that was tried is within.
        """
        left = [
            (allocation, value, costs)
            for key, (allocation, value, costs) in self.tried.items()
            if key not in failed
        ]
        dense = self.task.costs(self.space, Allocation())
        if limits.costs:
            within = [item for item in left if limits.met(item[2])]
            best = min(within, key=lambda item: self.task.drop(item[1]), default=None)
        else:
            assert limits.max_drop is not None
            reach = REACH * limits.max_drop
            within = [item for item in left if self.task.drop(item[1]) <= reach]
            best = min(within, key=lambda item: limits.work(item[2], dense), default=None)
        if best is None:
            raise self._infeasible(limits)
        allocation, value, _ = best
        model, surgery = self.space.apply(allocation)
        self.task.tuned(model, self.task.short, self.method)
        return Snapshot(model, surgery, allocation, value, self.task.short)

    def _infeasible(self, limits: Limits) -> Infeasible:
        best = {"drop": min(self.task.drop(value) for _, value, _ in self.tried.values())}
        for name in [*limits.costs] or [limits.minimise]:
            best[name] = min(costs.get(name) for _, _, costs in self.tried.values())
        shown = ", ".join(f"{name} {value:.6g}" for name, value in best.items())
        return Infeasible(
            f"{self.method} found nothing within {limits} among {len(self.tried)} allocations; let "
            "it try more (trials, episodes), use netadapt, or ask for less. The least of each, "
            f"perhaps of different ones: {shown}",
            best,
        )
