"""Names that moved between Triton 3.6 and 3.9; nothing else in this package knows a version.

    name here     3.6                           3.7           3.8            3.9
    barrier       thread_barrier                barrier       barrier        barrier
    cp_async      async_copy_global_to_shared   as 3.6        async_load     async_load
    tma_load      async_copy_global_to_shared   as 3.6        async_load     async_load
    tma_store     async_copy_shared_to_global   as 3.6        async_store    async_store

Looked up by presence, not by version number, newest name first (3.9 keeps the old names as stubs
that raise). Shared memory has no address in Gluon before 3.9's `gl.inline_asm`; the address that
works on all of them is the symbol `global_smem`, at which the largest allocation of a kernel lies.
`arena_at_zero` proves that from the PTX of a build.
"""

from __future__ import annotations

import triton
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
