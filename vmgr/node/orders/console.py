"""`console`: a guest's console, followed by any number of callers and typed at by those who attach."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any

from vmgr.errors import Code, VTorqueError
from vmgr.node.control import Order, Talk
from vmgr.node.orders.which import guest_of

if TYPE_CHECKING:
    from vmgr.node.console import Console
    from vmgr.node.orders import CrewNow

CHUNK_BYTES = 16 * 1024
MOST_LAST_BYTES = 64 * 1024
INPUT_BYTES = 2048
"""Most of the caller's input in one request; it comes in base64, and a request is bounded."""


def order(crew: CrewNow) -> Order:
    """The order `console`: `rank` names the guest, `last` says how many bytes of before are wanted.

    Answers are `data` (base64), first those of before, then what comes, and `lost`, the bytes that were skipped before
    them, until the guest ends or the caller goes. With `attach` the caller's requests `input` (`data` in base64) are
    typed at the guest.
    """

    async def console(talk: Talk) -> AsyncIterator[Mapping[str, Any]]:
        last, attach = talk.request.get("last", 0), talk.request.get("attach", False)
        if type(last) is not int or not 0 <= last <= MOST_LAST_BYTES or type(attach) is not bool:
            raise VTorqueError(f"last is 0 to {MOST_LAST_BYTES}, attach true or false", code=Code.VALUE)
        member, guest = guest_of(crew(), talk.request)
        typing = asyncio.ensure_future(_type(talk, guest.console, attach))
        try:
            with guest.console.followed() as follower:
                before = base64.b64encode(guest.console.last_bytes(last)).decode()
                yield {"guest": member.name, "rank": member.rank, "data": before}
                while True:
                    taking = asyncio.ensure_future(follower.take(CHUNK_BYTES))
                    try:
                        await asyncio.wait([taking, typing], return_when=asyncio.FIRST_COMPLETED)
                        if typing.done():
                            typing.result()
                        data, lost = await taking
                    finally:
                        taking.cancel()
                    if not data:
                        return
                    yield {"data": base64.b64encode(data).decode(), "lost": lost}
        finally:
            typing.cancel()
            await asyncio.gather(typing, return_exceptions=True)

    return console


async def _type(talk: Talk, console: Console, attached: bool) -> None:
    """Type what the caller sends, for as long as the order lasts. Raises VTorqueError for what is no input."""
    while True:
        request = await talk.more()
        data = request.get("data")
        if request.get("op") != "input" or not isinstance(data, str) or not attached:
            raise VTorqueError("who has attached may send input, and nothing else", code=Code.VALUE)
        try:
            keys = base64.b64decode(data, validate=True)
        except (ValueError, binascii.Error):
            raise VTorqueError("input is in base64", code=Code.VALUE) from None
        try:
            await console.type(keys[:INPUT_BYTES])
        except OSError:
            await asyncio.Event().wait()  # the guest has ended: so does the order
