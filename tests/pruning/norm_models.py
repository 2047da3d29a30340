"""Small models with normalisations over their channels; every one is seeded and lively."""

import torch
import torch.nn.functional as F
from torch import nn


def lively(model):
    """No scale is 1 and no shift 0, so that a channel at the wrong place shows."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and not name.endswith("bias"):
            nn.init.normal_(parameter, 1.0, 0.3)
        elif parameter.ndim == 1 or parameter.ndim > 2:
            nn.init.normal_(parameter)
    return model.eval()


class Rms(nn.Module):
    """What transformers writes for nn.RMSNorm; `offset` 1 is its form in Gemma."""

    def __init__(self, width, offset=0.0):
        super().__init__()
        self.weight, self.eps, self.offset = nn.Parameter(torch.ones(width)), 1e-6, offset

    def forward(self, x):
        dtype = x.dtype
        x = x.float()
        variance = x.pow(2).mean(-1, keepdim=True)
        x = x * torch.rsqrt(variance + self.eps)
        return (self.offset + self.weight) * x.to(dtype)


class Norm2d(nn.LayerNorm):
    """Over the channels of an image, as torchvision writes it."""

    def forward(self, x):
        x = F.layer_norm(
            x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps
        )
        return x.permute(0, 3, 1, 2)


class Mlp(nn.Module):
    """Rows of 6 features, a residual stream of 16 channels with `norm` twice, 3 outputs."""

    def __init__(self, norm):
        super().__init__()
        self.stem, self.norm = nn.Linear(6, 16), norm
        self.up, self.down, self.head = nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 3)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        return self.head(self.norm(x))


class Image(nn.Module):
    """Images of 3 channels, `norm` over 16, 3 outputs."""

    def __init__(self, norm):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), norm
        self.mid, self.head = nn.Conv2d(16, 16, 1), nn.Linear(16, 3)

    def forward(self, x):
        return self.head(F.relu(self.mid(F.relu(self.norm(self.stem(x))))).mean((2, 3)))


class ConvNeXt(nn.Module):
    """Patches, a block with a layer scale of each form, norms in channels first and last."""

    def __init__(self):
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 16, 2, stride=2), Norm2d(16)
        self.depthwise, self.norm = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.scale = nn.Parameter(torch.ones(16))
        self.image_scale = nn.Parameter(torch.ones(16, 1, 1))
        self.head_norm, self.head = nn.LayerNorm(16), nn.Linear(16, 3)

    def forward(self, x):
        x = self.stem_norm(self.stem(x))
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.scale * self.down(F.gelu(self.up(y)))
        x = x + self.image_scale * y.permute(0, 3, 1, 2)
        return self.head(self.head_norm(x.mean((2, 3))))


class Block(nn.Module):
    """A transformer block of four heads, norms before the layers; `squares`: of the RMS kind."""

    def __init__(self, width, squares=False):
        super().__init__()
        self.size = width // 4
        norm = Rms if squares else nn.LayerNorm
        self.norm1, self.norm2 = norm(width), norm(width)
        self.qkv = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.o = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        b, t, _ = x.shape
        y = self.norm1(x)
        q, k, v = (f(y).view(b, t, -1, self.size).transpose(1, 2) for f in self.qkv)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, -1)
        x = x + self.o(y)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class ViT(nn.Module):
    """8 x 8 images in 4 patches of a class token, a position parameter, 2 blocks, 3 outputs."""

    def __init__(self, width=16):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.zeros(1, 5, width))
        self.blocks = nn.ModuleList([Block(width), Block(width, squares=True)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 3)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


def vit(width=16):
    torch.manual_seed(7)
    return lively(ViT(width))


ROWS, IMAGES = (4, 6), (2, 3, 8, 8)
# name -> (model, shape of its input)
MODELS = {
    "layer norm": (lambda: Mlp(nn.LayerNorm(16)), ROWS),
    "without a scale": (lambda: Mlp(nn.LayerNorm(16, elementwise_affine=False)), ROWS),
    "rms norm": (lambda: Mlp(nn.RMSNorm(16)), ROWS),
    "rms norm by hand": (lambda: Mlp(Rms(16)), ROWS),
    "rms norm of Gemma": (lambda: Mlp(Rms(16, 1.0)), ROWS),
    "groups": (lambda: Image(nn.GroupNorm(4, 16)), IMAGES),
    "one group": (lambda: Image(nn.GroupNorm(1, 16)), IMAGES),
    "a group each": (lambda: Image(nn.GroupNorm(16, 16)), IMAGES),
    "instance": (lambda: Image(nn.InstanceNorm2d(16, affine=True)), IMAGES),
    "instance without a scale": (lambda: Image(nn.InstanceNorm2d(16)), IMAGES),
    "images": (lambda: Image(Norm2d(16)), IMAGES),
    "ConvNeXt": (ConvNeXt, IMAGES),
    "ViT": (ViT, IMAGES),
}


def make(name):
    torch.manual_seed(8)
    return lively(MODELS[name][0]())
