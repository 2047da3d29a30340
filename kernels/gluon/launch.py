"""What the launchers of the Gluon kernels share: their checks and the record of one launch."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slimgemm.kernels.reference import ACTIVATIONS

EPILOGUE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class TmaView(NamedTuple):
    """A tensor that a kernel reads by TMA in boxes of `box`, of as many axes."""

    tensor: Tensor
    box: tuple[int, ...]


def tma_view(tensor: Tensor, box: tuple[int, ...]) -> TmaView:
    """The TmaView of a row-major `tensor`, whose axes of one element may have any stride in torch.

    TMA takes no stride that is not a multiple of 16 bytes: they get that of their neighbour's end.
    """
    if 1 in tensor.shape[:-1]:
        strides = list(tensor.stride())
        for axis in reversed(range(tensor.ndim - 1)):
            if tensor.shape[axis] == 1:
                strides[axis] = tensor.shape[axis + 1] * strides[axis + 1]
        tensor = tensor.as_strided(tensor.shape, strides)
    return TmaView(tensor, box)


class Launch(NamedTuple):
    """One kernel launch, before it happens: tests run it on NumPy, launchers on the GPU.

    Args:
        grid: programs per axis.
        args, constants: positional arguments and constexprs of the kernel.
        warps: warps per program.
        out: [..., N], the result.
        parts: fp32 [splits, M, N] to be added into `out`, or None where the kernel writes `out`.
    """

    grid: tuple[int, ...]
    args: tuple
    constants: dict[str, Any]
    warps: int
    out: Tensor
    parts: Tensor | None


def rows_of(x: Tensor, k: int) -> Tensor:
    """x [..., k] as [M, k]; the pitch of a single row is k, whatever it was cut from."""
    m = math.prod(x.shape[:-1])
    return x.view(k).view(1, k) if m == 1 else x.view(m, k)


def is_aligned(rows: Tensor) -> bool:
    """True if each row of x [M, K] is whole 16-byte units, which cp.async and TMA need."""
    per = 16 // rows.element_size()
    return rows.shape[1] % per == 0 and rows.stride(0) % per == 0 and rows.data_ptr() % 16 == 0


def folds(x: Tensor) -> bool:
    """True if x [..., k] has stride 1 along k and leading dims that fold into one."""
    try:
        x.view(math.prod(x.shape[:-1]), x.shape[-1])
    except RuntimeError:
        return False
    return x.stride(-1) == 1 or x.shape[-1] == 1


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def check_x(
    x: Tensor, n: int, k: int, dtype: torch.dtype, device, capability, exact: bool = False
) -> None:
    """Raise ValueError unless `x` [..., k] fits a weight [n, k] and its GPU has `capability`.

    `exact`: no later capability will do.
    """
    if k == 0:
        raise ValueError("k must be at least 1, got 0")
    if x.ndim < 1 or x.shape[-1] != k:
        raise ValueError(f"x must be [..., {k}] for a [{n}, {k}] weight, got {list(x.shape)}")
    if x.dtype != dtype or x.device != device:
        raise ValueError(
            f"x must be {dtype} on {device} as the weight, got {x.dtype} on {x.device}"
        )
    if not folds(x):
        raise ValueError(
            "x must have stride 1 along k and leading dims that fold into one, "
            f"got strides {x.stride()}; call x.contiguous() first"
        )
    if not x.is_cuda:
        raise ValueError(f"x must be on a GPU, got {x.device}; slimgemm.kernels runs CPU tensors")
    found = torch.cuda.get_device_capability(device)
    if found < capability or (exact and found != capability):
        later = "" if exact else " or later"
        raise ValueError(f"GPU must be of compute capability {capability}{later}, got {found}")


def check_dtype(dtype: torch.dtype, known: Iterable[torch.dtype], cure: str) -> None:
    """Raise ValueError unless the dtype of a weight is `known` to a kernel."""
    if dtype not in known:
        names = " or ".join(str(d).removeprefix("torch.") for d in known)
        raise ValueError(f"weight must hold {names}, got {dtype}; {cure}")


def check_scales(x: Tensor, n: int, scale_x: Tensor, scale_w: Tensor) -> None:
    """Raise ValueError unless scale_x [leading dims of x] and scale_w [n] are fp32 beside `x`."""
    for name, t, shape in (("scale_x", scale_x, x.shape[:-1]), ("scale_w", scale_w, (n,))):
        if t.dtype != torch.float32 or t.device != x.device:
            raise ValueError(f"{name} must be float32 on {x.device}, got {t.dtype} on {t.device}")
        if tuple(t.shape) != tuple(shape) or not t.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous {list(shape)}, got {list(t.shape)} {t.stride()}"
            )


def check_epilogue(n: int, x: Tensor, bias: Tensor | None, scale: Tensor | None, act: str) -> None:
    """Raise ValueError unless bias [n] and scale ([n] or one element) lie beside `x`."""
    if act not in ACTIVATIONS:
        raise ValueError(f"act must be one of {', '.join(ACTIVATIONS)}, got {act!r}")
    for name, t, shapes in (("bias", bias, ((n,),)), ("scale", scale, ((n,), (1,), ()))):
        if t is None:
            continue
        if t.dtype not in EPILOGUE_DTYPES or t.device != x.device:
            raise ValueError(
                f"{name} must be float16, bfloat16 or float32 on {x.device}, "
                f"got {t.dtype} on {t.device}"
            )
        if tuple(t.shape) not in shapes or not t.is_contiguous():
            raise ValueError(f"{name} must be contiguous [{n}], got {list(t.shape)} {t.stride()}")
