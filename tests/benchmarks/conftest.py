"""The command line in a folder with a module of a user."""

import re

import pytest
from typer.testing import CliRunner

from slimgemm.benchmarks.cli import app

MODULE = """
import os
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

generator = torch.Generator().manual_seed(5)
centres = 1.2 * torch.randn(4, 16, generator=generator)
y = torch.randint(4, (256,), generator=generator)
x = centres[y] + torch.randn(256, 16, generator=generator)

def make_model():
    torch.manual_seed(5)
    layers = nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4)
    model = nn.Sequential(*layers)
    rule = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(40):
        rule.zero_grad()
        nn.functional.cross_entropy(model(x[:128]), y[:128]).backward()
        rule.step()
    return model

def make_data():
    own = torch.Generator()
    train = DataLoader(TensorDataset(x[:128], y[:128]), 32, shuffle=True, generator=own)
    return train, DataLoader(TensorDataset(x[128:], y[128:]), 64)

def negative_loss(model):
    return -float(nn.functional.cross_entropy(model(x[128:]), y[128:]))

def not_a_number(model):
    return float("nan")

def not_a_model():
    return 3

def no_parameters():
    return nn.ReLU()

def broken():
    raise KeyError("weights.pt")

def broken_metric(model):
    return model.absent

def loss_per_row(outputs, target):
    return nn.functional.cross_entropy(outputs, target, reduction="none")

def frozen():
    return make_model().requires_grad_(False)

def unsavable():
    class Extra(nn.Sequential):
        def get_extra_state(self):
            return {"a": 1}

    return Extra(make_model())

def once():
    train, test = make_data()
    return train, iter(test)

def shuffled():
    train, test = make_data()
    return train, DataLoader(test.dataset, 64, shuffle=True)

def one_hot():
    train, test = make_data()
    return train, [(a, nn.functional.one_hot(b, 4)) for a, b in test]

number = 3
calls = []

def fails(what):
    # raises at the call whose number the file `what` holds
    if os.path.exists(what):
        calls.append(what)
        if calls.count(what) == int(open(what).read()):
            raise KeyError(what)

def failing_metric(model):
    fails("metric")
    return -float(nn.functional.cross_entropy(model(x[128:]), y[128:]))

class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 128

    def __getitem__(self, i):
        fails("row")
        if i == 0 and os.path.exists("bad row"):
            raise ValueError("row 0 is bad")
        return x[i], y[i]

def failing_data():
    return DataLoader(Rows(), 32), make_data()[1]

def data_of_workers():
    return DataLoader(Rows(), 32, num_workers=1), make_data()[1]

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = make_model()

    def forward(self, x):
        if self.training:
            fails("forward")
        return self.body(x)
"""


@pytest.fixture
def cli(tmp_path, monkeypatch, request):
    """Runs a command in a folder with a module of its own name."""
    name = f"user_{re.sub(r'[^a-z0-9]', '_', request.node.name.lower())}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)

    def run(command, *arguments):
        return CliRunner().invoke(app, [command, *(run.named(str(a)) for a in arguments)])

    run.named = lambda text: text.replace("USER", name)
    return run
