"""exchange: packed 2:4 weights from and to the layouts of other tools. Nothing is pruned here.

`sparse-24-bitmask`, safetensors checkpoints of compressed-tensors up to 0.14. A weight [R, C] is
three tensors:

    <name>.shape       integers [2]: R, C
    <name>.compressed  [R, C/2], the kept values, ascending position
    <name>.bitmask     uint8 [R, ceil(C/8)], bit i of byte j is set when weight 8j+i is kept
                       (numpy.packbits, bitorder="little")

    dense       [ 0. 5. 0. 6. | 7. 8. 0. 0. ]
    compressed  [ 5. 6. 7. 8. ]
    bitmask     0b0011_1010

Every group of 4 has two bits set, also where it holds fewer non-zeros. The tool that wrote these
files kept the two largest of each group of the weight as one flat row, so a C that 4 does not
divide has groups across rows; such weights are refused.

torch's `SparseSemiStructuredTensorCUTLASS`, float16 and bfloat16 [N, K]:

    packed  [N, K/2], the values of `Packed24`
    meta    int16 [N, K/16], the bytes of `Packed24` in the order of kernels/gluon/orders.py

torch names the same positions for groups of two non-zeros. For groups with fewer it names others
(0b1110 where the canonical nibble of an empty group is 0b0100), which decode to the same weight:
`from_semi_structured` makes them canonical, `to_semi_structured` writes canonical ones.

Source: compressed_tensors/compressors/sparse_compressors/sparse_24_bitmask.py (0.14);
torch/sparse/_semi_structured_conversions.py and semi_structured.py (2.13).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.sparse import SparseSemiStructuredTensor, SparseSemiStructuredTensorCUTLASS

from slimgemm import kernels
from slimgemm.kernels.formats import BYTE_WEIGHTS, Packed24, check
from slimgemm.kernels.gluon.orders import from_cutlass_meta, to_cutlass_meta
from slimgemm.sparse_ops.rebuild import CheckpointError

KEEP, GROUP = 2, 4
PARTS = ("shape", "compressed", "bitmask")
SEMI_STRUCTURED_ROWS, SEMI_STRUCTURED_COLUMNS = 32, 64  # N and K are multiples of these
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def from_bitmask(
    shape: Sequence[int] | Tensor, compressed: Tensor, bitmask: Tensor, name: str = "weight"
) -> Packed24:
    """A weight of a sparse-24-bitmask checkpoint, packed.

    Args:
        shape: R and C of the dense weight.
        compressed: [R, C/2], floating; kept values in ascending position.
        bitmask: uint8 [R, ceil(C/8)]; bits in the module docstring.
        name: what messages call the weight.

    Raises:
        ValueError: shapes or dtypes do not fit, 4 does not divide C, a bit behind C is set, or
            a group has not exactly two bits set; the row and columns are named.
    """
    dense = _dense_of_bitmask([int(size) for size in shape], compressed, bitmask, name)
    return kernels.pack_24(dense)


def _dense_of_bitmask(shape: list[int], compressed: Tensor, bitmask: Tensor, name: str) -> Tensor:
    if len(shape) != 2 or min(shape) < 0:
        raise ValueError(f"{name}: shape must be [R, C], got {shape}")
    rows, columns = shape
    if columns % GROUP:
        raise ValueError(
            f"{name}: 4 does not divide {columns} columns, so groups of 4 would cross rows; "
            "decompress it with the tool that wrote it and prune it again (slimgemm.pruning.plan)"
        )
    if compressed.dtype not in FLOATS or list(compressed.shape) != [rows, columns // 2]:
        raise ValueError(
            f"{name}: compressed must be float16, bfloat16, float32 or float64 "
            f"[{rows}, {columns // 2}], got {compressed.dtype} {list(compressed.shape)}"
        )
    width = -(-columns // BYTE_WEIGHTS)
    if bitmask.dtype != torch.uint8 or list(bitmask.shape) != [rows, width]:
        raise ValueError(
            f"{name}: bitmask must be uint8 [{rows}, {width}], "
            f"got {bitmask.dtype} {list(bitmask.shape)}"
        )
    bits = torch.arange(BYTE_WEIGHTS, device=bitmask.device, dtype=torch.uint8)
    mask = (bitmask[:, :, None] >> bits & 1).bool().flatten(1)
    if bool(mask[:, columns:].any()):
        row = int(mask[:, columns:].any(1).int().argmax())
        raise ValueError(
            f"{name}: bitmask is damaged: row {row} has bits set behind column {columns - 1}"
        )
    mask = mask[:, :columns]
    counts = mask.view(rows, columns // GROUP, GROUP).sum(2)
    wrong = (counts != KEEP).flatten()
    if bool(wrong.any()):
        first = int(wrong.int().argmax())
        row, group = divmod(first, columns // GROUP)
        raise ValueError(
            f"{name} is not 2:4: row {row}, columns {GROUP * group}-{GROUP * group + GROUP - 1} "
            f"keep {int(counts[row, group])} weights ({int(wrong.sum())} such groups in all); "
            "the file is damaged or of another format"
        )
    dense = torch.zeros(rows, columns, dtype=compressed.dtype, device=compressed.device)
    dense[mask.to(dense.device)] = compressed.flatten()
    return dense


def to_bitmask(packed: Packed24) -> dict[str, Tensor]:
    """`packed` as the tensors "shape", "compressed" and "bitmask"; exact inverse of from_bitmask.

    Raises:
        ValueError: not 2:4, 4 does not divide K, or the metadata is damaged.
    """
    _check_24(packed)
    rows, columns = packed.shape
    if columns % GROUP:
        raise ValueError(
            f"weight must have columns that 4 divides for a 2:4 bitmask, got {[rows, columns]}"
        )
    meta = packed.meta.int()
    mask = torch.zeros_like(meta)
    for shift, base in ((0, 0), (2, 0), (4, 4), (6, 4)):
        mask |= torch.ones_like(meta) << (meta >> shift & 3) + base
    if columns % BYTE_WEIGHTS:  # the last byte covers 4 weights
        mask[:, -1] &= 0b1111
    return {
        "shape": torch.tensor([rows, columns]),
        "compressed": packed.values[:, : columns // 2].contiguous(),
        "bitmask": mask.to(torch.uint8),
    }


def _check_24(packed: Packed24) -> None:
    check(packed)
    if (packed.keep, packed.group) != (KEEP, GROUP):
        raise ValueError(f"keep:group must be 2:4, got {packed.keep}:{packed.group}")


def read_bitmask_checkpoint(path: str | os.PathLike[str]) -> dict[str, Packed24 | Tensor]:
    """Every tensor of a sparse-24-bitmask checkpoint, by its name in the dense model.

    Args:
        path: a .safetensors file, or a folder with one or more of them.
    Returns:
        Packed24 for each compressed weight, the tensor itself for every other one.
    Raises:
        CheckpointError: nothing to read there, a file is damaged, one of a weight's three tensors
            is missing, or a weight is not 2:4; the name is in the message.
    """
    tensors = _tensors_of(Path(path))
    names = {
        name.rpartition(".")[0] for name in tensors if name.endswith((".bitmask", ".compressed"))
    }
    found: dict[str, Packed24 | Tensor] = {}
    for name in sorted(names):
        if f"{name}.row_offsets" in tensors:
            raise CheckpointError(
                f"{name} is stored as sparse-bitmask (it has row_offsets), which holds any mask; "
                "only sparse-24-bitmask is read here"
            )
        parts = {part: tensors.pop(f"{name}.{part}", None) for part in PARTS}
        missing = [part for part, tensor in parts.items() if tensor is None]
        if missing:
            raise CheckpointError(f"{name}.{missing[0]} is missing in {path}; copy it again")
        shape, compressed, bitmask = (parts[part] for part in PARTS)
        assert shape is not None and compressed is not None and bitmask is not None
        try:
            found[name] = from_bitmask(shape.flatten().tolist(), compressed, bitmask, name)
        except ValueError as error:
            raise CheckpointError(str(error)) from error
        if name in tensors:
            raise CheckpointError(f"{name} is in {path} twice, dense and compressed")
    return found | tensors


def _tensors_of(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise CheckpointError(f"{path} holds no .safetensors file")
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            part = load_file(file)
        except SafetensorError as error:
            raise CheckpointError(f"{file} is damaged: {error}; copy it again") from error
        twice = sorted(tensors.keys() & part.keys())
        if twice:
            raise CheckpointError(f"{twice[0]} is in {file} and in another file beside it")
        tensors |= part
    return tensors


def from_semi_structured(tensor: Tensor) -> Packed24:
    """A torch SparseSemiStructuredTensor in CUTLASS order, packed; on any device.

    Args:
        tensor: float16 or bfloat16 [N, K], as torch.sparse.to_sparse_semi_structured makes it
            with `_FORCE_CUTLASS`.
    Raises:
        ValueError: another class (cuSPARSELt keeps its order to itself), int8 or float32 (torch
            stores float32 as 1:2), a transposed tensor or one for training, or damaged metadata.
    """
    if not isinstance(tensor, SparseSemiStructuredTensorCUTLASS):
        cure = "pack its dense weight: slimgemm.kernels.pack_24(tensor.to_dense())"
        if isinstance(tensor, SparseSemiStructuredTensor):
            raise ValueError(f"{type(tensor).__name__} keeps its order to itself; {cure}")
        raise ValueError(
            f"tensor must be a SparseSemiStructuredTensorCUTLASS, got {type(tensor).__name__}"
        )
    _check_16_bit(tensor.dtype)
    values, meta = tensor.packed, tensor.meta
    if values is None or meta is None or meta.ndim != 2 or values.shape[0] != tensor.shape[0]:
        raise ValueError(
            "tensor is a transposed weight, or one for training in the order of 4 x 4 tiles; "
            "pack its dense weight: slimgemm.kernels.pack_24"
        )
    packed = from_cutlass_meta(values.detach(), meta)
    check(packed)
    # torch's positions of spare zeros are its own; packing again makes them canonical.
    return kernels.pack_24(kernels.unpack_24(packed))


def to_semi_structured(packed: Packed24) -> SparseSemiStructuredTensorCUTLASS:
    """`packed` as torch's SparseSemiStructuredTensorCUTLASS, on the same device.

    Its values share memory with `packed`. On a GPU torch multiplies with it; on a CPU it can be
    made, saved, moved and turned dense.

    Raises:
        ValueError: not 2:4, not 16-bit, or N and K are no multiples of 32 and 64, which is what
            torch takes.
    """
    _check_24(packed)
    _check_16_bit(packed.values.dtype)
    n, k = packed.shape
    if n % SEMI_STRUCTURED_ROWS or k % SEMI_STRUCTURED_COLUMNS or not n or not k:
        raise ValueError(
            f"weight must be [{SEMI_STRUCTURED_ROWS} i, {SEMI_STRUCTURED_COLUMNS} j] for a "
            f"SparseSemiStructuredTensor, got {[n, k]}; torch cannot hold another shape"
        )
    with warnings.catch_warnings():  # torch says once that its class is a prototype
        warnings.filterwarnings("ignore", "The PyTorch API of SparseSemiStructuredTensor")
        return SparseSemiStructuredTensorCUTLASS(
            torch.Size((n, k)),
            packed=packed.values,
            meta=to_cutlass_meta(packed),
            packed_t=None,
            meta_t=None,
            compressed_swizzled_bitmask=None,
        )


def _check_16_bit(dtype: torch.dtype) -> None:
    if dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"weight must be float16 or bfloat16 for this exchange, got {dtype}: torch stores "
            "float32 as 1:2, which is another pattern, and int8 with other metadata"
        )
