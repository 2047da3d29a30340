"""Packed layers on a CPU beside the dense ones: checked, then timed in interleaved rounds.

python -m slimgemm.benchmarks.bench_cpu --threads 1 2 --out benchmarks/results/cpu_layers.json

The target is at most 1.3 of the dense time from 256 rows up, in the forward.

With one thread the clock is the CPU time of that thread, which other processes on the machine do
not lengthen by taking turns; with several it is the wall, and the machine must be idle.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from slimgemm.benchmarks import machine
from slimgemm.benchmarks.cli_bench import command_of
from slimgemm.kernels.reference import allowed_error, output_error, prune_dense_24_ref
from slimgemm.kernels.timing import Times, percentiles
from slimgemm.sparse_ops import SparseConv2d24, SparseLinear24

FEATURES, ROWS = (256, 1024, 4096), (256, 1024)
LEAST_ROUNDS, MOST_ROUNDS = 15, 300


class Case(NamedTuple):
    """One comparison: what is timed, and the two layers with an input for both."""

    name: str
    dense: nn.Module
    packed: nn.Module
    x: Tensor
    training: bool


def linear_pair(features: int) -> tuple[nn.Linear, SparseLinear24]:
    """A square dense layer that is 2:4, and its packed twin."""
    dense = nn.Linear(features, features)
    dense.weight.data = prune_dense_24_ref(dense.weight.data)
    return dense, SparseLinear24.from_dense(dense)


def conv_pair(channels: int) -> tuple[nn.Conv2d, SparseConv2d24]:
    """A dense 3 x 3 convolution that is 2:4 along its input channels, and its packed twin."""
    dense = nn.Conv2d(channels, channels, 3, padding=1)
    taps = dense.weight.data.permute(0, 2, 3, 1)
    kept = prune_dense_24_ref(taps.reshape(-1, channels)).view(taps.shape)
    dense.weight.data = kept.permute(0, 3, 1, 2).contiguous()
    return dense, SparseConv2d24.from_dense(dense)


def cases(largest: int) -> Iterator[Case]:
    """The recorded comparisons of layers with at most `largest` features."""
    torch.manual_seed(0)
    for features in (f for f in FEATURES if f <= largest):
        dense, packed = linear_pair(features)
        for rows in ROWS:
            x = torch.randn(rows, features)
            name = f"{features} features, {rows} rows, fp32"
            yield Case(f"linear forward, {name}", dense, packed, x, False)
            if features * rows < 2**20:
                x = torch.randn(rows, features)
                yield Case(f"linear forward and backward, {name}", dense, packed, x, True)
    dense_conv, packed_conv = conv_pair(64)
    x, name = torch.randn(8, 64, 16, 16), "64 to 64 channels, 3x3, 8 images of 16x16, fp32"
    yield Case(f"conv2d forward, {name}", dense_conv, packed_conv, x, False)


def result_of(layer: nn.Module, x: Tensor, training: bool) -> Tensor:
    """The output of a forward, or the input gradient of a training step."""
    if not training:
        with torch.no_grad():
            return layer(x)
    x.grad = None
    layer(x.requires_grad_()).sum().backward()
    assert x.grad is not None
    return x.grad


def check(case: Case) -> None:
    """Raise AssertionError unless the packed layer is as exact as the dense one."""
    dense = result_of(case.dense, case.x, case.training)
    packed = result_of(case.packed, case.x, case.training)
    wide = case.dense.to(torch.float64)
    exact = result_of(wide, case.x.detach().double(), case.training)
    case.dense.to(torch.float32)
    error, allowed = output_error(packed, exact), allowed_error(dense, exact)
    if not error <= allowed:
        raise AssertionError(f"{case.name}: error {error:.2e} > {allowed:.2e}; not timed")


def times_of(calls: dict[str, Callable[[], Tensor]], rounds: int, threads: int) -> dict[str, Times]:
    """Microseconds of each call, in turn in every round, after two rounds that are thrown away."""
    clock = time.thread_time_ns if threads == 1 else time.perf_counter_ns
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 2):
        for name, call in calls.items():
            start = clock()
            call()
            us = (clock() - start) / 1e3
            if turn >= 2:
                samples[name].append(us)
    return {name: percentiles(us) for name, us in samples.items()}


def measure(case: Case, seconds: float) -> dict[str, Any]:
    """One row: a checked case, timed for about `seconds`."""
    check(case)
    calls: dict[str, Callable[[], Tensor]] = {
        kind: functools.partial(result_of, layer, case.x, case.training)
        for kind, layer in (("dense", case.dense), ("packed", case.packed))
    }
    threads = torch.get_num_threads()
    first = sum(t.p50 for t in times_of(calls, 3, threads).values()) / 1e6
    rounds = min(max(int(seconds / first), LEAST_ROUNDS), MOST_ROUNDS)
    times = times_of(calls, rounds, threads)
    clock = "cpu time" if threads == 1 else "wall"
    row: dict[str, Any] = {
        "case": case.name, "threads": threads, "clock": clock, "rounds": rounds,
    }  # fmt: skip
    for kind, us in times.items():
        row |= {f"{kind}_us_{key}": round(value, 1) for key, value in us._asdict().items()}
    row["packed_over_dense_p50"] = round(times["packed"].p50 / times["dense"].p50, 2)
    return row


def main(arguments: list[str] | None = None) -> int:
    """Command line of this module."""
    parser = argparse.ArgumentParser(prog="python -m slimgemm.benchmarks.bench_cpu")
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()])
    parser.add_argument("--largest", type=int, default=max(FEATURES), help="most features")
    parser.add_argument("--seconds", type=float, default=4.0, help="measured time of a case")
    parser.add_argument("--out", type=Path, default=Path("out/bench/cpu_layers.json"))
    args = parser.parse_args(arguments)
    given = sys.argv[1:] if arguments is None else arguments
    cpu, before, rows = torch.device("cpu"), torch.get_num_threads(), []
    head = machine.head(cpu, command_of([parser.prog, *given], parser.prog))
    for threads in args.threads:
        torch.set_num_threads(threads)
        for case in cases(args.largest):
            rows.append(measure(case, args.seconds))
            print(f"{rows[-1]['packed_over_dense_p50']:5.2f}  {threads} threads  {case.name}")
    torch.set_num_threads(before)
    head |= machine.state(cpu, "after")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"head": head, "rows": rows}, indent=1) + "\n")
    print(f"Wrote {args.out}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
