"""What torch sees: operators slimgemm::*, drop-in modules, swapping, verifying, files."""

from slimgemm.sparse_ops import library
from slimgemm.sparse_ops.checkpoint import CheckpointError, load, save
from slimgemm.sparse_ops.linear import SparseLinear24
from slimgemm.sparse_ops.swap import CompressReport, LayerReport, compress, decompress
from slimgemm.sparse_ops.verify import Check, VerifyReport, verify

__all__ = [
    "Check",
    "CheckpointError",
    "CompressReport",
    "LayerReport",
    "SparseLinear24",
    "VerifyReport",
    "compress",
    "decompress",
    "library",
    "load",
    "save",
    "verify",
]
