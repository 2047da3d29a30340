"""Runs the Python body of a Gluon kernel on NumPy, program by program, and checks what it touches.

    run(kernel, grid, *tensors_and_ints, **constexprs)

`kernel.fn` is plain Python. It runs with `gl` and the names of `compat` replaced by those here;
inline PTX is executed by `gluon_ptx`, register by register. Layouts are not modelled (that is what
ahead-of-time builds check), all else is: values, masks, addresses, stages, barriers. `Fault` for

- a load or store outside the elements of the tensor behind a pointer, or a result stored twice;
- shared memory read before it was written, or before its copy was waited for and a barrier passed;
- a stage overwritten while a copy is in flight, before it was read, or with no barrier since;
- a wait that nobody will ever satisfy, copies left in flight at the end, int32 overflow.
"""

from __future__ import annotations

import inspect
import itertools
import math
import operator
import types
from typing import Any

import gluon_ptx
import numpy as np
import torch
from gluon_shared import FLYING, LANDED, VALID, Alloc, Barriers, Block, Shared, Swizzled128
from gluon_tensors import (
    Buffer,
    Fault,
    Ptr,
    Tensor,
    array,
    bfloat16,
    float16,
    float32,
    int1,
    int16,
    int32,
    int64,
    load,
    rounded,
    store,
)

from slimgemm.kernels.gluon.launch import TmaView


def namespace(block: Block) -> types.SimpleNamespace:
    """What a kernel sees as `gl`, for one program."""

    def layout(*args, **kwargs):
        return None

    def elementwise(fn):
        def apply(x):
            with np.errstate(over="ignore"):
                return Tensor(rounded(fn(x.a.astype(np.float32)), x.dtype), x.dtype)

        return apply

    def full(shape, value, dtype, layout=None):
        return Tensor(np.full([int(s) for s in shape], value, dtype.storage), dtype)

    def allocate(dtype, shape, layout, value=None):
        shape = tuple(int(s) for s in shape)
        if layout == "mbarrier":
            made = Barriers(shape)
            block.barriers += made.rows
            return made
        # What TMA and wgmma share is kept as bits, whatever its type.
        alloc = Alloc(math.prod(shape), int16 if isinstance(layout, Swizzled128) else dtype)
        where = np.arange(math.prod(shape)).reshape(shape)
        if isinstance(layout, Swizzled128):
            where, block.arena = where ^ (where // 64 % 8 * 8), alloc
        return Shared(alloc, where, block)

    def where(condition, x, y):
        dtype = x.dtype if isinstance(x, Tensor) else y.dtype
        return Tensor(np.where(array(condition), array(x), array(y)).astype(dtype.storage), dtype)

    def check(condition, message=""):
        if not condition:
            raise Fault(f"static_assert {message}")

    def asm(text, constraints, args, dtype, is_pure, pack):
        return gluon_ptx.execute(block, text, constraints, args, dtype, pack)

    def minimum(x, y):
        return where(x < y, x, y) if isinstance(x, Tensor) else (y if y < x else x)

    def at_place(ptr, value, op):
        """An atomic on one element; programs run one at a time."""
        place = int(ptr.offset)
        ptr.buffer.check(np.asarray([place]), "atomic")
        before = ptr.buffer.flat[place].item()
        ptr.buffer.flat[place] = op(before, array(value).item())

    erf = np.vectorize(math.erf, otypes=[np.float32])
    return types.SimpleNamespace(
        constexpr=lambda x: x, int1=int1, int16=int16, int32=int32, int64=int64,
        float16=float16, bfloat16=bfloat16, float32=float32,
        BlockedLayout=layout, SliceLayout=layout, SwizzledSharedLayout=layout,
        DistributedLinearLayout=layout, NVMMADistributedLayout=layout,
        full=full, zeros=lambda shape, dtype, layout=None: full(shape, 0, dtype),
        arange=lambda a, b, layout=None: Tensor(np.arange(a, b, dtype=np.int32), int32),
        program_id=lambda axis: Tensor(np.int32(block.pid[axis]), int32),
        num_programs=lambda axis: Tensor(np.int32(block.grid[axis]), int32),
        load=load, store=store, where=where, static_range=range, static_assert=check,
        split=lambda x: tuple(Tensor(x.a[..., i], x.dtype) for i in range(2)),
        join=lambda x, y: Tensor(np.stack([x.a, y.a], -1), x.dtype),
        sum=lambda x, axis: Tensor(x.a.sum(axis, dtype=x.a.dtype), x.dtype),
        min=lambda x, axis: Tensor(x.a.min(axis), x.dtype),
        atomic_add=lambda ptr, value: at_place(ptr, value, operator.add),
        atomic_min=lambda ptr, value: at_place(ptr, value, min),
        exp=elementwise(np.exp), erf=elementwise(erf),
        minimum=minimum, cdiv=lambda a, b: -(-a // b),
        multiple_of=lambda x, _: x, max_contiguous=lambda x, _: x,
        convert_layout=lambda x, layout, assert_trivial=False: x,
        allocate_shared_memory=allocate, inline_asm_elementwise=asm,
        warp_specialize=lambda calls, warps, registers=None: block.partitions(calls),
    )  # fmt: skip


def names(block: Block) -> dict[str, Any]:
    """The names of `compat` that kernels import, for one program."""

    def barrier():
        block.epoch += 1
        for alloc, where in block.landed:
            alloc.state[where] = VALID
        block.landed = []

    def write(view: Shared, values: np.ndarray):
        alloc, where = view.alloc, view.where
        alloc.overwrite(where, block)
        alloc.data[where], alloc.state[where], alloc.unread[where] = values, FLYING, True
        return alloc, where

    def cp_async(view, ptr, mask=None):
        if ptr.offset.shape != view.shape:
            raise Fault(f"cp_async of {ptr.offset.shape} into {view.shape}")
        block.open.append(write(view, load(ptr, mask, 0).a))

    def commit():
        block.groups.append(block.open)
        block.open = []

    def wait(outstanding):
        while len(block.groups) > outstanding:
            for alloc, where in block.groups.pop(0):
                alloc.state[where] = LANDED
                block.landed.append((alloc, where))

    def fence_async_shared():
        for bar in block.barriers:
            bar.fenced = True

    def tma_load(desc, coord, bar, view):
        if not bar.fenced:
            raise Fault("TMA signals a barrier that was not fenced after its initialisation")
        tile = desc.tile([int(c) for c in coord], view.shape)
        bar.flying.append(write(view, tile))
        bar.bytes -= tile.size * 2
        bar.settle()

    def expect(bar, count):
        bar.bytes += count
        bar.pending -= 1
        bar.settle()

    def arrive(bar, count=1):
        if bar.pending < count:
            raise Fault("more arrivals on a barrier than it counts")
        bar.pending -= count
        bar.settle()

    def wait_barrier(bar, parity):
        if bar.count is None:
            raise Fault("wait on a barrier that was never initialised")
        parity = int(parity)

        def ready():
            return bar.phase % 2 != parity

        if not ready():
            if block.turn is None:
                raise Fault("deadlock: a wait on a barrier that nobody signals")
            block.turn(ready)
        for alloc, where in bar.landed:
            alloc.state[where] = VALID
        bar.landed = []

    def scalars(*bounds):
        """`range` of the device: its loop variable is an int32 scalar."""
        return (Tensor(np.int32(i), int32) for i in range(*map(int, bounds)))

    mbarrier = types.SimpleNamespace(
        init=lambda bar, count: bar.init(count), expect=expect, arrive=arrive,
        wait=wait_barrier, MBarrierLayout=lambda: "mbarrier",
    )  # fmt: skip
    return {
        "barrier": barrier, "cp_async": cp_async, "cp_async_commit": commit,
        "cp_async_wait": wait, "tma_load": tma_load, "mbarrier": mbarrier,
        "fence_async_shared": fence_async_shared,
        "range": scalars, "gl": namespace(block),
        "as_box": lambda view, desc: view.reshaped(desc.box),
        "arena_address": lambda arena: Tensor(np.int32(gluon_ptx.SMEM_BASE), int32),
    }  # fmt: skip


class Descriptor:
    """A TMA descriptor of a 16-bit matrix: boxes outside its bounds read zero."""

    def __init__(self, tensor: torch.Tensor, box: tuple[int, ...]):
        units = [stride % 8 for stride in tensor.stride()[:-1]]
        if tensor.stride(-1) != 1 or any(units) or tensor.data_ptr() % 16:
            raise Fault("a TMA tensor must be row-major with 16-byte rows")
        self.values, self.layout = tensor.view(torch.int16).numpy(), Swizzled128()
        self.box = box

    def tile(self, coord, shape) -> np.ndarray:
        out = np.zeros(shape, np.int16)
        ranges = [
            (max(at, 0), max(min(at + count, size), max(at, 0)))
            for at, count, size in zip(coord, shape, self.values.shape, strict=True)
        ]
        inside = tuple(slice(a - at, b - at) for at, (a, b) in zip(coord, ranges, strict=True))
        out[inside] = self.values[tuple(slice(a, b) for a, b in ranges)]
        return out


def argument(value: Any, name: str) -> Any:
    """What the kernel sees for one argument of a launch."""
    if isinstance(value, TmaView):
        return Descriptor(value.tensor, value.box)
    return Ptr(Buffer(value, name)) if isinstance(value, torch.Tensor) else value


def bind(fn: Any, replaced: dict[str, Any]) -> Any:
    """The Python function of a kernel or helper, with its globals replaced, helpers included."""
    fn = getattr(fn, "fn", fn)
    scope = dict(fn.__globals__)
    bound = types.FunctionType(fn.__code__, scope, fn.__name__, fn.__defaults__, fn.__closure__)
    for name in fn.__code__.co_names:
        if name in replaced:
            scope[name] = replaced[name]
        elif type(scope.get(name)).__name__.endswith("JITFunction"):
            scope[name] = bind(scope[name], replaced)
    return bound


def mutated(kernel, old: str, new: str) -> types.SimpleNamespace:
    """`kernel` with one place of its source changed: a fault planted on purpose."""
    source = inspect.getsource(kernel.fn)
    if source.count(old) != 1:
        raise ValueError(f"{old!r} must be in the source once, is {source.count(old)} times")
    scope = dict(kernel.fn.__globals__)
    exec(source[source.index("def ") :].replace(old, new), scope)
    changed = scope[kernel.fn.__name__]
    runs_on_host = type(kernel).__name__ == "ConstexprFunction"
    return changed if runs_on_host else types.SimpleNamespace(fn=changed)


def run(kernel, grid, *args, schedule=None, replace=None, **constexprs) -> None:
    """Run every program of `grid`. `replace` swaps names of the kernel's module: planted faults."""
    grid = (*grid, 1, 1)[:3]
    params = kernel.fn.__code__.co_varnames
    args = [argument(a, params[i]) for i, a in enumerate(args)]
    for pid in itertools.product(*map(range, grid)):
        block = Block(pid, grid, schedule or range)
        scope = names(block)
        for name, value in (replace or {}).items():
            scope[name] = bind(value, scope) if hasattr(value, "fn") else value
        bind(kernel, scope)(*args, **constexprs)
        if block.open or block.groups:
            raise Fault("a program ends with copies in flight")
