"""The 2:4 operators that torch sees: slimgemm::<op>, with fake, autograd and double backward.

A packed weight crosses the operator boundary as its parts: values, meta, k, keep, group. Each
operator's three products close over each other (the gradient of each is made of the other two),
so backward of any order works and no dense weight is made.

The functions of this module and of its two neighbours also work under torch.func: grad, vjp and
jacrev, and vmap, which calls an operator once per sample; jvp, jacfwd and hessian (forward mode)
are refused. torch.ops.slimgemm.<op> under torch.func has no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slimgemm.kernels.dispatch import implementation
from slimgemm.kernels.formats import Packed24, check_pattern, check_shapes, packed_shapes
from slimgemm.kernels.reference import (
    check_dense,
    check_epilogue_ref,
    check_product,
    check_same_rows,
    gather_24_ref,
)

LIBRARY = torch.library.Library("slimgemm", "FRAGMENT")
PATTERN = "int k, int keep, int group"


def define(schema: str, forward: Any, fake: Any, save: Any, backward: Any) -> Any:
    """Register one operator for every device, its fake and its gradient; returns its function.

    Args:
        save: setup_context of torch.library.register_autograd; backward: its backward.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema)

    def run(*args: Any) -> Any:
        # The twins are torch operators, which autocast would cast once more.
        kind = args[0].device.type
        if not torch.is_autocast_enabled(kind):
            return forward(*args)
        with torch.autocast(kind, enabled=False):
            return forward(*args)

    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"slimgemm::{name}", fake, lib=LIBRARY)
    torch.library.register_autograd(f"slimgemm::{name}", backward, setup_context=save, lib=LIBRARY)
    return differentiable(getattr(torch.ops.slimgemm, name).default, save, backward)


def differentiable(op: Any, save: Any, backward: Any) -> Any:
    """`op` as a function that torch.func's transforms take too.

    The gradient of torch.library.register_autograd has no setup_context of its own, which those
    refuse; an autograd.Function around the operator has. They find it here, outside the operator.
    """
    function: Any = type(
        f"Function_{op.name()}",
        (torch.autograd.Function,),
        {
            "generate_vmap_rule": True,
            "forward": staticmethod(lambda *args: op(*args)),
            "setup_context": staticmethod(save),
            "backward": staticmethod(backward),
        },
    )

    names = [argument.name for argument in op._schema.arguments]

    def call(*args: Any, **named: Any) -> Any:
        if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
            return op(*args, **named)
        # An autograd.Function takes no keywords.
        return function.apply(*args, *(named[name] for name in names[len(args) :]))

    return call


def act_backward(dy: Tensor, z: Tensor, act: str) -> Tensor:
    """Gradient with respect to z of act(z); each formula is differentiable."""
    if act == "relu":
        return torch.ops.aten.threshold_backward(dy, z, 0)
    if act in ("gelu", "gelu_tanh"):
        approximate = "tanh" if act == "gelu_tanh" else "none"
        return torch.ops.aten.gelu_backward(dy, z, approximate=approximate)
    if act == "silu":
        gate = torch.sigmoid(z)  # aten.silu_backward has no derivative of its own
        return dy * (gate * (1 + z * (1 - gate)))
    if act == "relu2":
        return dy * (2 * torch.relu(z))
    return dy


def sum_rows(t: Tensor, dtype: torch.dtype) -> Tensor:
    """[..., N] -> [N] in `dtype`, summed over all leading axes."""
    return (t.sum(tuple(range(t.ndim - 1))) if t.ndim > 1 else t).to(dtype)


# ---- spmm_24: act((x @ dense(w).T) * scale + bias)
def _spmm(
    x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None, scale: Tensor | None,
    k: int, keep: int, group: int, act: str,
) -> Tensor:  # fmt: skip
    w = Packed24(values, meta, k, keep, group)
    bias, scale = (t if t is None else t.contiguous() for t in (bias, scale))
    return implementation("spmm_24", x.device)(x, w, bias, scale, act).contiguous()


def _spmm_fake(x, values, meta, bias, scale, k, keep, group, act):
    check_product("x", x, k, Packed24(values, meta, k, keep, group))
    check_epilogue_ref(values.shape[0], x, bias, scale, act)
    return x.new_empty(*x.shape[:-1], values.shape[0])


def _spmm_save(ctx, inputs, output):
    x, values, meta, bias, scale, *ctx.pattern, ctx.act = inputs
    ctx.save_for_backward(x, values, meta, bias, scale)


def _spmm_backward(ctx, dy):
    """dz = act'(z) dy; dx = (dz * scale) W, dvalues = (dz * scale).T x at the kept positions.

    With an activation, z is computed again instead of being kept from the forward.
    """
    x, values, meta, bias, scale = ctx.saved_tensors
    need_x, need_values, _, need_bias, need_scale = ctx.needs_input_grad[:5]
    dz = dy
    if ctx.act != "none":
        z = spmm_24(x, values, meta, bias, scale, *ctx.pattern, "none")
        dz = act_backward(dy, z, ctx.act)
    dscale = None
    if need_scale:
        product = spmm_24(x, values, meta, None, None, *ctx.pattern, "none")
        dscale = sum_rows(dz * product, scale.dtype)
    du = dz if scale is None else dz * scale.to(dz.dtype)
    dx = spmm_24_dgrad(du, values, meta, *ctx.pattern) if need_x else None  # [M, N] @ [N, K]
    dv = spmm_24_wgrad(du, x, values, meta, *ctx.pattern) if need_values else None
    db = sum_rows(dz, bias.dtype) if need_bias else None
    return dx, dv, None, db, dscale, None, None, None, None  # meta: positions, no gradient


spmm_24 = define(
    "spmm_24(Tensor x, Tensor values, Tensor meta, Tensor? bias, Tensor? scale, "
    f"{PATTERN}, str act) -> Tensor",
    _spmm,
    _spmm_fake,
    _spmm_save,
    _spmm_backward,
)


# ---- spmm_24_dgrad: dy @ dense(w)
def _dgrad(dy: Tensor, values: Tensor, meta: Tensor, k: int, keep: int, group: int) -> Tensor:
    w = Packed24(values, meta, k, keep, group)
    return implementation("spmm_24_dgrad", dy.device)(dy, w).contiguous()


def _dgrad_fake(dy, values, meta, k, keep, group):
    check_product("dy", dy, values.shape[0], Packed24(values, meta, k, keep, group))
    return dy.new_empty(*dy.shape[:-1], k)


def _dgrad_save(ctx, inputs, output):
    dy, values, meta, *ctx.pattern = inputs
    ctx.save_for_backward(dy, values, meta)


def _dgrad_backward(ctx, g):
    """Of dx = dy W: d(dy) = g W.T, dvalues = dy.T g at the kept positions."""
    dy, values, meta = ctx.saved_tensors
    need_dy, need_values = ctx.needs_input_grad[:2]
    ddy = spmm_24(g, values, meta, None, None, *ctx.pattern, "none") if need_dy else None
    dv = spmm_24_wgrad(dy, g, values, meta, *ctx.pattern) if need_values else None
    return ddy, dv, None, None, None, None


spmm_24_dgrad = define(
    f"spmm_24_dgrad(Tensor dy, Tensor values, Tensor meta, {PATTERN}) -> Tensor",
    _dgrad,
    _dgrad_fake,
    _dgrad_save,
    _dgrad_backward,
)


# ---- spmm_24_wgrad: dy.T @ x at the kept positions
def _wgrad(
    dy: Tensor, x: Tensor, values: Tensor, meta: Tensor, k: int, keep: int, group: int
) -> Tensor:
    w = Packed24(values, meta, k, keep, group)
    return implementation("spmm_24_wgrad", dy.device)(dy, x, w)


def _wgrad_fake(dy, x, values, meta, k, keep, group):
    w = Packed24(values, meta, k, keep, group)
    check_product("dy", dy, values.shape[0], w)
    check_product("x", x, k, w)
    check_same_rows(dy, x)
    return torch.empty_like(values)


def _wgrad_save(ctx, inputs, output):
    dy, x, _, meta, *ctx.pattern = inputs
    ctx.save_for_backward(dy, x, meta)


def _wgrad_backward(ctx, g):
    """Of dv = (dy.T x) kept: with G the weight that packs g, d(dy) = x G.T and dx = dy G."""
    dy, x, meta = ctx.saved_tensors
    need_dy, need_x = ctx.needs_input_grad[:2]
    g = g.contiguous()
    ddy = spmm_24(x, g, meta, None, None, *ctx.pattern, "none") if need_dy else None
    dx = spmm_24_dgrad(dy, g, meta, *ctx.pattern) if need_x else None
    return ddy, dx, None, None, None, None, None  # values: only their shape was used


spmm_24_wgrad = define(
    f"spmm_24_wgrad(Tensor dy, Tensor x, Tensor values, Tensor meta, {PATTERN}) -> Tensor",
    _wgrad,
    _wgrad_fake,
    _wgrad_save,
    _wgrad_backward,
)


# ---- gather_24: the entries of a dense matrix at the kept positions
def _gather(dense: Tensor, values: Tensor, meta: Tensor, k: int, keep: int, group: int) -> Tensor:
    return gather_24_ref(dense, Packed24(values, meta, k, keep, group))


def _gather_fake(dense, values, meta, k, keep, group):
    return dense.new_empty(values.shape)


def _gather_save(ctx, inputs, output):
    _, _, meta, *ctx.pattern = inputs
    ctx.save_for_backward(meta)


def _gather_backward(ctx, g):
    """d(dense) holds g at the kept positions."""
    dense = unpack_24(g.contiguous(), ctx.saved_tensors[0], *ctx.pattern)
    return dense, None, None, None, None, None  # values: only their shape was used


gather_24 = define(
    f"gather_24(Tensor dense, Tensor values, Tensor meta, {PATTERN}) -> Tensor",
    _gather,
    _gather_fake,
    _gather_save,
    _gather_backward,
)


# ---- unpack_24: packed -> dense
def _unpack(values: Tensor, meta: Tensor, k: int, keep: int, group: int) -> Tensor:
    packed = Packed24(values, meta, k, keep, group)
    return implementation("unpack_24", values.device)(packed).contiguous()


def _unpack_fake(values, meta, k, keep, group):
    check_shapes(Packed24(values, meta, k, keep, group))
    return values.new_empty(values.shape[0], k)


def _unpack_save(ctx, inputs, output):
    values, meta, *ctx.pattern = inputs
    ctx.save_for_backward(values, meta)


def _unpack_backward(ctx, d_dense):
    """dvalues = the entries of the dense gradient at the kept positions."""
    values, meta = ctx.saved_tensors
    return gather_24(d_dense, values, meta, *ctx.pattern), None, None, None, None


unpack_24 = define(
    f"unpack_24(Tensor values, Tensor meta, {PATTERN}) -> Tensor",
    _unpack,
    _unpack_fake,
    _unpack_save,
    _unpack_backward,
)


# ---- pack_24 and prune_24: dense -> (values, meta)
def _pack(w: Tensor, keep: int, group: int) -> tuple[Tensor, Tensor]:
    packed = implementation("pack_24", w.device)(w, keep, group)
    return packed.values, packed.meta


def _prune(w: Tensor, keep: int, group: int) -> tuple[Tensor, Tensor]:
    packed = implementation("prune_24", w.device)(w, keep, group)
    return packed.values, packed.meta


def _pack_fake(w, keep, group):
    check_dense(w)
    check_pattern(keep, group)
    values, meta = packed_shapes(w.shape[0], w.shape[1], keep, group)
    return w.new_empty(values), w.new_empty(meta, dtype=torch.uint8)


def _pack_save(ctx, inputs, output):
    w, keep, group = inputs
    ctx.pattern = (w.shape[1], keep, group)
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _pack_backward(ctx, dvalues, _):
    """dW holds the gradient of each stored value in its place; dropped weights have none."""
    return unpack_24(dvalues.contiguous(), ctx.saved_tensors[0], *ctx.pattern), None, None


pack_24 = define(
    "pack_24(Tensor w, int keep, int group) -> (Tensor, Tensor)",
    _pack,
    _pack_fake,
    _pack_save,
    _pack_backward,
)
prune_24 = define(
    "prune_24(Tensor w, int keep, int group) -> (Tensor, Tensor)",
    _prune,
    _pack_fake,
    _pack_save,
    _pack_backward,
)
