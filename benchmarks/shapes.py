"""Shapes that are measured: layers of architectures that are in use, with their names.

Sizes are from the models' published configurations: Llama-3 8B and 70B, Qwen2.5 7B and 14B (q, k
and v as one product, gate and up as one), ViT-L/16, BERT-base, ResNet-50, EfficientNet-B0.
"""

from __future__ import annotations

from typing import NamedTuple


class Linear(NamedTuple):
    """A linear layer: out features, in features."""

    name: str
    n: int
    k: int


class Conv(NamedTuple):
    """A convolution of square kernel and image; `image` is the side of its input."""

    name: str
    images: int
    channels_in: int
    channels_out: int
    image: int
    kernel: int
    stride: int = 1
    groups: int = 1

    @property
    def padding(self) -> int:
        """That keeps the image's size at stride 1."""
        return self.kernel // 2

    @property
    def out_image(self) -> int:
        """Side of the output."""
        return (self.image + 2 * self.padding - self.kernel) // self.stride + 1


class Train(NamedTuple):
    """A training product: rows of x, in features, out features."""

    name: str
    m: int
    k: int
    n: int


TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
LINEARS = (
    Linear("llama3-8b.qkv", 6144, 4096),
    Linear("llama3-8b.o", 4096, 4096),
    Linear("llama3-8b.gate_up", 28672, 4096),
    Linear("llama3-8b.down", 4096, 14336),
    Linear("llama3-70b.qkv", 10240, 8192),
    Linear("llama3-70b.o", 8192, 8192),
    Linear("llama3-70b.gate_up", 57344, 8192),
    Linear("llama3-70b.down", 8192, 28672),
    Linear("qwen2.5-7b.qkv", 4608, 3584),
    Linear("qwen2.5-7b.o", 3584, 3584),
    Linear("qwen2.5-7b.gate_up", 37888, 3584),
    Linear("qwen2.5-7b.down", 3584, 18944),
    Linear("qwen2.5-14b.qkv", 7168, 5120),
    Linear("qwen2.5-14b.o", 5120, 5120),
    Linear("qwen2.5-14b.gate_up", 27648, 5120),
    Linear("qwen2.5-14b.down", 5120, 13824),
    Linear("vit-l.qkv", 3072, 1024),
    Linear("vit-l.o", 1024, 1024),
    Linear("vit-l.fc1", 4096, 1024),
    Linear("vit-l.fc2", 1024, 4096),
    Linear("bert.qkv", 2304, 768),
    Linear("bert.o", 768, 768),
    Linear("bert.fc1", 3072, 768),
    Linear("bert.fc2", 768, 3072),
)
# The eight layers over which a geometric mean is given.
SPARSE_TENSOR_CORES = tuple(
    linear
    for linear in LINEARS
    if (linear.n, linear.k)
    in {
        (4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336),
        (37888, 3584), (3584, 18944), (8192, 8192), (57344, 8192),
    }
)  # fmt: skip
# The MLP of ViT-L at the 13008 rows for which others have published training times.
TRAINING = (Train("vit-l.fc1", 13008, 1024, 4096), Train("vit-l.fc2", 13008, 4096, 1024))

CONVS = (
    Conv("resnet50.stem", 32, 3, 64, 224, 7, 2),
    Conv("resnet50.layer1.1x1", 32, 64, 256, 56, 1),
    Conv("resnet50.layer1.3x3", 32, 64, 64, 56, 3),
    Conv("resnet50.layer2.3x3", 32, 128, 128, 28, 3),
    Conv("resnet50.layer2.3x3.stride2", 32, 128, 128, 56, 3, 2),
    Conv("resnet50.layer3.3x3", 32, 256, 256, 14, 3),
    Conv("resnet50.layer3.1x1", 32, 256, 1024, 14, 1),
    Conv("resnet50.layer4.3x3", 32, 512, 512, 7, 3),
    Conv("resnet50.layer4.1x1", 32, 512, 2048, 7, 1),
    Conv("efficientnet-b0.expand", 32, 40, 240, 28, 1),
    Conv("efficientnet-b0.project", 32, 240, 80, 14, 1),
    Conv("efficientnet-b0.expand5", 32, 112, 672, 14, 1),
    Conv("efficientnet-b0.project7", 32, 1152, 320, 7, 1),
    Conv("efficientnet-b0.head", 32, 320, 1280, 7, 1),
    Conv("efficientnet-b0.depthwise", 32, 240, 240, 28, 5, 1, 240),
)


def _resnet50() -> tuple[Conv, ...]:
    """Every distinct convolution of ResNet-50 at 224 x 224 pixels, in order.

    The stride of a stage is in its 3 x 3, as in torchvision.
    """
    found = [Conv("resnet50.stem", 32, 3, 64, 224, 7, 2)]
    for stage, (width, before, image) in enumerate(
        ((64, 64, 56), (128, 256, 56), (256, 512, 28), (512, 1024, 14)), 1
    ):
        name, stride = f"resnet50.layer{stage}", 1 if stage == 1 else 2
        out = image // stride
        found += [
            Conv(f"{name}.first", 32, before, width, image, 1),
            Conv(f"{name}.first3x3", 32, width, width, image, 3, stride),
            Conv(f"{name}.downsample", 32, before, 4 * width, image, 1, stride),
            Conv(f"{name}.expand", 32, width, 4 * width, out, 1),
            Conv(f"{name}.reduce", 32, 4 * width, width, out, 1),
            Conv(f"{name}.3x3", 32, width, width, out, 3),
        ]
    distinct: dict[tuple[object, ...], Conv] = {}
    for conv in found:
        distinct.setdefault(conv[1:], conv)
    return tuple(distinct.values())


RESNET50 = _resnet50()
# Share of channels kept, and whether the kept channels come in whole runs of 64 or anywhere.
CHANNEL_RATIOS = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)
CHANNEL_RUN = 64


class Shapes(NamedTuple):
    """What one run measures."""

    tokens: tuple[int, ...]
    linears: tuple[Linear, ...]
    training: tuple[Train, ...]
    convs: tuple[Conv, ...]
    ratios: tuple[float, ...]
    rounds: int


TINY_LINEARS = (Linear("tiny.square", 64, 64), Linear("tiny.odd", 48, 72))
TINY_CONVS = (Conv("tiny.3x3", 2, 16, 16, 8, 3), Conv("tiny.1x1.stride2", 2, 16, 32, 8, 1, 2))
SMALL_LINEARS = (Linear("vit-l.fc1", 4096, 1024), Linear("bert.o", 768, 768))
SETS = {
    # Everything: hours.
    "all": Shapes(TOKENS, LINEARS, TRAINING, CONVS, CHANNEL_RATIOS, 30),
    # The eight layers of the geometric mean at the token counts that matter: minutes.
    "main": Shapes(
        (1, 8, 16, 32, 64, 4096, 8192), SPARSE_TENSOR_CORES, TRAINING, CONVS[:9],
        CHANNEL_RATIOS, 30,
    ),
    # The part of it for which nine minutes leave time, the most telling first.
    "check": Shapes(
        (1, 64, 4096, 16, 8192, 8, 32), SPARSE_TENSOR_CORES, TRAINING[:1], (CONVS[2], CONVS[5]),
        (0.25, 0.5, 0.75), 20,
    ),
    # What a CPU does in minutes.
    "small": Shapes(
        (1, 16, 256), SMALL_LINEARS, (Train("vit-l.fc1, 1/32 of the rows", 408, 1024, 4096),),
        tuple(c._replace(images=2) for c in (CONVS[3], CONVS[6])), (0.25, 0.5, 0.75), 10,
    ),
    # What a test does in seconds.
    "tiny": Shapes(
        (1, 5), TINY_LINEARS, (Train("tiny", 24, 64, 48),), TINY_CONVS, (0.5,), 2
    ),
}  # fmt: skip


def shapes(name: str) -> Shapes:
    """The set of that name; ValueError if there is none."""
    if name not in SETS:
        raise ValueError(f"shapes must be one of {', '.join(SETS)}, got {name!r}")
    return SETS[name]
