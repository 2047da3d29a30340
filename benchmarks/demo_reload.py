"""Loads saved models in a fresh process and returns what they compute there.

    python -m slimgemm.benchmarks.demo_reload job.json

The child reads the job, loads each folder, runs the same images and writes the logits; it prints
one line per model. Nothing but files passes between the two processes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from slimgemm import sparse_ops
from slimgemm.benchmarks import demo_train
from slimgemm.benchmarks.digits import Digits


class ReloadError(RuntimeError):
    """The fresh process failed; the message ends with its last line."""


def reload(
    folders: Sequence[Path],
    data: Digits,
    device: torch.device,
    tick: Callable[[str], object] = lambda line: None,
) -> list[Tensor]:
    """Logits of the test images by each saved model, computed in one fresh process.

    Args:
        tick: called with the name of each model as the process finishes it.

    Raises:
        ReloadError: the process ended with an error.
    """
    with tempfile.TemporaryDirectory(prefix="slimgemm-demo-") as name:
        scratch = Path(name)
        safetensors.torch.save_file({"images": data.test_x}, scratch / "images.safetensors")
        job = {
            "folders": [str(folder.resolve()) for folder in folders],
            "image": data.image,
            "classes": data.classes,
            "images": str(scratch / "images.safetensors"),
            "outputs": str(scratch / "outputs.safetensors"),
            "device": str(device),
            "threads": torch.get_num_threads(),
        }
        (scratch / "job.json").write_text(json.dumps(job), encoding="utf-8")
        _run(scratch / "job.json", tick)
        outputs = safetensors.torch.load_file(job["outputs"])
    return [outputs[str(place)] for place in range(len(folders))]


def _run(job: Path, tick: Callable[[str], object]) -> None:
    # -P: the folder one stands in must not shadow an installed package.
    command = [sys.executable, "-P", "-m", "slimgemm.benchmarks.demo_reload", str(job)]
    with (
        open(job.with_name("stderr"), "w+", encoding="utf-8") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as child,
    ):
        assert child.stdout is not None
        for line in child.stdout:
            tick(line.strip())
        if child.wait() != 0:
            errors.seek(0)
            last = (errors.read().strip().splitlines() or ["no message"])[-1]
            raise ReloadError(
                f"loading in a fresh process failed (exit {child.returncode}): {last}"
            )


def child(job_path: Path) -> None:
    """What the fresh process does."""
    job = json.loads(job_path.read_text(encoding="utf-8"))
    device = torch.device(job["device"])
    images = safetensors.torch.load_file(job["images"])["images"]
    image = (int(job["image"][0]), int(job["image"][1]))
    outputs = {}
    with demo_train.deterministic(job["threads"]):
        for place, folder in enumerate(job["folders"]):
            model = sparse_ops.load(lambda: demo_train.build(image, job["classes"]), folder)
            outputs[str(place)] = demo_train.logits(model.to(device), images, device)
            print(Path(folder).name, flush=True)
    safetensors.torch.save_file(outputs, job["outputs"])


if __name__ == "__main__":
    child(Path(sys.argv[1]))
