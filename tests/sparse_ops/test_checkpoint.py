"""save and load: what comes back is what went in, and a crash while saving harms nothing."""

import copy
import json
import os
import pathlib
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from checkpoint_cases import Net, X, assert_same, never, packed_net
from helpers import random_24
from torch import nn

from slimgemm.kernels.formats import channel_index
from slimgemm.kernels.reference import prune_dense_24_ref
from slimgemm.pruning.masks import mask_of, set_mask
from slimgemm.sparse_ops import CheckpointError, SparseLinear24, checkpoint, compress, load, save

# ---- round trips


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("where", ["cpu", "meta"])
def test_round_trip_bit_for_bit(where, dtype, tmp_path):
    model = packed_net(dtype)
    save(model, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "model.safetensors",
        "prune.json",
    ]

    def factory():
        with torch.device(where):
            return Net()

    again = load(factory, tmp_path / "out")
    assert_same(again, model)
    assert again.a.values is again.b.values and again.a.meta is again.b.meta
    assert again.mix is again.again and type(again.head) is nn.Linear
    assert all(p.requires_grad and not p.is_meta for p in again.parameters())
    again.eval(), model.eval()
    assert torch.equal(again(X.to(dtype)), model(X.to(dtype)))
    again.train()
    again(X.to(dtype)).sum().backward()
    assert again.a.values.grad is not None


@pytest.mark.parametrize("pattern", [(1, 4), (2, 8), (4, 8)], ids=str)
def test_round_trip_of_other_patterns(pattern, tmp_path):
    make = lambda: nn.Sequential(nn.Linear(20, 6))  # noqa: E731
    model = make()
    model[0].weight.data = random_24(6, 20, torch.float32, *pattern)
    compress(model, X, keep=pattern[0], group=pattern[1])
    save(model, tmp_path / "out")
    again = load(make, tmp_path / "out")
    assert_same(again, model)
    assert (again[0].keep, again[0].group) == pattern and torch.equal(again(X), model(X))


def test_a_shrunk_and_packed_mix(tmp_path):
    def make():
        return nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 8), nn.Linear(8, 3))

    model, kept = make(), channel_index([0, 1, 2, 5, 6, 7, 8, 9, 12, 15], 16)
    rows = kept.index
    first, second = model[0], model[2]
    first.weight = nn.Parameter(first.weight.detach()[rows])
    first.bias = nn.Parameter(first.bias.detach()[rows])
    first.out_features, first.kept_out = 10, kept
    second.weight = nn.Parameter(second.weight.detach()[:, rows])
    second.in_features, second.kept_in = 10, kept
    model[3].weight.data = prune_dense_24_ref(model[3].weight.data)
    assert len(compress(model, X).packed) == 1
    save(model, tmp_path / "out")
    again = load(make, tmp_path / "out")
    assert_same(again, model)
    assert again[0].out_features == 10 and again[2].in_features == 10
    assert torch.equal(again[2].kept_in.index, rows) and again[0].kept_out.width == 16
    assert torch.equal(again(X), model(X))
    with pytest.raises(CheckpointError, match=r"0 is \[12, 20\] in the model, .* width 16 on axis"):
        load(lambda: nn.Sequential(nn.Linear(20, 12), *list(make())[1:]), tmp_path / "out")


def test_a_bare_packed_layer(tmp_path):
    sparse = SparseLinear24(20, 6)
    save(sparse, tmp_path / "out")
    again = load(lambda: nn.Linear(20, 6), tmp_path / "out")
    assert type(again) is SparseLinear24 and torch.equal(again(X), sparse(X))


def test_dense_tied_tensors_and_buffers_of_parameters(tmp_path):
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(7, 5), nn.Linear(5, 7, bias=False)
            self.head.weight = self.embed.weight
            self.register_buffer("copy", self.embed.weight.detach())

    model = Head()
    save(model, tmp_path / "out")
    names = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors").keys()
    assert len(names) == 2  # the tied parameter once, the buffer once
    again = load(Head, tmp_path / "out")
    assert again.head.weight is again.embed.weight
    assert isinstance(again.embed.weight, nn.Parameter)
    assert type(again._buffers["copy"]) is torch.Tensor
    assert_same(again, model)


def test_masks_of_dense_layers_and_frozen_parameters_come_back(tmp_path):
    make = lambda: nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2))  # noqa: E731
    model = make()
    mask = torch.arange(15).view(3, 5) % 3 > 0
    set_mask(model[0], mask)
    model[1].bias.requires_grad_(False)
    save(model, tmp_path / "out")
    stored = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert stored["0.kept_weights"].dtype == torch.uint8 and stored["0.kept_weights"].numel() == 2
    again = load(make, tmp_path / "out")
    assert_same(again, model)
    assert torch.equal(mask_of(again[0]), mask) and mask_of(again[1]) is None
    assert [p.requires_grad for p in again.parameters()] == [True, True, True, False]
    model[0].weight = nn.Parameter(torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"0: its mask is \[3, 5\], its weight \[3, 4\]"):
        save(model, tmp_path / "other")


def test_hooks_and_flags_of_the_factory_stay(saved):
    def factory():
        model = Net().eval()
        model.fc1.weight.requires_grad_(False)
        model.fc1.register_forward_hook(lambda *_: ran.append(1))
        return model

    ran = []
    again = load(factory, saved[0])
    again(X)
    assert ran == [1] and not again.training and not again.fc1.training
    assert not again.fc1.values.requires_grad and again.a.values.requires_grad


def test_a_fresh_process_loads_the_same_outputs(saved, tmp_path):
    folder, model = saved
    code = (
        "import sys, torch\n"
        "from checkpoint_cases import Net, X\n"
        "from slimgemm.sparse_ops import load\n"
        "model = load(Net, sys.argv[2]).eval()\n"
        "torch.save(model(X).detach(), sys.argv[3])\n"
    )
    here = pathlib.Path(__file__).parent
    args = [str(here), str(folder), str(tmp_path / "y.pt")]
    env = os.environ | {"PYTHONPATH": str(here.parent)}
    subprocess.run([sys.executable, "-c", code, *args], check=True, env=env)
    assert torch.equal(torch.load(tmp_path / "y.pt"), model.eval()(X))


def test_a_packed_fp16_layer_takes_nine_sixteenths_of_the_bytes(tmp_path):
    sparse = SparseLinear24(512, 256, bias=False, dtype=torch.float16)
    dense = 2 * 512 * 256
    assert sum(t.nbytes for t in sparse.state_dict().values()) == 0.5625 * dense
    save(sparse, tmp_path / "out")
    raw = (tmp_path / "out" / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(raw[:8], "little")
    assert len(raw) - header == 0.5625 * dense and header < 512


def test_the_file_holds_no_pickle(saved):
    raw = (saved[0] / "model.safetensors").read_bytes()
    assert json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"] == {
        "format": "slimgemm"
    }
    assert not raw.startswith((b"PK", b"\x80"))


# ---- saving


def snapshot(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_an_existing_folder_is_refused_unless_told(saved):
    folder, _ = saved
    before = snapshot(folder)
    changed = packed_net()
    changed.head.bias.data += 1
    with pytest.raises(ValueError, match="exists; choose another folder or pass overwrite=True"):
        save(changed, folder)
    assert snapshot(folder) == before
    save(changed, folder, overwrite=True)
    assert_same(load(Net, folder), changed)
    assert [p.name for p in folder.parent.iterdir()] == ["out"]


def test_overwrite_deletes_nothing_but_a_checkpoint(saved, tmp_path):
    folder, model = saved
    (folder / "notes.txt").write_text("mine")
    before = snapshot(folder)
    with pytest.raises(ValueError, match=r"holds notes.txt, which is no part of a checkpoint"):
        save(model, folder, overwrite=True)
    assert snapshot(folder) == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="is a file; choose another folder"):
        save(model, tmp_path / "file", overwrite=True)
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    save(model, tmp_path / "empty", overwrite=True)
    assert_same(load(Net, tmp_path / "empty"), model)


class Crash(BaseException):
    """Not an Exception, as KeyboardInterrupt is not."""


def crash(*_, **__):
    raise Crash


def fail_at(step, monkeypatch):
    """Let `save` end at one of its steps."""
    renames = []
    plain = pathlib.Path.rename

    def rename(path, target):
        renames.append(path)
        if len(renames) == int(step[-1]):
            raise Crash
        return plain(path, target)

    if step == "save_file":
        monkeypatch.setattr(safetensors.torch, "save_file", crash)
    elif step == "half_a_file":

        def half(tensors, path, metadata):
            path.write_bytes(safetensors.torch.save(tensors, metadata)[:100])
            raise Crash

        monkeypatch.setattr(safetensors.torch, "save_file", half)
    elif step == "digest":
        monkeypatch.setattr(checkpoint, "file_digest", crash)
    elif step == "manifest":
        monkeypatch.setattr(pathlib.Path, "write_text", crash)
    else:
        monkeypatch.setattr(pathlib.Path, "rename", rename)


@pytest.mark.parametrize("step", ["save_file", "half_a_file", "digest", "manifest", "rename_1"])
def test_a_crash_leaves_no_folder(step, tmp_path, monkeypatch):
    model = packed_net()
    with monkeypatch.context() as patch:
        fail_at(step, patch)
        with pytest.raises(Crash):
            save(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    save(model, tmp_path / "out")
    assert_same(load(Net, tmp_path / "out"), model)


@pytest.mark.parametrize(
    "step", ["save_file", "half_a_file", "digest", "manifest", "rename_1", "rename_2"]
)
def test_a_crash_leaves_the_old_folder(step, saved, monkeypatch):
    folder, model = saved
    before, changed = snapshot(folder), copy.deepcopy(model)
    changed.head.bias.data += 1
    with monkeypatch.context() as patch:
        fail_at(step, patch)
        with pytest.raises(Crash):
            save(changed, folder, overwrite=True)
    assert snapshot(folder) == before
    assert [p.name for p in folder.parent.iterdir()] == ["out"]
    assert_same(load(Net, folder), model)


@pytest.mark.parametrize("when", ["partial", "whole"])
def test_a_killed_process_leaves_nothing_that_loads_or_stands_in_the_way(when, tmp_path):
    """No `finally` runs: the folder beside is left, and saving again works."""
    step = "safetensors.torch.save_file" if when == "partial" else "pathlib.Path.rename"
    code = (
        "import os, pathlib, sys, safetensors.torch\n"
        "from slimgemm.sparse_ops import SparseLinear24, save\n"
        f"{step} = lambda *a, **k: os._exit(9)\n"
        "save(SparseLinear24(8, 4), sys.argv[1])\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], check=False)
    assert killed.returncode == 9 and not (tmp_path / "out").exists()
    left = list(tmp_path.iterdir())
    assert len(left) == 1
    if when == "partial":
        with pytest.raises(CheckpointError, match="is missing"):
            load(never, left[0])
    save(SparseLinear24(8, 4), tmp_path / "out")
    assert (tmp_path / "out" / "prune.json").is_file()


def test_what_cannot_be_saved_is_refused(tmp_path):
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"steps": 3}

        def set_extra_state(self, state):
            raise AssertionError

    with pytest.raises(ValueError, match="_extra_state in the state dict is a dict; only tensors"):
        save(Extra(4, 4), tmp_path / "out")
    with pytest.raises(ValueError, match="weight is on the meta device and has no data to save"):
        save(nn.Linear(4, 4, device="meta"), tmp_path / "out")
    with pytest.raises(ValueError, match="values is on the meta device and has no data to save"):
        save(SparseLinear24(8, 4, device="meta"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_missing_parents_are_made_and_strings_are_paths(tmp_path):
    model = SparseLinear24(8, 4)
    save(model, str(tmp_path / "a" / "b"))
    assert_same(load(lambda: nn.Linear(8, 4), str(tmp_path / "a" / "b")), model)


def test_a_model_instead_of_its_factory_is_refused(tmp_path):
    save(nn.Sequential(nn.Linear(8, 8)), tmp_path / "m")
    with pytest.raises(ValueError, match="factory must be a function that makes the dense model"):
        load(nn.Sequential(nn.Linear(8, 8)), tmp_path / "m")


# ---- the same model gives the same bytes

SAVE = """
import sys
sys.path.insert(0, sys.argv[1])
from checkpoint_cases import packed_net
from slimgemm.sparse_ops import save
save(packed_net(), sys.argv[2])
"""


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_equal_models_give_equal_bytes(tmp_path):
    model = packed_net()
    for number in range(8):
        save(model, tmp_path / str(number))
    program = [sys.executable, "-c", SAVE, str(pathlib.Path(__file__).parents[1])]
    subprocess.run([*program, str(tmp_path / "other")], check=True)
    want = files_of(tmp_path / "0")
    for folder in tmp_path.iterdir():
        assert files_of(folder) == want, folder.name


def test_a_checkpoint_with_two_keys_in_its_header_still_loads(tmp_path):
    model = packed_net()
    save(model, tmp_path / "out")
    path = tmp_path / "out" / checkpoint.TENSORS
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file(tensors, path, {"format": "slimgemm", "version": "1"})
    manifest = json.loads((tmp_path / "out" / checkpoint.MANIFEST).read_text())
    manifest["tensors"]["sha256"] = checkpoint.file_digest(path)
    manifest["sha256"] = checkpoint.manifest_digest(manifest)
    (tmp_path / "out" / checkpoint.MANIFEST).write_text(json.dumps(manifest))
    assert_same(load(Net, tmp_path / "out"), model)
