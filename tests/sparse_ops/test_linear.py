"""SparseLinear24: everything that torch does to nn.Linear, done to it."""

import copy
import warnings

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from helpers import assert_no_worse_than_dense, randn, random_24
from torch import nn

from slimgemm.kernels.formats import PATTERNS
from slimgemm.kernels.reference import gather_24_ref, pack_24_ref, prune_dense_24_ref
from slimgemm.sparse_ops import SparseConv2d24, SparseLinear24

each_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: f"{p[0]}:{p[1]}")


def dense_linear(n=6, k=20, bias=True, dtype=torch.float32, pattern=(2, 4), seed=1, device="cpu"):
    linear = nn.Linear(k, n, bias=bias, device=device, dtype=dtype)
    linear.weight.data = random_24(n, k, dtype, *pattern, seed=seed, device=device)
    if bias:
        linear.bias.data = randn(n, dtype=dtype, seed=seed + 1, device=device)
    return linear


def step(module, x, dy):
    """y, dx, dW at the kept positions (or dvalues), db of one pass."""
    x = x.clone().requires_grad_()
    module.zero_grad()
    y = module(x)
    y.backward(dy.to(y.dtype))
    weight = module.values if isinstance(module, SparseLinear24) else module.weight
    grads = [x.grad, weight.grad, None if module.bias is None else module.bias.grad]
    return [y.detach(), *[None if g is None else g.clone() for g in grads]]


def assert_like_dense(sparse, linear, x):
    dy = randn(*x.shape[:-1], linear.out_features, dtype=x.dtype, seed=9, device=x.device)
    got, dense = step(sparse, x, dy), step(linear, x, dy)
    exact = step(copy.deepcopy(linear).double(), x.double(), dy.double())
    for result in (dense, exact):
        result[1 + 1] = gather_24_ref(result[2], sparse.packed)
    for name, mine, theirs, truth in zip(("y", "dx", "dv", "db"), got, dense, exact, strict=True):
        if theirs is None:
            assert mine is None
        else:
            assert_no_worse_than_dense(mine, theirs, truth, name)


# ---- construction


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_a_new_module_holds_the_pruned_weights_of_a_new_linear(dtype, bias):
    torch.manual_seed(3)
    linear = nn.Linear(20, 6, bias, dtype=dtype)
    torch.manual_seed(3)
    sparse = SparseLinear24(20, 6, bias, dtype=dtype)
    assert torch.equal(sparse.to_dense().weight, prune_dense_24_ref(linear.weight.detach()))
    assert (sparse.bias is None) == (not bias)
    assert not bias or torch.equal(sparse.bias, linear.bias)
    assert sparse.values.requires_grad and sparse.training


def test_constructor_takes_what_linear_takes():
    for args, kwargs in (
        ((8, 4, True, "meta", torch.float16), {}),
        ((8, 4), {"bias": False, "device": "meta", "dtype": torch.bfloat16}),
        ((), {"in_features": 8, "out_features": 4, "device": torch.device("meta")}),
    ):
        linear, sparse = nn.Linear(*args, **kwargs), SparseLinear24(*args, **kwargs)
        assert sparse.values.is_meta and sparse.meta.is_meta
        assert sparse.values.dtype == linear.weight.dtype
        assert (sparse.bias is None) == (linear.bias is None)
        assert sparse(torch.empty(2, 8, device="meta", dtype=linear.weight.dtype)).shape == (2, 4)
    with torch.device("meta"):
        assert SparseLinear24(8, 4).values.is_meta
    with pytest.raises(ValueError, match=r"keep:group must be one of 2:4, .* got 3:4"):
        SparseLinear24(8, 4, keep=3)


def test_a_module_made_on_meta_is_initialised_later():
    sparse = SparseLinear24(20, 6, device="meta").to_empty(device="cpu")
    torch.manual_seed(3)
    sparse.reset_parameters()
    torch.manual_seed(3)
    assert torch.equal(sparse.values, SparseLinear24(20, 6).values)


@pytest.mark.parametrize("sizes", [(0, 3), (3, 0), (0, 0)], ids=str)
def test_sizes_of_zero_do_what_linear_does(sizes):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "Initializing zero-element tensors is a no-op"
        modules = [cls(*sizes) for cls in (nn.Linear, SparseLinear24)]
    modules[1].bias.data = modules[0].bias.data.clone()
    results = [step(m, torch.ones(2, sizes[0]), torch.ones(2, sizes[1])) for m in modules]
    for place in (0, 1, 3):
        assert torch.equal(results[0][place], results[1][place])
    assert results[1][2].shape == modules[1].values.shape


def test_repr_says_what_is_kept_and_the_bytes():
    text = repr(SparseLinear24(64, 32, dtype=torch.float16, keep=1))
    assert "in_features=64, out_features=32, bias=True" in text
    assert "kept 1 of 4, 1280 bytes (dense 4096)" in text


# ---- from and to dense


@each_pattern
@pytest.mark.parametrize("k", [20, 16, 3], ids="k={}".format)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_from_dense_and_back_is_exact(dtype, k, pattern, device):
    linear = dense_linear(5, k, dtype=dtype, pattern=pattern, device=device).eval()
    sparse = SparseLinear24.from_dense(linear, keep=pattern[0], group=pattern[1])
    back = sparse.to_dense()
    assert type(back) is nn.Linear and torch.equal(back.weight, linear.weight)
    assert sparse.bias is linear.bias and back.bias is linear.bias
    assert not sparse.training and not back.training
    assert (back.in_features, back.out_features) == (k, 5)


def test_from_dense_refuses_what_is_not_pruned_and_says_where():
    linear = dense_linear(8, 32)
    linear.weight.data[3, 8:11] = 1.0
    linear.weight.data[5, 28:32] = 1.0
    before = linear.weight.clone()
    text = r"weight is not 2:4: row 3, columns 8-11 hold [34] nonzeros \(2 such groups in all"
    with pytest.raises(ValueError, match=text):
        SparseLinear24.from_dense(linear)
    assert torch.equal(linear.weight, before)
    with pytest.raises(ValueError, match="keep:group must be one of"):
        SparseLinear24.from_dense(linear, keep=5)


def test_fp16_takes_five_eighths_less_than_dense_does():
    sparse = SparseLinear24(128, 64, bias=False, dtype=torch.float16)
    held = sum(t.nbytes for t in (*sparse.parameters(), *sparse.buffers()))
    assert held == sparse.packed.nbytes == 0.5625 * 64 * 128 * 2


def test_set_packed_takes_its_own_shape_only():
    sparse = SparseLinear24(20, 6)
    packed = pack_24_ref(random_24(6, 20, seed=4))
    sparse.values.requires_grad_(False)
    sparse.set_packed(packed)
    assert torch.equal(sparse.to_dense().weight, random_24(6, 20, seed=4))
    assert not sparse.values.requires_grad
    for wrong in (
        pack_24_ref(random_24(6, 18)),
        pack_24_ref(random_24(5, 20)),
        pack_24_ref(random_24(6, 20, keep=1), 1, 4),
    ):
        with pytest.raises(ValueError, match=r"packed weight must be \[6, 20\] at 2:4, got"):
            sparse.set_packed(wrong)
    with pytest.raises(ValueError, match="its positions are not ascending"):
        sparse.set_packed(packed._replace(meta=torch.zeros_like(packed.meta)))


# ---- forward and backward


SHAPES = {
    "matrix": (5, 20),
    "vector": (20,),
    "four_axes": (2, 3, 2, 20),
    "empty_batch": (0, 20),
    "empty_middle": (2, 0, 20),
}


@each_pattern
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_any_leading_shape(shape, pattern, device):
    linear = dense_linear(pattern=pattern, device=device)
    sparse = SparseLinear24.from_dense(linear, keep=pattern[0], group=pattern[1])
    assert_like_dense(sparse, linear, randn(*shape, seed=5, device=device))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_dtypes_and_no_bias(bias, dtype, device):
    if dtype == torch.float64 and device.type == "cuda":
        pytest.skip("no float64 kernel on a GPU")
    linear = dense_linear(dtype=dtype, bias=bias, device=device)
    sparse = SparseLinear24.from_dense(linear)
    assert_like_dense(sparse, linear, randn(4, 20, dtype=dtype, seed=5, device=device))


def test_strided_inputs():
    linear = dense_linear()
    sparse, x = SparseLinear24.from_dense(linear), randn(20, 5, seed=5)
    assert_like_dense(sparse, linear, x.t())
    assert_like_dense(sparse, linear, randn(1, 20).expand(7, 20))
    sparse.zero_grad()
    y = sparse(x.t())
    y.sum().backward()  # dy of stride 0
    assert torch.equal(sparse.bias.grad, torch.full((6,), 5.0))


def test_wrong_inputs_are_refused():
    sparse = SparseLinear24(20, 6)
    with pytest.raises(ValueError, match=r"x must be \[\.\.\., 20\] for a \[6, 20\] weight, got"):
        sparse(torch.zeros(3, 19))
    with pytest.raises(ValueError, match=r"x must be torch.float32 on cpu as the weight, got"):
        sparse(torch.zeros(3, 20).half())
    with pytest.raises(ValueError, match=r"x must be torch.float32 on cpu as the weight, got"):
        sparse(torch.zeros(3, 20, dtype=torch.int64))


def test_used_twice_in_one_graph():
    linear = dense_linear(20, 20)
    sparse, x = SparseLinear24.from_dense(linear), randn(4, 20, seed=5).requires_grad_()
    results = []
    for module, weight in ((sparse, sparse.values), (linear, linear.weight)):
        y = module(F.relu(module(x)))
        results.append(torch.autograd.grad(y.sum(), (x, weight, module.bias)))
    exact_linear, xd = copy.deepcopy(linear).double(), x.detach().double().requires_grad_()
    y = exact_linear(F.relu(exact_linear(xd)))
    exact = torch.autograd.grad(y.sum(), (xd, exact_linear.weight, exact_linear.bias))
    for place, (mine, dense, truth) in enumerate(zip(*results, exact, strict=True)):
        if place == 1:
            dense, truth = (gather_24_ref(t, sparse.packed) for t in (dense, truth))
        assert_no_worse_than_dense(mine, dense, truth, str(place))


def test_no_grad_and_frozen_parameters():
    sparse, x = SparseLinear24(20, 6), randn(3, 20)
    with torch.no_grad():
        assert not sparse(x).requires_grad
    with torch.inference_mode():
        assert sparse(x).is_inference()
    sparse.requires_grad_(False)
    assert not sparse(x).requires_grad
    x.requires_grad_()
    sparse(x).sum().backward()
    assert x.grad is not None and sparse.values.grad is None and sparse.bias.grad is None
    sparse.bias.requires_grad_()
    sparse(x.detach()).sum().backward()
    assert sparse.bias.grad is not None and sparse.values.grad is None


def test_frozen_weights_stay_frozen_from_and_to_dense():
    linear = dense_linear()
    linear.weight.requires_grad_(False)
    sparse = SparseLinear24.from_dense(linear)
    assert not sparse.values.requires_grad and sparse.bias.requires_grad
    assert not sparse.to_dense().weight.requires_grad


def test_training_keeps_the_pattern_and_follows_the_masked_dense_layer():
    linear = dense_linear(dtype=torch.float64)
    sparse, mask = SparseLinear24.from_dense(copy.deepcopy(linear)), linear.weight.detach() != 0
    meta = sparse.meta.clone()
    optimizers = [
        torch.optim.AdamW(m.parameters(), lr=0.1, weight_decay=0.1) for m in (linear, sparse)
    ]
    for seed in range(4):
        x = randn(8, 20, dtype=torch.float64, seed=seed)
        for module, optimizer in zip((linear, sparse), optimizers, strict=True):
            optimizer.zero_grad()
            module(x).square().mean().backward()
            if module is linear:
                linear.weight.grad *= mask
            optimizer.step()
            linear.weight.data *= mask
    assert torch.equal(sparse.meta, meta)
    trained = sparse.to_dense().weight.detach()
    assert not trained[~mask].any()
    assert_no_worse_than_dense(
        trained.float(), linear.weight.detach().float(), linear.weight.detach(), "weights"
    )


# ---- autocast


@pytest.mark.parametrize("kind", ["float32", "float64", "no_bias"])
def test_autocast_gives_the_dtype_that_linear_gives(kind):
    dtype = torch.float64 if kind == "float64" else torch.float32
    linear = dense_linear(dtype=dtype, bias=kind != "no_bias")
    sparse, x = SparseLinear24.from_dense(linear), randn(4, 20, dtype=dtype, seed=5)
    results = []
    for module in (sparse, linear):
        module.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            y = module(x)
        y.sum().backward()
        weight = module.values if module is sparse else module.weight
        results.append((y.detach(), weight.grad))
    exact = copy.deepcopy(linear).double()
    y = exact(x.double())
    exact.zero_grad()
    y.sum().backward()
    (mine, dv), (theirs, dw) = results
    assert_no_worse_than_dense(mine, theirs, y.detach(), "y")
    wanted = [gather_24_ref(t, sparse.packed) for t in (dw, exact.weight.grad)]
    if kind != "float64":
        wanted[0] = wanted[0].bfloat16().to(dtype)
        assert dv.dtype == torch.float32
        dv, wanted[0] = dv.bfloat16(), wanted[0].bfloat16()
    assert_no_worse_than_dense(dv, *wanted, "dvalues")


def test_autocast_does_not_take_integers():
    """Autocast casts floating tensors only; an index tensor is refused with it and without."""
    sparse = SparseLinear24(20, 6)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ValueError, match=r"x must be torch.bfloat16 .* got torch.int64"),
    ):
        sparse(torch.ones(3, 20, dtype=torch.int64))


# ---- moving and copying


@pytest.mark.parametrize(
    "move",
    [
        lambda m: m.half(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.double(),
        lambda m: m.to("cpu", torch.float16),
    ],
    ids=["half", "bfloat16", "double", "to"],
)
def test_dtype_moves_leave_the_metadata(move):
    linear = dense_linear()
    sparse = move(SparseLinear24.from_dense(copy.deepcopy(linear)))
    wanted = move(linear)
    assert sparse.meta.dtype == torch.uint8 and sparse.values.dtype == wanted.weight.dtype
    assert torch.equal(sparse.to_dense().weight, wanted.weight)
    assert_like_dense(sparse, wanted, randn(3, 20, dtype=wanted.weight.dtype))


def test_deepcopy_is_independent():
    sparse = SparseLinear24(20, 6)
    other = copy.deepcopy(sparse)
    other.values.data.zero_()
    other.meta.zero_()
    assert sparse.values.any() and sparse.meta.any()
    assert other.keep == sparse.keep and repr(other) == repr(sparse)


# ---- state dict


def test_state_dict_has_the_documented_keys():
    state = SparseLinear24(20, 6, dtype=torch.float16).state_dict()
    assert {k: (v.dtype, tuple(v.shape)) for k, v in state.items()} == {
        "values": (torch.float16, (6, 12)),
        "bias": (torch.float16, (6,)),
        "meta": (torch.uint8, (6, 3)),
    }
    assert set(SparseLinear24(20, 6, bias=False).state_dict()) == {"values", "meta"}


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
def test_state_dict_round_trip(assign):
    first, second = (nn.Sequential(SparseLinear24(20, 6)) for _ in range(2))
    result = second.load_state_dict(first.state_dict(), strict=True, assign=assign)
    assert not result.missing_keys and not result.unexpected_keys
    x = randn(3, 20)
    assert torch.equal(first(x), second(x))
    assert second[0].values.requires_grad


def test_strict_names_missing_and_unexpected_keys():
    sparse, state = SparseLinear24(20, 6), SparseLinear24(20, 6).state_dict()
    extra = state | {"weight": torch.zeros(6, 20)}
    del state["meta"]
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"meta\""):
        sparse.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"weight\""):
        sparse.load_state_dict(extra)


def damage(state, kind):
    if kind == "byte":
        state["meta"][4, 1] = 0b00_01_01_00
        return r"row 4, byte 1 \(weights 8-15\) is 0b00010100, its positions are not ascending"
    if kind == "dtype":
        state["meta"] = state["meta"].int()
        return r"meta must be uint8 \[6, 3\] .* got torch.int32"
    if kind == "shape":
        state["values"] = state["values"][:, :8].clone()
        return r"values must be \[6, 12\] for k=20 at 2:4, got \[6, 8\]"
    wide = SparseLinear24(24, 6).state_dict()
    state.update(values=wide["values"], meta=wide["meta"])
    return r"\d+ values lie past column 20: the weight is wider than the \[6, 20\]"


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not_strict"])
@pytest.mark.parametrize("kind", ["byte", "dtype", "shape", "wider"])
def test_damaged_state_is_refused_and_nothing_changes(kind, strict):
    model = nn.Sequential(SparseLinear24(20, 6))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    state = SparseLinear24(20, 6).state_dict()
    text = damage(state, kind)
    with pytest.raises(RuntimeError, match=text):
        model.load_state_dict({f"0.{name}": t for name, t in state.items()}, strict=strict)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


# ---- hooks, DDP, export


def test_hooks_on_gradients():
    sparse, seen = SparseLinear24(20, 6), []
    sparse.values.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    sparse.values.register_hook(lambda g: 2 * g)
    sparse(randn(3, 20)).sum().backward()
    assert len(seen) == 1 and torch.equal(seen[0], sparse.values.grad)
    plain = copy.deepcopy(sparse)
    plain.values.grad = None
    plain(randn(3, 20)).sum().backward()
    assert torch.equal(seen[0], 2 * plain.values.grad)


def ddp_worker(rank, path, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{path}", rank=rank, world_size=2
    )
    torch.manual_seed(5)  # the same modules in both processes
    linear = dense_linear(dtype=torch.float64)
    for kind, module in (("sparse", SparseLinear24.from_dense(linear)), ("dense", linear)):
        model = nn.parallel.DistributedDataParallel(copy.deepcopy(module))
        x = randn(4, 20, dtype=torch.float64, seed=rank)
        model(x).square().mean().backward()
        grads = {name: p.grad for name, p in model.module.named_parameters()}
        torch.save(grads, f"{results}/{kind}{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch without gloo")
def test_a_step_of_ddp_in_two_processes(tmp_path):
    mp.spawn(ddp_worker, (tmp_path / "rendezvous", tmp_path), nprocs=2)
    load = {k: torch.load(tmp_path / f"{k}.pt") for k in ("sparse0", "sparse1", "dense0")}
    packed = SparseLinear24.from_dense(dense_linear(dtype=torch.float64)).packed
    wanted = gather_24_ref(load["dense0"]["weight"], packed)
    for rank in "01":
        mine = load[f"sparse{rank}"]
        assert_no_worse_than_dense(mine["values"], wanted, wanted, "dvalues")
        assert_no_worse_than_dense(mine["bias"], *[load["dense0"]["bias"]] * 2, "db")


def test_export_of_a_model_that_holds_one():
    model = nn.Sequential(SparseLinear24(20, 6), nn.ReLU(), SparseLinear24(6, 3)).eval()
    x = randn(4, 20)
    rows = torch.export.Dim("rows")
    program = torch.export.export(model, (x,), dynamic_shapes=({0: rows},))
    for batch in (x, randn(7, 20, seed=2)):
        assert torch.equal(program.module()(batch), model(batch))
    assert set(program.state_dict) == set(model.state_dict())
    assert "slimgemm.spmm_24" in str(program.graph)


BARE = {
    "linear": (lambda: SparseLinear24(20, 6), (4, 20)),
    "conv": (lambda: SparseConv2d24(8, 6, 3), (2, 8, 4, 5)),
}


@pytest.mark.parametrize("name", BARE)
def test_a_bare_layer_is_exported_in_a_wrapping(name):
    """torch's GraphModule owns the name `meta`; the class docstring says to wrap the layer."""
    make, shape = BARE[name]
    sparse, x = make(), randn(*shape)
    program = torch.export.export(sparse, (x,))
    assert set(program.state_dict) == {"values", "bias", "meta"}
    with pytest.raises(KeyError, match="attribute 'meta' already exists"):
        program.module()
    wrapped = torch.export.export(nn.Sequential(sparse), (x,))
    assert torch.equal(wrapped.module()(x), sparse(x))


def test_compiled_module_trains_as_the_eager_one():
    torch._dynamo.reset()
    model = nn.Sequential(SparseLinear24(20, 6), nn.GELU())
    other, x = copy.deepcopy(model), randn(4, 20)
    model(x).sum().backward()
    torch.compile(other, backend="aot_eager", fullgraph=True)(x).sum().backward()
    for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)
