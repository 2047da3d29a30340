"""search: how much to prune where, under limits of cost and of the metric.

A method (NetAdapt, Pareto, AMC) offers an allocation; the search fine-tunes it long, beside an even
cut and what lies between (finalists.py), measures the best, and accepts it only where every limit
holds as measured. Otherwise it tightens and asks again; where it was predicted to cost more than it
does, it asks once more for what the limit really allows.
Everything found is logged, so that a killed search goes on and ends the same.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slimgemm.kernels.timing import Times
from slimgemm.pruning.allocate import Amount, PerLayer, Setting, Units
from slimgemm.pruning.amc import AMC
from slimgemm.pruning.energy import ENERGY
from slimgemm.pruning.finalists import End, best_finalist, why_not_own
from slimgemm.pruning.geometry import UNITS, Costs, ModelLatency
from slimgemm.pruning.inputs import Inputs
from slimgemm.pruning.journal import Journal, run_key, trying
from slimgemm.pruning.latency import LatencyTable
from slimgemm.pruning.metric import Evaluate
from slimgemm.pruning.netadapt import NetAdapt
from slimgemm.pruning.pareto import Pareto, require_optuna
from slimgemm.pruning.patterns import Channels, NofM, Pattern, check_whole
from slimgemm.pruning.profile import forward_times, measure_latency
from slimgemm.pruning.report import packed_patterns
from slimgemm.pruning.scores import Magnitude, Score
from slimgemm.pruning.search_report import Found, layer_rows, pace_notes, pace_of
from slimgemm.pruning.snapshot import Snapshot, load_snapshot, save_snapshot
from slimgemm.pruning.space import Allocation, Choices, Space
from slimgemm.pruning.task import (
    Infeasible,
    Limits,
    Task,
    Tune,
    check_reachable,
    differing_outputs,
)

METHODS: dict[str, Callable[[], Any]] = {"netadapt": NetAdapt, "pareto": Pareto, "amc": AMC}
JOURNAL = "candidates.jsonl"  # in the folder of a search
TRIES = 8  # allocations that are finished and measured before it gives up


@dataclass(frozen=True)
class Search(Amount):
    """Limits, a method, and what it needs. `run` answers with a finished model.

    As `plan(amount=Search(...))` it gives the allocation alone; the model is then as it was.

    Args:
        evaluate: model -> metric, a finite number for the dense model. A candidate whose metric is
            not finite loses, and the journal says so.
        max_latency_ms, max_macs, max_params, max_bytes, max_energy_mj: of one forward of the
            example inputs; any of them. Bytes are of the model as stored.
        max_drop: most that the metric may lose against dense, in its units.
        method: "netadapt", "pareto" or "amc", or its options as NetAdapt(step=0.1).
        minimise: the cost that falls where only max_drop is given: macs, params, bytes,
            moved_bytes, energy_mj or latency_ms.
        finetune: (model, steps) -> None, as FineTune(loader, loss); its random numbers are seeded.
            Where steps are 0 it is called too, as FineTune has batch-norm statistics to renew.
        short, long: steps of fine-tuning for each candidate, and at the end.
        exchange: rounds, at the end, in which widths are exchanged between groups at the same cost;
            each evaluates up to three candidates per group.
        patterns: what may be chosen: Channels() once, NofM patterns that a format packs.
        higher_is_better: of the metric.
        score, calibration, ignore, seed, energy: as for `plan`; Magnitude(p=2) by default.
        latency: where layers are measured, for a latency; else a table in the cache folder. A
            ModelLatency (profile.measure_latency) is taken as it is.
        deploy: copy of a finished model -> the model that is timed, as one that compresses it.
        joules: model -> measured millijoules of a forward; max_energy_mj is of these then.
        folder: journal, snapshots and pictures; a killed search with the same folder goes on.
        tag: what else the results depend on, as the names of metric and data; a folder is of this
            search only where its tag is the same.
        show: progress bars.
        say: told a line for each candidate and each finished model, as `print` for a log.
    """

    evaluate: Evaluate = field(repr=False)
    max_latency_ms: float | None = None
    max_macs: float | None = None
    max_params: float | None = None
    max_bytes: float | None = None
    max_energy_mj: float | None = None
    max_drop: float | None = None
    method: Any = "netadapt"
    minimise: str = "macs"
    finetune: Tune | None = None
    short: int = 0
    long: int = 0
    exchange: int = 4
    patterns: tuple[Pattern, ...] = (Channels(),)
    higher_is_better: bool = True
    score: Score = field(default_factory=lambda: Magnitude(p=2))
    calibration: Sequence[Any] | None = field(default=None, repr=False)
    ignore: Sequence[str] = ()
    seed: int = 0
    energy: str = "horowitz45"
    latency: LatencyTable | ModelLatency | None = field(default=None, repr=False)
    deploy: Callable[[nn.Module], nn.Module] | None = field(default=None, repr=False)
    joules: Callable[[nn.Module], float] | None = field(default=None, repr=False)
    folder: str | os.PathLike[str] | None = field(default=None, repr=False)
    tag: str = ""
    show: bool = field(default=True, repr=False)
    say: Callable[[str], None] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.method, str) and self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        if self.method == "pareto" or isinstance(self.method, Pareto):
            require_optuna()
        if self.energy not in ENERGY:
            raise ValueError(f"energy must be one of {', '.join(ENERGY)}, got {self.energy!r}")
        for pattern in self.patterns:
            if isinstance(pattern, NofM) and not pattern.packs:
                raise ValueError(
                    f"no format packs {pattern}, so it would save nothing; a search takes channels "
                    f"and {packed_patterns()}"
                )
        check_whole(self.short, "short", least=0)
        check_whole(self.long, "long", least=0)
        check_whole(self.exchange, "exchange", least=0)
        if (self.short or self.long) and self.finetune is None:
            raise ValueError("short and long are steps of finetune=, which is missing")
        _ = self.limits

    @property
    def limits(self) -> Limits:
        """What must hold."""
        names = ("latency_ms", "macs", "params", "bytes", "energy_mj")
        given = {name: getattr(self, f"max_{name}") for name in names}
        costs = {name: float(limit) for name, limit in given.items() if limit is not None}
        return Limits(costs, self.max_drop, self.minimise)

    @property
    def needs_latency(self) -> bool:
        """Whether layers are measured."""
        return "latency_ms" in (*self.limits.costs, self.minimise) or self.latency is not None

    def run(self, model: nn.Module, example_inputs: Inputs) -> Found:
        """Search, finish and measure; `model` is left as it was.

        Args:
            model: dense and trained.
            example_inputs: as for `plan`; costs are of one forward of these.

        Raises:
            Infeasible: a ValueError; the limits cannot be met, with the best that can.
            ValueError: nothing can be pruned, the metric of the dense model is not finite, or the
                folder is of another search.
        """
        if self.folder is not None:
            return self._run(model, example_inputs, Path(self.folder))
        with tempfile.TemporaryDirectory() as folder:
            return self._run(model, example_inputs, Path(folder))

    def _run(self, model: nn.Module, example_inputs: Inputs, folder: Path) -> Found:
        task = self._task(model, example_inputs, folder)
        space = task.dense_space
        task.dense_value = self._logged(task, "dense", task.dense_metric)
        if self.needs_latency:
            self._measure(task, space)
        if self.joules is not None:
            self._calibrate(task, space)
        check_reachable(task, space)
        try:
            return self._finish(task, space)
        except Infeasible as error:
            cure = []
            if task.limits.max_drop is not None:
                steps = f"now short={self.short} and long={self.long} steps"
                cure = [f"A larger max_drop or more training may help, {steps}"]
            raise Infeasible(". ".join([str(error), *task.lost, *cure]), error.best) from None

    def key(self, model: nn.Module, example_inputs: Inputs) -> str:
        """What the journal of this search begins with: a digest of options, model and inputs."""
        # repr leaves out what is no option: callables, data, the table, the folder.
        return run_key([repr(self), torch.__version__], model, example_inputs)

    def _task(self, model: nn.Module, example_inputs: Inputs, folder: Path) -> Task:
        choices = Choices(
            self.patterns, self.score, self.calibration, self.ignore, self.seed, ENERGY[self.energy]
        )
        task = Task(
            model, example_inputs, choices, self.evaluate, self.higher_is_better, self.finetune,
            self.short, self.long, self.limits, self.seed,
            Journal(folder / JOURNAL, self.key(model, example_inputs)), folder, self.show,
            say=self.say, exchange=self.exchange,
        )  # fmt: skip
        differs = differing_outputs(model, example_inputs)
        if differs is not None:
            task.notes.append(
                f"The model is not deterministic: two equal forwards differ {differs}. Its "
                "metric moves by chance, and a killed search may end differently"
            )
        return task

    def _logged(self, task: Task, key: str, find: Callable[[], float]) -> float:
        if key not in task.journal:
            with trying(key):
                task.journal.add(key, {"kind": key, "value": find()})
        return float(task.journal[key]["value"])

    def _measure(self, task: Task, space: Space) -> None:
        """The latency table, and a copy of it in the folder, so that a resumed search reads it."""
        own = task.folder / "latency.json"
        given = self.latency or LatencyTable(_device(task.model))
        source = given.table if isinstance(given, ModelLatency) else given
        table = LatencyTable(
            source.device, path=own, twin=source.twin, rounds=source.rounds,
            statistic=source.statistic, clock=source.clock,
        )  # fmt: skip
        if not own.is_file():
            table.times = copy.deepcopy(source.times)
        if "latency" not in task.journal:
            if isinstance(given, ModelLatency):
                latency = given
                table.save()
            else:
                latency = measure_latency(space, table)
                source.times = copy.deepcopy(table.times)
                source.save()
            fitted = [latency.us, latency.per_byte, latency.factor, latency.dense_us]
            task.journal.add("latency", {"kind": "latency", "fitted": fitted})
        task.latency = ModelLatency(table, *task.journal["latency"]["fitted"])
        space.geometry.latency = task.latency

    def _calibrate(self, task: Task, space: Space) -> None:
        """The factor from the table's energy to the measured one, on the dense model."""
        assert self.joules is not None
        joules, model = self.joules, task.model
        measured = self._logged(task, "dense energy", lambda: joules(model))
        task.energy_factor = measured / space.costs(Allocation()).energy_mj

    def _finish(self, task: Task, space: Space) -> Found:
        method = METHODS[self.method]() if isinstance(self.method, str) else self.method
        search, limits = method.begin(task), task.limits
        failed: set[str] = set()
        best: dict[str, float] = {}
        held: End | None = None
        for number in range(TRIES):
            try:
                chosen = search.choose(limits, failed)
            except Infeasible:
                if held is None:
                    raise
                break
            end = self._end(task, chosen, limits, failed, number)
            good = task.limits.held(end.measured, end.drop)
            if held is not None:  # a second one, by corrected limits
                held = end if good and end.drop < held.drop else held
                break
            if good:
                held = end
                predicted = task.costs_now(end.model, end.done.allocation.patterns)
                limits = task.limits.corrected(predicted, end.measured)
                if limits == task.limits or number + 1 == TRIES:
                    break
                continue
            best = {"drop": end.drop, **end.measured.as_dict()}
            failed |= {chosen.allocation.key, end.done.allocation.key}
            if not task.limits.met(end.measured):
                limits = limits.tightened(end.measured)
            elif limits.costs:
                break
        if held is not None:
            if held.name != "searched":
                task.notes.append(why_not_own(task, held.name, held.number))
            return self._found(task, space, held.done, held.measured, held.times)
        names = [*task.limits.costs] or [task.limits.minimise]
        shown = ", ".join(f"{best[name]:.6g} {UNITS[name]}" for name in names)
        raise Infeasible(
            f"{task.limits} cannot be met; the finished model has {shown} and a drop of "
            f"{best['drop']:.4g}",
            best,
        )

    def _end(
        self, task: Task, chosen: Snapshot, limits: Limits, failed: set[str], number: int
    ) -> End:
        """The best finalist, measured and logged."""
        name, done = self._finished(task, chosen, limits, failed, number)
        measured, times = self._measured(task, done, number)
        drop = task.drop(done.value)
        task.journal.add(
            f"finished {number}",
            {
                "kind": "finished",
                "finalist": name,
                "allocation": done.allocation.as_dict(),
                "value": done.value,
                "drop": drop,
                "costs": measured.as_dict(),
            },
        )
        return End(number, name, done, drop, measured, times)

    def _finished(
        self, task: Task, chosen: Snapshot, limits: Limits, failed: set[str], number: int
    ) -> tuple[str, Snapshot]:
        """The best model after the long fine-tuning, from its file where that is there."""
        path, key = task.folder / "finished" / f"{number}.safetensors", f"finished {number}"
        if path.is_file() and key in task.journal:
            return task.journal[key]["finalist"], load_snapshot(path, task.model)
        name, done = best_finalist(task, chosen, limits, failed, number)
        task.tell(f"finished {number}: {name}", done.value)
        save_snapshot(path, done)
        return name, done

    def _measured(self, task: Task, done: Snapshot, number: int) -> tuple[Costs, dict[str, Times]]:
        """Costs counted on the finished model itself; latency and energy as they ran."""
        costs, times = task.costs_now(done.model, done.allocation.patterns), {}
        key = f"measured {number}"
        known = task.journal.get(key, {"kind": "measured"})
        if task.latency is not None:
            if "us" not in known:
                models = {"dense": task.model, "finished": self._deployed(done.model)}
                found = forward_times(models, task.example_inputs, task.latency.table)
                known = {**known, "us": {name: list(us) for name, us in found.items()}}
            times = {name: Times(*us) for name, us in known["us"].items()}
            ms = task.latency.table.of(times["finished"]) / 1e3
            costs = replace(costs, latency_ms=ms / pace_of(task.latency, times))
        if self.joules is not None:
            if "mj" not in known:
                known = {**known, "mj": self.joules(done.model)}
            costs = replace(costs, energy_mj=float(known["mj"]))
        if key not in task.journal:
            task.journal.add(key, known)
        return costs, times

    def _deployed(self, model: nn.Module) -> nn.Module:
        return model if self.deploy is None else self.deploy(copy.deepcopy(model))

    def _found(
        self, task: Task, space: Space, done: Snapshot, measured: Costs, times: dict[str, Times]
    ) -> Found:
        predicted = task.costs_now(done.model, done.allocation.patterns)
        if done.allocation == Allocation():
            task.notes.append(f"Nothing was pruned: the dense model is within {task.limits}")
        return Found(
            model=done.model,
            allocation=done.allocation,
            dense_value=task.dense_value,
            value=done.value,
            drop=task.drop(done.value),
            dense=task.costs(space, Allocation()),
            predicted=predicted,
            measured=measured,
            times=times,
            limits=task.limits,
            records=tuple(task.journal),
            layers=layer_rows(task, space, done, self._deployed),
            notes=(*task.notes, *pace_notes(task.latency, times), *task.lost),
            groups={name: len(group.units) for name, group in space.groups.items()},
        )

    def resolve(self, setting: Setting) -> PerLayer:
        """Search with the pattern of the plan; the share of each group or layer."""
        asked = replace(
            self, patterns=(setting.pattern,), score=setting.score, ignore=setting.ignore,
            calibration=setting.calibration, seed=setting.seed,
        )  # fmt: skip
        found = asked.run(setting.model, setting.example_inputs)
        if not isinstance(setting.pattern, Channels):
            share = setting.pattern.share or 0.0
            return PerLayer({name: share for name in found.allocation.patterns})
        kept = found.allocation.channels
        return PerLayer(
            {name.split(" + ")[0]: 1 - kept[name] / found.groups[name] for name in kept}
        )

    def drops(self, layers: Sequence[Units]) -> list[int]:
        """`plan` resolves this amount before it counts."""
        raise ValueError("Search must be resolved against a model; pass it to plan(amount=)")


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
