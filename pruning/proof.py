"""proof: channels are cut, and it is shown that nothing else changed, or everything is put back.

The smaller model runs, and its outputs must equal those of the dense model in which the layers that
read dropped channels have zeros in their place, and in which normalisations over channels take
their moments over those that stay (see pruning.coupling for this definition). Both run as
pruning.lively makes them, so that nothing is silent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from slimgemm.pruning.channels import Surgery, tensor_named
from slimgemm.pruning.inputs import Inputs, evaluating, run, tensors_of
from slimgemm.pruning.layers import digest
from slimgemm.pruning.lively import lively
from slimgemm.pruning.shrink import Undo, shrink

# Largest difference between the two models, relative to the largest output: summing fewer terms
# in another order moves the last bits, a wrong cut moves the first.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}
MASK = 1e4  # an element that is equal and larger by this factor was written, not computed


def apply_surgery(model: nn.Module, surgery: Surgery) -> None:
    """Cut the model in place, after a proof.

    Raises:
        ValueError: a tensor changed since the plan, or the outputs of the smaller model are not
            those of the dense one with zeros; the model is unchanged then.
    """
    for name, known in surgery.digests.items():
        if digest(tensor_named(model, name)) != known:
            raise ValueError(f"{name} changed after the plan was made; make a new plan")
    with lively(model, surgery.example_inputs) as inputs:
        failure = _refuted(model, surgery, inputs)
    if failure is not None:
        cut_layers = ", ".join(surgery.kept_out)
        raise ValueError(
            f"channels of {cut_layers} could not be cut: the smaller model is not the dense one "
            f"with zeros, {failure}. A width written as a number in forward (view, reshape, scale) "
            "does this: read it from the tensor, or ignore these layers. Attention loses whole "
            "heads: in its views their number is -1, their size a number. The model is unchanged"
        )
    undo = Undo(model, surgery)
    try:
        shrink(model, surgery)
    except BaseException:
        undo.restore()
        raise


def _refuted(model: nn.Module, surgery: Surgery, inputs: Inputs) -> str | None:
    """Why the smaller model is not the dense one with zeros, or None; the model stays as it is."""
    want = _zeroed_outputs(model, surgery, inputs)
    undo = Undo(model, surgery)
    try:
        shrink(model, surgery)
        with evaluating(model), torch.no_grad():
            return difference(tensors_of(run(model, inputs)), want)
    except (RuntimeError, ValueError, IndexError, AssertionError, TypeError) as error:
        first = (str(error).strip().splitlines() or [""])[0]
        return f"its forward failed: {type(error).__name__}: {first}"
    finally:
        undo.restore()


def difference(got: Sequence[Tensor], want: Sequence[Tensor]) -> str | None:
    """What differs between two lists of outputs, or None: numbers beyond TOLERANCE, others at all.

    Equal elements that dwarf those that differ (the numbers of a mask) do not count as the size of
    an output.
    """
    if not want:
        return "there is no output to compare"
    for place, (a, b) in enumerate(zip(got, want, strict=True)):
        if a.shape != b.shape:
            return f"output {place} is {list(a.shape)} instead of {list(b.shape)}"
        other = a != b
        if not bool(other.any()):
            continue
        if not (b.is_floating_point() or b.is_complex()):
            return f"output {place} differs in {int(other.sum())} of {b.numel()} elements"
        wide = torch.complex128 if b.is_complex() else torch.float64
        worst = float((a - b)[other].to(wide).abs().max())
        if not math.isfinite(worst):
            return f"output {place} differs by {worst}"
        size = b.to(wide).abs()
        allowed = TOLERANCE[b.real.dtype] * float(size[size <= MASK * size[other].max()].max())
        if worst > allowed:
            return f"output {place} differs by {worst:.3g}, allowed are {allowed:.3g}"
    return None


def _zeroed_outputs(model: nn.Module, surgery: Surgery, inputs: Inputs) -> list[Tensor]:
    """Outputs of the dense model whose readers have zeros for the dropped channels.

    Its norms take their moments over the channels that stay.
    """
    saved = {name: tensor_named(model, name).data for name in surgery.readers}
    try:
        for name, columns in surgery.readers.items():
            weight = surgery.weights.get(name, saved[name]).to(saved[name], copy=True)
            weight[:, columns.to(weight.device)] = 0
            tensor_named(model, name).data = weight
        with evaluating(model), torch.no_grad(), _moments_over(model, surgery.norms):
            return [t.clone() for t in tensors_of(run(model, inputs))]
    finally:
        for name, data in saved.items():
            tensor_named(model, name).data = data


@contextmanager
def _moments_over(model: nn.Module, norms: Mapping[str, Tensor]) -> Iterator[None]:
    """The norms named take their moments over these positions of their input."""
    modules = {model.get_submodule(name): kept for name, kept in norms.items()}
    before = {module: module.__dict__.get("forward") for module in modules}
    try:
        for module, kept in modules.items():
            module.__dict__["forward"] = _inside(_Moments(kept), module.forward)
        yield
    finally:
        for module, forward in before.items():
            module.__dict__.pop("forward", None)
            if forward is not None:
                module.__dict__["forward"] = forward


def _inside(mode: TorchFunctionMode, forward: Callable[..., Any]) -> Callable[..., Any]:
    def inside(*args: Any, **kwargs: Any) -> Any:
        with mode:
            return forward(*args, **kwargs)

    return inside


class _Moments(TorchFunctionMode):
    """Normalises the kept channels alone; the others are zero, and no reader looks at them."""

    def __init__(self, kept: Tensor) -> None:
        super().__init__()
        self.kept = kept

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name not in ("layer_norm", "rms_norm", "group_norm", "mean"):
            return func(*args, **(kwargs or {}))
        x, dim = args[0], 1 if name == "group_norm" else -1
        if name == "mean" and _over(args, kwargs or {}) not in (-1, x.ndim - 1):
            return func(*args, **(kwargs or {}))  # over tokens, say
        kept, width = self.kept.to(x.device), x.shape[dim]
        small = x.index_select(dim, kept)
        if name == "mean":  # of squares, in a module that computes RMSNorm
            return func(small, *args[1:], **(kwargs or {}))

        def cut(value: Any) -> Any:
            vector = isinstance(value, Tensor) and value.shape == (width,)
            return value.index_select(0, kept) if vector else value

        sizes = args[1] if name == "group_norm" else [kept.numel()]
        named = {key: cut(value) for key, value in (kwargs or {}).items()}
        found = func(small, sizes, *(cut(value) for value in args[2:]), **named)
        return torch.zeros_like(x).index_copy(dim, kept, found)


def _over(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The dimension of a mean, if it is one."""
    over = args[1] if len(args) > 1 else kwargs.get("dim")
    return over[0] if isinstance(over, (tuple, list)) and len(over) == 1 else over
