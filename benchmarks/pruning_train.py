"""pruning_train: the small networks of bench_pruning and their training."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimgemm import pruning


class Batches:
    """(images, labels) in another order on each pass."""

    def __init__(self, x: Tensor, y: Tensor, batch: int, generator: torch.Generator) -> None:
        self.x, self.y, self.batch, self.generator = x, y, batch, generator

    def __len__(self) -> int:
        return -(-len(self.y) // self.batch)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for rows in torch.randperm(len(self.y), generator=self.generator).split(self.batch):
            yield self.x[rows], self.y[rows]


def loader(x: Tensor, y: Tensor, batch: int, seed: int) -> Batches:
    return Batches(x, y, batch, torch.Generator().manual_seed(seed))


def train(model: nn.Module, batches: Batches, epochs: int, rate: float, decay: float = 0.0) -> None:
    """Adam with a cosine schedule, and L2; masks are kept."""
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    pruning.finetune(
        model, optimizer, batches, F.cross_entropy, epochs, scheduler=schedule, show=False
    )


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Percent."""
    model.eval()
    with torch.inference_mode():
        right = sum(int((model(a).argmax(1) == b).sum())
                    for a, b in zip(x.split(500), y.split(500), strict=True))  # fmt: skip
    return round(100 * right / len(y), 2)


class Residual(nn.Module):
    """Two 3x3 convolutions with batch normalisation, and a shortcut around them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


def residual_network() -> nn.Sequential:
    """16, 32 and 64 channels, stem of stride 2."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), Residual(16, 16, 1),
        Residual(16, 32, 2), Residual(32, 64, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(64, 10),
    )  # fmt: skip


def lenet_300_100() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
    )
