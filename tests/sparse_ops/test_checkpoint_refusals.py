"""load: a damaged checkpoint, or one of another model, is never used."""

import json

import pytest
import safetensors.torch
import torch
from checkpoint_cases import Net, never, packed_net
from torch import nn

from slimgemm.sparse_ops import CheckpointError, checkpoint, load, save

# ---- damage: refused before a tensor is used


@pytest.fixture
def no_tensor_is_read(monkeypatch):
    def read(*_, **__):
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(safetensors.torch, "load_file", read)


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


def test_the_folder_above_a_checkpoint_is_refused_and_the_right_one_named(saved, tmp_path):
    above = tmp_path / "above"
    above.mkdir()
    saved[0].rename(above / "model")
    with pytest.raises(CheckpointError, match=rf"no slimgemm checkpoint; {above / 'model'} is one"):
        load(never, above)


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
