"""Orders to running guests, one module a subject: what root and the job's owner may ask of them while they live."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any, Callable, Optional

from vmgr.config import Config
from vmgr.errors import VTorqueError
from vmgr.node.control import Order, Talk
from vmgr.node.crew import Crew
from vmgr.node.guestjob import Job

CrewNow = Callable[[], Optional[Crew]]
"""The node's guests, None while there are none."""
JobNow = Callable[[], Optional[Job]]
"""What the node's guests are booted for, None before that is known."""
Lost = Callable[[VTorqueError], None]
"""Told that the job cannot go on, and why, when an order ends the guest in which its script runs."""


def orders_of(crew: CrewNow, job: JobNow, config: Config, lost: Lost) -> Mapping[str, Order]:
    """The orders that an agent carries out, by the name of their operation.

    Few guests get any: what carries them out is not to hold up the others' boot.
    """

    def power() -> Order:
        from vmgr.node.orders import power

        return power.order(crew, config.timeouts, lost)

    def console() -> Order:
        from vmgr.node.orders import console

        return console.order(crew)

    def save() -> Order:
        from vmgr.node.orders import save

        return save.order(crew, job, config)

    def dump() -> Order:
        from vmgr.node.orders import dump

        return dump.order(crew, job, config)

    return {
        "power": _once_wanted(power),
        "console": _once_wanted(console),
        "save": _once_wanted(save),
        "dump": _once_wanted(dump),
    }


def _once_wanted(make: Callable[[], Order]) -> Order:
    """An order whose module is loaded when it is given for the first time."""
    made: list[Order] = []

    async def order(talk: Talk) -> AsyncIterator[Mapping[str, Any]]:
        if not made:
            made.append(make())
        answers = made[0](talk)
        try:
            async for answer in answers:
                yield answer
        finally:
            if isinstance(answers, AsyncGenerator):
                await answers.aclose()

    return order
