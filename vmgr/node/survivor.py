"""A process beside a node agent that outlives it, and does in its place what must not be left undone when it dies."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine, Sequence
from typing import Any, Callable, Optional

from vmgr import logs
from vmgr.config import Config
from vmgr.errors import Code, VTorqueError
from vmgr.logs import LOGGER
from vmgr.node import process, record
from vmgr.node.staging.child import let_go
from vmgr.node.user import User
from vmgr.node.userchild import reap_later


class Survivor:
    """The process that outlives the agent of one attempt, while there is one. `keep` are descriptors that it needs.

    It hears of the agent's death by the end of a pipe. Where the job's epilogue has come it does nothing: that ends the
    agent, and undoes the attempt. With a `role` it is in the attempt's record, and ends with what is undone there.
    """

    def __init__(
        self,
        config: Config,
        user: User,
        place: record.Place,
        job_id: str,
        *,
        keep: Sequence[int] = (),
        role: Optional[str] = None,
    ) -> None:
        self._config = config
        self._user = user
        self._place = place
        self._job_id = job_id
        self._keep = keep
        self._role = role
        self._word: Optional[int] = None

    def call(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Have one from now on, which is to do `work`; fine when there is one. Raises VTorqueError (VT-INTERNAL)."""
        if self._word is not None:
            return
        here, word = os.pipe()
        try:
            pid = os.fork()
        except OSError as err:
            os.close(here)
            os.close(word)
            raise VTorqueError(f"no process can be started: {err.strerror}", code=Code.INTERNAL) from err
        if pid == 0:
            self._wait(here, work)
        os.close(here)
        self._word = word
        reap_later(pid)
        found = process.identify(pid)
        if self._role is not None and found is not None:
            record.append(self._place, {"do": "process", "role": self._role, **found._asdict()})

    def dismiss(self) -> None:
        """Have none any more; fine when there is none."""
        if self._word is not None:
            word, self._word = self._word, None
            try:
                os.write(word, b".")
            except BrokenPipeError:
                pass  # somebody has ended it
            os.close(word)

    def _wait(self, here: int, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """In the child: wait for the agent's death or its word, and end without returning."""
        try:
            os.setsid()
            for handler in list(LOGGER.handlers):
                LOGGER.removeHandler(handler)
                handler.close()
            let_go([here, *self._keep])
            if os.read(here, 1) or record.is_buried(self._config.paths, self._job_id, self._place):
                return
            logs.set_up(self._config.logging, job=self._job_id, reader=self._user.uid, lives=lambda _: True)
            asyncio.events._set_running_loop(None)  # it is the agent's, and runs there
            asyncio.run(work())
        finally:
            os._exit(0)
