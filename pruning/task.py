"""task: what every search method shares: limits, the metric, seeded fine-tuning, the journal."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from slimgemm.pruning.channels import Surgery
from slimgemm.pruning.coupling import without
from slimgemm.pruning.geometry import UNITS, Costs, Geometry, ModelLatency
from slimgemm.pruning.inputs import Inputs, evaluating, run, tensors_of
from slimgemm.pruning.journal import Journal, trying
from slimgemm.pruning.latency import packed_wins
from slimgemm.pruning.metric import Evaluate, dense_value_of, name_of, value_of
from slimgemm.pruning.plan import layer_seed
from slimgemm.pruning.space import Allocation, Choices, Space

SLACK = 0.03  # of a cost: what measuring again may move it by
WORDS = 80  # characters of a line that name a candidate
Tune = Callable[[nn.Module, int], None]


class Infeasible(ValueError):
    """Limits that cannot be met.

    Args:
        message: what cannot be met, and the best that can.
        best: name of a cost, or "drop" -> the best that was reached.
    """

    def __init__(self, message: str, best: Mapping[str, float]) -> None:
        super().__init__(message)
        self.best = dict(best)


@dataclass(frozen=True)
class Limits:
    """What must hold.

    Args:
        costs: name of a cost (see geometry.Costs) -> most of it.
        max_drop: most that the metric may lose against dense, in its units; None for any.
        minimise: the cost that falls where there is no limit of cost.
    """

    costs: Mapping[str, float]
    max_drop: float | None = None
    minimise: str = "macs"

    def __post_init__(self) -> None:
        if not self.costs and self.max_drop is None:
            raise ValueError("a search needs a limit: max_latency_ms, max_macs, max_drop, ...")
        for name, limit in self.costs.items():
            if not limit > 0:
                raise ValueError(f"max_{name} must be positive, got {limit}")
        if self.max_drop is not None and not self.max_drop >= 0:
            raise ValueError(f"max_drop must be 0 or more, got {self.max_drop}")
        if self.minimise not in UNITS:
            raise ValueError(f"minimise must be one of {', '.join(UNITS)}, got {self.minimise!r}")

    def work(self, costs: Costs, dense: Costs) -> float:
        """What must fall: sum of cost / limit where above the limit, or the minimised cost."""
        if not self.costs:
            return costs.get(self.minimise) / dense.get(self.minimise)
        return sum(max(costs.get(name) / limit, 1.0) for name, limit in self.costs.items())

    def met(self, costs: Costs) -> bool:
        """Whether every limit of cost holds."""
        return all(costs.get(name) <= limit for name, limit in self.costs.items())

    def held(self, costs: Costs, drop: float) -> bool:
        """Whether every limit holds, that of the metric too."""
        most = math.inf if self.max_drop is None else self.max_drop
        return self.met(costs) and drop <= most and math.isfinite(drop)

    def tightened(self, costs: Costs, margin: float = 0.01) -> Limits:
        """Lower by as much as these measured costs are above, and a little more."""
        scaled = {
            name: limit * min(1.0, limit / costs.get(name) * (1 - margin))
            if costs.get(name) > limit
            else limit
            for name, limit in self.costs.items()
        }
        return replace(self, costs=scaled)

    def corrected(self, predicted: Costs, measured: Costs) -> Limits:
        """Higher by as much as these measured costs are below what was predicted, less a little.

        As it is where the model is within SLACK of the limits, or was predicted about as well.
        """

        def correct(name: str, limit: float) -> float:
            found, said = measured.get(name), predicted.get(name)
            if found >= limit * (1 - SLACK) or said <= found * (1 + SLACK):
                return limit
            return limit * said / found * 0.99

        return replace(self, costs={name: correct(name, c) for name, c in self.costs.items()})

    def __str__(self) -> str:
        parts = [f"{limit:g} {UNITS[name]}" for name, limit in self.costs.items()]
        parts += [] if self.max_drop is None else [f"a drop of {self.max_drop:g}"]
        return " and ".join(parts)


@dataclass
class Task:
    """One search.

    Args:
        model: dense, trained; never changed.
        example_inputs, choices, latency: see Space.
        evaluate, higher_is_better: the metric.
        tune: (model, steps), or None where nothing is fine-tuned.
        short, long: steps after each candidate, and at the end.
        limits, seed, journal, folder: as asked; folder holds snapshots.
        dense_value: the metric of `model`.
        energy_factor: measured / predicted energy of `model`; 1 where none is measured.
        show: progress bars.
        say: told a line for each candidate, or None.
        exchange: rounds of exchange among the finalists.
    """

    model: nn.Module
    example_inputs: Inputs
    choices: Choices
    evaluate: Evaluate
    higher_is_better: bool
    tune: Tune | None
    short: int
    long: int
    limits: Limits
    seed: int
    journal: Journal
    folder: Path
    show: bool
    latency: ModelLatency | None = None
    dense_value: float = float("nan")
    energy_factor: float = 1.0
    notes: list[str] = field(default_factory=list)
    say: Callable[[str], None] | None = None
    exchange: int = 0

    @functools.cached_property
    def dense_space(self) -> Space:
        """What can be chosen for the dense model; traced once."""
        return Space(self.model, self.example_inputs, self.choices, self.latency)

    def space(self, model: nn.Module, surgery: Surgery | None) -> Space:
        """What can be chosen for a model that was cut from the dense one."""
        known = self.dense_space.coupling
        known = known if surgery is None else without(known, surgery.slices)
        return Space(model, self.example_inputs, self.choices, self.latency, known)

    def geometry(self, model: nn.Module) -> Geometry:
        """Shapes and costs of a model as it is; nothing is traced."""
        energy = self.choices.energy
        return Geometry(model, self.example_inputs, None, energy, self.latency)

    def costs_now(self, model: nn.Module, patterns: Mapping[str, str]) -> Costs:
        """Predicted costs of a model as it is, its layers with these patterns."""
        masks = {name: self.choices.masks[word] for name, word in patterns.items()}
        return self.scaled(self.geometry(model).costs((), masks))

    def costs(self, space: Space, allocation: Allocation) -> Costs:
        """Predicted costs; energy in the units of what was measured."""
        return self.scaled(space.costs(allocation))

    def scaled(self, costs: Costs) -> Costs:
        """Costs with the energy factor in."""
        return replace(costs, energy_mj=costs.energy_mj * self.energy_factor)

    @property
    def metric(self) -> str:
        """What messages call the metric."""
        return name_of(self.evaluate)

    def value(self, model: nn.Module) -> float:
        """The metric of a model; ValueError where it gave no number."""
        return value_of(self.evaluate, model)

    def dense_metric(self) -> float:
        """The metric of the dense model; ValueError where it is not finite."""
        return dense_value_of(self.evaluate, self.model)

    def drop(self, value: float) -> float:
        """How much worse than dense; infinite where the metric is not finite."""
        if not math.isfinite(value):
            return math.inf
        worse = self.dense_value - value
        return worse if self.higher_is_better else -worse

    @property
    def lost(self) -> list[str]:
        """A line on candidates that lost since their metric is not finite; none where none did."""
        count = sum("lost" in record for record in self.journal)
        return [f"{count} candidates lost: their {self.metric} is not finite"] * bool(count)

    def tuned(self, model: nn.Module, steps: int, tag: str) -> None:
        """Fine-tune in place; the same tag gives the same batches, whenever it runs.

        No steps are asked for too: FineTune then finds the batch-norm statistics anew.
        """
        if self.tune is None:
            return
        with seeded(layer_seed(self.seed, tag) % 2**32):
            self.tune(model, steps)

    def candidate(self, key: str, make: Callable[[], nn.Module], about: dict) -> float:
        """The metric of a fine-tuned candidate, from the journal or found and logged."""
        if key not in self.journal:
            with trying(key):
                value = self.value(make())
            lost = {} if math.isfinite(value) else {"lost": f"the metric {self.metric} is {value}"}
            self.journal.add(key, {**about, "value": value, **lost})
            self.tell(key, value)
        return float(self.journal[key]["value"])

    def tell(self, what: str, value: float) -> None:
        """Say what was just evaluated, with its metric."""
        if self.say is not None:
            short = what if len(what) <= WORDS else what[: WORDS - 3] + "..."
            drop = "lost" if not math.isfinite(value) else f"drop {self.drop(value):.4g}"
            self.say(f"{short}: {self.metric} {value:.6g}, {drop}")

    def words(self, space: Space, name: str) -> list[str]:
        """Patterns that a layer may take: where both were measured, only those that win."""
        words = space.maskable.get(name, [])
        if self.latency is None:
            return words
        table = self.latency.table
        site = space.geometry.sites[name]
        known = table.times.get(site.signature, {})
        width = (site.weight[0], site.weight[1])
        return [w for w in words if w in known and packed_wins(table, site, w, [width])]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Python's, NumPy's and torch's random numbers from a seed; what they were comes back."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices):
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def differing_outputs(model: nn.Module, example_inputs: Inputs) -> str | None:
    """How two forwards of the same inputs differ, or None where they are the same bytes."""
    outputs = []
    for seed in (0, 1):
        with evaluating(model), torch.no_grad():
            torch.manual_seed(seed)
            outputs.append([t.clone() for t in tensors_of(run(model, example_inputs))])
    worst = 0.0
    for a, b in zip(*outputs, strict=True):
        if a.shape != b.shape:
            return f"outputs of shape {list(a.shape)} and {list(b.shape)}"
        if not torch.equal(a, b):
            worst = max(worst, float((a.double() - b.double()).abs().max()))
    return f"by up to {worst:.3g}" if worst else None


def check_reachable(task: Task, space: Space) -> None:
    """Raise Infeasible where even the least allocation is above a limit."""
    masks = {name: words[0] for name in space.maskable if (words := task.words(space, name))}
    both = [task.costs(space, space.least({})), task.costs(space, space.least(masks))]
    for name, limit in task.limits.costs.items():
        least = min(costs.get(name) for costs in both)
        if least > limit:
            dense = task.costs(space, Allocation()).get(name)
            raise Infeasible(
                f"max_{name}={limit:g} cannot be reached: dense the model takes {dense:.6g} "
                f"{UNITS[name]}, with every group at its floor {least:.6g}; ask for that or more",
                {name: least},
            )
