"""saved: what a saved folder holds, and whether it is sound, without the model's code."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from slimgemm.kernels.formats import BYTE_WEIGHTS, Packed24
from slimgemm.kernels.formats import check as check_packed
from slimgemm.sparse_ops.checkpoint import MANIFEST, TENSORS, load, read_manifest
from slimgemm.sparse_ops.report import as_table

# Tensors that a layer's weight is stored as.
WEIGHT = ("weight", "values", "meta", "in_index", "out_index")
INSIDE = "model"  # where slimgemm prune puts the checkpoint in its --out


@dataclass(frozen=True)
class SavedCheck:
    """One thing that was checked."""

    what: str
    ok: bool
    detail: str


def checkpoint_in(folder: Path) -> Path:
    """The checkpoint that a folder is, or that `slimgemm prune` left inside it.

    Raises:
        ValueError: there is none.
    """
    for place in (folder, folder / INSIDE):
        if (place / MANIFEST).is_file():
            return place
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; give one that sparse_ops.save wrote")
    raise ValueError(
        f"there is no {MANIFEST} in {folder} nor in {folder / INSIDE}; give a folder that "
        "sparse_ops.save wrote, or --out of a slimgemm prune that came to its end"
    )


def contents(folder: Path) -> dict[str, Any]:
    """Tool, files, tensors, and a row per layer that was cut or packed.

    Raises:
        ValueError: the folder is no checkpoint, or damaged.
    """
    manifest = read_manifest(folder)
    sizes = _sizes(folder)
    layers = []
    for name in sorted({*manifest["shrunk"], *manifest["swapped"]}):
        shrunk, swapped = manifest["shrunk"].get(name), manifest["swapped"].get(name)
        prefix = f"{name}." if name else ""
        cuts = (shrunk or {}).get("parameters", {})
        own = {leaf: sizes.get(prefix + leaf) for leaf in (*WEIGHT, *cuts)}
        stored = sum(size.nbytes for size in own.values() if size is not None)
        size = own["values"] or own["weight"]
        shape = _dense_shape(shrunk, swapped)
        dense = math.prod(shape) * size.itemsize if size is not None else 0
        if cuts:
            parts = [(s.nbytes, cuts[key]) for key, s in own.items() if key in cuts and s]
            dense = sum(n // len(cut["index"]) * cut["width"] for n, cut in parts)
        layers.append(
            {
                "layer": name,
                "class": swapped["class"] if swapped else shrunk["class"],
                "replaces": swapped["replaces"] if swapped else shrunk["class"],
                "kept": _kept(shrunk, swapped),
                "dense_shape": shape,
                "stored_bytes": stored,
                "dense_bytes": dense,
                "stored_over_dense": stored / dense if dense else None,
            }
        )
    return {
        "folder": str(folder),
        "tool": manifest["tool"],
        "format_version": manifest["version"],
        "tensors": len(sizes),
        "tensor_bytes": sum(size.nbytes for size in sizes.values()),
        "file_bytes": sum((folder / name).stat().st_size for name in (TENSORS, MANIFEST)),
        "layers": layers,
    }


class _Size(NamedTuple):
    """Bytes of a tensor, and of one of its elements."""

    nbytes: int
    itemsize: int


def _sizes(folder: Path) -> dict[str, _Size]:
    """Tensor name -> its size."""
    from safetensors import safe_open

    with safe_open(folder / TENSORS, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return {key: _Size(t.nbytes, t.itemsize) for key, t in tensors.items()}


def _dense_shape(shrunk: dict[str, Any] | None, swapped: dict[str, Any] | None) -> list[int]:
    """Shape of the weight before anything was cut."""
    cuts = (shrunk or {}).get("parameters", {})
    key = next(iter(cuts), "weight")
    found = swapped["dense_shape"] if swapped else (shrunk or {})["shapes"].get(key, [])
    shape = list(found)
    if shrunk is None:
        return shape
    if cuts:
        shape[cuts[key]["axis"]] = cuts[key]["width"]
    groups = shrunk["attributes"].get("groups", 1)
    for axis, key in enumerate(("kept_out", "kept_in")):
        if key not in shrunk or axis >= len(shape):
            continue
        kept, width = len(shrunk[key]["index"]), shrunk[key]["width"]
        if axis == 1 and groups > 1:
            # A depthwise layer has a group for each channel, others as many groups as before.
            shape[1] = shape[1] if groups == kept else width // groups
        else:
            shape[axis] = width
    return shape


def _kept(shrunk: dict[str, Any] | None, swapped: dict[str, Any] | None) -> str:
    """What stayed, in words."""
    parts = []
    options = swapped["options"] if swapped else {}
    if "keep" in options:
        parts.append(f"{options['keep']}:{options['group']}")
    for key, side in (("kept_out", "out"), ("kept_in", "in")):
        if shrunk and key in shrunk:
            parts.append(f"{len(shrunk[key]['index'])} of {shrunk[key]['width']} {side}")
    for key, cut in (shrunk or {}).get("parameters", {}).items():
        parts.append(f"{len(cut['index'])} of {cut['width']} of {key}")
    return ", ".join(parts) or "channels"


def table(found: dict[str, Any]) -> str:
    """The contents as text; bytes are of weights, without biases."""
    rows = [
        [row["layer"], row["class"], "x".join(map(str, row["dense_shape"])), row["kept"],
         f"{row['stored_bytes']:,}", f"{row['dense_bytes']:,}",
         f"{100 * (row['stored_over_dense'] or 0):.1f} %"]
        for row in found["layers"]
    ]  # fmt: skip
    title = f"{found['folder']}: {found['tool']}"
    columns = ["layer", "class", "dense weight", "kept", "bytes stored", "bytes dense", "share"]
    stored = sum(row["stored_bytes"] for row in found["layers"])
    dense = sum(row["dense_bytes"] for row in found["layers"])
    total = f" The listed weights take {stored:,} bytes, dense {dense:,}." if dense else ""
    return (
        f"{as_table(title, columns, rows)}\n{found['tensors']} tensors, "
        f"{found['tensor_bytes']:,} bytes; {found['file_bytes']:,} bytes on disk. Layers that are "
        f"not listed have the shapes of the dense model.{total}"
    )


def checks(folder: Path, make: Callable[[], nn.Module] | None = None) -> list[SavedCheck]:
    """Digests, every packed weight, and with `make` that the folder loads into its model."""
    try:
        manifest = read_manifest(folder)
    except ValueError as error:
        return [SavedCheck("files", False, str(error))]
    found = [SavedCheck("files", True, f"{TENSORS} and {MANIFEST} have their digests")]
    from safetensors.torch import load_file

    tensors = load_file(folder / TENSORS)
    for name, entry in manifest["swapped"].items():
        if "keep" in entry["options"]:
            found.append(_packed(name, entry, tensors))
    if make is not None:
        found.append(_loads(folder, make))
    return found


def _packed(name: str, entry: dict[str, Any], tensors: dict[str, torch.Tensor]) -> SavedCheck:
    keep, group = entry["options"]["keep"], entry["options"]["group"]
    prefix = f"{name}." if name else ""
    values, meta = tensors.get(f"{prefix}values"), tensors.get(f"{prefix}meta")
    if values is None or meta is None:
        return SavedCheck(name, False, "its values or metadata are missing")
    linear = len(entry["dense_shape"]) == 2
    k = entry["dense_shape"][1] if linear else meta.shape[1] * BYTE_WEIGHTS
    try:
        check_packed(Packed24(values, meta, k, keep, group))
    except ValueError as error:
        return SavedCheck(name, False, str(error))
    if not bool(torch.isfinite(values).all()):
        return SavedCheck(name, False, "it holds a value that is not finite")
    return SavedCheck(name, True, f"{values.numel() // keep} groups of {keep}:{group} are sound")


def _loads(folder: Path, make: Callable[[], nn.Module]) -> SavedCheck:
    try:
        model = load(make, folder)
    except ValueError as error:
        return SavedCheck("model", False, str(error))
    count = sum(1 for _ in model.modules())
    return SavedCheck("model", True, f"it loads into the model, {count} modules")
