"""What launchers keep between calls: the launchers themselves, their kernels on the executor."""

import types

import gluon_numpy
import pytest
import torch
from helpers import assert_no_worse_than_dense, randn, random_24

from slimgemm.kernels.build_operands import Operand
from slimgemm.kernels.gluon import mma_conv, mma_packed, plans, wgmma_packed, wgmma_sp
from slimgemm.kernels.gluon.launch import TmaView
from slimgemm.kernels.gluon.mma_packed_tiles import PackedTile
from slimgemm.kernels.reference import pack_24_ref, spmm_24_ref
from slimgemm.kernels.reference_conv import conv2d_24_ref, pack_conv_ref

DTYPE, N, K = torch.float16, 40, 96
TILE = PackedTile(1, 1, 1, 1, 1, 2, 2, 2)


def gpu(t):
    """`t` at a 16-byte aligned address, as a tensor that says it is on a GPU."""
    return None if t is None else t.as_subclass(Operand)


def on_gpu(w):
    return w._replace(values=gpu(w.values), meta=gpu(w.meta))


def plain(value):
    if isinstance(value, TmaView):
        return value._replace(tensor=value.tensor.as_subclass(torch.Tensor))
    return value.as_subclass(torch.Tensor) if isinstance(value, torch.Tensor) else value


class Executed:
    """A kernel whose launches run on NumPy; keeps their constants."""

    def __init__(self, kernel):
        self.kernel, self.launches = kernel, []

    def __getitem__(self, grid):
        def launch(*args, num_warps, **constants):
            self.launches.append((grid, args, constants))
            gluon_numpy.run(self.kernel, grid, *map(plain, args), **constants)

        return launch


@pytest.fixture(autouse=True)
def card(monkeypatch):
    """A Hopper GPU of 4 multiprocessors that runs on NumPy; no launcher has kept anything."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)  # as CPU tensors say
    for file in (mma_packed, mma_conv, wgmma_packed):
        monkeypatch.setattr(file, "multiprocessors", lambda device: 4)
        monkeypatch.setattr(file, "PLANS", plans.Plans())
    mma = Executed(mma_packed._mma_packed_kernel)
    monkeypatch.setattr(mma_packed, "_mma_packed_kernel", mma)
    monkeypatch.setattr(mma_conv, "_mma_packed_kernel", mma)
    wgmma = Executed(wgmma_sp._wgmma_sp_kernel)
    monkeypatch.setattr(wgmma_sp, "_wgmma_sp_kernel", wgmma)
    monkeypatch.setattr(wgmma_sp, "_descriptor", lambda view: view)
    monkeypatch.setattr(wgmma_sp, "ADDRESS_IS_GIVEN", True)
    return types.SimpleNamespace(mma=mma, wgmma=wgmma)


def linear_operands(seed, m=3):
    weight = pack_24_ref(random_24(N, K, DTYPE, seed=seed))
    return randn(m, K, dtype=DTYPE, seed=seed), weight, randn(N, seed=seed + 1)


def conv_operands(seed, m=3):
    rows = random_24(N * 9, 64, DTYPE, seed=seed).view(N, 3, 3, 64)
    weight = pack_conv_ref(rows.permute(0, 3, 1, 2))
    x = randn(1, 2, m, 64, dtype=DTYPE, seed=seed).permute(0, 3, 1, 2)
    return x, weight, randn(N, seed=seed + 1)


def linear(call, **options):
    def run(x, w, bias, act="relu"):
        return call(gpu(x), on_gpu(w), gpu(bias), None, act, **options)

    return run, lambda x, w, bias: spmm_24_ref(x, w, bias, None, "relu")


def convolved(**options):
    def run(x, w, bias, act="relu"):
        shape = [N, 64, 3, 3]  # a list, as operators give
        return mma_conv.conv2d_24_mma(
            gpu(x), on_gpu(w), shape, gpu(bias), 1, [1, 1, 1, 1], act=act, **options
        )

    return run, lambda x, w, bias: conv2d_24_ref(x, w, (N, 64, 3, 3), bias, 1, 1, act="relu")


LAUNCHERS = {
    "mma_packed": (mma_packed, linear_operands, *linear(mma_packed.spmm_24_mma_packed, tile=TILE)),
    "mma_packed split": (
        mma_packed, linear_operands, *linear(mma_packed.spmm_24_mma_packed, tile=TILE, splits=2),
    ),
    "mma_packed own tile": (
        mma_packed, linear_operands, *linear(mma_packed.spmm_24_mma_packed),
    ),
    "wgmma_packed": (
        wgmma_packed, linear_operands, *linear(wgmma_packed.spmm_24_wgmma_packed),
    ),
    "mma_conv": (mma_conv, conv_operands, *convolved(tile=TILE)),
    "mma_conv split": (mma_conv, conv_operands, *convolved(tile=TILE, splits=3)),
}  # fmt: skip


def wide(x, w, bias):
    return x.double(), w._replace(values=w.values.double()), bias.double()


@pytest.mark.parametrize("name", LAUNCHERS)
def test_later_calls_compute_with_their_own_operands(name, monkeypatch):
    file, operands, run, twin = LAUNCHERS[name]
    results = []
    for seed in (1, 2, 3):
        given = operands(seed)
        results.append(plain(run(*given)))
        assert_no_worse_than_dense(results[-1], twin(*given), twin(*wide(*given)), name)
        assert results[-1].stride() == twin(*given).stride()
        assert len(file.PLANS.kept) == 1
        # Nothing is checked and nothing worked out again.
        monkeypatch.setattr(file, "checked_plan", None)
    assert len({y.data_ptr() for y in results}) == 3
    assert not torch.equal(results[0], results[1])


@pytest.mark.parametrize("name", LAUNCHERS)
def test_another_act_bias_or_size_is_another_plan(name):
    file, operands, run, twin = LAUNCHERS[name]
    x, w, bias = operands(1)
    run(x, w, bias)
    without = plain(run(x, w, None))
    assert not torch.equal(without, plain(run(x, w, bias, "none")))
    assert (plain(run(x, w, bias, "none")) < 0).any() and len(file.PLANS.kept) == 3
    given = operands(5, m=4)
    got = plain(run(*given))
    assert_no_worse_than_dense(got, twin(*given), twin(*wide(*given)), name)
    assert len(file.PLANS.kept) == 4


def shifted(t):
    moved = torch.zeros(t.numel() + 1, dtype=t.dtype)[1:]
    return moved.view_as(t).copy_(t)


REFUSED = {
    "dtype of x": (lambda x, w, b: (x.float(), w, b), "x must be torch.float16"),
    "dtype of values": (
        lambda x, w, b: (x, w._replace(values=w.values.float()), b),
        "must be float16 or|x must be torch.float32",
    ),
    "address of values": (
        lambda x, w, b: (x, w._replace(values=shifted(w.values)), b), "16-byte aligned",
    ),
    "address of metadata": (
        lambda x, w, b: (x, w._replace(meta=shifted(w.meta)), b), "16-byte aligned",
    ),
    "strides of values": (
        lambda x, w, b: (x, w._replace(values=w.values.t().contiguous().t()), b), "row-major",
    ),
    "strides of metadata": (
        lambda x, w, b: (x, w._replace(meta=w.meta.t().contiguous().t()), b), "row-major",
    ),
    "shape of metadata": (lambda x, w, b: (x, w._replace(meta=w.meta[1:]), b), "meta must be"),
    "k": (lambda x, w, b: (x, w._replace(k=w.k - 1), b), "must be"),
    "pattern": (lambda x, w, b: (x, w._replace(keep=1), b), "values must be|keep:group must be"),
    "shape of bias": (lambda x, w, b: (x, w, b[1:]), "bias must be contiguous"),
    "strides of bias": (
        lambda x, w, b: (x, w, b.repeat_interleave(2)[::2]), "bias must be contiguous",
    ),
    "dtype of bias": (lambda x, w, b: (x, w, b.double()), "bias must be float16"),
}  # fmt: skip


@pytest.mark.parametrize("change", REFUSED)
@pytest.mark.parametrize("name", ["mma_packed", "wgmma_packed", "mma_conv"])
def test_what_is_refused_first_is_refused_after_a_good_call_too(name, change):
    _, operands, run, _ = LAUNCHERS[name]
    change, message = REFUSED[change]
    given = operands(1)
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            run(*change(*given))
        run(*given)
    with pytest.raises(ValueError, match="act must be one of"):
        run(*given, act="tanh")
    with pytest.raises(ValueError, match="x must be"):
        run(given[0][..., :-1, :].mT, *given[1:])


def test_rows_of_x_may_lie_anyhow():
    """A pitch, an odd address, leading axes of one element with odd strides."""
    x, w, bias = linear_operands(1, m=4)
    base = torch.zeros(4, 2 * K + 3, dtype=DTYPE)
    cases = [x, x.view(2, 2, K), x[:1], x.view(1, 4, 1, K)]
    for start in (0, 8, 3):
        cases.append(base[:, start : start + K].copy_(x).clone(memory_format=torch.preserve_format))
        pitched = torch.zeros(4, K + 11, dtype=DTYPE)[:, start : start + K]
        cases += [pitched.copy_(x), pitched[2:3]]
    cases.append(x[:1].as_strided((1, K), (7, 1)))
    for case in cases:
        for _ in range(2):
            got = plain(
                mma_packed.spmm_24_mma_packed(gpu(case), on_gpu(w), gpu(bias), None, "relu")
            )
            twin = spmm_24_ref(case, w, bias, None, "relu")
            exact = spmm_24_ref(*wide(case, w, bias), None, "relu")
            assert_no_worse_than_dense(got, twin, exact, str(case.stride()))


@pytest.mark.parametrize("name", ["mma_packed", "wgmma_packed"])
def test_without_rows_nothing_is_launched(name, card):
    _, _, run, _ = LAUNCHERS[name]
    x, w, bias = linear_operands(1)
    for _ in range(2):
        assert run(x[:0], w, bias).shape == (0, N)
    assert not card.mma.launches and not card.wgmma.launches


def test_no_tensor_is_kept():
    """Neither operands nor results live on in what a launcher keeps."""
    for file, operands, run, _ in LAUNCHERS.values():
        run(*operands(1))
        for plan in file.PLANS.kept.values():
            fields = [*plan, *plan.constants.values()]
            assert not any(isinstance(field, torch.Tensor | TmaView) for field in fields)


def test_what_is_kept_is_bounded(monkeypatch):
    monkeypatch.setattr(plans, "MOST_PLANS", 2)
    x, w, bias = linear_operands(1, m=4)
    for m in (1, 2, 3, 4):
        mma_packed.spmm_24_mma_packed(gpu(x[:m]), on_gpu(w), gpu(bias), tile=TILE, splits=1)
        assert len(mma_packed.PLANS.kept) <= 2


def test_another_gpu_is_made_current_for_the_launch(monkeypatch, card):
    entered = []

    class Current:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            entered.append((self.device, len(card.mma.launches)))

        def __exit__(self, *_):
            entered.append(("left", len(card.mma.launches)))

    monkeypatch.setattr(torch.cuda, "device", Current)
    x, w, bias = linear_operands(1)
    mma_packed.spmm_24_mma_packed(gpu(x), on_gpu(w), gpu(bias), tile=TILE, splits=1)
    assert entered == []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    mma_packed.spmm_24_mma_packed(gpu(x), on_gpu(w), gpu(bias), tile=TILE, splits=1)
    assert entered == [(x.device, 1), ("left", 2)]
