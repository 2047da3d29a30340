"""One small layer of each packed kind, with the shape of an input for it."""

from slimgemm.sparse_ops import ChannelConv2d, ChannelLinear, SparseConv2d24, SparseLinear24

MODULES = {
    "linear_24": (lambda: SparseLinear24(24, 6), (5, 24)),
    "linear_1_of_4": (lambda: SparseLinear24(20, 6, keep=1), (5, 20)),
    "conv_24": (lambda: SparseConv2d24(8, 6, 3, padding=1), (2, 8, 4, 5)),
    "linear_ragged": (lambda: ChannelLinear(8, 9, kept_in=[0, 2, 3], kept_out=[1, 5]), (5, 8)),
    "conv_ragged": (lambda: ChannelConv2d(8, 9, 3, kept_in=[0, 2], kept_out=[1, 5]), (2, 8, 4, 5)),
    "conv_range": (lambda: ChannelConv2d(8, 9, 3, kept_in=range(3)), (2, 8, 4, 5)),
}
