"""rebuild: a dense model becomes the shrunk and swapped one that a checkpoint describes.

A checkpoint says of each layer whose channels were cut which ones stayed ("shrunk"), and of each
layer that was swapped by which class ("swapped"). A layer can be both: it is shrunk first. A module
that is no layer (an embedding, the owner of a position parameter) names the axis of each parameter.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from slimgemm.kernels.formats import ChannelIndex, Packed24, channel_index, check
from slimgemm.sparse_ops.swap import CONVERTERS, carry_over, modules_with_names, replace

TWINS = {twin.__name__: twin for pair in CONVERTERS.values() for twin in pair}

# Attributes that hold a shrunk module's widths; what is not among them keeps its value.
WIDTHS = ("in_features", "out_features", "in_channels", "out_channels", "groups", "num_features",
          "num_channels", "num_groups", "normalized_shape", "embedding_dim")  # fmt: skip

Entries = dict[str, dict[str, Any]]


class CheckpointError(ValueError):
    """A checkpoint that is damaged, or that does not fit the model; nothing was loaded."""


def swapped_entries(model: nn.Module) -> Entries:
    """name -> class, what it replaces, its options, dense shape and all its names.

    Raises:
        ValueError: packed metadata is damaged; the layer is named.
    """
    entries: Entries = {}
    for module, names in modules_with_names(model).items():
        if type(module).__name__ not in TWINS:
            continue
        if hasattr(module, "packed"):
            try:
                check(cast(Packed24, module.packed))
            except ValueError as error:
                raise ValueError(f"{names[0] or 'the model'}: {error}") from error
        dense = cast(Any, module).to_dense()
        entries[names[0]] = {
            "class": type(module).__name__,
            "replaces": type(dense).__name__,
            "options": module.options,
            "dense_shape": list(dense.weight.shape),
            "names": names,
        }
    return entries


def shrunk_entries(model: nn.Module) -> Entries:
    """name -> class, kept channels, widths and tensor shapes of each layer that was cut."""
    entries: Entries = {}
    for name, module in model.named_modules():
        # Not getattr: a module that gathers channels has properties of these names.
        kept = {key: module.__dict__.get(key) for key in ("kept_in", "kept_out")}
        kept = {key: index for key, index in kept.items() if isinstance(index, ChannelIndex)}
        parameters = module.__dict__.get("kept_parameters") or {}
        if not kept and not parameters:
            continue
        dense = cast(Any, module).to_dense() if type(module).__name__ in TWINS else module
        tensors = dict(dense.named_parameters(recurse=False))
        tensors |= dict(dense.named_buffers(recurse=False))
        entries[name] = {
            "class": type(dense).__name__,
            **{key: {"width": i.width, "index": i.index.tolist()} for key, i in kept.items()},
            "parameters": {
                key: {"axis": axis, "width": i.width, "index": i.index.tolist()}
                for key, (axis, i) in parameters.items()
            },
            "attributes": {key: getattr(dense, key) for key in WIDTHS if hasattr(dense, key)},
            "shapes": {key: list(tensor.shape) for key, tensor in tensors.items()},
        }
    return entries


def rebuild(model: nn.Module, shrunk: Entries, swapped: Entries) -> nn.Module:
    """Give a dense model the layers of a checkpoint, their tensors still without data.

    Raises:
        CheckpointError: a layer is missing, of another class, or of another width.
    """
    for name, entry in shrunk.items():
        _check_shrunk(model, name, entry)
    for name, entry in shrunk.items():
        _shrink(_get(model, name), name, entry)
    twins = [(entry["names"], _twin(model, name, entry)) for name, entry in swapped.items()]
    for names, module in twins:
        model = module if names == [""] else model
        replace(model, [name for name in names if name], module)
    return model


def _get(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise CheckpointError(f"the model has no layer {name!r}, the checkpoint has") from None


def _check_shrunk(model: nn.Module, name: str, entry: dict[str, Any]) -> None:
    module = _get(model, name)
    if type(module).__name__ != entry["class"]:
        raise CheckpointError(
            f"{name} is a {type(module).__name__} in the model, "
            f"a {entry['class']} in the checkpoint"
        )
    weight = getattr(module, "weight", None)
    for axis, key in enumerate(("kept_out", "kept_in")):
        if key not in entry or weight is None or axis >= weight.ndim:
            continue
        width = entry[key]["width"]
        if weight.shape[axis] not in (width, width // getattr(module, "groups", 1)):
            raise CheckpointError(
                f"{name} is {list(weight.shape)} in the model, the checkpoint was cut from "
                f"width {width} on axis {axis}; load it into the model it was saved from"
            )

    for key, cut in entry.get("parameters", {}).items():
        parameter, axis = module._parameters.get(key), cut["axis"]
        shape = [] if parameter is None else list(parameter.shape)
        if shape[axis : axis + 1] != [cut["width"]]:
            raise CheckpointError(
                f"{name}.{key} is {shape} in the model, the checkpoint was cut from width "
                f"{cut['width']} on axis {axis}; load it into the model it was saved from"
            )


def _shrink(module: nn.Module, name: str, entry: dict[str, Any]) -> None:
    """Give `module` the widths of the checkpoint; its tensors are loaded afterwards."""
    for key, value in entry["attributes"].items():
        setattr(module, key, tuple(value) if isinstance(value, list) else value)
    for key in ("kept_in", "kept_out"):
        if key in entry:
            index = torch.tensor(entry[key]["index"], dtype=torch.int64)
            setattr(module, key, channel_index(index, entry[key]["width"], f"{name}.{key}"))
    if entry.get("parameters"):
        module.kept_parameters = {  # type: ignore[assignment]
            key: (cut["axis"], channel_index(cut["index"], cut["width"], f"{name}.{key}"))
            for key, cut in entry["parameters"].items()
        }
    for key, shape in entry["shapes"].items():
        parameter, buffer = module._parameters.get(key), module._buffers.get(key)
        if all(t is None or list(t.shape) == shape for t in (parameter, buffer)):
            continue  # a buffer that is not saved keeps its values
        if parameter is not None:
            empty = torch.empty(shape, dtype=parameter.dtype, device="meta")
            module._parameters[key] = nn.Parameter(empty, parameter.requires_grad)
        elif buffer is not None:
            module._buffers[key] = torch.empty(shape, dtype=buffer.dtype, device="meta")


def _twin(model: nn.Module, name: str, entry: dict[str, Any]) -> nn.Module:
    """An empty module of the checkpoint's class for one layer."""
    dense: Any = _get(model, name)
    if type(dense).__name__ != entry["replaces"] or entry["class"] not in TWINS:
        raise CheckpointError(
            f"{name} is a {type(dense).__name__} in the model, the checkpoint packs a "
            f"{entry['replaces']} as {entry['class']}"
        )
    if list(dense.weight.shape) != entry["dense_shape"]:
        raise CheckpointError(
            f"{name} is {list(dense.weight.shape)} in the model, {entry['dense_shape']} in the "
            "checkpoint; load it into the model it was saved from"
        )
    for other in entry["names"]:
        if _get(model, other) is not dense:
            raise CheckpointError(f"{name} and {other} are two layers in the model, one as saved")
    return carry_over(dense, TWINS[entry["class"]].like(dense, **entry["options"]))
