import pytest
import torch
import torch.nn.functional as F
from torch import nn

from slimgemm import pruning
from slimgemm.pruning.calibrate import (
    Calibration,
    ColumnSquares,
    Gram,
    NonZero,
    column_inputs,
    groups_of,
)
from slimgemm.pruning.layers import find_layers
from slimgemm.pruning.masks import unpack_mask
from slimgemm.pruning.patterns import rows_of


class Block(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.calls = 0

    def forward(self, x, scale=None):
        self.calls += 1
        return x + self.down(F.gelu(self.up(x))) * scale


class Stack(nn.Module):
    """Blocks in a chain, all with the same `scale`; `broken` puts something between them."""

    def __init__(self, depth=3, broken=False):
        super().__init__()
        self.broken = broken
        self.inp = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.out = nn.Linear(8, 2)

    def forward(self, x):
        x, scale = self.inp(x), x.mean(-1, keepdim=True)
        for block in self.blocks:
            x = block(x * 1.5 if self.broken else x, scale=scale)
        return self.out(x)


CONVOLUTIONS = {
    "plain": nn.Conv2d(4, 6, 3, padding=1),
    "stride, dilation": nn.Conv2d(4, 6, (3, 2), stride=2, dilation=(1, 2), padding=(2, 1)),
    "groups": nn.Conv2d(4, 6, 3, groups=2),
    "reflect": nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    "same": nn.Conv2d(4, 6, 3, padding="same"),
}


@pytest.mark.parametrize("layer", CONVOLUTIONS.values(), ids=CONVOLUTIONS.keys())
def test_columns_times_weight_is_the_convolution(layer, normal):
    x = normal(2, 4, 7, 8)
    columns = column_inputs(layer, x)  # [groups, rows, columns]
    weight = rows_of(layer.weight.detach()).flatten(1).double()
    parts = [c @ w.T for c, w in zip(columns, weight.chunk(layer.groups), strict=True)]
    got = torch.cat(parts, 1)
    want = (layer(x) - layer.bias[:, None, None]).permute(0, 2, 3, 1).reshape(got.shape)
    torch.testing.assert_close(got.float(), want.detach(), rtol=1e-4, atol=1e-5)


def test_statistics_of_a_linear_layer(normal):
    layer, x = nn.Linear(5, 3), normal(4, 6, 5)
    rows = x.reshape(-1, 5).double()
    found = {}
    for kind in (Gram, ColumnSquares, NonZero):
        statistic = kind(layer)
        statistic.add(x[:1])
        statistic.add(F.relu(x[1:]) if kind is NonZero else x[1:])
        found[kind] = statistic.result()
    torch.testing.assert_close(found[Gram], (rows.T @ rows / 24)[None])
    torch.testing.assert_close(found[ColumnSquares], rows.square().mean(0)[None])
    want = torch.cat([x[:1], F.relu(x[1:])]).ne(0).double().mean((0, 1))
    torch.testing.assert_close(found[NonZero], want)


def test_groups_are_blocks_by_the_first_number():
    model = Stack()
    layers = find_layers(model)
    found = groups_of(model, layers)
    assert [(g.block, [la.name for la in g.layers]) for g in found] == [
        (None, ["inp"]),
        ("blocks.0", ["blocks.0.up", "blocks.0.down"]),
        ("blocks.1", ["blocks.1.up", "blocks.1.down"]),
        ("blocks.2", ["blocks.2.up", "blocks.2.down"]),
        (None, ["out"]),
    ]


def direct(model, batches, name):
    rows = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda m, a: rows.append(a[0]))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    handle.remove()
    x = torch.cat(rows).reshape(-1, rows[0].shape[-1]).double()
    return (x.T @ x / x.shape[0])[None]


@pytest.mark.parametrize("broken", [False, True], ids=["chain", "no chain"])
def test_gathered_statistics_are_those_of_the_whole_model(broken, normal):
    torch.manual_seed(0)
    model = Stack(broken=broken)
    batches = [normal(4, 8, seed=s) for s in range(3)]
    groups = groups_of(model, find_layers(model))
    calibration = Calibration(model, batches)
    blocks = ["blocks.0", "blocks.1", "blocks.2"]
    for group in groups:
        found = calibration.gather(group, Gram, {})
        for name, value in found.items():
            torch.testing.assert_close(value, direct(model, batches, name))
        for layer in group.layers:  # later groups must see what changed here
            layer.module.weight.data *= 0.5
        if group.block:
            calibration.advance(blocks, group.block)
            assert (calibration._block is not None) == (not broken and group.block != "blocks.2")


def test_a_chain_runs_each_block_alone(normal):
    model = Stack(depth=6)
    calibration = Calibration(model, [normal(4, 8)])
    blocks = [f"blocks.{i}" for i in range(6)]
    for group in groups_of(model, find_layers(model))[1:-1]:
        before = model.blocks[0].calls
        calibration.gather(group, Gram, {})
        if group.block not in ("blocks.0",):
            assert model.blocks[0].calls == before
        calibration.advance(blocks, group.block)


def test_the_forward_stops_behind_the_group(normal):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    seen = []
    model[1].register_forward_pre_hook(lambda m, a: seen.append(1))
    group = groups_of(model, find_layers(model)[:1])[0]
    Calibration(model, [normal(4, 8)]).gather(group, Gram, {"0": 1})
    assert seen == [] and len(model[0]._forward_pre_hooks) == 0


def test_refusals(normal):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with pytest.raises(ValueError, match="calibration is empty"):
        Calibration(model, [])
    groups = groups_of(model, find_layers(model))
    with pytest.raises(ValueError, match="0: calibration inputs of this layer hold NaN"):
        Calibration(model, [normal(2, 8) * float("nan")]).gather(groups[0], Gram, {})
    model.forward = lambda x: x
    with pytest.raises(ValueError, match="0 did not run on the calibration data"):
        Calibration(model, [normal(2, 8)]).gather(groups[0], Gram, {})


def test_plan_leaves_the_model_alone_when_calibration_fails(normal):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    before = [p.clone() for p in model.parameters()]
    batches = iter([normal(2, 8), normal(2, 7)])
    with pytest.raises(RuntimeError):
        pruning.plan(
            model,
            normal(2, 8),
            pattern=pruning.NofM(2, 4),
            score=pruning.SparseGPT(),
            calibration=batches,
        )
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not model[0]._forward_pre_hooks and model.training


def test_a_layer_that_does_not_run_cannot_be_calibrated(normal):
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.a(x)

    x, options = normal(4, 8), {"pattern": pruning.NofM(2, 4), "score": pruning.Wanda()}
    with pytest.raises(ValueError, match=r"b did not run on the example inputs, so it cannot be"):
        pruning.plan(Idle(), x, calibration=[x], **options)
    plan = pruning.plan(Idle(), x, calibration=[x], ignore=["b"], **options)
    assert [entry.name for entry in plan.pruned] == ["a"]


WORKER = """
import sys, torch, torch.distributed as dist
from torch import nn
from slimgemm import pruning
from slimgemm.pruning.masks import unpack_mask
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
x = torch.randn(128, 16, generator=torch.Generator().manual_seed(1))
plan = pruning.plan(
    model, x[:2], pattern=pruning.NofM(2, 4), score=pruning.SparseGPT(),
    calibration=[x[rank * 64 : rank * 64 + 64]],
)
try:
    pruning.plan(
        model, x[:2], pattern=pruning.NofM(2, 4), score=pruning.Wanda(),
        calibration=[x], resume=folder,
    )
except ValueError as error:
    assert "cannot be combined" in str(error)
    found = {e.name: e.weight for e in plan.pruned}


def refused(model, example, **options):
    try:
        pruning.plan(model, example, pattern=pruning.NofM(2, 4), **options)
    except ValueError as error:
        return str(error)


class Routed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        return self.b(self.a(x)) if bool(x.sum() > 0) else self.a(x)


loss = nn.functional.cross_entropy
taylor = {"pattern": pruning.NofM(2, 4), "score": pruning.Taylor(loss, p=2)}
y = torch.arange(128) % 8
own = slice(0, 32) if rank == 0 else slice(32, 128)  # not one batch each
batches = [(x[own][i : i + 32], y[own][i : i + 32]) for i in range(0, len(x[own]), 32)]
graded = pruning.plan(model, x[:2], calibration=batches, **taylor)
found |= {f"{e.name} graded": unpack_mask(e.mask) for e in graded.pruned}
texts = [
    refused(model, x[:2], score=pruning.Wanda(), calibration=[x] * rank),
    refused(model, x[:2], score=pruning.Taylor(loss), calibration=[(x, y)] * rank),
    refused(Routed(), x[:1].abs(), score=pruning.Wanda(), calibration=[(2 * rank - 1) * x.abs()]),
]
torch.save({**found, "refused": texts}, f"{folder}/{rank}.pt")
"""


def test_two_processes_decide_as_one(tmp_path, normal):
    import re
    import subprocess
    import sys

    workers = [
        subprocess.Popen([sys.executable, "-c", WORKER, str(rank), str(tmp_path)])
        for rank in range(2)
    ]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    x = torch.randn(128, 16, generator=torch.Generator().manual_seed(1))
    alone = pruning.plan(
        model,
        x[:2],
        pattern=pruning.NofM(2, 4),
        score=pruning.SparseGPT(),
        calibration=[x[:64], x[64:]],
    )
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for entry in alone.pruned:
        assert torch.equal(first[entry.name], second[entry.name])
        torch.testing.assert_close(first[entry.name], entry.weight, rtol=1e-5, atol=1e-6)
    pairs = list(zip(x.split(32), (torch.arange(128) % 8).split(32), strict=True))
    score = pruning.Taylor(nn.functional.cross_entropy, p=2)
    graded = pruning.plan(
        model, x[:2], pattern=pruning.NofM(2, 4), score=score, calibration=pairs
    )  # fmt: skip
    for entry in graded.pruned:
        mask = unpack_mask(entry.mask)
        assert torch.equal(first[f"{entry.name} graded"], mask)
        assert torch.equal(second[f"{entry.name} graded"], mask)
    # What one process lacks, both of them say, and neither waits for the other.
    assert first["refused"] == second["refused"]
    empty, ungraded, unreached = first["refused"]
    lack = r"processes \[0\] of torch.distributed have no calibration batch; give each process an "
    assert re.match(lack + "iterable of model inputs with at least one", empty)
    assert re.match(lack + r"iterable of \(inputs, target\) with at least one", ungraded)
    assert unreached == (
        "b did not run on the calibration data of processes [0]; ignore the layer, or give batches "
        "that reach it"
    )
