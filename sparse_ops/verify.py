"""verify: is the packed model the pruned one? Every group of every weight, and every output."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from slimgemm.kernels.formats import ChannelIndex, check
from slimgemm.kernels.reference import allowed_error, output_error
from slimgemm.sparse_ops.report import as_table
from slimgemm.sparse_ops.swap import call, evaluating


@dataclass(frozen=True)
class Check:
    """One thing that was compared. `groups` counts the groups of the pattern that were read."""

    name: str
    what: str
    ok: bool
    detail: str
    groups: int = 0


@dataclass(frozen=True)
class VerifyReport:
    """All checks; true when there are some and every one holds."""

    checks: list[Check] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return bool(self.checks) and all(check.ok for check in self.checks)

    @property
    def violations(self) -> list[Check]:
        return [check for check in self.checks if not check.ok]

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        rows = [[c.name, c.what, "ok" if c.ok else "WRONG", c.detail] for c in self.checks]
        return as_table("verify", ["where", "what", "result", "detail"], rows)


def verify(model: nn.Module, reference: nn.Module, example_inputs: Any = None) -> VerifyReport:
    """Compare a packed or shrunk model with the dense model it was made from.

    Args:
        model: holds packed modules, shrunk layers, or both.
        reference: the pruned dense model with the same layer names, or the one whose channels
            were dropped; same dtype and device.
        example_inputs: as for compress; outputs are compared when given.
    Returns:
        A report: metadata of every packed weight is valid, no layer is missing, every parameter
        and buffer equals the reference's exactly, and every output is within the tolerance rule (at
        most twice the error that the reference makes in its dtype, against float64). Never raises
        for a difference.
    """
    checks = [*_weights(model, reference)]
    if example_inputs is not None:
        checks += _outputs(model, reference, example_inputs)
    return VerifyReport(checks)


def _weights(model: nn.Module, reference: nn.Module) -> Iterator[Check]:
    theirs = dict(reference.named_modules(remove_duplicate=False))
    mine = {name for name, _ in model.named_modules(remove_duplicate=False)}
    for name, module in theirs.items():
        if name not in mine and _held(module):
            yield Check(name, "layer", False, "the model has no layer of this name")
    for name, module in model.named_modules():
        if not _held(module):
            continue
        if name not in theirs:
            yield Check(name, "layer", False, "the reference has no layer of this name")
            continue
        packed = getattr(module, "packed", None)
        groups = 0
        if packed is not None:
            groups = packed.values.numel() // packed.keep
            try:
                check(packed)
            except ValueError as error:
                yield Check(name, "metadata", False, str(error), groups)
                continue
        dense = module.to_dense() if hasattr(module, "to_dense") else module
        yield from _parameters(name, dense, theirs[name], groups)


def _held(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of `module` itself, by name."""
    both = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    return dict(both)


def _parameters(name: str, dense: nn.Module, reference: nn.Module, groups: int) -> Iterator[Check]:
    wanted, held = _held(reference), _held(dense)
    for key in wanted.keys() - held.keys():
        yield Check(name, key, False, f"the model has no {key}")
    for key, value in held.items():
        what = f"{key} {list(value.shape)}"
        if key not in wanted:
            yield Check(name, what, False, f"the reference has no {key}")
            continue
        other = _kept(wanted[key].detach(), value.shape, dense, key)
        if other.shape != value.shape:
            yield Check(name, what, False, f"the reference has {list(other.shape)}")
            continue
        wrong = int((value.detach() != other.to(value.device)).sum())
        detail = f"{wrong} of {value.numel()} differ" if wrong else f"equal, {groups} groups read"
        yield Check(name, what, wrong == 0, detail, groups)


def _kept(tensor: Tensor, shape: torch.Size, module: nn.Module, name: str) -> Tensor:
    """`tensor` at the kept channels of a shrunk module, or as it is."""
    along = [(axis, getattr(module, key, None)) for axis, key in enumerate(("kept_out", "kept_in"))]
    along += [getattr(module, "kept_parameters", {}).get(name, (0, None))]
    for axis, index in along:
        if axis >= tensor.ndim or not isinstance(index, ChannelIndex):
            continue
        if tensor.shape[axis] == index.width and shape[axis] == index.kept:
            tensor = tensor.index_select(axis, index.index.to(tensor.device))
    return tensor


def tensors_in(value: Any) -> list[Tensor]:
    """Every floating tensor in a nest of tuples, lists, dicts and their subclasses."""
    leaves, _ = torch.utils._pytree.tree_flatten(value)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _outputs(model: nn.Module, reference: nn.Module, example_inputs: Any) -> Iterator[Check]:
    exact_model = copy.deepcopy(reference).double()
    exact_inputs = torch.utils._pytree.tree_map(
        lambda v: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v,
        example_inputs,
    )
    with evaluating(model), evaluating(reference), evaluating(exact_model):
        got = tensors_in(call(model, example_inputs))
        dense = tensors_in(call(reference, example_inputs))
        try:
            exact = tensors_in(call(exact_model, exact_inputs))
        except RuntimeError as error:
            why = f"not compared: the reference does not run in float64 ({error})"
            yield Check("", "outputs", False, why)
            return
    if not got or len(got) != len(dense):
        yield Check("", "outputs", False, f"{len(got)} tensors, the reference gives {len(dense)}")
    for i, (mine, theirs, truth) in enumerate(zip(got, dense, exact, strict=False)):
        what = f"output {i} {list(mine.shape)}"
        if mine.shape != theirs.shape:
            yield Check("", what, False, f"the reference gives {list(theirs.shape)}")
            continue
        found, allowed = output_error(mine, truth), allowed_error(theirs, truth)
        # `not <=` so that NaN is a violation.
        yield Check("", what, found <= allowed, f"error {found:.1e}, allowed {allowed:.1e}")
