"""Reading a guest's saved state back into a QEMU that waits for it (`-incoming defer`).

The state is the user's file, and is read by QEMU alone, which is the user's too: it ends with a reason, or is given up
after its time. Facts are from QEMU's qapi/migration.json and were observed on QEMU 7.2: one that cannot read a state
ends at once; after the event `completed` it is stopped as it was when it was saved.
"""

from __future__ import annotations

from collections.abc import Awaitable, Mapping
from typing import Any, Callable, NamedTuple

from qemu.qmp import QMPClient

from vmgr.node.resuming import check_version
from vmgr.node.waiting import every

NAME = "state"
MAX_EVENTS = 100


class SavedState(NamedTuple):
    """A saved state: the file, open for reading, the version of the QEMU that wrote it, and how long reading may take.

    `timeout_s` is in seconds. `check` looks, beside that, at whether it is as it was written.
    """

    fd: int
    qemu: str
    timeout_s: float
    check: Callable[[], Awaitable[None]]


async def read_back(client: QMPClient, state: SavedState) -> None:
    """Have QEMU read the state; the guest is stopped afterwards.

    Raises VTorqueError (VT-LAUNCH) where another QEMU wrote it, and as `check` does, ValueError with what QEMU says, or
    what QMP raises when QEMU ends.
    """
    check_version(state.qemu, shown_version(await client.execute("query-version")))
    await client.execute("migrate-set-capabilities", {"capabilities": [{"capability": "events", "state": True}]})
    client.send_fd_scm(state.fd)
    await client.execute("getfd", {"fdname": NAME})
    await every(_read(client), state.check())


async def _read(client: QMPClient) -> None:
    with client.listener("MIGRATION") as listener:
        await client.execute("migrate-incoming", {"uri": f"fd:{NAME}"})
        for _ in range(MAX_EVENTS):
            event: Mapping[str, Any] = await listener.get()
            status = event["data"]["status"]
            if status == "completed":
                return
            if status == "failed":
                raise ValueError("it cannot read the state")
    raise ValueError("it does not come to an end with the state")


def shown_version(answer: Any) -> str:
    """The version in QEMU's answer to `query-version`, as `7.2.22 (Debian …)`. Raises what a wrong answer leads to."""
    numbers, package = answer["qemu"], str(answer.get("package", ""))
    version = ".".join(str(int(numbers[part])) for part in ("major", "minor", "micro"))
    return "".join(c for c in f"{version} ({package})" if " " <= c <= "~")[:128] if package else version
