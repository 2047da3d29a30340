"""netadapt: step by step, the group that costs least accuracy for the same saving.

    step i: every group is cut just enough to save step * decay**i of the dense cost, every layer
            may take its pattern; each candidate is fine-tuned briefly; the best goes on

Candidates are compared by what the metric loses per saving, as a pattern saves what it saves. The
loss is against the uncut model of the step, fine-tuned over the very batches that candidates see:
what all gain by training, and the luck of the batches, is then in no comparison.

Without a limit of cost, where no step is within the drop, it begins again with half the step.

Source: Yang et al. 2018, arXiv 1804.03230, algorithm 1.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from slimgemm.pruning.snapshot import Snapshot, compose, load_snapshot, save_snapshot
from slimgemm.pruning.space import Allocation, Space
from slimgemm.pruning.task import Infeasible, Limits, Task

LEAST_SAVING = 0.2  # of a step's saving: a pattern that saves less is no candidate
ROUNDING = 1e-9  # of a saving
REACH = 1.5  # without a limit of cost, steps go on to this much of max_drop; the end recovers some
HALVINGS = 4  # of the step, where even the first one loses too much: 0.08 becomes 0.005 at last


@dataclass(frozen=True)
class NetAdapt:
    """Options of the method.

    Args:
        step: share of the dense cost that the first step saves; halved up to four times where
            only max_drop limits and nothing is within it.
        decay: factor on that share from step to step.
        most_steps: after which it gives up.
    """

    step: float = 0.08
    decay: float = 0.97
    most_steps: int = 200

    def __post_init__(self) -> None:
        if not 0 < self.step < 1 or not 0 < self.decay <= 1 or self.most_steps < 1:
            raise ValueError(
                f"NetAdapt needs 0 < step < 1, 0 < decay <= 1 and a step or more, got {self}"
            )

    def begin(self, task: Task) -> NetAdaptSearch:
        """A search that offers one snapshot after the other."""
        return NetAdaptSearch(self, task)


@dataclass(frozen=True)
class _Candidate:
    site: str
    channels: dict[str, int]
    patterns: dict[str, str]
    saving: float


class NetAdaptSearch:
    """The steps so far; `choose` makes more where it needs them."""

    def __init__(self, options: NetAdapt, task: Task) -> None:
        self.options, self.task = options, task
        self.steps: list[tuple[Allocation, float]] = []  # after each step
        self._halvings = 0
        self._made_steps: list[str] = []  # keys, those before a halving too
        self._last: Snapshot | None = None
        self._dense = task.costs(task.dense_space, Allocation())

    def choose(self, limits: Limits, failed: set[str]) -> Snapshot:
        """The snapshot to finish: the first that meets the limits, or the furthest within reach.

        Where none is within reach, the steps begin again, half as long.

        Args:
            limits: perhaps tighter than the task's.
            failed: keys of allocations that did not hold what they promised.

        Raises:
            Infeasible: no step meets the limits.
        """
        while True:
            while not self._enough(limits, failed):
                if len(self.steps) == self.options.most_steps or not self._advance(limits):
                    break
            if limits.met(self._dense) and limits.costs and Allocation().key not in failed:
                return self._snapshot(-1)
            if limits.costs:
                place = self._first_that_meets(limits, failed)
            else:
                place = self._furthest_within(limits, failed)
            if place is not None:
                return self._snapshot(place)
            if limits.costs or self._halvings == HALVINGS:
                raise self._infeasible(limits)
            self._halvings, self.steps, self._last = self._halvings + 1, [], None

    def _enough(self, limits: Limits, failed: set[str]) -> bool:
        if limits.costs:
            if limits.met(self._dense) and Allocation().key not in failed:
                return True
            return self._first_that_meets(limits, failed) is not None
        assert limits.max_drop is not None
        return bool(self.steps) and self.task.drop(self.steps[-1][1]) > REACH * limits.max_drop

    def _first_that_meets(self, limits: Limits, failed: set[str]) -> int | None:
        for place, (allocation, _) in enumerate(self.steps):
            costs = self.task.journal[self._key(place)]["costs"]
            if allocation.key not in failed and all(
                costs[name] <= limit for name, limit in limits.costs.items()
            ):
                return place
        return None

    def _furthest_within(self, limits: Limits, failed: set[str]) -> int | None:
        assert limits.max_drop is not None
        for place in range(len(self.steps) - 1, -1, -1):
            allocation, value = self.steps[place]
            if allocation.key not in failed and self.task.drop(value) <= REACH * limits.max_drop:
                return place
        return None

    def _infeasible(self, limits: Limits) -> Infeasible:
        steps = [self.task.journal[key] for key in self._made_steps]
        best = {"drop": min((self.task.drop(step["value"]) for step in steps), default=0.0)}
        reached = [step["costs"] for step in steps] or [self._dense.as_dict()]
        names = [*limits.costs] or [limits.minimise]
        best |= {name: min(costs[name] for costs in reached) for name in names}
        shown = ", ".join(f"{name} {value:.6g}" for name, value in best.items())
        return Infeasible(
            f"NetAdapt cannot meet {limits}; the least of each that it reached, perhaps after "
            f"different steps: {shown}",
            best,
        )

    def _key(self, place: int) -> str:
        return f"step {place}" + f" at 1/{2**self._halvings}" * bool(self._halvings)

    def _path(self, place: int) -> Path:
        tail = f"-{2**self._halvings}" * bool(self._halvings)
        return self.task.folder / "steps" / f"{place:03d}{tail}.safetensors"

    def _snapshot(self, place: int) -> Snapshot:
        if place < 0:
            return Snapshot(self.task.model, None, Allocation(), self.task.dense_value)
        if place == len(self.steps) - 1 and self._last is not None:
            return self._last
        return load_snapshot(self._path(place), self.task.model)

    def _advance(self, limits: Limits) -> bool:
        """One step; False where nothing saves any more."""
        place, journal = len(self.steps), self.task.journal
        key = self._key(place)
        if key not in journal:
            before = self._snapshot(place - 1)
            space = self.task.space(before.model, before.surgery)
            found = list(self._candidates(space, before, place, limits, self._halvings))
            if not found:
                return False
            if place == 0 and self._halvings:
                longer = self._candidates(space, before, 0, limits, self._halvings - 1)
                if found == list(longer):  # they are known to lose too much
                    return False
            after = self._best(space, before, found, place)
            if after is None:
                return False
            save_snapshot(self._path(place), after)
            self._last = after
            costs = self.task.costs_now(after.model, after.allocation.patterns)
            journal.add(
                key,
                {
                    "kind": "step",
                    "allocation": after.allocation.as_dict(),
                    "value": after.value,
                    "drop": self.task.drop(after.value),
                    "costs": costs.as_dict(),
                    "work": limits.work(costs, self._dense),
                },
            )
        else:
            self._last = None
        record = journal[key]
        self._made_steps.append(key)
        self.steps.append((Allocation.from_dict(record["allocation"]), float(record["value"])))
        return True

    def _candidates(
        self, space: Space, before: Snapshot, place: int, limits: Limits, halvings: int
    ) -> Iterator[_Candidate]:
        masks = dict(before.allocation.patterns)
        scale = limits.work(self._dense, self._dense)

        def work(channels: dict[str, int], patterns: dict[str, str]) -> float:
            return limits.work(self.task.costs(space, Allocation(channels, patterns)), self._dense)

        now = work({}, masks)
        goal = scale * self.options.step * self.options.decay**place / 2**halvings
        if limits.costs:  # the last step goes no further than to the limits, where work ends
            goal = min(goal, now - len(limits.costs)) - ROUNDING
        for name, options in space.options.items():
            saving = 0.0
            chosen = None
            for keep in options:
                saving, chosen = now - work({name: keep}, masks), keep
                if saving >= goal:
                    break
            if chosen is not None and saving > 0:
                yield _Candidate(name, {name: chosen}, masks, saving)
        for name in space.maskable:
            for word in self.task.words(space, name):
                if name in masks:
                    continue
                patterns = {**masks, name: word}
                saving = now - work({}, patterns)
                if saving >= LEAST_SAVING * goal:
                    yield _Candidate(f"{name} {word}", {}, patterns, saving)

    def _best(
        self, space: Space, before: Snapshot, found: list[_Candidate], place: int
    ) -> Snapshot | None:
        """Evaluate every candidate, and keep the model of the cheapest; ties to the first.

        None where the metric of each is not finite.
        """
        from rich.progress import Progress

        task, price = self.task, math.inf
        best: _Candidate | None = None
        kept: Snapshot | None = None
        uncut = task.drop(self._uncut(before, place))
        with Progress(disable=not task.show) as bar:
            line = bar.add_task(f"NetAdapt {self._key(place)}", total=len(found))
            for candidate in found:
                made: list[Snapshot] = []

                def make(
                    candidate: _Candidate = candidate, made: list[Snapshot] = made
                ) -> nn.Module:
                    made.append(self._made(space, before, candidate, place))
                    return made[0].model

                about = {
                    "kind": "candidate",
                    "site": candidate.site,
                    "allocation": self._allocation(before, candidate).as_dict(),
                    "saving": candidate.saving,
                }
                key = f"{self._key(place)} {candidate.site}"
                value = task.candidate(key, make, about)
                mine = _price(task.drop(value) - uncut, candidate.saving)
                if mine < price:
                    best, price, kept = candidate, mine, made[0] if made else None
                bar.update(line, advance=1)
        if best is None:
            return None
        value = float(task.journal[f"{self._key(place)} {best.site}"]["value"])
        if kept is None:
            kept = self._made(space, before, best, place)
        return replace(kept, value=value)

    def _uncut(self, before: Snapshot, place: int) -> float:
        """The metric of the step's model, trained as its candidates are."""
        if self.task.tune is None or self.task.short < 1:
            return before.value

        def make() -> nn.Module:
            model = copy.deepcopy(before.model)
            self.task.tuned(model, self.task.short, f"step {place}")
            return model

        return self.task.candidate(f"{self._key(place)} uncut", make, {"kind": "uncut"})

    def _allocation(self, before: Snapshot, candidate: _Candidate) -> Allocation:
        channels = {**before.allocation.channels, **candidate.channels}
        return Allocation(channels, candidate.patterns)

    def _made(self, space: Space, before: Snapshot, candidate: _Candidate, place: int) -> Snapshot:
        """The candidate cut and fine-tuned; the same bytes whenever it is made."""
        model, surgery = space.apply(Allocation(candidate.channels, candidate.patterns))
        self.task.tuned(model, self.task.short, f"step {place}")
        whole = compose(before.surgery, surgery)
        allocation = self._allocation(before, candidate)
        return Snapshot(model, whole, allocation, float("nan"), before.trained + self.task.short)


def _price(loss: float, saving: float) -> float:
    """What the metric loses per saving; where it gains, the more of both the better."""
    return loss / saving if loss > 0 else loss * saving
