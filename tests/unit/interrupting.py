"""Signals that come just in the moment that a test means."""

from __future__ import annotations

import signal
from typing import Any, Callable


class Told(BaseException):
    """By a signal: what the fixture `told` has TERM raise."""


def first_told(doing: Callable[..., Any]) -> Callable[..., Any]:
    """`doing`, just before which the signal comes."""

    def work(*arguments: Any, **named: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return doing(*arguments, **named)

    return work


def then_told(doing: Callable[..., Any]) -> Callable[..., Any]:
    """`doing`, in whose last moment the signal comes: it is done, and nobody has what it gives yet."""

    def work(*arguments: Any, **named: Any) -> Any:
        result = doing(*arguments, **named)
        signal.raise_signal(signal.SIGTERM)
        return result

    return work
