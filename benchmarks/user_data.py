"""user_data: a model, loaders and a metric, made by the user's own functions and checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from slimgemm.benchmarks.prune_check import check_loaders, device_of, first_batch
from slimgemm.benchmarks.user_code import Guarded, guarded, named, noted, users_code
from slimgemm.pruning.inputs import run, tensors_of, to_device
from slimgemm.pruning.metric import Evaluate
from slimgemm.pruning.task import seeded


def first_rows(inputs: Any, rows: int | None) -> Any:
    """The first rows of every tensor in some inputs."""
    if isinstance(inputs, Tensor):
        return inputs[:rows] if inputs.ndim else inputs
    if isinstance(inputs, dict):
        return {key: first_rows(value, rows) for key, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return tuple(first_rows(value, rows) for value in inputs)
    return inputs


@dataclass
class Metric:
    """Accuracy in percent, or mean loss over a test loader.

    Args:
        kind: "accuracy" or "loss".
        loader: yields (inputs, target).
        loss: (outputs, target) -> scalar, a mean over rows.
    """

    kind: str
    loader: Iterable[Any]
    loss: Callable[[Any, Any], Tensor]

    def __str__(self) -> str:
        return self.kind

    def __call__(self, model: nn.Module) -> float:
        """The metric of a model.

        Raises:
            ValueError: classes and targets are not of one shape.
        """
        device = next(model.parameters()).device
        total = rows = 0.0
        for batch in self.loader:
            inputs, target = (to_device(part, device) for part in batch)
            with noted("the model's forward of a test batch"):
                outputs = run(model, inputs)
            if self.kind == "accuracy":
                total += _right(outputs, target)
                rows += target.numel()
            else:
                total += float(self.loss(outputs, target)) * len(target)
                rows += len(target)
        if not rows:
            raise ValueError("the test loader's batches have no rows")
        return total / rows * (100 if self.kind == "accuracy" else 1)


def _right(outputs: Any, target: Any) -> float:
    """How many targets the largest outputs along the last axis are."""
    cure = "give --metric loss, or --metric module:function of your own"
    if not isinstance(outputs, Tensor) or not isinstance(target, Tensor):
        what = type(target if isinstance(outputs, Tensor) else outputs).__name__
        raise ValueError(f"accuracy compares tensors of classes, got a {what}; {cure}")
    found = outputs.argmax(-1)
    if found.shape != target.shape:
        raise ValueError(
            f"accuracy compares classes {list(found.shape)} (the largest of outputs "
            f"{list(outputs.shape)} along the last axis) with targets {list(target.shape)}; {cure}"
        )
    return float((found == target).sum())


@dataclass(frozen=True)
class Made:
    """What the user's functions made.

    Args:
        model: on its device.
        train, test: loaders; what they raise names them.
        loss: (outputs, target) -> scalar.
        metric: model -> number.
        example: what a forward has: the first rows of the first test batch.
    """

    model: nn.Module
    train: Iterable[Any]
    test: Iterable[Any]
    loss: Callable[[Any, Any], Tensor]
    metric: Evaluate
    example: Any


@dataclass(frozen=True)
class Source:
    """The user's functions by name; see the options of `slimgemm prune`.

    Args:
        make_model, make_data, metric, loss: module:function; metric may be accuracy or loss.
        lower: whether less of the user's own metric is better.
        rows: that a forward has; None for those of a test batch.
        seed: of the random numbers that the functions draw.

    Raises:
        ValueError: the metric is no such word, or `lower` is said of one that is built in.
    """

    make_model: str
    make_data: str
    metric: str = "accuracy"
    lower: bool = False
    loss: str = "torch.nn.functional:cross_entropy"
    rows: int | None = None
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.lower and self._builtin:
            raise ValueError(
                f"--lower-is-better is for a metric of your own; {self.metric} knows it"
            )
        if not self._builtin and ":" not in self.metric:
            raise ValueError(
                f"metric must be accuracy, loss or module:function, got {self.metric!r}"
            )

    @property
    def _builtin(self) -> bool:
        return self.metric in ("accuracy", "loss")

    @property
    def higher_is_better(self) -> bool:
        """Of the metric."""
        return not self.lower and self.metric != "loss"

    @property
    def tag(self) -> str:
        """What results depend on and a search or scan does not see itself."""
        return " ".join((self.make_model, self.make_data, self.metric, self.loss, self.device))

    def load(self, prepare: Callable[[], None]) -> Made:
        """Find the functions, and call them.

        Args:
            prepare: called when they are found and before one is called, to check a folder.

        Raises:
            ValueError: there is no such device or function, or it makes something else.
            UserError: a function of the user raised.
        """
        device = device_of(self.device)
        make_model, make_data = named(self.make_model), named(self.make_data)
        loss = guarded(f"the loss {self.loss}", named(self.loss))
        own = None if self._builtin else named(self.metric)
        prepare()
        model = self._model(make_model).to(device)
        with users_code(f"the data factory {self.make_data}"), seeded(self.seed):
            made = make_data()
        loaders = check_loaders(made)
        example = to_device(self._example(loaders[1]), device)
        train, test = (
            Guarded(loader, f"the {name} loader of {self.make_data}")
            for name, loader in zip(("training", "test"), loaders, strict=True)
        )
        if own is None:
            metric: Evaluate = Metric(self.metric, test, loss)
        else:
            metric = guarded(f"the metric {self.metric}", own)
        return Made(model, train, test, loss, metric, example)

    def _model(self, make: Callable[[], Any]) -> nn.Module:
        with users_code(f"the model factory {self.make_model}"), seeded(self.seed):
            model = make()
        if not isinstance(model, nn.Module):
            raise ValueError(f"the model factory gave a {type(model).__name__}, not a module")
        if next(model.parameters(), None) is None:
            raise ValueError("the model factory gave a module without parameters")
        return model

    def _example(self, test: Iterable[Any]) -> Any:
        inputs, _ = first_batch(test, "test")
        tensors = [tensor for tensor in tensors_of(inputs) if tensor.ndim]
        most = min((len(tensor) for tensor in tensors), default=0)
        if self.rows is not None and self.rows > most:
            raise ValueError(
                f"--rows {self.rows} is more than the first test batch has, which is {most}; ask "
                "for fewer, or let the test loader make larger batches"
            )
        return first_rows(inputs, self.rows)
