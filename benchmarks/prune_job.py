"""prune_job: what `slimgemm prune` does, from a user's model and data to a saved folder."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from slimgemm import pruning, sparse_ops
from slimgemm.pruning.inputs import run, to_device
from slimgemm.pruning.latency import LatencyTable
from slimgemm.pruning.search_report import Found
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
        return inputs[:rows]
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

    def __call__(self, model: nn.Module) -> float:
        """The metric of a model."""
        device = next(model.parameters()).device
        total = rows = 0.0
        for batch in self.loader:
            inputs, target = (to_device(part, device) for part in batch)
            outputs = run(model, inputs)
            if self.kind == "accuracy":
                total += float((outputs.argmax(-1) == target).sum())
                rows += target.numel()
            else:
                total += float(self.loss(outputs, target)) * len(target)
                rows += len(target)
        if not rows:
            raise ValueError("the test loader is empty")
        return total / rows * (100 if self.kind == "accuracy" else 1)


@dataclass
class Job:
    """One `slimgemm prune`; see its options.

    Args:
        make_model, make_data: the user's functions.
        named: finds the user's own metric by "module:function".
        options: of pruning.Search, limits included.
    """

    make_model: Callable[[], nn.Module]
    make_data: Callable[[], tuple[Iterable[Any], Iterable[Any]]]
    named: Callable[[str], Any]
    out: Path
    metric: str
    loss: Callable[[Any, Any], Tensor]
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
        device = torch.device(self.device)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError("device cuda asked for, torch sees no GPU")
        patterns = tuple(map(self._pattern, self.patterns))
        evaluate, higher = self._evaluate
        model = self.make_model()
        if not isinstance(model, nn.Module):
            raise ValueError(f"the model factory gave a {type(model).__name__}, not a module")
        train, test = self._loaders
        metric = evaluate or Metric(self.metric, test, self.loss)
        inputs, _ = next(iter(test))
        example = to_device(first_rows(inputs, self.rows), device)
        latency = LatencyTable(device, twin=packed_twin) if self._timed else None
        search = pruning.Search(
            metric, patterns=patterns, higher_is_better=higher, latency=latency,
            finetune=pruning.FineTune(train, self.loss, self.rate), folder=self.out / "search",
            deploy=lambda finished: self._packed(finished, example)[0],
            show=console.is_terminal, **self.options,
        )  # fmt: skip
        found = search.run(model.to(device), example)
        return self._finish(found, example, metric, console)

    @property
    def _timed(self) -> bool:
        limits = self.options
        return limits["max_latency_ms"] is not None or limits["minimise"] == "latency_ms"

    def _pattern(self, word: str) -> pruning.Channels | pruning.NofM:
        if word == "channels":
            return pruning.Channels(multiple_of=self.multiple_of)
        keep, _, group = word.partition(":")
        if not (keep.isdigit() and group.isdigit()):
            raise ValueError(f"pattern must be channels or keep:group as 2:4, got {word!r}")
        return pruning.NofM(int(keep), int(group))

    @property
    def _evaluate(self) -> tuple[Callable[[nn.Module], float] | None, bool]:
        """The user's own metric, or None; whether higher is better."""
        if self.metric in ("accuracy", "loss"):
            return None, self.metric == "accuracy"
        if ":" not in self.metric:
            raise ValueError(
                f"metric must be accuracy, loss or module:function, got {self.metric!r}"
            )
        return self.named(self.metric), True

    @property
    def _loaders(self) -> tuple[Iterable[Any], Iterable[Any]]:
        made = self.make_data()
        if not isinstance(made, (tuple, list)) or len(made) != 2:
            raise ValueError("the data factory must return (training loader, test loader)")
        for name, loader in zip(("training", "test"), made, strict=True):
            batch = next(iter(itertools.islice(loader, 1)), None)
            if not isinstance(batch, (tuple, list)) or len(batch) != 2:
                raise ValueError(f"the {name} loader must yield (inputs, target), and at least one")
        return made[0], made[1]

    def _packed(self, finished: nn.Module, example: Any) -> tuple[nn.Module, Any]:
        """A packed copy, and the report of compress."""
        model = copy.deepcopy(finished)
        if type(model) in CONVERTERS:  # it cannot be swapped in place
            return model, None
        masks = [p for p in map(self._pattern, self.patterns) if isinstance(p, pruning.NofM)]
        # The sparsest first: what keeps 1 of 4 would fit 2:4 as well, at twice the bytes.
        for pattern in sorted(masks, key=lambda p: p.keep / p.group)[:-1]:
            sparse_ops.compress(model, example, keep=pattern.keep, group=pattern.group)
        last = max(masks, key=lambda p: p.keep / p.group, default=pruning.NofM(2, 4))
        return model, sparse_ops.compress(model, example, keep=last.keep, group=last.group)

    def _finish(
        self, found: Found, example: Any, metric: Callable[[nn.Module], float], console: Console
    ) -> sparse_ops.VerifyReport:
        model, report = self._packed(found.model, example)
        checked = sparse_ops.verify(model, found.model, example)
        model.eval()
        with torch.no_grad():
            value = metric(model)
        sparse_ops.save(model, self.out / "model", overwrite=True)
        size = sum(path.stat().st_size for path in (self.out / "model").iterdir())
        summary = {**found.as_dict(), "packed": {"metric": value, "bytes_on_disk": size,
                   "verified": checked.ok}}  # fmt: skip
        (self.out / "search" / "report.json").write_text(json.dumps(summary, indent=1) + "\n")
        if _can_draw():
            found.draw(self.out / "search" / "front.png")
        for text in (found, report, checked):
            console.print(str(text), highlight=False, markup=False, soft_wrap=True)
        console.print(
            f"Wrote {self.out}/model ({size:,} bytes, metric {value:.4g}) and {self.out}/search.",
            highlight=False,
        )
        return checked


def _can_draw() -> bool:
    import importlib.util

    return importlib.util.find_spec("matplotlib") is not None
