"""The demo end to end on a small data set, twice; then what its checks and refusals say."""

import dataclasses
import io
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from slimgemm.benchmarks import (
    cli,
    demo,
    demo_reload,
    demo_report,
    demo_seed,
    demo_timing,
    demo_train,
    digits,
)

pytest.importorskip("sklearn", reason="scikit-learn is not installed")
pytest.importorskip("matplotlib", reason="matplotlib is not installed")

SMALL_DROP = 5  # points; one seed, 600 images and 4 epochs do not settle within one
WIDE = {"wide1": 1024 * 512, "wide2": 512 * 1024}


def idx(array):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return header + array.astype(np.uint8).tobytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """900 of the handwritten digits as IDX files."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    place = tmp_path_factory.mktemp("few-digits")
    order = np.random.default_rng(0).permutation(900)
    for part, rows in (("train", order[:600]), ("test", order[600:])):
        images, labels = digits.IDX_FILES[part]
        (place / images).write_bytes(idx(bunch.images[rows]))
        (place / labels).write_bytes(idx(bunch.target[rows]))
    return place


def invoke(*arguments):
    return CliRunner().invoke(cli.app, ["demo", *map(str, arguments)])


@pytest.fixture(scope="module")
def twice(folder, tmp_path_factory):
    """Two runs of the command with the same arguments into one folder."""
    out = tmp_path_factory.mktemp("demo") / "out"
    kept = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "LATENCY_ROUNDS", {1: 4, 16: 3})
        patch.setattr(demo_train, "BATCH", 32)  # more steps from fewer images
        patch.setattr(demo, "MAX_DROP", SMALL_DROP)
        run = demo.run
        patch.setattr(demo, "run", lambda *a: kept.append(run(*a)) or kept[-1])
        found = []
        for _ in range(2):
            done = invoke("--data", folder, "--out", out, "--seeds", 1, "--epochs", 4)
            assert done.exit_code == 0, done.output
            report = json.loads((out / "demo.json").read_text(encoding="utf-8"))
            found.append((done.output, report))
    return out, found, kept[0]


def stage(report, key):
    return next(s for s in report["stages"] if s["key"] == key)["runs"][0]


def test_every_stage_was_measured(twice):
    _, [(_, report), _], _ = twice
    assert [s["key"] for s in report["stages"]] == list(demo_seed.STAGES)
    assert report["ok"] and all(check["ok"] for check in report["checks"])
    assert len(report["curves"][0]["dense"]) == 4 and len(report["curves"][0]["tuned"]) == 2
    dense = stage(report, "dense")
    assert dense["accuracy"] > 60
    # Dropping the smaller half of the weights costs; fine-tuning gives it back.
    assert stage(report, "pruned")["loss"] > dense["loss"] > stage(report, "tuned")["loss"]
    assert stage(report, "cut")["accuracy"] < dense["accuracy"]
    for key in ("packed", "reloaded", "cut_reloaded"):
        assert stage(report, key)["difference"] <= 1e-5
    for after, before in (("packed", "tuned"), ("cut_reloaded", "cut_tuned")):
        assert stage(report, after)["accuracy"] == stage(report, before)["accuracy"]


def test_bytes_are_those_of_the_format(twice):
    out, [(_, report), _], result = twice
    packed = {r["layer"]: r for r in report["layers"] if r["pattern"] == "2:4"}
    for name, weights in WIDE.items():
        row = packed[name]
        assert row["kept"] == 0.5 and row["dense_bytes"] == 4 * weights
        assert row["stored_bytes"] == 0.53125 * 4 * weights
        assert row["packed_16bit_bytes"] == 0.5625 * 2 * weights
        assert 0 < row["stored_energy_pj"] < row["energy_pj"]
        module = result.runs[0].models["packed"].get_submodule(name)
        assert module.packed.nbytes == row["stored_bytes"]
    cut = {r["layer"]: r for r in report["layers"] if r["pattern"] == "channels"}
    assert cut["wide1"]["stored_shape"] == [512, 256]
    assert cut["wide1"]["stored_bytes"] == 4 * 512 * 256
    on_disk = {p.name: demo_seed.folder_bytes(p) for p in (out / "models").iterdir()}
    assert on_disk["seed0-24"] == stage(report, "reloaded")["file_bytes"]
    assert on_disk["seed0-channels"] == stage(report, "cut_reloaded")["file_bytes"]
    assert on_disk["seed0-24"] < 0.55 * stage(report, "dense")["file_bytes"]


def test_a_second_run_overwrites_and_gives_the_same_numbers(twice):
    out, [(_, first), (_, second)], _ = twice
    for key in ("stages", "curves", "layers", "data", "settings", "checks"):
        assert first[key] == second[key], key
    assert sorted(p.name for p in out.iterdir()) == ["demo.json", "demo.png", "models"]
    assert sorted(p.name for p in (out / "models").iterdir()) == ["seed0-24", "seed0-channels"]


def test_the_report_says_what_was_measured_where(twice):
    _, [(text, report), _], _ = twice
    assert max(map(len, text.splitlines())) <= cli.COLUMNS
    assert "2:4 fine-tuned, masks kept" in text and "53.125 %" in text and "56.250 %" in text
    assert report["versions"]["torch"] == torch.__version__ and report["hardware"]["cpu"]
    assert report["settings"]["seeds"] == [0] and report["seconds"] > 0
    if report["settings"]["device"] == "cpu":
        assert "2:4 is a GPU speed-up" in text and report["kernels"] == []
    for found in report["latency_us"].values():
        for timed in found.values():
            assert 0 < timed["us_p20"] <= timed["us_p50"] <= timed["us_p80"]


def test_the_picture_is_a_png_of_some_size(twice):
    raw = (twice[0] / "demo.png").read_bytes()
    assert raw.startswith(b"\x89PNG") and len(raw) > 30_000


def test_kernel_rows_are_shown(twice, monkeypatch):
    from rich.console import Console

    result = twice[2]
    weights = {"wide1": result.runs[0].models["tuned"].get_submodule("wide1").weight}
    rows = list(demo_timing.time_kernels(weights, lambda call: 2.0, batches=(1, 16), rounds=1))
    settings = dataclasses.replace(result.settings, device=torch.device("cuda"))
    where = {"cpu": "a CPU", "threads": 1, "gpu": "a GPU", "system": "a system"}
    monkeypatch.setattr(demo_report, "hardware", lambda result: where)
    console = Console(width=100, file=io.StringIO())
    demo_report.show(dataclasses.replace(result, settings=settings, kernels=rows), console)
    text = console.file.getvalue()
    assert "1.00 x" in text and "in 0 of 2 rows" in text and "float16" in text


@pytest.mark.parametrize(("lost", "ok"), [(1.0, True), (1.01, False)])
def test_one_point_may_be_lost_and_no_more(twice, lost, ok):
    accuracy = twice[2].runs[0].stages["dense"].accuracy - lost
    checks = demo.judge([changed_run(twice[2], "tuned", accuracy=accuracy)])
    assert (checks[0].name, checks[0].ok) == ("2:4 fine-tuned within 1 point of dense", ok)


def changed_run(result, key, **changes):
    run = result.runs[0]
    stages = {**run.stages, key: dataclasses.replace(run.stages[key], **changes)}
    return dataclasses.replace(run, stages=stages)


@pytest.mark.parametrize(
    ("key", "changes", "found"),
    [
        pytest.param("tuned", {"accuracy": 0.0}, "2:4 fine-tuned within 5 points", id="2:4 lost"),
        pytest.param("cut_tuned", {"accuracy": 0.0}, "channels fine-tuned", id="channels lost"),
        pytest.param(
            "reloaded", {"bit_equal": False, "difference": 0.1}, "2:4 model gives", id="other"
        ),
        pytest.param(
            "cut_reloaded", {"bit_equal": False, "difference": math.nan}, "channels model", id="nan"
        ),
    ],
)
def test_each_check_can_fail(twice, monkeypatch, key, changes, found):
    monkeypatch.setattr(demo, "MAX_DROP", SMALL_DROP)
    failed = [c for c in demo.judge([changed_run(twice[2], key, **changes)]) if not c.ok]
    assert len(failed) == 1 and failed[0].name.startswith(found)


def test_a_wrong_packed_model_is_not_verified(twice, monkeypatch):
    monkeypatch.setattr(demo, "MAX_DROP", SMALL_DROP)
    run = dataclasses.replace(twice[2].runs[0], verified=False, verify_text="WRONG")
    failed = [c for c in demo.judge([run]) if not c.ok]
    assert [c.found for c in failed] == ["WRONG"]


def test_a_failed_check_gives_exit_code_1(twice, tmp_path, monkeypatch):
    result = dataclasses.replace(
        twice[2], checks=[demo.Check("the moon is made of cheese", False, "")]
    )
    monkeypatch.setattr(demo, "run", lambda *a: result)
    (tmp_path / "out").mkdir()
    done = invoke("--out", tmp_path / "out")
    assert done.exit_code == 1
    assert "error: the demo failed: the moon is made of cheese" in done.stderr


def test_a_damaged_model_fails_in_the_fresh_process(twice, tmp_path):
    out, _, result = twice
    damaged = tmp_path / "damaged"
    shutil.copytree(out / "models" / "seed0-24", damaged)
    tensors = damaged / "model.safetensors"
    raw = bytearray(tensors.read_bytes())
    raw[-1] ^= 1
    tensors.write_bytes(raw)
    with pytest.raises(demo_reload.ReloadError, match=r"exit 1.*damaged"):
        demo_reload.reload([damaged], result.job.data, torch.device("cpu"))


def test_refusals_come_before_training_and_name_the_place(tmp_path):
    done = invoke("--data", tmp_path / "nowhere", "--out", tmp_path / "out")
    assert done.exit_code == 2 and "nowhere: is not a folder; --data" in done.stderr
    taken = tmp_path / "file"
    taken.write_text("mine")
    done = invoke("--out", taken)
    assert done.exit_code == 2 and "is a file" in done.stderr and taken.read_text() == "mine"
    mine = tmp_path / "other" / "models" / "seed1-24"
    mine.mkdir(parents=True)
    done = invoke("--out", tmp_path / "other")
    assert done.exit_code == 2 and "seed1-24: exists and is not a saved model" in done.stderr
    assert invoke("--seeds", 0).exit_code == 2
    assert invoke("--epochs", "many").exit_code == 2


def test_the_command_line_starts_without_torch():
    code = "import sys; from slimgemm.benchmarks import cli; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
    assert "demo" in CliRunner().invoke(cli.app, ["--help"]).output


def test_a_missing_extra_is_named(monkeypatch, tmp_path):
    from slimgemm.benchmarks import demo_picture

    monkeypatch.setattr(demo_picture.importlib.util, "find_spec", lambda name: None)
    done = invoke("--out", tmp_path / "out")
    assert done.exit_code == 2 and "pip install 'slimgemm[demo]'" in done.stderr
    assert not Path(tmp_path / "out").exists()
