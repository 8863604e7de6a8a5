"""How the commands tell what they are doing: bars on a terminal, plain lines anywhere else, all on standard error."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Callable

from vmgr.commands.table import terminal
from vmgr.errors import printable
from vmgr.images.report import Report

_LINE_SECONDS = 5.0


class Shown(Report):
    """Tells it on standard error, with the seconds since the command began."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def line(self, text: str) -> None:
        print(f"[{time.monotonic() - self._start:6.1f} s] {printable(text)}", file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def bar(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        if not sys.stderr.isatty():
            yield self._in_lines(what, total)
            return
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        # refreshed by whoever advances it: no thread, which would be in the way of a fork
        text = TextColumn("{task.description}", markup=False)
        columns = (text, BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        with Progress(*columns, console=terminal(stderr=True), auto_refresh=False) as progress:
            task = progress.add_task(printable(what), total=max(1, total))

            def advance(part: int) -> None:
                progress.update(task, advance=part)
                if progress.tasks[0].finished or time.monotonic() >= shown[0] + 0.1:
                    shown[0] = time.monotonic()
                    progress.refresh()

            shown = [0.0]
            yield advance

    def _in_lines(self, what: str, total: int) -> Callable[[int], None]:
        """A line at the start, and one now and then while it lasts."""
        self.line(what)
        done, following = 0, time.monotonic() + _LINE_SECONDS

        def advance(part: int) -> None:
            nonlocal done, following
            done += part
            if time.monotonic() >= following:
                following = time.monotonic() + _LINE_SECONDS
                self.line(f"{what}: {100 * done // max(1, total)} %")

        return advance
