"""What torch sees: operators slimgemm::*, drop-in modules, swapping, verifying, files."""

from slimgemm.sparse_ops import library, library_channels, library_conv
from slimgemm.sparse_ops.channels import ChannelConv2d, ChannelLinear
from slimgemm.sparse_ops.checkpoint import CheckpointError, load, save
from slimgemm.sparse_ops.conv import SparseConv2d24
from slimgemm.sparse_ops.linear import SparseLinear24
from slimgemm.sparse_ops.swap import CompressReport, LayerReport, compress, decompress
from slimgemm.sparse_ops.verify import Check, VerifyReport, verify

__all__ = [
    "ChannelConv2d",
    "ChannelLinear",
    "Check",
    "CheckpointError",
    "CompressReport",
    "LayerReport",
    "SparseConv2d24",
    "SparseLinear24",
    "VerifyReport",
    "compress",
    "decompress",
    "library",
    "library_channels",
    "library_conv",
    "load",
    "save",
    "verify",
]
