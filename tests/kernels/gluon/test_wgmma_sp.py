"""wgmma_sp on the NumPy executor (TMA, mbarriers, partitions and wgmma.sp emulated); faults."""

import random
import re

import gluon_numpy
import pytest
import torch
from gluon_numpy import Fault, mutated
from helpers import assert_no_worse_than_dense, randn, random_24

from slimgemm.kernels.configs import SMEM_BYTES
from slimgemm.kernels.gluon import orders, wgmma_packed, wgmma_sp
from slimgemm.kernels.gluon.compat import arena_at_zero
from slimgemm.kernels.gluon.wgmma_tiles import WGMMA_SP_TILES, WgmmaTile, wgmma_sp_tile
from slimgemm.kernels.reference import ACTIVATIONS, pack_24_ref, spmm_24_ref

KERNEL = wgmma_sp._wgmma_sp_kernel
SMALL = WgmmaTile(64, 3)


def run(x, weight, tile, programs=2, schedule=None, kernel=KERNEL, replace=None, **epilogue):
    launch = wgmma_sp.prepare(x, weight, tile=tile, programs=programs, **epilogue)
    gluon_numpy.run(
        kernel, launch.grid, *launch.args, schedule=schedule, replace=replace, **launch.constants
    )
    return launch.out


def check(m, n, k, tile, dtype=torch.bfloat16, x=None, programs=2, schedule=None, **epilogue):
    packed = pack_24_ref(random_24(n, k, dtype, seed=n + k))
    x = randn(m, k, dtype=dtype, seed=m + 1) if x is None else x
    got = run(x, orders.to_wgmma_sp(packed), tile, programs, schedule, **epilogue)
    if k % 32 == 0:
        canonical = run(x, packed, tile, programs, schedule, **epilogue)
        assert torch.equal(canonical, got), "the canonical format gives other bits"
    if "scale" in epilogue:
        epilogue["scale"] = epilogue["scale"].expand(n)
    wide = {key: t.double() if torch.is_tensor(t) else t for key, t in epilogue.items()}
    same = {key: t.to(dtype) if torch.is_tensor(t) else t for key, t in wide.items()}
    exact = spmm_24_ref(x.double(), packed._replace(values=packed.values.double()), **wide)
    assert_no_worse_than_dense(got, spmm_24_ref(x, packed, **same), exact, "wgmma_sp")


@pytest.mark.parametrize("tokens", WGMMA_SP_TILES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_shipped_tile_exact_and_ragged(tokens, dtype):
    tile = WGMMA_SP_TILES[tokens]
    check(tokens, 128, 384, tile, dtype)
    check(tokens + 9, 100, 136, tile, dtype)
    check(tokens + 9, 100, 160, tile, dtype)


@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 1, 8), (3, 129, 128), (70, 40, 1032), (130, 300, 72)], ids=str
)
def test_shapes_against_twin(m, n, k):
    check(m, n, k, SMALL)


@pytest.mark.parametrize("programs", [1, 2, 5])
def test_persistent_programs_carry_their_stages_from_tile_to_tile(programs):
    check(150, 300, 264, WgmmaTile(64, 2), programs=programs)


def test_any_order_of_the_partitions():
    """Producer first, last, and at random: the barriers alone must make the result right."""
    for order in ([2, 0, 1], [0, 1, 2], [1, 0, 2]):
        check(65, 130, 400, SMALL, schedule=lambda count, order=order: order)
    shuffle = random.Random(0)
    for _ in range(3):
        check(65, 130, 400, SMALL, schedule=lambda n: shuffle.sample(range(n), n))


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("size", [None, 1, 20], ids=["no_scale", "scalar", "rows"])
def test_epilogues(act, size):
    epilogue = {"act": act, "bias": randn(20, seed=5)}
    if size:
        epilogue["scale"] = randn(size, seed=6) * 0.1
    check(5, 20, 128, SMALL, torch.float16, **epilogue)


def test_rows_with_a_pitch():
    base = randn(9, 512, dtype=torch.bfloat16, seed=1)
    check(9, 32, 256, SMALL, x=base[:, 256:])
    check(1, 32, 256, SMALL, x=randn(2, 257, dtype=torch.bfloat16, seed=1)[:1, :256])


def test_a_weight_of_one_row_may_have_any_pitch():
    """Torch calls it contiguous; TMA takes only pitches of whole 16 bytes."""
    packed = pack_24_ref(random_24(1, 96, torch.bfloat16))
    values = torch.nn.functional.pad(packed.values.expand(2, 48), (0, 1))[:1, :48]
    assert values.is_contiguous() and values.stride(0) == 49
    x = randn(5, 96, dtype=torch.bfloat16)
    got = run(x, packed._replace(values=values), SMALL)
    assert torch.equal(got, run(x, packed, SMALL))


CONSUMER, PRODUCER, STORE = wgmma_sp.consumer, wgmma_sp.producer, wgmma_sp.store_tokens
WORDS = wgmma_sp.load_words
FULL_WAIT = "mbarrier.wait(full.index(slot), (step // STAGES) & 1)"
EMPTY_WAIT = "mbarrier.wait(empty.index(slot), ((step // STAGES) & 1) ^ 1)"
MASK = "mask=on[:, None] & (feature < N)[None, :]"
FIRST_WORDS = (
    "        words = load_words(words_ptr, pid_n, 0, row, column, N, K, WG, ORDERED, PER)\n"
)
FAULTS = {  # name: function, old, new, message
    "a wait that nobody signals": (
        CONSUMER, "mbarrier.arrive(empty.index(slot), count=1)", "pass", "deadlock",
    ),
    "empty barrier counts one consumer": (
        KERNEL, "empty.index(slot), count=2", "empty.index(slot), count=1",
        "more arrivals|before it was read|in flight|waited for",
    ),
    "bytes that never come": (PRODUCER, "UNITS * 16384", "UNITS * 16384 + 16", "deadlock"),
    "no wait for a full stage": (CONSUMER, FULL_WAIT, "pass", "waited for|never written"),
    "no wait for an empty stage": (PRODUCER, EMPTY_WAIT, "pass", "before it was read|in flight"),
    "barriers are not fenced": (KERNEL, "fence_async_shared()", "pass", "not fenced"),
    "phase inverted": (PRODUCER, EMPTY_WAIT, EMPTY_WAIT.replace(" ^ 1", ""), "deadlock"),
    "metadata past the last block": (
        CONSUMER, "gl.minimum(block + 1, blocks - 1)", "(block + 1)", "out of bounds: words_ptr",
    ),
    "store past Y": (STORE, "on = token < M\n", "on = token < M + 64\n", "y_ptr"),
    "features past Y": (STORE, MASK, "mask=on[:, None]", "stored twice|y_ptr"),
    "second half of X": (
        wgmma_sp.wgmma_sp_asm, "(tokens * 128 // 16)", "(tokens * 64 // 16)", "before it was read",
    ),
    "stage counter restarts": (
        CONSUMER, FIRST_WORDS, FIRST_WORDS + "        step = 0\n", "deadlock|waited for|arrivals",
    ),
}  # fmt: skip
WRONG = {  # name: function, old, new
    "rows of the other warpgroup": (CONSUMER, "stage + WG * 8192", "stage + 8192 - WG * 8192"),
    "metadata of the other warpgroup": (WORDS, "WG * 256", "(256 - WG * 256)"),
    "metadata words swapped": (
        WORDS, "(column % 8)[None, :]", "(column % 8 // 2 * 2 + (column + 1) % 2)[None, :]",
    ),
    "step of A": (wgmma_sp.wgmma_sp_asm, "{2 * step}", "{2 * (3 - step)}"),
    "selector": (wgmma_sp.wgmma_sp_asm, "step // 2, step % 2", "step // 2, 1 - step % 2"),
    "halves of X exchanged": (
        PRODUCER, "box * BOX // TOKENS * 64", "(64 - box * BOX // TOKENS * 64)",
    ),
}  # fmt: skip


WRONG_PACKED = {  # name: old, new in load_words
    "words swapped": ("column % 2 * 4 + column % 8 // 2", "(1 - column % 2) * 4 + column % 8 // 2"),
    "lanes swapped": ("column % 8 // 2)", "3 - column % 8 // 2)"),
    "rows of one half": ("row % 8 + 8, N - 1", "row % 8, N - 1"),
    "rows of the other half": ("row % 8, N - 1", "row % 8 + 8, N - 1"),
    "halves exchanged": ("(low & 0xFFFF) | (high << 16)", "(high & 0xFFFF) | (low << 16)"),
    "a block late": ("block * 8 + (", "gl.minimum(block + 1, 3) * 8 + ("),
}


def run_changed(function, old, new, ordered=True):
    packed = pack_24_ref(random_24(200, 544, torch.float16))
    x = randn(70, 544, dtype=torch.float16, seed=1)
    changed = mutated(function, old, new)
    kernel = changed if function is KERNEL else KERNEL
    replace = None if function is KERNEL else {function.fn.__name__: changed}
    results = []
    for order in ([2, 0, 1], [0, 1, 2]):
        weight = orders.to_wgmma_sp(packed) if ordered else packed
        got = run(x, weight, SMALL, 1, lambda _, o=order: o, kernel, replace)
        exact = spmm_24_ref(x.double(), packed._replace(values=packed.values.double()))
        results.append(float((got.double() - exact).abs().max() / exact.abs().max()))
    return results


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_raised(name):
    function, old, new, message = FAULTS[name]
    with pytest.raises(Fault) as caught:
        run_changed(function, old, new)
    assert re.search(message, str(caught.value)), caught.value


@pytest.mark.parametrize("name", WRONG)
def test_planted_wrong_map_gives_a_wrong_result(name):
    assert min(run_changed(*WRONG[name])) > 0.05


@pytest.mark.parametrize("name", WRONG_PACKED)
def test_planted_wrong_map_of_canonical_metadata_gives_a_wrong_result(name):
    assert min(run_changed(WORDS, *WRONG_PACKED[name], ordered=False)) > 0.05


def test_canonical_metadata_is_not_read_past_its_end():
    with pytest.raises(Fault, match="out of bounds: words_ptr"):
        run_changed(WORDS, "(column % 2 * 4 + column % 8 // 2), K // 16 - 1)",
                    "(column % 2 * 4 + column % 8 // 2), K)", ordered=False)  # fmt: skip
    with pytest.raises(Fault, match="out of bounds: words_ptr"):
        run_changed(WORDS, "row % 8 + 8, N - 1", "row % 8 + 8, N + 99", ordered=False)


def test_missing_wgmma_wait_is_seen():
    with pytest.raises(Fault, match="fenced before, committed and waited for"):
        run_changed(wgmma_sp.wgmma_sp_asm, '"wgmma.wait_group.sync.aligned 0;", ', "")


def test_tiles_fit_and_are_ordered():
    assert list(WGMMA_SP_TILES) == sorted(WGMMA_SP_TILES)
    for tokens, tile in WGMMA_SP_TILES.items():
        assert tile.tokens == tokens and wgmma_sp_tile(tokens) is tile
        assert tile.arena_bytes == tile.stages * (128 * 128 + tokens * 256)
        assert tile.arena_bytes + 8192 <= SMEM_BYTES["sm_90"]
    assert wgmma_sp_tile(1).tokens == 64 and wgmma_sp_tile(9999).tokens == 256


def test_launcher_of_the_canonical_format_refuses_before_anything_runs():
    call = wgmma_packed.spmm_24_wgmma_packed
    packed = pack_24_ref(random_24(16, 64, torch.bfloat16))
    x = randn(4, 64, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"x must be \[..., 64\] for a \[16, 64\] weight"):
        call(x[:, :32], packed)
    with pytest.raises(ValueError, match="x must be on a GPU, got cpu"):
        call(x, packed)
    with pytest.raises(ValueError, match="k must be a positive multiple of 32, got 40"):
        call(x[:, :40], pack_24_ref(random_24(16, 40, torch.bfloat16)))
    assert not wgmma_packed.takes(x, packed)  # not on a GPU


def test_launcher_refuses_before_anything_runs():
    packed = orders.to_wgmma_sp(pack_24_ref(random_24(16, 64, torch.bfloat16)))
    x = randn(4, 64, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"x must be \[..., 64\] for a \[16, 64\] weight"):
        wgmma_sp.spmm_24_wgmma_sp(x[:, :32], packed)
    with pytest.raises(ValueError, match="x must be on a GPU, got cpu"):
        wgmma_sp.spmm_24_wgmma_sp(x, packed)


PTX = """
mov.b32 %r1, global_smem;
add.s32 %r2, %r1, {barrier};
mbarrier.init.shared::cta.b64 [%r2], 1;
mov.b32 %r9, 0;
shl.b32 %r3, %r9, 14;
add.s32 %r4, %r1, %r3;
add.s32 %r5, %r4, {arena};
cp.async.bulk.tensor.2d.shared::cluster [%r5], [%rd1, {{%r6, %r7}}], [%r2];
ld.shared.b32 %r8, [%r1+{scratch}];
"""


def test_arena_proof_accepts_offset_zero_only():
    good = {"barrier": 65536, "arena": 0, "scratch": 65552}
    assert arena_at_zero(PTX.format(**good), 65536)
    for wrong in ({"arena": 1024}, {"barrier": 1024}, {"scratch": 512}, {"arena": -1024}):
        assert not arena_at_zero(PTX.format(**(good | wrong)), 65536)
    assert not arena_at_zero(PTX.format(**good).replace("shl", "prmt"), 65536)
    assert not arena_at_zero("", 65536)
