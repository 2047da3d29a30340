"""calibrate: sums over calibration inputs, layer by layer, with bounded memory.

Layers are visited in groups: all layers of one block (the module named up to the first number, as
`encoder.layer.3`), or one layer where there are no blocks. A group's statistics live only while
the group is decided. Where blocks form a plain chain (each block's first argument is the output of
the one before, everything else is the same object) only their inputs are kept, on the CPU, and
each block runs alone; otherwise the model runs up to the group, once per group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from slimgemm.pruning.inputs import Inputs, evaluating, run, to_device
from slimgemm.pruning.layers import Layer
from slimgemm.pruning.processes import check_batches, in_processes, lacking, summed


def column_inputs(module: nn.Module, x: Tensor) -> Tensor:
    """What each weight column multiplies: float64 [groups, rows, columns].

    Columns are those of `patterns.rows_of`: (tap, input channel) of one convolution group.
    """
    if isinstance(module, nn.Conv2d):
        if module.padding_mode != "zeros" or isinstance(module.padding, str):
            x = nn.functional.pad(
                x,
                module._reversed_padding_repeated_twice,
                mode="constant" if module.padding_mode == "zeros" else module.padding_mode,
            )
            padding: tuple[int, ...] = (0, 0)
        else:
            padding = module.padding
        size = module.kernel_size
        cols = nn.functional.unfold(x, size, module.dilation, padding, module.stride)
        taps = size[0] * size[1]
        cols = cols.view(x.shape[0], module.groups, -1, taps, cols.shape[-1])
        return cols.permute(1, 0, 4, 3, 2).flatten(3).flatten(1, 2).double()
    return x.reshape(1, -1, x.shape[-1]).double()


class Statistic:
    """A sum over the calibration inputs of one layer."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.total: Tensor | None = None
        self.rows = 0

    def part(self, x: Tensor) -> tuple[Tensor, int]:
        """The summand of one input, and how many rows it stands for."""
        raise NotImplementedError

    def add(self, x: Tensor) -> None:
        """Add one input of the layer."""
        part, rows = self.part(x.detach())
        self.total = part if self.total is None else self.total.add_(part)
        self.rows += rows

    def share(self) -> None:
        """Add up over all processes of torch.distributed, each of which has seen an input."""
        if not in_processes():
            return
        assert self.total is not None
        torch.distributed.all_reduce(self.total)
        self.rows = summed(self.rows, self.total.device)

    def result(self) -> Tensor:
        """The mean over all rows."""
        assert self.total is not None
        return self.total / self.rows


class ColumnSquares(Statistic):
    """float64 [groups, columns]: mean square of what each weight column multiplies."""

    def part(self, x: Tensor) -> tuple[Tensor, int]:
        """Sum of squares over the rows."""
        columns = column_inputs(self.module, x)
        return columns.square().sum(1), columns.shape[1]


class Gram(Statistic):
    """float64 [groups, columns, columns]: mean of x xT, half the Hessian of the squared error."""

    def part(self, x: Tensor) -> tuple[Tensor, int]:
        """Sum of outer products over the rows."""
        columns = column_inputs(self.module, x)
        return columns.mT @ columns, columns.shape[1]


class NonZero(Statistic):
    """float64 [in channels]: share of an input channel's values that are not zero."""

    def part(self, x: Tensor) -> tuple[Tensor, int]:
        """Count of values that are not zero."""
        dim = 1 if isinstance(self.module, nn.Conv2d) else x.ndim - 1
        other = [d for d in range(x.ndim) if d != dim]
        return (x != 0).double().sum(dim=other), x.numel() // x.shape[dim]


class _Done(Exception):
    """All layers of the group have run; the rest of the forward is not needed."""


@dataclass
class Group:
    """Layers that are decided together, and the block that holds them (or None)."""

    layers: list[Layer]
    block: str | None


def groups_of(model: nn.Module, layers: Sequence[Layer]) -> list[Group]:
    """Layers, in order of execution, by the block that holds them."""

    def block(layer: Layer) -> str | None:
        parts = layer.name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if number is None or number == len(parts) - 1:
            return None
        return ".".join(parts[: number + 1])

    groups = []
    for name, members in groupby(layers, key=block):
        listed = list(members)
        if name is None:
            groups += [Group([layer], None) for layer in listed]
        else:
            groups.append(Group(listed, name))
    return groups


Batch = tuple[tuple[Any, ...], dict[str, Any]]


class Calibration:
    """Runs batches through a model, group by group.

    Args:
        model: runs in evaluation mode, without gradients.
        batches: model inputs; kept, so that groups can be visited one after the other.
        device: where batches go.
    """

    wait: ClassVar[str] = "cpu"  # where inputs of the next block wait

    def __init__(self, model: nn.Module, batches: Sequence[Inputs]) -> None:
        self.model = model
        self.batches = batches
        self.device = next(model.parameters()).device
        check_batches(batches, "model inputs", self.device)
        self._block: str | None = None
        self._inputs: list[Batch] = []

    def gather(
        self, group: Group, make: Callable[[nn.Module], Statistic], calls: dict[str, int]
    ) -> dict[str, Tensor]:
        """Layer name -> statistic over all batches.

        Args:
            group: layers to observe.
            make: statistic of a module.
            calls: how often each layer runs in one forward.

        Raises:
            ValueError: a layer did not run, in one process at least, or its inputs hold NaN or
                infinity.
        """
        statistics = {layer.name: make(layer.module) for layer in group.layers}
        observed = self._observed(group, statistics, calls)
        with observed as seen, evaluating(self.model), torch.no_grad():
            for forward in self._forwards(group):
                seen.clear()
                try:
                    forward()
                except _Done:
                    continue
        found = {}
        for name, statistic in statistics.items():
            missing = lacking(statistic.total is not None, self.device)
            if missing:
                where = f" of processes {missing}" * in_processes()
                raise ValueError(
                    f"{name} did not run on the calibration data{where}; ignore the layer, or give "
                    "batches that reach it"
                )
            statistic.share()
            assert statistic.total is not None
            if not bool(torch.isfinite(statistic.total).all()):
                raise ValueError(
                    f"{name}: calibration inputs of this layer hold NaN or infinity; look at the "
                    "data, or run the model in float32"
                )
            found[name] = statistic.result()
        return found

    @contextmanager
    def _observed(
        self, group: Group, statistics: dict[str, Statistic], calls: dict[str, int]
    ) -> Iterator[dict[str, int]]:
        seen: dict[str, int] = {}

        def hook(name: str) -> Callable[..., None]:
            def observe(module: nn.Module, args: Any, kwargs: Any) -> None:
                x = args[0] if args else kwargs["input"]
                statistics[name].add(x)
                seen[name] = seen.get(name, 0) + 1
                if all(seen.get(n, 0) >= calls.get(n, 1) for n in statistics):
                    raise _Done

            return observe

        handles = [
            layer.module.register_forward_pre_hook(hook(layer.name), with_kwargs=True)
            for layer in group.layers
        ]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    def _forwards(self, group: Group) -> Iterator[Callable[[], Any]]:
        """Calls that run the group's layers: its block on kept inputs, or the whole model."""
        if group.block is not None and group.block == self._block:
            block = self.model.get_submodule(group.block)
            for args, kwargs in self._inputs:
                moved_args, moved_kwargs = to_device((args, kwargs), self.device)
                yield partial(block, *moved_args, **moved_kwargs)
            return
        for batch in self.batches:
            yield partial(run, self.model, to_device(batch, self.device))

    def advance(self, blocks: Sequence[str], block: str) -> None:
        """After a block is decided: keep the inputs of the next one, where blocks form a chain."""
        place = blocks.index(block)
        if place + 1 >= len(blocks) or not self._chained(block, blocks[place + 1]):
            self._block, self._inputs = None, []
            return
        if self._block != block:
            self._inputs = [self._first_inputs(block, batch) for batch in self.batches]
        module = self.model.get_submodule(block)
        moved = []
        with evaluating(self.model), torch.no_grad():
            for args, kwargs in self._inputs:
                on_device = to_device((args, kwargs), self.device)
                out = module(*on_device[0], **on_device[1])
                hidden = out[0] if isinstance(out, (tuple, list)) else out
                moved.append(((hidden.to(self.wait), *args[1:]), kwargs))
        self._block, self._inputs = blocks[place + 1], moved

    def _first_inputs(self, block: str, batch: Inputs) -> Batch:
        caught: list[Batch] = []

        def catch(module: nn.Module, args: Any, kwargs: Any) -> None:
            caught.append((args, kwargs))
            raise _Done

        module = self.model.get_submodule(block)
        handle = module.register_forward_pre_hook(catch, with_kwargs=True)
        try:
            with evaluating(self.model), torch.no_grad():
                run(self.model, to_device(batch, self.device))
        except _Done:
            pass
        finally:
            handle.remove()
        args, kwargs = caught[0]
        return to_device(args, torch.device(self.wait)), to_device(kwargs, torch.device(self.wait))

    def _chained(self, first: str, second: str) -> bool:
        """True if `second` runs once, on the output of `first` and otherwise its very arguments."""
        seen: dict[str, list[tuple[Any, Any, Any]]] = {first: [], second: []}

        def record(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
                seen[name].append((args, kwargs, out))

            return hook

        handles = [
            self.model.get_submodule(name).register_forward_hook(record(name), with_kwargs=True)
            for name in seen
        ]
        try:
            with evaluating(self.model), torch.no_grad():
                run(self.model, to_device(self.batches[0], self.device))
        finally:
            for handle in handles:
                handle.remove()
        if len(seen[first]) != 1 or len(seen[second]) != 1:
            return False
        (args, kwargs, out), (next_args, next_kwargs, _) = seen[first][0], seen[second][0]
        hidden = out[0] if isinstance(out, (tuple, list)) else out
        return (
            len(args) == len(next_args) >= 1
            and next_args[0] is hidden
            and all(a is b for a, b in zip(args[1:], next_args[1:], strict=True))
            and kwargs.keys() == next_kwargs.keys()
            and all(kwargs[k] is next_kwargs[k] for k in kwargs)
        )
