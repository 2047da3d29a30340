"""Hardware orders of 8-bit values: hand-written words, each element, CUTLASS, pack kernels."""

import gluon_numpy
import pytest
import torch
from gluon_numpy import mutated
from helpers import random_24
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from slimgemm.kernels.formats import Packed24
from slimgemm.kernels.gluon import orders, pack, pack_dense, unpack
from slimgemm.kernels.quantize_24 import LARGEST, quantize_24
from slimgemm.kernels.reference import pack_24_ref, unpack_24_ref

SHAPES = [(16, 512), (128, 256), (33, 528), (1, 8), (130, 1000), (7, 36), (20, 333)]
DTYPES = list(LARGEST)
ORDERS = {"mma_sp": orders.to_mma_sp, "wgmma_sp": orders.to_wgmma_sp}


def random_packed(n, k, dtype=torch.int8, seed=0):
    return quantize_24(random_24(n, k, seed=seed), dtype)[0]


def dense_of(packed):
    wide = unpack_24_ref(packed._replace(values=packed.values.half()))
    return wide.to(packed.values.dtype)


def bits(t):
    return t.view(torch.uint8)


def same(got, want):
    equal = torch.equal(bits(got.values), bits(want.values)) and torch.equal(got.meta, want.meta)
    return equal and got[2:] == want[2:]


def test_the_worked_metadata_word_of_the_docstring():
    meta = torch.full((16, 64), orders.EMPTY_BYTE, dtype=torch.uint8)
    meta[9, 12:16] = torch.tensor([0x44, 0xE9, 0x94, 0x4E], dtype=torch.uint8)
    packed = Packed24(torch.zeros(16, 256, dtype=torch.int8), meta, 512)
    words = orders.to_mma_sp(packed).meta
    assert words.shape == (1, 1, 2, 32, 4) and words[0, 0, 0, 7, 1] == 0x4E94E944
    words[0, 0, 0, 7, 1] = 0x44444444
    assert (words == 0x44444444).all()
    wide = orders.to_wgmma_sp(packed).meta
    assert wide.shape == (1, 2, 2, 128, 4) and wide[0, 0, 0, 7, 1] == 0x4E94E944


def test_values_of_one_lane_are_the_documented_ones():
    values = (torch.arange(16)[:, None] * 7 + torch.arange(256)).to(torch.int8)
    meta = torch.full((16, 64), orders.EMPTY_BYTE, dtype=torch.uint8)
    lane = orders.to_mma_sp(Packed24(values, meta, 512)).values[0, 0, 3, 14].view(torch.int8)
    # Lane 14: g = 3, t = 2. Step 3 begins at compressed column 96.
    want = [
        values[row, 96 + first : 96 + first + 4]
        for first, row in ((8, 3), (8, 11), (24, 3), (24, 11))
    ]
    assert torch.equal(lane, torch.cat(want))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k"), SHAPES, ids=str)
def test_orders_and_pack_kernels_invert_exactly(n, k, dtype):
    """to, from, the pack kernels from a Packed24 and from a dense weight, and the way back."""
    packed = random_packed(n, k, dtype, seed=n + k)
    dense = dense_of(packed)
    narrow, wide = orders.to_mma_sp(packed), orders.to_wgmma_sp(packed)
    assert same(orders.from_mma_sp(narrow), packed) and same(orders.from_wgmma_sp(wide), packed)

    launch = pack.prepare_values(packed)
    gluon_numpy.run(pack._pack_values_kernel, launch.grid, *launch.args, **launch.constants)
    assert torch.equal(launch.out, narrow.values)
    for weight, rows, block_bytes in ((narrow, 16, 512), (wide, 128, 256)):
        launch = pack.prepare_words(packed, rows, block_bytes)
        gluon_numpy.run(pack._pack_words_kernel, launch.grid, *launch.args, **launch.constants)
        assert torch.equal(launch.out.view(weight.meta.shape), weight.meta)

        made = pack_dense.prepare_pack(dense, rows == 16)
        kernel = pack_dense._pack_dense_kernel
        gluon_numpy.run(kernel, made.grid, *made.args, **made.constants)
        assert torch.equal(bits(made.values), bits(weight.values))
        assert torch.equal(made.meta, weight.meta) and made.bad[0] == 0

        back = unpack.prepare_unpack(weight)
        kernel = unpack._unpack_dense_kernel
        gluon_numpy.run(kernel, back.grid, *back.args, **back.constants)
        assert torch.equal(bits(back.values), bits(dense))


@pytest.mark.parametrize(("n", "k"), [(33, 528), (130, 1000)], ids=str)
def test_mma_sp_element_by_element(n, k):
    """Each byte and each nibble, decoded by the tables of the PTX page."""
    packed = random_packed(n, k)
    weight = orders.to_mma_sp(packed)
    tiles, blocks = -(-n // 16), -(-k // 512)
    assert weight.values.shape == (tiles, blocks, 8, 32, 4)
    assert weight.meta.shape == (tiles, blocks, 2, 32, 4)
    numbers = weight.values.view(torch.int8).view(tiles, blocks, 8, 32, 4, 4)
    rng = torch.Generator().manual_seed(1)
    for _ in range(300):
        limits = (tiles, blocks, 8, 32, 4, 4, 8)
        tile, block, step, lane, r, h, nibble = (
            int(torch.randint(limit, (1,), generator=rng)) for limit in limits
        )
        g, t = divmod(lane, 4)
        row = 16 * tile + g + 8 * (r % 2)
        column = 256 * block + 32 * step + 4 * t + h + 16 * (r // 2)
        inside = row < n and column < packed.values.shape[1]
        assert numbers[tile, block, step, lane, r, h] == (
            packed.values[row, column] if inside else 0
        )
        row = 16 * tile + g + 8 * (t % 2)
        group = 128 * block + 16 * step + 8 * (t // 2) + nibble
        inside = row < n and group // 2 < packed.meta.shape[1]
        want = int(packed.meta[row, group // 2]) >> 4 * (group % 2) & 15 if inside else 0b0100
        word = int(weight.meta[tile, block, step // 4, lane, step % 4])
        assert word >> (4 * nibble) & 15 == want


def test_wgmma_sp_words_in_the_metadata_layout_of_cutlass():
    """ELayout_64x64: thread (2, 2, 8, 4):(8, 2048, 1, 16), value 32:64, of 64 rows x 64 columns."""
    packed = random_packed(128, 512)
    weight = orders.to_wgmma_sp(packed)
    for thread in range(128):
        t0, t1, g, warp = thread % 2, thread // 2 % 2, thread // 4 % 8, thread // 32
        first = 8 * t0 + 2048 * t1 + g + 16 * warp
        row, column = first % 64, first // 64
        for block in range(2):
            for group64 in range(2):
                for step in range(4):
                    byte = (256 * block + 64 * step + column) // 8
                    want = packed.meta[64 * group64 + row, byte : byte + 4]
                    got = weight.meta[0, block, group64, thread, step : step + 1]
                    assert torch.equal(got.view(torch.uint8), want)


@pytest.mark.parametrize(("n", "k"), [(16, 64), (64, 512), (48, 1088)], ids=str)
def test_metadata_is_what_torchs_cutlass_conversion_gives(n, k):
    dense = dense_of(random_packed(n, k))
    # Groups of two non-zeros: for fewer, torch names other positions.
    dense = torch.where(dense.view(-1, 4).ne(0).sum(1, True) == 2, dense.view(-1, 4), 0)
    dense[(dense != 0).sum(1) == 0] = torch.tensor([1, 0, 0, 5], dtype=torch.int8)
    dense = dense.view(n, k)
    values, meta = sparse_semi_structured_from_dense_cutlass(dense)
    packed = orders.from_cutlass_meta(values, meta)
    want = pack_24_ref(dense.half())
    assert torch.equal(packed.meta, want.meta) and torch.equal(packed.values, want.values.char())
    assert torch.equal(orders.to_cutlass_meta(packed), meta)
    # The words themselves: CUTLASS [step, tile, lane] against our lanes.
    theirs = meta.view(k // 64, n // 16, 32)
    ours = orders.to_mma_sp(packed).meta
    for step in range(k // 64):
        for tile in range(n // 16):
            got = ours[tile, step // 8, step % 8 // 4, :, step % 4]
            assert torch.equal(got, theirs[step, tile])


def test_refusals_of_the_cutlass_order():
    with pytest.raises(ValueError, match=r"\[16 i, 64 j\] for CUTLASS metadata of 8-bit values"):
        orders.to_cutlass_meta(random_packed(16, 32))
    with pytest.raises(ValueError, match=r"CUTLASS metadata must be int32 \[16, 2\]"):
        orders.from_cutlass_meta(
            torch.zeros(16, 32, dtype=torch.int8), torch.zeros(16, 4, dtype=torch.int16)
        )
    with pytest.raises(ValueError, match="meta must be uint8"):
        orders.to_mma_sp(random_packed(16, 32)._replace(meta=torch.zeros(16, 3)))


def pack_dense_of(w, fragments, replace=None, kernel=pack_dense._pack_dense_kernel):
    made = pack_dense.prepare_pack(w, fragments)
    gluon_numpy.run(kernel, made.grid, *made.args, replace=replace, **made.constants)
    return made


def test_minus_128_is_a_number_and_minus_zero_is_not():
    w = torch.tensor([[-128, 0, 0, 1, 0, 0, -128, -128]], dtype=torch.int8)
    made = pack_dense_of(w, False)
    assert made.values[0, :4].tolist() == [-128, 1, -128, -128]
    zeros = torch.tensor([[0x80, 0x01, 0x80, 0x7F]], dtype=torch.uint8).view(torch.float8_e4m3fn)
    made = pack_dense_of(zeros, False)
    assert made.values.view(torch.uint8)[0, :2].tolist() == [0x01, 0x7F] and made.bad[0] == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("row", "column"), [(3, 8), (3, 12), (129, 992), (129, 996)], ids=str)
def test_first_bad_group_is_named(row, column, dtype):
    w = dense_of(random_packed(130, 1000, dtype)).float()
    w[row, column : column + 3] = 1
    w[129, 997:] = 1
    w = w.to(dtype)
    for fragments in (True, False):
        with pytest.raises(ValueError, match=f"row {row}, columns {column}-{column + 3} hold"):
            pack_dense.raise_if_bad(w, pack_dense_of(w, fragments).bad)


WRONG = {  # name: function, old, new, register order or rows
    "rows of a word": (pack_dense.store_words, "[0, 3, 2, 5, 1, 4]", "[0, 3, 2, 1, 5, 4]", True),
    "bytes of a word": (pack_dense.store_words, "pair % 4 * 8", "(pair ^ 1) % 4 * 8", False),
    "values of a register": (
        pack_dense._pack_dense_kernel, "(high << 8) | (low_1 << 16)", "(high << 16) | (low_1 << 8)",
        True,
    ),
    "nibbles swapped": (
        pack_dense._pack_dense_kernel, "nibble_0 | (nibble_1 << 4)", "nibble_1 | (nibble_0 << 4)",
        False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_planted_wrong_map_is_seen(name):
    function, old, new, fragments = WRONG[name]
    packed = random_packed(48, 520)
    changed = mutated(function, old, new)
    if function is pack_dense._pack_dense_kernel:
        made = pack_dense_of(dense_of(packed), fragments, kernel=changed)
    else:
        made = pack_dense_of(dense_of(packed), fragments, {function.fn.__name__: changed})
    want = orders.to_mma_sp(packed) if fragments else orders.to_wgmma_sp(packed)
    assert not (
        torch.equal(bits(made.values), bits(want.values)) and torch.equal(made.meta, want.meta)
    )


def test_planted_wrong_map_of_the_words_kernel_is_seen():
    packed = random_packed(48, 520)
    launch = pack.prepare_words(packed, 16, 512)
    changed = mutated(pack._pack_words_kernel, "row + lane % 2 * 8", "row + lane % 4 // 2 * 8")
    gluon_numpy.run(changed, launch.grid, *launch.args, **launch.constants)
    assert not torch.equal(launch.out.squeeze(-3), orders.to_mma_sp(packed).meta)
