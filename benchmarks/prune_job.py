"""prune_job: what `slimgemm prune` does, from a user's model and data to a saved folder."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from slimgemm import pruning, sparse_ops
from slimgemm.benchmarks.prune_check import (
    MODEL,
    PICTURE,
    REPORT,
    SEARCH,
    check_loss,
    check_out,
    check_saves,
    device_of,
    first_batch,
    make_room,
    pattern_of,
)
from slimgemm.benchmarks.user_code import told
from slimgemm.benchmarks.user_data import Made, Source
from slimgemm.pruning.inputs import run
from slimgemm.pruning.joules import measure_joules, nvml_counter
from slimgemm.pruning.latency import LatencyTable
from slimgemm.pruning.metric import value_of
from slimgemm.pruning.search_report import Found
from slimgemm.sparse_ops.swap import CONVERTERS


def packed_twin(layer: nn.Module, keep: int, group: int) -> nn.Module:
    """The packed module of a layer that is keep:group already, for a latency table.

    Raises:
        ValueError: it cannot be packed.
    """
    sparse, _ = CONVERTERS[type(layer)]
    return sparse.from_dense(layer, keep=keep, group=group)


@dataclass
class Job:
    """One `slimgemm prune`; see its options.

    Args:
        source: the user's functions.
        options: of pruning.Search, limits included.
        measured_energy: whether energy is that of the GPU's counter.
        debug: whether tracebacks are shown.
    """

    source: Source
    out: Path
    patterns: tuple[str, ...]
    multiple_of: int
    rate: float
    options: dict[str, Any]
    measured_energy: bool = False
    debug: bool = False

    def run(self, console: Console) -> sparse_ops.VerifyReport:
        """Search, pack, verify, save and report.

        Raises:
            ValueError: bad input; Infeasible where the limits cannot be met.
        """
        search = self._search(console)  # options first: they need none of the user's code
        made = self.source.load(lambda: check_out(self.out))
        device = next(made.model.parameters()).device
        if self.options["short"] or self.options["long"]:
            batch = first_batch(made.train, "training")
            check_loss(made.model, batch, made.loss, self.source.loss)
        check_saves(made.model, self.out)
        search = replace(
            search, evaluate=made.metric,
            finetune=pruning.FineTune(made.train, made.loss, self.rate),
            latency=LatencyTable(device, twin=packed_twin) if self._timed else None,
            deploy=lambda finished: self._packed(finished, made.example)[0],
            joules=self._joules(made.example, device, console) if self.measured_energy else None,
        )  # fmt: skip
        moved = make_room(self.out, search.key(made.model, made.example))
        if moved:
            console.print(moved, highlight=False, soft_wrap=True)
        with told(self.out / SEARCH, self.debug):
            return self._finish(search.run(made.model, made.example), made, console)

    def _search(self, console: Console) -> pruning.Search:
        """The search as asked, still without what the user's functions make."""
        if self.measured_energy:
            try:
                nvml_counter(device_of(self.source.device))
            except ValueError as error:
                raise ValueError(
                    f"--measured-energy cannot be had: {error}; leave it out"
                ) from error
        # A log has no progress bars, and a search may take hours.
        say = None if console.is_terminal else functools.partial(line, console)
        # What the search does not see itself, but its results depend on.
        tag = f"{self.source.tag} {self.rate}" + " measured energy" * self.measured_energy
        return pruning.Search(
            _not_yet, patterns=tuple(pattern_of(p, self.multiple_of) for p in self.patterns),
            higher_is_better=self.source.higher_is_better,
            finetune=pruning.FineTune((), _not_yet, self.rate), folder=self.out / SEARCH,
            tag=tag, show=console.is_terminal, say=say, **self.options,
        )  # fmt: skip

    @property
    def _timed(self) -> bool:
        limits = self.options
        return limits["max_latency_ms"] is not None or limits["minimise"] == "latency_ms"

    def _joules(
        self, example: Any, device: torch.device, console: Console
    ) -> Callable[[nn.Module], float]:
        """Model -> millijoules of a forward, packed as it will be saved; each is printed."""

        def measured(model: nn.Module) -> float:
            packed = self._packed(model, example)[0].eval()

            def forward() -> None:
                with torch.inference_mode():
                    run(packed, example)

            found = measure_joules(forward, device)
            line(console, f"measured energy: {found}")
            return 1e3 * found.per_call.p50

        return measured

    def _packed(self, finished: nn.Module, example: Any) -> tuple[nn.Module, Any]:
        """A packed copy, and the report of compress; None where there is nothing to pack."""
        model = copy.deepcopy(finished)
        if type(model) in CONVERTERS:  # it cannot be swapped in place
            return model, None
        patterns = [pattern_of(word, self.multiple_of) for word in self.patterns]
        masks = [p for p in patterns if isinstance(p, pruning.NofM)]
        if not masks:
            return model, None
        # The sparsest first: what keeps 1 of 4 would fit 2:4 as well, at twice the bytes.
        for pattern in sorted(masks, key=lambda p: p.keep / p.group)[:-1]:
            sparse_ops.compress(model, example, keep=pattern.keep, group=pattern.group)
        last = max(masks, key=lambda p: p.keep / p.group)
        return model, sparse_ops.compress(model, example, keep=last.keep, group=last.group)

    def _finish(self, found: Found, made: Made, console: Console) -> sparse_ops.VerifyReport:
        model, report = self._packed(found.model, made.example)
        checked = sparse_ops.verify(model, found.model, made.example)
        value = value_of(made.metric, model)
        sparse_ops.save(model, self.out / MODEL, overwrite=True)
        size = sum(path.stat().st_size for path in (self.out / MODEL).iterdir())
        summary = {**found.as_dict(), "packed": {"metric": value, "bytes_on_disk": size,
                   "verified": checked.ok}}  # fmt: skip
        (self.out / SEARCH / REPORT).write_text(json.dumps(summary, indent=1) + "\n")
        if can_draw():
            found.draw(self.out / SEARCH / PICTURE)
        patterned = found.allocation.patterns
        if report is not None and patterned:
            # Of the others the search itself has said that they stay dense.
            layers = [layer for layer in report.layers if layer.name in patterned]
            report = replace(report, layers=layers)
        checks = f"verify: {len(checked.checks)} checks, all ok" if checked.ok else str(checked)
        for text in (str(found), str(report) if report and patterned else "", checks):
            if text:
                line(console, text)
        line(
            console,
            f"Wrote {self.out / MODEL} ({size:,} bytes, metric {value:.4g}) and "
            f"{self.out / SEARCH}.",
        )
        return checked


def _not_yet(*arguments: Any) -> Any:
    """Stands for the metric and the loss while options alone are checked."""
    raise AssertionError("the search was run without the user's functions")


def line(console: Console, text: str) -> None:
    """Print as it is: no markup, no colours, no wrapping."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def can_draw() -> bool:
    """Whether matplotlib is there."""
    import importlib.util

    return importlib.util.find_spec("matplotlib") is not None
