"""Register tensors, pointers and global memory of the NumPy executor (gluon_numpy)."""

from __future__ import annotations

import types
from typing import Any

import numpy as np
import torch

POISON_INT = 0x7FC07FC0  # a NaN in each 16-bit half, bfloat16 and float16 alike


class Fault(AssertionError):
    """The kernel did what would be undefined, or would hang, on a GPU."""


class DType:
    def __init__(self, name: str, storage: Any):
        self.name, self.storage = name, np.dtype(storage)

    def __repr__(self) -> str:
        return self.name


int1, int16, int32 = DType("int1", bool), DType("int16", np.int16), DType("int32", np.int32)
uint8 = DType("uint8", np.uint8)
int64, float32 = DType("int64", np.int64), DType("float32", np.float32)
float16, bfloat16 = DType("float16", np.float16), DType("bfloat16", np.float32)
OF_TORCH = {
    torch.uint8: uint8,
    torch.int16: int16,
    torch.int32: int32,
    torch.int64: int64,
    torch.float32: float32,
    torch.float16: float16,
    torch.bfloat16: bfloat16,
}


def rounded(values: np.ndarray, dtype: DType) -> np.ndarray:
    """`values` in the storage of `dtype`, rounded to nearest even where it is narrower."""
    if dtype is not bfloat16:
        with np.errstate(over="ignore"):
            return values.astype(dtype.storage)
    torch_values = torch.from_numpy(np.ascontiguousarray(values, np.float32))
    return torch_values.to(torch.bfloat16).float().numpy()


def array(value: Any) -> np.ndarray:
    return value.a if isinstance(value, Tensor) else np.asarray(value)


class Tensor:
    """A register tensor: values and dtype. Operators take equal ranks or a scalar, as in Triton."""

    def __init__(self, a: Any, dtype: DType):
        self.a, self.dtype = np.asarray(a), dtype

    shape = property(lambda self: self.a.shape)

    def __getitem__(self, index):
        return Tensor(self.a[index], self.dtype)

    def __index__(self):
        return int(self.a)

    def __bool__(self):
        return bool(self.a)

    def _with(self, other, op, compare=False, flip=False):
        if isinstance(other, Ptr):
            return NotImplemented
        a, b = (array(other), self.a) if flip else (self.a, array(other))
        if a.ndim and b.ndim and a.ndim != b.ndim:
            raise Fault(f"operands must have one rank, got {a.shape} and {b.shape}")
        if compare:
            return Tensor(op(a, b), int1)
        wide = self.dtype
        if isinstance(other, Tensor) and not (self.a.ndim and not other.a.ndim):
            order = [int1, uint8, int16, int32, int64, float16, bfloat16, float32]
            wide = max(self.dtype, other.dtype, key=order.index)
        elif isinstance(other, float) and wide.storage.kind != "f":
            wide = float32
        if wide.storage.kind == "f":
            with np.errstate(over="ignore", invalid="ignore"):
                return Tensor(rounded(op(a.astype(np.float32), b.astype(np.float32)), wide), wide)
        if wide is int1:
            return Tensor(op(a, b), int1)
        result = op(a.astype(np.int64), b.astype(np.int64))
        checked = wide is int32 and op in (np.add, np.multiply, np.subtract) and result.size
        if checked and (result.max() >= 2**31 or result.min() < -(2**31)):
            raise Fault("int32 arithmetic overflows; address in int64")
        return Tensor(result.astype(np.uint64).astype(wide.storage), wide)

    def to(self, dtype: DType, bitcast: bool = False):
        if bitcast:
            return Tensor(self.a.view(dtype.storage), dtype)
        return Tensor(rounded(self.a, dtype), dtype)

    def reshape(self, shape):
        return Tensor(self.a.reshape([int(s) for s in shape]), self.dtype)

    def permute(self, order):
        return Tensor(self.a.transpose(order), self.dtype)


def _operator(name, op, compare=False):
    setattr(Tensor, f"__{name}__", lambda s, o: s._with(o, op, compare))
    if not compare:
        setattr(Tensor, f"__r{name}__", lambda s, o: s._with(o, op, flip=True))


for _name, _op in {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "floordiv": np.floor_divide,
    "mod": np.mod, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    "lshift": np.left_shift, "rshift": np.right_shift, "truediv": np.divide,
}.items():  # fmt: skip
    _operator(_name, _op)
for _name, _op in {
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "eq": np.equal, "ne": np.not_equal,
}.items():  # fmt: skip
    _operator(_name, _op, compare=True)


class Buffer:
    """Global memory behind one torch tensor, with the set of elements that belong to it."""

    def __init__(self, tensor: torch.Tensor, name: str):
        self.name, self.tensor, self.dtype = name, tensor, OF_TORCH[tensor.dtype]
        span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        self.flat = tensor.as_strided((max(span, 0) if tensor.numel() else 0,), (1,))
        self.owned = np.zeros(len(self.flat), bool)
        index = np.zeros(tuple(tensor.shape), np.int64)
        for axis, (n, s) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
            index += (np.arange(n) * s).reshape([-1] + [1] * (tensor.ndim - axis - 1))
        self.owned[index.reshape(-1)] = True
        self.stored = np.zeros(len(self.flat), bool)

    def check(self, offsets: np.ndarray, what: str) -> None:
        outside = (offsets < 0) | (offsets >= len(self.owned))
        inside = np.where(outside, 0, offsets)
        if outside.any() or (len(self.owned) and not self.owned[inside].all()):
            wrong = outside | (~self.owned[inside] if len(self.owned) else True)
            raise Fault(f"{what} out of bounds: {self.name}[{int(offsets[wrong][0])}]")

    def read(self, offsets: np.ndarray) -> np.ndarray:
        values = self.flat[torch.from_numpy(offsets)]
        return (values.float() if self.dtype is bfloat16 else values).numpy()


class Ptr:
    def __init__(self, buffer: Buffer, offset: Any = 0):
        self.buffer, self.offset = buffer, np.asarray(offset, np.int64)
        self.dtype = types.SimpleNamespace(element_ty=buffer.dtype)

    def __add__(self, other):
        return Ptr(self.buffer, self.offset + array(other))

    __radd__ = __add__


def load(ptr: Ptr, mask=None, other=None, **_) -> Tensor:
    dtype = ptr.buffer.dtype
    on = np.broadcast_arrays(array(True if mask is None else mask), ptr.offset)[0]
    offsets = np.broadcast_to(ptr.offset, on.shape)
    ptr.buffer.check(offsets[on], "load")
    poison = np.nan if dtype.storage.kind == "f" else np.int64(POISON_INT)
    fill = np.asarray(poison if other is None else other).astype(dtype.storage)
    result = np.full(on.shape, fill, dtype.storage)
    result[on] = ptr.buffer.read(offsets[on])
    return Tensor(result, dtype)


def store(ptr: Ptr, value: Any, mask=None, **_) -> None:
    on, offsets, values = np.broadcast_arrays(
        array(True if mask is None else mask), ptr.offset, array(value)
    )
    offsets, values, buffer = offsets[on], values[on], ptr.buffer
    buffer.check(offsets, "store")
    if len(np.unique(offsets)) != len(offsets) or buffer.stored[offsets].any():
        raise Fault(f"{buffer.name} is stored twice at one place")
    buffer.stored[offsets] = True
    values = torch.from_numpy(np.ascontiguousarray(values))
    buffer.flat[torch.from_numpy(offsets)] = values.to(buffer.tensor.dtype)
