"""Names that moved between Triton 3.6 and 3.9; nothing else in this package knows a version.

    name here     3.6                           3.7           3.8            3.9
    barrier       thread_barrier                barrier       barrier        barrier
    cp_async      async_copy_global_to_shared   as 3.6        async_load     async_load
    tma_load      async_copy_global_to_shared   as 3.6        async_load     async_load
    tma_store     async_copy_shared_to_global   as 3.6        async_store    async_store
    as_box        memdesc._reinterpret          as 3.6        as 3.6         memdesc.reinterpret

Looked up by presence, not by version number, newest name first (3.9 keeps the old names as stubs
that raise). Shared memory has no address in Gluon before 3.9's `gl.inline_asm`; the address that
works on all of them is the symbol `global_smem`, at which the largest allocation of a kernel lies.
`arena_at_zero` proves that from the PTX of a build.
"""

from __future__ import annotations

import re

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import tma

VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


def _newest(module, *names: str):
    """The first of `names` that `module` has."""
    return next(getattr(module, name) for name in names if hasattr(module, name))


cp_async = _newest(async_copy, "async_load", "async_copy_global_to_shared")
cp_async_commit = async_copy.commit_group
cp_async_wait = async_copy.wait_group
tma_load = _newest(tma, "async_load", "async_copy_global_to_shared")
tma_store = _newest(tma, "async_store", "async_copy_shared_to_global")
tma_store_wait = tma.store_wait


if hasattr(gl.shared_memory_descriptor, "reinterpret"):

    @gluon.jit
    def as_box(view, desc):
        """The same shared memory in the shape and layout of a box of the TMA descriptor `desc`."""
        return view.reinterpret(desc.dtype, desc.block_shape, desc.layout)

else:

    @gluon.jit
    def as_box(view, desc):
        """The same shared memory in the shape and layout of a box of the TMA descriptor `desc`."""
        return view._reinterpret(desc.dtype, desc.block_shape, desc.layout)


# Where Gluon gives addresses, no proof is needed.
ADDRESS_IS_GIVEN = hasattr(gl, "inline_asm")

if ADDRESS_IS_GIVEN:

    @gluon.jit
    def arena_address(arena):
        """Shared-memory address (int32, bytes) of the first byte of `arena`."""
        return gl.inline_asm("mov.b32 $0, $1;", "=r,r", [arena], gl.int32, is_pure=False)

else:

    @gluon.jit
    def arena_address(arena):
        """Address of `global_smem`, which is that of `arena` where arena_at_zero says so."""
        return gl.inline_asm_elementwise(
            "{ .reg .u64 t; mov.u64 t, global_smem; cvt.u32.u64 $0, t; }",
            "=r", [], dtype=gl.int32, is_pure=True, pack=1,
        )  # fmt: skip


def arena_at_zero(ptx: str, arena_bytes: int) -> bool:
    """True if this build provably lays the arena at `global_smem` and all else behind it.

    Evaluates the address operands of the PTX for the first stage (loop variables and all that is
    not known at build time count as 0): the first TMA copy must land at `global_smem` + 0, every
    TMA copy inside the arena, every mbarrier, load, store and constant offset behind it.
    """
    address = _addresses(ptx)
    try:
        copies = [address(r) for r in re.findall(r"cp\.async\.bulk\.tensor[^\[]*\[(%\w+)\]", ptx)]
        barriers = [address(r) for r in re.findall(r"mbarrier\.init[^\[]*\[(%\w+)\]", ptx)]
        operand = r"(?:st|ld)(?:\.shared|matrix)[^;\[]*\[\s*(%\w+)(?:\s*\+\s*(\d+))?"
        scratch = [address(r) + int(n or 0) for r, n in re.findall(operand, ptx)]
    except LookupError:
        return False
    others = [int(n) for n in re.findall(r"\[global_smem\+(\d+)\]", ptx)]
    inside = copies and copies[0] == 0 and all(0 <= n < arena_bytes for n in copies)
    return bool(inside and barriers) and all(n >= arena_bytes for n in barriers + scratch + others)


def _addresses(ptx: str):
    """A function register -> int: its value where `global_smem` and unknown inputs are 0.

    A register with several definitions takes the first, which is the one before its loop.
    """
    definitions: dict[str, tuple[str, list[str]]] = {}
    for op, out, rest in re.findall(r"^\s*([a-z][\w.]*)\s+(%\w+),\s*([^;\[\]{}]+);", ptx, re.M):
        definitions.setdefault(out, (op.split(".")[0], [a.strip() for a in rest.split(",")]))
    folds = {
        "mov": lambda a: a,
        "cvt": lambda a: a,
        "not": lambda a: ~a,
        "add": lambda a, b: a + b,
        "sub": lambda a, b: a - b,
        "mul": lambda a, b: a * b,
        "mad": lambda a, b, c: a * b + c,
        "and": lambda a, b: a & b,
        "or": lambda a, b: a | b,
        "xor": lambda a, b: a ^ b,
        "shfl": lambda *_: 0,  # the number of the warp
        "shl": lambda a, b: a << b,
        "shr": lambda a, b: a >> b,
    }

    def value(name: str, depth: int = 0) -> int:
        if re.fullmatch(r"-?\d+|0x[0-9a-fA-F]+", name):
            return int(name, 0)
        if name not in definitions:
            return 0
        op, args = definitions[name]
        if op not in folds or depth > 64:
            raise LookupError(f"{op} of {name} is not folded")
        return folds[op](*(value(a, depth + 1) for a in args))

    return value
