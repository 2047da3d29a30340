"""The packed layer on a CPU beside the dense one: `pytest tests/benchmarks/test_bench_cpu.py
--benchmark-enable` measures; without that option each case is only checked.

The target is at most 1.3 of the dense time from 256 rows up. Timing is no pass or fail here: a
busy machine would decide it.
"""

import pytest
import torch
from helpers import assert_no_worse_than_dense, randn, random_24
from torch import nn

from slimgemm import kernels, pruning
from slimgemm.sparse_ops import SparseConv2d24, SparseLinear24


def linear_pair(features):
    dense = nn.Linear(features, features)
    dense.weight.data = random_24(features, features)
    return dense, SparseLinear24.from_dense(dense)


@pytest.mark.parametrize("kind", ["dense", "packed"])
@pytest.mark.parametrize("rows", [256, 1024])
@pytest.mark.parametrize("features", [256, 1024, 4096])
def test_linear_forward(benchmark, features, rows, kind):
    if benchmark.disabled and features > 256:
        pytest.skip("large layers only with --benchmark-enable")
    dense, packed = linear_pair(features)
    x = randn(rows, features, seed=1)
    benchmark.group = f"linear forward, {features} features, {rows} rows, fp32"
    with torch.no_grad():
        got = benchmark(dense if kind == "dense" else packed, x)
        exact = x.double() @ dense.weight.double().t() + dense.bias.double()
        assert_no_worse_than_dense(got, dense(x), exact, kind)


@pytest.mark.parametrize("kind", ["dense", "packed"])
@pytest.mark.parametrize("features", [256, 1024])
def test_linear_training_step(benchmark, features, kind):
    if benchmark.disabled and features > 256:
        pytest.skip("large layers only with --benchmark-enable")
    dense, packed = linear_pair(features)
    layer = dense if kind == "dense" else packed
    x = randn(256, features, seed=1).requires_grad_()
    benchmark.group = f"linear forward and backward, {features} features, 256 rows, fp32"

    def step():
        x.grad = None
        layer(x).sum().backward()
        return x.grad

    exact = dense.weight.double().sum(0).expand(256, -1)
    expected = torch.ones(256, features) @ dense.weight
    assert_no_worse_than_dense(benchmark(step), expected.detach(), exact.detach(), kind)


@pytest.mark.parametrize("kind", ["dense", "packed"])
def test_conv_forward(benchmark, kind):
    dense = nn.Conv2d(64, 64, 3, padding=1)
    rows = random_24(64 * 9, 64).view(64, 3, 3, 64)
    dense.weight.data = rows.permute(0, 3, 1, 2).contiguous()
    packed = SparseConv2d24.from_dense(dense)
    x = randn(8, 64, 16, 16, seed=1)
    benchmark.group = "conv2d forward, 64 to 64 channels, 3x3, 8 images of 16x16, fp32"
    with torch.no_grad():
        got = benchmark(dense if kind == "dense" else packed, x)
        exact = nn.functional.conv2d(x.double(), dense.weight.double(), dense.bias.double(), 1, 1)
        assert_no_worse_than_dense(got, dense(x), exact, kind)


FEATURES = [256, 1024]


def weight_of(features, benchmark):
    if benchmark.disabled and features > 256:
        pytest.skip("large layers only with --benchmark-enable")
    return random_24(features, features, torch.float16)


@pytest.mark.parametrize("features", FEATURES)
def test_pack(benchmark, features):
    weight = weight_of(features, benchmark)
    benchmark.group = f"pack_24, {features} x {features}, fp16"
    assert torch.equal(kernels.unpack_24(benchmark(kernels.pack_24, weight)), weight)


@pytest.mark.parametrize("features", FEATURES)
def test_unpack(benchmark, features):
    weight = weight_of(features, benchmark)
    packed = kernels.pack_24(weight)
    benchmark.group = f"unpack_24, {features} x {features}, fp16"
    assert torch.equal(benchmark(kernels.unpack_24, packed), weight)


def make_mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256))


@pytest.mark.parametrize("score", [pruning.Magnitude(p=1), pruning.SparseGPT()], ids=["l1", "gpt"])
def test_plan(benchmark, score):
    model, x = make_mlp(), randn(64, 256, seed=1)
    benchmark.group = "plan of a 256-512-256 MLP, 2:4, 64 samples"

    def plan():
        return pruning.plan(
            model, x, pattern=pruning.NofM(keep=2, group=4), score=score, calibration=[x]
        )

    found = benchmark(plan)
    found.apply(model)
    for layer in (model[0], model[2]):
        groups = (layer.weight != 0).view(-1, 4).sum(1)
        assert int(groups.max()) == 2 and float(groups.float().mean()) > 1.9
