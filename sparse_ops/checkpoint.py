"""save and load: a folder of model.safetensors and prune.json; never pickle.

prune.json says which layers are packed or shrunk and how, and carries the sha256 of the tensors'
file and of itself. `load` checks both before it reads a tensor, rebuilds the shapes in the user's
own model, and only then loads.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimgemm.kernels.formats import PackedMask
from slimgemm.sparse_ops.rebuild import CheckpointError, rebuild, shrunk_entries, swapped_entries

FORMAT = "slimgemm"
VERSION = 1
MASK = ".kept_weights"  # after a layer's name: the bits of its mask, among the tensors
TENSORS, MANIFEST = "model.safetensors", "prune.json"


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def manifest_digest(manifest: dict[str, Any]) -> str:
    """sha256 of a manifest without its own digest, in canonical JSON."""
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def save(model: nn.Module, folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Write `model` to `folder`: model.safetensors and prune.json.

    Everything is written beside and renamed at the end, so a crash leaves no folder that loads.
    Equal models give equal bytes, with the same versions of slimgemm and torch.

    Args:
        model: packed modules, shrunk layers and dense ones in any mix.
        folder: must not exist, unless `overwrite`, which replaces a checkpoint and nothing else.
    Raises:
        ValueError: the folder exists, packed metadata is damaged, or the state dict holds
            something that is no tensor, or a tensor without data.
    """
    from safetensors.torch import save_file

    target = Path(folder)
    check_target(target, overwrite)
    tensors, aliases = _tensors(model)
    masks = _masks(model)
    if clash := sorted(tensors.keys() & masks.keys()):
        raise ValueError(f"{clash[0]} in the state dict has the name of a mask; rename it")
    swapped = swapped_entries(model)
    with _beside(target) as work:
        # One key: safetensors writes several in an order that differs from run to run.
        save_file(tensors | masks, work / TENSORS, metadata={"format": FORMAT})
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "tool": f"slimgemm {metadata.version('slimgemm')}, torch {torch.__version__}",
            "tensors": {"file": TENSORS, "sha256": file_digest(work / TENSORS)},
            "aliases": aliases,
            "masks": [name.removesuffix(MASK) for name in masks],
            "frozen": [n for n, p in _parameters(model) if not p.requires_grad],
            "shrunk": shrunk_entries(model),
            "swapped": swapped,
        }
        manifest["sha256"] = manifest_digest(manifest)
        (work / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def _parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Every parameter under each of its names."""
    return list(model.named_parameters(remove_duplicate=False))


def _masks(model: nn.Module) -> dict[str, Tensor]:
    """Layer name and MASK -> bits of the mask that an unpacked layer carries."""
    found = {}
    for name, module in model.named_modules():
        mask, weight = getattr(module, "kept_weights", None), getattr(module, "weight", None)
        if isinstance(mask, PackedMask) and isinstance(weight, Tensor):
            if tuple(mask.shape) != tuple(weight.shape):
                raise ValueError(
                    f"{name}: its mask is {list(mask.shape)}, its weight {list(weight.shape)}; "
                    "plan again, or delete kept_weights"
                )
            found[name + MASK] = mask.bits.detach().cpu().clone()
    return found


def check_target(target: Path, overwrite: bool) -> None:
    """Raise ValueError unless `target` is free, or a checkpoint that may be replaced."""
    if not target.exists():
        return
    if not overwrite:
        raise ValueError(f"{target} exists; choose another folder or pass overwrite=True")
    if not target.is_dir():
        raise ValueError(f"{target} is a file; choose another folder")
    others = sorted({path.name for path in target.iterdir()} - {TENSORS, MANIFEST})
    if others:
        raise ValueError(
            f"{target} holds {others[0]}, which is no part of a checkpoint and would be deleted; "
            "choose another folder"
        )


@contextlib.contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A new folder beside `target` that takes its name when the block ends well."""
    target.parent.mkdir(parents=True, exist_ok=True)
    token = secrets.token_hex(4)  # a process id repeats, in containers at once
    work, old = (target.with_name(f"{target.name}.{token}.{end}") for end in ("new", "old"))
    work.mkdir()
    try:
        yield work
        replaced = target.exists()
        if replaced:
            target.rename(old)
        try:
            work.rename(target)
        except BaseException:
            if replaced:
                old.rename(target)
            raise
        _remove(old)
    finally:
        _remove(work)


def _remove(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)


def _tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state dict with each shared tensor once, and alias -> name for the rest."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    parameters = dict(_parameters(model))
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{name} in the state dict is a {type(value).__name__}; only tensors can be saved, "
                "so make it a buffer"
            )
        if value.is_meta:
            raise ValueError(f"{name} is on the meta device and has no data to save")
        # A buffer with the memory of a parameter is stored on its own: the two are no one object.
        key = (name in parameters, value.data_ptr(), tuple(value.shape), value.stride(),
               value.dtype, value.device)  # fmt: skip
        if value.numel() and key in first:
            aliases[name] = first[key]
        else:
            first[key] = name
            tensors[name] = value.detach().contiguous().cpu().clone()
    return tensors, aliases


def read_manifest(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """prune.json of a checkpoint, after both digests were checked.

    Raises:
        CheckpointError: a file is missing or damaged, or the format is newer than this package.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    for needed in (path, folder / TENSORS):
        if not needed.is_file():
            inside = folder / "model"  # of the folder that slimgemm prune writes
            cure = f"; {inside} is one" if (inside / MANIFEST).is_file() else ""
            raise CheckpointError(f"{needed} is missing; {folder} is no slimgemm checkpoint{cure}")
    try:
        manifest = json.loads(path.read_text())
        version, claimed = manifest["version"], manifest["sha256"]
        tensors = manifest["tensors"]["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); copy the checkpoint again") from error
    if manifest.get("format") != FORMAT or version != VERSION:
        raise CheckpointError(
            f"{path} says format {manifest.get('format')!r} version {version!r}, this slimgemm "
            f"reads {FORMAT!r} version {VERSION}; update slimgemm"
        )
    if manifest_digest(manifest) != claimed:
        raise CheckpointError(f"{path} is damaged: its sha256 differs; copy the checkpoint again")
    if file_digest(folder / TENSORS) != tensors:
        raise CheckpointError(
            f"{folder / TENSORS} is damaged: its sha256 differs from the one in {MANIFEST}; "
            "copy the checkpoint again"
        )
    return manifest


def load(
    factory: Callable[[], nn.Module],
    folder: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """Rebuild a saved model from the code that makes the dense one.

    Args:
        factory: returns the model as it was before pruning; called once. It may build on
            torch.device("meta"), which saves the time of an initialisation.
        folder: written by `save`.
        device: where the model goes.
    Returns:
        The model with packed and shrunk layers as saved, dtypes and the masks of layers that
        are not packed as saved; train mode as `factory` left it. A parameter is frozen if it was
        when saved, or if `factory` froze it.
    Raises:
        CheckpointError: a file is damaged, or the factory's model does not fit; no tensor was used.
    """
    from safetensors.torch import load_file

    if isinstance(factory, nn.Module):
        raise CheckpointError("factory must be a function that makes the dense model, got a model")
    manifest = read_manifest(folder)
    model = factory()
    model = rebuild(model, manifest["shrunk"], manifest["swapped"])
    tensors = load_file(Path(folder) / TENSORS, device=str(device))
    masks = {name: tensors.pop(name + MASK, None) for name in manifest.get("masks", ())}
    state = tensors | {alias: tensors[name] for alias, name in manifest["aliases"].items()}
    _check_state(model, state, folder)
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"{folder} does not fit the model: {error}") from error
    _tie(model, manifest["aliases"])
    _check_filled(model)
    _mask(model, masks, folder)
    frozen = set(manifest.get("frozen", ()))
    for name, parameter in _parameters(model):
        if name in frozen:
            parameter.requires_grad_(False)
    return model.to(device)


def _mask(model: nn.Module, masks: dict[str, Tensor | None], folder: Any) -> None:
    """Let layers carry their masks again.

    Raises:
        CheckpointError: bits are missing or do not fit the weight.
    """
    for name, bits in masks.items():
        weight = getattr(model.get_submodule(name), "weight", None)
        if (
            not isinstance(weight, Tensor)
            or bits is None
            or bits.shape != (-(-weight.numel() // 8),)
        ):
            raise CheckpointError(f"{folder} has no mask that fits {name}; save the model again")
        model.get_submodule(name).kept_weights = PackedMask(bits.cpu(), tuple(weight.shape))  # type: ignore[assignment]


def _check_filled(model: nn.Module) -> None:
    """Raise CheckpointError if `model` still holds a tensor without data."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise CheckpointError(
                f"{name} is not in the checkpoint (a non-persistent buffer) and on the meta device "
                "in the model; let the factory make it on a real device"
            )


def _check_state(model: nn.Module, state: dict[str, Tensor], folder: Any) -> None:
    """Raise CheckpointError unless names and shapes are those of the model."""
    wanted = {k: v.shape for k, v in model.state_dict().items() if isinstance(v, Tensor)}
    for name in wanted.keys() ^ state.keys():
        where = "the model only" if name in wanted else "the checkpoint only"
        raise CheckpointError(f"{name} is in {where}; {folder} was saved from another model")
    for name, shape in wanted.items():
        if state[name].shape != shape:
            raise CheckpointError(
                f"{name} is {list(shape)} in the model, {list(state[name].shape)} in the "
                "checkpoint; load it into the model it was saved from"
            )


def _tie(model: nn.Module, aliases: dict[str, str]) -> None:
    """Make the parameters and buffers that shared memory when saved one object again."""
    for alias, name in aliases.items():
        owner, _, key = name.rpartition(".")
        other, _, other_key = alias.rpartition(".")
        first, second = model.get_submodule(owner), model.get_submodule(other)
        stores: list[tuple[Any, Any]] = [
            (first._parameters, second._parameters),
            (first._buffers, second._buffers),
        ]
        for mine, theirs in stores:
            if key in mine and other_key in theirs:
                theirs[other_key] = mine[key]
