"""The file servers of a test's guest, as the node starts them: on an event loop of their own, since tests have none."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any, Optional

from vmgr.config import Mount
from vmgr.node import record
from vmgr.node.shares import Server, serve_all
from vmgr.node.user import User


class FileServers:
    """Serves the shares of kind virtiofs of one guest until `close`, which proves that the servers are gone."""

    def __init__(self, mounts: Sequence[Mount], user: User, folder: Path, virtiofsd: str) -> None:
        self._loop = asyncio.new_event_loop()
        # they die with the thread that has started them, so it lives as long as they are to
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._running: list[Server] = []
        try:
            place = record.Place(folder, folder / "agent.sock")
            self._shares = self._do(serve_all(mounts, user, place, virtiofsd=virtiofsd, timeout_s=30))
            self._running = self._shares.running
        except BaseException:
            self._stop()
            raise

    @property
    def fds(self) -> tuple[Optional[int], ...]:
        """QEMU's ends of the connections."""
        return tuple(self._shares.fds)

    @property
    def pids(self) -> list[int]:
        return [server.pid for server in self._running]

    def let_go(self) -> None:
        self._loop.call_soon_threadsafe(self._shares.let_go)

    def wait(self, timeout_s: float) -> str:
        """What is told when one of them ends."""
        return str(self._do(asyncio.wait_for(self._shares.ended(), timeout_s)))

    def close(self) -> None:
        """QEMU has ended, or was never there, so they end by themselves."""
        self.let_go()
        try:
            for server in self._running:
                self._do(asyncio.wait_for(server.ended(), 20))
        finally:
            self._do(self._shares.kill())
            self._stop()
        assert not any(Path(f"/proc/{pid}").exists() for pid in self.pids)

    def _do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        assert not self._thread.is_alive()
        self._loop.close()
