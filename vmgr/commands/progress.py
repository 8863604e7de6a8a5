"""How far a command is that takes its time: a bar on a terminal, lines elsewhere. Both on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Optional, Protocol

import click

from vmgr.commands.table import terminal
from vmgr.errors import printable

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

LINE_SECONDS = 5.0
"""Between two lines that only say how much is done."""


class Progress(Protocol):
    """Told by what takes its time."""

    def step(self, text: str) -> None:
        """What is being done from now on, as one line."""

    def done(self, done: int, total: Optional[int]) -> None:
        """How many bytes of the current step are done, of how many; None where that is not known."""


@contextmanager
def progress() -> Iterator[Progress]:
    """Show on standard error what the body tells, until it ends, in whatever way."""
    if not sys.stderr.isatty():
        yield _Lines()
        return
    from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars
    from rich.table import Column

    text = TextColumn("{task.description}", markup=False, table_column=Column(overflow="ellipsis", no_wrap=True))
    size = TextColumn("{task.fields[size]}", markup=False)
    columns = (SpinnerColumn(finished_text=" "), text, BarColumn(bar_width=20), size, TimeElapsedColumn())
    bars = Bars(*columns, console=terminal(stderr=True))
    with bars:
        steps = _Bars(bars)
        yield steps
        steps.end()


class _Lines:
    """One line a step, and one now and then while a long one goes on."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._told = self._start
        self._step = ""

    def step(self, text: str) -> None:
        self._step = printable(text)
        self._say(self._step)

    def done(self, done: int, total: Optional[int]) -> None:
        if time.monotonic() - self._told >= LINE_SECONDS:
            self._say(f"{self._step}: {_size(done, total)}")

    def _say(self, text: str) -> None:
        self._told = time.monotonic()
        click.echo(f"[{self._told - self._start:6.1f} s] {text}", err=True)


class _Bars:
    """A line with a bar for each step; those that are over stay, full."""

    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._task: Optional[TaskID] = None

    def step(self, text: str) -> None:
        self.end()
        self._task = self._bars.add_task(printable(text), total=None, size="")

    def done(self, done: int, total: Optional[int]) -> None:
        if self._task is not None:
            self._bars.update(self._task, completed=done, total=total, size=_size(done, total))

    def end(self) -> None:
        """The current step is over, and has succeeded."""
        if self._task is not None:
            self._bars.update(self._task, completed=1, total=1)
            self._task = None


def _size(done: int, total: Optional[int]) -> str:
    if not total:
        return f"{done >> 20} MiB"
    return f"{done >> 20} of {total >> 20} MiB ({100 * done // total} %)"
