import json
import re

import pytest
import torch
from torch import nn

from slimgemm.kernels.timing import Times
from slimgemm.pruning.latency import LatencyTable
from slimgemm.pruning.sites import find_sites

BOTH = ["USER:make_model", "USER:make_data"]


def rows(output):
    """First cell -> the other cells of a printed table."""
    cells = [line.strip("│ ").split("│") for line in output.splitlines() if "│" in line]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in cells}


def test_scan_prints_a_table_draws_and_goes_on(cli, tmp_path):
    arguments = [*BOTH, "--pattern", "channels", "--pattern", "2:4", "--ratio", "0.5",
                 "--multiple-of", "8", "--max-drop", "60"]  # fmt: skip
    done = cli("scan", *arguments)
    assert done.exit_code == 0, done.output
    points = (tmp_path / "out/scan/points.jsonl").read_text().splitlines()
    values = {r["key"]: r["value"] for r in map(json.loads, points[1:])}
    channels = [f"channels, multiple of 8 0.500000 {name}" for name in "02"]
    assert list(values) == ["dense", *channels, *(f"2:4 0.500000 {name}" for name in "024")]
    said = f"2, channels, multiple of 8, 0.50 dropped: {values[channels[1]]:.6g}"
    assert said in done.output
    assert rows(done.output)["4"] == ["2:4", "0.50", f"0.50: {values['2:4 0.500000 4']:.4g}"]
    if "with scan.png" in done.output:
        assert (tmp_path / "out/scan/scan.png").read_bytes()[:4] == b"\x89PNG"
    # Half of it lost, it finds that half again, and nothing else.
    (tmp_path / "out/scan/points.jsonl").write_text("\n".join(points[:4]) + "\n")
    again = cli("scan", *arguments)
    assert again.exit_code == 0 and again.output.count(" dropped: ") == 3, again.output
    assert again.output.endswith(done.output[done.output.index("metric after pruning") :])
    assert (tmp_path / "out/scan/points.jsonl").read_text().splitlines() == points
    other = cli("scan", *arguments, "--metric", "loss")
    assert other.exit_code == 2 and "points.jsonl is of another run" in other.output


def test_a_scan_of_which_less_is_better(cli):
    done = cli("scan", *BOTH, "--metric", "loss", "--ratio", "0.9", "--max-drop", "0",
               "--ignore", "4")  # fmt: skip
    assert done.exit_code == 0 and "lower is better" in done.output, done.output
    assert list(rows(done.output)) == ["0"]
    assert rows(done.output)["0"][1] == "0.00"  # without nine of ten it is worse than dense


def test_what_raises_in_a_scan_is_said_in_a_line(cli, tmp_path):
    (tmp_path / "metric").write_text("2")
    arguments = [*BOTH, "--metric", "USER:failing_metric", "--ratio", "0.5",
                 "--multiple-of", "8"]  # fmt: skip
    done = cli("scan", *arguments)
    (line,) = done.output.splitlines()
    assert done.exit_code == 2 and re.search(
        r"raised KeyError: 'metric' in fails \(.*\), while trying 'channels, multiple of 8 0.500000"
        r" 0'; the same command goes on from out/scan; its traceback is in out/scan/traceback.txt",
        line,
    ), line
    (tmp_path / "metric").unlink()
    assert cli("scan", *arguments).exit_code == 0
    assert not (tmp_path / "out/scan/traceback.txt").exists()


@pytest.mark.parametrize("command", ["scan", "staircase"])
def test_bad_input_is_exit_code_2(cli, tmp_path, command):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / command).touch()
    for arguments, message in (
        (["USER:absent", "USER:make_data"], "has no attribute 'absent'"),
        ([*BOTH, "--rows", "65"], "--rows 65 is more than the first test batch has"),
        (BOTH, f"out/{command} is a file; --out must be a folder, or a new one"),
    ):
        where = [] if arguments is BOTH else ["--out", "other"]
        done = cli(command, *arguments, *where)
        assert done.exit_code == 2 and done.output.splitlines()[-1].startswith("error: ")
        assert message in done.output, done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ratio", "1.5"], r"ratios must be in \[0, 1\), got 1.5"),
        (["--pattern", "3:7"], "channels or, as keep:group, one of 2:4"),
        (["--lower-is-better"], "for a metric of your own"),
        (["--metric", "USER:not_a_number"], "not_a_number of the dense model is nan"),
    ],
)
def test_bad_options_of_a_scan(cli, arguments, message):
    done = cli("scan", *BOTH, *arguments)
    assert done.exit_code == 2 and re.search(message, done.output.splitlines()[-1]), done.output


def test_staircase_times_what_can_be_cut_once(cli, tmp_path):
    arguments = [*BOTH, "--span", "6", "--rounds", "2", "--rows", "8"]
    done = cli("staircase", *arguments)
    assert done.exit_code == 0, done.output
    found = rows(done.output)
    assert {name.split(":")[0]: row[0] for name, row in found.items()} == {
        "2": "27 to 32", "0": "59 to 64"
    }  # fmt: skip
    times = (tmp_path / "out/staircase/latency.json").read_text()
    table = json.loads(times)["us"]
    (measured,) = (rows["dense"] for rows in table.values())
    assert [row[0] for row in measured] == [*range(27, 33), *range(59, 65)]
    if "with staircase.png" in done.output:
        assert (tmp_path / "out/staircase/staircase.png").read_bytes()[:4] == b"\x89PNG"
    assert cli("staircase", *arguments).output == done.output  # nothing is timed again
    assert (tmp_path / "out/staircase/latency.json").read_text() == times


def stairs(tmp_path, steps):
    """A table of times for the user's layers, in steps of each layer's own width."""
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 32))
    folder = tmp_path / "out/staircase"
    folder.mkdir(parents=True)
    table = LatencyTable(path=folder / "latency.json")
    for name, site in find_sites(model, torch.zeros(64, 16)).items():
        dense = table.times.setdefault(site.signature, {}).setdefault("dense", {})
        for width in range(1, site.weight[0] + 1):
            us = 10.0 * -(-width // steps[name])
            dense[width, site.weight[1]] = Times(us, us, us)
    table.save()


@pytest.mark.parametrize(
    ("steps", "advice"),
    [
        ({"0": 8, "2": 16}, "Rounding up is free to all with slimgemm prune --multiple-of 8."),
        ({"0": 64, "2": 4}, "Cutting 0 saves no time here, up to its whole width. Rounding up is "
         "free to all others with slimgemm prune --multiple-of 4."),
        ({"0": 8, "2": 1}, "Rounding the width of 2 up costs time: slimgemm prune --multiple-of "
         "1."),
        ({"0": 64, "2": 32}, "Cutting 2, 0 saves no time here, up to the whole width."),
    ],
)  # fmt: skip
def test_the_advice_follows_the_steps(cli, tmp_path, steps, advice):
    stairs(tmp_path, steps)
    done = cli("staircase", *BOTH, "--span", "64")
    assert done.exit_code == 0, done.output
    assert done.output.splitlines()[-2] == advice
    multiples = {name.split(":")[0]: row[-1] for name, row in rows(done.output).items()}
    assert multiples == {name: str(step) for name, step in steps.items()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layer", "7"], "--layer 7 is no layer that runs; layers are wide, grouped, last, few"),
        (["--layer", "grouped"], "--layer grouped has 2 groups, so that most widths make no layer"),
        (["--layer", "few"], "--layer few is less than 4 wide; name a wider one"),
        ([], "name one by --layer"),
    ],
)
def test_layers_that_cannot_be_timed_are_refused(cli, tmp_path, arguments, message):
    (tmp_path / "odd.py").write_text(ODD)
    done = cli("staircase", "odd:make_model", "odd:make_data", *arguments)
    assert done.exit_code == 2 and message in done.output.splitlines()[-1], done.output


ODD = """
import torch
from torch import nn

class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide, self.grouped = nn.Conv2d(1, 2, 1), nn.Conv2d(2, 8, 1, groups=2)
        self.last, self.few = nn.Linear(8, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.few(self.last(self.grouped(self.wide(x)).mean((2, 3))))

make_model = Odd

def make_data():
    batch = [(torch.zeros(4, 1, 2, 2), torch.zeros(4, dtype=torch.int64))]
    return batch, batch
"""
