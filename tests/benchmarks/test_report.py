"""Reports: every number stands in a recorded file, losing rows too."""

import dataclasses
import json
import re
import shutil

import pytest

from slimgemm.benchmarks import records, report, report_bars
from slimgemm.benchmarks.bench_model import ModelRow
from slimgemm.benchmarks.records import RESULTS, Record
from slimgemm.benchmarks.rows import Row

README = report.README.read_text(encoding="utf-8")
GPU = {
    "device": "NVIDIA H200", "compute_capability": "9.0", "driver": "580.1", "torch": "2.11.0",
    "triton": "3.6.0", "date": "2026-11-22", "command": "slimgemm bench --op spmm_24",
    "clock_sm_mhz_before": "1980", "limit_copy_tb_per_s_bf16": "4.3",
    "limit_dense_tflops_bf16": "790",
}  # fmt: skip


def row(implementation, us, ratio, m=8, layer="a", **changes):
    made = Row(
        "spmm_24", layer, f"m {m}, n 64, k 64", "bf16", implementation, "timed", "", 1e-3, 2e-3,
        2, us, us, us, us / 2, us / 2, us / 2, rate_from="graph", moved_bytes=100,
        tb_per_s=3.21, dense_equivalent_tflops=45.6, byte_limit_percent=74.7,
        compute_limit_percent=5.77, best_dense_over_this=ratio,
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


ROWS = [
    row("slimgemm spmm_24", 10.0, 1.6),
    row("slimgemm spmm_24", 40.0, 0.4, layer="b"),
    row("torch cusparselt", 20.0, 0.8),
    row("torch dense", 16.0, 1.0),
    row("torch cutlass", 1.0, None, status="missing", reason="for 8.x, this is 9.0"),
]


@pytest.fixture
def folder(tmp_path):
    """A folder of recorded files with those of a GPU, invented here."""
    shutil.copy(RESULTS / "cpu_demo.json", tmp_path)
    text = records.as_csv(GPU, ROWS)
    (tmp_path / "h200_spmm_24.csv").write_text(text)
    model = ModelRow(
        "llama3-8b", "decode, 1 sequences", "bf16", "2:4", "timed", packed_layers=3, layers=4,
        weight_bytes=9_000_000, eager_us_p20=7.0, eager_us_p50=8.0, eager_us_p80=9.0,
        rate_from="eager", unit="tokens", units_per_s=125000.0, joules_per_unit=0.25,
        best_dense_over_this=1.3,
    )  # fmt: skip
    (tmp_path / "h200_models.csv").write_text(records.as_csv(GPU, [model], ModelRow))
    (tmp_path / "tuned.csv").write_text("a,b\n1,2\n")
    return tmp_path


def test_the_readme_holds_what_the_recorded_files_say():
    expected = report.readme_section(RESULTS)
    assert report.section_of(README) == expected, "run python -m slimgemm.benchmarks.report"


def test_every_number_of_the_readme_is_recorded():
    section = report.section_of(README)
    assert len(re.findall(r"\d+", section)) > 20
    assert report.unrecorded(section, RESULTS) == []


MEASURED = r"\d(?:\s*(?:µs|us|ms|x)(?![\w-])|\s*\u00d7|\s*(?:times|TFLOP|TB/s|tokens? (?:a|per) s))"


def test_what_is_measured_stands_in_the_section_that_is_made_from_the_files():
    outside = README.replace(report.section_of(README), "")
    prose = re.sub(r"```.*?```|`[^`]*`", " ", outside, flags=re.DOTALL)
    # Sizes are no results, nor is what the README says not to promise.
    claims = re.sub(r"\d+ x \d+|a promise of 2x", " ", prose)
    assert re.findall(MEASURED, claims) == []
    assert all(re.search(MEASURED, text) for text in ("1.7x faster", "12 µs", "3 times"))


@pytest.mark.parametrize("number", ["1.3791", "48,213", "7.77x is 7.77"])
def test_a_number_that_nobody_recorded_is_found(number):
    assert report.unrecorded(f"It takes {number} us.", RESULTS)


def test_a_recorded_number_in_another_place_is_found_by_the_other_test():
    changed = report.section_of(README).replace("96.76", "97.50")
    assert changed != report.readme_section(RESULTS)


def test_the_results_folder_has_its_readme_and_plots():
    text = (RESULTS / "README.md").read_text(encoding="utf-8")
    loaded = report.load(RESULTS)
    plots = re.findall(r"!\[([^]]*)\]\((\S+)\)", text)
    assert text == report.results_readme(loaded, [(file, title) for title, file in plots])
    assert plots and all((RESULTS / file).is_file() for _, file in plots)
    assert all(f"## {name}\n" in text for name in loaded)


def test_recorded_files_hold_no_place_of_the_machine_that_wrote_them():
    for path in RESULTS.glob("*.csv"):
        assert not re.search(r"/(tmp|home|root|work)/", path.read_text()), path.name


def test_files_of_other_kinds_are_left_out(folder):
    assert list(report.load(folder)) == ["h200_models", "h200_spmm_24"]


def test_winning_losing_and_missing_rows_are_all_shown(folder):
    text = report.results_readme(report.load(folder), [("a.png", "a plot")])
    assert (
        "| slimgemm spmm_24 | 10.0 / 10.0 / 10.0 | 5.00 | 1.60 | 3.21 | 45.6 | 74.7 | 5.77 |"
        in text
    )
    assert "0.4 (slower)" in text and "0.8 (slower)" in text
    assert "- torch cutlass: missing, for 8.x, this is 9.0 (1 rows)" in text
    assert "`slimgemm bench --op spmm_24`" in text and "clock_sm_mhz_before 1980" in text
    assert "| 2:4 | 7.00 / 8.00 / 9.00 |  | 1.30 | 125,000 | 9.00 | 0.25 |" in text
    assert "![a plot](a.png)" in text
    assert "No file in this folder is of a GPU" not in text


def test_geometric_means_and_how_often_it_lost(folder):
    means = report_bars.geometric_means(ROWS)
    assert ["bf16", "8", "slimgemm spmm_24", "0.80", "0.40", "1 of 2"] in means
    assert ["bf16", "8", "torch cusparselt", "0.80", "0.80", "1 of 1"] in means
    assert not any("torch dense" in line for line in means)


def test_the_readme_of_a_gpu_has_its_means_and_no_excuse(folder):
    section = report.readme_section(folder)
    assert "NVIDIA H200, driver 580.1, torch 2.11.0, triton 3.6.0, 2026-11-22" in section
    assert "No layer of a bar." in section  # those of the fixture are none
    assert "No GPU" not in section
    assert report.unrecorded(section, folder) == []


def test_the_report_writes_both_readmes_and_the_plots(folder, capsys):
    readme = folder / "project.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    assert report.main(["--results", str(folder), "--readme", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert report.section_of(text) == report.readme_section(folder)
    written = (folder / "README.md").read_text()
    for name in ("speedup", "roofline"):
        file = folder / f"h200_spmm_24_{name}.png"
        assert file.read_bytes().startswith(b"\x89PNG") and file.name in written
    assert (folder / "cpu_demo_accuracy.png").is_file()
    assert "3 plots" in capsys.readouterr().out


def test_the_staircase_is_drawn_of_channels(folder):
    rows = [row("slimgemm gemm_channels", 5.0 * kept, 1.0) for kept in (16, 32)]
    rows = [
        dataclasses.replace(r, op="gemm_channels", shape=f"m 8, n 64, k 64, kept_n {k}, "
                            f"kept_k {k}, run 16") for r, k in zip(rows, (16, 32), strict=True)
    ]  # fmt: skip
    file = report.report_plots.staircase("h200_gemm_channels", Record(GPU, rows), folder)
    assert (folder / file).stat().st_size > 1000
    assert report.report_plots.staircase("h200_gemm_channels", Record(GPU, ROWS), folder) is None


def test_a_readme_without_markers_is_refused(folder, capsys):
    readme = folder / "project.md"
    readme.write_text("nothing\n")
    assert report.main(["--results", str(folder), "--readme", str(readme)]) == 2
    assert "must hold the lines <!-- measured" in capsys.readouterr().err
    assert readme.read_text() == "nothing\n"


def test_a_damaged_file_is_refused(folder, capsys):
    path = folder / "h200_spmm_24.csv"
    path.write_text(path.read_text().replace("op,layer", "operation,layer"))
    assert report.main(["--results", str(folder), "--readme", str(report.README)]) == 2
    assert "h200_spmm_24.csv must have the columns" in capsys.readouterr().err


def test_the_demo_file_is_what_the_table_says():
    demo = json.loads((RESULTS / "cpu_demo.json").read_text())
    accuracy = demo["stages"][0]["accuracy_mean"]
    assert f"| dense | {accuracy:.2f} ± " in report.readme_section(RESULTS)
