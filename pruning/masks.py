"""Masks that stay: kept at 1 bit per weight beside the module, enforced around every step.

A masked module carries `module.kept_weights`, a PackedMask: a plain attribute, so the state dict
is that of the plain model and loads strictly into it, and `copy.deepcopy` takes it along. The
optimizer's state dict carries the masks under "masks", by layer name; `masks_state` and
`load_masks` move them on their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from slimgemm.kernels.formats import PackedMask

STATE_KEY = "masks"


def pack_mask(mask: Tensor) -> PackedMask:
    """A bool mask of any shape at 1 bit per weight, on the device of the mask."""
    if mask.dtype != torch.bool:
        raise ValueError(f"a mask is bool, True = kept, got {mask.dtype}")
    flat = mask.flatten()
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    place = 2 ** torch.arange(8, device=mask.device)
    return PackedMask((flat * place).sum(1).to(torch.uint8), tuple(mask.shape))


def unpack_mask(packed: PackedMask) -> Tensor:
    """The bool mask of a PackedMask.

    Raises:
        ValueError: bits are not uint8 [ceil(weights / 8)] for the shape.
    """
    weights = int(torch.Size(packed.shape).numel())
    want = -(-weights // 8)
    if packed.bits.dtype != torch.uint8 or packed.bits.shape != (want,):
        raise ValueError(
            f"mask bits must be uint8 [{want}] for a weight {list(packed.shape)}, "
            f"got {packed.bits.dtype} {list(packed.bits.shape)}"
        )
    place = 2 ** torch.arange(8, device=packed.bits.device, dtype=torch.uint8)
    return (packed.bits.unsqueeze(1) & place).ne(0).flatten()[:weights].view(packed.shape)


def masked_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, PackedMask]]:
    """(name, module, mask) of every module of the model that carries a mask and has its weight."""
    for name, module in model.named_modules():
        packed = getattr(module, "kept_weights", None)
        if isinstance(packed, PackedMask) and isinstance(getattr(module, "weight", None), Tensor):
            yield name, module, packed


def mask_of(module: nn.Module) -> Tensor | None:
    """The bool mask that a module carries, on the device of its weight; None without one."""
    packed = getattr(module, "kept_weights", None)
    weight = getattr(module, "weight", None)
    if not isinstance(packed, PackedMask) or not isinstance(weight, Tensor):
        return None
    return unpack_mask(packed).to(weight.device)


def set_mask(module: nn.Module, mask: Tensor) -> None:
    """Let a module carry this mask and zero (+0.0) the weights that it drops."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    if mask.shape != weight.shape:
        raise ValueError(f"mask is {list(mask.shape)}, the weight is {list(weight.shape)}")
    module.kept_weights = pack_mask(mask.cpu())  # type: ignore[assignment]
    with torch.no_grad():
        weight.masked_fill_(~mask.to(weight.device), 0.0)


def masks_state(model: nn.Module) -> dict[str, Tensor]:
    """Layer name -> mask bits, uint8 [ceil(weights / 8)]; what `load_masks` takes."""
    return {name: packed.bits.clone() for name, _, packed in masked_modules(model)}


def load_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Let the layers of a model carry masks from `masks_state`, and zero what they drop.

    Raises:
        ValueError: a name is not a layer with a weight, or the bits do not fit its shape; the
            model is unchanged then.
    """
    modules = dict(model.named_modules())
    found = {}
    for name, bits in masks.items():
        weight = getattr(modules.get(name), "weight", None)
        if not isinstance(weight, Tensor):
            raise ValueError(f"masks name {name!r}, which is no layer with a weight in this model")
        try:
            found[name] = unpack_mask(PackedMask(bits.cpu(), tuple(weight.shape)))
        except ValueError as error:
            raise ValueError(f"{name}: {error}; the masks are of another model") from None
    for name, mask in found.items():
        set_mask(modules[name], mask)


class MaskKeeper:
    """Keeps weights, gradients and moments masked; reads the masks of the model anew each step."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        # By module, and weakly: the id of a weight that is gone can be that of another one.
        self._dropped: WeakKeyDictionary[nn.Module, tuple[PackedMask, Tensor]] = WeakKeyDictionary()
        self._hooked: WeakKeyDictionary[nn.Module, ref[Tensor]] = WeakKeyDictionary()

    def _weights(self, optimizer: Optimizer) -> Iterator[tuple[nn.Module, Tensor, Tensor]]:
        """(module, weight, dropped) of every masked weight that this optimizer updates."""
        mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for _, module, packed in masked_modules(self.model):
            weight = module.weight
            if isinstance(weight, Tensor) and id(weight) in mine:
                yield module, weight, self.dropped(module, weight, packed)

    def dropped(self, module: nn.Module, weight: Tensor, packed: PackedMask) -> Tensor:
        """bool like `weight`, True = dropped; unpacked once per mask and device."""
        known = self._dropped.get(module)
        if known is None or known[0].bits is not packed.bits or known[1].device != weight.device:
            known = (packed, ~unpack_mask(packed).to(weight.device))
            self._dropped[module] = known
        return known[1]

    def before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Masks gradients, so that moments and clipped norms see kept weights only."""
        for module, weight, dropped in self._weights(optimizer):
            self.watch(module)
            if weight.grad is not None:
                weight.grad.masked_fill_(dropped, 0.0)

    def after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Masks weights, gradients and every moment of the weight's shape."""
        with torch.no_grad():
            for _, weight, dropped in self._weights(optimizer):
                weight.masked_fill_(dropped, 0.0)
                if weight.grad is not None:
                    weight.grad.masked_fill_(dropped, 0.0)
                for moment in optimizer.state.get(weight, {}).values():
                    if isinstance(moment, Tensor) and moment.shape == weight.shape:
                        moment.masked_fill_(dropped, 0.0)

    def watch(self, module: nn.Module) -> None:
        """Mask the module's gradient as it arrives: clipping by norm comes before the step."""
        weight = module.weight
        assert isinstance(weight, Tensor)
        hooked = self._hooked.get(module)
        if (hooked is not None and hooked() is weight) or not weight.requires_grad:
            return
        self._hooked[module] = ref(weight)

        def on_gradient(parameter: Tensor) -> None:
            packed = getattr(module, "kept_weights", None)
            if isinstance(packed, PackedMask) and parameter.grad is not None:
                parameter.grad.masked_fill_(self.dropped(module, parameter, packed), 0.0)

        weight.register_post_accumulate_grad_hook(on_gradient)

    def save(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        """Adds the masks to the optimizer's state dict."""
        return {**state, STATE_KEY: masks_state(self.model)}

    def load(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        """Takes the masks out of a state dict, onto the model."""
        load_masks(self.model, state.get(STATE_KEY, {}))
        return {key: value for key, value in state.items() if key != STATE_KEY}


def keep_masks(optimizer: Optimizer, model: nn.Module) -> Optimizer:
    """Make an optimizer leave dropped weights at zero, with torch's own step hooks.

    After every step the masked weights are exactly +0.0, their gradients and all moments too.
    Gradients are masked as they arrive, so clipping sees kept weights only. A plan applied later is
    followed. Calling it twice for one optimizer and model changes nothing.

    Args:
        optimizer: any torch optimizer, foreach and fused included; it stays the same object, so
            schedulers and gradient scalers that hold it keep working. Its state dict gains "masks".
        model: a model on which a plan was applied.

    Returns:
        The same optimizer.

    Raises:
        ValueError: no layer of the model carries a mask, or the optimizer updates none of the
            masked weights (it was built for another model or copy).
    """
    if not any(True for _ in masked_modules(model)):
        raise ValueError(
            "no layer of this model carries a mask; apply a plan first, "
            "or restore masks with load_masks"
        )
    known = getattr(optimizer, "mask_keeper", None)
    keeper = known if isinstance(known, MaskKeeper) else MaskKeeper(model)
    if keeper.model is not model:
        raise ValueError("this optimizer already keeps the masks of another model; build a new one")
    held = list(keeper._weights(optimizer))
    if not held:
        raise ValueError(
            "the optimizer updates none of the masked weights; "
            "build it from this model's parameters"
        )
    if known is None:
        optimizer.register_step_pre_hook(keeper.before_step)
        optimizer.register_step_post_hook(keeper.after_step)
        optimizer.register_state_dict_post_hook(keeper.save)
        optimizer.register_load_state_dict_pre_hook(keeper.load)
        optimizer.mask_keeper = keeper  # type: ignore[attr-defined]
    keeper.after_step(optimizer, None, None)
    for module, _, _ in held:
        keeper.watch(module)
    return optimizer
