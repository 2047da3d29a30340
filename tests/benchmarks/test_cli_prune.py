import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from slimgemm import pruning, sparse_ops
from slimgemm.kernels.timing import Times
from slimgemm.pruning.joules import Joules

SHORT = ["--short", "2", "--long", "10", "--multiple-of", "8"]


def test_prune_inspect_and_verify(cli, tmp_path):
    arguments = ["USER:make_model", "USER:make_data", "--max-macs", "120000", *SHORT,
                 "--pattern", "channels", "--pattern", "2:4"]  # fmt: skip
    done = cli("prune", *arguments)
    assert done.exit_code == 0, done.output
    assert "limits 120000 MACs" in done.output and "Wrote out/model" in done.output
    assert re.search(r"^step 0 .*: accuracy [\d.]+, drop -?[\d.e-]+$", done.output, re.M)
    assert re.search(r"^verify: \d+ checks, all ok$", done.output, re.M)
    assert "prune it first" not in done.output  # of layers that the search left dense
    report = json.loads((tmp_path / "out/search/report.json").read_text())
    assert report["packed"]["verified"]
    assert report["costs"]["measured"]["macs"] <= 120000 < report["costs"]["dense"]["macs"]
    assert abs(report["packed"]["metric"] - report["metric"]["finished"]) < 1
    again = cli("prune", *arguments)
    assert again.exit_code == 0 and "step 0" not in again.output  # nothing is evaluated again
    assert json.loads((tmp_path / "out/search/report.json").read_text()) == report

    shown = cli("inspect", "out")  # finds out/model
    assert shown.exit_code == 0 and "bytes on disk" in shown.output
    contents = json.loads(cli("inspect", "out/model", "--json").output)
    assert contents == json.loads(cli("inspect", "out", "--json").output)
    rows = {row["layer"]: row for row in contents["layers"]}
    for layer, word in report["allocation"]["patterns"].items():
        assert word in rows[layer]["kept"] and rows[layer]["class"] == "SparseLinear24"
    for group, kept in report["allocation"]["channels"].items():
        assert f"{kept} of " in rows[group.split(" + ")[0]]["kept"]
    assert report["allocation"]["channels"] or report["allocation"]["patterns"]

    sound = cli("verify", "out", "USER:make_model")
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
        (["./USER.py:make_model", "USER:make_data"], r"is a path; write USER:make_model and run"),
        (["USER:no_parameters", "USER:make_data"], "gave a module without parameters"),
        (["USER:frozen", "USER:make_data"], "every parameter is frozen"),
        (["USER:unsavable", "USER:make_data"], "_extra_state in the state dict is a dict"),
        (["USER:make_model", "USER:once"], "the test loader can be read only once"),
        (["USER:make_model", "USER:shuffled"], "first batch differs from pass to pass"),
        (["USER:make_model", "USER:one_hot"],
         r"compares classes \[64\] .* outputs \[64, 4\] .* with targets \[64, 4\]; give --metric"),
        (["USER:make_model", "USER:make_data", "--pattern", "x"],
         "channels or, as keep:group, one of 2:4, 1:4, 1:8, 2:8, 4:8; got 'x'"),
        (["USER:make_model", "USER:make_data", "--rows", "65"],
         "--rows 65 is more than the first test batch has, which is 64"),
        (["USER:make_model", "USER:make_data", "--rate", "-1"], "positive learning rate, got -1"),
        (["USER:make_model", "USER:make_data", "--loss", "USER:loss_per_row"],
         r"loss must give one number as a tensor, got \[32\]"),
        (["USER:make_model", "USER:make_data", "--metric", "USER:not_a_number"],
         "metric not_a_number of the dense model is nan"),
        (["USER:make_model", "USER:make_data", "--lower-is-better"], "for a metric of your own"),
        (["USER:make_model", "USER:make_data", "--device", "warp9"],
         "device must be cpu, cuda or cuda:NUMBER, got 'warp9'"),
        (["USER:make_model", "USER:make_data", "--device", "meta"], "device must be cpu, cuda"),
        (["USER:make_model", "USER:make_data", "--metric", "x"], "metric must be accuracy, loss"),
        (["USER:make_model", "USER:make_data", "--method", "x"], "method must be one of"),
        (["USER:make_model", "USER:make_data", "--device", "cuda"], "torch sees no GPU"),
    ],
)  # fmt: skip
def test_bad_input_is_exit_code_2(cli, arguments, message, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    done = cli("prune", *arguments, "--max-drop", "1")
    assert done.exit_code == 2, done.output
    last = done.output.splitlines()[-1]
    assert last.startswith("error: ") and re.search(cli.named(message), last), done.output
    assert "Traceback" not in done.output


@pytest.mark.parametrize("pattern", ["3:7", "4:2", "1:2", "0:4", "2:4:4"])
def test_a_pattern_that_no_kernel_packs_is_refused_before_the_users_code(cli, pattern, tmp_path):
    done = cli("prune", "nothing:make", "nothing:make", "--max-drop", "1", "--pattern", pattern)
    assert done.exit_code == 2 and "one of 2:4, 1:4, 1:8, 2:8, 4:8" in done.output
    assert not (tmp_path / "out").exists()


def test_the_number_of_gpus_is_said(cli, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    done = cli("prune", "a:b", "a:b", "--max-drop", "1", "--device", "cuda:2")
    assert done.exit_code == 2 and "device cuda:2 asked for, torch sees 2 GPUs" in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["USER:broken", "USER:make_data"], "the model factory USER:broken raised KeyError: 'weig"),
        (["USER:make_model", "USER:broken"], "the data factory USER:broken raised KeyError: 'weig"),
        (["syntax:make", "USER:make_data"], "importing syntax raised SyntaxError: "),
        (["needs:make", "USER:make_data"], "importing needs raised ModuleNotFoundError: No module"),
    ],
)  # fmt: skip
def test_what_the_users_code_raises_is_shown_and_said_in_a_line(
    cli, arguments, message, tmp_path, capfd
):
    (tmp_path / "syntax.py").write_text("def make(:\n")
    (tmp_path / "needs.py").write_text("import absent_package\n")
    done = cli("prune", *arguments, "--max-drop", "1")
    lines = done.output.splitlines()
    assert done.exit_code == 2 and lines[-1].startswith(f"error: {cli.named(message)}"), done.output
    # the traceback begins in the user's own file
    assert any(str(tmp_path) in line for line in lines[:2]), done.output


def test_folders_that_cannot_be_written_are_refused(cli, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "out/model").mkdir(parents=True)
    (tmp_path / "out/model/notes.txt").write_text("mine")
    (tmp_path / "mine/search").mkdir(parents=True)
    (tmp_path / "mine/search/engine.py").write_text("mine")
    for out, message in (
        ("file", "file is a file; --out must be a folder"),
        ("file/deeper", "--out file/deeper cannot be written: Not a directory"),
        ("out", "out/model holds notes.txt, which is no part of a checkpoint"),
        ("mine", "mine/search/engine.py is of no search; choose another folder"),
    ):
        done = cli("prune", "USER:make_model", "USER:make_data", "--max-drop", "1", "--out", out)
        assert done.exit_code == 2 and message in done.output, done.output
        assert len(done.output.splitlines()) == 1
    kept = [p for p in tmp_path.rglob("*") if p.is_file() and p.suffix != ".pyc"]
    assert sorted(p.read_text() for p in kept if "user_" not in p.name) == ["mine"] * 3


def files_of(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_run_that_failed_does_not_block_its_retry(cli, tmp_path):
    whole = ["USER:make_model", "USER:make_data", *SHORT, "--pattern", "2:4"]
    failed = cli("prune", *whole, "--max-macs", "50000")
    assert failed.exit_code == 1, failed.output
    found = files_of(tmp_path / "out/search")
    assert found
    assert "What was tried is in out/search" in failed.output
    # the same again goes on from what it found; another limit begins anew and loses nothing
    assert cli("prune", *whole, "--max-macs", "50000").output == failed.output
    done = cli("prune", *whole, "--max-macs", "110000")
    assert done.exit_code == 0, done.output
    assert "Moved out/search to out/earlier-1: it is of another run" in done.output
    assert files_of(tmp_path / "out/earlier-1/search") == found
    model = files_of(tmp_path / "out/model")
    for changed in (["--rate", "0.01"], ["--metric", "loss"]):
        done = cli("prune", *whole, "--max-macs", "110000", *changed)
        assert done.exit_code == 0 and "Moved out/search and out/model" in done.output, done.output
    assert files_of(tmp_path / "out/earlier-2/model") == model
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "earlier-1", "earlier-2", "earlier-3", "model", "search"
    ]  # fmt: skip


def test_a_search_that_found_nothing_leaves_nothing_behind(cli, tmp_path):
    arguments = ["USER:make_model", "USER:make_data", *SHORT, "--max-macs", "110000"]
    assert cli("prune", *arguments, "--ignore", "absent").exit_code == 2
    done = cli("prune", *arguments)
    assert done.exit_code == 0 and "Moved" not in done.output, done.output
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["model", "search"]


def test_an_interrupt_says_how_to_go_on(cli, monkeypatch):
    from slimgemm.benchmarks import prune_job

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(prune_job.Job, "run", interrupted)
    done = cli("prune", "USER:make_model", "USER:make_data", "--max-drop", "1")
    assert done.exit_code == 130
    assert done.output == "error: stopped; the same command goes on from out/search\n"


def test_a_damaged_journal_does_not_block_either(cli, tmp_path):
    arguments = ["USER:make_model", "USER:make_data", *SHORT, "--max-macs", "110000"]
    (tmp_path / "out/search").mkdir(parents=True)
    (tmp_path / "out/search/candidates.jsonl").write_text("half a li\nne\n")
    done = cli("prune", *arguments)
    assert done.exit_code == 0, done.output
    moved = tmp_path / "out/earlier-1/search/candidates.jsonl"
    assert moved.read_text() == "half a li\nne\n"


def test_a_metric_of_which_less_is_better(cli, tmp_path):
    (tmp_path / "less.py").write_text(
        "import USER\ndef error(model): return -USER.negative_loss(model)\n".replace(
            "USER", cli.named("USER")
        )
    )
    done = cli("prune", "USER:make_model", "USER:make_data", "--max-macs", "110000", *SHORT,
               "--metric", "less:error", "--lower-is-better")  # fmt: skip
    assert done.exit_code == 0, done.output
    metric = json.loads((tmp_path / "out/search/report.json").read_text())["metric"]
    assert metric["drop"] == metric["finished"] - metric["dense"]


def test_inspect_says_what_is_stored_and_what_dense_would_take(cli, tmp_path):
    model = nn.Sequential(nn.Conv2d(8, 32, 3), nn.ReLU(), nn.Conv2d(32, 8, 3), nn.Flatten(),
                          nn.Linear(8, 16), nn.Linear(16, 4))  # fmt: skip
    x = torch.zeros(1, 8, 5, 5)
    channels = pruning.Channels(multiple_of=8)
    half = pruning.Uniform(0.5)
    pruning.plan(model, x, pattern=channels, amount=half, ignore=["4", "5"]).apply(model)
    pruning.plan(model[5], torch.zeros(1, 16), pattern=pruning.NofM(2, 4)).apply(model[5])
    sparse_ops.compress(model, x)
    sparse_ops.save(model, tmp_path / "small")
    layers = json.loads(cli("inspect", "small", "--json").output)["layers"]
    rows = {row["layer"]: row for row in layers}
    assert rows["0"]["dense_shape"] == [32, 8, 3, 3] and rows["2"]["dense_shape"] == [8, 32, 3, 3]
    assert rows["0"]["dense_bytes"] == 32 * 8 * 9 * 4
    assert rows["0"]["stored_bytes"] == 16 * 8 * 9 * 4 and rows["0"]["stored_over_dense"] == 0.5
    assert rows["5"]["kept"].startswith("2:4") and rows["5"]["dense_shape"] == [4, 16]
    assert rows["5"]["stored_bytes"] == 4 * (8 * 4 + 2)  # half of 16 columns, two bytes
    text = cli("inspect", "small").output
    assert "bytes stored" in text and "bytes dense" in text and "50.0 %" in text
    assert f"dense {sum(row['dense_bytes'] for row in rows.values()):,}." in " ".join(text.split())


def test_grouped_convolutions_are_shown_at_their_width():
    from slimgemm.benchmarks import saved

    index = {"width": 32, "index": list(range(16))}
    entry = {"kept_out": index, "kept_in": index, "shapes": {"weight": [16, 1, 3, 3]}}
    depthwise = {**entry, "attributes": {"groups": 16}}
    assert saved._dense_shape(depthwise, None) == [32, 1, 3, 3]
    grouped = {**entry, "attributes": {"groups": 4}, "shapes": {"weight": [16, 4, 3, 3]}}
    assert saved._dense_shape(grouped, None) == [32, 8, 3, 3]


def test_a_search_needs_a_limit(cli):
    done = cli("prune", "USER:make_model", "USER:make_data")
    assert done.exit_code == 2 and "a search needs a limit" in done.output


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_folders_that_are_no_checkpoints(cli, tmp_path, command):
    (tmp_path / "empty").mkdir()
    for folder, message in (
        ("empty", "there is no prune.json in empty nor in empty/model; give a folder"),
        ("absent", "absent is no folder"),
    ):
        done = cli(command, folder)
        assert done.exit_code == 2 and message in done.output


def stopped(cli, what, number, *arguments):
    """A run in which call `number` of `what` raises; its last line, and all lines."""
    (Path.cwd() / what).write_text(str(number))
    done = cli("prune", *arguments, *SHORT, "--max-macs", "60000")
    (Path.cwd() / what).unlink()
    assert done.exit_code == 2, done.output
    return done.output.splitlines()


def test_what_raises_in_the_middle_is_said_in_a_line_and_the_search_goes_on(cli, tmp_path):
    arguments = ["USER:make_model", "USER:make_data", "--metric", "USER:failing_metric"]
    whole = cli("prune", *arguments, *SHORT, "--max-macs", "60000", "--out", "whole")
    assert whole.exit_code == 0, whole.output
    *said, last = stopped(cli, "metric", 4, *arguments)
    assert re.fullmatch(
        cli.named(
            r"error: the metric USER:failing_metric raised KeyError: 'metric' in fails "
            r"\(USER.py, line \d+\), while trying 'step 0 2'; the same command goes on from "
            r"out/search; its traceback is in out/search/traceback.txt"
        ),
        last,
    ), last
    assert said and all(line.startswith("step 0 ") for line in said)
    trace = (tmp_path / "out/search/traceback.txt").read_text()
    assert trace.startswith("Traceback") and 'fails("metric")' in trace
    done = cli("prune", *arguments, *SHORT, "--max-macs", "60000")
    assert done.exit_code == 0 and "Moved" not in done.output, done.output
    first = next(line for line in done.output.splitlines() if line.startswith("step 0"))
    assert first.startswith("step 0 2: ")  # what was found before is not evaluated again
    assert not (tmp_path / "out/search/traceback.txt").exists()
    reports = [json.loads((tmp_path / f"{out}/search/report.json").read_text()) for out in
               ("whole", "out")]  # fmt: skip
    assert reports[0] == reports[1]


def test_the_loader_and_the_forward_are_named_too(cli, tmp_path):
    # 32 rows are read to look at the loader, 32 for the check of the loss
    said = stopped(cli, "row", 70, "USER:make_model", "USER:failing_data")
    assert len(said) == 1
    assert said[0].startswith(
        cli.named("error: the training loader of USER:failing_data raised KeyError: 'row' in fails")
    )
    assert "while trying 'step 0 uncut'; the same command goes on" in said[0]
    said = stopped(cli, "forward", 1, "USER:Net", "USER:make_data", "--debug", "--out", "net")
    assert said[0].startswith("Traceback") and any("in forward" in line for line in said)
    assert said[-1].startswith("error: the run raised KeyError: 'forward' in fails (")
    assert said[-1].endswith("; its traceback is above")
    assert not (tmp_path / "net/search/traceback.txt").exists()


def test_an_error_in_a_worker_of_a_loader_is_found_in_its_message(cli, tmp_path):
    (tmp_path / "bad row").touch()
    done = cli("prune", "USER:make_model", "USER:data_of_workers", "--max-macs", "60000", *SHORT)
    line = done.output.splitlines()[-1]
    assert line == "error: the training loader raised ValueError: row 0 is bad"
    (tmp_path / "bad row").unlink()
    # a worker begins to count anew; the second batch is first asked for in the search
    said = stopped(cli, "row", 40, "USER:make_model", "USER:data_of_workers")
    assert re.match(
        cli.named(
            r"error: the training loader of USER:data_of_workers raised KeyError: 'row' in fails "
            r"\(USER.py, line \d+\), while trying 'step 0 uncut'; "
        ),
        said[-1],
    ), said[-1]


def test_a_value_error_of_the_user_is_not_taken_for_a_refusal(cli, tmp_path):
    (tmp_path / "bad row").touch()
    done = cli("prune", "USER:make_model", "USER:failing_data", *SHORT, "--max-macs", "60000")
    line = cli.named("error: the training loader raised ValueError: row 0 is bad")
    assert done.exit_code == 2 and done.output.splitlines()[-1] == line  # before the search


def test_a_traceback_that_cannot_be_written_is_shown(tmp_path, capsys):
    from slimgemm.benchmarks.user_code import UserError, told

    (tmp_path / "file").touch()
    text = r"^the run raised OSError: disk full in .*; the same command goes .*; its .* is above$"
    with pytest.raises(UserError, match=text), told(tmp_path / "file/search", False):
        raise OSError("disk full")
    assert capsys.readouterr().err.startswith("Traceback")


def test_measured_energy_is_what_the_limit_is_of(cli, tmp_path, monkeypatch):
    from slimgemm.benchmarks import prune_job

    models = []

    def measure(forward, device):  # a joule for each parameter
        forward()
        kept = float(sum(p.numel() for p in models[-1].parameters()))
        return Joules(Times(kept, kept, kept), 50.0, 7)

    monkeypatch.setattr(prune_job, "nvml_counter", lambda device: None)
    monkeypatch.setattr(prune_job, "measure_joules", measure)
    monkeypatch.setattr(prune_job, "run", lambda model, inputs: models.append(model))
    arguments = ["USER:make_model", "USER:make_data", *SHORT, "--max-energy-mj", "1500000"]
    done = cli("prune", *arguments, "--measured-energy")
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "out/search/report.json").read_text())
    dense = 16 * 64 + 64 + 64 * 32 + 32 + 32 * 4 + 4
    finished = sum(p.numel() for p in models[-1].parameters())
    assert report["costs"]["dense"]["energy_mj"] == pytest.approx(1e3 * dense)
    assert report["costs"]["measured"]["energy_mj"] == 1e3 * finished <= 1.5e6
    assert not any(model.training for model in models)
    assert re.search(r"^measured energy: .* mJ per forward .* 50.0 W of idle", done.output, re.M)
    other = cli("prune", *arguments)  # by prediction: another search
    assert "Moved out/search and out/model" in other.output


def test_measured_energy_without_an_nvidia_gpu_is_refused_first(cli, tmp_path):
    done = cli("prune", "nothing:make", "nothing:make", "--max-energy-mj", "1", "--measured-energy")
    assert done.exit_code == 2
    assert done.output == (
        "error: --measured-energy cannot be had: measured energy needs an NVIDIA GPU, got cpu; the "
        "predicted energy of pruning.energy runs anywhere; leave it out\n"
    )
    assert not (tmp_path / "out").exists()
