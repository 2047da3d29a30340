"""save and load: what comes back is what went in, and a damaged file is never used."""

import copy
import json
import os
import pathlib
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from helpers import randn, random_24
from torch import nn

from slimgemm.kernels.formats import channel_index
from slimgemm.kernels.reference import prune_dense_24_ref
from slimgemm.sparse_ops import CheckpointError, SparseLinear24, checkpoint, compress, load, save

X = randn(4, 20, seed=1)


class Net(nn.Module):
    """Packed layers, a dense one, two tied ones, one under two names, a norm with buffers."""

    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(20, 16)
        self.norm = nn.BatchNorm1d(16)
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16, bias=False)
        self.b.weight = self.a.weight
        self.mix = self.again = nn.Linear(16, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        y = self.norm(self.fc1(x)).relu()
        return self.head(self.again(self.mix(self.b(self.a(y)))))


def packed_net(dtype=torch.float32):
    torch.manual_seed(0)
    model = Net().to(dtype)
    for layer in (model.fc1, model.a, model.mix):
        layer.weight.data = prune_dense_24_ref(layer.weight.data)
    model(X.to(dtype))  # statistics of the norm
    assert len(compress(model, X.to(dtype)).packed) == 4
    return model


@pytest.fixture
def saved(tmp_path):
    """(folder, the model that was saved into it)"""
    model = packed_net()
    save(model, tmp_path / "out")
    return tmp_path / "out", model


def assert_same(model, other):
    mine, theirs = model.state_dict(), other.state_dict()
    assert list(mine) == list(theirs)
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name])


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
        "import sys, torch; sys.path[:0] = [sys.argv[1]]\n"
        "from test_checkpoint import Net, X\n"
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
        "format": "slimgemm",
        "version": "1",
    }
    assert not raw.startswith((b"PK", b"\x80"))


# ---- damage: refused before a tensor is used


@pytest.fixture
def no_tensor_is_read(monkeypatch):
    def read(*_, **__):
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(safetensors.torch, "load_file", read)


def never():
    raise AssertionError("the model was made")


@pytest.mark.parametrize("file", ["model.safetensors", "prune.json"])
@pytest.mark.parametrize("bit", [0, 5, 7], ids="bit={}".format)
def test_a_flipped_bit_anywhere_is_refused(bit, file, saved, no_tensor_is_read):
    path = saved[0] / file
    good = path.read_bytes()
    for offset in {*range(0, len(good), max(len(good) // 60, 1)), *range(12), len(good) - 1}:
        bad = bytearray(good)
        bad[offset] ^= 1 << bit
        path.write_bytes(bad)
        with pytest.raises(CheckpointError, match=f"{file} (is damaged|says format)"):
            load(never, saved[0])
    path.write_bytes(good)
    assert checkpoint.read_manifest(saved[0])["version"] == 1


@pytest.mark.parametrize("file", ["model.safetensors", "prune.json"])
@pytest.mark.parametrize("kept", [0, 1, 0.5, -3], ids="kept={}".format)
def test_a_truncated_file_is_refused(kept, file, saved, no_tensor_is_read):
    path = saved[0] / file
    good = path.read_bytes()
    path.write_bytes(good[: int(len(good) * kept) if kept == 0.5 else kept])
    with pytest.raises(CheckpointError, match=f"{file} is damaged"):
        load(never, saved[0])
    path.write_bytes(good + b" ")  # one byte more of the tensors; JSON ends the same
    if file == "model.safetensors":
        with pytest.raises(CheckpointError, match=f"{file} is damaged: its sha256 differs"):
            load(never, saved[0])


@pytest.mark.parametrize("file", ["model.safetensors", "prune.json"])
def test_a_missing_file_is_refused(file, saved, no_tensor_is_read):
    (saved[0] / file).unlink()
    with pytest.raises(CheckpointError, match=rf"{file} is missing; .* is no slimgemm checkpoint"):
        load(never, saved[0])
    with pytest.raises(CheckpointError, match="is missing"):
        load(never, saved[0] / "nowhere")


@pytest.mark.parametrize("text", ["", "[]", "null", "{}", '"x"', '{"version": 1}', "\xff\xfe"])
def test_a_manifest_of_something_else_is_refused(text, saved, no_tensor_is_read):
    (saved[0] / "prune.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"prune.json is damaged \("):
        load(never, saved[0])


def rewritten(folder, **changes):
    """Change the manifest and give it a digest that fits."""
    path = folder / "prune.json"
    manifest = json.loads(path.read_text()) | changes
    manifest["sha256"] = checkpoint.manifest_digest(manifest)
    path.write_text(json.dumps(manifest))


def test_a_newer_version_is_refused(saved, no_tensor_is_read):
    rewritten(saved[0], version=2)
    with pytest.raises(CheckpointError, match=r"version 2, this slimgemm reads .* 1; update"):
        load(never, saved[0])
    rewritten(saved[0], version=1, format="other")
    with pytest.raises(CheckpointError, match="says format 'other'"):
        load(never, saved[0])


def test_metadata_that_is_damaged_inside_a_good_file_is_refused(tmp_path):
    model, folder = packed_net(), tmp_path / "out"
    save(model, folder)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors["fc1.meta"][3, 0] = 0
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    digest = checkpoint.file_digest(folder / "model.safetensors")
    rewritten(folder, tensors={"file": "model.safetensors", "sha256": digest})
    with pytest.raises(CheckpointError, match=r"fc1.*row 3, byte 0 .* not ascending"):
        load(Net, folder)
    model.fc1.meta[3, 0] = 0
    with pytest.raises(ValueError, match=r"fc1: meta is not valid in 1 bytes: row 3, byte 0"):
        save(model, tmp_path / "other")
    assert not (tmp_path / "other").exists()


# ---- another model


def other(change):
    def factory():
        model = Net()
        change(model)
        return model

    return factory


def untied(model):
    model.again = nn.Linear(16, 16)


def remove(model):
    del model.a


OTHERS = {
    "width": (
        lambda m: setattr(m, "fc1", nn.Linear(21, 16)),
        r"fc1 is \[16, 21\] in the model, \[16, 20\] in the checkpoint",
    ),
    "class": (
        lambda m: setattr(m, "fc1", nn.Bilinear(2, 3, 4)),
        "fc1 is a Bilinear in the model, the checkpoint packs a Linear as SparseLinear24",
    ),
    "no_layer": (remove, "the model has no layer 'a', the checkpoint has"),
    "no_second_name": (lambda m: delattr(m, "again"), "the model has no layer 'again'"),
    "second_name": (untied, "mix and again are two layers in the model, one as saved"),
    "more": (
        lambda m: setattr(m, "extra", nn.Linear(2, 2)),
        "extra.(weight|bias) is in the model only; .* was saved from another model",
    ),
    "fewer": (
        lambda m: setattr(m, "head", nn.Identity()),
        "head.(weight|bias) is in the checkpoint only",
    ),
    "dense_shape": (
        lambda m: setattr(m, "head", nn.Linear(16, 4)),
        r"head.(weight|bias) is \[4.*\] in the model, \[3.*\] in the checkpoint",
    ),
    "no_bias": (
        lambda m: setattr(m, "fc1", nn.Linear(20, 16, bias=False)),
        "fc1.bias is in the checkpoint only",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_model_is_refused(name, saved):
    change, text = OTHERS[name]
    with pytest.raises(CheckpointError, match=text):
        load(other(change), saved[0])


def test_a_buffer_that_no_one_fills_is_refused(tmp_path):
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.register_buffer("table", torch.arange(4.0), persistent=False)

    save(Positions(), tmp_path / "out")
    assert load(Positions, tmp_path / "out").table.tolist() == [0, 1, 2, 3]

    def on_meta():
        with torch.device("meta"):
            return Positions()

    with pytest.raises(CheckpointError, match=r"table is not in the checkpoint .* on the meta dev"):
        load(on_meta, tmp_path / "out")


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
