"""A job of two nodes is suspended and goes on, elsewhere: two agents, each with a node of its own, and real guests."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Optional

import pytest
from guestsetup import image_or_skip
from nodejob import Job, Jobs, account
from suspendedjob import ssh
from test_suspend import order, run, wrapped

from vmgr.config import Config
from vmgr.jobspec import SpecPath
from vmgr.node import suspendable
from vmgr.node.client import AgentLink
from vmgr.node.user import look_up
from vmgr.suspended.store import Store

pytestmark = [pytest.mark.guest, pytest.mark.root]

COUNTS = "cd /tmp; (while sleep 0.1; do echo x >>/tmp/count; done) >/dev/null 2>&1 & echo"
GOES_ON = "b=$(wc -l </tmp/count); until [ $(wc -l </tmp/count) -gt $b ]; do sleep 0.1; done; hostname"


class Site:
    """Two nodes that see the same store, and a third that sees another one."""

    def __init__(self, base: Path, owner: Any) -> None:
        self._base = base
        self.nodes = []
        for name, store in (("a", "suspended"), ("b", "suspended"), ("c", "elsewhere")):
            folder = base / store
            folder.mkdir(exist_ok=True)
            folder.chmod(0o1777)
            (base / name).mkdir()
            policy: dict[str, object] = {"suspend": {"enabled": True}}
            self.nodes.append(Jobs(base / name, owner, suspended={"folder": str(folder)}, policy=policy))
        self.store = Store(self.nodes[0].node.config, look_up(owner.pw_name))

    def start(self, stack: ExitStack, path: SpecPath, *names: str, sister: int = 1) -> list[Job]:
        """The agents of an attempt on nodes of these names."""
        task_file, node_file = self._base / f"{names[0]}.JB", self._base / f"{names[0]}.nodes"
        hosts = "+".join(f"{name}/0" for name in names)
        cookie = names[0].encode().hex().rjust(32, "0")[::-1]
        task_file.write_text(f"<job><exec_host>{hosts}</exec_host><cookie>{cookie}</cookie></job>")
        node_file.write_text("".join(f"{name}\n" for name in names))
        files = {"task_file": str(task_file), "node_file": str(node_file)}
        return [
            stack.enter_context(self.nodes[which].job(path, node_index=index, **files))
            for index, which in ((0, 0), (1, sister))
        ]

    def entry(self) -> Optional[tuple[Any, Any]]:
        return asyncio.run(self.store.find("12.host"))


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    image_or_skip("micro")

    def requeue(_config: Config, _job_id: str) -> None:
        pass

    monkeypatch.setattr(suspendable, "requeue", requeue)
    with tempfile.TemporaryDirectory(prefix="vt-", dir="/tmp") as base, account() as owner:
        Path(base).chmod(0o755)
        yield Site(Path(base), owner)


async def status(job: Job, *states: str) -> dict[str, Any]:
    """What the agent says as soon as it is in one of these states."""
    link = await AgentLink.open(job.node.config.paths, job.job_id)
    async for snapshot in link.follow("follow"):
        if snapshot["state"] in states:
            link.close()
            return dict(snapshot)
    raise AssertionError("the agent is gone")


async def said_in(site: Site, job: Job, command: str) -> str:
    """What a command prints in the guest of a node."""
    found = (await status(job, "ready", "running"))["ssh"]

    def ask() -> str:
        return ssh(site.nodes[0], job.path, found["port"], found["host_key"], command).strip()

    return await asyncio.get_running_loop().run_in_executor(None, ask)


@pytest.mark.slow
def test_a_job_of_two_nodes_goes_on_elsewhere(site: Site) -> None:
    path = site.nodes[0].submit("#!/bin/sh\n", suspend=True)

    async def suspended(jobs: list[Job]) -> None:
        async with wrapped(jobs[0]) as wrapper:
            for job in jobs:
                await said_in(site, job, COUNTS)
            assert await order(jobs[0]) == {"suspended": "12.host"}
            await wrapper.until("suspended")

    with ExitStack() as stack:
        run(suspended(site.start(stack, path, "n1", "n2")))
    found = site.entry()
    assert found is not None
    entry, parts = found
    assert (entry.nodes, entry.per_node) == (2, 1)
    assert [guest.name for part in parts for guest in part.guests] == ["vn1-1", "vn2-1"]
    assert parts[0].host_key != parts[1].host_key

    async def failed(lead: Job) -> str:
        said = await status(lead, "failed", "ready")
        link = await AgentLink.open(lead.node.config.paths, lead.job_id)
        link.send("end", status=0)
        link.close()
        return f"{said['code']}: {said['reason']}"

    with ExitStack() as stack:
        why = run(failed(site.start(stack, path, "n3", "n4", sister=2)[0]))
    assert why.startswith("VT-SUSPEND: n4 does not have the job go on from where the mother superior does"), why
    assert site.entry() == found

    async def goes_on(jobs: list[Job]) -> list[str]:
        async with wrapped(jobs[0]) as wrapper:
            assert wrapper.seen["resumed"] and wrapper.seen["guests"] == ["vn1-1"]
            assert await site.store.find("12.host") is None
            return [await said_in(site, job, GOES_ON) for job in jobs]

    with ExitStack() as stack:
        assert run(goes_on(site.start(stack, path, "n5", "n6"))) == ["vn1-1", "vn2-1"]
