"""Progress of long loops: bars on a terminal, one plain line per loop everywhere.

A line stays when its loop ends, so a log file reads like the terminal did.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

HEARTBEAT_S = 10.0  # without a terminal, a loop says where it is this often
REFRESH_S = 0.1  # on a terminal, bars are drawn at most this often


class Loop:
    """One loop: `step` after each round, `result` for what its last line says."""

    def __init__(self, steps: Steps, name: str, total: int) -> None:
        self.steps, self.name, self.total = steps, name, total
        self.done = 0
        self.said = time.monotonic()
        self.result = ""
        self.note = ""
        self.task = steps.bars.add_task(name, total=total)

    def show(self, note: str) -> None:
        """What the round that now runs is at, beside the bar."""
        self.note = note
        self.steps.bars.update(self.task, description=f"{self.name}  {note}")
        self.steps.draw()

    def step(self, note: str = "") -> None:
        """One round is done; `note` is shown beside the bar until the next one."""
        self.done += 1
        note = self.note = note or self.note
        self.steps.bars.update(self.task, advance=1, description=f"{self.name}  {note}".rstrip())
        self.steps.draw()
        now = time.monotonic()
        quiet = self.steps.console.is_terminal or self.done == self.total
        if not quiet and now - self.said >= HEARTBEAT_S:
            self.said = now
            self.steps.say(f"  {self.name}: {self.done} of {self.total}  {note}".rstrip())


class Steps(AbstractContextManager["Steps"]):
    """All loops of a command.

    Args:
        console: where lines and bars go.
        loops: how many loops the command has, for the bar of the whole.
    """

    def __init__(self, console: Console, loops: int) -> None:
        self.console = console
        self.bars = Progress(
            TextColumn("  {task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            # A second thread that draws can leave half a bar behind when a bar is removed.
            auto_refresh=False,
            disable=not console.is_terminal,
        )
        self._drawn = 0.0
        self.whole = self.bars.add_task("all steps", total=loops)

    def __enter__(self) -> Steps:
        self.bars.start()
        return self

    def draw(self, force: bool = False) -> None:
        """Draw the bars, unless they were drawn just now."""
        now = time.monotonic()
        if force or now - self._drawn >= REFRESH_S:
            self._drawn = now
            self.bars.refresh()

    def __exit__(self, *error: object) -> None:
        self.bars.stop()

    def say(self, line: str) -> None:
        """A line that stays."""
        self.console.print(line, highlight=False, markup=False)

    @contextmanager
    def loop(self, name: str, total: int) -> Iterator[Loop]:
        """A loop of `total` rounds; its line is printed when it ends without an error."""
        started = time.monotonic()
        loop = Loop(self, name, total)
        self.draw(force=True)
        try:
            yield loop
        finally:
            self.bars.remove_task(loop.task)
        self.bars.advance(self.whole)
        seconds = time.monotonic() - started
        self.say(f"  {name:<38} {seconds:6.1f} s   {loop.result}".rstrip())
