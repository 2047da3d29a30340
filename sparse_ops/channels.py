"""ChannelLinear and ChannelConv2d: nn.Linear and nn.Conv2d that keep some of their channels.

They replace the dense layer inside any network, also inside a residual block: inputs and outputs
have their dense widths; dropped in channels are not read, dropped out channels are zero, as zero
rows of a weight and of a bias give. They do not prune: `from_dense` refuses to drop a channel that
holds a non-zero.

State dict: `weight` [kept_out, kept_in / groups, ...], `bias` [kept_out] where there is one, and
`in_index` int64 [kept_in], `out_index` int64 [kept_out] where channels of that axis were dropped.
Indices are ascending. They are checked when a state dict is loaded, and at the first call with
other ones in their place (torch.func.functional_call; on a GPU that waits for the device, and a
compiled module takes them for its own). Do not write into them.
"""

from __future__ import annotations

from typing import Any, Self, cast

from torch import Tensor, nn

from slimgemm.kernels.conv_layout import pair
from slimgemm.kernels.reference_channels import conv_geometry
from slimgemm.sparse_ops import library_channels
from slimgemm.sparse_ops.channel_module import ChannelModule, Kept, kept_channels_of
from slimgemm.sparse_ops.linear import autocast_to

Pair = int | tuple[int, int]


class ChannelLinear(ChannelModule):
    """y[..., out] = x[..., in] @ weight.T + bias, zeros in the other channels.

    Args:
        in_features, out_features, bias, device, dtype: as torch.nn.Linear; the dense widths.
        kept_in, kept_out: kept channels, ascending; None for all.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        kept_in: Kept = None,
        kept_out: Kept = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.groups = in_features, out_features, 1
        self._allocate((in_features, out_features), (), kept_in, kept_out, bias, device, dtype)
        self.reset_parameters()

    @classmethod
    def from_dense(cls, linear: nn.Linear, kept_in: Kept = None, kept_out: Kept = None) -> Self:
        """The kept part of `linear`; channels that hold only zeros are found where None is given.

        A bias of which nothing is dropped is shared, not copied.

        Raises:
            ValueError: a dropped channel holds a non-zero (channel and count are named), there is
                nothing to drop, or `linear` is no nn.Linear.
        """
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"linear must be a torch.nn.Linear, got {type(linear).__name__}")
        ins, outs = kept_channels_of(linear.weight, linear.bias, 1, kept_in, kept_out)
        module = cls.like(linear, kept_in=ins, kept_out=outs)
        module._take_from(linear)
        return module

    @classmethod
    def like(cls, linear: nn.Linear, *, kept_in: Kept = None, kept_out: Kept = None) -> Self:
        """A module of the sizes of `linear` that keeps these channels; its weight is not set."""
        sizes = linear.in_features, linear.out_features, linear.bias is not None
        where = linear.weight.device, linear.weight.dtype
        return cls(*sizes, *where, kept_in=kept_in, kept_out=kept_out).train(linear.training)

    def to_dense(self) -> nn.Linear:
        """The nn.Linear with zeros in the dropped channels, exactly."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        self._give_to(linear, (self.out_features, self.in_features))
        return linear

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features]."""
        x, weight, bias = autocast_to(x, self.weight, self.bias)
        return library_channels.gemm_channels(x, weight, bias, *self._channels(), "none")

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, {self._size_repr()}"


class ChannelConv2d(ChannelModule):
    """y[:, out] = conv2d(x[:, in], weight) + bias, zeros in the other channels.

    Args:
        in_channels, ..., dtype: as torch.nn.Conv2d, the dense widths; padding_mode "zeros" only.
        kept_in, kept_out: kept channels, ascending; each group keeps the same number; None for all.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Pair | str = 0,
        dilation: Pair = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        kept_in: Kept = None,
        kept_out: Kept = None,
    ) -> None:
        super().__init__()
        if padding_mode != "zeros":
            raise ValueError(
                f"padding_mode must be 'zeros', got {padding_mode!r}; "
                "pad in front of the layer with torch.nn.functional.pad"
            )
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise ValueError(
                f"groups must divide {in_channels} in and {out_channels} out channels, got {groups}"
            )
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size = pair("kernel_size", kernel_size, 1)
        geometry = conv_geometry(self.kernel_size, stride, padding, dilation, groups)
        self.stride, self._paddings, self.dilation, _ = geometry
        self.padding = padding if isinstance(padding, str) else pair("padding", padding, 0)
        self.padding_mode = padding_mode
        widths = in_channels, out_channels
        self._allocate(widths, self.kernel_size, kept_in, kept_out, bias, device, dtype)
        self.reset_parameters()

    @classmethod
    def from_dense(cls, conv: nn.Conv2d, kept_in: Kept = None, kept_out: Kept = None) -> Self:
        """The kept part of `conv`; channels that hold only zeros are found where None is given.

        Where groups have different numbers of them, each keeps as many as the fullest. A bias of
        which nothing is dropped is shared, not copied.

        Raises:
            ValueError: a dropped channel holds a non-zero (channel and count are named), there is
                nothing to drop, `conv` is no nn.Conv2d, or its padding_mode is not "zeros".
        """
        if not isinstance(conv, nn.Conv2d):
            raise ValueError(f"conv must be a torch.nn.Conv2d, got {type(conv).__name__}")
        ins, outs = kept_channels_of(conv.weight, conv.bias, conv.groups, kept_in, kept_out)
        module = cls.like(conv, kept_in=ins, kept_out=outs)
        module._take_from(conv)
        return module

    @classmethod
    def like(cls, conv: nn.Conv2d, *, kept_in: Kept = None, kept_out: Kept = None) -> Self:
        """A module of the sizes of `conv` that keeps these channels; its weight is not set."""
        module = cls(
            conv.in_channels, conv.out_channels, cast(Any, conv.kernel_size),
            cast(Any, conv.stride), cast(Any, conv.padding), cast(Any, conv.dilation), conv.groups,
            conv.bias is not None, conv.padding_mode, conv.weight.device, conv.weight.dtype,
            kept_in=kept_in, kept_out=kept_out,
        )  # fmt: skip
        return module.train(conv.training)

    def to_dense(self) -> nn.Conv2d:
        """The nn.Conv2d with zeros in the dropped channels, exactly."""
        sizes = self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding
        conv = nn.Conv2d(*sizes, self.dilation, self.groups, bias=False, device="meta")
        per_group = self.in_channels // self.groups
        self._give_to(conv, (self.out_channels, per_group, *self.kernel_size))
        return conv

    def forward(self, x: Tensor) -> Tensor:
        """x [B, in_channels, H, W], or one image without B -> [B, out_channels, OH, OW]."""
        if x.ndim == 3:
            return self.forward(x.unsqueeze(0)).squeeze(0)
        x, weight, bias = autocast_to(x, self.weight, self.bias)
        return library_channels.conv2d_channels(
            x, weight, bias, *self._channels(),
            self.stride, self._paddings, self.dilation, self.groups, "none",
        )  # fmt: skip

    def extra_repr(self) -> str:
        parts = [f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"]
        plain = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}
        parts += [f"{k}={getattr(self, k)}" for k, v in plain.items() if getattr(self, k) != v]
        return ", ".join([*parts, self._size_repr()])
