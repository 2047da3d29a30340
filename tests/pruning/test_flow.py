"""Every operation that ties channels to their place is named in the reason."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from slimgemm import pruning

HALF = {"pattern": pruning.Channels(), "amount": pruning.Uniform(0.5)}


class Image(nn.Module):
    """A convolution of 8 channels over 4 x 4 pixels, an operation, and layers that it may use."""

    def __init__(self, operation):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), nn.Conv2d(2, 4, 1)
        self.line, self.scale = nn.Linear(4, 4), nn.Parameter(torch.randn(8, 1, 1))
        self.register_buffer("shift", torch.randn(8, 1, 1))
        self.plane = nn.Parameter(torch.randn(2, 4, 1, 1))
        self.operation = operation

    def forward(self, x):
        return self.operation(self, self.a(x))


IMAGE = {
    "computed convolution": (lambda m, y: F.conv2d(y, 2 * m.b.weight), "a: no rule for conv2d"),
    "computed product": (lambda m, y: F.linear(y, 2 * m.line.weight), "a: no rule for linear"),
    "pixels": (lambda m, y: m.line(y), "a: linear.*mixes another dimension"),
    "two dimensions": (
        lambda m, y: m.c(y.view(1, 2, 4, 16)),
        "a: its channels lie along several dimensions here",
    ),
    "pad": (lambda m, y: F.pad(y, (0, 0, 0, 0, 1, 1)), "a: pad.*pads its channels"),
    "mean of all": (lambda m, y: y + y.mean(), "a: mean.*reduces over its channels"),
    "buffer": (lambda m, y: m.b(y * m.shift), "a: mul.*meets a tensor of fixed size .shift is a"),
    "parameter of two dimensions": (
        lambda m, y: m.b((y.view(1, 2, 4, 4, 4) + m.plane).flatten(1, 2)),
        "a: add.*meets a tensor of fixed size .its channels lie along several dimensions here",
    ),
    "sum of products": (
        lambda m, y: y.flatten(2).mT @ y.flatten(2),
        "a: matmul.*sums over its channels",
    ),
    "unlike products": (
        lambda m, y: y.flatten(2).mT @ m.scale.flatten(1),
        "a: no rule for matmul",
    ),
}


@pytest.mark.parametrize("case", IMAGE)
def test_channels_of_an_image(case, normal):
    operation, match = IMAGE[case]
    with pytest.raises(ValueError, match=match):
        pruning.plan(Image(operation), normal(1, 3, 4, 4), **HALF)


@pytest.mark.parametrize(
    "operation",
    [
        lambda m, y: y * m.scale,
        lambda m, y: y * m.scale.flatten()[:, None, None],
        lambda m, y: torch.cat([y, m.scale.expand(1, -1, 4, 1)], 3),
    ],
    ids=["product", "another shape", "joined"],
)
def test_a_parameter_follows_the_channels_that_it_meets(operation, normal):
    model = Image(lambda m, y: m.b(operation(m, y)))
    scale = model.scale.detach().clone()
    pruning.plan(model, normal(1, 3, 4, 4), **HALF).apply(model)  # which proves the outputs
    assert torch.equal(model.scale, scale[model.a.kept_out.index]) and len(model.scale) == 4


def test_a_lone_channel_stays(normal):
    model = nn.Sequential(nn.Linear(4, 1), nn.Linear(1, 4), nn.Linear(4, 2))
    plan = pruning.plan(model, normal(2, 4), **HALF)
    assert plan["0"].refusal == "it is the only channel"
    assert plan["1"].kept_shape == (2, 1)


class Heads(nn.Module):
    """Four heads of two channels, `pairs` of keys and values, and an operation that attends."""

    def __init__(self, operation, pairs=4):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.o = nn.Linear(6, 8), nn.Linear(8, 3)
        self.k, self.v = nn.Linear(6, 2 * pairs), nn.Linear(6, 2 * pairs)
        self.register_buffer("bias", torch.randn(4, 5, 5))
        self.norm = nn.LayerNorm(2)
        self.operation = operation

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = (f(x).view(b, t, -1, 2).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.o(self.operation(self, q, k, v).transpose(1, 2).reshape(b, t, -1))


def attend(mask):
    return lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask(m))


HEADS = {
    "a mask for each head": (attend(lambda m: m.bias), "attention.*has a mask for each head"),
    "a product with fixed heads": (
        lambda m, q, k, v: m.bias.expand(2, -1, -1, -1) @ (q + k + v),
        "v: matmul.*meets heads of fixed number",
    ),
}


@pytest.mark.parametrize("case", HEADS)
def test_heads_of_fixed_number(case, normal):
    operation, match = HEADS[case]
    with pytest.raises(ValueError, match=match):
        pruning.plan(Heads(operation), normal(2, 5, 6), **HALF)


@pytest.mark.parametrize(
    "operation, pairs",
    [
        (attend(lambda m: m.bias[:1]), 4),
        (lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), 2),
        (lambda m, q, k, v: (q @ k.mT).softmax(-1) @ v, 4),
        (lambda m, q, k, v: (q.softmax(-1) @ (k / k.abs().amax(-1, True)).mT) @ v, 4),
        (lambda m, q, k, v: (m.norm(q) @ (k * k.mean(-1, True)).mT) @ v, 4),
        (lambda m, q, k, v: torch.cat([q[..., :2] @ k.mT, q[..., 2:]], -1) @ v, 4),
    ],
    ids=["one mask", "grouped", "products", "softmax in heads", "norms of heads", "an empty slice"],
)
def test_heads_go_whole(operation, pairs, normal):
    model = Heads(operation, pairs)
    plan = pruning.plan(model, normal(2, 5, 6), **HALF)
    plan.apply(model)  # which proves the outputs
    assert model.q.weight.shape == (4, 6) and model.v.weight.shape == (pairs, 6)
    kept = model.o.kept_in.index.view(-1, 2).tolist()
    assert len(kept) == 2 and all(a % 2 == 0 and b == a + 1 for a, b in kept)
