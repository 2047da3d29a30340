import json
import re

import pytest
from typer.testing import CliRunner

from slimgemm.benchmarks.cli import app

MODULE = """
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

def not_a_model():
    return 3

number = 3
"""
SHORT = ["--short", "2", "--long", "10", "--multiple-of", "8"]


@pytest.fixture
def cli(tmp_path, monkeypatch, request):
    """Runs a command in a folder with a module of its own name."""
    name = f"user_{re.sub(r'[^a-z0-9]', '_', request.node.name.lower())}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)

    def run(command, *arguments):
        given = [str(a).replace("USER", name) for a in arguments]
        return CliRunner().invoke(app, [command, *given])

    return run


def test_prune_inspect_and_verify(cli, tmp_path):
    arguments = ["USER:make_model", "USER:make_data", "--max-macs", "120000", *SHORT,
                 "--pattern", "channels", "--pattern", "2:4"]  # fmt: skip
    done = cli("prune", *arguments)
    assert done.exit_code == 0, done.output
    assert "limits 120000 MACs" in done.output and "Wrote out/model" in done.output
    report = json.loads((tmp_path / "out/search/report.json").read_text())
    assert report["packed"]["verified"]
    assert report["costs"]["measured"]["macs"] <= 120000 < report["costs"]["dense"]["macs"]
    assert abs(report["packed"]["metric"] - report["metric"]["finished"]) < 1
    again = cli("prune", *arguments)
    assert again.exit_code == 0
    assert json.loads((tmp_path / "out/search/report.json").read_text()) == report

    shown = cli("inspect", "out/model")
    assert shown.exit_code == 0 and "bytes on disk" in shown.output
    contents = json.loads(cli("inspect", "out/model", "--json").output)
    rows = {row["layer"]: row for row in contents["layers"]}
    for layer, word in report["allocation"]["patterns"].items():
        assert word in rows[layer]["kept"] and rows[layer]["class"] == "SparseLinear24"
    for group, kept in report["allocation"]["channels"].items():
        assert f"{kept} of " in rows[group.split(" + ")[0]]["kept"]
    assert report["allocation"]["channels"] or report["allocation"]["patterns"]

    sound = cli("verify", "out/model", "USER:make_model")
    assert sound.exit_code == 0 and "it loads into the model" in sound.output
    assert "WRONG" in cli("verify", "out/model", "torch.nn:Identity").output
    weights = tmp_path / "out/model/model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    broken = cli("verify", "out/model")
    assert broken.exit_code == 1 and "its sha256 differs" in broken.output
    assert cli("inspect", "out/model").exit_code == 2


def tamper(folder, name):
    """Zero a tensor of a checkpoint and make all digests right again."""
    from safetensors.torch import load_file, save_file

    from slimgemm.sparse_ops import checkpoint

    tensors = load_file(folder / checkpoint.TENSORS)
    tensors[name] = tensors[name].zero_()
    save_file(tensors, folder / checkpoint.TENSORS)
    manifest = json.loads((folder / checkpoint.MANIFEST).read_text())
    manifest["tensors"]["sha256"] = checkpoint.file_digest(folder / checkpoint.TENSORS)
    manifest["sha256"] = checkpoint.manifest_digest(manifest)
    (folder / checkpoint.MANIFEST).write_text(json.dumps(manifest))


def test_packed_groups_are_checked_without_the_model(cli, tmp_path):
    import torch
    from torch import nn

    from slimgemm import pruning, sparse_ops
    from slimgemm.benchmarks import saved

    model = nn.Sequential(nn.Linear(16, 8), nn.Conv2d(16, 8, 3))
    pruning.plan(model[0], torch.zeros(1, 16), pattern=pruning.NofM(2, 4)).apply(model[0])
    pruning.plan(model[1], torch.zeros(1, 16, 5, 5), pattern=pruning.NofM(2, 4)).apply(model[1])
    sparse_ops.compress(model)
    sparse_ops.save(model, tmp_path / "both")
    found = saved.checks(tmp_path / "both")
    assert [c.what for c in found] == ["files", "0", "1"] and all(c.ok for c in found)
    assert found[1].detail == "32 groups of 2:4 are sound"
    tamper(tmp_path / "both", "0.meta")  # both kept positions 0: no 2:4 group
    bad = cli("verify", "both")
    assert bad.exit_code == 1 and re.search(r"WRONG\s+0:", bad.output)


def test_limits_that_cannot_be_met_are_exit_code_1(cli):
    done = cli("prune", "USER:make_model", "USER:make_data", "--max-macs", "5", *SHORT)
    assert done.exit_code == 1
    assert "max_macs=5 cannot be reached" in done.output and "at its floor" in done.output


def test_a_metric_of_the_user_and_a_loss(cli):
    for metric in ("USER:negative_loss", "loss"):
        done = cli("prune", "USER:make_model", "USER:make_data", "--max-macs", "20000", *SHORT,
                   "--metric", metric, "--out", f"out-{metric[:4]}", "--rows", "8")  # fmt: skip
        assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing:make", "USER:make_data"], "run it where nothing.py lies"),
        (["USER", "USER:make_data"], "must be module:function"),
        (["USER:absent", "USER:make_data"], "has no attribute 'absent'"),
        (["USER:number", "USER:make_data"], "is a int, it must be a function"),
        (["USER:not_a_model", "USER:make_data"], "gave a int, not a module"),
        (["USER:make_model", "USER:make_model"], r"must return \(training loader, test loader\)"),
        (["USER:make_model", "USER:make_data", "--pattern", "x"], "must be channels or keep:group"),
        (["USER:make_model", "USER:make_data", "--metric", "x"], "metric must be accuracy, loss"),
        (["USER:make_model", "USER:make_data", "--method", "x"], "method must be one of"),
        (["USER:make_model", "USER:make_data", "--device", "cuda"], "torch sees no GPU"),
    ],
)  # fmt: skip
def test_bad_input_is_exit_code_2(cli, arguments, message, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    done = cli("prune", *arguments, "--max-drop", "1")
    assert done.exit_code == 2 and re.search(message, done.output), done.output


def test_a_search_needs_a_limit(cli):
    done = cli("prune", "USER:make_model", "USER:make_data")
    assert done.exit_code == 2 and "a search needs a limit" in done.output


def test_folders_that_are_no_checkpoints(cli, tmp_path):
    (tmp_path / "empty").mkdir()
    assert cli("inspect", "empty").exit_code == 2
    assert cli("verify", "absent").exit_code == 2
    assert cli("verify", "empty").exit_code == 1
