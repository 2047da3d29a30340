"""Layers: which modules of a model can be pruned, and what each of them looked like.

Linear and Conv2d can be pruned. Whatever else owns a matrix is listed with the reason why it is
left alone, so that nothing is skipped in silence.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Their widths are attributes, which channel surgery can rewrite.
NORMS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)
KINDS: tuple[tuple[type[nn.Linear] | type[nn.Conv2d], str], ...] = (
    (nn.Linear, "linear"),
    (nn.Conv2d, "conv2d"),
)


@dataclass(frozen=True)
class Layer:
    """A module that holds a weight.

    Args:
        name: dotted name in the model.
        kind: "linear", "conv2d" or the class name of what cannot be pruned.
        module: the module itself.
        refusal: why it is left alone, or None.
    """

    name: str
    kind: str
    module: nn.Module
    refusal: str | None = None

    @property
    def weight(self) -> Tensor:
        """The weight, detached; shares memory with the module."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight.detach()


def kind_of(module: nn.Module) -> str | None:
    """ "linear" or "conv2d" for modules that compute as those classes do; None for all others."""
    for cls, kind in KINDS:
        if isinstance(module, cls) and type(module).forward is cls.forward:
            return kind
    return None


def matches(name: str, rules: Sequence[str]) -> list[str]:
    """The rules that cover a module: "re:" and a regex for the full name, a name, or a parent."""
    hits = []
    for rule in rules:
        if rule.startswith("re:"):
            try:
                found = re.fullmatch(rule[3:], name)
            except re.error as error:
                raise ValueError(f"ignore: {rule!r} is no regular expression: {error}") from None
            if found:
                hits.append(rule)
        elif name == rule or name.startswith(rule + "."):
            hits.append(rule)
    return hits


def find_layers(model: nn.Module, ignore: Sequence[str] = ()) -> list[Layer]:
    """Every module of the model that owns a matrix, in the order of `named_modules`.

    Raises:
        ValueError: an entry of `ignore` covers no such module, no normalisation and no parameter
            that is no layer's (a typing error would else prune it).
    """
    if isinstance(ignore, str):
        raise ValueError(
            f"ignore must be a list of names, got the string {ignore!r}; write [{ignore!r}]"
        )
    owners = parameter_owners(model)
    used: set[str] = set()
    layers = []
    for name, module in model.named_modules():
        used.update(rule for other in _others(name, module) for rule in matches(other, ignore))
        own = [p for p in module.parameters(recurse=False) if p.ndim >= 2]
        if not own:
            continue
        hits = matches(name, ignore)
        used.update(hits)
        kind = kind_of(module)
        refusal = _refusal(module, kind, owners)
        if refusal is None and hits:
            refusal = f"ignored ({hits[0]})"
        layers.append(Layer(name, kind or type(module).__name__, module, refusal))
    unused = [rule for rule in ignore if rule not in used]
    if unused:
        names = ", ".join(layer.name for layer in layers)
        raise ValueError(f"ignore has {unused[0]!r}, which covers no layer; layers are {names}")
    return layers


def _others(name: str, module: nn.Module) -> list[str]:
    """Names that `ignore` may have beside those of layers: they only make channels stay."""
    if isinstance(module, NORMS):
        return [name]
    if kind_of(module) is not None:
        return []
    own = [f"{name}.{key}".lstrip(".") for key, _ in module.named_parameters(recurse=False)]
    return [name, *own] if own else []


def parameter_owners(model: nn.Module) -> dict[int, list[tuple[int, str]]]:
    """id of a parameter -> (id of the module, dotted name of the parameter) of all that hold it."""
    owners: dict[int, list[tuple[int, str]]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            place = (id(module), f"{prefix}.{name}" if prefix else name)
            owners.setdefault(id(parameter), []).append(place)
    return owners


def _refusal(
    module: nn.Module, kind: str | None, owners: dict[int, list[tuple[int, str]]]
) -> str | None:
    if kind is None:
        cls = type(module)
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            return f"{cls.__name__} has its own forward, so its weight may be used in another way"
        return f"{cls.__name__} is neither a Linear nor a Conv2d"
    weight = module.weight
    if "weight" not in module._parameters or not isinstance(weight, nn.Parameter):
        return "the weight is computed by a parametrization; remove it first"
    if not weight.dtype.is_floating_point or weight.dtype.itemsize < 2:
        return f"the weight is quantised ({weight.dtype}); prune before quantising"
    if weight.numel() == 0:
        return "the weight is empty"
    places = owners.get(id(weight), [])
    others = [place for owner, place in places if owner != id(module)]
    if others:
        return (
            f"the weight is shared with {', '.join(others)}; untie it (clone the parameter) first"
        )
    return None


def check_finite(name: str, weight: Tensor) -> None:
    """Raise ValueError at the first NaN or infinity, naming its place."""
    bad = ~torch.isfinite(weight)
    if not bool(bad.any()):
        return
    flat = int(bad.flatten().int().argmax())
    place = [int(i) for i in torch.unravel_index(torch.tensor(flat), weight.shape)]
    value = float(weight.flatten()[flat])
    raise ValueError(
        f"{name}.weight{place} is {value} ({int(bad.sum())} such values); a score cannot rank it, "
        "repair the weight or ignore the layer"
    )


def digest(tensor: Tensor) -> str:
    """sha256 of dtype, shape and bytes."""
    raw = tensor.detach().cpu().contiguous()
    found = hashlib.sha256(f"{raw.dtype} {list(raw.shape)}".encode())
    found.update(raw.flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()
