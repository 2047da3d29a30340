"""What a CUDA graph must be able to capture: no wait for the device, no copy from the host.

Here the launchers run on CPU tensors in Triton's interpreter, and a dispatch mode refuses what a
capture would; test_gpu.py captures on a GPU.
"""

import pytest
import torch
from helpers import assert_no_worse_than_dense, randn, random_24
from module_cases import MODULES
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from slimgemm.kernels import dispatch
from slimgemm.kernels.formats import PATTERNS, Packed24
from slimgemm.kernels.reference import gather_24_ref, pack_24_ref
from slimgemm.sparse_ops import library, library_channels, library_conv

aten = torch.ops.aten
# Reads of an element, results whose size depends on elements, tensors from data of the host.
REFUSED = {
    aten._local_scalar_dense,
    aten.equal,
    aten.is_nonzero,
    aten.nonzero,
    aten.masked_select,
    aten.unique_dim,
    aten.lift_fresh,
    aten.lift_fresh_copy,
}


class Capturing(TorchDispatchMode):
    """Refuses operators that wait for the device or copy from the host; counts the others."""

    def __init__(self):
        super().__init__()
        self.ran = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        copies = function.overloadpacket is aten._to_copy and kwargs.get("device") is not None
        indices = args[1] if function.overloadpacket in (aten.index, aten.index_put_) else ()
        masked = any(t is not None and t.dtype == torch.bool for t in indices)
        if function.overloadpacket in REFUSED or copies or masked:
            raise RuntimeError(f"{function} cannot be captured")
        self.ran.append(function.overloadpacket)
        return function(*args, **kwargs)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off where there is a GPU")
@pytest.mark.parametrize("name", MODULES)
def test_forward_and_backward_do_what_can_be_captured(name, monkeypatch):
    make, shape = MODULES[name]
    module, x = make(), randn(*shape).requires_grad_()
    leaves = [x, *module.parameters()]
    y = module(x)
    wanted = torch.autograd.grad(y, leaves, torch.ones_like(y))
    for ops in (library, library_channels, library_conv):
        monkeypatch.setattr(ops, "implementation", lambda op, device: dispatch.launcher(op))
    with Capturing() as mode:
        got = torch.autograd.grad(module(x), leaves, torch.ones_like(y))
    assert any("slimgemm" in str(op) for op in mode.ran)
    for mine, twin in zip(got, wanted, strict=True):
        assert_no_worse_than_dense(mine, twin, twin.double(), name)


@pytest.mark.parametrize("what", ["item", "tensor", "nonzero", "to"])
def test_the_mode_refuses_what_a_capture_does(what):
    x = torch.ones(3)
    act = {
        "item": lambda: x.sum().item(),
        "tensor": lambda: torch.tensor([0, 2, 4]),
        "nonzero": lambda: x[x > 0],
        "to": lambda: x.to("meta"),
    }[what]
    with pytest.raises(RuntimeError, match="cannot be captured"), Capturing():
        act()


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_the_gradient_of_unpack_makes_its_positions_on_the_gpu(pattern):
    """On fake CUDA tensors, which refuse to meet a table of the host."""
    dense = random_24(6, 24, keep=pattern[0], group=pattern[1])
    values, meta, *rest = pack_24_ref(dense, *pattern)
    with FakeTensorMode(), Capturing() as mode:
        fake_dense, fake_values, fake_meta = (
            torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in (dense, values, meta)
        )
        got = gather_24_ref(fake_dense, Packed24(fake_values, fake_meta, *rest))
    assert got.shape == values.shape and got.device.type == "cuda"
    assert aten.gather in mode.ran
