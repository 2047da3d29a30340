import subprocess
import sys

import torch
from torch import nn

from slimgemm import pruning
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


def test_a_note_names_weights_that_grow():
    model = nn.Sequential(nn.Linear(3, 32))
    plan = pruning.plan(model, torch.zeros(1, 3), pattern=pruning.NofM(2, 4))
    assert "more bytes than dense: 0" in str(plan)


def test_import_is_light():
    heavy = ("rich", "torch_pruning", "sklearn", "matplotlib")
    code = (
        f"import sys, torch; before = set(sys.modules); import slimgemm.pruning;"
        f"print([n for n in {heavy} if n in sys.modules and n not in before])"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "[]"
