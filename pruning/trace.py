"""trace: from a model to its coupled channels, by way of torch.export."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from slimgemm.pruning.coupling import Coupling, Tracer
from slimgemm.pruning.flow import follow
from slimgemm.pruning.inputs import Inputs, arguments, evaluating


def trace(
    model: nn.Module, example_inputs: Inputs, pinned: Callable[[str], str | None]
) -> Coupling:
    """Trace a model and follow its channels.

    Args:
        model: traced in evaluation mode with torch.export; it is left as it was.
        example_inputs: as for `plan`.
        pinned: dotted name of a parameter or buffer -> why its channels must stay, or None.

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
    tracer = Tracer(pinned)
    signature = program.graph_signature
    tracer.names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    for node in program.graph.nodes:
        if node.op == "call_function":
            tracer.values[node] = follow(tracer, node)
        elif node.op == "output":
            for source in node.all_input_nodes:
                if tracer.parameter(source) is None:
                    tracer.pin(tracer.value(source), "it reaches the model's output")
    tracer.finish()
    return tracer.found
