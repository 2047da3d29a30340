"""The demo's network and its training: seeded, so that the same seed gives the same bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimgemm import pruning
from slimgemm.benchmarks.digits import Digits

WIDE = ("wide1", "wide2")  # the layers that the kernels are timed on
BATCH = 64  # images per training step
EVAL_BATCH = 1024
POOLED = 4  # side of the last feature map, whatever the size of the images


@dataclass(frozen=True)
class Score:
    """How a model does on the test images: accuracy in percent, mean cross entropy in nats."""

    accuracy: float
    loss: float


def build(image: tuple[int, int], classes: int) -> nn.Sequential:
    """Two convolutions, two wide linear layers (1024 and 512 features) and a head, untrained.

    Pooling is by averages of fixed windows: their backward is deterministic on a GPU too.
    """
    half = image[0] // 2, image[1] // 2
    window = max(half[0] // POOLED, 1), max(half[1] // POOLED, 1)
    features = 32 * (half[0] // window[0]) * (half[1] // window[1])
    layers: list[tuple[str, nn.Module]] = [
        ("conv1", nn.Conv2d(1, 16, 3, padding=1)),
        ("relu1", nn.ReLU()),
        ("conv2", nn.Conv2d(16, 32, 3, padding=1)),
        ("relu2", nn.ReLU()),
        ("pool1", nn.AvgPool2d(2)),
        ("pool2", nn.AvgPool2d(window)),
        ("flatten", nn.Flatten()),
        ("wide1", nn.Linear(features, 1024)),
        ("relu3", nn.ReLU()),
        ("wide2", nn.Linear(1024, 512)),
        ("relu4", nn.ReLU()),
        ("head", nn.Linear(512, classes)),
    ]
    return nn.Sequential(OrderedDict(layers))


def factory(data: Digits) -> Callable[[], nn.Sequential]:
    """What `sparse_ops.load` takes for a model saved by the demo."""
    return partial(build, data.image, data.classes)


def logits(model: nn.Module, images: Tensor, device: torch.device) -> Tensor:
    """float32 [images, classes] on the CPU; evaluation mode, batches of EVAL_BATCH."""
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        parts = [model(part.to(device)).float().cpu() for part in images.split(EVAL_BATCH)]
    model.train(was_training)
    return torch.cat(parts)


def score(outputs: Tensor, labels: Tensor) -> Score:
    """Accuracy and loss of logits [images, classes]."""
    right = int((outputs.argmax(1) == labels).sum())
    return Score(100 * right / len(labels), float(F.cross_entropy(outputs, labels)))


def evaluate(model: nn.Module, data: Digits, device: torch.device) -> Score:
    """The score on the test images."""
    return score(logits(model, data.test_x, device), data.test_y)


def steps(data: Digits, epochs: int) -> int:
    """Optimizer steps in this many epochs."""
    return epochs * -(-len(data.train_y) // BATCH)


def train(
    model: nn.Module,
    data: Digits,
    *,
    epochs: int,
    rate: float,
    seed: int,
    device: torch.device,
    masked: bool = False,
    tick: Callable[[], object] = lambda: None,
) -> Iterator[Score]:
    """Train in place with Adam and a cosine schedule; yields the test score after each epoch.

    Args:
        rate: learning rate of the first step; the last one is near 0.
        seed: of the order of the images.
        masked: keep the dropped weights of an applied plan at zero.
        tick: called after each of the `steps(data, epochs)` optimizer steps.
    """
    optimizer: torch.optim.Optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    if masked:
        optimizer = pruning.keep_masks(optimizer, model)
    generator = torch.Generator().manual_seed(seed)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps(data, epochs))
    images, labels = data.train_x.to(device), data.train_y.to(device)
    for _ in range(epochs):
        model.train()
        for rows in torch.randperm(len(labels), generator=generator).to(device).split(BATCH):
            loss = F.cross_entropy(model(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            tick()
        yield evaluate(model, data, device)


@contextmanager
def deterministic(threads: int) -> Iterator[None]:
    """Deterministic algorithms and this many CPU threads; both are as before afterwards."""
    before = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    had = torch.get_num_threads()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)
        torch.set_num_threads(had)
