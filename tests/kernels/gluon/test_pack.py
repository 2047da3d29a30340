"""Pack kernels on the NumPy executor: the bits of orders.py, whatever the padding."""

import gluon_numpy
import pytest
import torch
from gluon_numpy import mutated
from helpers import random_24

from slimgemm.kernels.gluon import orders, pack
from slimgemm.kernels.reference import pack_24_ref

SHAPES = [(16, 256), (33, 264), (1, 8), (130, 1000), (7, 36)]


def words(packed, rows, block_bytes, kernel=pack._pack_words_kernel):
    launch = pack.prepare_words(packed, rows, block_bytes)
    gluon_numpy.run(kernel, launch.grid, *launch.args, **launch.constants)
    return launch.out


def values(packed, kernel=pack._pack_values_kernel):
    launch = pack.prepare_values(packed)
    gluon_numpy.run(kernel, launch.grid, *launch.args, **launch.constants)
    return launch.out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("n", "k"), SHAPES, ids=str)
def test_kernels_write_the_bits_of_the_twins(n, k, dtype):
    packed = pack_24_ref(random_24(n, k, dtype, seed=k))
    narrow, wide = orders.to_mma_sp(packed), orders.to_wgmma_sp(packed)
    assert torch.equal(values(packed), narrow.values)
    assert torch.equal(words(packed, 16, 512).squeeze(2), narrow.meta)
    assert torch.equal(words(packed, 128, 256).view(wide.meta.shape), wide.meta)


@pytest.mark.parametrize(
    ("old", "new"),
    [("lane // 4 + e % 2 * 8", "lane // 4 + e % 4 // 2 * 8"), ("e % 4 // 2 * 4", "e % 2 * 4")],
    ids=["rows", "columns"],
)
def test_wrong_register_map_is_seen(old, new):
    packed = pack_24_ref(random_24(33, 264, torch.float16))
    got = values(packed, mutated(pack._pack_values_kernel, old, new))
    assert not torch.equal(got, orders.to_mma_sp(packed).values)


def test_missing_bound_is_seen():
    packed = pack_24_ref(random_24(33, 264, torch.float16))
    changed = mutated(pack._pack_values_kernel, "(row < N) & ", "")
    with pytest.raises(gluon_numpy.Fault, match="load out of bounds: v_ptr"):
        values(packed, changed)
    changed = mutated(pack._pack_words_kernel, ", mask=e < TOTAL", "")
    with pytest.raises(gluon_numpy.Fault, match="store out of bounds: out_ptr"):
        words(packed, 16, 512, changed)


def test_kernels_are_launched_on_the_device_of_the_weight(monkeypatch):
    current, launched_on = [], []

    class Device:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            current.append(self.device)

        def __exit__(self, *_):
            current.pop()

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **constants: launched_on.append(current[-1:])

    monkeypatch.setattr(torch.cuda, "device", Device)
    launch = pack.prepare_values(pack_24_ref(random_24(16, 256, torch.float16)))
    pack._run(Kernel(), launch)
    assert launched_on == [[launch.out.device]]


def test_refusals():
    weight = random_24(16, 32)
    for function in (pack.pack_mma_sp, pack.pack_wgmma_sp):
        with pytest.raises(ValueError, match="float16, bfloat16, float8_e4m3fn or int8, got torch"):
            function(pack_24_ref(weight))
        with pytest.raises(ValueError, match="values must be on a GPU, got cpu"):
            function(pack_24_ref(weight.half()))
