"""How a long command tells what it does; `vmgr.commands.progress` shows it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Callable


class Report:
    """Tells nothing; the commands have one that does."""

    def line(self, text: str) -> None:
        """Something begins."""

    @contextlib.contextmanager
    def bar(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """Something of `total` bytes, or per cent, is done; what it gives is called with each part that is."""
        yield lambda _part: None
