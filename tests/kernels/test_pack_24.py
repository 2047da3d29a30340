"""pack, unpack and prune: bits, algebra, twin, memory (refusals: test_formats.py).

Data movement, so every comparison is exact. Offsets past 2**31 elements are checked on the inputs
of pack_24, whose strides are free; the other operands are contiguous, so that only 4 GiB of real
work would reach there: their kernels make every row number int64 before they multiply it.
"""

import numpy as np
import pytest
import torch
from helpers import randn, random_24
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slimgemm.kernels import formats, reference
from slimgemm.kernels.formats import PATTERNS, Packed24
from slimgemm.kernels.pack_24 import pack_24
from slimgemm.kernels.prune_24 import prune_24, prune_dense_24
from slimgemm.kernels.unpack_24 import unpack_24

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
SHAPES = {
    "exact": (8, 256),
    "ragged_n": (11, 64),
    "ragged_k": (8, 51),
    "k_below_group": (3, 3),
    "one_row": (1, 72),
    "many": (20, 530),
    "no_columns": (4, 0),
    "no_rows": (0, 16),
}
LAUNCHERS = [
    (pack_24, reference.pack_24_ref),
    (prune_24, reference.prune_24_ref),
    (prune_dense_24, reference.prune_dense_24_ref),
]
LAYOUTS = {
    "contiguous": lambda w: w,
    "transposed": lambda w: w.t().contiguous().t(),
    "every_second": lambda w: torch.stack([w, w + 1], -1).flatten(1)[:, ::2],
    "every_third_row": lambda w: torch.stack([w, w, w + 1], 1).flatten(0, 1)[::3],
    "broadcast_rows": lambda w: w[:1].expand(w.shape),
}
each_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: f"{p[0]}:{p[1]}")
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())


def same(got, want):
    """Equal bit for bit, but for the payload of a NaN; tensors, or packed weights."""
    if isinstance(got, Packed24):
        tensors = same(got.values, want.values) and torch.equal(got.meta, want.meta)
        return tensors and got[2:] == want[2:]
    integer = {2: torch.int16, 4: torch.int32}[got.element_size()]
    nan = want.isnan()
    bits = [t.contiguous().view(integer).masked_fill(nan, 0) for t in (got, want)]
    return got.dtype == want.dtype and torch.equal(got.isnan(), nan) and torch.equal(*bits)


@pytest.mark.parametrize(
    "op", [f for pair in LAUNCHERS[:2] for f in pair], ids=lambda f: f.__name__
)
@pytest.mark.parametrize(
    "pattern, dense, values, byte",
    [
        ((2, 4), [0, 5, 0, 6, 7, 8, 0, 0], [5, 6, 7, 8], 0b01_00_11_01),
        ((2, 4), [1, 0, 0, 2, 0, 3, 4, 0], [1, 2, 3, 4], 0b10_01_11_00),
        # Fewer than two non-zeros: the spare position is the lowest free one.
        ((2, 4), [0, 0, 0, 0, 0, 0, 0, 3], [0, 0, 0, 3], 0b11_00_01_00),
        ((2, 4), [9, 0, 0, 0, 0, 9, 0, 0], [9, 0, 0, 9], 0b01_00_01_00),
        ((1, 4), [0, 0, 9, 0, 5, 0, 0, 0], [9, 5], 0b0001_0100),
        ((1, 4), [0, 0, 0, 0, 0, 0, 0, 1], [0, 1], 0b1000_0001),
        ((1, 8), [0, 0, 0, 0, 0, 7, 0, 0], [7], 0b0010_0000),
        ((2, 8), [0, 0, 0, 3, 0, 0, 4, 0], [3, 4], 0b0100_1000),
        ((2, 8), [0, 0, 0, 0, 0, 0, 4, 0], [0, 4], 0b0100_0001),
        ((4, 8), [1, 0, 2, 0, 0, 3, 0, 4], [1, 2, 3, 4], 0b1010_0101),
    ],
)
def test_bytes_are_those_written_by_hand(op, pattern, dense, values, byte, device):
    packed = op(torch.tensor([dense], dtype=torch.float16, device=device), *pattern)
    assert packed.values.tolist() == [values]
    assert packed.meta.tolist() == [[byte]]
    assert unpack_24(packed).tolist() == [dense]


def test_the_second_byte_covers_the_next_eight_weights(device):
    w = torch.tensor([[0, 1, 0, 2, 3, 0, 0, 4, 0, 0, 5, 6, 7, 8, 0, 0]], device=device) / 1.0
    packed = pack_24(w)
    assert packed.values.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]
    assert packed.meta.tolist() == [[0b11_00_11_01, 0b01_00_11_10]]


@each_pattern
def test_every_valid_byte_is_reached_and_read_back(pattern, device):
    """All six kept pairs of both groups of a byte, and every mask of the other patterns."""
    table = formats.position_table(*pattern)
    valid = (table[:, 0] >= 0).nonzero().flatten()
    expected = {(2, 4): 6 * 6, (1, 4): 4 * 4, (1, 8): 8, (2, 8): 28, (4, 8): 70}[pattern]
    assert len(valid) == expected
    kept = torch.arange(1.0, table.shape[1] + 1).expand(len(valid), -1)
    dense = torch.zeros(len(valid), 8).scatter_(1, table[valid], kept).to(device)
    packed = pack_24(dense, *pattern)
    assert packed.meta.flatten().tolist() == valid.tolist()
    assert torch.equal(packed.values.cpu(), kept)
    assert torch.equal(unpack_24(packed), dense)


def check_round_trip_and_twins(shape, dtype, pattern, device):
    w = random_24(*shape, dtype, *pattern, seed=3, device=device)
    w[:, 8:16] = 0  # groups of zeros
    packed = pack_24(w, *pattern)
    formats.check(packed)
    assert same(unpack_24(packed), w + 0.0)  # + 0.0: -0.0 becomes +0.0
    assert same(packed, reference.pack_24_ref(w, *pattern))
    assert same(unpack_24(packed), reference.unpack_24_ref(packed))
    dense = randn(*shape, dtype=dtype, seed=4, device=device)
    for launch, twin in LAUNCHERS[1:]:
        assert same(launch(dense, *pattern), twin(dense, *pattern))


@each_pattern
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_round_trip_and_twins(shape, pattern, device):
    check_round_trip_and_twins(shape, torch.float16, pattern, device)


@each_pattern
@each_dtype
def test_round_trip_and_twins_in_every_dtype(dtype, pattern, device):
    check_round_trip_and_twins((10, 51), dtype, pattern, device)


@each_pattern
def test_no_rows(pattern, device):
    w = torch.zeros(0, 17, device=device)
    for pack in (pack_24, prune_24):
        assert [list(t.shape) for t in pack(w, *pattern)[:2]] == [
            [0, 24 * pattern[0] // pattern[1]],
            [0, 3],
        ]
    assert unpack_24(pack_24(w, *pattern)).shape == prune_dense_24(w, *pattern).shape == (0, 17)


@pytest.mark.parametrize("pattern", [(2, 4), (4, 8)], ids=str)
@each_layout
def test_strided_inputs_equal_contiguous_ones(layout, pattern, device):
    w = layout(random_24(9, 45, torch.float16, *pattern, seed=5, device=device))
    dense = layout(randn(9, 45, dtype=torch.bfloat16, seed=6, device=device))
    assert same(pack_24(w, *pattern), reference.pack_24_ref(w.contiguous(), *pattern))
    for launch, twin in LAUNCHERS[1:]:
        assert same(launch(dense, *pattern), twin(dense.contiguous(), *pattern))


@each_dtype
def test_minus_zero_packs_as_plus_zero(dtype, device):
    w = torch.tensor([[-0.0, 3, -0.0, -0.0, -0.0, -0.0, -0.0, -2]], dtype=dtype, device=device)
    packed = pack_24(w)
    assert packed.values.tolist() == [[0, 3, 0, -2]]
    assert not packed.values.signbit()[:, :3].any()
    for dense in (unpack_24(packed), prune_dense_24(w)):
        assert torch.equal(dense, w) and int(dense.signbit().sum()) == 1
    assert same(packed, reference.pack_24_ref(w))


def test_ties_keep_the_lower_index(device):
    w = torch.tensor([[-1, 1, 1, -1, 2, 3, -3, 3]], dtype=torch.float16, device=device)
    for prune in (prune_24, reference.prune_24_ref):
        assert prune(w).values.tolist() == [[-1, 1, 3, -3]]
        assert prune(w).meta.tolist() == [[0b10_01_01_00]]
        assert prune(w, 1, 8).values.tolist() == [[3]] and prune(w, 1, 8).meta.tolist() == [
            [1 << 5]
        ]
        assert prune(w, 4, 8).meta.tolist() == [[0b1111_0000]]


@each_dtype
def test_nan_and_infinity_are_values_like_others(dtype, device):
    """NaN ranks above infinity, infinity above all numbers; both are non-zeros to pack_24."""
    nan, inf = float("nan"), float("inf")
    w = torch.tensor([[nan, 0, -inf, 0, 0, inf, nan, 0]], dtype=dtype, device=device)
    assert same(pack_24(w), reference.pack_24_ref(w)) and same(unpack_24(pack_24(w)), w)
    mixed = torch.tensor([[1, nan, inf, 2, -inf, 60000, nan, nan]], dtype=dtype, device=device)
    for launch, twin in LAUNCHERS[1:]:
        assert same(launch(mixed), twin(mixed))
    assert prune_24(mixed).meta.tolist() == [[0b11_10_10_01]]
    with pytest.raises(ValueError, match="row 0, columns 0-3 hold 4 nonzeros"):
        pack_24(mixed)


def test_smallest_numbers_are_kept(device):
    """Subnormals are non-zeros: 2 ** -24 in fp16, 2 ** -149 in fp32."""
    for dtype, tiny in ((torch.float16, 2.0**-24), (torch.float32, 2.0**-149)):
        w = torch.tensor([[0, tiny, 0, -tiny, 1, tiny, 0, 0]], dtype=dtype, device=device)
        assert same(unpack_24(pack_24(w)), w)


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    n=st.integers(0, 19),
    k=st.integers(0, 90),
    pattern=st.sampled_from(PATTERNS),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["contiguous", "transposed", "every_second"]),
    seed=st.integers(0, 99),
)
def test_any_shape_pattern_and_stride(n, k, pattern, dtype, layout, seed, device):
    w = LAYOUTS[layout](random_24(n, k, dtype, *pattern, seed=seed, device=device))
    assert same(unpack_24(pack_24(w, *pattern)), w + 0.0)
    # Few different magnitudes, so that most groups hold ties.
    coarse = LAYOUTS[layout](randn(n, k, seed=seed, device=device).round().to(dtype))
    pruned = prune_24(coarse, *pattern)
    assert same(pruned, reference.prune_24_ref(coarse, *pattern))
    assert same(prune_dense_24(coarse, *pattern), unpack_24(pruned))
    assert same(pack_24(unpack_24(pruned), *pattern).values, pruned.values)


def test_a_parameter_packs_without_a_graph(device):
    w = torch.nn.Parameter(random_24(8, 32, torch.float16, device=device))
    for pack in (pack_24, reference.pack_24_ref):
        assert not pack(w).values.requires_grad


def test_packed_bytes():
    for dtype, share in zip(DTYPES, (0.5625, 0.5625, 0.53125), strict=True):
        packed = reference.pack_24_ref(random_24(64, 128, dtype))
        assert packed.nbytes == share * packed.dense_nbytes == share * 64 * 128 * dtype.itemsize


def test_rows_and_columns_past_two_to_the_31(device):
    """The third row, or column, lies 2**31 elements into a buffer whose pages are never touched."""
    try:
        lazy = np.zeros(2**31 + 64, dtype=np.float16)
    except MemoryError:
        pytest.skip("no 4 GiB of address space")
    if device.type != "cpu":
        pytest.skip("pages of a GPU are not lazy")
    w = random_24(3, 64, torch.float16, seed=8)
    rows = torch.from_numpy(lazy).as_strided((3, 64), (2**30, 1))
    rows.copy_(w)
    assert same(pack_24(rows), reference.pack_24_ref(w))
    columns = torch.from_numpy(lazy).as_strided((8, 3), (1, 2**30))
    columns.copy_(w[:1, :3].expand(8, 3))
    assert same(prune_24(columns), reference.prune_24_ref(columns.contiguous()))


GUARD = 257  # elements of sentinel on each side


@pytest.fixture
def guards(monkeypatch):
    """What launchers allocate lies between sentinels; the list of (buffer, untouched copy)."""
    made, plain = [], torch.Tensor.new_empty

    def new_empty(self, *shape, dtype=None, device=None):
        size = plain(self, *shape, dtype=dtype, device="meta")
        if size.numel() == 0 or device is not None:
            return plain(self, *shape, dtype=dtype, device=device)
        buffer = torch.full((size.numel() + 2 * GUARD,), 113, dtype=size.dtype, device=self.device)
        made.append((buffer, buffer.clone()))
        return buffer[GUARD:-GUARD].view(size.shape)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    return made


def surrounded(tensor, sentinel):
    """`tensor`, contiguous, inside a buffer of `sentinel`."""
    buffer = tensor.new_full((tensor.numel() + 2 * GUARD,), sentinel)
    buffer[GUARD:-GUARD] = tensor.flatten()
    return buffer[GUARD:-GUARD].view(tensor.shape)


@each_pattern
@pytest.mark.parametrize("shape", [(9, 51), (8, 256), (1, 3)], ids=str)
def test_nothing_outside_is_read_or_written(shape, pattern, guards, device):
    n, k = shape
    w = random_24(n, k, torch.float16, *pattern, seed=9, device=device)
    field = torch.full((n + 4, k + 9), float("nan"), dtype=w.dtype, device=device)
    field[2 : 2 + n, 5 : 5 + k] = w
    packed = pack_24(field[2 : 2 + n, 5 : 5 + k], *pattern)
    assert same(packed, reference.pack_24_ref(w, *pattern))
    assert same(prune_dense_24(field[2 : 2 + n, 5 : 5 + k], *pattern), w + 0.0)
    inside = Packed24(
        surrounded(packed.values, float("nan")), surrounded(packed.meta, 255), *packed[2:]
    )
    assert same(unpack_24(inside), w + 0.0)
    assert len(guards) >= 4
    for buffer, before in guards:
        assert torch.equal(buffer[:GUARD], before[:GUARD])
        assert torch.equal(buffer[-GUARD:], before[-GUARD:])
