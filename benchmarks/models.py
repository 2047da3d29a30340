"""The models that are timed, in plain torch.nn, with random weights and a size of choice.

Decoder has the shape of Llama-3 (grouped queries, rotary positions, SwiGLU), Vit of ViT-L/16,
ResNet of ResNet-50. `narrow` gives the widths that channel pruning leaves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Cache = Sequence[tuple[Tensor, Tensor]]


@dataclasses.dataclass(frozen=True)
class DecoderSize:
    """Sizes of a decoder; the defaults are those of Llama-3-8B."""

    layers: int = 32
    width: int = 4096
    heads: int = 32
    kv_heads: int = 8
    hidden: int = 14336
    vocabulary: int = 128256
    theta: float = 500000.0

    def narrow(self, share: float) -> DecoderSize:
        """With `share` of the hidden units of each MLP."""
        return dataclasses.replace(self, hidden=int(self.hidden * share))


class Attention(nn.Module):
    """Causal attention with grouped queries and rotary positions."""

    def __init__(self, size: DecoderSize) -> None:
        super().__init__()
        self.heads, self.kv_heads = size.heads, size.kv_heads
        self.depth = size.width // size.heads
        self.qkv = nn.Linear(size.width, (size.heads + 2 * size.kv_heads) * self.depth, bias=False)
        self.out = nn.Linear(size.width, size.width, bias=False)

    def forward(
        self,
        x: Tensor,
        turn: tuple[Tensor, Tensor],
        positions: Tensor,
        cache: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (
            part.view(b, t, -1, self.depth).transpose(1, 2)
            for part in self.qkv(x).split(
                [h * self.depth for h in (self.heads, self.kv_heads, self.kv_heads)], -1
            )
        )
        q, k = rotated(q, *turn), rotated(k, *turn)
        if cache is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            y = self._cached(q, k, v, positions, cache)
        return self.out(y.transpose(1, 2).reshape(b, t, -1))

    def _cached(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, cache: tuple[Tensor, Tensor]
    ) -> Tensor:
        """One new token of each sequence against all earlier ones."""
        keys, values = cache
        keys.index_copy_(2, positions, k)
        values.index_copy_(2, positions, v)
        seen = torch.arange(keys.shape[2], device=q.device) <= positions
        # The queries of a group share a key, so they can be its rows: no key is copied.
        grouped = q.reshape(q.shape[0], self.kv_heads, -1, self.depth)
        y = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=seen[None])
        return y.reshape(q.shape)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x` [..., tokens, depth] turned by its positions."""
    first, second = x.chunk(2, -1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


class DecoderLayer(nn.Module):
    """Attention and a gated MLP, each behind a norm and a residual."""

    def __init__(self, size: DecoderSize) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(size.width), nn.RMSNorm(size.width)
        self.attention = Attention(size)
        self.gate_up = nn.Linear(size.width, 2 * size.hidden, bias=False)
        self.down = nn.Linear(size.hidden, size.width, bias=False)

    def forward(self, x: Tensor, turn, positions: Tensor, cache=None) -> Tensor:
        x = x + self.attention(self.norm1(x), turn, positions, cache)
        gate, up = self.gate_up(self.norm2(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class Decoder(nn.Module):
    """Tokens [batch, t] and their positions [t] -> logits of the last one [batch, vocabulary]."""

    def __init__(self, size: DecoderSize) -> None:
        super().__init__()
        self.size = size
        self.embed = nn.Embedding(size.vocabulary, size.width)
        self.layers = nn.ModuleList(DecoderLayer(size) for _ in range(size.layers))
        self.norm = nn.RMSNorm(size.width)
        self.head = nn.Linear(size.width, size.vocabulary, bias=False)

    def turn(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine [t, depth / 2] of the rotary positions, fp32."""
        depth = self.size.width // self.size.heads
        steps = torch.arange(0, depth, 2, device=positions.device, dtype=torch.float32)
        angles = positions[:, None].float() * self.size.theta ** (-steps / depth)
        return angles.cos(), angles.sin()

    def forward(self, tokens: Tensor, positions: Tensor, cache: Cache | None = None) -> Tensor:
        x, turn = self.embed(tokens), self.turn(positions)
        for number, layer in enumerate(self.layers):
            x = layer(x, turn, positions, None if cache is None else cache[number])
        return self.head(self.norm(x[:, -1]))

    def new_cache(self, batch: int, tokens: int, like: Tensor, by: torch.Generator) -> Cache:
        """Random normal keys and values of `tokens` tokens, in the dtype of `like`."""
        size = self.size
        shape = (batch, size.kv_heads, tokens, size.width // size.heads)

        def random() -> Tensor:
            return torch.randn(shape, generator=by, device=like.device).to(like.dtype)

        return [(random(), random()) for _ in range(size.layers)]


@dataclasses.dataclass(frozen=True)
class VitSize:
    """Sizes of a vision transformer; the defaults are those of ViT-L/16."""

    layers: int = 24
    width: int = 1024
    heads: int = 16
    hidden: int = 4096
    image: int = 224
    patch: int = 16
    classes: int = 1000

    def narrow(self, share: float) -> VitSize:
        """With `share` of the hidden units of each MLP."""
        return dataclasses.replace(self, hidden=int(self.hidden * share))


class VitLayer(nn.Module):
    """Attention and an MLP, each behind a norm and a residual."""

    def __init__(self, size: VitSize) -> None:
        super().__init__()
        self.heads = size.heads
        self.norm1, self.norm2 = nn.LayerNorm(size.width), nn.LayerNorm(size.width)
        self.qkv, self.out = (
            nn.Linear(size.width, 3 * size.width),
            nn.Linear(size.width, size.width),
        )
        self.fc1, self.fc2 = nn.Linear(size.width, size.hidden), nn.Linear(size.hidden, size.width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        qkv = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        x = x + self.out(y.transpose(1, 2).reshape(b, t, c))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Vit(nn.Module):
    """Images [batch, 3, image, image] -> logits [batch, classes]."""

    def __init__(self, size: VitSize) -> None:
        super().__init__()
        self.size = size
        tokens = (size.image // size.patch) ** 2 + 1
        self.patches = nn.Conv2d(3, size.width, size.patch, size.patch)
        self.first = nn.Parameter(torch.zeros(1, 1, size.width))
        self.places = nn.Parameter(0.02 * torch.randn(1, tokens, size.width))
        self.layers = nn.Sequential(*(VitLayer(size) for _ in range(size.layers)))
        self.norm = nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, size.classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat((self.first.expand(len(x), -1, -1), x), 1) + self.places
        return self.head(self.norm(self.layers(x)[:, 0]))


@dataclasses.dataclass(frozen=True)
class ResNetSize:
    """Sizes of a residual network of bottlenecks; the defaults are those of ResNet-50."""

    blocks: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    inner: float = 1.0  # share of the channels inside the bottlenecks
    image: int = 224
    classes: int = 1000

    def narrow(self, share: float) -> ResNetSize:
        """With `share` of the channels inside each bottleneck."""
        return dataclasses.replace(self, inner=share)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions behind a residual."""

    def __init__(self, ins: int, inner: int, outs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(ins, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(inner)
        self.conv3, self.norm3 = nn.Conv2d(inner, outs, 1, bias=False), nn.BatchNorm2d(outs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or ins != outs:
            conv = nn.Conv2d(ins, outs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(outs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(y)))
        return F.relu(self.norm3(self.conv3(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """Images [batch, 3, image, image] -> logits [batch, classes]."""

    def __init__(self, size: ResNetSize) -> None:
        super().__init__()
        self.size = size
        self.conv = nn.Conv2d(3, size.width, 7, 2, 3, bias=False)
        self.norm = nn.BatchNorm2d(size.width)
        layers: list[nn.Module] = []
        ins = size.width
        for stage, blocks in enumerate(size.blocks):
            width = size.width * 2**stage
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                layers.append(Bottleneck(ins, int(width * size.inner), 4 * width, stride))
                ins = 4 * width
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(ins, size.classes)

    def forward(self, images: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.conv(images))), 3, 2, 1)
        return self.head(self.layers(x).mean((2, 3)))
