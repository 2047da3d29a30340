import copy
import signal
import subprocess
import sys

import pytest
import torch

from slimgemm import pruning


def request(mlp, normal, folder, **options):
    return {
        "pattern": pruning.NofM(2, 4),
        "score": pruning.SparseGPT(),
        "calibration": [normal(64, 16)],
        "resume": folder,
        **options,
    }


def weights(plan):
    return [(e.mask.bits, e.weight) for e in plan.pruned]


def assert_same(a, b):
    for (mask, weight), (other, again) in zip(weights(a), weights(b), strict=True):
        assert torch.equal(mask, other) and torch.equal(weight, again)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("groups", [0, 1, 2])
def test_the_same_bytes_after_a_kill(groups, mlp, normal, tmp_path, monkeypatch):
    x = normal(2, 16)
    whole = pruning.plan(mlp, x, **request(mlp, normal, None))
    real = pruning.SparseGPT.solve
    count = []

    def solve(self, *args):
        count.append(args[1].name)
        if len(count) > groups:
            raise Killed
        return real(self, *args)

    before = copy.deepcopy(mlp.state_dict())
    with monkeypatch.context() as patch:
        patch.setattr(pruning.SparseGPT, "solve", solve)
        with pytest.raises(Killed):
            pruning.plan(mlp, x, **request(mlp, normal, tmp_path))
    assert all(torch.equal(v, before[k]) for k, v in mlp.state_dict().items())
    assert len(list(tmp_path.iterdir())) == groups
    count.clear()
    with monkeypatch.context() as patch:
        patch.setattr(
            pruning.SparseGPT, "solve", lambda self, *a: count.append(a[1].name) or real(self, *a)
        )
        again = pruning.plan(mlp, x, **request(mlp, normal, tmp_path))
    assert count == ["0", "2", "4"][groups:]
    assert_same(whole, again)
    assert_same(whole, pruning.plan(mlp, x, **request(mlp, normal, tmp_path)))


KILLED = """
import os, pathlib, signal, sys, torch
from torch import nn
from slimgemm import pruning

real, calls = os.replace, []

def replace(*paths):
    calls.append(paths)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    real(*paths)

os.replace = replace
model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 8))
model.load_state_dict(torch.load(sys.argv[1] + "/model.pt"))
x = torch.load(sys.argv[1] + "/x.pt")
pruning.plan(
    model, x[:2], pattern=pruning.NofM(2, 4), score=pruning.SparseGPT(), calibration=[x],
    resume=sys.argv[1] + "/plan",
)
"""


def test_a_killed_process_is_gone_on_from(mlp, normal, tmp_path):
    """SIGKILL while the second group is written: no `finally` runs, a file is left beside."""
    x = normal(64, 16)
    torch.save(mlp.state_dict(), tmp_path / "model.pt")
    torch.save(x, tmp_path / "x.pt")
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    left = sorted(path.suffix for path in (tmp_path / "plan").iterdir())
    assert left == [".part", ".safetensors"]
    pruning.plan(mlp, x[:2], **request(mlp, normal, tmp_path / "plan"))
    pruning.plan(mlp, x[:2], **request(mlp, normal, tmp_path / "whole"))
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "plan" / path.name).read_bytes()
    assert len(list((tmp_path / "whole").iterdir())) == 3


def test_equal_plans_give_equal_files(mlp, normal, tmp_path):
    found = set()
    for number in range(6):
        folder = tmp_path / str(number)
        pruning.plan(mlp, normal(2, 16), **request(mlp, normal, folder, score=pruning.Wanda()))
        found.add(tuple(path.read_bytes() for path in sorted(folder.iterdir())))
    assert len(found) == 1


def test_masks_without_new_weights_and_notes_come_back(mlp, normal, tmp_path):
    x = normal(64, 16)
    x[:, 3] = 0
    wanda = request(mlp, normal, tmp_path / "a", score=pruning.Wanda())
    first, second = (pruning.plan(mlp, x, **wanda) for _ in range(2))
    assert second["0"].weight is None
    assert torch.equal(first["2"].mask.bits, second["2"].mask.bits)
    options = request(mlp, normal, tmp_path / "b", calibration=[x])
    first, second = (pruning.plan(mlp, x, **options) for _ in range(2))
    assert first.notes == second.notes and "always zero" in first.notes[0]


def test_files_of_another_plan_or_damaged_ones_are_refused(mlp, normal, tmp_path):
    x = normal(2, 16)
    pruning.plan(mlp, x, **request(mlp, normal, tmp_path))
    for change in (
        {"pattern": pruning.NofM(1, 4)},
        {"calibration": [normal(64, 16, seed=1)]},
        {"score": pruning.SparseGPT(damping=0.1)},
    ):
        with pytest.raises(ValueError, match=r"group-0000.* decisions of another plan"):
            pruning.plan(mlp, x, **request(mlp, normal, tmp_path, **change))
    file = tmp_path / "group-0001.safetensors"
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"group-0001.safetensors is damaged"):
        pruning.plan(mlp, x, **request(mlp, normal, tmp_path))
