"""What a job leaves running on a node: real processes of several users, in several sessions."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Callable, Optional

import psutil
import pytest

from vmgr.node import leftovers, record
from vmgr.node.leftovers import Leftovers, Tree
from vmgr.node.process import Process, boot_id, identify, started
from vmgr.node.undo import undo

pytestmark = pytest.mark.root
UID, OTHER = 48311, 48312
Start = Callable[..., psutil.Process]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts shell commands as a user, in a session of their own; what is left of those sessions goes at the end."""
    children: list[subprocess.Popen[bytes]] = []
    marker = f"VT_TEST={os.getpid()}.{time.monotonic_ns()}"
    name, value = marker.split("=")

    def run(command: str, uid: Optional[int] = UID, session: bool = True) -> psutil.Process:
        child = subprocess.Popen(
            ["/bin/sh", "-c", command], cwd="/", env={"PATH": "/usr/bin:/bin", name: value},
            user=uid, group=uid, extra_groups=[], start_new_session=session,
        )  # fmt: skip
        children.append(child)
        return psutil.Process(child.pid)

    yield run
    for process in psutil.process_iter():
        try:
            if process.environ().get(name) == value:
                process.kill()
        except psutil.Error:
            pass
    for child in children:
        child.kill()
        child.wait()


def eventually(look: Callable[[], object]) -> None:
    deadline = time.monotonic() + 5
    while not look():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def sleeper(number: float) -> psutil.Process:
    """The one process that sleeps for this many seconds."""
    found: list[psutil.Process] = []

    def look() -> bool:
        found[:] = [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", str(number)]]
        return len(found) == 1

    eventually(look)
    return found[0]


def pids(found: list[Process]) -> set[int]:
    return {process.pid for process in found}


def is_gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_descendants_and_members_of_the_session(start: Start) -> None:
    wrapper = start("sleep 901.1 & setsid sh -c 'sleep 901.2 & wait' & (sleep 901.3 &) ; wait")
    tree = Tree(UID)
    tree.note(wrapper.pid)
    left = {sleeper(901.1), sleeper(901.2), sleeper(901.2).parent(), sleeper(901.3)}
    assert sleeper(901.3).ppid() != wrapper.pid, "found by its session alone"
    assert os.getsid(sleeper(901.2).pid) != wrapper.pid, "found by its parents alone"
    assert pids(tree.find()) == {process.pid for process in left if process} | {wrapper.pid}
    assert pids(tree.find(noted=False)) == {process.pid for process in left if process}


def test_what_the_wrapper_leaves_when_it_has_ended(start: Start) -> None:
    wrapper = start("sleep 902.1 & exit 0")
    tree = Tree(UID)
    tree.note(wrapper.pid)
    orphan = sleeper(902.1)
    eventually(lambda: is_gone(wrapper))
    assert pids(tree.find()) == {orphan.pid}, "nor is the wrapper, which only waits to be reaped"


def test_a_daemon_seen_while_its_parents_lived(start: Start) -> None:
    """A process that leaves session and parents is found if it was seen before; what it starts then is found too."""
    wrapper = start("setsid sh -c 'setsid sh -c \"sleep 0.8; sleep 903.1 & sleep 903.2; :\" & sleep 0.4' & wait")
    tree = Tree(UID)
    tree.note(wrapper.pid)
    deadline = time.monotonic() + 1.5
    while time.monotonic() < deadline:
        tree.find()
        time.sleep(0.05)
    one, two = sleeper(903.1), sleeper(903.2)
    wrapper.kill()
    eventually(lambda: is_gone(wrapper))
    parent = two.parent()
    assert parent is not None and parent.ppid() != wrapper.pid
    assert pids(tree.find()) == {one.pid, two.pid, parent.pid}


def test_a_process_of_another_user_in_the_same_session_is_untouched(start: Start) -> None:
    import ctypes

    wrapper = start("sleep 904.1 & wait")
    mine = sleeper(904.1)
    ready, told = os.pipe()
    other = os.fork()
    if other == 0:  # one that is of this session, as a program with other rights is that the user has started
        try:
            os.close(ready)
            ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
            os.setsid()
            leader = os.fork()
            if leader == 0:
                os.setresuid(OTHER, OTHER, OTHER)
                os.write(told, str(os.getpid()).encode())
                os.close(told)
                signal.pause()
            os.setresuid(UID, UID, UID)
            signal.pause()
        finally:
            os._exit(1)
    os.close(told)
    stranger = int(os.read(ready, 100))
    os.close(ready)
    try:
        eventually(lambda: psutil.Process(other).uids().real == UID)
        assert os.getsid(stranger) == other
        tree = Tree(UID)
        for pid in (wrapper.pid, other, stranger):
            tree.note(pid)
        found = tree.find()
        assert pids(found) == {wrapper.pid, mine.pid, other}
        forged = [*found, identify(stranger)]
        assert asyncio.run(tree.end([process for process in forged if process], grace_s=2)) == []
        assert psutil.Process(stranger).status() == psutil.STATUS_SLEEPING and is_gone(mine)
    finally:
        for pid in (stranger, other):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(other, 0)


def test_only_what_started_later_and_only_the_users_own_session_counts(start: Start) -> None:
    job = start("sleep 905.1 & sleep 0.2; sh -c 'sleep 905.2 & wait' & wait")
    wrapper = sleeper(905.2).parent()
    assert wrapper is not None
    tree = Tree(UID)
    tree.note(wrapper.pid)
    assert pids(tree.find(noted=False)) == {sleeper(905.2).pid}, "not the shell that has started it, nor its others"
    mine = start("sleep 905.3", session=False)
    theirs = start("sleep 905.4", session=False)
    tree = Tree(UID)
    tree.note(mine.pid)
    assert sleeper(905.4).pid not in pids(tree.find()), "this session is root's"
    assert mine.pid in pids(tree.find()) and theirs.is_running() and job.is_running()
    tree = Tree(OTHER)
    tree.note(mine.pid)
    assert tree.find() == [], "what is not of the user is not noted"


def test_the_ancestors_of_a_wrapper_that_started_in_the_same_clock_tick_do_not_count(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batch system's shell leads the session and waits for the wrapper: its end would be the job's status."""
    shell = start("sh -c 'sh -c \"(sleep 901.1 &) ; sleep 901.2 & sleep 901.3; :\"; :'; :")
    wrapper, daemon = sleeper(901.3).parent(), sleeper(901.1)
    assert wrapper is not None and wrapper.ppid() != shell.pid and daemon.ppid() != wrapper.pid
    monkeypatch.setattr(leftovers, "started", lambda pid: started(pid) and 42)
    tree = Tree(UID)
    tree.note(wrapper.pid)
    assert pids(tree.find(noted=False)) == {daemon.pid, sleeper(901.2).pid, sleeper(901.3).pid}


def test_pids_that_others_have_now(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reuse is played by giving the same process another start than it was noted with."""
    wrapper = start("sleep 906.1 & wait")
    tree = Tree(UID)
    tree.note(wrapper.pid)
    child = sleeper(906.1)
    found = tree.find()
    assert child.pid in pids(found)
    real = leftovers.started
    monkeypatch.setattr(leftovers, "started", lambda pid: (real(pid) or 0) + 1)
    assert tree.find() == [], "neither the pid nor the number of the session counts any more"
    assert asyncio.run(tree.end(found, grace_s=0.1)) == []
    monkeypatch.undo()
    assert asyncio.run(tree.end([p._replace(boot="another") for p in found], grace_s=0.1)) == []
    assert asyncio.run(tree.end([p._replace(start=p.start - 1) for p in found], grace_s=0.1)) == []
    assert child.status() == psutil.STATUS_SLEEPING and not is_gone(wrapper)


def test_ending_asks_first_and_then_insists(start: Start) -> None:
    polite = start("trap 'sleep 0.1; exit 0' TERM; sleep 907.1 & wait")
    deaf = start("trap '' TERM; while :; do sleep 907.2; done")
    stopped = start("sleep 907.3 & wait")
    for number in (907.1, 907.2, 907.3):
        sleeper(number)
    stopped.suspend()
    tree = Tree(UID)
    for process in (polite, deaf, stopped):
        tree.note(process.pid)
    found = tree.find()
    assert len(found) == 6
    begin = time.monotonic()
    assert asyncio.run(tree.end(found, grace_s=0.5)) == []
    assert 0.5 <= time.monotonic() - begin < 3
    assert tree.find() == []
    assert os.waitstatus_to_exitcode(os.waitpid(polite.pid, 0)[1]) == 0
    for process in (deaf, stopped):
        assert os.waitstatus_to_exitcode(os.waitpid(process.pid, 0)[1]) == -signal.SIGKILL


def test_ending_does_not_wait_longer_than_it_must(start: Start) -> None:
    job = start("sleep 908.1 & wait")
    sleeper(908.1)
    tree = Tree(UID)
    tree.note(job.pid)
    begin = time.monotonic()
    assert asyncio.run(tree.end(tree.find(), grace_s=30)) == []
    assert time.monotonic() - begin < 3
    assert asyncio.run(tree.end([], grace_s=30)) == []
    tree.note(job.pid)
    assert tree.find() == [], "one that is gone is not noted"


@pytest.fixture
def place(tmp_path: Path) -> record.Place:
    """An attempt's place, with no agent."""
    folder = tmp_path / "jobs" / "1.host" / "0000000000000001-1-abcdefgh"
    folder.mkdir(parents=True)
    return record.Place(folder, tmp_path / "run" / "1.host" / "s.sock")


def recorded(place: record.Place) -> set[int]:
    return {step["pid"] for step in record.steps(place) if step["do"] == "leftover"}


def test_what_is_found_is_recorded_once_and_ended_with_the_job(start: Start, place: record.Place) -> None:
    wrapper = start("setsid sleep 909.1 & setsid sh -c 'sleep 909.2; :' & wait")
    bystander = start("sleep 909.3")
    left = {sleeper(909.1).pid, sleeper(909.2).pid, sleeper(909.2).ppid()}

    async def live() -> None:
        leavings = Leftovers(place, UID)
        for _ in range(2):
            await leavings.join(wrapper.pid)
            assert recorded(place) == left and len(list(record.steps(place))) == 3
        await leavings.end()
        assert all(not psutil.pid_exists(pid) or is_gone(psutil.Process(pid)) for pid in left)

    asyncio.run(live())
    eventually(lambda: is_gone(wrapper))  # of itself: it waited for what was ended
    assert os.waitstatus_to_exitcode(os.waitpid(wrapper.pid, 0)[1]) == 0
    assert not is_gone(bystander)


def test_those_that_have_joined_are_left_to_end_by_themselves(start: Start, place: record.Place) -> None:
    wrapper = start("sleep 910.1 & wait; while :; do wait; sleep 0.01; done")

    async def live() -> None:
        leavings = Leftovers(place, UID)
        await leavings.join(wrapper.pid)
        await leavings.end()

    sleeper(910.1)
    asyncio.run(live())
    assert not is_gone(wrapper)


def test_who_undoes_an_attempt_ends_what_its_agent_has_seen(start: Start, place: record.Place) -> None:
    """With what that has started since; a shell that goes on when its child ends has no time to."""
    shell = "trap 'sleep 911.3 & wait' USR1; sleep 911.2 & wait; sleep 911.4"
    wrapper = start(f'setsid sleep 911.1 & setsid sh -c "{shell}" & wait')
    one, two = sleeper(911.1), sleeper(911.2)
    asyncio.run(Leftovers(place, UID).join(wrapper.pid))
    assert recorded(place) == {one.pid, two.pid, two.ppid()}
    os.kill(two.ppid(), signal.SIGUSR1)
    three = sleeper(911.3)
    lines = place.record.read_text().splitlines(keepends=True)
    place.record.write_text("".join(line for line in lines if f'"pid": {one.pid},' not in line))
    assert undo(place, patience_s=0.25) == []
    eventually(lambda: is_gone(two) and is_gone(three))
    assert not is_gone(one), "nobody has written that it is the job's"
    assert not is_gone(wrapper) and not place.folder.exists()
    assert not [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", "911.4"]]


def test_many_processes_and_many_questions_are_bounded(
    start: Start, place: record.Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leftovers, "MAX_RECORDED", 5)
    monkeypatch.setattr(leftovers, "AT_ONCE", 3)
    wrapper = start("for i in 1 2 3 4 5 6 7 8; do sleep 912.1 & done; sleep 912.2 & wait")
    sleeper(912.2)

    async def live() -> int:
        leavings = Leftovers(place, UID)
        begin = time.monotonic()
        await asyncio.gather(*(leavings.join(wrapper.pid) for _ in range(4)))
        assert time.monotonic() - begin >= 3 * leftovers.LOOK_SECONDS
        count = len(leavings._tree.find(noted=False))
        await leavings.end()
        assert leavings._tree.find(noted=False) == []
        return count

    assert asyncio.run(live()) == 9
    assert len(recorded(place)) == 5


@pytest.mark.parametrize("agent", [True, False])
def test_an_agent_that_undoes_its_own_attempt_spares_the_wrapper(
    start: Start, place: record.Place, agent: bool
) -> None:
    """It has ended what it found, and what is left of that, dead or not to be killed, is of the wrapper's session."""
    wrapper = start("sleep 913.1 & while :; do sleep 0.01; done")
    left = sleeper(913.1)
    asyncio.run(Leftovers(place, UID).join(wrapper.pid))
    assert left.pid in recorded(place)
    if agent:
        me = identify(os.getpid())
        assert me is not None
        record.append(place, {"do": "process", "role": "agent", **me._asdict()})
    assert undo(place, patience_s=0.25) == []
    if agent:
        time.sleep(0.2)
        assert not is_gone(left) and not is_gone(wrapper)
    else:
        eventually(lambda: is_gone(left))


def test_what_only_waits_to_be_reaped_leads_to_nobody(start: Start) -> None:
    dead = start("sleep 914.1 & exit 0")
    mate = sleeper(914.1)
    eventually(lambda: dead.status() == psutil.STATUS_ZOMBIE)
    ticks = started(dead.pid)
    assert ticks is not None and os.getsid(mate.pid) == dead.pid
    leftovers.kill([Process(boot_id(), dead.pid, ticks)], UID)
    time.sleep(0.2)
    assert not is_gone(mate)
