"""sites: the Linear and Conv2d layers of a model as one forward meets them, at any width.

A site knows everything that decides how long its layer runs except its two widths, so the same
site can be asked for the layer before and after channels were cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slimgemm.pruning.cost import count_macs
from slimgemm.pruning.inputs import Inputs, evaluating, run, tensors_of
from slimgemm.pruning.layers import kind_of


@dataclass(frozen=True)
class Site:
    """One layer in one forward of the example inputs.

    Args:
        name, kind: dotted name; "linear" or "conv2d".
        weight: shape of the weight; its axes 0 and 1 are the two widths.
        dtype, device: of the weight.
        calls, macs: how often it ran, and multiply-accumulates over all calls.
        input: shape of the first call's input.
        input_bytes, output_bytes: of activations over all calls.
        conv: stride, padding, dilation and groups of a convolution; empty for a linear layer.
        bias, channels_last: whether it has a bias, and its input this memory format.
    """

    name: str
    kind: str
    weight: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    calls: int
    macs: int
    input: tuple[int, ...]
    input_bytes: int
    output_bytes: int
    conv: tuple[Any, ...] = ()
    bias: bool = True
    channels_last: bool = False

    @property
    def depthwise(self) -> bool:
        """Each input channel has filters of its own, so that groups follow the width."""
        return bool(self.conv) and self.conv[3] > 1 and self.weight[1] == 1

    @property
    def signature(self) -> str:
        """All that decides the time of a call but the widths; the key of a latency table."""
        dtype = str(self.dtype).removeprefix("torch.")
        tail = f"{dtype}{' bias' if self.bias else ''}"
        if self.kind == "linear":
            rows = int(torch.Size(self.input[:-1]).numel())
            return f"linear rows {rows} {tail}"
        stride, padding, dilation, groups = self.conv
        sizes = (self.input[0], *self.input[2:])
        kernel = "x".join(map(str, self.weight[2:]))
        each = f"depthwise x{self.weight[0] // groups}" if self.depthwise else f"groups {groups}"
        layout = " channels_last" if self.channels_last else ""
        return (
            f"conv2d {kernel} stride {stride} padding {padding} dilation {dilation} {each} "
            f"input {sizes} {tail}{layout}"
        )

    def make(self, out: int, into: int, seed: int = 0) -> tuple[nn.Module, Tensor]:
        """A layer of these widths (axes 0 and 1 of the weight) and an input, both random."""
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(self.device, self.dtype)

        module: nn.Linear | nn.Conv2d
        if self.kind == "linear":
            rows = int(torch.Size(self.input[:-1]).numel())
            module, x = nn.Linear(into, out, self.bias, self.device, self.dtype), random(rows, into)
        else:
            stride, padding, dilation, groups = self.conv
            if self.depthwise:
                groups = max(1, out // (self.weight[0] // groups))
            channels = into * groups
            kernel = (self.weight[2], self.weight[3])
            module = nn.Conv2d(
                channels, out, kernel, stride, padding, dilation, groups, self.bias,
                device=self.device, dtype=self.dtype,
            )  # fmt: skip
            x = random(self.input[0], channels, *self.input[2:])
            if self.channels_last:
                x = x.contiguous(memory_format=torch.channels_last)
                module.weight.data = module.weight.data.to(memory_format=torch.channels_last)
        with torch.no_grad():
            module.weight.copy_(random(*module.weight.shape))
        return module.eval().requires_grad_(False), x


def find_sites(model: nn.Module, example_inputs: Inputs) -> dict[str, Site]:
    """Name -> site of every Linear and Conv2d that runs on the example inputs, in order."""
    cost = count_macs(model, example_inputs)
    seen: dict[str, Tensor] = {}
    layers = {n: m for n, m in model.named_modules() if kind_of(m) is not None}
    handles = [m.register_forward_pre_hook(_note(n, seen)) for n, m in layers.items()]
    try:
        with evaluating(model), torch.no_grad():
            run(model, example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    sites = {}
    for name, used in cost.layers.items():
        module: Any = layers.get(name)
        x = seen.get(name)
        if module is None or x is None:
            continue
        conv = isinstance(module, nn.Conv2d)
        sites[name] = Site(
            name=name,
            kind="conv2d" if conv else "linear",
            weight=tuple(module.weight.shape),
            dtype=module.weight.dtype,
            device=module.weight.device,
            calls=used.calls,
            macs=used.macs,
            input=tuple(x.shape),
            input_bytes=used.input_bytes,
            output_bytes=used.output_bytes,
            conv=(module.stride, module.padding, module.dilation, module.groups) if conv else (),
            bias=module.bias is not None,
            channels_last=conv and _is_channels_last(x),
        )
    return sites


def _is_channels_last(x: Tensor) -> bool:
    return x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(
        memory_format=torch.channels_last
    )  # fmt: skip


def _note(name: str, seen: dict[str, Tensor]) -> Any:
    def hook(module: nn.Module, args: Any) -> None:
        found = tensors_of(args)
        if found:
            seen.setdefault(name, found[0].detach())

    return hook


def inputs_of(model: nn.Module, names: Mapping[str, Any], example_inputs: Inputs) -> dict[str, Any]:
    """Layer name -> the first input that it saw in one forward."""
    seen: dict[str, Tensor] = {}
    handles = [model.get_submodule(n).register_forward_pre_hook(_note(n, seen)) for n in names]
    try:
        with evaluating(model), torch.no_grad():
            run(model, example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    return seen
