"""The 2:4 operators of torch: opcheck, gradients in float64, compilation, refusals, autocast."""

import functools
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_no_worse_than_dense, randn, random_24

from slimgemm.kernels.formats import PATTERNS, Packed24
from slimgemm.kernels.reference import ACTIVATIONS, gather_24_ref, pack_24_ref, unpack_24_ref
from slimgemm.sparse_ops import library

N, K = 6, 12  # K pads to 16
each_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: f"{p[0]}:{p[1]}")


def parts(dtype=torch.float64, pattern=(2, 4), n=N, k=K, device="cpu"):
    """x, dy, values, meta, bias, scale of one product; all floating ones require gradients."""
    packed = pack_24_ref(random_24(n, k, dtype, *pattern, seed=1, device=device), *pattern)
    tensors = (
        randn(3, 2, k, dtype=dtype, seed=2, device=device),
        randn(3, 2, n, dtype=dtype, seed=3, device=device),
        packed.values,
        packed.meta,
        randn(n, dtype=dtype, seed=4, device=device),
        randn(n, dtype=dtype, seed=5, device=device),
    )
    return [t.requires_grad_(t.is_floating_point()) for t in tensors]


def calls(dtype=torch.float64, pattern=(2, 4), act="gelu", device="cpu"):
    """operator -> arguments"""
    x, dy, values, meta, bias, scale = parts(dtype, pattern, device=device)
    rest = (K, *pattern)
    dense = random_24(N, K, dtype, *pattern, seed=6, device=device).requires_grad_()
    return {
        "spmm_24": (x, values, meta, bias, scale, *rest, act),
        "spmm_24_dgrad": (dy, values, meta, *rest),
        "spmm_24_wgrad": (dy, x, values, meta, *rest),
        "gather_24": (dense, values, meta, *rest),
        "unpack_24": (values, meta, *rest),
        "pack_24": (dense, *pattern),
        "prune_24": (dense, *pattern),
    }


OPS = tuple(calls())
each_op = pytest.mark.parametrize("op", OPS)


# ---- contract


@each_op
def test_opcheck(op, device):
    args = calls(torch.float32, device=device)[op]
    results = torch.library.opcheck(getattr(torch.ops.slimgemm, op).default, args)
    assert results and set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("missing", ["bias", "scale", "both"])
def test_opcheck_without_bias_or_scale(missing, device):
    x, values, meta, bias, scale, *rest = calls(torch.float32, device=device)["spmm_24"]
    bias = None if missing in ("bias", "both") else bias
    scale = None if missing in ("scale", "both") else scale
    args = (x, values, meta, bias, scale, *rest)
    results = torch.library.opcheck(torch.ops.slimgemm.spmm_24.default, args)
    assert set(results.values()) == {"SUCCESS"}


def test_opcheck_of_strided_and_empty_inputs(device):
    x, values, meta, bias, _, *rest = calls(torch.float32, device=device)["spmm_24"]
    for other in (x.transpose(0, 1).detach().requires_grad_(), x[:0].detach().requires_grad_()):
        args = (other, values, meta, bias, None, *rest)
        results = torch.library.opcheck(torch.ops.slimgemm.spmm_24.default, args)
        assert set(results.values()) == {"SUCCESS"}


@each_op
def test_meta_tensors_give_the_shapes_of_the_real_ones(op):
    args = calls(torch.float32)[op]
    real = getattr(library, op)(*args)
    fake = getattr(library, op)(*(a.to("meta") if torch.is_tensor(a) else a for a in args))
    real, fake = ((t,) if torch.is_tensor(t) else t for t in (real, fake))
    for a, b in zip(real, fake, strict=True):
        assert b.is_meta and (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


# ---- values


@each_pattern
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_gradients_of_every_input_against_dense(act, pattern, device):
    """fp32 gradients of x, values, bias and scale, with torch's own dense layer as judge."""
    x, dy, values, meta, bias, scale = parts(torch.float32, pattern, device=device)
    packed = Packed24(values.detach(), meta, K, *pattern)
    y = library.spmm_24(x, values, meta, bias, scale, K, *pattern, act)
    got = torch.autograd.grad(y, (x, values, bias, scale), dy.detach())
    both = []
    for dtype in (torch.float32, torch.float64):
        leaves = [
            t.detach().to(dtype).requires_grad_() for t in (x, unpack_24_ref(packed), bias, scale)
        ]
        z = F.linear(leaves[0], leaves[1]) * leaves[3] + leaves[2]
        out = {
            "none": z, "relu": F.relu(z), "gelu": F.gelu(z), "silu": F.silu(z),
            "gelu_tanh": F.gelu(z, approximate="tanh"), "relu2": F.relu(z) ** 2,
        }[act]  # fmt: skip
        dx, dw, db, ds = torch.autograd.grad(out, leaves, dy.detach().to(dtype))
        both.append((out.detach(), dx, gather_24_ref(dw, packed), db, ds))
    names = ("y", "dx", "dvalues", "dbias", "dscale")
    for name, mine, dense, exact in zip(names, (y.detach(), *got), *both, strict=True):
        assert_no_worse_than_dense(mine, dense, exact, f"{act} {name}")


@each_op
def test_gradcheck_and_gradgradcheck(op):
    """float64; pack_24 and prune_24 only where a small step keeps the same positions."""
    args = calls(act="silu")[op]
    function = getattr(library, op)
    if op in ("pack_24", "prune_24"):
        # A step of a dropped weight is not 2:4 any more: move the kept ones only.
        dense, *pattern = args
        kept = (dense != 0).detach()

        def function(w):
            return getattr(library, op)(w * kept, *pattern)[0]

        args = (dense,)
    if op in ("spmm_24_wgrad", "gather_24"):
        # Only the shape of values is used.
        args = tuple(a.detach() if a is args[1 if op == "gather_24" else 2] else a for a in args)
    assert torch.autograd.gradcheck(function, args)
    assert torch.autograd.gradgradcheck(function, args, fast_mode=True)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_second_derivatives_of_every_activation(act):
    x, values, meta, bias, scale, *rest = calls(act=act)["spmm_24"]
    run = lambda *t: library.spmm_24(t[0], t[1], meta, t[2], t[3], *rest)  # noqa: E731
    assert torch.autograd.gradgradcheck(run, (x, values, bias, scale), fast_mode=True)


def test_needless_gradients_are_not_made(monkeypatch):
    ran = []
    for name in ("_dgrad", "_wgrad"):
        op = getattr(library, f"spmm_24{name}")

        def noted(*args, op=op, name=name):
            ran.append(name)
            return op(*args)

        monkeypatch.setattr(library, f"spmm_24{name}", noted)
    x, values, meta, bias, _, *rest = calls(act="none")["spmm_24"]
    library.spmm_24(x.detach(), values, meta, bias, None, *rest).sum().backward()
    assert ran == ["_wgrad"] and x.grad is None
    library.spmm_24(x, values.detach(), meta, bias, None, *rest).sum().backward()
    assert ran == ["_wgrad", "_dgrad"]
    assert torch.equal(bias.grad, torch.full_like(bias, 12.0))  # two passes of six rows


def test_gradients_have_the_dtypes_of_their_inputs(device):
    x, _, values, meta, bias, scale = parts(torch.float16, device=device)
    bias, scale = (t.detach().float().requires_grad_() for t in (bias, scale))
    y = library.spmm_24(x, values, meta, bias, scale, K, 2, 4, "relu")
    y.sum().backward()
    assert y.dtype == torch.float16
    for t in (x, values, bias, scale):
        assert t.grad.dtype == t.dtype and t.grad.shape == t.shape and t.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 6, 20), (3, 0, 20), (3, 6, 0)], ids=str)
def test_gradients_of_empty_products(shape, device):
    m, n, k = shape
    x, w = torch.zeros(m, k, device=device), torch.zeros(n, k, device=device)
    packed = pack_24_ref(w)
    leaves = [x, packed.values, torch.ones(n, device=device), torch.ones(n, device=device)]
    x, values, bias, scale = (t.requires_grad_() for t in leaves)
    library.spmm_24(x, values, packed.meta, bias, scale, k, 2, 4, "gelu").sum().backward()
    assert [t.grad.shape for t in leaves] == [t.shape for t in leaves]


# ---- autocast


def test_autocast_does_not_reach_into_an_operator():
    """Without this, the twin's own F.linear is cast, and the result is not what fake says."""
    x, dy, values, meta, bias, _ = (t.detach() for t in parts(torch.float32))
    rest = (K, 2, 4)
    plain = library.spmm_24(x, values, meta, bias, None, *rest, "none")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(library.spmm_24(x, values, meta, bias, None, *rest, "none"), plain)
        assert library.spmm_24_dgrad(dy, values, meta, *rest).dtype == torch.float32
        assert library.spmm_24_wgrad(dy, x, values, meta, *rest).dtype == torch.float32


def test_backward_inside_autocast():
    x, dy, values, meta, bias, _ = parts(torch.float32)
    grads = []
    for enabled in (False, True):
        y = library.spmm_24(x, values, meta, bias, None, K, 2, 4, "silu")
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            grads.append(torch.autograd.grad(y, (x, values, bias), dy.detach()))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


# ---- torch.compile


def trained_step(x, values, meta, bias):
    y = library.spmm_24(x, values, meta, bias, None, K, 2, 4, "gelu")
    return torch.sin(y).sum()


def compare_compiled(backend, dynamic):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(trained_step, fullgraph=True, backend=backend, dynamic=dynamic)
    _, _, values, meta, bias, _ = parts(torch.float32)
    for rows in (4, 7, 9):
        x = randn(rows, K, seed=rows).requires_grad_()
        want = torch.autograd.grad(trained_step(x, values, meta, bias), (x, values, bias))
        got = torch.autograd.grad(compiled(x, values, meta, bias), (x, values, bias))
        args = [t.detach().double() for t in (x, values, bias)]
        leaves = [t.requires_grad_() for t in args]
        exact = torch.autograd.grad(
            trained_step(leaves[0], leaves[1], meta, leaves[2]), tuple(leaves)
        )
        for name, mine, eager, truth in zip("xvb", got, want, exact, strict=True):
            assert_no_worse_than_dense(mine, eager, truth, f"{backend} {rows} {name}")
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_compiles_without_a_graph_break():
    compare_compiled("aot_eager", None)


def test_dynamic_shapes_compile_once():
    assert compare_compiled("aot_eager", True) == 1


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler (g++) for inductor")
def test_compiles_with_inductor():
    """In a fresh process: inductor needs setuptools to be imported before anybody's distutils."""
    here = pathlib.Path(__file__).parent
    code = "import test_library; assert test_library.compare_compiled('inductor', True) == 1"
    path = os.pathsep.join(map(str, (here, here.parent)))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


# ---- refusals, on real tensors and when traced


def refused():
    x, dy, values, meta, bias, scale = (t.detach() for t in parts(torch.float32))
    rest = (K, 2, 4)
    spmm = functools.partial(library.spmm_24)
    return {
        "x_columns": (spmm, (x[..., 1:], values, meta, bias, None, *rest, "none"), r"\.\.\., 12\]"),
        "x_dtype": (spmm, (x.half(), values, meta, bias, None, *rest, "none"), "x must be torch.f"),
        "bias": (spmm, (x, values, meta, bias[:1], None, *rest, "none"), r"bias must be .*\[6\]"),
        "bias_rows": (spmm, (x, values, meta, dy, None, *rest, "none"), r"bias must be .*\[6\]"),
        "scale": (spmm, (x, values, meta, None, scale[1:], *rest, "none"), "scale must be"),
        "act": (spmm, (x, values, meta, bias, None, *rest, "tanh"), "act must be one of none"),
        "k": (spmm, (x, values, meta, bias, None, 30, 2, 4, "none"), r"values must be \[6, 16\]"),
        "pattern": (spmm, (x, values, meta, bias, None, K, 3, 4, "none"), "keep:group must be one"),
        "meta": (spmm, (x, values, meta[1:], bias, None, *rest, "none"), r"meta must be uint8"),
        "dgrad": (library.spmm_24_dgrad, (dy[..., 1:], values, meta, *rest), "dy must be"),
        "wgrad": (library.spmm_24_wgrad, (dy, x[..., 1:], values, meta, *rest), "x must be"),
        "rows": (library.spmm_24_wgrad, (dy[1:], x, values, meta, *rest), "same leading shape"),
        "unpack": (library.unpack_24, (values, meta, 99, 2, 4), "values must be"),
        "pack_rank": (library.pack_24, (x, 2, 4), r"weight must be a floating matrix"),
        "pack_pattern": (library.prune_24, (dy[0], 2, 6), "keep:group must be one of"),
    }


@pytest.mark.parametrize("where", ["cpu", "meta"])
@pytest.mark.parametrize("name", refused())
def test_refusals(name, where):
    op, args, text = refused()[name]
    args = [a.to(where) if torch.is_tensor(a) else a for a in args]
    with pytest.raises(ValueError, match=text):
        op(*args)


def test_a_weight_that_is_not_24_is_refused_by_place():
    dense = random_24(4, 16, seed=1)
    dense[2, 4:7] = 1.0
    dense[3, 8:12] = 1.0
    text = r"weight is not 2:4: row 2, columns 4-7 hold [34] nonzeros \(2 such groups in all\)"
    with pytest.raises(ValueError, match=text):
        library.pack_24(dense, 2, 4)
