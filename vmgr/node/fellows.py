"""The other nodes of a job, as the agent of one node meets them in the job directory; nobody, for a job of one node.

What stands there is the user's word: it ends or holds up that user's job, and decides nothing else.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any, Optional

from vmgr.errors import Code, VTorqueError
from vmgr.logs import LOGGER
from vmgr.node import meeting
from vmgr.node.allocation import Allocation, short
from vmgr.node.guestport import host_address
from vmgr.node.user import User


class Fellows:
    """How the agent of one attempt tells the others, and hears of them. Use `close` at the end."""

    def __init__(
        self, directory: str, allocation: Allocation, user: User, *, timeout_s: float, inotify: bool = True
    ) -> None:
        self._directory = directory
        self._allocation = allocation
        self._user = user
        self._timeout_s = timeout_s
        self._inotify = inotify
        self._alone = len(allocation.nodes) == 1
        self._called_over = False
        self._barrier: Optional[meeting.Barrier] = None
        self._calls: Optional[meeting.Calls] = None
        if not self._alone and self.leads:
            names = [short(node) for node in allocation.nodes]
            self._barrier = meeting.Barrier(directory, allocation.key, user=user, nodes=names, inotify=inotify)

    @property
    def leads(self) -> bool:
        """Whether this is the mother superior."""
        return self._allocation.node_index == 0

    async def tell(self, kind: str, data: dict[str, Any]) -> None:
        """Report to the mother superior; nothing that fails here is worse for the job than silence."""
        if self._alone:
            return
        try:
            await meeting.report(
                self._user, self._directory, self._allocation.key, kind, self._allocation.node_index, data,
                timeout_s=self._timeout_s,
            )  # fmt: skip
        except VTorqueError as err:
            LOGGER.warning("the other nodes were not told that this one is %s: %s", kind, err)

    async def exchange(self, own: Sequence[str]) -> list[str]:
        """Tell the addresses of this node's guests, and wait for those of all guests of the job, by rank.

        Every node has as many guests. Raises VTorqueError: VT-BOOT when what comes is none, or as `all_ready`.
        """
        if self._alone:
            return list(own)
        await self.tell(meeting.UP, {"addresses": own})
        if self._barrier is not None:
            told = [_addresses(said, len(own)) for said in await self._barrier.all_up()]
            found = [address for addresses in told for address in addresses]
            text = json.dumps({"v": 1, "addresses": found}).encode()
            await self._call(meeting.HOSTS, text)
            return found
        calls = self._hear()
        await calls.first(meeting.HOSTS)
        return _addresses(calls.said[meeting.HOSTS], len(self._allocation.nodes) * len(own))

    async def all_ready(self) -> list[dict[str, Any]]:
        """On the mother superior: wait until every node is ready; what they said. Raises VTorqueError, see there."""
        return [] if self._barrier is None else await self._barrier.all_ready()

    async def failure(self) -> None:
        """Wait for the failure of another node, and raise it."""
        if self._barrier is not None:
            await self._barrier.failure()
        await asyncio.Event().wait()

    async def over(self) -> None:
        """On a sister: wait until the mother superior says that the job is over."""
        await self.first_call(meeting.OVER)

    async def first_call(self, *orders: str) -> str:
        """On a sister: wait for one of the mother superior's orders; gives the first of them, in this order."""
        if self._alone or self.leads:
            await asyncio.Event().wait()
        return await self._hear().first(*orders)

    @property
    def ended_as_usual(self) -> bool:
        """On a sister: whether the mother superior has said that the job is over, and not because it is suspended."""
        said = None if self._calls is None else self._calls.said.get(meeting.OVER)
        return said is not None and said.get("suspended") is not True

    @property
    def ended_suspended(self) -> bool:
        """On a sister: whether the mother superior has said that the attempt ends because the job is suspended."""
        said = None if self._calls is None else self._calls.said.get(meeting.OVER)
        return said is not None and said.get("suspended") is True

    async def call_over(self, *, suspended: bool = False) -> None:
        """On the mother superior: tell every node, once, that the job is over, or that its attempt is suspended."""
        if self._barrier is not None and not self._called_over:
            self._called_over = True
            try:
                await self._call(meeting.OVER, json.dumps({"v": 1, "suspended": suspended}).encode())
            except VTorqueError as err:
                LOGGER.warning("the other nodes were not told that the job is over: %s", err)

    async def all_gone(self, timeout_s: float) -> Optional[VTorqueError]:
        """On the mother superior: wait, within a bound, until nothing is left on any node; the first failure told."""
        if self._barrier is None:
            return None
        failures = await self._barrier.all_gone(timeout_s)
        return failures[0] if failures else None

    def begin_try(self, number: int) -> None:
        """On the mother superior: begin to suspend the job, for the `number`th time.

        Raises VTorqueError (VT-SUSPEND).
        """
        if self._barrier is None:
            return
        if number not in meeting.TRIES:
            raise VTorqueError(
                f"the job could not be suspended {meeting.TRIES[-1]} times; it is not tried again", code=Code.SUSPEND
            )
        self._barrier.begin_try(number)

    async def lead(self, order: str, number: int, step: Optional[str] = None) -> None:
        """On the mother superior: have every sister carry an order of this try out, until all have done the `step`.

        Raises VTorqueError: VT-SUSPEND with what a sister says stands in the way, VT-SPEC when they cannot be told.
        """
        if self._barrier is not None:
            await self._call(meeting.of_try(order, number))
            if step is not None:
                await self._barrier.all_have(step)

    async def _call(self, order: str, text: bytes = b"") -> None:
        key = self._allocation.key
        await meeting.call(self._user, self._directory, key, order, text, timeout_s=self._timeout_s)

    def _hear(self) -> meeting.Calls:
        """On a sister: what the mother superior says, listened to from now on."""
        if self._calls is None:
            self._calls = meeting.Calls(
                self._directory, self._allocation.key, user=self._user, inotify=self._inotify
            )  # fmt: skip
        return self._calls

    async def close(self) -> None:
        """Stop listening."""
        if self._barrier is not None:
            await self._barrier.close()
        if self._calls is not None:
            await self._calls.close()


def _addresses(said: dict[str, Any], guests: int) -> list[str]:
    """The addresses that were told of so many guests. Raises VTorqueError (VT-BOOT) for anything else."""
    told = said.get("addresses")
    found = [host_address(text) for text in told] if isinstance(told, list) else []
    if len(found) != guests or None in found:
        raise VTorqueError("the addresses of the guests of another node are not known", code=Code.BOOT)
    return [address for address in found if address is not None]


def parse_ssh_ports(said: dict[str, Any], names: Sequence[str]) -> dict[str, int]:
    """The ports of their nodes that a node says lead to SSH of guests of the job; what is none is passed over."""
    told = said.get("ssh_ports")
    ports = told if isinstance(told, dict) else {}
    return {name: ports[name] for name in names if type(ports.get(name)) is int and 0 < ports[name] < 1 << 16}


def check_image(image: str, node: str, said: object) -> None:
    """Refuse a node whose guests have another image than those of the mother superior, which have `image`.

    Each node takes the newest revision that it sees. The job is to be of one, and what is stored when it is suspended
    names one. A node that has another version of vTorque may tell none. Raises VTorqueError (VT-IMAGE).
    """
    if said is not None and said != image[: meeting.MAX_IMAGE_CHARS]:
        raise VTorqueError(
            f"the guests on {node} have the image {said}, those of the mother superior {image}",
            code=Code.IMAGE,
            hint="a revision was added while the job started: submit it again; or the nodes do not see the same pool",
        )
