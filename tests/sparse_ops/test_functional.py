"""torch.func over the modules: functional_call with other tensors, grad, vjp, jacrev, vmap."""

import copy

import pytest
import torch
from helpers import assert_no_worse_than_dense, randn
from torch import nn
from torch.func import functional_call, grad, jacrev, vjp, vmap

from slimgemm.sparse_ops import (
    ChannelConv2d,
    ChannelLinear,
    SparseConv2d24,
    SparseLinear24,
    library,
)

MODULES = {
    "linear_24": (lambda: SparseLinear24(16, 6, dtype=torch.float64), (3, 16)),
    "conv_24": (lambda: SparseConv2d24(8, 6, 3, padding=1, dtype=torch.float64), (2, 8, 4, 5)),
    "linear_channels": (
        lambda: ChannelLinear(8, 9, dtype=torch.float64, kept_in=[0, 2, 3, 6], kept_out=[1, 2, 5]),
        (3, 8),
    ),
    "conv_channels": (
        lambda: ChannelConv2d(8, 9, 3, dtype=torch.float64, kept_in=[0, 2, 3], kept_out=[1, 5]),
        (2, 8, 4, 5),
    ),
}  # fmt: skip
each_module = pytest.mark.parametrize("name", MODULES)
# torch has no batching rule for operators that others register: it calls them once per sample.
loops = pytest.mark.filterwarnings("ignore:There is a performance drop")


def module_and_input(name):
    make, shape = MODULES[name]
    torch.manual_seed(0)
    return make(), randn(*shape, dtype=torch.float64, seed=1)


def loss_of(module):
    return lambda parameters, x: functional_call(module, parameters, (x,)).sin().sum()


def own_gradients(module, x, loss):
    """Gradients of x and of each parameter, by torch.autograd."""
    x = x.clone().requires_grad_()
    named = {k: p.detach().clone().requires_grad_() for k, p in module.named_parameters()}
    grads = torch.autograd.grad(loss(named, x), [x, *named.values()])
    return grads[0], dict(zip(named, grads[1:], strict=True))


@each_module
def test_grad_is_that_of_autograd(name):
    module, x = module_and_input(name)
    loss, parameters = loss_of(module), dict(module.named_parameters())
    dx, wanted = own_gradients(module, x, loss)
    got, got_x = grad(loss, argnums=(0, 1))(parameters, x)
    assert got.keys() == wanted.keys() and torch.equal(got_x, dx)
    assert all(torch.equal(got[key], wanted[key]) for key in wanted)
    y, pull = vjp(module, x)
    assert torch.equal(y, module(x)) and torch.equal(pull(y.cos())[0], dx)


@each_module
def test_second_derivatives(name):
    module, x = module_and_input(name)
    loss, parameters = loss_of(module), dict(module.named_parameters())
    twice = grad(lambda p, x: sum(g.sin().sum() for g in grad(loss)(p, x).values()))
    got = twice(parameters, x)
    leaves = {k: p.detach().clone().requires_grad_() for k, p in parameters.items()}
    first = torch.autograd.grad(loss(leaves, x), leaves.values(), create_graph=True)
    wanted = torch.autograd.grad(sum(g.sin().sum() for g in first), leaves.values())
    for mine, theirs in zip(got.values(), wanted, strict=True):
        assert mine.abs().max() > 0
        assert_no_worse_than_dense(mine, theirs, theirs, name)


@loops
@each_module
def test_gradients_per_sample(name):
    module, x = module_and_input(name)
    loss, parameters = loss_of(module), dict(module.named_parameters())
    got = vmap(grad(loss), in_dims=(None, 0))(parameters, x.unsqueeze(1))
    for i in range(len(x)):
        _, wanted = own_gradients(module, x[i : i + 1], loss)
        for key, gradient in wanted.items():
            assert_no_worse_than_dense(got[key][i], gradient, gradient, key)


@loops
def test_jacobian_is_the_weight():
    module, x = module_and_input("linear_24")
    weight = module.to_dense().weight.detach()
    assert torch.equal(jacrev(module)(x[0]), weight)
    assert torch.equal(vmap(jacrev(module))(x), weight.expand(3, -1, -1))


def test_arguments_by_name():
    module, _ = module_and_input("linear_24")
    rest = {"k": 16, "keep": 2, "group": 4}
    got = grad(lambda v: library.unpack_24(v, meta=module.meta, **rest).sin().sum())(module.values)
    assert torch.equal(got, module.values.cos())


def test_an_operator_called_by_its_torch_name_is_refused():
    module, _ = module_and_input("linear_24")
    with pytest.raises(RuntimeError, match="must override the setup_context staticmethod"):
        grad(lambda v: torch.ops.slimgemm.unpack_24(v, module.meta, 16, 2, 4).sum())(module.values)


@loops
def test_functional_call_and_vmap():
    sparse, x = SparseLinear24(20, 6), randn(3, 4, 20)
    doubled = {name: 2 * t for name, t in sparse.named_parameters()}
    assert torch.equal(functional_call(sparse, doubled, (x,)), 2 * sparse(x))
    state = sparse.state_dict()
    assert torch.equal(functional_call(sparse, state, (x,)), sparse(x))
    assert torch.equal(vmap(sparse)(x), torch.stack([sparse(part) for part in x]))


# ---- functional_call with other indices

INS = [0, 2, 3, 6]
PAIRS = {
    "linear": (ChannelLinear, (8, 9), (3, 8)),
    "conv": (ChannelConv2d, (8, 9, 2), (3, 8, 4, 4)),
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("other", [[0, 1, 2, 3], [0, 2, 5, 7]], ids=["range", "ragged"])
@pytest.mark.parametrize("own", [[0, 1, 2, 3], INS], ids=["own_range", "own_ragged"])
def test_functional_call_takes_other_indices(own, other, name):
    kind, sizes, shape = PAIRS[name]
    first = kind(*sizes, kept_in=own, kept_out=[1, 2, 5, 8])
    second = kind(*sizes, kept_in=other, kept_out=other)
    x = randn(*shape, seed=1)
    want, mine = second(x), first(x)
    for _ in range(2):
        assert torch.equal(functional_call(first, second.state_dict(), (x,)), want)
    same = {key: t.clone() for key, t in first.state_dict().items()}
    assert torch.equal(functional_call(first, same, (x,)), mine)
    assert torch.equal(first(x), mine)
    assert torch.equal(copy.deepcopy(first).double().float()(x), mine)
    assert torch.equal(
        functional_call(
            nn.Sequential(first), {f"0.{key}": t for key, t in second.state_dict().items()}, (x,)
        ),
        want,
    )


BAD_INDEX = {
    "negative": ([-1, 2, 3, 6], r"in_index must be in 0\.\.7, got -1 at place 0"),
    "outside": ([0, 2, 3, 8], r"in_index must be in 0\.\.7, got 8 at place 3"),
    "unsorted": ([0, 3, 2, 6], "in_index must be ascending without repeats, got 2 after 3"),
    "dtype": ([0.0, 2.0, 3.0, 6.0], "in_index must be int64 of one dimension, got torch.float32"),
    "size": ([0, 2, 3], "in_index must keep 4 channels as the weight, got 3"),
}


@pytest.mark.parametrize(("index", "text"), BAD_INDEX.values(), ids=BAD_INDEX)
def test_functional_call_refuses_a_bad_index(index, text):
    module, x = ChannelLinear(8, 9, kept_in=INS), randn(1, 8)
    before = module(x)
    with pytest.raises(ValueError, match=text):
        functional_call(module, module.state_dict() | {"in_index": torch.tensor(index)}, (x,))
    assert torch.equal(module(x), before)


@loops
def test_an_index_of_vmap_cannot_be_read_and_is_refused():
    module, x = ChannelLinear(8, 9, kept_in=INS), randn(1, 8)
    stacked = {key: torch.stack([t, t]) for key, t in module.state_dict().items()}
    with pytest.raises(ValueError, match="in_index was replaced by a tensor that cannot be read"):
        vmap(lambda state: functional_call(module, state, (x,)))(stacked)
    del stacked["in_index"]
    got = vmap(lambda state: functional_call(module, state, (x,)))(stacked)
    assert torch.equal(got, module(x).expand(2, -1, -1))
