"""compress and decompress: swap layers for packed ones where they are eligible, and back.

A layer is eligible when its forward runs (a weight that another module reads on its own, as
nn.MultiheadAttention does, is not), its class is exactly the one replaced, nothing else shares
its weight, and its weight already fits the pattern. On a GPU each candidate is timed against
its dense layer on the input it really saw, and dense is kept where dense wins.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from slimgemm.kernels.dispatch import untuned
from slimgemm.kernels.formats import LEAST_SAVING, Packed24, check, check_pattern
from slimgemm.kernels.timing import time_us
from slimgemm.sparse_ops.channels import ChannelConv2d, ChannelLinear
from slimgemm.sparse_ops.conv import SparseConv2d24
from slimgemm.sparse_ops.linear import SparseLinear24
from slimgemm.sparse_ops.report import CompressReport, LayerReport

HOOKS = tuple(name for name in nn.Module().__dict__ if "hook" in name)

# Class replaced -> its 2:4 class, and the class for channels that were pruned on their own. Their
# from_dense refuses with ValueError and the reason.
CONVERTERS: dict[type[nn.Module], tuple[Any, Any]] = {
    nn.Linear: (SparseLinear24, ChannelLinear),
    nn.Conv2d: (SparseConv2d24, ChannelConv2d),
}
# Its fast path, taken for some inputs only, reads the weights of the layers inside it.
READER = nn.TransformerEncoderLayer


def modules_with_names(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Every module of `model` with all the names that lead to it."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return names


def carry_over(old: nn.Module, new: nn.Module) -> nn.Module:
    """Give `new` the hooks, mode and user attributes of `old`; hook handles keep working.

    What the class of `old` sets itself (its `own_attributes`) stays behind, and so does the mask of
    slimgemm.pruning: the metadata of a packed weight says what is kept.
    """
    own = {*getattr(old, "own_attributes", ()), "kept_weights"}
    for name, value in old.__dict__.items():
        if name in HOOKS or (name not in new.__dict__ and name not in own):
            new.__dict__[name] = value
    new.training = old.training
    return new


def replace(model: nn.Module, names: list[str], new: nn.Module) -> None:
    """Put `new` where `names` lead to."""
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run in eval mode without gradients, and put every module's mode back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def call(model: nn.Module, example_inputs: Any) -> Any:
    """model(example_inputs): a tuple or list is spread, a dict becomes keyword arguments."""
    if isinstance(example_inputs, dict):
        return model(**example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return model(*example_inputs)
    return model(example_inputs)


def seen_inputs(
    model: nn.Module, layers: list[nn.Module], example_inputs: Any
) -> dict[nn.Module, Tensor]:
    """The first input of each layer whose forward runs in one pass of the model.

    It watches by a wrapped forward and not by a hook: where a module has a hook,
    nn.TransformerEncoderLayer calls layers whose weights its fast path reads without them.
    """
    seen: dict[nn.Module, Tensor] = {}
    before = {layer: layer.__dict__.get("forward") for layer in layers}
    try:
        for layer in layers:
            layer.__dict__["forward"] = _noting(layer, layer.forward, seen)
        with evaluating(model):
            call(model, example_inputs)
    finally:
        for layer, forward in before.items():
            layer.__dict__.pop("forward", None)
            if forward is not None:
                layer.__dict__["forward"] = forward
    return seen


def _noting(
    module: nn.Module, forward: Callable[..., Any], seen: dict[nn.Module, Tensor]
) -> Callable[..., Any]:
    """`forward` of `module`, its first input noted in `seen`."""

    def noting(*inputs: Any, **named: Any) -> Any:
        first = next(iter((*inputs, *named.values())), None)
        if isinstance(first, Tensor):
            seen.setdefault(module, first.detach())
        return forward(*inputs, **named)

    return noting


def refusal(module: nn.Module, holders: list[str], seen: dict[nn.Module, Tensor] | None) -> str:
    """Why `module` cannot be swapped whatever its weight holds; empty if it can.

    Args:
        holders: modules that hold the same weight and have no packed twin.
    """
    if hasattr(module, "parametrizations"):
        return "its weight is parametrized; remove the parametrization first"
    if type(module) not in CONVERTERS:
        return f"its class {type(module).__name__} is a subclass with a behaviour of its own"
    held = {*module._parameters, *module._buffers, *module._modules}
    others = ", ".join(sorted(held - {"weight", "bias"}))
    if "weight" not in module._parameters:
        return f"its weight is computed from {others}; remove that first"
    if others:
        return f"it also holds {others}, which would be lost"
    if "forward" in module.__dict__:
        return "its forward was replaced on this layer alone"
    if holders:
        return f"its weight is shared with {', '.join(holders)}, which needs it dense"
    if seen is not None and module not in seen:
        return (
            "its forward did not run on the example inputs, so another module may read its weight"
        )
    return ""


def dense_holders(model: nn.Module) -> dict[int, list[str]]:
    """id of each parameter -> names of the modules that hold it and have no packed twin."""
    holders: dict[int, list[str]] = {}
    for module, names in modules_with_names(model).items():
        for parameter in module._parameters.values():
            if parameter is not None and type(module) not in CONVERTERS:
                holders.setdefault(id(parameter), []).append(names[0])
    return holders


def times_of(dense: nn.Module, packed: nn.Module, x: Tensor) -> tuple[float, float, str]:
    """Median microseconds of dense(x) and packed(x) on the GPU, L2 cold, and how they were timed.

    "graph": both captured in CUDA graphs, so that the host does not count; "eager" where one of
    them cannot be captured.
    """
    x = x.to(cast(Tensor, next(dense.parameters())).dtype)  # autocast may have cast it
    calls = {"dense": lambda: dense(x), "packed": lambda: packed(x)}
    with torch.no_grad():
        try:
            times, how = time_us(calls, x.device, graph=True), "graph"
        except RuntimeError:
            times, how = time_us(calls, x.device), "eager"
    return times["dense"].p50, times["packed"].p50, how


def compress(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    keep: int = 2,
    group: int = 4,
    ignore: Sequence[str] = (),
    only_if_faster: bool = True,
) -> CompressReport:
    """Swap every eligible layer of `model`, in place, for its packed twin.

    Names, hooks, train/eval state, device, requires_grad and shared weights stay as they are. The
    packed modules hold new parameters: build the optimizer afterwards. Which kernel a 2:4 layer
    runs on a GPU is decided at each call (kernels/dispatch.py); the report says if `slimgemm tune`
    was not run there, so that the portable kernels are used.

    Args:
        model: pruned already (slimgemm.pruning); layers that are not are left dense.
        example_inputs: for one forward pass: a tensor, a tuple of arguments or a dict of keyword
            arguments. Without it no layer can be seen to run and nothing is timed.
        keep, group: pattern to pack.
        ignore: layers to leave dense: names, or "re:" and a regex for the full name.
        only_if_faster: on a GPU, leave a layer dense whose packed kernel is slower on the input
            it saw; both are timed with L2 cold, in captured CUDA graphs where they can be. Off a
            GPU nothing is timed: a packed layer saves memory there, not time.
    Returns:
        A report with every linear and convolution, and the reason where one was left dense.
    Raises:
        ValueError: `ignore` names no layer of the model, the pattern is unknown, or the model is
            itself a layer to swap, which cannot be done in place.
    """
    check_pattern(keep, group)
    if type(model) in CONVERTERS:
        raise ValueError(
            f"the model is itself a {type(model).__name__}; use from_dense of its packed class"
        )
    classes = tuple(CONVERTERS)
    found = {m: names for m, names in modules_with_names(model).items() if isinstance(m, classes)}
    ignored = named_by(ignore, [name for names in found.values() for name in names])
    holders = dense_holders(model)
    seen = None if example_inputs is None else seen_inputs(model, list(found), example_inputs)
    readers = [m for m in model.modules() if type(m).forward is READER.forward]
    read = {layer for reader in readers for layer in reader.modules()}
    timed = only_if_faster and seen is not None
    choices: dict[nn.Module, Choice] = {}
    for module, names in found.items():
        mine = [name for name in holders.get(id(module.weight), []) if name not in names]
        reason = "named in ignore" if ignored & {*names} else refusal(module, mine, seen)
        if not reason and module in read:
            reason = (
                "the fast path of nn.TransformerEncoderLayer reads its weight; subclass that layer "
                "with a forward of your own to pack it"
            )
        choices[module] = Choice(None, reason)
        if not reason:
            x = seen[module] if timed and seen is not None else None
            choices[module] = choose(module, x, keep, group)
    keep_shared(found, choices)
    for module, choice in choices.items():
        if choice.twin is not None:
            replace(model, found[module], carry_over(module, choice.twin))
    layers = [_layer_report(m, found[m][0], choice) for m, choice in choices.items()]
    return CompressReport(layers, _untuned(choices))


def _untuned(choices: dict[nn.Module, Choice]) -> str:
    """That the GPU of a 2:4 layer, packed or timed, was not tuned; "" if each one was."""
    devices = [
        cast(Tensor, module.weight).device
        for module, choice in choices.items()
        if isinstance(choice.twin, SparseLinear24 | SparseConv2d24) or choice.us_packed is not None
    ]
    return " ".join(dict.fromkeys(filter(None, map(untuned, dict.fromkeys(devices)))))


def named_by(rules: Sequence[str], names: list[str]) -> set[str]:
    """The names that `rules` cover: a name, or "re:" and a regex for the whole of it.

    Raises:
        ValueError: a rule covers no name (a typing error would else pack it), or is no regex.
    """
    if isinstance(rules, str):
        raise ValueError(f"ignore must be a list of names, got the string {rules!r}")
    covered: set[str] = set()
    for rule in rules:
        pattern = rule[3:] if rule.startswith("re:") else re.escape(rule)
        try:
            found = {name for name in names if re.fullmatch(pattern, name)}
        except re.error as error:
            raise ValueError(f"ignore: {rule!r} is no regular expression: {error}") from None
        if not found:
            raise ValueError(f"ignore names no linear or convolution of the model: {rule!r}")
        covered |= found
    return covered


class Choice(NamedTuple):
    """The packed twin of a layer, or None and the reason; microseconds where both were timed."""

    twin: Any
    reason: str
    us_dense: float | None = None
    us_packed: float | None = None
    timing: str = ""


def choose(module: nn.Module, x: Tensor | None, keep: int, group: int) -> Choice:
    """Pack `module`; on a GPU, compare the two on the input `x` if there is one."""
    sparse, channels = CONVERTERS[type(module)]
    try:
        twin = sparse.from_dense(module, keep=keep, group=group)
    except ValueError as error:
        try:
            twin = channels.from_dense(module)
        except ValueError:
            return Choice(None, str(error))
    dense_bytes = cast(Tensor, module.weight).nbytes
    if twin.nbytes > (1 - LEAST_SAVING) * dense_bytes:
        return Choice(
            None,
            f"packed it would take {twin.nbytes} bytes, dense it takes {dense_bytes}: a swap must "
            f"save at least {LEAST_SAVING:.0%}".replace("%", " %"),
        )
    if x is None or not x.is_cuda:
        return Choice(twin, "")
    times = times_of(module, twin, x)
    if times[1] > times[0]:
        return Choice(None, "dense is faster on this GPU", *times)
    return Choice(twin, "", *times)


def keep_shared(found: dict[nn.Module, list[str]], choices: dict[nn.Module, Choice]) -> None:
    """Layers that share a weight share its packed parts, or all stay dense."""
    sharing: dict[int, list[nn.Module]] = {}
    for module in found:
        sharing.setdefault(id(module.weight), []).append(module)
    for modules in sharing.values():
        if len(modules) == 1:
            continue
        twins = [choices[m].twin for m in modules]
        dense = [m for m, twin in zip(modules, twins, strict=True) if twin is None]
        if not dense and all(hasattr(twin, "values") for twin in twins):
            for twin in twins[1:]:
                twin.values, twin.meta = twins[0].values, twins[0].meta
            continue
        stays = found[(dense or modules)[0]][0]
        for module in modules:
            if module not in dense:
                why = f"its weight is shared with {stays}, which stays dense"
                choices[module] = Choice(None, why)


def kind_of(twin: Any) -> str:
    """What a packed module keeps: keep:group, or its kept channels."""
    if hasattr(twin, "keep"):
        return f"{twin.keep}:{twin.group}"
    sides = (("in", twin.kept_in), ("out", twin.kept_out))
    return ", ".join(f"{k.kept} of {k.width} {side}" for side, k in sides if k is not None)


def _layer_report(module: nn.Module, name: str, choice: Choice) -> LayerReport:
    weight, twin = cast(Tensor, module.weight), choice.twin
    packed = twin is not None
    kind = kind_of(twin) if packed else type(module).__name__
    nbytes = twin.nbytes if packed else weight.nbytes
    shape = tuple(weight.shape)
    return LayerReport(name, kind, shape, packed, choice.reason, weight.nbytes, nbytes, *choice[2:])


def decompress(model: nn.Module) -> nn.Module:
    """The inverse of compress, in place: packed modules become the dense layers they pack.

    Names, hooks, train/eval state, device, requires_grad and shared weights stay as they are.

    Raises:
        ValueError: metadata is damaged, or the model is itself a packed layer.
    """
    if hasattr(model, "to_dense"):
        raise ValueError(f"the model is itself a {type(model).__name__}; use its to_dense")
    weights: dict[int, nn.Parameter] = {}
    swaps: list[tuple[list[str], nn.Module]] = []
    for module, names in modules_with_names(model).items():
        to_dense = getattr(module, "to_dense", None)
        if to_dense is None:
            continue
        if hasattr(module, "packed"):
            check(cast(Packed24, module.packed))
        dense = to_dense()
        key = id(module.values) if hasattr(module, "values") else id(module.weight)
        dense.weight = weights.setdefault(key, dense.weight)
        swaps.append((names, carry_over(module, dense)))
    for names, dense in swaps:
        replace(model, names, dense)
    return model
