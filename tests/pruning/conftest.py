"""Small models that several tests prune; every one is seeded."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimgemm.pruning.finetune import FineTune


class Residual(nn.Module):
    """Residual add, squeeze and excitation, concatenation, depthwise and grouped convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.a = nn.Conv2d(16, 24, 3, padding=1)
        self.bn = nn.BatchNorm2d(24)
        self.b = nn.Conv2d(24, 16, 1)
        self.dw = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.squeeze = nn.Linear(16, 4)
        self.excite = nn.Linear(4, 16)
        self.c = nn.Conv2d(16, 8, 1)
        self.d = nn.Conv2d(24, 32, 3, groups=4, padding=1)
        self.f = nn.Linear(32 * 4 * 4, 20)
        self.g = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = x + self.b(F.relu(self.bn(self.a(x))))
        x = F.hardswish(self.dw(x))
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3))))))
        x = x * gate[:, :, None, None]
        x = torch.cat([x, self.c(x)], 1)
        x = F.max_pool2d(F.relu(self.d(x)), 2)
        return self.g(F.gelu(self.f(x.flatten(1))))


class Attention(nn.Module):
    """A transformer block with grouped queries; `literal` writes head counts into the views."""

    def __init__(
        self, heads: int = 4, pairs: int = 2, size: int = 4, literal: bool = False
    ) -> None:
        super().__init__()
        width = heads * size
        self.heads, self.pairs, self.size, self.literal = heads, pairs, size, literal
        self.norm = nn.LayerNorm(width)
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, pairs * size)
        self.v = nn.Linear(width, pairs * size)
        self.o = nn.Linear(width, width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.head = nn.Linear(width, 3)

    def split(self, x: Tensor, heads: int) -> Tensor:
        b, t, _ = x.shape
        return x.view(b, t, heads if self.literal else -1, self.size).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        y = self.norm(x)
        q, k = self.split(self.q(y), self.heads), self.split(self.k(y), self.pairs)
        v = self.split(self.v(y), self.pairs)
        times = self.heads // self.pairs
        k = k[:, :, None].expand(-1, -1, times, -1, -1).reshape(b, -1, t, self.size)
        v = v[:, :, None].expand(-1, -1, times, -1, -1).reshape(b, -1, t, self.size)
        a = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, -1)
        x = x + self.o(a)
        return self.head(x + self.down(F.gelu(self.up(x))))


class Vgg(nn.Module):
    """The course's VGG: convolutions with batch normalisation, a mean, one linear layer."""

    def __init__(self, widths: tuple[int | str, ...], classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in widths:
            if isinstance(width, str):
                layers.append(nn.MaxPool2d(2))
                continue
            layers += [
                nn.Conv2d(channels, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            ]
            channels = width
        self.backbone = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.backbone(x).mean([2, 3]))


def _lively(model: nn.Module) -> nn.Module:
    """Batch normalisation statistics that are not 0 and 1, and no two scales alike."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return model


@pytest.fixture
def residual() -> nn.Module:
    torch.manual_seed(1)
    return _lively(Residual())


@pytest.fixture
def attention() -> Callable[..., nn.Module]:
    def make(**options: bool) -> nn.Module:
        torch.manual_seed(2)
        return Attention(**options)

    return make


@pytest.fixture
def vgg() -> Callable[..., nn.Module]:
    def make(*widths: int | str) -> nn.Module:
        torch.manual_seed(3)
        return _lively(Vgg(widths))

    return make


@pytest.fixture
def mlp() -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(
        nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 8)
    )


@pytest.fixture
def normal() -> Callable[..., Tensor]:
    """Seeded normal numbers of a shape."""

    def make(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return make


class Blobs:
    """A trained classifier of clusters in 8 of 16 inputs, its data, metric and fine-tuning."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(5)
        centres = 1.2 * torch.randn(4, 16, generator=generator)
        centres[:, 8:] = 0
        self.y = torch.randint(4, (512,), generator=generator)
        self.x = centres[self.y] + torch.randn(512, 16, generator=generator)
        batches = [(a, b) for a, b in zip(self.x.split(64), self.y.split(64), strict=True)]
        self.tune = FineTune(batches[:4], F.cross_entropy, 1e-2)
        torch.manual_seed(5)
        self.model: nn.Module = nn.Sequential(
            nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4)
        )
        self.tune(self.model, 60)
        self.example = self.x[:4]

    def accuracy(self, model: nn.Module) -> float:
        """Percent of the second half, which no training sees."""
        return 100 * float((model(self.x[256:]).argmax(1) == self.y[256:]).float().mean())


@pytest.fixture(scope="session")
def blobs() -> Blobs:
    return Blobs()
