"""Packing from a dense weight on the NumPy executor: bits, bad groups, and the exact inverse."""

import gluon_numpy
import pytest
import torch
from gluon_numpy import Fault, mutated
from helpers import random_24

from slimgemm.kernels.gluon import orders, pack_dense, unpack
from slimgemm.kernels.reference import pack_24_ref

SHAPES = [(16, 256), (33, 264), (1, 8), (130, 1000), (7, 36), (20, 333)]
DTYPES = [torch.float16, torch.bfloat16]
KERNEL = pack_dense._pack_dense_kernel
ORDERS = {True: orders.to_mma_sp, False: orders.to_wgmma_sp}


def pack(w, fragments, kernel=KERNEL, replace=None):
    """What the launchers return for `w`, and the counts of bad groups."""
    launch = pack_dense.prepare_pack(w, fragments)
    gluon_numpy.run(kernel, launch.grid, *launch.args, replace=replace, **launch.constants)
    if fragments:
        return orders.MmaSp(launch.values, launch.meta, *w.shape, w.dtype), launch.bad
    return orders.WgmmaSp(launch.values, launch.meta, *w.shape), launch.bad


def same(got, want):
    bits = torch.equal(got.values.view(torch.int16), want.values.view(torch.int16))
    return bits and torch.equal(got.meta, want.meta) and got[2:] == want[2:]


def dense_of(weight):
    launch = unpack.prepare_unpack(weight)
    gluon_numpy.run(unpack._unpack_dense_kernel, launch.grid, *launch.args, **launch.constants)
    return launch.values


@pytest.mark.parametrize("fragments", ORDERS, ids=["mma_sp", "wgmma_sp"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k"), SHAPES, ids=str)
def test_the_bits_of_pack_24_and_orders_and_back(n, k, dtype, fragments):
    w = random_24(n, k, dtype, seed=n)
    got, bad = pack(w, fragments)
    assert same(got, ORDERS[fragments](pack_24_ref(w)))
    assert bad.tolist() == [0, pack_dense.NONE_BAD]
    assert torch.equal(dense_of(got), w)


@pytest.mark.parametrize("fragments", ORDERS, ids=["mma_sp", "wgmma_sp"])
def test_every_mask_of_a_group_and_every_odd_value(fragments):
    """All masks with at most two kept, with zeros of both signs, NaN, Inf and denormals between."""
    masks = [m for m in range(16) if m.bit_count() <= 2]
    values = [1.0, -2.0, float("nan"), float("-inf"), 6e-8, -6e-8]
    rows = [
        [value if mask >> i & 1 else zero for mask in masks for i in range(4)]
        for value in values
        for zero in (0.0, -0.0)
    ]
    w = torch.tensor(rows, dtype=torch.float16)
    got, bad = pack(w, fragments)
    assert same(got, ORDERS[fragments](pack_24_ref(w))) and bad[0] == 0
    back = dense_of(got)
    assert torch.equal(back.view(torch.int16), (w + 0.0).view(torch.int16))


@pytest.mark.parametrize("fragments", ORDERS, ids=["mma_sp", "wgmma_sp"])
def test_strides_and_offsets(fragments):
    base = random_24(40, 528, torch.float16)
    for w in (base[:, 256:], base[1::2, 8:264], base[:, 4:261], base.t().contiguous().t()):
        got, _ = pack(w, fragments)
        assert same(got, ORDERS[fragments](pack_24_ref(w)))
        aligned = pack_dense.prepare_pack(w, fragments).constants["ALIGNED"]
        assert aligned == (w.stride(1) == 1 and w.shape[1] % 8 == 0 and w.data_ptr() % 16 == 0)


@pytest.mark.parametrize("fragments", ORDERS, ids=["mma_sp", "wgmma_sp"])
@pytest.mark.parametrize(
    ("places", "message"),
    [
        ([(3, 8)], r"row 3, columns 8-11 hold 4 nonzeros \(1 such groups in all\)"),
        ([(129, 996)], r"row 129, columns 996-999 hold 4 nonzeros \(1 such groups in all\)"),
        (
            [(70, 12), (35, 900), (35, 904), (129, 0)],
            r"row 35, columns 900-903 hold 4 nonzeros \(4 such groups in all\); prune it first",
        ),
    ],
    ids=["one", "last", "four"],
)
def test_bad_groups_are_counted_and_the_first_is_named(places, message, fragments):
    w = random_24(130, 1000, torch.bfloat16)
    for row, column in places:
        w[row, column : column + 4] = 1
    _, bad = pack(w, fragments)
    with pytest.raises(ValueError, match="weight is not 2:4: " + message):
        pack_dense.raise_if_bad(w, bad)
    with pytest.raises(ValueError, match="weight is not 2:4: " + message):
        pack_24_ref(w)


def test_three_nonzeros_and_a_ragged_last_group():
    w = torch.zeros(2, 7, dtype=torch.float16)
    w[1, 4:] = torch.tensor([1.0, -0.0, 2.0])
    assert pack(w, True)[1][0] == 0
    w[1, 5] = 3
    _, bad = pack(w, True)
    with pytest.raises(ValueError, match="row 1, columns 4-6 hold 3 nonzeros"):
        pack_dense.raise_if_bad(w, bad)


WRONG = {  # name: function, old, new, register order or rows
    "rows of the fragment": (
        pack_dense.store_values, "permute([2, 1, 4, 3, 0])", "permute([2, 0, 4, 3, 1])", True,
    ),
    "registers of the fragment": (
        pack_dense.store_values, "permute([2, 1, 4, 3, 0])", "permute([2, 1, 4, 0, 3])", True,
    ),
    "rows of a word": (
        pack_dense.store_words, "row // 8 % 2 * 16", "(1 - row // 8 % 2) * 16", True,
    ),
    "nibbles swapped": (pack_dense.store_words, "(pair % 4 * 4)", "((pair ^ 1) % 4 * 4)", False),
    "lanes of a word": (pack_dense.store_words, "[0, 1, 3, 4, 2]", "[0, 1, 4, 3, 2]", False),
    "spare position": (
        pack_dense.compress, "gl.where(n3, zero + 3, gl.where(n2, zero + 2, zero + 1))",
        "gl.where(n3, zero + 3, zero + 2)", True,
    ),
    "values of a group swapped": (KERNEL, "low | (high << 16)\n", "high | (low << 16)\n", False),
    "negative zero kept": (KERNEL, "0xFFFF, MAGNITUDE", "0xFFFF, 0xFFFF", True),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_planted_wrong_map_is_seen(name):
    function, old, new, fragments = WRONG[name]
    w = random_24(48, 520, torch.float16)
    w[w == 0] = -0.0
    changed = mutated(function, old, new)
    if function is KERNEL:
        got, _ = pack(w, fragments, changed)
    else:
        got, _ = pack(w, fragments, replace={function.fn.__name__: changed})
    assert not same(got, ORDERS[fragments](pack_24_ref(w)))


@pytest.mark.parametrize(
    ("function", "old", "new", "message"),
    [
        (pack_dense.load_dense, " & (unit // 4 < K // (16 // SIZE))[None, :]", "", "w_ptr"),
        (pack_dense.load_dense, "(row < N)", "(row < N + 16)", "w_ptr"),
        (pack_dense.store_values, "(row < N)", "(row < N + 1)", "values_ptr"),
        (pack_dense.store_values, " & (pair // 4 < QUADS)[None, :]", "", "values_ptr"),
    ],
    ids=["K mask", "N mask", "rows stored", "columns stored"],
)  # fmt: skip
def test_missing_bounds_are_seen(function, old, new, message):
    base = random_24(33, 528, torch.float16)
    changed = {function.fn.__name__: mutated(function, old, new)}
    with pytest.raises(Fault, match=f"(out of bounds: {message}|{message} is stored twice)"):
        pack(base[:, :264], False, replace=changed)


def test_refusals():
    weight = random_24(16, 32, torch.float16)
    for function in (pack_dense.pack_dense_mma_sp, pack_dense.pack_dense_wgmma_sp):
        with pytest.raises(ValueError, match=r"got torch.float32 \[16, 32\]"):
            function(weight.float())
        with pytest.raises(ValueError, match=r"matrix \[N, K\] of .*got torch.float16 \[512\]"):
            function(weight.view(-1))
        with pytest.raises(ValueError, match="weight must be on a GPU, got cpu; pack_24"):
            function(weight)
    packed = pack_24_ref(weight)
    with pytest.raises(ValueError, match=r"weight must be on a GPU, got cpu; orders\.py"):
        unpack.unpack_mma_sp(orders.to_mma_sp(packed))
    with pytest.raises(ValueError, match=r"weight must be on a GPU, got cpu; orders\.py"):
        unpack.unpack_wgmma_sp(orders.to_wgmma_sp(packed))
