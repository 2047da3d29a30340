"""proof: channels are cut, and it is shown that nothing else changed, or everything is put back.

The smaller model runs, and its outputs must equal those of the dense model in which the layers that
read dropped channels have zeros in their place, and in which normalisations over channels take
their moments over those that stay (see pruning.coupling for this definition).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from slimgemm.pruning.channels import Surgery, tensor_named
from slimgemm.pruning.inputs import Inputs, evaluating, run, tensors_of
from slimgemm.pruning.layers import digest
from slimgemm.pruning.shrink import Undo, shrink

# Largest difference between the two models, relative to the largest output: summing fewer terms
# in another order moves the last bits, a wrong cut moves the first.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}


def apply_surgery(model: nn.Module, surgery: Surgery) -> None:
    """Cut the model in place; put everything back if the proof fails.

    Raises:
        ValueError: a tensor changed since the plan, or the outputs of the smaller model are not
            those of the dense one with zeros; the model is unchanged then.
    """
    for name, known in surgery.digests.items():
        if digest(tensor_named(model, name)) != known:
            raise ValueError(f"{name} changed after the plan was made; make a new plan")
    inputs = lively(surgery.example_inputs)
    want = _zeroed_outputs(model, surgery, inputs)
    undo = Undo(model, surgery)
    failure: str | None
    try:
        shrink(model, surgery)
        with evaluating(model), torch.no_grad():
            failure = difference(tensors_of(run(model, inputs)), want)
    except (RuntimeError, ValueError, IndexError, AssertionError, TypeError) as error:
        first = (str(error).strip().splitlines() or [""])[0]
        failure = f"its forward failed: {type(error).__name__}: {first}"
    except BaseException:
        undo.restore()
        raise
    if failure is not None:
        undo.restore()
        cut_layers = ", ".join(surgery.kept_out)
        raise ValueError(
            f"channels of {cut_layers} could not be cut: the smaller model is not the dense one "
            f"with zeros, {failure}. A width written as a number in forward (view, reshape, scale) "
            "does this: read it from the tensor, or ignore these layers. The model is unchanged"
        )


def lively(inputs: Inputs) -> Inputs:
    """Example inputs for a proof: constant floating tensors, which prove little, become random."""

    def swap(value: object) -> object:
        if isinstance(value, Tensor):
            if not value.is_floating_point() or bool((value != value.flatten()[:1]).any()):
                return value
            generator = torch.Generator().manual_seed(0)
            return torch.randn(value.shape, generator=generator).to(value)
        if isinstance(value, Mapping):
            return {key: swap(item) for key, item in value.items()}
        return tuple(swap(item) for item in value) if isinstance(value, (tuple, list)) else value

    return swap(inputs)  # type: ignore[return-value]


def difference(got: Sequence[Tensor], want: Sequence[Tensor]) -> str | None:
    """What differs between two lists of outputs beyond TOLERANCE, or None."""
    for place, (a, b) in enumerate(zip(got, want, strict=True)):
        if a.shape != b.shape:
            return f"output {place} is {list(a.shape)} instead of {list(b.shape)}"
        if not a.is_floating_point():
            continue
        worst = float((a.double() - b.double()).abs().max()) if a.numel() else 0.0
        allowed = TOLERANCE[b.dtype] * max(
            float(b.double().abs().max()) if b.numel() else 0.0, 1e-30
        )
        if not worst <= allowed:  # also catches NaN
            return f"output {place} differs by {worst:.3g}, allowed are {allowed:.3g}"
    return None


def _zeroed_outputs(model: nn.Module, surgery: Surgery, inputs: Inputs) -> list[Tensor]:
    """Outputs of the dense model whose readers have zeros for the dropped channels.

    Its norms take their moments over the channels that stay.
    """
    saved = {name: tensor_named(model, name).data for name in surgery.readers}
    try:
        for name, columns in surgery.readers.items():
            weight = surgery.weights.get(name, saved[name]).clone().to(saved[name].device)
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
