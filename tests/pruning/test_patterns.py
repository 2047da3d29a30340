import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slimgemm.kernels.formats import PATTERNS
from slimgemm.pruning import Block, Channels, Kernel, NofM, Unstructured, Vector
from slimgemm.pruning.patterns import keep_highest, like_weight, rows_of, rows_shape

SHAPES = [(8, 16), (5, 7), (1, 4), (6, 8, 3, 3), (4, 5, 1, 2)]
COUNTED = [Unstructured(), Block(2, 4), Block(3, 3), Vector(4)]


def test_two_of_four_along_a_row():
    scores = torch.tensor([[4.0, 1, 3, 2, 0, 9, 8, 7]])
    assert NofM(2, 4).mask(scores).int().tolist() == [[1, 0, 1, 0, 0, 1, 1, 0]]


def test_ties_go_to_the_lower_index():
    assert NofM(2, 4).mask(torch.ones(1, 4)).int().tolist() == [[1, 1, 0, 0]]
    assert Unstructured().mask(torch.ones(2, 3), 4).int().tolist() == [[1, 1, 0], [0, 0, 0]]
    assert keep_highest(torch.tensor([1.0, 2, 2, 2]), 2).int().tolist() == [0, 1, 1, 0]


def test_partial_group_keeps_at_most_keep():
    mask = NofM(2, 4).mask(torch.tensor([[1.0, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 7, 6, 5]]))
    assert mask.int().tolist() == [[0, 0, 1, 1, 0, 1, 1], [0, 0, 1, 1, 1, 1, 0]]
    assert NofM(4, 8).mask(torch.ones(1, 3)).all()


def test_convolution_groups_run_along_input_channels_at_one_tap():
    scores = torch.zeros(1, 4, 1, 2)
    scores[0, :, 0, 0] = torch.tensor([1.0, 2, 3, 4])
    scores[0, :, 0, 1] = torch.tensor([4.0, 3, 2, 1])
    mask = NofM(2, 4).mask(scores)
    assert mask[0, :, 0, 0].tolist() == [False, False, True, True]
    assert mask[0, :, 0, 1].tolist() == [True, True, False, False]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_round_trip(shape, normal):
    weight = normal(*shape)
    assert tuple(rows_of(weight).shape) == rows_shape(shape)
    assert torch.equal(like_weight(rows_of(weight), weight.shape), weight)


@pytest.mark.parametrize("keep, group", [*PATTERNS, (3, 5), (1, 2)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_n_of_m_keeps_the_best_of_each_group(keep, group, shape, normal):
    scores = normal(*shape).abs()
    kept, rows = rows_of(NofM(keep, group).mask(scores)), rows_of(scores)
    for start in range(0, rows.shape[2], group):
        part, mask = rows[..., start : start + group], kept[..., start : start + group]
        want = min(keep, part.shape[2])
        assert (mask.sum(2) == want).all()
        lowest_kept = part.masked_fill(~mask, 9e9).min(2).values
        assert (part.masked_fill(mask, -1).max(2).values <= lowest_kept).all()


@pytest.mark.parametrize("pattern", COUNTED, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mask_drops_the_lowest_units_and_no_others(pattern, shape, normal):
    scores = normal(*shape).abs()
    units = pattern.units(scores)
    for drop in {0, units.numel() // 2, units.numel() - 1}:
        mask = pattern.mask(scores, drop)
        assert mask.shape == scores.shape and mask.dtype == torch.bool
        kept = pattern.units(mask.float()) > 0
        assert int((~kept).sum()) == drop
        if drop:
            assert units[~kept].max() <= units[kept].min()
        # whole units: what a mask keeps is what expanding its kept units gives
        assert torch.equal(pattern.expand(kept, tuple(shape)), mask)


def test_block_sums_are_those_of_the_blocks(normal):
    scores = normal(4, 6)
    want = [scores[i : i + 2, j : j + 3].sum() for i in (0, 2) for j in (0, 3)]
    torch.testing.assert_close(Block(2, 3).units(scores), torch.stack(want))


def test_vector_and_kernel_units_of_a_convolution(normal):
    scores = normal(2, 3, 2, 4)
    torch.testing.assert_close(Vector().units(scores), scores.sum(3).flatten())
    torch.testing.assert_close(Kernel().units(scores), scores.sum((2, 3)).flatten())
    mask = Kernel().mask(scores, 5)
    assert int(mask.flatten(2).all(2).sum()) == 1 and int(mask.sum()) == 8


@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 20),
    r=st.integers(1, 4),
    c=st.integers(1, 5),
    data=st.data(),
)
@settings(max_examples=40, deadline=None)
def test_block_masks_are_constant_inside_blocks(rows, columns, r, c, data):
    scores = torch.rand(rows, columns, generator=torch.Generator().manual_seed(rows * columns))
    pattern = Block(r, c)
    drop = data.draw(st.integers(0, pattern.units(scores).numel() - 1))
    mask = pattern.mask(scores, drop)
    for i in range(0, rows, r):
        for j in range(0, columns, c):
            block = mask[i : i + r, j : j + c]
            assert block.all() or not block.any()


def test_stored_bytes():
    half = NofM(2, 4)
    assert half.stored_bytes(half.mask(torch.rand(16, 64)), 2) == 16 * 64 * 2 * 9 // 16
    assert half.stored_bytes(half.mask(torch.rand(3, 5)), 2) == 3 * (4 * 2 + 1)


@pytest.mark.parametrize(
    "pattern", [NofM(3, 7), NofM(1, 2), Unstructured(), Block(1, 2), Vector(2)], ids=str
)
def test_what_no_format_packs_takes_its_dense_bytes(pattern, normal):
    mask = pattern.mask(normal(6, 14).abs(), 20)
    assert int(mask.sum()) < mask.numel()
    assert pattern.stored_bytes(mask, 4) == 6 * 14 * 4


@pytest.mark.parametrize("keep, group", PATTERNS)
def test_patterns_of_the_format_pack(keep, group):
    assert NofM(keep, group).packs and not NofM(keep, group + 1).packs
    assert Kernel().stored_bytes(torch.ones(1, 2, 1, 2), 4) == 16


def test_refusals():
    with pytest.raises(ValueError, match="keep counts the weights that stay"):
        NofM(4, 4)
    assert "no 2-D kernels" in str(Kernel().refusal((4, 4)))
    assert "3 dimensions" in str(NofM().refusal((4, 4, 3)))
    assert NofM().refusal((4, 4)) is None


@pytest.mark.parametrize("value", ["2", 2.0, True, 0, -1, None, float("nan")], ids=repr)
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda value: NofM(value, 4), "keep of NofM"),
        (lambda value: NofM(1, value), "group of NofM"),
        (lambda value: Block(value, 4), r"r of Block \(rows\)"),
        (lambda value: Block(4, value), r"c of Block \(columns\)"),
        (lambda value: Vector(value), "length of Vector"),
        (lambda value: Channels(multiple_of=value), "multiple_of of Channels"),
        (lambda value: Channels(floor=value), "floor of Channels"),
    ],
    ids=["keep", "group", "r", "c", "length", "multiple_of", "floor"],
)
def test_sizes_are_whole_numbers(make, name, value):
    with pytest.raises(ValueError, match=f"{name} must be a whole number of at least 1, got "):
        make(value)


def test_whole_numbers_of_numpy_are_taken():
    assert NofM(np.int64(2), np.int32(4)).packs and Channels(np.int64(8)).multiple_of == 8


@pytest.mark.parametrize("width", [1, 4, 16, 17, 40])
def test_short_and_long_axes_rank_alike(width):
    scores = torch.randint(0, 4, (50, width), generator=torch.Generator().manual_seed(0)).float()
    scores[:, :1] = float("-inf")
    for keep in {0, 1, width // 2, width}:
        got = keep_highest(scores, keep)
        for row, mask in zip(scores.tolist(), got.tolist(), strict=True):
            best = sorted(range(width), key=lambda i: (-row[i], i))[:keep]
            assert [i for i, kept in enumerate(mask) if kept] == sorted(best)
