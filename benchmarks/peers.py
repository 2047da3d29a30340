"""Competitors from torch: dense, compiled, semi-structured (cuSPARSELt, CUTLASS).

A competitor that this machine cannot have raises Missing with the reason, and becomes a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from slimgemm.benchmarks.harness import Missing, Wrong
from slimgemm.benchmarks.machine import capability
from slimgemm.kernels.reference import output_error
from slimgemm.kernels.timing import Call, Times, time_us

# (calls, rounds) -> times
Timer = Callable[[Mapping[str, Call], int], Mapping[str, Times]]
# Algorithms to try where torch does not know how many this cuSPARSELt has; those that it has not
# raise.
ALGORITHMS = 128
# All algorithms are timed in so many rounds, then the FINALISTS among them again, in turn.
FIRST_ROUNDS, FINALISTS, LAST_ROUNDS = 2, 6, 9
DENSE_ROWS = 8  # torch copies an x of other rows into one of whole multiples, at every call


class Peers(NamedTuple):
    """Which of the costly competitors take part."""

    compiled: bool = True


def compiled(function: Callable[..., Any], peers: Peers) -> Callable[..., Any]:
    """`function` under torch.compile, max-autotune, for one static shape.

    CUDA graphs are left to the harness, which captures everybody.

    Raises:
        Missing: it was left out of this run.
    """
    if not peers.compiled:
        raise Missing("left out by --no-compiled")
    torch._dynamo.reset()  # the shapes of earlier cases would count as recompilations
    return torch.compile(function, mode="max-autotune-no-cudagraphs", dynamic=False)


class Compiled:
    """Compiles once per case, and gives a call for each input set."""

    def __init__(self, function: Callable[..., Any], peers: Peers) -> None:
        self.function, self.peers = function, peers
        self.made: Callable[..., Any] | None = None

    def __call__(self, *args: Any) -> Call:
        self.made = made = self.made or compiled(self.function, self.peers)
        return lambda: made(*args)


def need_gpu(t: Tensor, what: str) -> None:
    """Raise Missing unless `t` is on a GPU."""
    if t.device.type != "cuda":
        raise Missing(f"{what} needs a GPU")


def _cusparselt(w: Tensor, alg_id: int) -> Tensor:
    from torch.sparse import SparseSemiStructuredTensorCUSPARSELT

    packed = SparseSemiStructuredTensorCUSPARSELT.from_dense(w)
    packed.alg_id_cusparselt = alg_id
    return packed


def algorithms() -> range:
    """The algorithm ids of the cuSPARSELt at hand."""
    known = torch.backends.cusparselt.get_max_alg_id()
    return range(ALGORITHMS if known is None else known + 1)


def search_timer(device: torch.device) -> Timer:
    """Times calls as CUDA graphs: eager, the host's share would hide which of them is faster."""

    def timer(calls: Mapping[str, Call], rounds: int) -> Mapping[str, Times]:
        try:
            return time_us(calls, device, graph=True, rounds=rounds, warmup=1)
        except RuntimeError:  # not to be captured
            return time_us(calls, device, rounds=rounds, warmup=1)

    return timer


def fastest(calls: Iterable[tuple[int, Call]], timer: Timer) -> tuple[int, int]:
    """(id of the fastest call, number that ran); a call that raises does not take part.

    Raises:
        Missing: none ran; with the error of the last one.
    """
    first: dict[str, float] = {}
    running: dict[str, Call] = {}
    last = "there is no algorithm"
    for number, call in calls:
        name = str(number)
        try:
            call()
            # One at a time: a graph of each at once would take the memory of all their outputs.
            first[name] = timer({name: call}, FIRST_ROUNDS)[name].p50
            running[name] = call
        except RuntimeError as error:
            last = (str(error).splitlines() or ["RuntimeError"])[0]
    if not running:
        raise Missing(f"no algorithm of cuSPARSELt ran: {last}")
    best = sorted(running, key=lambda name: first[name])[:FINALISTS]
    times = timer({name: running[name] for name in best}, LAST_ROUNDS)
    return int(min(best, key=lambda name: times[name].p50)), len(running)


def padded_rows(x: Tensor, multiple: int) -> Tensor:
    """`x` [m, k] with rows of zeros up to a multiple; itself where it has one."""
    missing = -x.shape[0] % multiple
    return F.pad(x, (0, 0, 0, missing)) if missing else x


class Search:
    """The fastest algorithm of cuSPARSELt at one shape, sought once per case.

    Args:
        timer: of `fastest`; CUDA graphs unless given.
    """

    def __init__(self, timer: Timer | None = None) -> None:
        self.timer = timer
        self.best: int | None = None
        self.tried = 0
        self.more = 0  # rows of zeros that x got before anything was timed

    def algorithm(self, call: Callable[[int], Call], device: torch.device) -> int:
        """The id of the fastest of call(id)."""
        if self.best is None:
            calls = ((alg_id, call(alg_id)) for alg_id in algorithms())
            self.best, self.tried = fastest(calls, self.timer or search_timer(device))
        return self.best

    def note(self) -> str:
        """Which algorithm was taken."""
        padding = f", x with {self.more} more rows before it is timed" if self.more else ""
        found = f"alg_id {self.best}, fastest of {self.tried}{padding}"
        return "" if self.best is None else found


def need_cusparselt(w: Tensor) -> None:
    """Raise Missing unless torch has cuSPARSELt and `w` is on a GPU."""
    need_gpu(w, "cuSPARSELt")
    if not torch.backends.cusparselt.is_available():
        raise Missing("this torch has no cuSPARSELt")


class Cusparselt(Search):
    """F.linear with a cuSPARSELt weight, on the algorithm that is fastest at this shape.

    x has rows of zeros up to a multiple of DENSE_ROWS before it is timed, and so has the result.
    """

    def __call__(self, x: Tensor, w: Tensor) -> Call:
        need_cusparselt(w)
        packed: Any = _cusparselt(w, 0)
        self.more = -x.shape[0] % DENSE_ROWS
        x = padded_rows(x, DENSE_ROWS)

        def call(alg_id: int) -> Call:
            def run() -> Tensor:
                packed.alg_id_cusparselt = alg_id
                return F.linear(x, packed)

            return run

        packed.alg_id_cusparselt = self.algorithm(call, w.device)
        return lambda: F.linear(x, packed)


def check_cutlass(w: Tensor) -> None:
    """Raise Missing where torch's CUTLASS kernels do not run."""
    need_gpu(w, "torch's CUTLASS backend")
    found = capability(w.device)
    if not found.startswith("8."):
        raise Missing(f"torch's CUTLASS kernels are for compute capability 8.x, this is {found}")


def cutlass_weight(w: Tensor) -> Any:
    """`w` packed for torch's CUTLASS kernels."""
    from torch.sparse import SparseSemiStructuredTensorCUTLASS

    check_cutlass(w)
    return SparseSemiStructuredTensorCUTLASS.from_dense(w)


def cutlass_linear(x: Tensor, w: Tensor) -> Call:
    """F.linear with a CUTLASS weight."""
    weight = cutlass_weight(w)
    return lambda: F.linear(x, weight)


def torch_pack(w: Tensor, backend: str) -> Call:
    """Torch's own packing of a 2:4 weight; backend cusparselt or cutlass."""
    from torch.sparse import (
        SparseSemiStructuredTensorCUSPARSELT,
        SparseSemiStructuredTensorCUTLASS,
    )

    if backend == "cutlass":
        # Its packing is plain torch and runs on every GPU; only the product needs 8.x.
        need_gpu(w, "torch's CUTLASS backend")
        return lambda: SparseSemiStructuredTensorCUTLASS.from_dense(w)
    need_gpu(w, "cuSPARSELt")
    return lambda: SparseSemiStructuredTensorCUSPARSELT.from_dense(w)


def torch_prune(w: Tensor, backend: str) -> Call:
    """Torch's own prune and pack: 4 x 4 tiles, packed both ways; backend cusparselt or cutlass."""
    from torch.sparse import (
        SparseSemiStructuredTensorCUSPARSELT,
        SparseSemiStructuredTensorCUTLASS,
    )

    need_gpu(w, "torch's prune and pack")
    if w.dtype not in (torch.float16, torch.bfloat16):
        raise Missing("torch prunes and packs fp16 and bf16 only")
    if w.shape[0] % 128 or w.shape[1] % 128:
        raise Missing("torch prunes and packs whole tiles of 128 x 128 only")
    if backend == "cutlass":
        kind: Any = SparseSemiStructuredTensorCUTLASS
    else:
        kind = SparseSemiStructuredTensorCUSPARSELT
    return lambda: kind.prune_dense_static_sort(w, algorithm="largest_abs_values_greedy")


def check_pruned(w: Tensor, got: Tensor) -> tuple[float, float]:
    """Check of another pruner: 2:4, nothing but weights of `w`, and not less than 2/3 of them.

    Raises:
        Wrong: with the first of these that does not hold.
    """
    if got.shape != w.shape:
        raise Wrong(f"the result is {list(got.shape)}, must be {list(w.shape)}")
    kept = got != 0
    if int(kept.view(w.shape[0], -1, 4).sum(-1).max()) > 2:
        raise Wrong("a group of four keeps more than two")
    if not bool(kept.float().mean() > 1 / 3):
        raise Wrong(f"only {float(kept.float().mean()):.3f} of the weights are kept")
    return output_error(got, torch.where(kept, w, 0).double()), 0.0
