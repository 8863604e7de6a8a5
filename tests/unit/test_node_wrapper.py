"""The job wrapper where nothing of the node is needed: its event loop, faults of its own, taking its folder away."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import pytest

from vmgr.errors import Code
from vmgr.jobspec import SpecPath
from vmgr.node import agent, wrapper
from vmgr.node.record import Place


def test_events_are_made_in_the_loop_that_waits_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    # before Python 3.10 an event made outside of it cannot be awaited
    class Inside:
        def __init__(self, *_: object) -> None:
            asyncio.get_running_loop()

        async def run(self) -> int:
            return 5

    monkeypatch.setattr(wrapper, "JobWrapper", Inside)
    monkeypatch.setattr(wrapper, "load_config", lambda _: None)
    assert wrapper.main(["/job"]) == 5


def test_a_real_job_wrapper_and_agent_wait_in_their_loop(tmp_path: Path) -> None:
    async def wait() -> None:
        config: Any = None
        job = wrapper.JobWrapper(config, "12.host", str(tmp_path))
        asyncio.get_running_loop().call_later(0.01, job._changed.set)
        await asyncio.wait_for(job._changed.wait(), 5)
        call = agent.Call("12.host", "carol", SpecPath("/home/carol", "0" * 16, "0" * 64), 0)
        place = Place(tmp_path / "0000000000000001-1-abcdefgh", tmp_path / "s")
        attempt = agent.Agent(config, tmp_path, place, call, None)
        asyncio.get_running_loop().call_later(0.01, attempt.job_over.set)
        await asyncio.wait_for(attempt.job_over.wait(), 5)

    asyncio.run(wait())


def test_a_fault_has_a_reason_and_a_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def full(self: object) -> int:
        raise OSError(122, "Disk quota exceeded", "/home/carol/x")

    config: Any = None
    monkeypatch.setattr(wrapper.JobWrapper, "_run", full)

    async def run() -> int:
        return await wrapper.JobWrapper(config, "12.host", str(tmp_path)).run()

    assert asyncio.run(run()) == Code.INTERNAL.status
    assert "VT-INTERNAL: " in (said := capsys.readouterr().err) and "Disk quota exceeded" in said


def test_a_folder_that_is_written_to_while_it_is_removed_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "x" / "y"
    folder.mkdir(parents=True)
    removed, times = shutil.rmtree, []

    def interrupted(path: Path, *, ignore_errors: bool) -> None:
        removed(path, ignore_errors=ignore_errors)
        times.append(1)
        if len(times) == 1:
            folder.mkdir(parents=True)
            (folder / "status.node.json").write_text("{}")

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    wrapper._remove(tmp_path / "x")
    assert not (tmp_path / "x").exists() and len(times) == 2


def test_a_folder_that_cannot_be_removed_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    monkeypatch.setattr(wrapper, "REMOVE_PAUSE_SECONDS", 0.0)
    wrapper._remove(tmp_path)
    assert tmp_path.exists()
