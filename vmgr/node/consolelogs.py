"""The logs of the guests' consoles, beside that of their job."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO, Optional

from vmgr import logs
from vmgr.logs import LOGGER
from vmgr.node.boot import ConsoleLogs


@contextmanager
def console_logs(log: Optional[Path], reader: int) -> Iterator[ConsoleLogs]:
    """What opens them; all are closed at the end. The user `reader` may read them.

    `log` is that of the job, None where none is kept. A console whose log cannot be opened is not logged.
    """
    with ExitStack() as opened:

        def open_log(guest: str) -> Optional[BinaryIO]:
            if log is None:
                return None
            path = log_of(guest, log)
            try:
                stream = os.fdopen(logs.open_for(path, reader, truncate=True), "wb", buffering=0)
            except OSError as err:
                LOGGER.warning("the console is not logged: %s", err)
                return None
            return opened.enter_context(stream)

        yield open_log


def log_of(guest: str, log: Path) -> Path:
    """The file for the console of a guest of this name, whose job's log is `log`."""
    number = guest.rpartition("-")[2]
    return log.with_suffix(".console" if number == "1" else f".{number}.console")
