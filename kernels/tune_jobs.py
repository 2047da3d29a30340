"""What can be measured: one shape of spmm_24 or conv2d_24, its inputs, and what it must give."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slimgemm.kernels.conv_layout import Convolution
from slimgemm.kernels.dispatch import implementation, twin
from slimgemm.kernels.formats import Packed24
from slimgemm.kernels.implementations import Run
from slimgemm.kernels.reference import allowed_error, output_error
from slimgemm.kernels.tune_table import DTYPES, OK, WRONG, Choice, Result, Shape, bucket

TOKENS = (1, 8, 16, 32, 64, 128, 256, 1024, 4096, 8192)
INPUT_SETS = 4  # a graph runs them all: none finds its weight in the L2
REPEATS = 8  # more runs of each check, which must give the same bits: a race moves them
ACTIVATION = "silu"  # of the second check, with bias and scale


class Job(NamedTuple):
    """One row to be measured: y [m, n] = x [m, k] @ w.T in `dtype`."""

    dtype: torch.dtype
    n: int
    k: int
    m: int

    @property
    def shape(self) -> Shape:
        """The Row.shape that it makes."""
        return ("spmm_24", DTYPES[self.dtype], self.n, self.k, self.m, None)

    def __str__(self) -> str:
        return f"{self.n}x{self.k} {DTYPES[self.dtype]} m={self.m}"

    def inputs(self, device: torch.device, seed: int) -> tuple[Tensor, Packed24]:
        """Random x [m, k] and a 2:4 weight [n, k] with random metadata."""
        g = torch.Generator(device).manual_seed(seed)
        w = _weight(self.n, self.k, self.dtype, g)
        x = torch.randn(self.m, self.k, generator=g, device=device)
        return x.to(self.dtype), w

    def operands(self, x: Tensor, w: Packed24) -> tuple[Any, ...]:
        """What `takes` of a candidate is asked about."""
        return x, w

    def arguments(
        self, x: Tensor, w: Packed24, bias: Tensor | None, scale: Tensor | None, act: str
    ) -> tuple[Any, ...]:
        """The arguments of a candidate."""
        return x, w, bias, scale, act


class ConvJob(NamedTuple):
    """One row to be measured: `conv` in `dtype` over images [batch, channels, height, width]."""

    dtype: torch.dtype
    conv: Convolution
    batch: int
    height: int
    width: int

    @property
    def m(self) -> int:
        """Output pixels."""
        height, width = self.conv.output_size(self.height, self.width)
        return self.batch * height * width

    @property
    def n(self) -> int:
        return self.conv.out

    @property
    def k(self) -> int:
        """Columns of the packed matrix."""
        return self.conv.k

    @property
    def shape(self) -> Shape:
        """The Row.shape that it makes."""
        return ("conv2d_24", DTYPES[self.dtype], self.n, self.k, self.m, self.conv)

    def __str__(self) -> str:
        conv, images = self.conv, f"{self.batch}x{self.height}x{self.width}"
        kernel = "x".join(map(str, conv.kernel))
        parts = [f"{conv.channels * conv.groups}->{conv.out} {kernel}"]
        parts += [f"stride {conv.stride[0]}"] if conv.stride != (1, 1) else []
        parts += [f"groups {conv.groups}"] if conv.groups > 1 else []
        return f"{' '.join(parts)} {DTYPES[self.dtype]} images {images}"

    @property
    def linear(self) -> Job | None:
        """The linear layer that it is as well, or None: dispatch may run it as that one."""
        conv = self.conv
        one = conv.kernel == conv.stride == (1, 1) and not any(conv.padding) and conv.groups == 1
        return Job(self.dtype, conv.out, conv.channels, bucket(self.m)) if one else None

    def inputs(self, device: torch.device, seed: int) -> tuple[Tensor, Packed24]:
        """Random channels_last images, and a 2:4 weight with random metadata."""
        g, conv = torch.Generator(device).manual_seed(seed), self.conv
        taps = conv.kernel[0] * conv.kernel[1]
        w = torch.randn(conv.out * taps, conv.channels, generator=g, device=device)
        padded = w.new_zeros(conv.out * taps, conv.padded_channels)
        padded[:, : conv.channels] = w * (taps * conv.channels) ** -0.5
        packed = implementation("prune_24", device)(padded.view(conv.out, -1).to(self.dtype))
        size = (self.batch, self.height, self.width, conv.channels * conv.groups)
        x = torch.randn(size, generator=g, device=device)
        return x.to(self.dtype).permute(0, 3, 1, 2), packed

    def operands(self, x: Tensor, w: Packed24) -> tuple[Any, ...]:
        """What `takes` of a candidate is asked about."""
        return x, w, self.conv

    def arguments(
        self, x: Tensor, w: Packed24, bias: Tensor | None, scale: Tensor | None, act: str
    ) -> tuple[Any, ...]:
        """The arguments of a candidate, which knows no scale."""
        _, _, _, stride, padding, dilation, groups = self.conv
        return x, w, self.conv.weight_shape, bias, stride, padding, dilation, groups, act


AnyJob = Job | ConvJob


def _weight(n: int, k: int, dtype: torch.dtype, g: torch.Generator) -> Packed24:
    w = torch.randn(n, k, generator=g, device=g.device) * k**-0.5
    return implementation("prune_24", g.device)(w.to(dtype))


def jobs(
    shapes: Sequence[tuple[int, int]], dtypes: Sequence[torch.dtype], tokens: Sequence[int]
) -> list[Job]:
    """Every combination, shape by shape; tokens ascending.

    Raises:
        ValueError: nothing to do, or a size that cannot be tuned.
    """
    if not (shapes and dtypes and tokens):
        raise ValueError("tune needs at least one shape, dtype and token count")
    for m in tokens:
        if m < 1 or m & (m - 1):
            raise ValueError(f"tokens must be powers of two (rows are dispatched by them), got {m}")
    for n, k in shapes:
        if n < 1 or k < 1:
            raise ValueError(f"a shape must be NxK with both from 1, got {n}x{k}")
    pairs, counts = dict.fromkeys(shapes), sorted(set(tokens))
    return [Job(dtype, n, k, m) for dtype in dtypes for n, k in pairs for m in counts]


def conv_jobs(convs: Iterable[ConvJob]) -> list[AnyJob]:
    """Each of `convs` once, after the linear layer that it is as well."""
    found: dict[Shape, AnyJob] = {}
    for job in convs:
        if job.linear is not None:
            found.setdefault(job.linear.shape, job.linear)
        found.setdefault(job.shape, job)
    return list(found.values())


class Judge:
    """Knows what an op must give for one pair of operands, plain and with an epilogue."""

    def __init__(self, job: AnyJob, x: Tensor, w: Packed24) -> None:
        g = torch.Generator(x.device).manual_seed(INPUT_SETS)
        bias, scale = torch.randn(2, job.n, generator=g, device=x.device).to(x.dtype)
        self.cases: list[tuple[tuple[Any, ...], Tensor, float]] = []
        right = twin(job.shape[0])
        wide = w._replace(values=w.values.double())
        epilogues: list[tuple[Tensor | None, Tensor | None, str]] = [
            (None, None, "none"),
            (bias, scale, ACTIVATION),
        ]
        for epilogue in epilogues:
            wide_bias, wide_scale = (t if t is None else t.double() for t in epilogue[:2])
            exact = right(*job.arguments(x.double(), wide, wide_bias, wide_scale, epilogue[2]))
            arguments = job.arguments(x, w, *epilogue)
            self.cases.append((arguments, exact, allowed_error(right(*arguments), exact)))

    def judge(self, choice: Choice, run: Run) -> Result:
        """`run` on the operands, compared: ok without a time, or wrong. The worse case counts."""
        worst: tuple[float, float] = (-1.0, 1.0)
        for arguments, exact, allowed in self.cases:
            got = run(*arguments)
            if got.shape != exact.shape or got.dtype != arguments[0].dtype:
                why = f"gave {got.dtype} {list(got.shape)}"
                return Result(choice, WRONG, reason=why)
            if got.stride() != exact.stride():
                return Result(choice, WRONG, reason=f"gave strides {got.stride()}")
            error = output_error(got, exact)
            if not error <= allowed:  # NaN too
                why = f"error {error:.2e} > {allowed:.2e}, act {arguments[-1]}"
                known = error if error < float("inf") else None
                return Result(choice, WRONG, None, known, allowed, why)
            if not all(torch.equal(got, run(*arguments)) for _ in range(REPEATS)):
                why = f"gave other bits when run again, act {arguments[-1]}"
                return Result(choice, WRONG, None, error, allowed, why)
            worst = max(worst, (error, allowed), key=lambda pair: pair[0] / pair[1])
        return Result(choice, OK, None, *worst)
