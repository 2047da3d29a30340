"""SparseConv2d24: nn.Conv2d with a packed weight.

It replaces nn.Conv2d: same constructor, same inputs, same gradients for what is stored. It does
not prune: `from_dense` refuses a weight that is not already keep:group along its input channels.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from slimgemm.kernels.conv_layout import conv_matrix, convolution, padded_channels, pair
from slimgemm.kernels.dispatch import implementation
from slimgemm.kernels.formats import Packed24, check, check_pattern
from slimgemm.kernels.reference import unpack_24_ref
from slimgemm.sparse_ops import library, library_conv
from slimgemm.sparse_ops.linear import PackedModule, autocast_to

Pair = int | tuple[int, int]


class SparseConv2d24(PackedModule):
    """y = conv2d(x, W) + b with W [out, in / groups, kh, kw] packed at keep:group of its channels.

    Args:
        in_channels, ..., dtype: as torch.nn.Conv2d; padding_mode "zeros" only.
        keep, group: 2:4 unless said otherwise.

    A new module holds nn.Conv2d's initial weights, pruned by magnitude. State dict, with Cp =
    ceil(in / groups / 8) * 8: `values` [out, kh * kw * Cp * keep / group], `meta` uint8
    [out, kh * kw * Cp / 8], `bias` [out]; layout in slimgemm.kernels.conv_layout, bits in
    slimgemm.kernels.formats. To export a single layer, wrap it: see SparseLinear24.
    """

    own_attributes: ClassVar[tuple[str, ...]] = (*PackedModule.own_attributes, "_paddings")

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
        keep: int = 2,
        group: int = 4,
    ) -> None:
        super().__init__()
        check_pattern(keep, group)
        if padding_mode != "zeros":
            raise ValueError(
                f"padding_mode must be 'zeros', got {padding_mode!r}; "
                "pad in front of the layer with torch.nn.functional.pad"
            )
        if groups < 1 or in_channels % groups:
            raise ValueError(f"groups must divide the {in_channels} in channels, got {groups}")
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size = pair("kernel_size", kernel_size, 1)
        self.stride = pair("stride", stride, 1)
        self.padding = padding if isinstance(padding, str) else pair("padding", padding, 0)
        self.dilation = pair("dilation", dilation, 1)
        self.groups, self.padding_mode = groups, padding_mode
        self.keep, self.group = keep, group
        conv = convolution(self.weight_shape, self.stride, self.padding, self.dilation, groups)
        self._paddings = conv.padding
        self._allocate(out_channels, conv.k, device, dtype)
        if bias:
            self.bias = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """Shape of the dense weight."""
        return self.out_channels, self.in_channels // self.groups, *self.kernel_size

    def reset_parameters(self) -> None:
        """nn.Conv2d's initialisation, then the largest `keep` of each group."""
        if self.values.is_meta:
            return
        dense = self.values.new_empty(self.weight_shape)
        nn.init.kaiming_uniform_(dense, a=math.sqrt(5))
        with torch.no_grad():
            values, meta = library.prune_24(conv_matrix(dense), self.keep, self.group)
            self.values.copy_(values)
            self.meta.copy_(meta)
            if self.bias is not None:
                bound = 1 / math.sqrt(dense[0].numel())
                self.bias.uniform_(-bound, bound)

    @classmethod
    def from_dense(cls, conv: nn.Conv2d, *, keep: int = 2, group: int = 4) -> SparseConv2d24:
        """A packed twin of `conv`; the bias parameter is shared, not copied.

        Raises:
            ValueError: the weight is not keep:group (out channel, tap, input channels and count are
                named), `conv` is no nn.Conv2d, or its padding_mode is not "zeros".
        """
        if not isinstance(conv, nn.Conv2d):
            raise ValueError(f"conv must be a torch.nn.Conv2d, got {type(conv).__name__}")
        module = cls.like(conv, keep=keep, group=group)
        weight = conv.weight.detach()
        packed = implementation("pack_conv", weight.device)(weight, keep, group)
        module.values = nn.Parameter(packed.values, conv.weight.requires_grad)
        module.meta = packed.meta
        return module

    @classmethod
    def like(cls, conv: nn.Conv2d, *, keep: int = 2, group: int = 4) -> SparseConv2d24:
        """A module of the sizes of `conv`, sharing its bias; its weight is on the meta device."""
        module = cls(
            conv.in_channels, conv.out_channels, cast(Any, conv.kernel_size),
            cast(Any, conv.stride), cast(Any, conv.padding), cast(Any, conv.dilation), conv.groups,
            False, conv.padding_mode, "meta", conv.weight.dtype, keep=keep, group=group,
        )  # fmt: skip
        module.values.requires_grad_(conv.weight.requires_grad)
        module.register_parameter("bias", cast(nn.Parameter, conv.bias))
        return module.train(conv.training)

    def to_dense(self) -> nn.Conv2d:
        """The nn.Conv2d whose weight this module packs, exactly; the bias parameter is shared."""
        arguments = (self.in_channels, self.out_channels, self.kernel_size, self.stride)
        with torch.device("meta"):
            conv = nn.Conv2d(*arguments, self.padding, self.dilation, self.groups, bias=False)
        unpack = implementation("unpack_conv", self.values.device)
        weight = unpack(self.packed._replace(values=self.values.detach()), self.weight_shape)
        conv.weight = nn.Parameter(weight, self.values.requires_grad)
        conv.register_parameter("bias", self.bias)
        return conv.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, in_channels, H, W], or one image without B -> [B, out_channels, OH, OW]."""
        if x.ndim == 3:
            return self.forward(x.unsqueeze(0)).squeeze(0)
        x, values, bias = autocast_to(x, self.values, self.bias)
        return library_conv.conv2d_24(
            x, values, self.meta, bias, self.weight_shape, self.stride, self._paddings,
            self.dilation, self.groups, self.keep, self.group, "none",
        )  # fmt: skip

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        meta, values = (state_dict.get(prefix + key) for key in ("meta", "values"))
        if isinstance(meta, Tensor) and isinstance(values, Tensor) and not meta.is_meta:
            lost = self._values_in_padding(values.detach(), meta)
            if lost:
                error_msgs.append(
                    f"{prefix or 'the module'}: {lost} values lie past the "
                    f"{self.weight_shape[1]} input channels of a tap; it is another layer's weight"
                )
                return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _values_in_padding(self, values: Tensor, meta: Tensor) -> int:
        """How many values are of channels that the weight does not have; 0 if not readable."""
        packed = Packed24(values, meta, *self.packed[2:])
        try:
            check(packed)
        except ValueError:
            return 0  # the base class says what is wrong
        taps = unpack_24_ref(packed).view(-1, padded_channels(self.weight_shape[1]))
        return int((taps[:, self.weight_shape[1] :] != 0).sum())

    def extra_repr(self) -> str:
        parts = [f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"]
        plain = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}
        parts += [f"{k}={getattr(self, k)}" for k, v in plain.items() if getattr(self, k) != v]
        return ", ".join([*parts, f"bias={self.bias is not None}", self._size_repr()])

    def _size_repr(self) -> str:
        dense = math.prod(self.weight_shape) * self.values.element_size()
        kept = f"kept {self.keep} of {self.group}"
        return f"{kept}, {self.packed.nbytes} bytes (dense {dense})"
