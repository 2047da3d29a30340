"""The NumPy executor catches what it is for: faults planted in the source of the real kernels."""

import re
import types

import gluon_numpy
import gluon_ptx
import numpy as np
import pytest
import torch
from gluon_cases import SMALL
from gluon_cases import run_mma_sp as run
from gluon_numpy import Fault, mutated
from helpers import randn, random_24
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from slimgemm.kernels.gluon import mma_sp, orders
from slimgemm.kernels.gluon.epilogue import finish
from slimgemm.kernels.gluon.place import place_of
from slimgemm.kernels.reference import pack_24_ref, spmm_24_ref

KERNEL = mma_sp._mma_sp_kernel
M, N, K = 11, 48, 1544  # ragged in every dim for the tiles below


def problem():
    packed = pack_24_ref(random_24(N, K, torch.float16))
    x = randn(M, 2 * K, dtype=torch.float16, seed=1)[:, K:]  # rows with foreign values between them
    return x, packed, orders.to_mma_sp(packed)


def error(got, x, packed):
    exact = spmm_24_ref(x.double(), packed._replace(values=packed.values.double()))
    return float((got.double() - exact).abs().max() / exact.abs().max())


def run_mutated(tile, function, old, new):
    """The result of mma_sp with one change in the source of `function`."""
    x, packed, weight = problem()
    changed = mutated(function, old, new)
    if function is KERNEL:
        launch = mma_sp.prepare(x, weight, tile=SMALL[tile])
        gluon_numpy.run(changed, launch.grid, *launch.args, **launch.constants)
        return error(launch.out, x, packed)
    got = run(x, weight, SMALL[tile], replace={function.fn.__name__: changed})
    return error(got, x, packed)


def test_unchanged_kernel_is_right_here():
    for tile in SMALL:
        x, packed, weight = problem()
        assert error(run(x, weight, SMALL[tile]), x, packed) < 1e-3


FAULTS = [
    # name, function, old, new, message
    ("K mask", mma_sp.copy_x, " & (pair // 4 < K // (4 * PER))", "", "load out of bounds: x_ptr"),
    ("M mask", KERNEL, "on = (token < M)[:, None] & ", "on = (token < M + 9)[:, None] & ", "x_ptr"),
    (
        "stage overwritten before it is read",
        KERNEL,
        "fill = ring.index((step + STAGES - 1) % STAGES)",
        "fill = ring.index((step + STAGES - 2) % STAGES)",
        "in flight|before it was read",
    ),
    (
        "stage overwritten with no barrier since it was read",
        KERNEL,
        "            barrier()\n",
        "",
        "no barrier|before a barrier",
    ),
    (
        "wait too short",
        KERNEL,
        "cp_async_wait(STAGES - 2)",
        "cp_async_wait(STAGES - 1)",
        "waited for",
    ),
    ("copies left in flight", KERNEL, "    cp_async_wait(0)\n", "", "ends with copies in flight"),
    ("row past the weight", KERNEL, "gl.minimum(tile, gl.cdiv(N, 16) - 1)", "tile", "w_ptr"),
    ("block past the weight", KERNEL, "gl.minimum(it + 1, last - 1)", "it + 1", "w_ptr|words_ptr"),
    ("store past Y", finish, "(token < M)[:, None] & ", "", "store out of bounds: y_ptr"),
    ("column past Y", finish, " & (column < N)[None, :]", "", "stored twice|y_ptr"),
    ("one tile twice", place_of, "% (GROUP * tiles_m) % size", "% 1", "y_ptr is stored twice"),
    (
        "metadata of padding is zero",
        KERNEL,
        "words = load_metadata(words_at + start * (WK * 128 * HALVES), on, WK > 1, HALVES)",
        "words = (load_words(words_at + start * (WK * 128), on & False, WK > 1, 0),)",
        "ordered metadata must be ascending",
    ),
]


@pytest.mark.parametrize(
    ("function", "old", "new", "message"), [f[1:] for f in FAULTS], ids=[f[0] for f in FAULTS]
)
def test_planted_fault_is_raised(function, old, new, message):
    raised = []
    for tile in ("k_warps", "token_warps", "wide"):
        try:
            run_mutated(tile, function, old, new)
        except Fault as fault:
            raised.append(str(fault))
    assert raised and any(re.search(message, text) for text in raised), raised


WRONG = [
    ("registers of A swapped", mma_sp.mma_sp_asm, "{$8,$9,$10,$11}", "{$8,$10,$9,$11}"),
    ("registers of B swapped", mma_sp.mma_sp_asm, "{$12,$13,$14,$15}", "{$13,$12,$14,$15}"),
    ("rows of D swapped", mma_sp.mma_sp_asm, "{$0,$1,$2,$3}, ", "{$2,$3,$0,$1}, "),
    ("selector inverted", mma_sp.mma_sp_asm, "step // 2, step % 2", "step // 2, 1 - step % 2"),
    ("metadata word of another step", mma_sp.mma_sp_asm, "step // 2,", "(step // 2 ^ 1),"),
    ("fragment map of X", KERNEL, "permute([2, 1, 0, 3, 5, 4])", "permute([2, 1, 0, 3, 4, 5])"),
    ("map of D", finish, "permute([3, 1, 5, 7, 2, 0, 6, 4])", "permute([3, 1, 5, 6, 2, 0, 7, 4])"),
    ("step of A", KERNEL, "a = a[1:] + (fresh,)", "a = (fresh,) + a[1:]"),
    ("half of a pair", mma_sp.copy_x, "PER * shift + i)", "PER * shift)"),
]


@pytest.mark.parametrize(
    ("function", "old", "new"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG]
)
def test_planted_wrong_map_gives_a_wrong_result(function, old, new):
    worst = 0.0
    for tile in ("k_warps", "token_warps"):
        if function is mma_sp.copy_x:
            x, packed, weight = problem()
            x = torch.cat([x, x[:, :1]], 1)[:, :K]  # an odd pitch takes the 2-byte path
            replace = {"copy_x": mutated(function, old, new)}
            worst = max(worst, error(run(x, weight, SMALL[tile], replace=replace), x, packed))
        else:
            worst = max(worst, run_mutated(tile, function, old, new))
    assert worst > 0.05


def test_swapped_metadata_nibble_gives_a_wrong_result():
    x, packed, weight = problem()
    word = weight.meta[0, 0, 0]
    low, high = word & 0xF, word >> 4 & 0xF
    place = int((low != high).nonzero()[0])
    word[place] = word[place] & ~0xFF | int(low[place]) << 4 | int(high[place])
    assert error(run(x, weight, SMALL["k_warps"]), x, packed) > 0.01


def test_swapped_value_registers_give_a_wrong_result():
    x, packed, weight = problem()
    swapped = weight._replace(values=weight.values[..., [0, 2, 1, 3]].contiguous())
    assert error(run(x, swapped, SMALL["k_warps"]), x, packed) > 0.05


# Barriers and shared memory, on kernels small enough to see the rule.


@gluon.jit
def _signal(bars, slot):
    mbarrier.arrive(bars.index(slot), count=1)


@gluon.jit
def _await(bars, y_ptr):
    mbarrier.wait(bars.index(0), 0)
    gl.store(y_ptr, 1)


@gluon.jit
def _handshake_kernel(y_ptr, SLOT: gl.constexpr, COUNT: gl.constexpr):
    bars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(bars.index(0), count=COUNT)
    mbarrier.init(bars.index(1), count=1)
    gl.warp_specialize([(_await, (bars, y_ptr)), (_signal, (bars, SLOT))], [1])


def test_barrier_that_is_signalled_and_one_that_nobody_signals():
    y = torch.zeros(1, dtype=torch.int32)
    gluon_numpy.run(_handshake_kernel, (1,), y, SLOT=0, COUNT=1)
    assert y.item() == 1
    for wrong in ({"SLOT": 1, "COUNT": 1}, {"SLOT": 0, "COUNT": 2}):
        with pytest.raises(Fault, match=r"deadlock: partitions \[0\] wait for ever"):
            gluon_numpy.run(_handshake_kernel, (1,), y, **wrong)
    with pytest.raises(Fault, match="barrier 2 of 2"):
        gluon_numpy.run(_handshake_kernel, (1,), y, SLOT=2, COUNT=1)


@gluon.jit
def _address_kernel(x_ptr, y_ptr, START: gl.constexpr, STEP: gl.constexpr):
    offs = START + gl.arange(0, 4) * STEP
    gl.store(y_ptr + gl.arange(0, 4), gl.load(x_ptr + offs))


def test_loads_are_checked_against_the_elements_of_the_tensor():
    base, y = torch.arange(12, dtype=torch.int32).view(3, 4), torch.zeros(4, dtype=torch.int32)
    view = base[:, :2]
    gluon_numpy.run(_address_kernel, (1,), base, y, START=8, STEP=1)
    assert y.tolist() == [8, 9, 10, 11]
    for start, step in ((9, 1), (-1, 1), (0, 4)):
        with pytest.raises(Fault, match="load out of bounds: x_ptr"):
            gluon_numpy.run(_address_kernel, (1,), base, y, START=start, STEP=step)
    with pytest.raises(Fault, match=r"load out of bounds: x_ptr\[2\]"):
        gluon_numpy.run(_address_kernel, (1,), view, y, START=0, STEP=1)
    with pytest.raises(Fault, match="int32 arithmetic overflows"):
        gluon_numpy.run(_address_kernel, (1,), base, y, START=0, STEP=2**30)


@gluon.jit
def _unwritten_kernel(y_ptr):
    shared = gl.allocate_shared_memory(gl.int32, [4], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    gl.store(y_ptr + gl.arange(0, 4), shared.load(gl.BlockedLayout([1], [32], [1], [0])))


def test_shared_memory_that_was_never_written():
    with pytest.raises(Fault, match="read that was never written"):
        gluon_numpy.run(_unwritten_kernel, (1,), torch.zeros(4, dtype=torch.int32))


def test_unknown_ptx_is_not_passed_over():
    block = types.SimpleNamespace()
    with pytest.raises(Fault, match=r"no emulation of PTX 'mma\.sync"):
        lanes = np.zeros(32, np.int32)
        gluon_ptx.execute(block, "mma.sync $0, $1;", "=r,r", [lanes], gluon_numpy.int32, 1)


def test_emulated_mma_sp_against_a_hand_computed_product():
    """Row 9 of A: values 2 and 3 in columns 1 and 3; column 4 of B: 10 and 100 in those rows."""
    a = [np.zeros(32, np.int64) for _ in range(4)]
    two, three = (np.float32([2, 3]).view(np.uint32) >> 16).tolist()
    a[1][4 * 1 + 0] = two | three << 16  # register 1: row g + 8, compressed columns 2 t, 2 t + 1
    b = [np.zeros(32, np.int64) for _ in range(4)]
    ten, hundred = (np.float32([10, 100]).view(np.uint32) >> 16).tolist()
    b[0][4 * 4 + 0] = ten << 16  # k = 1, column 4
    b[0][4 * 4 + 1] = hundred << 16  # k = 3, column 4
    words = np.full(32, 0x44444444, np.int64)
    words[4] = 0x444D4444  # lane 4 (g = 1, t = 0): high half is row 9, first nibble 0b1101
    c = [np.ones(32, np.float32) for _ in range(4)]
    d = gluon_ptx.mma_sp("bf16", a, b, c, words, 0)
    want = np.ones((4, 32))
    want[2, 4 * 1 + 2] = 1 + 2 * 10 + 3 * 100  # row 9, column 4 = 2 t + 0: register 2 of lane 6
    assert np.array_equal(np.stack(d), want)
