"""What the packed format and its launchers refuse, by text."""

import os
import subprocess
import sys

import pytest
import torch
from helpers import random_24

from slimgemm.kernels import formats, reference
from slimgemm.kernels.formats import PATTERNS, Packed24, channel_index
from slimgemm.kernels.pack_24 import pack_24
from slimgemm.kernels.prune_24 import prune_24, prune_dense_24
from slimgemm.kernels.unpack_24 import unpack_24

PACKS = [pack_24, reference.pack_24_ref]
PRUNES = [prune_24, prune_dense_24, reference.prune_24_ref, reference.prune_dense_24_ref]
UNPACKS = [unpack_24, reference.unpack_24_ref, formats.check, formats.check_shapes]


def named(functions):
    return pytest.mark.parametrize("op", functions, ids=lambda f: f.__name__)


@named(PACKS)
def test_a_third_nonzero_names_row_columns_and_count(op, device):
    w = random_24(12, 80, torch.float16, device=device)
    w[3, 8:12] = torch.tensor([1.0, 2.0, 0.0, 3.0])
    w[3, 40:44] = 1.0
    w[10, 0:4] = 1.0
    before = w.clone()
    text = (
        r"weight is not 2:4: row 3, columns 8-11 hold 3 nonzeros \(3 such groups in all\); "
        r"prune it first"
    )
    with pytest.raises(ValueError, match=text):
        op(w)
    assert torch.equal(w, before)


@named(PACKS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_one_weight_too_many_in_the_last_group(op, pattern, device):
    keep, group = pattern
    w = torch.zeros(5, 24, dtype=torch.bfloat16, device=device)
    w[4, 24 - keep - 1 :] = -2.0
    text = f"not {keep}:{group}: row 4, columns {24 - group}-23 hold {keep + 1} nonzeros \\(1 such"
    with pytest.raises(ValueError, match=text):
        op(w, *pattern)


@named(PACKS)
def test_no_column_past_the_last_one_is_named(op, device):
    w = torch.zeros(2, 10, 4, device=device)[..., 0]
    w[1, 7:] = 1.0
    assert op(w, 2, 4).shape == (2, 10)
    w[1] = 1.0
    w[1, :8] = 0.0
    with pytest.raises(ValueError, match=r"not 1:8: row 1, columns 8-9 hold 2 nonzeros \(1 such"):
        op(w, 1, 8)


@named(PACKS + PRUNES)
def test_rank_integers_and_patterns(op, device):
    for bad, text in (
        (torch.zeros(8, device=device), r"floating matrix \[N, K\], got torch.float32 \[8\]"),
        (torch.zeros(2, 2, 8, device=device), r"floating matrix .* got torch.float32 \[2, 2, 8\]"),
        (torch.zeros(2, 8, dtype=torch.int8, device=device), r"floating matrix .* got torch.int8"),
    ):
        with pytest.raises(ValueError, match=text):
            op(bad)
    with pytest.raises(ValueError, match=r"keep:group must be one of 2:4, 1:4, .*, got 4:2"):
        op(torch.zeros(2, 8, device=device), 4, 2)


@named([pack_24, prune_24, prune_dense_24])
def test_launchers_name_the_dtypes_they_take(op, device):
    with pytest.raises(ValueError, match=r"weight must be float16, bfloat16 or float32, got .*64"):
        op(torch.zeros(2, 8, dtype=torch.float64, device=device))


def test_unpack_names_the_dtypes_it_takes(device):
    packed = reference.pack_24_ref(torch.zeros(2, 8, dtype=torch.float64, device=device))
    with pytest.raises(ValueError, match=r"values must be float16, bfloat16 or float32, got .*64"):
        unpack_24(packed)


def test_a_launcher_refuses_a_cpu_tensor_outside_the_interpreter():
    """In a process of its own: TRITON_INTERPRET lets CPU tensors in."""
    script = (
        "import torch\n"
        "from slimgemm.kernels.pack_24 import pack_24\n"
        "from slimgemm.kernels.unpack_24 import unpack_24\n"
        "from slimgemm.kernels.reference import pack_24_ref\n"
        "for op, x in (pack_24, torch.zeros(2, 8)), (unpack_24, pack_24_ref(torch.zeros(2, 8))):\n"
        "    try: op(x)\n"
        "    except ValueError as error: print(error)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert ran.stdout.splitlines() == [
        f"{name} must be on a GPU, got cpu; slimgemm.kernels runs CPU tensors"
        for name in ("weight", "values")
    ]


def packed_parts(device):
    return reference.pack_24_ref(random_24(4, 24, torch.float16, device=device))


@named(UNPACKS)
@pytest.mark.parametrize(
    "change, text",
    [
        (
            lambda p: p._replace(meta=p.meta[:, :2]),
            r"meta must be uint8 \[4, 3\] for values \[4, 12\], got torch.uint8 \[4, 2\]",
        ),
        (
            lambda p: p._replace(meta=p.meta.to(torch.int8)),
            r"meta must be uint8 \[4, 3\] .* got torch.int8",
        ),
        (
            lambda p: p._replace(values=p.values[:, :11]),
            r"values must be \[4, 12\] for k=24 at 2:4, got \[4, 11\]",
        ),
        (lambda p: p._replace(values=p.values[:3]), r"meta must be uint8 \[3, 3\]"),
        (lambda p: p._replace(values=p.values.flatten()), "values must be a floating matrix, got"),
        (lambda p: p._replace(values=p.values.int()), "values must be a floating matrix, got"),
        (lambda p: p._replace(k=33), r"values must be \[4, 20\] for k=33"),
        (lambda p: p._replace(k=-8), r"values must be"),
        (lambda p: p._replace(keep=4, group=8, k=40), r"values must be \[4, 20\] for k=40 at 4:8"),
        (lambda p: p._replace(keep=3), "keep:group must be one of"),
        (
            lambda p: p._replace(meta=p.meta.to("meta")),
            "values and meta must be on one device, got .* and meta",
        ),
        (
            lambda p: p._replace(values=p.values.t().contiguous().t()),
            r"values must be row-major, got strides \(1, 4\)",
        ),
        (
            lambda p: p._replace(meta=p.meta.t().contiguous().t()),
            r"meta must be row-major, got strides \(1, 4\)",
        ),
    ],
    ids=lambda value: None if callable(value) else value[:24],
)
def test_parts_that_do_not_fit(op, change, text, device):
    with pytest.raises(ValueError, match=text):
        op(change(packed_parts(device)))


def test_every_byte_of_metadata_is_checked(device):
    """All 256 bytes of each pattern: refused exactly where positions_of_byte knows none."""
    for keep, group in PATTERNS:
        width = formats.values_per_byte(keep, group)
        for byte in range(256):
            meta = torch.full((3, 2), int(formats.byte_table(keep, group).max()), device=device)
            values = torch.zeros(3, 2 * width, device=device)
            packed = Packed24(values, meta.byte(), 16, keep, group)
            packed.meta[2, 1] = byte
            if formats.positions_of_byte(byte, keep, group) is not None:
                formats.check(packed)
                continue
            why = "not ascending" if group == 4 and keep == 2 else f"no {keep}:{group} mask"
            text = rf"1 bytes: row 2, byte 1 \(weights 8-15\) is 0b{byte:08b}, .*{why}"
            with pytest.raises(ValueError, match=text):
                formats.check(packed)


def test_ascending_means_ascending():
    """Position 1 before 3 is a byte; 3 before 1, and 1 twice, are not."""
    assert formats.positions_of_byte(0b01_00_11_01, 2, 4) == [1, 3, 4, 5]
    assert formats.positions_of_byte(0b01_00_01_11, 2, 4) is None
    assert formats.positions_of_byte(0b01_00_01_01, 2, 4) is None
    assert formats.positions_of_byte(0b00_00_11_01, 2, 4) is None


@pytest.mark.parametrize(
    "index, text",
    [
        ([0, -1, 3], r"must be in 0..7, got -1 at place 1"),
        ([0, 3, 8], r"must be in 0..7, got 8 at place 2"),
        ([0, 3, 3], r"must be ascending without repeats, got 3 after 3 at place 2; sort it"),
        ([4, 2, 6], r"must be ascending without repeats, got 2 after 4 at place 1"),
        ([[0, 1]], r"must be int64 of one dimension, got torch.int64 \[1, 2\]"),
        ([0.0, 1.0], r"must be int64 of one dimension, got torch.float32 \[2\]"),
        ([True, False], r"must be int64 of one dimension, got torch.bool \[2\]"),
    ],
    ids=str,
)
def test_channel_index_refuses(index, text, device):
    for form in (index, torch.tensor(index, device=device)):
        with pytest.raises(ValueError, match=f"kept_in {text}"):
            channel_index(form, 8, "kept_in")


def test_channel_index_takes_lists_ranges_and_tensors(device):
    short = torch.tensor([1, 2, 5], dtype=torch.int32, device=device)
    for form in ([1, 2, 5], short):
        kept = channel_index(form, 8)
        assert kept.index.dtype == torch.int64 and kept.index.tolist() == [1, 2, 5]
        assert (kept.kept, kept.width) == (3, 8)
    assert channel_index(range(8), 8).kept == 8
    assert channel_index([], 8).kept == 0


def test_tables_are_real_whatever_device_or_mode_asks_first():
    """They are kept for every later caller."""
    from torch._subclasses import FakeTensorMode

    for table in (formats.position_table, formats.byte_table):
        table.cache_clear()
        with torch.device("meta"), FakeTensorMode():
            first = table(2, 4)
        assert type(first) is torch.Tensor and first.device.type == "cpu"
        assert table(2, 4) is first


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_positions_by_arithmetic_and_of_pairs_are_those_of_the_table(pattern):
    table = formats.position_table(*pattern)
    bytes_ = (table[:, 0] >= 0).nonzero().view(-1)
    computed = reference._computed_positions(bytes_.to(torch.uint8), *pattern)
    assert torch.equal(computed, table[bytes_])
    pairs = torch.cartesian_prod(torch.arange(256), torch.arange(256)).to(torch.uint8)
    rows = formats.pair_table(*pattern)[pairs.view(torch.uint16).view(-1).int()]
    first, second = table[pairs.int()].unbind(1)
    assert torch.equal(rows, torch.cat([first, torch.where(second < 0, second, second + 8)], 1))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_metadata_at_an_odd_place_decodes_the_same(pattern):
    w = random_24(6, 24, keep=pattern[0], group=pattern[1])
    packed = reference.pack_24_ref(w, *pattern)
    for rows in (slice(0, 6), slice(1, 6), slice(1, 5), slice(0, 3)):
        part = packed._replace(values=packed.values[rows], meta=packed.meta[rows])
        assert torch.equal(reference.unpack_24_ref(part), w[rows])
        assert torch.equal(reference.gather_24_ref(w[rows], part), packed.values[rows])
