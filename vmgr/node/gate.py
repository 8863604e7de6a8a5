"""Keeps apart what must not happen to a node's guests at the same time: their suspension, and anything else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from vmgr.errors import Code, VTorqueError


class Gate:
    """What is done to the guests of a node now."""

    def __init__(self) -> None:
        self._at_work: Counter[str] = Counter()
        self._alone = False

    @contextmanager
    def beside(self, order: str) -> Iterator[None]:
        """While an order is carried out, beside which others are. Raises VTorqueError (VT-GUEST)."""
        if self._alone:
            raise VTorqueError(
                f"the job is being suspended; there is no {order} meanwhile", code=Code.GUEST, hint="wait for its end"
            )
        self._at_work[order] += 1
        try:
            yield
        finally:
            self._at_work[order] -= 1

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While the guests are being suspended. Raises VTorqueError (VT-SUSPEND)."""
        busy = next((order for order, count in self._at_work.items() if count), None)
        if busy is not None:
            raise VTorqueError(f"the order {busy} is being carried out", code=Code.SUSPEND, hint="wait for its end")
        if self._alone:
            raise VTorqueError("the job is being suspended already", code=Code.SUSPEND)
        self._alone = True
        try:
            yield
        finally:
            self._alone = False
