import subprocess
import sys

import torch
from torch import nn

from slimgemm import pruning, sparse_ops
from slimgemm.pruning.report import amount, energy


def test_numbers_with_units():
    assert amount(1234567, "B") == "1.23 MB"
    assert amount(12) == "12"
    assert energy(1.5e6) == "1.5 µJ"
    assert energy(12) == "12 pJ"
    assert energy(float("nan")) == "-"


def test_table_has_each_layer_and_each_reason():
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 7), nn.Embedding(4, 4))
    model.forward = lambda x: model[1](model[0](x))
    text = str(pruning.plan(model, torch.zeros(1, 64), pattern=pruning.NofM(2, 4), ignore=["1"]))
    for part in (
        "0 (linear)",
        "[32, 64]",
        "50.0 %",
        "8.19 kB → 4.35 kB",
        "2.05 k → 1.02 k",
        "ignored (1)",
        "Embedding is neither",
        "2:4, Magnitude(p=1), seed 0",
        "45 nm",
    ):
        assert part in text, part


def test_a_note_names_each_layer_that_compress_will_leave_dense():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 32, 1), nn.Conv2d(32, 8, 1))
    x = torch.zeros(1, 3, 4, 4)
    plan = pruning.plan(model, x, pattern=pruning.NofM(2, 4), ignore=["2"])
    note = (
        "0: compress will leave it dense, zeros included: packed it would save less than 10 % of "
        "its bytes; ignore it to keep all its weights"
    )
    assert plan.notes == (note,) and note in str(plan)
    plan.apply(model)
    rows = {row.name: row for row in sparse_ops.compress(model, x).layers}
    assert not rows["0"].packed and rows["0"].reason.endswith("must save at least 10 %")
    assert rows["1"].packed
    assert [e.pruned_bytes for e in plan.pruned] == [rows["0"].dense_bytes, rows["1"].packed_bytes]


def test_a_note_names_each_layer_of_which_nothing_is_dropped():
    plan = pruning.plan(nn.Conv2d(1, 8, 3), torch.zeros(1, 1, 4, 4), pattern=pruning.NofM(2, 4))
    (layer,) = plan.pruned
    assert layer.kept == 1
    assert plan.notes == (f"{layer.name}: 2:4 drops nothing of it, its rows are too short",)


def test_import_is_light():
    heavy = ("rich", "torch_pruning", "sklearn", "matplotlib")
    code = (
        f"import sys, torch; before = set(sys.modules); import slimgemm.pruning;"
        f"print([n for n in {heavy} if n in sys.modules and n not in before])"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "[]"
