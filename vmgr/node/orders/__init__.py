"""Orders to running guests, one module a subject: what root and the job's owner may ask of them while they live."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Callable, Optional

from vmgr.config import Config
from vmgr.node.control import Order
from vmgr.node.crew import Crew
from vmgr.node.orders import console, power

CrewNow = Callable[[], Optional[Crew]]
"""The node's guests, None while there are none."""


def orders_of(crew: CrewNow, config: Config) -> Mapping[str, Order]:
    """The orders that an agent carries out, by the name of their operation."""
    return {"power": power.order(crew, config.timeouts), "console": console.order(crew)}
