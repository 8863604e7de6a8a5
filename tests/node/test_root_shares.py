"""File servers of shares: whose rights they have, how they start and end. What they serve is shown in tests/guest."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Awaitable
from pathlib import Path
from typing import Any, Callable

import pytest
from nodesite import REPOSITORY, wait_gone
from virtiofsds import program_or_skip

from vmgr.config import Mount
from vmgr.errors import Code, VTorqueError
from vmgr.node import record
from vmgr.node.shares import Server, Shares, serve, serve_all
from vmgr.node.user import User
from vmgr.node.virtiofsd import Language, Virtiofsd, examine

run = asyncio.run
LANGUAGES = {"c": Language.C, "rust": Language.RUST}


@pytest.fixture(params=sorted(LANGUAGES))
def program(request: pytest.FixtureRequest) -> Virtiofsd:
    found = run(examine(program_or_skip(request.param)))
    assert found.language is LANGUAGES[request.param]
    return found


@pytest.fixture
def place(base: Path) -> record.Place:
    folder = base / "place"
    folder.mkdir(mode=0o700)
    return record.Place(folder, base / "agent.sock")


def share(user: User, **fields: Any) -> Mount:
    return Mount("home", "virtiofs", user.home, user.home, False)._replace(**fields)


def with_server(
    mount: Mount, user: User, place: record.Place, program: Virtiofsd, work: Callable[[Server], Awaitable[Any]]
) -> Any:
    """Serve a share for `work`; the server is proven gone."""

    async def served() -> Any:
        server = await serve(mount, user, place, program=program, timeout_s=10)
        try:
            return await work(server)
        finally:
            await server.kill()
            assert wait_gone(server.pid, 0)

    return run(served())


def status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def test_a_server_has_the_users_rights_and_no_more(
    program: Virtiofsd, user: User, place: record.Place, base: Path
) -> None:
    secret = os.open("/etc/shadow", os.O_RDONLY)
    os.set_inheritable(secret, True)

    async def look(server: Server) -> None:
        found = status(server.pid)
        assert found["Uid"].split() == [str(user.uid)] * 4 and found["Gid"].split() == [str(user.gid)] * 4
        assert found["Groups"].split() == ([str(gid) for gid in user.gids] if program.takes_groups else [])
        for kind in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
            assert int(found[kind], 16) == 0, kind
        assert (found["NoNewPrivs"], found["Seccomp"]) == ("1", "2")
        assert os.getsid(server.pid) == server.pid
        fds = [os.fspath(fd.readlink()) for fd in Path(f"/proc/{server.pid}/fd").iterdir()]
        assert "/etc/shadow" not in fds and str(base / "place") not in fds
        mine = os.fspath(Path(f"/proc/self/fd/{server.socket_fd}").readlink())
        assert mine not in fds, "it would not notice QEMU's end"
        assert list(place.folder.iterdir()) == [place.record], "the socket's name is gone"
        assert [step["pid"] for step in record.steps(place) if step["role"] == "virtiofsd"] == [server.pid]

    try:
        with_server(share(user), user, place, program, look)
    finally:
        os.close(secret)


def test_it_ends_with_qemu(program: Virtiofsd, user: User, place: record.Place) -> None:
    async def hang_up(server: Server) -> None:
        server.let_go()
        await asyncio.wait_for(server.ended(), 10)

    with_server(share(user), user, place, program, hang_up)


def test_its_end_is_noticed_and_told(program: Virtiofsd, user: User, place: record.Place) -> None:
    mounts = (
        share(user), Mount("opt", "9p", "/opt", "/opt", True), share(user, name="more", target="/more"),
    )  # fmt: skip

    async def work() -> str:
        shares = await serve_all(mounts, user, place, virtiofsd=program.path, timeout_s=10)
        try:
            assert [fd is None for fd in shares.fds] == [False, True, False]
            waiting = asyncio.ensure_future(shares.ended())
            done, _ = await asyncio.wait([waiting], timeout=0.3)
            assert not done
            os.kill(shares.running[1].pid, signal.SIGKILL)
            return await asyncio.wait_for(waiting, 10)
        finally:
            await shares.kill()
            assert all(wait_gone(server.pid, 0) for server in shares.running)

    assert run(work()) == "the file server of the share more ended (killed by signal 9)"


def test_without_such_shares_nothing_is_started(user: User, place: record.Place) -> None:
    mounts = (share(user, kind="9p"), Mount("data", "nfs", "nfs1:/data", "/data", False, "krb5"))
    assert run(serve_all(mounts, user, place, virtiofsd="/absent", timeout_s=1)) == Shares((None, None))
    assert not place.record.exists()


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("/absent", "No such file or directory: /absent"),
        ("{base}/closed/inner", "Permission denied"),
        ("/etc/passwd", "Not a directory"),
    ],
)
def test_a_folder_that_the_user_cannot_enter(
    program: Virtiofsd, user: User, place: record.Place, base: Path, source: str, reason: str
) -> None:
    (base / "closed" / "inner").mkdir(parents=True)
    (base / "closed").chmod(0o700)
    with pytest.raises(VTorqueError) as caught:
        run(serve(share(user, source=source.format(base=base)), user, place, program=program, timeout_s=10))
    assert caught.value.code is Code.LAUNCH
    assert "the share home cannot be served" in str(caught.value) and reason in str(caught.value)


def test_one_that_fails_takes_the_others_along(program: Virtiofsd, user: User, place: record.Place) -> None:
    mounts = (share(user), share(user, name="bad", source="/absent"))
    with pytest.raises(VTorqueError, match="the share bad cannot be served"):
        run(serve_all(mounts, user, place, virtiofsd=program.path, timeout_s=10))
    assert all(wait_gone(step["pid"], 0) for step in record.steps(place))


def test_a_server_that_does_not_answer(user: User, place: record.Place, base: Path) -> None:
    silent = base / "virtiofsd"
    silent.write_text("#!/bin/sh\nexec sleep 60\n")
    silent.chmod(0o755)
    with pytest.raises(VTorqueError, match=r"its file server did not answer within 0\.5 s"):
        run(serve(share(user), user, place, program=Virtiofsd(str(silent), Language.RUST), timeout_s=0.5))


def test_what_a_server_says_does_not_stop_it(user: User, place: record.Place, base: Path) -> None:
    noisy = base / "virtiofsd"
    noisy.write_text("#!/bin/sh\nyes 'it is all wrong' | head -c 3000000 >&2\necho last >&2\nexit 5\n")
    noisy.chmod(0o755)
    with pytest.raises(VTorqueError, match="its file server: exit status 5: last"):
        run(serve(share(user), user, place, program=Virtiofsd(str(noisy), Language.RUST), timeout_s=20))


def test_a_server_that_cannot_be_recorded_does_not_run(user: User, place: record.Place, program: Virtiofsd) -> None:
    place.record.mkdir()
    with pytest.raises(VTorqueError, match="the record cannot be written"):
        run(serve(share(user), user, place, program=program, timeout_s=10))


AGENT = """\
import asyncio, os, sys
sys.path.insert(0, {repository!r})
from pathlib import Path
from vmgr.config import Mount
from vmgr.node import record
from vmgr.node.shares import serve_all
from vmgr.node.user import User

async def work():
    mount = Mount("home", "virtiofs", {home!r}, {home!r}, {readonly})
    place = record.Place(Path({place!r}), Path("/absent"))
    shares = await serve_all((mount,), User(*{user!r}), place, virtiofsd={program!r}, timeout_s=10)
    print(shares.running[0].pid, flush=True)
    await shares.ended()

asyncio.run(work())
"""


@pytest.mark.parametrize("readonly", [False, True])
def test_it_dies_with_the_agent(user: User, place: record.Place, program: Virtiofsd, readonly: bool) -> None:
    """Also where another process holds the connection, as QEMU may."""
    text = AGENT.format(
        repository=str(REPOSITORY), home=user.home, place=str(place.folder), user=tuple(user), program=program.path,
        readonly=readonly,
    )  # fmt: skip
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(text)], stdout=subprocess.PIPE) as agent:
        assert agent.stdout is not None
        pid = int(agent.stdout.readline())
        pidfd = os.pidfd_open(agent.pid)
        try:
            assert Path(f"/proc/{pid}").exists()
        finally:
            os.close(pidfd)
            agent.kill()
    assert wait_gone(pid, 5)


def test_a_program_that_is_none_or_not_roots(base: Path, user: User) -> None:
    for path, code, text in (
        ("/absent", Code.NODE, "cannot be started"),
        ("/bin/true", Code.NODE, "is no virtiofsd that can be used"),
        (str(base / "mine"), Code.TRUST, "belongs to uid"),
    ):
        (base / "mine").write_text("#!/bin/sh\n")
        os.chown(base / "mine", user.uid, user.gid)
        with pytest.raises(VTorqueError, match=text) as caught:
            run(examine(path))
        assert caught.value.code is code
