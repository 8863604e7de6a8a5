"""A session that outlives its connection: the guest's runner under each shell, started here by an `ssh` of ours."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, Optional

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from keptsite import SHELLS, Site
from nodesite import FUZZ

from vmgr.errors import Code, VTorqueError
from vmgr.node.kept import KeptSession
from vmgr.node.marks import Copier, MarkFilter

PATIENCE_S = 120

# marks in a stream


@FUZZ
@given(
    before=st.binary(max_size=200),
    behind=st.binary(max_size=200),
    letter=st.sampled_from("ynl"),
    begun=st.integers(0, 63),
    cuts=st.lists(st.integers(0, 500), max_size=12),
)
def test_a_mark_is_found_however_the_stream_is_cut(
    before: bytes, behind: bytes, letter: str, begun: int, cuts: list[int]
) -> None:
    token = b"0" + b"123456789abcdef" * 4 + b"123"  # its end is no beginning of it
    before += token[:begun]  # as far as it goes like a mark
    whole = before + token + letter.encode() + behind
    places = sorted({0, len(whole), *(cut for cut in cuts if cut < len(whole))})
    found = MarkFilter()
    found.expect(token)
    passed, letters = b"", list[str]()
    for start, end in zip(places, places[1:]):
        data, said = found.feed(whole[start:end])
        passed += data
        if said is not None:
            letters.append(said)
            assert passed.startswith(before), "all before it has been passed on"
    assert (passed + found.rest(), letters) == (before + behind, [letter])


@FUZZ
@given(st.lists(st.binary(max_size=20)))
def test_nothing_is_kept_back_where_no_mark_is_expected(chunks: list[bytes]) -> None:
    found = MarkFilter()
    assert [found.feed(chunk) for chunk in chunks] == [(chunk, None) for chunk in chunks]


def test_what_only_begins_like_a_mark_comes_at_the_end() -> None:
    found = MarkFilter()
    found.expect(b"abcdef")
    assert found.feed(b"xxabc") == (b"xx", None)
    assert found.feed(b"dab") == (b"abcd", None)
    assert found.rest() == b"ab"


def test_output_that_cannot_be_written_is_lost_and_said_once() -> None:
    async def copy() -> list[Optional[int]]:
        said: list[Optional[int]] = []
        with open("/dev/full", "wb") as full, Copier(full.fileno(), lambda err: said.append(err.errno)) as copier:
            inlet = os.dup(copier.inlet)
            copier.start()
            for _ in range(3):
                os.write(inlet, b"x" * 100)
                await asyncio.sleep(0)
            mark = copier.expect("t" * 64)
            os.close(inlet)
            assert await asyncio.wait_for(mark, PATIENCE_S) is None
            await asyncio.wait_for(copier.end(), PATIENCE_S)
            assert await copier.expect("t" * 64) is None
        return said

    before = len(list(Path("/proc/self/fd").iterdir()))
    assert asyncio.run(copy()) == [28]
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_target_that_does_not_wait_gets_all(tmp_path: Path) -> None:
    async def copy() -> bytes:
        outlet, target = os.pipe()
        os.set_blocking(target, False)
        with Copier(target, lambda err: pytest.fail(str(err))) as copier:
            inlet = os.dup(copier.inlet)
            copier.start()
            loop = asyncio.get_running_loop()
            writing = loop.run_in_executor(None, lambda: [os.write(inlet, b"%07d\n" % n) for n in range(50_000)])
            got = b""
            while len(got) < 400_000:
                got += await loop.run_in_executor(None, os.read, outlet, 1000)
            await writing
            os.close(inlet)
            await copier.end()
        for fd in (outlet, target):
            os.close(fd)
        return got

    assert asyncio.run(copy()) == b"".join(b"%07d\n" % n for n in range(50_000))


# sessions


@pytest.fixture(params=SHELLS)
def site(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    place = Site(tmp_path, request.param)
    place.lead_there(monkeypatch)
    try:
        yield place
        run(place.nothing_is_left)
    finally:
        place.end()


def run(work: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(work(), PATIENCE_S))  # type: ignore[arg-type]


async def until(true: Callable[[], Any]) -> None:
    while not true():
        await asyncio.sleep(0.01)


FACTS = """#!/bin/bash
echo "$0 $# $2"
pwd
cat
trap 'echo int; exit 5' INT
echo aside >&2
kill -INT $$
"""


def test_a_script_runs_as_it_would(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    async def work() -> None:
        assert await site.run(site.open(), FACTS, "umask 077\n") == 5

    run(work)
    out, err = capfd.readouterr()
    lines = out.splitlines()
    assert lines[0] == f"{site.session}/script 2 b  c" and lines[1].startswith(f"{site.base}/place.")
    assert (lines[2:], err) == (["int"], "aside\n")
    assert (site.base / "ended.t").read_text() == "5\n"


WRITER = """#!/bin/bash
n=0
while [ ! -e {base}/enough ]; do
    n=$((n + 1))
    printf '%07d\\n' $n
    printf '\\0\\xff%07d' $n >&2
    (exec seq 1 40)
done
echo "$n" >{base}/count
exit 9
"""


def test_nothing_is_lost_or_twice(site: Site, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    async def work() -> None:
        session = site.open()
        running = site.run(session, WRITER.replace("{base}", str(site.base)))
        for _ in range(6):
            await asyncio.sleep(0.15)
            await until(lambda: session._child is not None)
            await session.detach(60)
            assert await running is None and session.detached
            await until(lambda: ["--keep" in words(each) for each in site.processes("/run -")] == [True])
            running = asyncio.ensure_future(session.attach())
        await asyncio.sleep(0.1)
        (site.base / "enough").touch()
        assert await running == 9

    run(work)
    out, err = capfdbinary.readouterr()
    count = int((site.base / "count").read_text())
    assert count > 20 and site.lost == []
    forty = b"".join(b"%d\n" % n for n in range(1, 41))
    # hashes: nobody reads the difference of megabytes
    assert md5(out) == md5(b"".join(b"%07d\n" % n + forty for n in range(1, count + 1)))
    assert md5(err) == md5(b"".join(b"\0\xff%07d" % n for n in range(1, count + 1)))


def test_a_signal_for_all_of_the_job_does_not_end_the_connection(site: Site) -> None:
    """Slurm tells every process of a job that it ends: the script in the guest is to be told, and has its time."""

    async def work() -> None:
        session = site.open()
        running = site.run(session, f"trap 'exit 5' TERM\ntouch {site.base}/up\nwhile :; do sleep 0.02; done\n")
        await until(lambda: (site.base / "up").exists())
        (ssh,) = site.processes("bin/ssh")
        ssh.terminate()
        await asyncio.sleep(0.2)
        assert not running.done()
        session.signal(signal.SIGTERM)
        assert await running == 5

    run(work)
    assert site.lost == []


def md5(data: bytes) -> tuple[int, str]:
    return len(data), hashlib.md5(data).hexdigest()


def words(process: psutil.Process) -> str:
    return " ".join(process.info["cmdline"])


def test_what_a_reader_has_not_taken_waits_for_the_next(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    """A job that ends while nobody is attached: killed in the guest, its status and all its words are still had."""

    async def work() -> None:
        session = site.open()
        running = site.run(session, "#!/bin/bash\necho $BASHPID >pid; pwd >{0}/where; echo first\nsleep 1000\n".replace(
            "{0}", str(site.base)))  # fmt: skip
        await until(lambda: (site.base / "where").exists() and (site.base / "where").read_text())
        await session.detach(60)
        assert await running is None
        pid = int(Path((site.base / "where").read_text().strip(), "pid").read_text())
        assert psutil.Process(pid).status() == psutil.STATUS_STOPPED
        assert str(Path(f"/proc/{pid}/cwd").readlink()).startswith(f"{site.base}/place.")
        with open(site.session / "out", "wb") as out:
            out.write(b"late\n")
        os.kill(pid, signal.SIGKILL)
        await until((site.session / "status").exists)
        assert await session.attach() == 137

    run(work)
    assert capfd.readouterr().out == "first\nlate\n"


TRAPS = """#!/bin/bash
trap 'echo usr1' USR1
trap 'echo term; exit 3' TERM
touch {base}/up
while :; do sleep 0.05; done
"""


def test_signals_that_come_meanwhile_are_passed_on_later(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    async def work() -> None:
        session = site.open()
        running = site.run(session, TRAPS.replace("{base}", str(site.base)))
        await until((site.base / "up").exists)
        await session.detach(60)
        assert await running is None
        for sig in (signal.SIGUSR1, signal.SIGUSR1, signal.SIGTERM):
            session.signal(sig)
        assert session.waiting == [signal.SIGUSR1, signal.SIGTERM]
        assert await session.attach() == 3

    run(work)
    assert set(capfd.readouterr().out.splitlines()) == {"usr1", "term"}


STUBBORN = """#!/bin/bash
trap '' HUP TERM
(exec -a 'sleep {base}' sleep 1000) &
touch {base}/up
while :; do echo; sleep 0.05; done
"""


def test_a_connection_that_breaks_ends_the_job(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    async def work() -> None:
        session = site.open()
        running = site.run(session, STUBBORN.replace("{base}", str(site.base)))
        await until((site.base / "up").exists)
        await session.detach(60)
        assert await running is None
        running = asyncio.ensure_future(session.attach())
        await asyncio.sleep(0.3)
        running.cancel()
        await asyncio.wait([running])

    run(work)


def test_refusals_let_the_job_go_on(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    async def refused(session: KeptSession, why: str, timeout_s: float = 60) -> None:
        with pytest.raises(VTorqueError, match=why) as caught:
            await session.detach(timeout_s)
        assert caught.value.code is Code.SUSPEND

    async def work(outlet: int) -> None:
        session = site.open()
        await refused(session, "not running")
        running = site.run(session, "#!/bin/bash\nseq 1 200000\necho done\n")
        read = asyncio.get_running_loop().run_in_executor
        assert await read(None, os.read, outlet, 1) == b"1"  # what it fills then, nobody reads
        await refused(session, "could not be delivered within 1 s", 1)
        await refused(session, "has not been taken yet")
        got = await read(None, read_all, outlet)
        assert await running == 0 and not session.detached
        assert md5(b"1" + got) == md5(b"".join(b"%d\n" % n for n in range(1, 200_001)) + b"done\n")
        await refused(session, "not running")

    with capfd.disabled():
        outlet, inlet = os.pipe()
        stdout = os.dup(1)
        os.dup2(inlet, 1)
        try:
            run(lambda: work(outlet))
        finally:
            os.dup2(stdout, 1)
            for fd in (outlet, inlet, stdout):
                os.close(fd)


def read_all(fd: int) -> bytes:
    got = b""
    while not got.endswith(b"done\n"):
        got += os.read(fd, 1 << 16)
    return got
