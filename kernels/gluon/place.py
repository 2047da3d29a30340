"""Which output tile comes when: the order that both matrix kernels walk them in."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def place_of(tile, M, N, TOKENS: gl.constexpr, ROWS: gl.constexpr, GROUP: gl.constexpr):
    """(pid_n, pid_m) of an output tile: GROUP row tiles share their X tiles in L2."""
    tiles_m = gl.cdiv(M, TOKENS)
    group = tile // (GROUP * tiles_m)
    size = gl.minimum(gl.cdiv(N, ROWS) - group * GROUP, GROUP)
    return group * GROUP + tile % (GROUP * tiles_m) % size, tile % (GROUP * tiles_m) // size
