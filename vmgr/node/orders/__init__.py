"""Orders to running guests, one module a subject: what root and the job's owner may ask of them while they live."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Callable, Optional

from vmgr.config import Config
from vmgr.errors import VTorqueError
from vmgr.node.control import Order, Talk
from vmgr.node.crew import Crew
from vmgr.node.gate import Gate
from vmgr.node.guestjob import Job

if TYPE_CHECKING:
    from vmgr.node.suspension import Suspension

CrewNow = Callable[[], Optional[Crew]]
"""The node's guests, None while there are none."""
JobNow = Callable[[], Optional[Job]]
"""What the node's guests are booted for, None before that is known."""
Lost = Callable[[VTorqueError], None]
"""Told that the job cannot go on, and why, when an order ends the guest in which its script runs."""
SuspensionNow = Callable[[], Optional["Suspension"]]
"""The node's part in suspending the job, None while there are no guests, and for jobs that cannot be suspended."""
SHARED = ("console", "suspend")
"""What does nothing to a guest that its suspension would meet, or is that."""


def orders_of(
    crew: CrewNow,
    job: JobNow,
    config: Config,
    lost: Lost,
    *,
    suspension: SuspensionNow = lambda: None,
    gate: Optional[Gate] = None,
) -> Mapping[str, Order]:
    """The orders that an agent carries out, by the name of their operation.

    Few guests get any: what carries them out is not to hold up the others' boot.
    """
    gate = gate or Gate()

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

    def suspend() -> Order:
        from vmgr.node.orders import suspend

        return suspend.order(job, suspension)

    makers = {"power": power, "console": console, "save": save, "dump": dump, "suspend": suspend}
    return {name: _once_wanted(make, None if name in SHARED else name, gate) for name, make in makers.items()}


def _once_wanted(make: Callable[[], Order], at_gate: Optional[str], gate: Gate) -> Order:
    """An order whose module is loaded when it is given for the first time.

    `at_gate` is its name where the guests must not be suspended meanwhile.
    """
    made: list[Order] = []

    async def order(talk: Talk) -> AsyncIterator[Mapping[str, Any]]:
        if not made:
            made.append(make())
        with nullcontext() if at_gate is None else gate.beside(at_gate):
            answers = made[0](talk)
            try:
                async for answer in answers:
                    yield answer
            finally:
                if isinstance(answers, AsyncGenerator):
                    await answers.aclose()

    return order
