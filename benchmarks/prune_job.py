"""prune_job: what `slimgemm prune` does, from a user's model and data to a saved folder."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from slimgemm import pruning, sparse_ops
from slimgemm.benchmarks.prune_check import (
    MODEL,
    PICTURE,
    REPORT,
    SEARCH,
    check_loaders,
    check_loss,
    check_out,
    check_saves,
    device_of,
    first_batch,
    guarded,
    make_room,
    named,
    users_code,
)
from slimgemm.kernels.formats import PATTERNS
from slimgemm.pruning.inputs import run, tensors_of, to_device
from slimgemm.pruning.latency import LatencyTable
from slimgemm.pruning.search_report import Found
from slimgemm.pruning.task import seeded
from slimgemm.sparse_ops.swap import CONVERTERS


def packed_twin(layer: nn.Module, keep: int, group: int) -> nn.Module:
    """The packed module of a layer that is keep:group already, for a latency table.

    Raises:
        ValueError: it cannot be packed.
    """
    sparse, _ = CONVERTERS[type(layer)]
    return sparse.from_dense(layer, keep=keep, group=group)


def first_rows(inputs: Any, rows: int | None) -> Any:
    """The first rows of every tensor in some inputs."""
    if isinstance(inputs, Tensor):
        return inputs[:rows] if inputs.ndim else inputs
    if isinstance(inputs, dict):
        return {key: first_rows(value, rows) for key, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return tuple(first_rows(value, rows) for value in inputs)
    return inputs


@dataclass
class Metric:
    """Accuracy in percent, or mean loss over a test loader.

    Args:
        kind: "accuracy" or "loss".
        loader: yields (inputs, target).
        loss: (outputs, target) -> scalar, a mean over rows.
    """

    kind: str
    loader: Iterable[Any]
    loss: Callable[[Any, Any], Tensor]

    def __str__(self) -> str:
        return self.kind

    def __call__(self, model: nn.Module) -> float:
        """The metric of a model.

        Raises:
            ValueError: classes and targets are not of one shape.
        """
        device = next(model.parameters()).device
        total = rows = 0.0
        for batch in self.loader:
            inputs, target = (to_device(part, device) for part in batch)
            with users_code("the model's forward of a test batch"):
                outputs = run(model, inputs)
            if self.kind == "accuracy":
                total += _right(outputs, target)
                rows += target.numel()
            else:
                total += float(self.loss(outputs, target)) * len(target)
                rows += len(target)
        if not rows:
            raise ValueError("the test loader's batches have no rows")
        return total / rows * (100 if self.kind == "accuracy" else 1)


def _right(outputs: Any, target: Any) -> float:
    """How many targets the largest outputs along the last axis are."""
    cure = "give --metric loss, or --metric module:function of your own"
    if not isinstance(outputs, Tensor) or not isinstance(target, Tensor):
        what = type(target if isinstance(outputs, Tensor) else outputs).__name__
        raise ValueError(f"accuracy compares tensors of classes, got a {what}; {cure}")
    found = outputs.argmax(-1)
    if found.shape != target.shape:
        raise ValueError(
            f"accuracy compares classes {list(found.shape)} (the largest of outputs "
            f"{list(outputs.shape)} along the last axis) with targets {list(target.shape)}; {cure}"
        )
    return float((found == target).sum())


@dataclass
class Job:
    """One `slimgemm prune`; see its options.

    Args:
        make_model, make_data, metric, loss: module:function; metric may be accuracy or loss.
        lower: whether less of the user's own metric is better.
        options: of pruning.Search, limits included.
    """

    make_model: str
    make_data: str
    out: Path
    metric: str
    lower: bool
    loss: str
    patterns: tuple[str, ...]
    multiple_of: int
    rows: int | None
    rate: float
    device: str
    options: dict[str, Any]

    def run(self, console: Console) -> sparse_ops.VerifyReport:
        """Search, pack, verify, save and report.

        Raises:
            ValueError: bad input; Infeasible where the limits cannot be met.
        """
        search = self._search(console)  # options first: they need none of the user's code
        device = device_of(self.device)
        make_model, make_data = named(self.make_model), named(self.make_data)
        loss = guarded(f"the loss {self.loss}", named(self.loss))
        own = None if self._builtin else named(self.metric)
        check_out(self.out)
        model = self._model(make_model).to(device)
        with users_code(f"the data factory {self.make_data}"), seeded(self.options["seed"]):
            made = make_data()
        train, test = check_loaders(made)
        metric = Metric(self.metric, test, loss) if own is None else guarded(
            f"the metric {self.metric}", own
        )  # fmt: skip
        example = to_device(self._example(test), device)
        if self.options["short"] or self.options["long"]:
            check_loss(model, first_batch(train, "training"), loss)
        check_saves(model, self.out)
        search = replace(
            search, evaluate=metric, finetune=pruning.FineTune(train, loss, self.rate),
            latency=LatencyTable(device, twin=packed_twin) if self._timed else None,
            deploy=lambda finished: self._packed(finished, example)[0],
        )  # fmt: skip
        moved = make_room(self.out, search.key(model, example))
        if moved:
            console.print(moved, highlight=False, soft_wrap=True)
        found = search.run(model, example)
        return self._finish(found, example, metric, console)

    def _search(self, console: Console) -> pruning.Search:
        """The search as asked, still without what the user's functions make."""
        if self.lower and self._builtin:
            raise ValueError(
                f"--lower-is-better is for a metric of your own; {self.metric} knows it"
            )
        if not self._builtin and ":" not in self.metric:
            raise ValueError(
                f"metric must be accuracy, loss or module:function, got {self.metric!r}"
            )
        # A log has no progress bars, and a search may take hours.
        say = None if console.is_terminal else functools.partial(_line, console)
        higher = not self.lower and self.metric != "loss"
        # What the search does not see itself, but its results depend on.
        tag = (self.make_model, self.make_data, self.metric, self.loss, self.rate, self.device)
        return pruning.Search(
            _not_yet, patterns=tuple(map(self._pattern, self.patterns)), higher_is_better=higher,
            finetune=pruning.FineTune((), _not_yet, self.rate), folder=self.out / SEARCH,
            tag=" ".join(map(str, tag)), show=console.is_terminal, say=say, **self.options,
        )  # fmt: skip

    @property
    def _builtin(self) -> bool:
        return self.metric in ("accuracy", "loss")

    @property
    def _timed(self) -> bool:
        limits = self.options
        return limits["max_latency_ms"] is not None or limits["minimise"] == "latency_ms"

    def _model(self, make: Callable[[], Any]) -> nn.Module:
        with users_code(f"the model factory {self.make_model}"), seeded(self.options["seed"]):
            model = make()
        if not isinstance(model, nn.Module):
            raise ValueError(f"the model factory gave a {type(model).__name__}, not a module")
        if next(model.parameters(), None) is None:
            raise ValueError("the model factory gave a module without parameters")
        return model

    def _pattern(self, word: str) -> pruning.Channels | pruning.NofM:
        if word == "channels":
            return pruning.Channels(multiple_of=self.multiple_of)
        keep, _, group = word.partition(":")
        known = [f"{keep}:{group}" for keep, group in PATTERNS]
        if word not in known:
            raise ValueError(
                f"pattern must be channels or, as keep:group, one of {', '.join(known)}; got "
                f"{word!r}"
            )
        return pruning.NofM(int(keep), int(group))

    def _example(self, test: Iterable[Any]) -> Any:
        """What a forward of a search has: the first rows of the first test batch."""
        inputs, _ = first_batch(test, "test")
        tensors = [tensor for tensor in tensors_of(inputs) if tensor.ndim]
        most = min((len(tensor) for tensor in tensors), default=0)
        if self.rows is not None and self.rows > most:
            raise ValueError(
                f"--rows {self.rows} is more than the first test batch has, which is {most}; ask "
                "for fewer, or let the test loader make larger batches"
            )
        return first_rows(inputs, self.rows)

    def _packed(self, finished: nn.Module, example: Any) -> tuple[nn.Module, Any]:
        """A packed copy, and the report of compress; None where there is nothing to pack."""
        model = copy.deepcopy(finished)
        if type(model) in CONVERTERS:  # it cannot be swapped in place
            return model, None
        masks = [p for p in map(self._pattern, self.patterns) if isinstance(p, pruning.NofM)]
        if not masks:
            return model, None
        # The sparsest first: what keeps 1 of 4 would fit 2:4 as well, at twice the bytes.
        for pattern in sorted(masks, key=lambda p: p.keep / p.group)[:-1]:
            sparse_ops.compress(model, example, keep=pattern.keep, group=pattern.group)
        last = max(masks, key=lambda p: p.keep / p.group)
        return model, sparse_ops.compress(model, example, keep=last.keep, group=last.group)

    def _finish(
        self, found: Found, example: Any, metric: Callable[[nn.Module], float], console: Console
    ) -> sparse_ops.VerifyReport:
        model, report = self._packed(found.model, example)
        checked = sparse_ops.verify(model, found.model, example)
        model.eval()
        with torch.no_grad():
            value = metric(model)
        sparse_ops.save(model, self.out / MODEL, overwrite=True)
        size = sum(path.stat().st_size for path in (self.out / MODEL).iterdir())
        summary = {**found.as_dict(), "packed": {"metric": value, "bytes_on_disk": size,
                   "verified": checked.ok}}  # fmt: skip
        (self.out / SEARCH / REPORT).write_text(json.dumps(summary, indent=1) + "\n")
        if _can_draw():
            found.draw(self.out / SEARCH / PICTURE)
        patterned = found.allocation.patterns
        if report is not None and patterned:
            # Of the others the search itself has said that they stay dense.
            layers = [layer for layer in report.layers if layer.name in patterned]
            report = replace(report, layers=layers)
        checks = f"verify: {len(checked.checks)} checks, all ok" if checked.ok else str(checked)
        for text in (str(found), str(report) if report and patterned else "", checks):
            if text:
                _line(console, text)
        _line(
            console,
            f"Wrote {self.out / MODEL} ({size:,} bytes, metric {value:.4g}) and "
            f"{self.out / SEARCH}.",
        )
        return checked


def _not_yet(*arguments: Any) -> Any:
    """Stands for the metric and the loss while options alone are checked."""
    raise AssertionError("the search was run without the user's functions")


def _line(console: Console, text: str) -> None:
    """Print as it is: no markup, no colours, no wrapping."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _can_draw() -> bool:
    import importlib.util

    return importlib.util.find_spec("matplotlib") is not None
