"""Where an attempt stands: told to everybody who follows it, and published in the job's directory."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Sequence
from typing import TYPE_CHECKING, Any, Callable, Optional

from vmgr.errors import VTorqueError
from vmgr.logs import LOGGER
from vmgr.node import process
from vmgr.node.user import User
from vmgr.node.userio import write_file

if TYPE_CHECKING:
    from vmgr.node.guestport import Stretch


MAX_MOMENTS = 64
"""As many are kept of each guest, which may say what it likes."""


class Progress:
    """State and stages of one attempt.

    States, in order: `starting`, `staging`, `booting`, `ready`, `running`, `ending`, `ended`; `failed` with a code
    and a reason from any of them. `suspended` comes in the place of `ending` and `ended`: the job's guests are stored,
    the job is requeued, and the attempt ends without an end of the job. While that is tried the fact `suspending` has
    the try's number, else None. `returning` comes before it where a job that was suspended does not go on here; the
    fact `returned` says why, once that is decided.

    A stage is a name and the seconds since the prologue hook started.
    """

    def __init__(self, start: int, facts: dict[str, Any]) -> None:
        self._start = start
        self._changed = asyncio.Event()
        self.facts = facts
        self.private: dict[str, Any] = {}
        self.now: Callable[[], dict[str, Any]] = dict
        """What is looked at only when somebody asks, beside `private`."""
        self.state = "starting"
        self.error: Optional[VTorqueError] = None
        self.stages: list[dict[str, Any]] = []
        self.guests: dict[str, list[dict[str, Any]]] = {}
        self.job_status: Optional[int] = None

    @property
    def seconds(self) -> float:
        """Since the prologue hook started."""
        return process.seconds_since(self._start)

    def reached(self, guest: str, name: str, stretches: Sequence[Stretch] = ()) -> None:
        """Note that a guest has reached `name`, and what it says took it how long; the report tells of it."""
        moments, now = self.guests.setdefault(guest, []), self.seconds
        new = [{"name": name, "t": round(now, 3)}] if name else []
        new += [
            {"name": stretch.name, "start": round(now - stretch.start_ago, 3), "t": round(now - stretch.end_ago, 3)}
            for stretch in stretches
        ]
        moments += new[: MAX_MOMENTS - len(moments)]
        self._wake()

    def ended_with(self, status: object) -> None:
        """Note the exit status of the job's script, where that is what the job's wrapper says."""
        if type(status) is int and 0 <= status <= 255 and self.job_status is None:
            self.job_status = status

    def stage(self, name: str, state: Optional[str] = None) -> None:
        """Note that `name` is done, and the state that this leads to; what has failed stays so."""
        self.stages.append({"name": name, "t": round(process.seconds_since(self._start), 3)})
        LOGGER.info("%s after %.3f s", name, self.stages[-1]["t"])
        self.facts["doing"] = None
        if state and self.error is None:
            self.state = state
        self._wake()

    def turn(self, state: str) -> None:
        """Go over to a state that no stage leads to; what has failed stays so."""
        if self.error is None:
            self.state = state
        self._wake()

    def doing(self, text: str) -> None:
        """Note how far something is that takes its time, as one line; the next stage takes its place."""
        self.facts["doing"] = text
        self._wake()

    def fail(self, error: VTorqueError) -> None:
        """Note the reason of a failure; the first one counts."""
        if self.error is None:
            self.error = error
            self.state = "failed"
            LOGGER.error("%s", error)
            self.stage("failed")

    def failure(self) -> dict[str, Any]:
        """The reason of the failure, with its code and the output that goes with it; None and empty for none."""
        error = self.error
        return {
            "code": error.code.text if error else None,
            "reason": error.detail if error else None,
            "output": error.output if error else "",
        }

    def public(self) -> dict[str, Any]:
        """What the job's owner may see anywhere."""
        return {"v": 1, **self.facts, "state": self.state, **self.failure(), "stages": self.stages}

    def full(self) -> dict[str, Any]:
        """What root and the job's owner get over the agent's socket."""
        age = round(process.seconds_since(self._start), 3)
        return {**self.public(), **self.private, **self.now(), "age_s": age}

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def changed(self) -> Awaitable[object]:
        """What returns at the next change after this call."""
        return self._changed.wait()

    async def changes(self) -> AsyncIterator[None]:
        """Yield at once and after every change, several changes as one when the caller is slow."""
        while True:
            changed = self._changed
            yield
            await changed.wait()


OF_ALL = ("booted", "prologue", "resumed", "epilogue")
"""What guests say that is a stage of their node when all of them have."""


class Together:
    """What all of several guests have said is a stage of their node."""

    def __init__(self, progress: Progress, guests: int) -> None:
        self._progress = progress
        self._guests = guests
        self._said: dict[str, set[str]] = {}

    def said(self, guest: str, name: str, stretches: Sequence[Stretch] = ()) -> None:
        """Note that a guest has said `name`; again counts for nothing. What it says took it how long is its own."""
        guests = self._said.setdefault(name, set())
        if guest not in guests:
            guests.add(guest)
            self._progress.reached(guest, "" if name == "times" else name, stretches)
            if len(guests) == self._guests and name in OF_ALL:
                self._progress.stage(name)


async def publish(progress: Progress, user: User, path: str, *, timeout_s: float) -> None:
    """Keep the job's status file current, with the user's rights, until the stage `gone` stands in it.

    It is not to be cancelled: before Python 3.12 `asyncio.wait_for` may swallow that, and this would go on for ever.
    """
    async for _ in progress.changes():
        last = any(stage["name"] == "gone" for stage in progress.stages[-1:])
        await publish_once(progress, user, path, timeout_s=timeout_s)
        if last:
            return


async def publish_once(progress: Progress, user: User, path: str, *, timeout_s: float) -> None:
    try:
        await write_file(user, path, json.dumps(progress.public()).encode(), timeout_s=timeout_s)
    except VTorqueError as err:
        LOGGER.debug("status not published: %s", err)
