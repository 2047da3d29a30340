"""Cost: multiply-accumulates, parameters, and bytes on disk and moved.

One MAC is one multiply and one add. Two conventions are counted, because published numbers use
both: `macs` has convolutions and linear layers only; `macs_with_norm` adds one per output element
of batch, layer and group normalisation and of average pooling and means (the torchprofile way).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from slimgemm.pruning.energy import ENERGY, HOROWITZ45, EnergyTable
from slimgemm.pruning.inputs import Inputs, evaluating, run, tensors_of

NORMS_AND_MEANS = (
    "native_batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
    "cudnn_batch_norm",
    "miopen_batch_norm",
    "_batch_norm_impl_index",
    "native_layer_norm",
    "_fused_rms_norm",
    "native_group_norm",
    "mean",
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "_adaptive_avg_pool2d",
    "_adaptive_avg_pool3d",
)
__all__ = ["ENERGY", "HOROWITZ45", "Cost", "EnergyTable", "LayerCost", "count_macs"]

PRODUCTS = ("mm", "addmm", "convolution", "_convolution", "addmv", "mv")
ATTENTION = ("bmm", "baddbmm")


@dataclass(frozen=True)
class LayerCost:
    """Cost of one layer in one forward of the example inputs.

    Args:
        macs: multiply-accumulates, dense.
        calls: how often the layer ran.
        weight_bytes: bytes of weight and bias.
        input_bytes, output_bytes: bytes of activations over all calls.
    """

    macs: int
    calls: int
    weight_bytes: int
    input_bytes: int
    output_bytes: int


@dataclass(frozen=True)
class Cost:
    """Cost of a model in one forward of the example inputs (the whole batch).

    Args:
        macs: convolutions and linear layers.
        macs_with_norm: `macs`, and one per output of normalisations, means and average pools.
        macs_attention: batched products of two activations; in neither of the above.
        params: parameters, shared ones once; buffers are not counted.
        bytes: bytes of parameters and buffers, shared ones once.
        layers: Linear and convolution modules by name, in the order in which they first ran.
    """

    macs: int
    macs_with_norm: int
    macs_attention: int
    params: int
    bytes: int
    layers: Mapping[str, LayerCost]

    @property
    def moved_bytes(self) -> int:
        """Bytes per forward: weights once, inputs and outputs of Linear and convolution layers."""
        return sum(
            layer.weight_bytes + layer.input_bytes + layer.output_bytes
            for layer in self.layers.values()
        )

    def __str__(self) -> str:
        """Every figure with its unit, MACs in both conventions."""
        lines = [
            f"{self.macs:,} MACs in convolutions and linear layers",
            f"{self.macs_with_norm:,} MACs with outputs of normalisations, means and average pools",
            f"{self.macs_attention:,} MACs in products of two activations, in neither of these",
            f"{self.params:,} parameters, {self.bytes:,} bytes with buffers",
            f"{self.moved_bytes:,} bytes moved per forward by convolutions and linear layers",
        ]
        return "\n".join(lines)


class _Counter(TorchDispatchMode):
    """Counts products by the layer that runs, and outputs of normalisations."""

    def __init__(self) -> None:
        super().__init__()
        self.inside: list[str] = []
        self.by_layer: dict[str, int] = {}
        self.total = self.norm = self.attention = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if name in PRODUCTS:
            macs = _product_macs(name, args, out)
            self.total += macs
            if self.inside:
                self.by_layer[self.inside[-1]] = self.by_layer.get(self.inside[-1], 0) + macs
        elif name in ATTENTION or "scaled_dot_product" in name:
            self.attention += _attention_macs(name, args)
        elif name in NORMS_AND_MEANS:
            self.norm += (out if isinstance(out, Tensor) else out[0]).numel()
        return out


def _product_macs(name: str, args: Any, out: Tensor) -> int:
    if "convolution" in name:
        weight, transposed = args[1], args[6]
        per_output = weight[0].numel()
        return args[0].numel() * per_output if transposed else out.numel() * per_output
    left = args[1] if name in ("addmm", "addmv") else args[0]
    return out.numel() * left.shape[-1]


def _attention_macs(name: str, args: Any) -> int:
    if name in ATTENTION:
        left, right = args[-2:] if name == "bmm" else args[1:3]
        return left.numel() * right.shape[-1]
    query, key, value = args[:3]
    return query.numel() * key.shape[-2] + query[..., 0].numel() * key.shape[-2] * value.shape[-1]


class _LayerHooks:
    """Tells a counter which layer runs, and adds up activation bytes."""

    def __init__(self, model: nn.Module, counter: _Counter) -> None:
        self.counter = counter
        self.traffic: dict[str, list[int]] = {}
        self.handles: list[RemovableHandle] = []
        for name, module in model.named_modules():
            if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
                self.handles.append(module.register_forward_pre_hook(self._enter(name)))
                self.handles.append(module.register_forward_hook(self._leave(name)))

    def _enter(self, name: str) -> Any:
        return lambda module, args: self.counter.inside.append(name)

    def _leave(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self.counter.inside.pop()
            sizes = self.traffic.setdefault(name, [0, 0, 0])
            sizes[0] += 1
            sizes[1] += sum(t.nbytes for t in tensors_of(args))
            sizes[2] += sum(t.nbytes for t in tensors_of(output))

        return hook

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()


def count_macs(model: nn.Module, example_inputs: Inputs) -> Cost:
    """Run one forward in evaluation mode and count.

    Args:
        model: any module; its training flags and buffers are as before afterwards.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments.

    Returns:
        Cost of the whole batch, dense: zeros in a weight are counted.
    """
    counter = _Counter()
    hooks = _LayerHooks(model, counter)
    try:
        with evaluating(model), torch.no_grad(), counter:
            run(model, example_inputs)
    finally:
        hooks.close()
    modules = dict(model.named_modules())
    layers = {
        name: LayerCost(
            macs=counter.by_layer.get(name, 0),
            calls=calls,
            weight_bytes=sum(p.nbytes for p in modules[name].parameters(recurse=False)),
            input_bytes=read,
            output_bytes=written,
        )
        for name, (calls, read, written) in hooks.traffic.items()
    }
    tensors = [*model.parameters(), *model.buffers()]
    return Cost(
        macs=counter.total,
        macs_with_norm=counter.total + counter.norm,
        macs_attention=counter.attention,
        params=sum(p.numel() for p in model.parameters()),
        bytes=sum(t.nbytes for t in tensors),
        layers=MappingProxyType(layers),
    )
