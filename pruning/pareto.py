"""pareto: the front of accuracy against cost, by NSGA-II of optuna.

Every group is a choice among its widths, every layer among dense and its patterns. Evenly cut
models go first, so that the front is never behind them.

Source: Deb et al. 2002, doi 10.1109/4235.996017.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from slimgemm.pruning.pool import Pool
from slimgemm.pruning.snapshot import Snapshot
from slimgemm.pruning.space import Allocation
from slimgemm.pruning.task import Limits, Task

SHARES = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75)  # of the evenly cut models that go first
WORST = 1e30  # in place of an infinite drop, which optuna would refuse


@dataclass(frozen=True)
class Pareto:
    """Options of the method.

    Args:
        trials: allocations that are tried.
        population: of a generation.
    """

    trials: int = 100
    population: int = 20

    def __post_init__(self) -> None:
        if self.trials < 1 or self.population < 2:
            raise ValueError(f"Pareto needs a trial and a population of 2 or more, got {self}")

    def begin(self, task: Task) -> ParetoSearch:
        """A search that offers one snapshot after the other."""
        return ParetoSearch(self, task)


def require_optuna() -> None:
    """Raise ValueError where optuna is missing."""
    if importlib.util.find_spec("optuna") is None:
        raise ValueError(
            "method pareto needs optuna; pip install 'slimgemm[search]', or use netadapt"
        )


class ParetoSearch:
    """The trials are made when the first snapshot is asked for."""

    def __init__(self, options: Pareto, task: Task) -> None:
        self.options, self.task = options, task
        self.pool = Pool(task, "pareto")

    def choose(self, limits: Limits, failed: set[str]) -> Snapshot:
        """The best within the limits that has not failed.

        Raises:
            Infeasible: no trial is within.
        """
        if not self.pool.tried:
            self._explore()
        return self.pool.pick(limits, failed)

    def _explore(self) -> None:
        import optuna
        from rich.progress import Progress

        task, space = self.task, self.pool.space
        sampler = optuna.samplers.NSGAIISampler(
            population_size=self.options.population, seed=task.seed
        )
        names = [*task.limits.costs] or [task.limits.minimise]
        with _quiet(optuna), Progress(disable=not task.show) as bar:
            study = optuna.create_study(sampler=sampler, directions=["minimize"] * (1 + len(names)))
            for share in SHARES:
                study.enqueue_trial(self._params(space.uniform(share)))
            line = bar.add_task("Pareto", total=self.options.trials)
            for _ in range(self.options.trials):
                trial = study.ask()
                allocation = self._allocation(trial)
                drop = min(self.pool.drop(allocation), WORST)
                costs = task.costs(space, allocation)
                study.tell(trial, [drop, *(costs.get(name) for name in names)])
                bar.update(line, advance=1)

    def _params(self, allocation: Allocation) -> dict[str, Any]:
        """An allocation as optuna's parameters."""
        space = self.pool.space
        found: dict[str, Any] = {}
        for name, options in space.options.items():
            keep = allocation.channels.get(name)
            found[name] = 0 if keep is None else 1 + options.index(keep)
        for name in space.maskable:
            found[f"pattern {name}"] = allocation.patterns.get(name, "dense")
        return found

    def _allocation(self, trial: Any) -> Allocation:
        space, channels, patterns = self.pool.space, {}, {}
        for name, options in space.options.items():
            place = trial.suggest_int(name, 0, len(options))
            if place:
                channels[name] = options[place - 1]
        for name in space.maskable:
            words = self.task.words(space, name)
            word = trial.suggest_categorical(f"pattern {name}", ["dense", *words])
            if word != "dense":
                patterns[name] = word
        return Allocation(channels, patterns)


@contextmanager
def _quiet(optuna: Any) -> Iterator[None]:
    """Warnings of optuna only; its level comes back."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(level)
