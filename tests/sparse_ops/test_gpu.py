"""Modules and operators captured in a CUDA graph, forward and backward."""

import copy

import pytest
import torch
from helpers import assert_no_worse_than_dense, randn, random_24
from module_cases import MODULES
from torch import nn

from slimgemm.sparse_ops import SparseLinear24, compress, library

pytestmark = pytest.mark.gpu


def captured(run, warm_up):
    """(graph, what `run` returned in it); `warm_up` ran three times before, as torch asks."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            warm_up()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph, result


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_forward_and_backward_are_captured(name, dtype):
    make, shape = MODULES[name]
    module = make().cuda().to(dtype)
    x = randn(*shape, dtype=dtype, device="cuda").requires_grad_()
    leaves = [x, *module.parameters()]
    dy = torch.ones_like(module(x)).detach()

    def step():
        y = module(x)
        return y, *torch.autograd.grad(y, leaves, dy)

    graph, results = captured(step, step)
    with torch.no_grad():
        x.copy_(randn(*shape, dtype=dtype, seed=5, device="cuda"))
    graph.replay()
    torch.cuda.synchronize()
    for mine, again in zip(results, step(), strict=True):
        assert torch.equal(mine, again)
    exact = copy.deepcopy(module).double().to_dense()
    same = copy.deepcopy(module).to_dense()
    wide = x.detach().double().requires_grad_()
    narrow = x.detach().clone().requires_grad_()
    for layer, given in ((exact, wide), (same, narrow)):
        layer(given).backward(dy.to(given.dtype))
    for mine, theirs, best in zip(
        results[:2], (same(narrow), narrow.grad), (exact(wide), wide.grad), strict=True
    ):
        assert_no_worse_than_dense(mine.detach(), theirs.detach(), best.detach(), name)


@pytest.mark.parametrize("pattern", [(2, 4), (1, 8), (4, 8)], ids=str)
def test_the_gradient_of_unpack_is_captured_at_its_first_use(pattern):
    """Only the forward is warmed up: what the backward needs must not be copied from the host."""
    sparse = SparseLinear24(24, 6, keep=pattern[0], group=pattern[1], device="cuda")
    rest = sparse.packed[1:]
    d_dense = randn(6, 24, device="cuda")

    def forward():
        return library.unpack_24(sparse.values, *rest)

    graph, got = captured(lambda: torch.autograd.grad(forward(), sparse.values, d_dense), forward)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(got[0], library.gather_24(d_dense, sparse.values, *rest))


def test_compress_times_layers_in_graphs():
    dense = nn.Linear(64, 32, device="cuda", dtype=torch.float16)
    dense.weight.data = random_24(32, 64, torch.float16, device="cuda")
    (layer,) = compress(nn.Sequential(dense), randn(16, 64, device="cuda").half()).layers
    assert layer.timing == "graph" and layer.us_dense > 0 and layer.us_packed > 0
    assert layer.packed == (layer.us_packed <= layer.us_dense)
