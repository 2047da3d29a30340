"""user_code: the user's own functions by name, and what is said where one of them raises.

Before a search its traceback is shown, and a line. In the middle of one (`told`) there is the line
alone, with the function, its file and the candidate; the traceback goes to a file, or with --debug
to the screen.
"""

from __future__ import annotations

import functools
import importlib
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from slimgemm.pruning.journal import TRYING

FRAME = re.compile(r'File "(.+)", line (\d+), in (.+)')  # of a traceback in words
RAISED = "raised by "  # how a note on an exception begins that says whose it is
TRACEBACK = "traceback.txt"  # in the folder of a search or scan


class UserError(ValueError):
    """The user's own code raised; its traceback was shown or written."""


@contextmanager
def users_code(what: str) -> Iterator[None]:
    """Around the user's own code: show its traceback, then one line that says what raised.

    Raises:
        UserError: an exception came out of the block.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        _show(error)
        raise UserError(_raised(what, error)) from None


def _raised(what: str, error: Exception) -> str:
    lines = str(error).splitlines()
    if _of_worker(error):  # the error itself comes last
        return f"{what} raised {lines[-1]}"
    return f"{what} raised {type(error).__name__}" + f": {lines[0]}" * bool(lines)


def _of_worker(error: Exception) -> bool:
    """Whether it was raised in a worker of a DataLoader, whose traceback is in the message."""
    lines = str(error).splitlines()
    return len(lines) > 2 and "worker process" in lines[0] and "Original Traceback" in lines[1]


def _show(error: Exception) -> None:
    """The traceback from the first frame of the user's own on."""
    trace = error.__traceback__
    while trace is not None and not _is_users(trace.tb_frame):
        trace = trace.tb_next
    print("".join(traceback.format_exception(type(error), error, trace)), file=sys.stderr, end="")


def _is_ours(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0] == "slimgemm"


def _is_users(frame: FrameType, installed: bool = True) -> bool:
    """Whether it is code of neither this package nor Python; perhaps of no installed one either."""
    file = frame.f_code.co_filename
    if _is_ours(frame) or file.startswith("<"):
        return False
    paths = sysconfig.get_paths()
    if any(file.startswith(paths[name]) for name in ("purelib", "platlib")):
        return installed
    return not file.startswith(paths["stdlib"])


def _frames(trace: TracebackType | None) -> list[tuple[FrameType, int]]:
    """Each frame and its line, the innermost last."""
    return list(traceback.walk_tb(trace))


def _place(error: Exception) -> str:
    """The user's innermost function, its file and its line; empty where there is none."""
    frames = [(f, line) for f, line in _frames(error.__traceback__) if _is_users(f, False)]
    found = [(f.f_code.co_filename, str(line), f.f_code.co_qualname) for f, line in frames]
    if _of_worker(error):
        found = FRAME.findall(str(error))
    if not found:
        return ""
    name, line, function = found[-1]
    file = Path(name)
    if file.is_relative_to(Path.cwd()):
        file = file.relative_to(Path.cwd())
    return f" in {function} ({file}, line {line})"


def _note(error: Exception, beginning: str) -> str:
    """The first note that begins so, without that; empty where there is none."""
    notes = getattr(error, "__notes__", ())
    found = (note.removeprefix(beginning) for note in notes if note.startswith(beginning))
    return next(found, "")


@contextmanager
def noted(what: str) -> Iterator[None]:
    """Exceptions that come out of the block say that they are of `what`."""
    try:
        yield
    except Exception as error:
        error.add_note(f"{RAISED}{what}")
        raise


def guarded(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The user's function; what it raises says that it is of `what`."""

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        with noted(what):
            return function(*arguments)

    return call


class Guarded:
    """The user's loader; what it raises says that it is of `what`."""

    def __init__(self, loader: Iterable[Any], what: str) -> None:
        self.loader, self.what = loader, what

    @property
    def generator(self) -> Any:
        """Of a DataLoader; FineTune seeds it."""
        return getattr(self.loader, "generator", None)

    def __iter__(self) -> Iterator[Any]:
        with noted(self.what):
            iterator = iter(self.loader)
        end = object()
        while True:
            with noted(self.what):
                batch = next(iterator, end)
            if batch is end:
                return
            yield batch


@contextmanager
def told(folder: Path, debug: bool) -> Iterator[None]:
    """Around what goes on from `folder` if it is stopped: one line for what raises in it.

    What this package itself refuses passes through. The traceback of an earlier run goes.

    Args:
        folder: of the journal; the traceback is written there.
        debug: the traceback is shown instead.

    Raises:
        UserError: what raised, where, at which candidate, and where the traceback is.
    """
    with suppress(OSError):
        (folder / TRACEBACK).unlink()
    try:
        yield
    except Exception as error:
        frames = _frames(error.__traceback__)
        whose = _note(error, RAISED)
        if isinstance(error, ValueError) and _is_ours(frames[-1][0]) and not whose:
            raise
        said = _raised(whose or "the run", error) + _place(error)
        at = _note(error, TRYING)
        said += f", while trying {at!r}" * bool(at)
        trace = "".join(traceback.format_exception(error))
        where = "its traceback is above" if debug else _written(trace, folder / TRACEBACK)
        if debug or not where:
            print(trace, file=sys.stderr, end="")
            where = "its traceback is above"
        raise UserError(f"{said}; the same command goes on from {folder}; {where}") from None


def _written(trace: str, path: Path) -> str:
    """Where the traceback is; empty where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(trace)
    except OSError:
        return ""
    return f"its traceback is in {path}"


def named(place: str) -> Callable[..., Any]:
    """The function that "module:name" names, found from the present folder too.

    Raises:
        ValueError: it is no such name, there is no such module, or the module raises.
    """
    module, _, name = place.partition(":")
    if not module or not name:
        raise ValueError(f"{place!r} must be module:function")
    if os.sep in module or module.endswith(".py"):
        path = Path(module)
        raise ValueError(
            f"{place!r} is a path; write {path.stem}:{name} and run it in {path.parent.resolve()}"
        )
    folder = os.getcwd()
    added = folder not in sys.path
    if added:
        sys.path.insert(0, folder)
    try:
        found: Any = _imported(module, place)
        for part in name.split("."):
            found = getattr(found, part)
    except AttributeError as error:
        raise ValueError(f"{place}: {error}") from error
    finally:
        if added:
            sys.path.remove(folder)
    if not callable(found):
        raise ValueError(f"{place} is a {type(found).__name__}, it must be a function")
    return found


def _imported(module: str, place: str) -> Any:
    parents = {module.rsplit(".", n)[0] for n in range(module.count(".") + 1)}
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name in parents:
            where = module.partition(".")[0]
            raise ValueError(f"{place}: {error}; run it where {where}.py lies") from error
        with users_code(f"importing {module}"):
            raise
    except Exception:
        with users_code(f"importing {module}"):
            raise
