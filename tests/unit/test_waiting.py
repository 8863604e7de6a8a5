"""What is given up has ended before anything else begins: work, and programs that were started for it."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import psutil
import pytest

from vmgr.node import record
from vmgr.node.keys import make_host_key
from vmgr.node.waiting import within

HOLD = "86396"


def test_the_maker_of_keys_ends_with_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would write into a folder that is being removed."""
    (tmp_path / "ssh-keygen").write_text(f"#!/bin/sh\nexec sleep {HOLD}\n")
    (tmp_path / "ssh-keygen").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    def running() -> list[psutil.Process]:
        return [each for each in psutil.Process().children() if each.cmdline()[-1:] == [HOLD]]

    async def given_up() -> None:
        task = asyncio.ensure_future(make_host_key(record.Place(tmp_path, tmp_path / "socket")))
        while not running():
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(asyncio.wait_for(given_up(), 20))
    left = running()
    for each in left:
        each.kill()
    assert left == []


@pytest.mark.parametrize("limit_s", [0.0, 60.0])
def test_what_is_given_up_once_more_comes_to_its_end(limit_s: float) -> None:
    """Given up at its limit, or with its caller; it is waited for all the same, and the caller knows that it is."""
    steps: list[str] = []

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            steps.append("cleaning up")
            await asyncio.sleep(0.05)
            steps.append("clean")

    async def given_up() -> None:
        task = asyncio.ensure_future(within(limit_s, work()))
        await asyncio.sleep(0.01)
        if limit_s:
            task.cancel()
            await asyncio.sleep(0)
        while steps != ["cleaning up"]:
            await asyncio.sleep(0)
        for _ in range(2):
            task.cancel()
            await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            await task
        assert steps == ["cleaning up", "clean"]

    asyncio.run(given_up())
