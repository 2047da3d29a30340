import json

import pytest
import torch
from helpers import random_24
from safetensors.torch import save_file
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from slimgemm.kernels.formats import Packed24
from slimgemm.kernels.reference import pack_24_ref, unpack_24_ref
from slimgemm.sparse_ops import CheckpointError, exchange

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemi")
DENSE = torch.tensor([[0, 5, 0, 6, 7, 8, 0, 0], [0, 0, 0, 0, 1, 0, 0, 9]], dtype=torch.float16)


def torchs(dense):
    """The weight as torch packs it, without the checks for a GPU."""
    values, meta = sparse_semi_structured_from_dense_cutlass(dense)
    return SparseSemiStructuredTensorCUTLASS(dense.shape, values, meta, None, None, None)


def same(a: Packed24, b: Packed24):
    return a[2:] == b[2:] and torch.equal(a.values, b.values) and torch.equal(a.meta, b.meta)


# --- sparse-24-bitmask ---


def test_bitmask_bytes_by_hand():
    compressed = torch.tensor([[5, 6, 7, 8], [0, 0, 1, 9]], dtype=torch.float16)
    bitmask = torch.tensor([[0b0011_1010], [0b1001_1100]], dtype=torch.uint8)
    packed = exchange.from_bitmask([2, 8], compressed, bitmask)
    assert torch.equal(unpack_24_ref(packed), DENSE)
    assert packed.meta.tolist() == [[0b01_00_11_01], [0b11_00_01_00]]  # spare places canonical
    back = exchange.to_bitmask(packed)
    assert back["shape"].tolist() == [2, 8]
    assert back["bitmask"].tolist() == [[0b0011_1010], [0b1001_0011]]
    assert back["compressed"].tolist() == compressed.tolist()


@pytest.mark.parametrize("dtype", exchange.FLOATS, ids=str)
@pytest.mark.parametrize("n, k", [(1, 4), (3, 8), (5, 12), (16, 64), (7, 100), (0, 8)])
def test_bitmask_round_trip(n, k, dtype):
    packed = pack_24_ref(random_24(n, k, dtype=dtype))
    parts = exchange.to_bitmask(packed)
    assert parts["compressed"].shape == (n, k // 2)
    assert parts["bitmask"].shape == (n, -(-k // 8))
    assert same(exchange.from_bitmask(*parts.values()), packed)


def test_all_six_pairs_of_positions():
    masks = [0b0011, 0b0101, 0b1001, 0b0110, 0b1010, 0b1100]
    bitmask = torch.tensor([[low | high << 4 for low in masks for high in masks]])
    compressed = torch.arange(1.0, 145.0)[None]
    packed = exchange.from_bitmask([1, 288], compressed, bitmask.to(torch.uint8))
    assert exchange.to_bitmask(packed)["bitmask"].tolist() == bitmask.tolist()
    assert torch.equal(packed.values, compressed)


@pytest.mark.parametrize(
    "change, text",
    [
        (dict(shape=[2, 8, 1]), r"fc: shape must be \[R, C\], got \[2, 8, 1\]"),
        (dict(shape=[2, 6]), "fc: 4 does not divide 6 columns"),
        (dict(compressed=torch.ones(2, 3)), r"fc: compressed must be .*\[2, 4\], got"),
        (dict(compressed=torch.ones(2, 4).int()), "fc: compressed must be float16.*int32"),
        (dict(bitmask=torch.zeros(2, 2).byte()), r"fc: bitmask must be uint8 \[2, 1\], got"),
        (dict(shape=[2, 4], compressed=torch.ones(2, 2)), "row 0 has bits set behind column 3"),
        (
            dict(bitmask=torch.tensor([[0x33], [0x37]]).byte()),
            "fc is not 2:4: row 1, columns 0-3 keep 3 weights .1 such groups in all",
        ),
        (
            dict(bitmask=torch.tensor([[0x33], [0x13]]).byte()),
            "fc is not 2:4: row 1, columns 4-7 keep 1 weights",
        ),
    ],
)
def test_bitmask_refuses(change, text):
    parts = exchange.to_bitmask(pack_24_ref(DENSE)) | change
    with pytest.raises(ValueError, match=text):
        exchange.from_bitmask(**parts, name="fc")


def test_to_bitmask_refuses():
    with pytest.raises(ValueError, match="keep:group must be 2:4, got 1:4"):
        exchange.to_bitmask(pack_24_ref(random_24(4, 8, keep=1), keep=1))
    with pytest.raises(ValueError, match=r"columns that 4 divides.*\[4, 6\]"):
        exchange.to_bitmask(pack_24_ref(random_24(4, 6)))


def checkpoint(folder, drop=(), **more):
    packed = pack_24_ref(random_24(8, 16, dtype=torch.bfloat16))
    parts = {f"fc.weight.{k}": v for k, v in exchange.to_bitmask(packed).items() if k not in drop}
    save_file({**parts, "norm.shape": torch.ones(2), **more}, folder / "model.safetensors")
    return packed


@pytest.mark.parametrize("whole", [True, False], ids=["folder", "file"])
def test_checkpoint_is_read(tmp_path, whole):
    packed = checkpoint(tmp_path)
    found = exchange.read_bitmask_checkpoint(tmp_path if whole else tmp_path / "model.safetensors")
    assert set(found) == {"fc.weight", "norm.shape"}
    assert same(found["fc.weight"], packed)
    assert found["norm.shape"].tolist() == [1, 1]  # a dense tensor may have that name


def test_checkpoint_of_several_files(tmp_path):
    checkpoint(tmp_path)
    save_file({"other": torch.ones(1)}, tmp_path / "more.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({}))
    assert "other" in exchange.read_bitmask_checkpoint(tmp_path)
    save_file({"norm.shape": torch.ones(1)}, tmp_path / "more.safetensors")
    with pytest.raises(CheckpointError, match=r"norm\.shape is in .* and in another file"):
        exchange.read_bitmask_checkpoint(tmp_path)


def test_checkpoint_refusals(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no \.safetensors file"):
        exchange.read_bitmask_checkpoint(tmp_path)
    for part in exchange.PARTS:
        checkpoint(tmp_path, drop=(part,))
        with pytest.raises(CheckpointError, match=rf"fc\.weight\.{part} is missing"):
            exchange.read_bitmask_checkpoint(tmp_path)
    checkpoint(tmp_path, **{"fc.weight.row_offsets": torch.zeros(8)})
    with pytest.raises(CheckpointError, match=r"fc\.weight is stored as sparse-bitmask"):
        exchange.read_bitmask_checkpoint(tmp_path)
    checkpoint(tmp_path, **{"fc.weight": torch.zeros(8)})
    with pytest.raises(CheckpointError, match=r"fc\.weight is in .* twice"):
        exchange.read_bitmask_checkpoint(tmp_path)
    checkpoint(tmp_path, **{"fc.weight.bitmask": torch.full((8, 2), 255, dtype=torch.uint8)})
    with pytest.raises(CheckpointError, match=r"fc\.weight is not 2:4: row 0, columns 0-3 keep 4"):
        exchange.read_bitmask_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(CheckpointError, match="is damaged"):
        exchange.read_bitmask_checkpoint(tmp_path)


# --- SparseSemiStructuredTensor ---


def test_semi_structured_word_by_hand():
    dense = torch.zeros(32, 64, dtype=torch.float16)
    dense[:, 2::4] = dense[:, 3::4] = 1.0  # every group keeps 2 and 3: nibble 0b1110
    dense[0, :16] = torch.tensor([1, 1, 0, 0] * 4)  # first word of row 0: nibbles 0b0100
    ours = exchange.to_semi_structured(pack_24_ref(dense))
    assert ours.meta.dtype == torch.int16 and ours.meta.shape == (32, 4)
    words = [word & 0xFFFF for word in ours.meta.flatten().tolist()]
    assert words == [0x4444] + [0xEEEE] * 127
    assert torch.equal(ours.meta, torchs(dense).meta)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n, k", [(32, 64), (64, 64), (96, 192), (32, 256)])
def test_semi_structured_both_ways(n, k, dtype):
    dense = random_24(n, k, dtype=dtype)
    theirs, packed = torchs(dense), pack_24_ref(dense)
    assert same(exchange.from_semi_structured(theirs), packed)
    ours = exchange.to_semi_structured(packed)
    assert torch.equal(ours.packed, theirs.packed) and torch.equal(ours.meta, theirs.meta)
    assert torch.equal(ours.to_dense(), dense) and ours.shape == dense.shape
    assert same(exchange.from_semi_structured(ours), packed)


def test_semi_structured_groups_with_fewer_than_two():
    dense = random_24(32, 64, dtype=torch.float16)
    dense[torch.rand(32, 64, generator=torch.Generator().manual_seed(1)) < 0.6] = 0
    packed = pack_24_ref(dense)
    assert same(exchange.from_semi_structured(torchs(dense)), packed)
    ours = exchange.to_semi_structured(packed)
    assert not torch.equal(ours.meta, torchs(dense).meta)  # spare positions are torch's own
    assert torch.equal(ours.to_dense(), dense)


def test_limits_are_torchs():
    limits = SparseSemiStructuredTensorCUTLASS._DTYPE_SHAPE_CONSTRAINTS
    for dtype in (torch.float16, torch.bfloat16):
        assert limits[dtype][:2] == (
            exchange.SEMI_STRUCTURED_ROWS,
            exchange.SEMI_STRUCTURED_COLUMNS,
        )


def test_semi_structured_refuses_other_tensors():
    with pytest.raises(ValueError, match="must be a SparseSemiStructuredTensorCUTLASS, got Tensor"):
        exchange.from_semi_structured(torch.zeros(32, 64))
    values = torch.zeros(32, 64).half()
    cuda = SparseSemiStructuredTensorCUSPARSELT((32, 64), values, None, None, None, None)
    with pytest.raises(ValueError, match=r"CUSPARSELT keeps its order to itself; .*pack_24"):
        exchange.from_semi_structured(cuda)
    single = torch.tensor([1.0, 0.0]).repeat(32, 32)
    with pytest.raises(ValueError, match=r"got torch.float32: torch stores float32 as 1:2"):
        exchange.from_semi_structured(torchs(single))
    with pytest.raises(ValueError, match=r"got torch.int8"):
        exchange.from_semi_structured(torchs(random_24(32, 128, dtype=torch.int8)))
    with pytest.raises(ValueError, match="transposed weight"):
        exchange.from_semi_structured(torchs(random_24(64, 64).half()).t())


def test_semi_structured_refuses_damaged_metadata():
    theirs = torchs(random_24(32, 64).half())
    theirs.meta[0, 0] = 0
    with pytest.raises(ValueError, match="meta is not valid in 2 bytes: row 0, byte 0"):
        exchange.from_semi_structured(theirs)


@pytest.mark.parametrize(
    "packed, text",
    [
        (pack_24_ref(random_24(32, 64)), "float16 or bfloat16 for this exchange, got torch.float3"),
        (pack_24_ref(random_24(16, 64).half()), r"\[32 i, 64 j\].*got \[16, 64\]"),
        (pack_24_ref(random_24(32, 32).half()), r"\[32 i, 64 j\].*got \[32, 32\]"),
        (pack_24_ref(random_24(32, 64, keep=1).half(), 1, 4), "must be 2:4, got 1:4"),
    ],
    ids=["float32", "rows", "columns", "1:4"],
)
def test_to_semi_structured_refuses(packed, text):
    with pytest.raises(ValueError, match=text):
        exchange.to_semi_structured(packed)
