"""saved: what a saved folder holds, and whether it is sound, without the model's code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slimgemm.kernels.formats import BYTE_WEIGHTS, Packed24
from slimgemm.kernels.formats import check as check_packed
from slimgemm.sparse_ops.checkpoint import MANIFEST, TENSORS, load, read_manifest
from slimgemm.sparse_ops.report import as_table


@dataclass(frozen=True)
class SavedCheck:
    """One thing that was checked."""

    what: str
    ok: bool
    detail: str


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
        owned = sum(nbytes for key, nbytes in sizes.items() if key.rpartition(".")[0] == name)
        layers.append(
            {
                "layer": name,
                "class": swapped["class"] if swapped else shrunk["class"],
                "replaces": swapped["replaces"] if swapped else shrunk["class"],
                "kept": _kept(shrunk, swapped),
                "dense_shape": swapped["dense_shape"] if swapped else shrunk["shapes"]["weight"],
                "bytes": owned,
            }
        )
    return {
        "folder": str(folder),
        "tool": manifest["tool"],
        "format_version": manifest["version"],
        "tensors": len(sizes),
        "tensor_bytes": sum(sizes.values()),
        "file_bytes": sum((folder / name).stat().st_size for name in (TENSORS, MANIFEST)),
        "layers": layers,
    }


def _sizes(folder: Path) -> dict[str, int]:
    """Tensor name -> bytes."""
    from safetensors import safe_open

    with safe_open(folder / TENSORS, framework="pt") as file:
        return {key: file.get_tensor(key).nbytes for key in file.keys()}  # noqa: SIM118


def _kept(shrunk: dict[str, Any] | None, swapped: dict[str, Any] | None) -> str:
    """What stayed, in words."""
    parts = []
    options = swapped["options"] if swapped else {}
    if "keep" in options:
        parts.append(f"{options['keep']}:{options['group']}")
    for key, side in (("kept_out", "out"), ("kept_in", "in")):
        if shrunk and key in shrunk:
            parts.append(f"{len(shrunk[key]['index'])} of {shrunk[key]['width']} {side}")
    return ", ".join(parts) or "channels"


def table(found: dict[str, Any]) -> str:
    """The contents as text."""
    rows = [
        [row["layer"], row["class"], "x".join(map(str, row["dense_shape"])), row["kept"],
         f"{row['bytes']:,}"]
        for row in found["layers"]
    ]  # fmt: skip
    title = f"{found['folder']}: {found['tool']}"
    head = as_table(title, ["layer", "class", "weight as dense", "kept", "bytes"], rows)
    return (
        f"{head}\n{found['tensors']} tensors, {found['tensor_bytes']:,} bytes; "
        f"{found['file_bytes']:,} bytes on disk. Layers that are not listed are dense."
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
