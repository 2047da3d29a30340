"""sensitivity: how much a model's metric suffers when one group or layer alone is pruned.

Channels are scanned by coupled group (one layer of a residual sum alone cannot be cut), patterns
inside a layer by layer. Every point is logged as it is found, so a scan can be killed and goes on.
The scan ignores that prunings interact; a search (pruning.search) does not.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from slimgemm.pruning.allocate import Amount, PerLayer, Setting, Units, check_share, count
from slimgemm.pruning.inputs import Inputs
from slimgemm.pruning.journal import Journal, run_key, trying
from slimgemm.pruning.layers import Layer, find_layers
from slimgemm.pruning.metric import Evaluate, dense_value_of, value_of
from slimgemm.pruning.patterns import Channels, NofM, Pattern
from slimgemm.pruning.scores import Magnitude, Score
from slimgemm.pruning.space import Allocation, Choices, Space, scores_of

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class Point:
    """One pruning of one group or layer: the dropped share that was reached, and the metric."""

    name: str
    pattern: str
    ratio: float
    value: float


@dataclass(frozen=True)
class Scan:
    """What a scan found.

    Args:
        dense: metric of the model as it is.
        points: in the order of layers, patterns and rising ratio.
        higher_is_better: of the metric.
    """

    dense: float
    points: tuple[Point, ...]
    higher_is_better: bool = True

    def drop(self, point: Point) -> float:
        """How much worse than dense a point is; negative where it is better."""
        worse = self.dense - point.value
        return worse if self.higher_is_better else -worse

    def curves(self) -> dict[tuple[str, str], list[Point]]:
        """(group or layer, pattern) -> its points by rising ratio."""
        found: dict[tuple[str, str], list[Point]] = {}
        for point in self.points:
            found.setdefault((point.name, point.pattern), []).append(point)
        return found

    def shares(self, pattern: str, max_drop: float) -> dict[str, float]:
        """Group or layer -> the largest ratio before its curve first drops by more than this."""
        chosen = {}
        for (name, word), points in self.curves().items():
            if word != pattern:
                continue
            chosen[name] = 0.0
            for point in points:
                if not self.drop(point) <= max_drop:  # also ends at NaN
                    break
                chosen[name] = point.ratio
        return chosen

    def __str__(self) -> str:
        return self.table()

    def table(self, max_drop: float | None = None) -> str:
        """A row per group or layer and pattern; with `max_drop` the share that keeps to it too."""
        from slimgemm.pruning.sensitivity_report import scan_table

        return scan_table(self, max_drop)

    def draw(self, path: str | os.PathLike[str], max_drop: float) -> None:
        """Write one picture: a curve per group or layer, and the threshold as a line."""
        from slimgemm.pruning.sensitivity_report import draw_scan

        draw_scan(self, path, max_drop)


def scan(
    model: nn.Module,
    example_inputs: Inputs,
    evaluate: Evaluate,
    *,
    patterns: Sequence[Pattern] = (Channels(),),
    ratios: Sequence[float] = RATIOS,
    score: Score | None = None,
    ignore: Sequence[str] = (),
    higher_is_better: bool = True,
    seed: int = 0,
    log: str | os.PathLike[str] | None = None,
    tag: str = "",
    show: bool = True,
    say: Callable[[str], None] | None = None,
) -> Scan:
    """Prune each group and layer alone, at each ratio, and evaluate; the model is left as it was.

    Args:
        model: trained; evaluated in evaluation mode without gradients.
        example_inputs: as for `plan`.
        evaluate: model -> metric, as accuracy in percent, or loss with higher_is_better=False.
        patterns: Channels() scans coupled groups; every other pattern scans single layers, and
            patterns that fix their share, as NofM(2, 4), have one point.
        ratios: dropped shares; a group's point carries the share that its channels allow.
        score: what goes first, as Magnitude(p=2) (the default); one that needs no data.
        ignore, seed: as for `plan`.
        log: a file of JSON lines; a scan that was killed goes on from there.
        tag: what else the metric depends on, as the names of metric and data; `log` is of this
            scan only where its tag is the same.
        show: a progress bar.
        say: told a line for each new point, as `print` for a log.

    Raises:
        ValueError: a ratio is out of range, the score needs data, nothing can be pruned, the
            metric of the dense model is not finite, or `log` is of another scan.
    """
    for ratio in ratios:
        check_share(ratio, "ratios")
    scorer = Magnitude(p=2) if score is None else score
    if scorer.needs in ("inputs", "gradients"):
        raise ValueError(f"{scorer} needs calibration data, a scan has none; use another score")
    asked = [
        patterns,
        list(ratios),
        scorer,
        list(ignore),
        higher_is_better,
        seed,
        tag,
        torch.__version__,
    ]
    journal = Journal(log, run_key(asked, model, example_inputs))
    trials = list(_trials(model, example_inputs, patterns, ratios, scorer, ignore, seed))
    from rich.progress import Progress

    points = []
    with Progress(disable=not show) as bar:
        task = bar.add_task("scan", total=len(trials) + 1)
        dense = _value(journal, "dense", lambda: dense_value_of(evaluate, model))
        bar.update(task, advance=1)
        for trial in trials:
            key = f"{trial.pattern} {trial.ratio:.6f} {trial.name}"
            known = key in journal
            value = _value(journal, key, lambda trial=trial: trial.run(evaluate))  # type: ignore
            if say is not None and not known:
                say(f"{trial.name}, {trial.pattern}, {trial.ratio:.2f} dropped: {value:.6g}")
            points.append(Point(trial.name, trial.pattern, trial.ratio, value))
            bar.update(task, advance=1, description=f"{trial.name}, {trial.pattern}")
    return Scan(dense, tuple(points), higher_is_better)


def _value(journal: Journal, key: str, find: Callable[[], float]) -> float:
    """The metric from the journal, or found and logged."""
    if key not in journal:
        with trying(key):
            journal.add(key, {"value": find()})
    return float(journal[key]["value"])


@dataclass(frozen=True)
class _Trial:
    """A pruning to evaluate."""

    name: str
    pattern: str
    ratio: float
    run: Callable[[Evaluate], float] = field(repr=False)


def _trials(
    model: nn.Module,
    example_inputs: Inputs,
    patterns: Sequence[Pattern],
    ratios: Sequence[float],
    score: Score,
    ignore: Sequence[str],
    seed: int,
) -> Iterator[_Trial]:
    for pattern in patterns:
        if isinstance(pattern, Channels):
            choices = Choices((pattern,), score, None, tuple(ignore), seed)
            yield from _group_trials(Space(model, example_inputs, choices), ratios)
            continue
        layers = [la for la in find_layers(model, ignore) if la.refusal is None]
        layers = [la for la in layers if pattern.refusal(tuple(la.weight.shape)) is None]
        if isinstance(pattern, NofM):  # it drops nothing of those with so few inputs
            layers = [la for la in layers if la.weight.shape[1] > pattern.keep]
        scores = scores_of(model, layers, example_inputs, score, seed)
        for layer in layers:
            yield from _layer_trials(model, layer, scores[layer.name], pattern, ratios)


def _group_trials(space: Space, ratios: Sequence[float]) -> Iterator[_Trial]:
    for name, group in space.groups.items():
        total = len(group.units)
        kept = sorted({_nearest(space.options[name], total, r) for r in ratios}, reverse=True)
        for keep in kept:

            def run(evaluate: Evaluate, name: str = name, keep: int = keep) -> float:
                return value_of(evaluate, space.apply(Allocation({name: keep}))[0])

            if keep < total:
                yield _Trial(name, str(space.choices.widths), 1 - keep / total, run)


def _nearest(options: Sequence[int], total: int, ratio: float) -> int:
    return min([total, *options], key=lambda keep: abs(keep - total * (1 - ratio)))


def _layer_trials(
    model: nn.Module, layer: Layer, scores: Tensor, pattern: Pattern, ratios: Sequence[float]
) -> Iterator[_Trial]:
    units = pattern.units(scores).numel()
    for ratio in (pattern.share,) if pattern.share is not None else sorted(set(ratios)):

        def run(evaluate: Evaluate, drop: int = count(units, ratio)) -> float:
            mask = pattern.mask(scores, 0 if pattern.share is not None else drop)
            weight, dense = layer.module.weight, layer.weight
            assert isinstance(weight, Tensor)
            try:
                weight.data = torch.where(mask, dense, 0.0)
                return value_of(evaluate, model)
            finally:
                weight.data = dense

        yield _Trial(layer.name, str(pattern), ratio, run)


@dataclass(frozen=True)
class Sensitivity(Amount):
    """Each group or layer alone may cost `max_drop`: its share is where its curve crosses that.

    For `plan(amount=...)`. Prunings add up, so choose `max_drop` well below what all may cost.

    Args:
        evaluate: model -> metric.
        max_drop: in units of the metric, as 1.0 for a percentage point of accuracy.
        ratios: shares that are tried.
        higher_is_better: of the metric.
        log: as for `scan`.
        show: a progress bar.
    """

    evaluate: Evaluate = field(repr=False)
    max_drop: float
    ratios: tuple[float, ...] = RATIOS
    higher_is_better: bool = True
    log: str | os.PathLike[str] | None = None
    show: bool = True

    def resolve(self, setting: Setting) -> PerLayer:
        """Scan, and answer with a share for each group or layer."""
        found = scan(
            setting.model,
            setting.example_inputs,
            self.evaluate,
            patterns=(setting.pattern,),
            ratios=self.ratios,
            score=setting.score,
            ignore=setting.ignore,
            higher_is_better=self.higher_is_better,
            seed=setting.seed,
            log=self.log,
            show=self.show,
        )
        shares = found.shares(str(setting.pattern), self.max_drop)
        return PerLayer({name.split(" + ")[0]: share for name, share in shares.items()})

    def drops(self, layers: Sequence[Units]) -> list[int]:
        """`plan` resolves this amount before it counts."""
        raise ValueError("Sensitivity must be resolved against a model; pass it to plan(amount=)")
