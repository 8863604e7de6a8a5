"""Orders to running guests, one module a subject: what root and the job's owner may ask of them while they live."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Callable, Optional

from vmgr.config import Config
from vmgr.errors import VTorqueError
from vmgr.node.control import Order
from vmgr.node.crew import Crew
from vmgr.node.orders import console, power

CrewNow = Callable[[], Optional[Crew]]
"""The node's guests, None while there are none."""
Lost = Callable[[VTorqueError], None]
"""Told that the job cannot go on, and why, when an order ends the guest in which its script runs."""


def orders_of(crew: CrewNow, config: Config, lost: Lost) -> Mapping[str, Order]:
    """The orders that an agent carries out, by the name of their operation."""
    return {"power": power.order(crew, config.timeouts, lost), "console": console.order(crew)}
