"""SparseLinear24: nn.Linear with a packed weight.

It replaces nn.Linear: same constructor, same inputs, same gradients for what is stored. It does
not prune: `from_dense` refuses a weight that is not already keep:group.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from slimgemm.kernels.formats import (
    BYTE_WEIGHTS,
    Packed24,
    check,
    check_pattern,
    packed_shapes,
    position_table,
)
from slimgemm.sparse_ops import library


def autocast_to(x: Tensor, *tensors: Tensor | None) -> tuple[Any, ...]:
    """`x` and `tensors` in autocast's dtype where autocast is on for the device of `x`."""
    kind = x.device.type  # "meta" has no autocast, and asking whether it is on raises
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return (x, *tensors)
    dtype = torch.get_autocast_dtype(kind)
    # As torch's own autocast: float64 and integers stay.
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in (x, *tensors)
    )


def check_padding(packed: Packed24) -> None:
    """Raise ValueError if a value is stored past the last column, where the format has +0.0."""
    columns = packed.meta.shape[1]
    if packed.k == columns * BYTE_WEIGHTS:
        return
    positions = position_table(packed.keep, packed.group)[packed.meta[:, -1:].cpu().int()]
    past = (columns - 1) * BYTE_WEIGHTS + positions.flatten(1) >= packed.k
    last = packed.values.detach()[:, -positions.shape[-1] :].cpu()
    lost = int((past & (last != 0)).sum())
    if lost:
        raise ValueError(
            f"{lost} values lie past column {packed.k}: the weight is wider than the "
            f"{list(packed.shape)} of this module"
        )


class PackedModule(nn.Module):
    """What modules with a packed weight share: `values`, `meta` and how they are loaded.

    State dict: `values` (a parameter), `meta` (uint8, a buffer), and `bias` where there is one.
    """

    # What the constructor sets beside the attributes of the dense module; decompress drops them.
    own_attributes: ClassVar[tuple[str, ...]] = ("keep", "group", "_packed_k")

    values: nn.Parameter
    meta: Tensor
    keep: int
    group: int

    def _allocate(self, n: int, k: int, device: Any, dtype: Any) -> None:
        """Uninitialised `values` and `meta` of an [n, k] weight."""
        check_pattern(self.keep, self.group)
        shape_values, shape_meta = packed_shapes(n, k, self.keep, self.group)
        self._packed_k = k
        self.values = nn.Parameter(torch.empty(shape_values, device=device, dtype=dtype))
        self.register_buffer("meta", torch.empty(shape_meta, device=device, dtype=torch.uint8))

    @property
    def packed(self) -> Packed24:
        """The packed weight; shares memory with the module."""
        return Packed24(self.values, self.meta, self._packed_k, self.keep, self.group)

    @property
    def options(self) -> dict[str, Any]:
        """What `like` needs beside the dense module; goes into checkpoints."""
        return {"keep": self.keep, "group": self.group}

    @property
    def nbytes(self) -> int:
        """Bytes of values and metadata."""
        return self.packed.nbytes

    def set_packed(self, packed: Packed24) -> None:
        """Take the values and metadata of `packed`, of this module's shape and pattern."""
        mine = (self._packed_k, self.keep, self.group)
        if packed[2:] != mine or packed.values.shape != self.values.shape:
            raise ValueError(
                f"packed weight must be {list(self.packed.shape)} at {self.keep}:{self.group}, "
                f"got {list(packed.shape)} at {packed.keep}:{packed.group}"
            )
        check(packed)
        self.values = nn.Parameter(packed.values.detach(), self.values.requires_grad)
        self.meta = packed.meta

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        meta, values = (state_dict.get(prefix + key) for key in ("meta", "values"))
        if isinstance(meta, Tensor) and isinstance(values, Tensor) and not meta.is_meta:
            try:
                packed = Packed24(values, meta, *self.packed[2:])
                check(packed)
                check_padding(packed)
            except ValueError as error:
                # As torch does for a shape that differs: keep what the module has, and say why.
                error_msgs.append(f"{prefix or 'the module'}: {error}")
                return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _size_repr(self) -> str:
        packed = self.packed
        kept = f"kept {self.keep} of {self.group}"
        return f"{kept}, {packed.nbytes} bytes (dense {packed.dense_nbytes})"


class SparseLinear24(PackedModule):
    """y = x @ W.T + b with W [out_features, in_features] packed at keep:group along in_features.

    Args:
        in_features, out_features, bias, device, dtype: as torch.nn.Linear.
        keep, group: 2:4 unless said otherwise.

    A new module holds nn.Linear's initial weights, pruned by magnitude. State dict: `values`
    [out, ceil(in/8)*8*keep/group], `meta` uint8 [out, ceil(in/8)], `bias` [out]; format in
    slimgemm.kernels.formats.

    torch.export takes a model that holds one; to export a single layer, wrap it in nn.Sequential.
    Of a program whose root is the layer itself torch (2.13) cannot make a `.module()`: its
    GraphModule has an attribute `meta` of its own, and a buffer under another name than its state
    dict key would break functional_call, which takes the keys of a state dict.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        keep: int = 2,
        group: int = 4,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.keep, self.group = keep, group
        self._allocate(out_features, in_features, device, dtype)
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """nn.Linear's initialisation, then the largest `keep` of each group."""
        if self.values.is_meta:
            return
        dense = self.values.new_empty(self.out_features, self.in_features)
        nn.init.kaiming_uniform_(dense, a=math.sqrt(5))
        with torch.no_grad():
            values, meta = library.prune_24(dense, self.keep, self.group)
            self.values.copy_(values)
            self.meta.copy_(meta)
            if self.bias is not None:
                bound = 1 / math.sqrt(self.in_features) if self.in_features else 0
                self.bias.uniform_(-bound, bound)

    @classmethod
    def from_dense(cls, linear: nn.Linear, *, keep: int = 2, group: int = 4) -> SparseLinear24:
        """A packed twin of `linear`; the bias parameter is shared, not copied.

        Raises:
            ValueError: the weight is not keep:group (row, columns and count are named).
        """
        values, meta = library.pack_24(linear.weight.detach(), keep, group)
        module = cls.like(linear, keep=keep, group=group)
        module.values = nn.Parameter(values, linear.weight.requires_grad)
        module.meta = meta
        return module

    @classmethod
    def like(cls, linear: nn.Linear, *, keep: int = 2, group: int = 4) -> SparseLinear24:
        """A module of the sizes of `linear`, sharing its bias; its weight is on the meta device."""
        sizes = linear.in_features, linear.out_features, False
        module = cls(*sizes, device="meta", dtype=linear.weight.dtype, keep=keep, group=group)
        module.values.requires_grad_(linear.weight.requires_grad)
        module.register_parameter("bias", linear.bias)
        return module.train(linear.training)

    def to_dense(self) -> nn.Linear:
        """The nn.Linear whose weight this module packs, exactly; the bias parameter is shared."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        weight = library.unpack_24(self.values.detach(), *self.packed[1:])
        linear.weight = nn.Parameter(weight, self.values.requires_grad)
        linear.register_parameter("bias", self.bias)
        return linear.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features]."""
        x, values, bias = autocast_to(x, self.values, self.bias)
        return library.spmm_24(
            x, values, self.meta, bias, None, self.in_features, self.keep, self.group, "none"
        )

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}, {self._size_repr()}"
