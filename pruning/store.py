"""store: decisions of a long plan on disk, so that a kill costs one group of layers at most.

One safetensors file per group, written beside and renamed, with the digest of everything that the
decision depends on. A plan that finds files of its own goes on behind them, with the same bytes as
without the interruption; files of another plan are refused.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from slimgemm.pruning.inputs import tensors_of
from slimgemm.pruning.layers import Layer, digest
from slimgemm.pruning.masks import PackedMask

MASK, WEIGHT = ":mask", ":weight"


def key_of(asked: Sequence[Any], layers: Sequence[Layer], batches: Sequence[Any]) -> str:
    """sha256 of what was asked (by repr), every dense weight and every calibration tensor."""
    found = hashlib.sha256(repr([str(item) for item in asked]).encode())
    for layer in layers:
        found.update(f"{layer.name} {digest(layer.weight)}".encode())
    for batch in batches:
        for tensor in tensors_of(batch):
            found.update(digest(tensor).encode())
    return found.hexdigest()


class Store:
    """Files of one plan in a folder.

    Args:
        folder: made if missing.
        key: from `key_of`.
    """

    def __init__(self, folder: str | os.PathLike[str], key: str) -> None:
        self.folder, self.key = Path(folder), key
        self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, place: int) -> Path:
        """File of the group at this place."""
        return self.folder / f"group-{place:04d}.safetensors"

    def load(
        self, place: int, layers: Sequence[Layer]
    ) -> dict[str, tuple[PackedMask, Tensor | None, tuple[str, ...]]] | None:
        """Layer name -> (mask, new weight or None, notes), or None where the file is missing.

        Raises:
            ValueError: the file is of another plan, or damaged.
        """
        from safetensors import SafetensorError, safe_open

        path = self.path(place)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads((file.metadata() or {})["about"])
                if about.get("key") != self.key:
                    raise ValueError(
                        f"{path} holds decisions of another plan (model, data or options differ); "
                        "give another folder, or empty this one"
                    )
                names = set(file.keys())
                notes = about["notes"]
                return {
                    layer.name: (
                        PackedMask(file.get_tensor(layer.name + MASK), tuple(layer.weight.shape)),
                        file.get_tensor(layer.name + WEIGHT)
                        if layer.name + WEIGHT in names
                        else None,
                        tuple(notes[layer.name]),
                    )
                    for layer in layers
                }
        except (SafetensorError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is damaged ({error}); delete it") from error

    def save(
        self,
        place: int,
        parts: Mapping[str, tuple[PackedMask, Tensor | None, tuple[str, ...]]],
    ) -> None:
        """Write a group's decisions, whole or not at all."""
        from safetensors.torch import save_file

        tensors = {}
        for name, (mask, weight, _) in parts.items():
            tensors[name + MASK] = mask.bits.contiguous()
            if weight is not None:
                tensors[name + WEIGHT] = weight.contiguous()
        about = {
            "key": self.key,
            "notes": {name: list(notes) for name, (_, _, notes) in parts.items()},
        }
        beside = self.path(place).with_suffix(f".{os.getpid()}.part")
        # One key: safetensors writes several in an order that differs from run to run.
        save_file(tensors, beside, metadata={"about": json.dumps(about)})
        os.replace(beside, self.path(place))
