"""`slimgemm`: what all commands share, and `slimgemm kernels`."""

import json
import re
from importlib import metadata

import pytest
from typer.testing import CliRunner

from slimgemm.benchmarks.cli import app
from slimgemm.kernels import build
from slimgemm.kernels.build_compile import Report
from slimgemm.kernels.build_kernels import DTYPES


def cli(*arguments):
    done = CliRunner().invoke(app, list(arguments))
    return done.exit_code, " ".join(done.output.split())


def test_the_version_is_that_of_the_package():
    code, text = cli("--version")
    versions = (metadata.version(name) for name in ("slimgemm", "torch"))
    assert code == 0 and text == "slimgemm {}, torch {}".format(*versions)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "nonsense"], "dtype must be one of fp16, .* fp8, int8, got 'nonsense'"),
        (["--op", "nonsense"], "op must be one of pack_24, .* spmm_24, .* got 'nonsense'"),
        (["--arch", "nonsense"], "arch must be one of sm_75, .* gfx950, got 'nonsense'"),
        (["--op", "spmm_24", "--dtype", "fp8"],
         "nothing is built for spmm_24, fp8 together; spmm_24 has fp16, bf16, fp32, tf32 for"),
        (["--op", "spmm_24_wgmma_sp", "--arch", "sm_80"],
         r"spmm_24_wgmma_sp, sm_80 together; spmm_24_wgmma_sp has fp16, bf16 for sm_90"),
        (["--arch", "gfx942", "--dtype", "fp8"], "fp8, gfx942 together; leave one of them out"),
        (["--op", "pack_24", "--out", "."], r"out must be a JSON file, \. is a folder"),
    ],
)  # fmt: skip
def test_builds_that_do_not_exist_are_refused_before_any(arguments, message, monkeypatch):
    monkeypatch.setattr(build, "run", lambda *a: pytest.fail("something was built"))
    code, text = cli("kernels", *arguments)
    assert code == 2 and re.search(message, text), text


def test_the_help_of_kernels_names_every_dtype():
    text = cli("kernels", "--help")[1]
    assert all(re.search(rf"\b{name}\b", text) for name in DTYPES), text


def test_reports_go_to_a_new_folder(tmp_path, monkeypatch):
    made = Report("pack_24", "_pack_24_kernel", "2:4", "fp16", "sm_80", 32)
    monkeypatch.setattr(build, "run", lambda wanted, jobs, done: [made])
    out = tmp_path / "new" / "builds.json"
    arguments = ("--op", "pack_24", "--arch", "sm_80", "--dtype", "fp16", "--out", str(out))
    assert cli("kernels", *arguments)[0] == 0
    assert json.loads(out.read_text())["reports"][0]["registers"] == 32
