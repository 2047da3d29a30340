"""Hardware orders: hand-written words, element by element, torch's CUTLASS order, inverses."""

import pytest
import torch
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from slimgemm.kernels.formats import Packed24
from slimgemm.kernels.gluon import orders
from slimgemm.kernels.reference import pack_24_ref, prune_24_ref, unpack_24_ref

SHAPES = [(16, 256), (128, 128), (64, 512), (33, 264), (1, 8), (130, 100), (7, 1000), (48, 36)]
IDS = [f"{n}x{k}" for n, k in SHAPES]
DTYPES = [torch.bfloat16, torch.float16]


def random_packed(n, k, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return prune_24_ref(torch.randn(n, k, generator=generator).to(dtype))


def same(a: Packed24, b: Packed24) -> bool:
    bits = torch.equal(a.values.view(torch.int16), b.values.view(torch.int16))
    return bits and torch.equal(a.meta, b.meta) and a[2:] == b[2:]


def test_the_worked_metadata_word_of_the_docstring():
    meta = torch.full((16, 4), orders.EMPTY_BYTE, dtype=torch.uint8)
    meta[1, 2:4] = torch.tensor([0x44, 0xE9], dtype=torch.uint8)
    meta[9, 2:4] = torch.tensor([0x94, 0x4E], dtype=torch.uint8)
    packed = Packed24(torch.zeros(16, 16, dtype=torch.float16), meta, 32)
    words = orders.to_mma_sp(packed).meta
    assert words[0, 0, 5, 0] == 0x4E94E944
    words[0, 0, 5, 0] = 0x44444444
    assert (words == 0x44444444).all()
    wide = orders.to_wgmma_sp(packed).meta
    assert wide.shape == (1, 1, 2, 128, 2) and wide[0, 0, 0, 5, 0] == 0x4E94E944


def test_values_of_one_lane_are_the_documented_ones():
    values = torch.arange(16 * 128, dtype=torch.int16).view(
        16, 128
    )  # row * 128 + compressed column
    meta = torch.full((16, 32), orders.EMPTY_BYTE, dtype=torch.uint8)
    packed = Packed24(values.view(torch.bfloat16), meta, 256)
    lane = orders.to_mma_sp(packed).values[0, 0, 3, 14].view(torch.int16).tolist()
    # Lane 14: g = 3, t = 2. Step 3 begins at compressed column 48.
    row_3, row_11, first, second = 3 * 128, 11 * 128, 48 + 4, 48 + 12
    assert lane == [
        row_3 + first, row_3 + first + 1, row_11 + first, row_11 + first + 1,
        row_3 + second, row_3 + second + 1, row_11 + second, row_11 + second + 1,
    ]  # fmt: skip


@pytest.mark.parametrize(("n", "k"), SHAPES, ids=IDS)
def test_mma_sp_element_by_element(n, k):
    """Each half register and each nibble, decoded by the two tables of the PTX page."""
    packed = random_packed(n, k)
    weight = orders.to_mma_sp(packed)
    values, meta = packed.values.view(torch.int16), packed.meta
    tiles, blocks = -(-n // 16), -(-k // 256)
    assert weight.values.shape == (tiles, blocks, 8, 32, 4)
    assert weight.meta.shape == (tiles, blocks, 32, 4)
    halves = weight.values.view(torch.int16).view(tiles, blocks, 8, 32, 4, 2)
    rng = torch.Generator().manual_seed(1)
    for _ in range(200):
        tile, block, step, lane, r, h = (
            int(torch.randint(limit, (1,), generator=rng)) for limit in (tiles, blocks, 8, 32, 4, 2)
        )
        g, t = divmod(lane, 4)
        row, column = (
            16 * tile + g + 8 * (r % 2),
            128 * block + 16 * step + 2 * t + h + 8 * (r // 2),
        )
        inside = row < n and column < values.shape[1]
        assert halves[tile, block, step, lane, r, h] == (values[row, column] if inside else 0)

        word = int(weight.meta[tile, block, lane, r])
        for half in range(2):
            for nibble in range(4):
                row = 16 * tile + g + 8 * half
                group = 64 * block + 8 * (2 * r + t // 2) + 4 * (t % 2) + nibble
                inside = row < n and group // 2 < meta.shape[1]
                want = int(meta[row, group // 2]) >> 4 * (group % 2) & 15 if inside else 0b0100
                assert word >> (16 * half + 4 * nibble) & 15 == want


@pytest.mark.parametrize(("n", "k"), SHAPES, ids=IDS)
def test_wgmma_sp_metadata_nibble_by_nibble(n, k):
    packed = random_packed(n, k)
    weight = orders.to_wgmma_sp(packed)
    tiles, blocks = -(-n // 128), -(-k // 128)
    assert weight.meta.shape == (tiles, blocks, 2, 128, 2)
    assert weight.values.shape[1] % 8 == 0
    assert torch.equal(weight.values[:, : packed.values.shape[1]], packed.values)
    assert not weight.values[:, packed.values.shape[1] :].any()
    rng = torch.Generator().manual_seed(2)
    for _ in range(200):
        tile, block, group64, thread, j, half, nibble = (
            int(torch.randint(limit, (1,), generator=rng))
            for limit in (tiles, blocks, 2, 128, 2, 2, 4)
        )
        g, t = divmod(thread % 32, 4)
        row = 128 * tile + 64 * group64 + 16 * (thread // 32) + g + 8 * half
        group = 32 * block + 8 * (2 * j + t // 2) + 4 * (t % 2) + nibble
        inside = row < n and group // 2 < packed.meta.shape[1]
        want = int(packed.meta[row, group // 2]) >> 4 * (group % 2) & 15 if inside else 0b0100
        word = int(weight.meta[tile, block, group64, thread, j])
        assert word >> (16 * half + 4 * nibble) & 15 == want


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k"), SHAPES, ids=IDS)
def test_orders_invert_exactly(n, k, dtype):
    packed = random_packed(n, k, dtype, seed=n + k)
    assert same(orders.from_mma_sp(orders.to_mma_sp(packed)), packed)
    assert same(orders.from_wgmma_sp(orders.to_wgmma_sp(packed)), packed)


def test_wgmma_values_are_shared_where_the_pitch_allows():
    packed = random_packed(64, 256)
    assert orders.to_wgmma_sp(packed).values.data_ptr() == packed.values.data_ptr()


@pytest.mark.parametrize(("n", "k"), [(32, 32), (64, 256), (96, 544)], ids=str)
def test_mma_sp_metadata_is_what_torchs_cutlass_conversion_gives(n, k):
    dense = torch.randn(n, k, generator=torch.Generator().manual_seed(3))
    dense = prune_24_ref(dense.half())
    values, meta = sparse_semi_structured_from_dense_cutlass(unpack_24_ref(dense))
    packed = orders.from_cutlass_meta(values, meta)
    assert same(packed, dense)
    assert torch.equal(orders.to_cutlass_meta(dense), meta)
    # The words themselves: CUTLASS [step, 32-row block, g, tile, t] against our lanes.
    theirs = meta.contiguous().view(torch.int32).view(k // 32, n // 32, 8, 2, 2)
    ours = orders.to_mma_sp(packed).meta
    for step in range(k // 32):
        for tile in range(n // 16):
            for g in range(8):
                for t in range(2):
                    lane, word = 4 * g + 2 * (step % 2) + t, step % 8 // 2
                    assert (
                        ours[tile, step // 8, lane, word] == theirs[step, tile // 2, g, tile % 2, t]
                    )


def test_refusals_name_what_is_wrong():
    weight = torch.zeros(16, 32)
    with pytest.raises(ValueError, match="float16, bfloat16, float8_e4m3fn or int8, got torch"):
        orders.to_mma_sp(pack_24_ref(weight))
    with pytest.raises(ValueError, match="keep:group must be 2:4 for a tensor core, got 1:4"):
        orders.to_wgmma_sp(pack_24_ref(weight.half(), 1, 4))
    with pytest.raises(ValueError, match=r"got \[16, 32\]"):
        orders.to_cutlass_meta(pack_24_ref(weight.half()))
    with pytest.raises(ValueError, match="CUTLASS metadata must be int16"):
        orders.from_cutlass_meta(weight.half(), torch.zeros(16, 4, dtype=torch.int16))


def test_importing_the_package_does_not_import_triton():
    import subprocess
    import sys

    code = "import sys, slimgemm.kernels.gluon.orders; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
