"""shrink: the cut itself: tensors, masks, and the attributes that hold widths; and how to undo it.

Linear, Conv2d and normalisations carry `kept_in` and `kept_out` afterwards: which channels of the
dense module are left on axis 1 and 0. Every other module that lost channels of a parameter (an
embedding, a position parameter, a module that computes RMSNorm) carries `kept_parameters`: name of
the parameter -> (axis, ChannelIndex).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from slimgemm.kernels.formats import ChannelIndex, channel_index
from slimgemm.pruning.channels import WIDE, Surgery, tensor_named
from slimgemm.pruning.layers import NORMS
from slimgemm.pruning.masks import PackedMask, mask_of, pack_mask

ATTRIBUTES = (
    "in_features",
    "out_features",
    "in_channels",
    "out_channels",
    "num_features",
    "num_channels",
    "num_groups",
    "normalized_shape",
    "embedding_dim",
    "groups",
)
CARRIED = ("kept_in", "kept_out", "kept_parameters", "kept_weights")


class Undo:
    """What `restore` puts back: tensor contents by reference, attributes by value."""

    def __init__(self, model: nn.Module, surgery: Surgery) -> None:
        names = {name for name, _ in surgery.slices}
        self._tensors = [(t, t.data, t.grad) for t in (tensor_named(model, n) for n in names)]
        touched = {*surgery.kept_in, *surgery.kept_out, *(n.rpartition(".")[0] for n in names)}
        self._modules = [
            (
                module,
                {k: module.__dict__[k] for k in (*ATTRIBUTES, *CARRIED) if k in module.__dict__},
            )
            for module in (model.get_submodule(name) for name in touched)
        ]

    def restore(self) -> None:
        """Put everything back."""
        for tensor, data, grad in self._tensors:
            tensor.data = data
            tensor.grad = grad
        for module, saved in self._modules:
            for key in CARRIED:
                module.__dict__.pop(key, None)
            module.__dict__.update(saved)


def shrink(model: nn.Module, surgery: Surgery) -> None:
    """Cut without a proof: for a surgery that was proved on these shapes before."""
    masks = {
        name: mask
        for name in {*surgery.kept_in, *surgery.kept_out}
        if (mask := mask_of(model.get_submodule(name))) is not None
    }
    for name, weight in surgery.weights.items():
        tensor = tensor_named(model, name)
        tensor.data = weight.to(tensor)
    for (name, axis), kept in surgery.slices.items():
        tensor = tensor_named(model, name)
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if not isinstance(module, WIDE):
            _carry_parameter(module, leaf, axis, kept, tensor.shape[axis])
        tensor.data = tensor.data.index_select(axis, kept.to(tensor.device))
        tensor.grad = None
        if isinstance(module, nn.Embedding):
            module.embedding_dim = module.weight.shape[1]
        if leaf == "weight" and owner in masks:
            masks[owner] = masks[owner].index_select(axis, kept.to(masks[owner].device))
    for name in {*surgery.kept_in, *surgery.kept_out}:
        module = model.get_submodule(name)
        _carry(module, "kept_out", surgery.kept_out.get(name), _widths(module)[0])
        if not isinstance(module, NORMS):
            _carry(module, "kept_in", surgery.kept_in.get(name), _widths(module)[1])
        _rewrite(module, surgery.kept_in.get(name), surgery.kept_out.get(name))
        if name in masks:
            packed: PackedMask = pack_mask(masks[name].cpu())
            module.kept_weights = packed  # type: ignore[assignment]


def _widths(module: nn.Module) -> tuple[int, int]:
    """(out, in) channels as the attributes say, before `_rewrite`."""
    for out, inp in (("out_features", "in_features"), ("out_channels", "in_channels")):
        if hasattr(module, out):
            return int(getattr(module, out)), int(getattr(module, inp))
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return int(module.normalized_shape[0]), 0
    key = "num_channels" if isinstance(module, nn.GroupNorm) else "num_features"
    return int(getattr(module, key)), 0


def _carry(module: nn.Module, key: str, kept: Tensor | None, width: int) -> None:
    """Set module.kept_in or kept_out: positions on the axis as it was before any pruning."""
    earlier = getattr(module, key, None)
    index = earlier if isinstance(earlier, ChannelIndex) else None
    setattr(module, key, index if kept is None else _composed(index, kept.cpu(), width, key))


def _carry_parameter(module: nn.Module, leaf: str, axis: int, kept: Tensor, width: int) -> None:
    """Set the entry of a parameter in module.kept_parameters."""
    earlier: dict[str, Any] = getattr(module, "kept_parameters", {})
    _, index = earlier.get(leaf, (axis, None))
    after = (axis, _composed(index, kept.cpu(), width, leaf))
    module.kept_parameters = {**earlier, leaf: after}  # type: ignore[assignment]


def _composed(earlier: ChannelIndex | None, kept: Tensor, width: int, name: str) -> ChannelIndex:
    """Positions that stay of those that an earlier cut left."""
    if earlier is None:
        return channel_index(kept, width, name)
    return channel_index(earlier.index[kept], earlier.width, name)


def _rewrite(module: nn.Module, kept_in: Tensor | None, kept_out: Tensor | None) -> None:
    """Attributes of a shrunk module say what its tensors are."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Conv2d):
        depthwise = module.groups > 1 and module.groups == module.in_channels
        if kept_in is not None:
            module.in_channels = kept_in.numel()
        if depthwise:
            module.groups = module.in_channels
        module.out_channels = module.weight.shape[0]
    elif kept_out is None:
        return
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        module.normalized_shape = (kept_out.numel(),)
    elif isinstance(module, nn.GroupNorm):
        if module.num_groups == module.num_channels:
            module.num_groups = kept_out.numel()
        module.num_channels = kept_out.numel()
    else:
        module.num_features = kept_out.numel()  # type: ignore[assignment]
