"""ChannelModule, what ChannelLinear and ChannelConv2d share; state dict as channels.py says."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from slimgemm.kernels.channel_layout import RANGE, addressing, channel_layout, check_groups
from slimgemm.kernels.formats import ChannelIndex, channel_index

Kept = ChannelIndex | Tensor | list[int] | range | None


def checked_index(kept: Kept, width: int, groups: int, name: str) -> ChannelIndex | None:
    """`kept` as a checked ChannelIndex of an axis of `width`; None for all."""
    if kept is None:
        return None
    if isinstance(kept, ChannelIndex):
        if kept.width != width:
            raise ValueError(
                f"{name} must be an index of {width} channels, got one of {kept.width}"
            )
        kept = kept.index
    # Not on the default device, which is "meta" where a module is made without memory.
    with torch.device(kept.device if isinstance(kept, Tensor) else "cpu"):
        index = channel_index(kept, width, name)
        check_groups(index, groups, name)
    return index


def found_index(used: Tensor, groups: int) -> ChannelIndex | None:
    """The channels set in the bool mask `used`; None if that is all.

    Groups keep the same number: one that uses fewer also keeps its first unused ones.
    """
    per_group = used.view(groups, -1)
    most = int(per_group.sum(1).max()) if used.numel() else 0
    first = per_group.int().sort(dim=1, descending=True, stable=True).indices[:, :most]
    kept = torch.zeros_like(per_group).scatter_(1, first, True).view(-1)
    index = kept.nonzero().view(-1)
    return None if index.numel() == used.numel() else ChannelIndex(index, used.numel())


def refuse_lost(used: Tensor, counts: Tensor, index: ChannelIndex | None, side: str) -> None:
    """Raise ValueError if a channel that `index` drops is `used`; `counts`: its non-zeros."""
    if index is None:
        return
    lost = used.index_fill(0, index.index.to(used.device), False)
    if bool(lost.any()):
        channel = int(lost.int().argmax())
        raise ValueError(
            f"{side} channel {channel} is dropped but holds {int(counts[channel])} nonzeros "
            f"({int(lost.sum())} such channels in all); keep it, or prune it first "
            "(slimgemm.pruning.plan)"
        )


def kept_channels_of(
    weight: Tensor, bias: Tensor | None, groups: int, kept_in: Kept, kept_out: Kept
) -> tuple[ChannelIndex | None, ChannelIndex | None]:
    """(in, out) channels to keep of a dense weight [out, in / groups, ...]; None is found here.

    Raises:
        ValueError: a dropped channel holds a non-zero, or there is nothing to drop.
    """
    out, per_group = weight.shape[:2]
    nonzero = (weight.detach() != 0).reshape(groups, out // groups, per_group, -1).sum(3)
    counts_in = nonzero.sum(1).view(-1)
    counts_out = nonzero.sum(2).view(-1)
    if bias is not None:
        counts_out = counts_out + (bias.detach() != 0)
    ins = checked_index(kept_in, counts_in.numel(), groups, "kept_in")
    outs = checked_index(kept_out, out, groups, "kept_out")
    refuse_lost(counts_in > 0, counts_in, ins, "in")
    refuse_lost(counts_out > 0, counts_out, outs, "out")
    ins = ins if kept_in is not None else found_index(counts_in > 0, groups)
    outs = outs if kept_out is not None else found_index(counts_out > 0, groups)
    if ins is None and outs is None:
        raise ValueError(
            "there is no channel to drop: every in and out channel of the weight holds nonzeros; "
            "prune it first (slimgemm.pruning.plan)"
        )
    return ins, outs


class ChannelModule(nn.Module):
    """The kept channels of a module, how they are loaded, and the way from and to dense."""

    # What the constructor sets beside the attributes of the dense module; decompress drops them.
    own_attributes: ClassVar[tuple[str, ...]] = ("_layouts", "_laid_out", "_paddings", "groups")

    weight: nn.Parameter
    in_index: Tensor | None
    out_index: Tensor | None
    groups: int

    def _allocate(
        self, widths: tuple[int, int], kernel: tuple[int, ...], kept_in: Kept, kept_out: Kept,
        bias: bool, device: Any, dtype: Any,
    ) -> None:  # fmt: skip
        """Indices, and uninitialised `weight` and `bias`, of `widths` (in, out) dense channels."""
        self._layouts: dict[str, tuple[int, int, int, int]] = {}
        sides = (("in_index", kept_in, "kept_in"), ("out_index", kept_out, "kept_out"))
        for (key, kept, name), width in zip(sides, widths, strict=True):
            index = checked_index(kept, width, self.groups, name)
            tensor = None
            layout = (width, width, 0, RANGE)
            if index is not None:
                layout = (width, index.kept, *addressing(index.index, self.groups))
                target = torch.get_default_device() if device is None else device
                tensor = index.index.to(target, copy=True)
            self._layouts[key] = layout
            self.register_buffer(key, tensor)
        self._note_indices()
        shape = (
            self._layouts["out_index"][1],
            self._layouts["in_index"][1] // self.groups,
            *kernel,
        )
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(shape[0], device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)

    def reset_parameters(self) -> None:
        """The initialisation of nn.Linear and nn.Conv2d, for the kept fan-in."""
        fan_in = math.prod(self.weight.shape[1:])
        bound = 1 / math.sqrt(fan_in) if fan_in else 0.0
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                nn.init.uniform_(parameter, -bound, bound)

    def _kept(self, key: str) -> ChannelIndex | None:
        index = getattr(self, key)
        return None if index is None else ChannelIndex(index, self._layouts[key][0])

    @property
    def kept_in(self) -> ChannelIndex | None:
        """Kept in channels; None for all."""
        return self._kept("in_index")

    @property
    def kept_out(self) -> ChannelIndex | None:
        """Kept out channels; None for all."""
        return self._kept("out_index")

    @property
    def options(self) -> dict[str, Any]:
        """What `like` needs beside the dense module; goes into checkpoints."""
        kept = {"kept_in": self.kept_in, "kept_out": self.kept_out}
        return {key: None if i is None else i.index.tolist() for key, i in kept.items()}

    def _note_indices(self) -> None:
        """Remember which index tensors `_layouts` describes."""
        self._laid_out = {key: getattr(self, key) for key in self._layouts}

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """What `to` and its like do: the same indices, elsewhere."""
        replaced = [key for key in self._layouts if getattr(self, key) is not self._laid_out[key]]
        super()._apply(fn, recurse)
        self._laid_out |= {k: getattr(self, k) for k in self._layouts if k not in replaced}
        return self

    def _named(self, key: str) -> tuple[Tensor | None, tuple[int, int, int, int]]:
        """Index `key` and how to address it; one that came from elsewhere is read and checked here.

        Raises:
            ValueError: torch.func.functional_call, say, put an index here that is not valid, or
                that cannot be read.
        """
        index, layout = getattr(self, key), self._layouts[key]
        # A traced index has no elements to read: it is taken for the one that was laid out.
        traced = torch.compiler.is_compiling() or isinstance(index, FakeTensor)
        if index is None or traced or index.is_meta or index is self._laid_out[key]:
            return (None if layout[3] == RANGE else index), layout
        try:
            found = channel_layout(ChannelIndex(index, layout[0]), layout[0], key, self.groups)
        except RuntimeError as error:
            raise ValueError(
                f"{key} was replaced by a tensor that cannot be read ({error}); replace the weight "
                "and the bias only"
            ) from None
        return found.index, (found.width, found.kept, found.start, found.run)

    def _channels(self) -> list[Any]:
        """The four arguments that name the channels to an operator."""
        return [*self._named("in_index"), *self._named("out_index")]

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        layouts = dict(self._layouts)
        for key in ("in_index", "out_index"):
            mine, loaded = getattr(self, key), state_dict.get(prefix + key)
            if mine is None or not isinstance(loaded, Tensor) or loaded.shape != mine.shape:
                continue  # torch reports it
            if loaded.is_meta:
                continue
            try:
                if loaded.dtype != torch.int64:
                    raise ValueError(f"{key} must be int64, got {loaded.dtype}")
                width = self._layouts[key][0]
                index = channel_index(loaded, width, key)
                check_groups(index, self.groups, key)
            except ValueError as error:
                # As torch does for a shape that differs: keep what the module has, and say why.
                error_msgs.append(f"{prefix or 'the module'}: {error}")
                return
            layouts[key] = (width, index.kept, *addressing(loaded, self.groups))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._layouts = layouts
        self._note_indices()

    def _places_in(self) -> Tensor | None:
        """int64 [groups, 1, kept per group]: the place of each kept in channel inside its group."""
        if self.in_index is None:
            return None
        per_group = self._layouts["in_index"][0] // self.groups
        return (self.in_index % max(per_group, 1)).view(self.groups, 1, self.weight.shape[1])

    @torch.no_grad()
    def _take_from(self, dense: nn.Linear | nn.Conv2d) -> None:
        """Take the kept part of the weight and bias of `dense`; a whole bias is shared."""
        weight, bias = dense.weight, dense.bias
        chosen = weight.detach()
        if self.out_index is not None:
            chosen = chosen.index_select(0, self.out_index)
        places = self._places_in()
        if places is not None:
            grouped = chosen.reshape(self.groups, -1 if chosen.numel() else 0, *chosen.shape[1:])
            places = places.view(*places.shape, *[1] * (chosen.ndim - 2))
            chosen = torch.take_along_dim(grouped, places, 2)
        self.weight = nn.Parameter(chosen.reshape(self.weight.shape).clone(), weight.requires_grad)
        if bias is not None and self.out_index is not None:
            bias = nn.Parameter(bias.index_select(0, self.out_index), bias.requires_grad)
        self.register_parameter("bias", cast(nn.Parameter, bias))
        self.train(dense.training)

    @torch.no_grad()
    def _give_to(self, dense: nn.Module, shape: tuple[int, ...]) -> None:
        """Give `dense` a weight of `shape`, and a bias, that hold this module's and zeros."""
        weight, bias = self.weight.detach().clone(), self.bias
        places = self._places_in()
        if places is not None:
            grouped = weight.reshape(self.groups, weight.shape[0] // self.groups, *weight.shape[1:])
            places = places.view(*places.shape, *[1] * (weight.ndim - 2)).expand_as(grouped)
            wide = grouped.new_zeros(*grouped.shape[:2], *shape[1:])
            weight = wide.scatter_(2, places, grouped).reshape(weight.shape[0], *shape[1:])
        if self.out_index is not None:
            weight = weight.new_zeros(shape).index_copy_(0, self.out_index, weight)
            if bias is not None:
                wide_bias = bias.new_zeros(shape[0]).index_copy_(0, self.out_index, bias)
                bias = nn.Parameter(wide_bias, bias.requires_grad)
        dense.weight = nn.Parameter(weight, self.weight.requires_grad)
        dense.register_parameter("bias", bias)
        dense.train(self.training)

    @property
    def nbytes(self) -> int:
        """Bytes of weight, bias and indices together."""
        tensors = (self.weight, self.bias, self.in_index, self.out_index)
        return sum(t.nbytes for t in tensors if t is not None)

    def _size_repr(self) -> str:
        (wide_in, kept_in, *_), (wide_out, kept_out, *_) = self._layouts.values()
        dense = wide_out * (wide_in // self.groups) * math.prod(self.weight.shape[2:])
        dense += 0 if self.bias is None else wide_out
        return (
            f"bias={self.bias is not None}, kept in {kept_in} of {wide_in}, kept out {kept_out} of "
            f"{wide_out}, {self.nbytes} bytes (dense {dense * self.weight.element_size()})"
        )
