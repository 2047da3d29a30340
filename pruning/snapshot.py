"""snapshot: a model in the middle of a search, on disk: what was cut of the dense one, and weights.

One safetensors file, written beside and renamed. It loads into a copy of the dense model only.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from slimgemm.pruning.channels import Surgery
from slimgemm.pruning.masks import load_masks, masks_state
from slimgemm.pruning.shrink import shrink
from slimgemm.pruning.space import Allocation

Cut = Mapping[tuple[str, int], Tensor]


@dataclass(frozen=True)
class Snapshot:
    """A pruned model.

    Args:
        model: cut, masked, and perhaps fine-tuned.
        surgery: all that was cut from the dense model, or None.
        allocation: relative to the groups of the dense model.
        value: its metric.
        trained: steps of fine-tuning since it was dense.
    """

    model: nn.Module
    surgery: Surgery | None
    allocation: Allocation
    value: float
    trained: int = 0


def compose(first: Surgery | None, second: Surgery | None) -> Surgery | None:
    """One surgery on the dense model that does what two did in turn; without their proofs."""
    if first is None or second is None:
        return second if first is None else first

    def joined(a: Mapping, b: Mapping) -> dict:
        both = {key: a[key][b[key]] for key in a.keys() & b.keys()}
        return {**a, **b, **both}

    return Surgery(
        joined(first.slices, second.slices),
        joined(first.kept_in, second.kept_in),
        joined(first.kept_out, second.kept_out),
        {}, {}, second.example_inputs,
    )  # fmt: skip


def save_snapshot(path: Path, snapshot: Snapshot) -> None:
    """Write one, whole or not at all."""
    from safetensors.torch import save_file

    tensors = {f"state:{k}": v.detach() for k, v in snapshot.model.state_dict().items()}
    tensors |= {f"mask:{k}": v for k, v in masks_state(snapshot.model).items()}
    surgery = snapshot.surgery
    if surgery is not None:
        tensors |= {f"slice:{axis}:{name}": v for (name, axis), v in surgery.slices.items()}
        tensors |= {f"kept_in:{name}": v for name, v in surgery.kept_in.items()}
        tensors |= {f"kept_out:{name}": v for name, v in surgery.kept_out.items()}
    about = {
        "allocation": snapshot.allocation.key,
        "value": snapshot.value,
        "trained": snapshot.trained,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(f".{os.getpid()}.part")
    # One key: safetensors writes several in an order that differs from run to run.
    one = {"about": json.dumps(about)}
    save_file({k: v.contiguous().cpu().clone() for k, v in tensors.items()}, beside, metadata=one)
    os.replace(beside, path)


def load_snapshot(path: Path, dense: nn.Module) -> Snapshot:
    """Read one into a copy of the dense model.

    Raises:
        ValueError: the file is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["about"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        allocation = Allocation.from_dict(json.loads(about["allocation"]))
        value, trained = float(about["value"]), int(about["trained"])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete the folder to begin anew") from error

    def part(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    slices = {}
    for key, kept in part("slice:").items():
        axis, _, name = key.partition(":")
        slices[name, int(axis)] = kept
    model, surgery = copy.deepcopy(dense), None
    if slices:
        inputs = torch.empty(0)  # the proof was run when it was cut
        surgery = Surgery(slices, part("kept_in:"), part("kept_out:"), {}, {}, inputs)
        shrink(model, surgery)
    model.load_state_dict(part("state:"))
    load_masks(model, part("mask:"))
    return Snapshot(model, surgery, allocation, value, trained)
