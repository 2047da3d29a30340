"""Rows of the recorded files: one implementation of one case, timed or with the reason why not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from slimgemm.kernels.timing import Times

TIMED, REFUSED, MISSING, FAILED = "timed", "refused", "missing", "failed"
SHORT = {
    torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32",
    torch.float8_e4m3fn: "fp8", torch.int8: "int8",
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One implementation of one case; the order of the fields is that of the columns.

    Times are microseconds per call, percentiles over the rounds; None where not timed. host_us_p50
    is what the host takes to queue one call, and peak_call_bytes what one call allocates at most,
    its output included; both on a GPU only. Rates use the graph's median, or the eager one where
    there is no graph (`rate_from` says which). dense_equivalent_tflops counts the products of the
    dense op for everybody, so a sparse kernel may pass 100 % of compute_limit_percent; both limits
    were measured in the same run.
    """

    op: str
    layer: str
    shape: str
    dtype: str
    implementation: str
    status: str
    reason: str = ""
    error: float | None = None
    allowed_error: float | None = None
    input_sets: int | None = None
    eager_us_p20: float | None = None
    eager_us_p50: float | None = None
    eager_us_p80: float | None = None
    graph_us_p20: float | None = None
    graph_us_p50: float | None = None
    graph_us_p80: float | None = None
    host_us_p50: float | None = None
    peak_call_bytes: int | None = None
    rate_from: str = ""
    moved_bytes: int | None = None
    tb_per_s: float | None = None
    dense_equivalent_tflops: float | None = None
    byte_limit_percent: float | None = None
    compute_limit_percent: float | None = None
    best_dense_over_this: float | None = None

    @property
    def us(self) -> float | None:
        """The median that rates are made of."""
        return self.eager_us_p50 if self.graph_us_p50 is None else self.graph_us_p50

    @property
    def key(self) -> tuple[str, ...]:
        """What makes two rows of two runs the same measurement."""
        return (self.op, self.layer, self.shape, self.dtype, self.implementation)


def columns(kind: str, times: Times | None) -> dict[str, Any]:
    """The three columns of `times`, for rows of eager or of graph times."""
    return {f"{kind}_us_{key}": us for key, us in times._asdict().items()} if times else {}


def is_dense(row: Row) -> bool:
    """True for a row of a dense competitor: torch's own op on the unpacked operands."""
    return row.implementation.startswith("torch dense")


def with_ratios(rows: Sequence[Any], dense: Callable[[Any], bool] = is_dense) -> list[Any]:
    """`rows` of one case with best_dense_over_this filled in: above 1, faster than every dense one.

    Graph times are compared with graph times, eager with eager.

    Args:
        dense: which rows are those of dense competitors.
    """

    def ratio(row: Any) -> float | None:
        column = f"{row.rate_from}_us_p50"
        rivals = [getattr(r, column) for r in rows if dense(r) and r.status == TIMED]
        best = min((us for us in rivals if us is not None), default=None)
        return None if best is None else best / getattr(row, column)

    return [
        dataclasses.replace(row, best_dense_over_this=ratio(row)) if row.status == TIMED else row
        for row in rows
    ]
