"""What the models do: decode, prefill, images, a training step; full size, or tiny for tests."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from slimgemm.benchmarks.models import Decoder, DecoderSize, ResNet, ResNetSize, Vit, VitSize


@dataclasses.dataclass(frozen=True)
class Workload:
    """What a model does.

    Args:
        build: share of the channels -> the model, dense, random weights, in evaluation mode.
        inputs: (model, generator) -> arguments of one call; of a training step images and labels.
        unit, units: what is counted, and how many of them a call makes.
    """

    model: str
    name: str
    build: Callable[[float], nn.Module]
    inputs: Callable[[Any, torch.Generator], tuple[Any, ...]]
    unit: str
    units: int
    train: bool = False


class Scale(NamedTuple):
    """Sizes of models and workloads."""

    names: tuple[str, str, str]
    decoder: DecoderSize
    vit: VitSize
    resnet: ResNetSize
    sequences: tuple[int, ...]
    cached: int
    prompt: int
    images: int
    train_images: int


FULL = Scale(
    ("llama3-8b", "vit-l", "resnet50"), DecoderSize(), VitSize(), ResNetSize(),
    sequences=(1, 8, 32, 64), cached=512, prompt=2048, images=64, train_images=32,
)  # fmt: skip
TINY = Scale(
    ("tiny decoder", "tiny vit", "tiny resnet"),
    DecoderSize(layers=2, width=32, heads=4, kv_heads=2, hidden=64, vocabulary=96),
    VitSize(layers=2, width=32, heads=4, hidden=64, image=16, patch=8, classes=10),
    ResNetSize(blocks=(1, 1), width=16, image=32, classes=10),
    sequences=(1, 3), cached=8, prompt=6, images=2, train_images=2,
)  # fmt: skip
SMALL = Scale(
    ("decoder, 4 layers of 512", "vit, 4 layers of 256", "resnet, 2 stages"),
    DecoderSize(layers=4, width=512, heads=8, kv_heads=2, hidden=1792, vocabulary=4096),
    VitSize(layers=4, width=256, heads=4, hidden=1024, image=64, patch=8, classes=100),
    ResNetSize(blocks=(2, 2), width=32, image=64, classes=100),
    sequences=(1, 8), cached=128, prompt=256, images=8, train_images=8,
)  # fmt: skip
SCALES = {"full": FULL, "small": SMALL, "tiny": TINY}


@contextlib.contextmanager
def built_on(device: torch.device, dtype: torch.dtype, seed: int = 0) -> Iterator[None]:
    """Modules made inside have seeded weights of `dtype` on `device`; nothing else changes."""
    before = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(seed)
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


def workloads(scale: Scale, dtype: torch.dtype, device: torch.device) -> Iterator[Workload]:
    """Every workload at this scale, the most telling first."""
    kinds = zip((Decoder, Vit, ResNet), (scale.decoder, scale.vit, scale.resnet), strict=True)

    def builder(kind: Any, size: Any) -> Callable[[float], nn.Module]:
        def build(share: float) -> nn.Module:
            with built_on(device, dtype):
                model = kind(size if share == 1 else size.narrow(share)).eval()
            # Filters in the order that the images have.
            return model.to(memory_format=torch.channels_last) if kind is ResNet else model

        return build

    decoder, vit, resnet = (builder(kind, size) for kind, size in kinds)

    def tokens(model: Decoder, by: torch.Generator, *shape: int) -> torch.Tensor:
        return torch.randint(model.size.vocabulary, shape, generator=by, device=device)

    def decode(batch: int) -> Callable[[Any, torch.Generator], tuple[Any, ...]]:
        def inputs(model: Decoder, by: torch.Generator) -> tuple[Any, ...]:
            like = next(model.parameters())
            cache = model.new_cache(batch, scale.cached, like, by)
            last = torch.tensor([scale.cached - 1], device=device)
            return tokens(model, by, batch, 1), last, cache

        return inputs

    def prefill(model: Decoder, by: torch.Generator) -> tuple[Any, ...]:
        return tokens(model, by, 1, scale.prompt), torch.arange(scale.prompt, device=device)

    def images(batch: int, labels: bool) -> Callable[[Any, torch.Generator], tuple[Any, ...]]:
        def inputs(model: Any, by: torch.Generator) -> tuple[Any, ...]:
            side = model.size.image
            x = torch.randn(batch, 3, side, side, generator=by, device=device).to(dtype)
            x = x.contiguous(memory_format=torch.channels_last)
            classes = torch.randint(model.size.classes, (batch,), generator=by, device=device)
            return (x, classes) if labels else (x,)

        return inputs

    first, second, third = scale.names

    def decoding(batch: int) -> Workload:
        name = f"decode, {batch} sequences, {scale.cached} tokens each"
        return Workload(first, name, decoder, decode(batch), "tokens", batch)

    fewest, *middle, most = scale.sequences
    yield decoding(fewest)
    yield decoding(most)
    name = f"prefill, {scale.prompt} tokens"
    yield Workload(first, name, decoder, prefill, "tokens", scale.prompt)
    batch = scale.train_images
    name = f"training step, {batch} images"
    yield Workload(second, name, vit, images(batch, True), "images", batch, train=True)
    batch = scale.images
    name = f"inference, {batch} images"
    yield Workload(third, name, resnet, images(batch, False), "images", batch)
    yield Workload(second, name, vit, images(batch, False), "images", batch)
    yield from map(decoding, middle)
