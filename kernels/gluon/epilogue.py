"""The end of an mma_sp program: scale, bias and activation in registers, then rows of Y.

The accumulator is the transpose of Y. One conversion through shared memory gives each lane 8
neighbouring out features of one token, so that a store is 16 bytes wide.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def activate(z, ACT: gl.constexpr):
    """The activation ACT of fp32 `z`; formulas as torch.nn.functional has them."""
    if ACT == "relu":
        # max(z, 0) would turn NaN into 0.
        z = gl.where(z < 0.0, 0.0, z)
    elif ACT == "gelu":
        z = 0.5 * z * (1.0 + gl.erf(z * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        # 0.5 (1 + tanh(u)) = sigmoid(2 u)
        u = 0.7978845608028654 * (z + 0.044715 * z * z * z)
        z = z / (1.0 + gl.exp(-2.0 * u))
    elif ACT == "silu":
        z = z / (1.0 + gl.exp(-1.0 * z))
    elif ACT == "relu2":
        z = gl.where(z < 0.0, 0.0, z)
        z = z * z
    return z


@gluon.jit
def scale_tokens(acc, scale_ptr, M, pid_m, TILE: gl.constexpr):
    """acc [mt, nt, warps_n, warps_m, 128] times one fp32 scale per token."""
    # What varies with the token only: [nt, warps_m, 128].
    LAYOUT: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(4, TILE.fragment)))
    nt = gl.arange(0, TILE.nt, layout=gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))
    wm = gl.arange(0, TILE.warps_m, layout=gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))
    e = gl.arange(0, 128, layout=gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))
    # Element 4 lane + r of an accumulator tile: column 2 t + r % 2.
    column = e // 4 % 4 * 2 + e % 2
    tile = (pid_m * TILE.warps_m + wm[None, :, None]) * TILE.nt + nt[:, None, None]
    token = tile * 8 + column[None, None, :]
    scale = gl.load(scale_ptr + token, mask=token < M, other=0.0)
    return acc * scale[None, :, None, :, :]


@gluon.jit
def finish(
    acc, y_ptr, bias_ptr, scale_ptr, M, N, pid_m, pid_n,
    TILE: gl.constexpr, SPLITS: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_SCALE: gl.constexpr,
    SCALE_PER_ROW: gl.constexpr, ACT: gl.constexpr,
):  # fmt: skip
    """Store acc [mt, nt, warps_n, warps_m, 128] as Y [M, N], or as part program_id(1) of it."""
    MT: gl.constexpr = TILE.mt
    NT: gl.constexpr = TILE.nt
    WN: gl.constexpr = TILE.warps_n
    WM: gl.constexpr = TILE.warps_m
    # What varies with the out feature only: [mt, warps_n, 128].
    FRAGMENT: gl.constexpr = TILE.fragment
    N_LAYOUT: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, gl.SliceLayout(4, FRAGMENT)))
    OUT: gl.constexpr = TILE.out
    if HAS_SCALE or HAS_BIAS:
        mt = gl.arange(0, MT, layout=gl.SliceLayout(1, gl.SliceLayout(2, N_LAYOUT)))
        wn = gl.arange(0, WN, layout=gl.SliceLayout(0, gl.SliceLayout(2, N_LAYOUT)))
        e = gl.arange(0, 128, layout=gl.SliceLayout(0, gl.SliceLayout(1, N_LAYOUT)))
        # Element 4 lane + r of an accumulator tile: row g + 8 (r // 2).
        row = e // 16 + e % 4 // 2 * 8
        tile = (pid_n * WN + wn[None, :, None]) * MT + mt[:, None, None]
        offs_n = tile * 16 + row[None, None, :]
    if HAS_SCALE:
        if SCALE_PER_ROW:
            scale = gl.load(scale_ptr + offs_n, mask=offs_n < N, other=0.0).to(gl.float32)
            acc = acc * scale[:, None, :, None, :]
        else:
            acc = acc * gl.load(scale_ptr).to(gl.float32)
    if HAS_BIAS:
        bias = gl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(gl.float32)
        acc = acc + bias[:, None, :, None, :]
    y = activate(acc, ACT).to(y_ptr.dtype.element_ty)
    # [mt, nt, wn, wm, g, t, r // 2, r % 2] -> token (wm, nt, t, r % 2), row (wn, mt, r // 2, g).
    y = y.reshape([MT, NT, WN, WM, 8, 4, 2, 2]).permute([3, 1, 5, 7, 2, 0, 6, 4])
    y = gl.convert_layout(y.reshape([8 * NT * WM, 16 * MT * WN]), OUT)
    token = pid_m * (8 * NT * WM) + gl.arange(0, 8 * NT * WM, layout=gl.SliceLayout(1, OUT))
    column = pid_n * (16 * MT * WN) + gl.arange(0, 16 * MT * WN, layout=gl.SliceLayout(0, OUT))
    mask = (token < M)[:, None] & (column < N)[None, :]
    line = token.to(gl.int64)
    if SPLITS > 1:
        line = line + gl.program_id(1).to(gl.int64) * M
    gl.store(y_ptr + (line * N)[:, None] + column[None, :], y, mask=mask)
