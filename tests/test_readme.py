"""Every code block of the README runs, and every file and command that it names exists."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
TEXT = README.read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", TEXT, re.M | re.S)


def blocks(language):
    return [body for name, body in BLOCKS if name == language]


def test_blocks_are_of_known_languages_and_there_are_some():
    assert {name for name, _ in BLOCKS} <= {"python", "text"}
    assert len(blocks("python")) >= 2


def test_python_blocks_run_in_order(tmp_path):
    script = tmp_path / "readme.py"
    script.write_text("\n".join(blocks("python")))
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "SparseLinear24" not in done.stderr
    assert "packed (2:4)" in done.stdout


def test_the_picture_is_what_the_packer_does():
    import torch

    from slimgemm import kernels

    (picture,) = blocks("text")
    a, b, c, d = 1.0, 2.0, 3.0, 4.0
    packed = kernels.pack_24(torch.tensor([[0, a, 0, b, c, d, 0, 0]], dtype=torch.float16))
    assert packed.values.tolist() == [[a, b, c, d]]
    (byte,) = re.findall(r"0b([01_]+)", picture)
    assert packed.meta.tolist() == [[int(byte.replace("_", ""), 2)]]
    assert packed.nbytes == 9 and packed.dense_nbytes == 16


@pytest.mark.parametrize("target", sorted(set(re.findall(r"`make (\w+)`", TEXT))))
def test_make_targets_exist(target):
    makefile = (README.parent / "Makefile").read_text()
    assert re.search(rf"^{target}:", makefile, re.M)


def test_named_files_exist():
    names = re.findall(r"\]\(([^)#]+)\)", TEXT) + re.findall(r"`(\w+/[\w./]+\.\w+)`", TEXT)
    missing = [n for n in names if not n.startswith("http") and not (README.parent / n).exists()]
    assert not missing


def test_it_is_short():
    assert len(TEXT.splitlines()) <= 150
