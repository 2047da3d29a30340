"""Reports of pytest-benchmark as a recorded file."""

import json

import pytest

from slimgemm.benchmarks import micro, records
from slimgemm.benchmarks.micro import MicroRow

STATS = {"rounds": 7, "min": 1e-6, "q1": 2e-6, "median": 3e-6, "q3": 4e-6, "mean": 9.0}
REPORT = {
    "benchmarks": [
        {"group": "pack", "name": "test_pack[256]", "stats": STATS},
        {"group": None, "name": "test_plan[x]", "stats": STATS},
    ]
}


def test_a_report_becomes_rows(tmp_path, capsys):
    (tmp_path / "micro.json").write_text(json.dumps(REPORT))
    assert micro.main([str(tmp_path / "micro.json"), "--out", str(tmp_path)]) == 0
    read = records.read(tmp_path / "cpu_micro.csv", MicroRow)
    assert read.rows == [
        MicroRow("pack", "test_pack[256]", 7, 1.0, 2.0, 3.0, 4.0),
        MicroRow("plan", "test_plan[x]", 7, 1.0, 2.0, 3.0, 4.0),
    ]
    assert "--benchmark-enable" in read.head["command"] and "torch" in read.head
    assert "2 rows" in capsys.readouterr().out


@pytest.mark.parametrize("text", ['{"benchmarks": []}', "not json"])
def test_reports_that_hold_nothing_are_refused(tmp_path, capsys, text):
    (tmp_path / "micro.json").write_text(text)
    assert micro.main([str(tmp_path / "micro.json"), "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert not (tmp_path / "cpu_micro.csv").exists()
