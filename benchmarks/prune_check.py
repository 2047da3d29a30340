"""prune_check: what `slimgemm prune` makes sure of before a search of hours, not after it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slimgemm import pruning, sparse_ops
from slimgemm.benchmarks.user_code import TRACEBACK, users_code
from slimgemm.kernels.formats import PATTERNS
from slimgemm.pruning.inputs import evaluating, run, tensors_of, to_device
from slimgemm.pruning.journal import Journal
from slimgemm.pruning.search import JOURNAL
from slimgemm.sparse_ops.checkpoint import check_target

MODEL, SEARCH, EARLIER = "model", "search", "earlier"  # in the folder of a run
REPORT, PICTURE = "report.json", "front.png"  # in SEARCH, beside what the search itself writes
OURS = {JOURNAL, REPORT, PICTURE, TRACEBACK, "latency.json", "steps", "finished"}


def device_of(word: str) -> torch.device:
    """The device that a word names.

    Raises:
        ValueError: there is no such device, here or at all.
    """
    try:
        device = torch.device(word)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu, cuda or cuda:NUMBER, got {word!r}")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device {word} asked for, torch sees no GPU")
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise ValueError(f"device {word} asked for, torch sees {count} GPUs, counted from 0")
    return device


def pattern_of(word: str, multiple_of: int) -> pruning.Channels | pruning.NofM:
    """The pattern that a word names: channels, or keep:group.

    Raises:
        ValueError: it is no such word, or no format packs it.
    """
    if word == "channels":
        return pruning.Channels(multiple_of=multiple_of)
    keep, _, group = word.partition(":")
    known = [f"{keep}:{group}" for keep, group in PATTERNS]
    if word not in known:
        raise ValueError(
            f"pattern must be channels or, as keep:group, one of {', '.join(known)}; got {word!r}"
        )
    return pruning.NofM(int(keep), int(group))


def check_folder(out: Path) -> None:
    """Make a folder; ValueError where it is a file or cannot be written."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; --out must be a folder, or a new one")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ValueError(f"--out {out} cannot be written: {error.strerror}") from error


def check_out(out: Path) -> None:
    """Make the folder of the run.

    Raises:
        ValueError: it is a file, cannot be written, or holds what saving would delete.
    """
    search = out / SEARCH
    if search.exists() and not search.is_dir():
        raise ValueError(f"{search} is a file; --out must be a folder, or a new one")
    for path in search.glob("*"):
        if path.name not in OURS and path.suffix != ".part":
            raise ValueError(f"{path} is of no search; choose another folder as --out")
    check_folder(out)
    check_target(out / MODEL, overwrite=True)


def check_saves(model: nn.Module, out: Path) -> None:
    """Raise ValueError where the dense model cannot be saved in `out`; nothing stays there."""
    with tempfile.TemporaryDirectory(dir=out) as folder:
        try:
            sparse_ops.save(model, Path(folder) / MODEL)
        except OSError as error:
            raise ValueError(f"the model cannot be saved in {out}: {error.strerror}") from error


def check_loaders(made: Any) -> tuple[Iterable[Any], Iterable[Any]]:
    """The training and the test loader.

    Raises:
        ValueError: they are no pair, empty, can be read only once, yield something else than
            (inputs, target), or the test loader shuffles.
    """
    if not isinstance(made, (tuple, list)) or len(made) != 2:
        raise ValueError("the data factory must return (training loader, test loader)")
    for name, loader in zip(("training", "test"), made, strict=True):
        with users_code(f"the {name} loader"):
            iterator = iter(loader)
        if iterator is loader:
            raise ValueError(
                f"the {name} loader can be read only once; return a list or a DataLoader"
            )
        batch = first_batch(loader, name)
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise ValueError(f"the {name} loader must yield (inputs, target), and at least one")
    first, again = (tensors_of(first_batch(made[1], "test")) for _ in range(2))
    if len(first) != len(again) or not all(map(torch.equal, first, again)):
        raise ValueError(
            "the test loader's first batch differs from pass to pass; turn its shuffling off, or "
            "costs differ and a search that was killed cannot go on"
        )
    return made[0], made[1]


def first_batch(loader: Iterable[Any], name: str) -> Any:
    """The first batch, None where there is none."""
    with users_code(f"the {name} loader"):
        return next(iter(loader), None)


def check_loss(model: nn.Module, batch: Any, loss: Callable[[Any, Any], Any], name: str) -> None:
    """Raise ValueError unless the loss of a batch is a finite scalar that can be trained on."""
    device = next(model.parameters()).device
    inputs, target = (to_device(part, device) for part in batch)
    with evaluating(model), torch.enable_grad():
        with users_code("the model's forward of a training batch"):
            outputs = run(model, inputs)
        with users_code(f"the loss {name}"):
            value = loss(outputs, target)
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        got = list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise ValueError(f"the loss must give one number as a tensor, got {got}")
    if not value.requires_grad:
        raise ValueError(
            "the loss has no gradient: every parameter is frozen, or something is detached; "
            "--short 0 --long 0 goes without training"
        )
    if not bool(torch.isfinite(value)):
        raise ValueError(f"the loss of the first training batch is {float(value.detach())}")


def _empty(search: Path) -> bool:
    """Whether a search ended before it found anything: its journal has a first line at most."""
    journal = search / JOURNAL
    names = {path.name for path in search.iterdir()} - {JOURNAL, TRACEBACK}
    return not names and (not journal.is_file() or journal.read_bytes().count(b"\n") < 2)


def make_room(out: Path, key: str) -> str | None:
    """Move what another run left in `out` aside, so that this one begins anew or goes on.

    Args:
        key: of this run, as in its journal.

    Returns:
        What was moved and where, or None.
    """
    search = out / SEARCH
    try:
        if search.is_dir():
            Journal(search / JOURNAL, key)
            return None
    except ValueError:
        pass
    if search.is_dir() and _empty(search):
        shutil.rmtree(search)
    present = [place for place in (search, out / MODEL) if place.exists()]
    if not present:
        return None
    number = 1
    while (aside := out / f"{EARLIER}-{number}").exists():
        number += 1
    aside.mkdir()
    for place in present:
        place.rename(aside / place.name)
    names = " and ".join(str(place) for place in present)
    return (
        f"Moved {names} to {aside}: it is of another run (model, data, options or versions differ)"
    )
