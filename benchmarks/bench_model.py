"""Whole models: dense, 2:4, channel-pruned, both; tokens or images a second, memory, joules.

The weights are random, so accuracy is no question here; outputs are: a packed model may differ
from its own weights in float64 by no more than twice what torch's dense layers with these weights
do, or it is not timed. All variants of a model are timed in turn in one process.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slimgemm import sparse_ops
from slimgemm.benchmarks import machine
from slimgemm.benchmarks.harness import Missing, first_line, keep_output
from slimgemm.benchmarks.inputs import generator
from slimgemm.benchmarks.model_check import (
    Args,
    RefusedModel,
    errors,
    exact_outputs,
    layers_of,
    loss_of,
    outputs_of,
    prune_24,
)
from slimgemm.benchmarks.peers import Peers, compiled
from slimgemm.benchmarks.records import Recorder
from slimgemm.benchmarks.rows import (
    FAILED,
    MISSING,
    REFUSED,
    SHORT,
    TIMED,
    columns,
    with_ratios,
)
from slimgemm.benchmarks.workloads import Scale, Workload, workloads
from slimgemm.kernels.reference import output_error
from slimgemm.kernels.timing import Call, Times, capture, cpu_clock, time_us

SHARE = 0.5  # of the channels that the narrow variants keep
VARIANTS = ("dense", "dense compiled", "2:4", "channels", "channels and 2:4")
ENERGY_SECONDS = 2.0
ROUNDS = 20


@dataclasses.dataclass(frozen=True)
class ModelRow:
    """One variant of one model at one workload; the order of the fields is that of the columns.

    Times are microseconds per call, as in harness.Row. weight_bytes are all parameters and
    buffers; peak_bytes is all that the variant holds (those, its inputs and cache, the state of the
    optimizer) and what a call allocates at most beside it, on a GPU only. packed_layers of
    `layers` linears and convolutions were packed: on a GPU `compress` leaves those dense that are
    faster so. Variants with "channels" keep half of the hidden units of each MLP, or half of the
    channels inside each bottleneck.
    """

    model: str
    workload: str
    dtype: str
    variant: str
    status: str
    reason: str = ""
    error: float | None = None
    allowed_error: float | None = None
    packed_layers: int | None = None
    layers: int | None = None
    weight_bytes: int | None = None
    peak_bytes: int | None = None
    eager_us_p20: float | None = None
    eager_us_p50: float | None = None
    eager_us_p80: float | None = None
    graph_us_p20: float | None = None
    graph_us_p50: float | None = None
    graph_us_p80: float | None = None
    rate_from: str = ""
    unit: str = ""
    units_per_call: int | None = None
    units_per_s: float | None = None
    joules_per_unit: float | None = None
    joules_from: str = ""
    best_dense_over_this: float | None = None

    @property
    def us(self) -> float | None:
        """The median that rates are made of."""
        return self.eager_us_p50 if self.graph_us_p50 is None else self.graph_us_p50

    @property
    def key(self) -> tuple[str, ...]:
        """What makes two rows of two runs the same measurement."""
        return (self.model, self.workload, self.dtype, self.variant)


@dataclasses.dataclass
class _Variant:
    row: ModelRow
    call: Call | None = None
    held_bytes: int = 0  # on a GPU, between calls


def training_step(model: nn.Module, args: Args) -> Call:
    """Forward, backward, AdamW."""
    model.train()
    # A rate at which thousands of steps leave the weights what they were.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=args[0].is_cuda or None)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss_of(model(args[0]), args[1]).backward()
        optimizer.step()

    return step


def inference(model: nn.Module, args: Args) -> Call:
    """A forward pass."""

    def call() -> Tensor:
        with torch.no_grad():
            return model(*args)

    return call


def _prepare(work: Workload, row: ModelRow, device: torch.device, peers: Peers) -> _Variant:
    """Build, prune, check and pack one variant.

    Raises:
        Missing, RefusedModel, or what the model raises.
    """
    before = _allocated(device)
    model = work.build(SHARE if "channels" in row.variant else 1.0)
    args = work.inputs(model, generator(device, 1))
    found: dict[str, Any] = {"layers": len(layers_of(model)), "packed_layers": 0}
    if "2:4" in row.variant:
        prune_24(model)
        dense = outputs_of(model, args, work.train)
        exact = exact_outputs(model, args, work.train)
        example = args[:1] if work.train else args
        found["packed_layers"] = len(sparse_ops.compress(model, example).packed)
        got = outputs_of(model, args, work.train)
        found["error"], found["allowed_error"] = errors(got, dense, exact)
    found["weight_bytes"] = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    if row.variant == "dense compiled":
        model = compiled(model, peers)  # type: ignore[assignment]
    call = training_step(model, args) if work.train else inference(model, args)
    call()
    return _Variant(dataclasses.replace(row, **found), call, _allocated(device) - before)


def _variant(work: Workload, row: ModelRow, device: torch.device, peers: Peers) -> _Variant:
    """_prepare, with what it raises as a row."""
    try:
        if row.variant == "dense compiled" and not peers.compiled:
            raise Missing("left out by --no-compiled")
        return _prepare(work, row, device, peers)
    except Missing as why:
        return _Variant(dataclasses.replace(row, status=MISSING, reason=str(why)))
    except RefusedModel as why:
        row = dataclasses.replace(row, status=REFUSED, reason=str(why))
        return _Variant(dataclasses.replace(row, error=why.error, allowed_error=why.allowed))
    except Exception as why:  # a model that does not fit or does not compile is a row
        return _Variant(dataclasses.replace(row, status=FAILED, reason=first_line(why)))


def _allocated(device: torch.device) -> int:
    """Bytes of all tensors on a GPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _peak(call: Call, device: torch.device) -> int:
    """Bytes that a call allocates at most."""
    before = _allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _energy(call: Call, us: float, device: torch.device) -> machine.Energy:
    """Joules of one call."""
    calls = max(1, round(ENERGY_SECONDS * 1e6 / us))

    def work() -> None:
        for _ in range(calls):
            call()
        torch.cuda.synchronize(device)

    joules, source = machine.joules_of(work, device)
    return machine.Energy(None if joules is None else joules / calls, source)


def _replays(passed: Sequence[_Variant], device: torch.device) -> dict[str, Call]:
    """Replays of the variants that can be captured; the others say why not.

    What a replay of a packed model gives must be what was checked before: both are within their
    tolerance of the exact output, so at most twice that apart.
    """
    found: dict[str, Call] = {}
    for one in passed:
        assert one.call is not None
        outputs: list[Tensor] = []
        try:
            graph = capture([functools.partial(keep_output, outputs, one.call)], device)
            graph.replay()
            apart = output_error(outputs[-1], one.call().double())
        except RuntimeError as error:
            one.row = dataclasses.replace(one.row, reason=f"no graph: {first_line(error)}")
            continue
        most = one.row.allowed_error
        if most is None or apart <= 2 * most:
            found[one.row.variant] = graph.replay
            continue
        why = f"as a CUDA graph {apart:.2e} from the checked output; not timed"
        one.row, one.call = dataclasses.replace(one.row, status=REFUSED, reason=why), None
    return found


def _timed(
    one: _Variant, work: Workload, eager: Mapping[str, Times], graph: Mapping[str, Times]
) -> ModelRow:
    called, replayed = eager[one.row.variant], graph.get(one.row.variant)
    return dataclasses.replace(
        one.row,
        **columns("eager", called),
        **columns("graph", replayed),
        rate_from="graph" if replayed else "eager",
        unit=work.unit,
        units_per_call=work.units,
        units_per_s=work.units / (replayed or called).p50 * 1e6,
        joules_from="missing: no GPU",
    )


def _with_gpu(one: _Variant, replay: Call | None, device: torch.device, units: int) -> ModelRow:
    """The row of a timed variant with memory and joules."""
    row, call = one.row, one.call
    assert call is not None and row.us is not None
    joules, source = _energy(replay or call, row.us, device)
    return dataclasses.replace(
        row,
        peak_bytes=one.held_bytes + _peak(call, device),
        joules_per_unit=None if joules is None else joules / units,
        joules_from=source,
    )


def measure_model(
    work: Workload,
    dtype: torch.dtype,
    device: torch.device,
    peers: Peers,
    rounds: int = ROUNDS,
) -> list[ModelRow]:
    """One row for each of VARIANTS; only those that passed their check are timed."""
    empty = [ModelRow(work.model, work.name, SHORT[dtype], name, TIMED) for name in VARIANTS]
    found = [_variant(work, row, device, peers) for row in empty]
    passed = [one for one in found if one.call is not None]
    calls = {one.row.variant: one.call for one in passed if one.call is not None}
    if not calls:
        return [one.row for one in found]
    gpu = device.type == "cuda"
    eager = time_us(calls, device, rounds=rounds, clock=cpu_clock())
    # Optimizers keep steps on the host: a training step is timed as it is called.
    replays = _replays(passed, device) if gpu and not work.train else {}
    graph = time_us(replays, device, rounds=rounds) if replays else {}
    for one in passed:
        if one.call is None:  # refused as a graph
            continue
        one.row = _timed(one, work, eager, graph)
        if gpu:
            replay = replays.get(one.row.variant)
            one.row = _with_gpu(one, replay, device, work.units)
    return with_ratios([one.row for one in found], lambda row: row.variant.startswith("dense"))


def run_models(
    scale: Scale,
    dtypes: Sequence[torch.dtype],
    device: torch.device,
    recorder: Recorder,
    peers: Peers,
    *,
    seconds: float | None = None,
    on_rows: Callable[[list[ModelRow]], None] = lambda rows: None,
    rounds: int = ROUNDS,
    started: float | None = None,
) -> Recorder:
    """Measure every workload and record it after each; none is begun `seconds` after `started`."""
    started = time.monotonic() if started is None else started
    for dtype in dtypes:
        for work in workloads(scale, dtype, device):
            if seconds is not None and time.monotonic() - started > seconds:
                recorder.head["ended"] = f"after {seconds:g} s, before {work.model} {work.name}"
                recorder.add([])
                return recorder
            with torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=False):
                rows = measure_model(work, dtype, device, peers, rounds)
            recorder.add(rows)
            on_rows(rows)
    return recorder
