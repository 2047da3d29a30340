"""trace: from a model to its coupled channels, by way of torch.export."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from slimgemm.pruning.coupling import OUTPUT, Coupling, Pinned, Rule, Tracer, Tracked
from slimgemm.pruning.flow import follow
from slimgemm.pruning.inputs import Inputs, arguments, evaluating


def trace(
    model: nn.Module,
    example_inputs: Inputs,
    pinned: Pinned,
    rules: Mapping[str, Rule] | None = None,
    free_outputs: bool = False,
) -> Coupling:
    """Trace a model and follow its channels.

    Args:
        model: traced in evaluation mode with torch.export; it is left as it was.
        example_inputs: as for `plan`.
        pinned: (dotted name of a parameter or buffer, whether it is used as an activation and no
            layer's weight) -> why its channels must stay, or None.
        rules: operation -> what it does to ids, where that is not what pruning.flow says.
        free_outputs: ids that reach the model's outputs along one dimension are listed instead
            of pinned.

    Raises:
        ValueError: torch.export cannot trace the model; the first line of its reason is given.
    """
    args, kwargs = arguments(example_inputs)
    with evaluating(model):
        try:
            program = torch.export.export(model, args, kwargs, strict=False)
        except Exception as error:
            first = str(error).strip().splitlines()[:1] or [""]
            raise ValueError(
                f"torch.export cannot trace {type(model).__name__}, so coupled channels are not "
                f"known: {type(error).__name__}: {first[0]}; patterns inside a layer need no trace"
            ) from error
    tracer = Tracer(model, pinned, rules or {})
    signature = program.graph_signature
    names = first_names(model)
    inputs = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    tracer.names = {node: names[name] for node, name in inputs.items()}
    for node in program.graph.nodes:
        if node.op == "call_function":
            tracer.values[node] = follow(tracer, node)
        elif node.op == "output":
            _outputs(tracer, node, free_outputs)
    tracer.finish()
    return tracer.found


def first_names(model: nn.Module) -> dict[str, str]:
    """Every name of a parameter or buffer -> its first name, as `named_modules` gives it."""
    tensors = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in tensors}


def _outputs(tracer: Tracer, node: Any, free: bool) -> None:
    leaves = [leaf for leaf in node.args[0] if isinstance(leaf, torch.fx.Node)]
    for place, leaf in enumerate(leaves):
        value = tracer.value(leaf) if tracer.parameter(leaf) is None else None
        if free and isinstance(value, Tracked) and len(value.dims) == 1:
            tracer.found.outputs[place, value.dims[0]] = value.ids
        else:
            tracer.pin(value, OUTPUT)
