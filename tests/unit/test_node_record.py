"""The record of an attempt, its undoing, tombstones and the janitor, on real folders, locks and processes."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nodesite import FUZZ, REPOSITORY, Node, in_session, make_node, note_process, short_folder, sleeper

from vmgr.jobspec import SpecPath
from vmgr.node import hook, process, record, slurmfacts
from vmgr.node.agent import run_attempt
from vmgr.node.checkedjob import Call
from vmgr.node.hook import end_job
from vmgr.node.hookcall import HookCall
from vmgr.node.reap import reap
from vmgr.node.undo import undo

FACTS = {"job_id": "12.host", "user": "carol", "directory": ["/home/carol", "abcd1234", "0" * 64], "node_index": 0}
LONG_AGO = 100
IN_FUTURE = 10**15


@pytest.fixture
def node() -> Iterator[Node]:
    with short_folder() as base:
        yield make_node(base)


def made(node: Node, place: record.Place, **facts: Any) -> tuple[int, list[Path]]:
    """An attempt with an overlay, held; gives its lock and what it made."""
    lock, listener = record.create(place, {**FACTS, **facts})
    listener.close()
    overlay = node.config.images.overlays / f"{place.folder.parent.name}.{place.attempt}.g.qcow2"
    record.make_folder(overlay.parent, 0o700)
    record.append(place, {"do": "cpus", "cpus": [0]})
    record.append(place, {"do": "overlay", "path": str(overlay), "reserved": 1 << 20})
    overlay.touch()
    return lock, [place.folder, place.socket, overlay]


def wipe(node: Node) -> None:
    for root in (*node.config.paths, node.config.images.overlays):
        shutil.rmtree(root, ignore_errors=True)


def test_an_attempt_is_made_held_and_undone(node: Node) -> None:
    place = node.place()
    lock, things = made(node, place)
    assert all(thing.exists() for thing in things)
    assert (place.folder.stat().st_mode & 0o777, (place.folder / "record").stat().st_mode & 0o777) == (0o700, 0o600)
    assert place.socket.stat().st_mode & 0o777 == 0o666
    assert record.is_held(place) and record.begun(place)["user"] == "carol"
    assert record.places(node.config.paths) == [place] == record.places(node.config.paths, "12.host")
    assert record.newest_socket(node.config.paths, "12.host") == place.socket
    os.close(lock)
    assert not record.is_held(place)
    assert undo(place) == []
    assert node.left() == []
    assert undo(place) == [], "a second time does nothing"


def test_asking_whether_one_is_held_holds_nothing(node: Node) -> None:
    place = node.place()
    lock, _ = made(node, place)
    os.close(lock)
    asking = os.open(place.folder / "lock", os.O_RDWR)
    import fcntl

    fcntl.flock(asking, fcntl.LOCK_SH)  # another process that asks at the same moment
    assert not record.is_held(place)
    os.close(asking)


def test_the_lock_ends_with_its_last_holder(node: Node) -> None:
    place = node.place()
    lock, _ = made(node, place)
    os.set_inheritable(lock, True)
    child = subprocess.Popen(["/bin/sleep", "60"], close_fds=False)
    os.close(lock)
    assert record.is_held(place)
    child.kill()
    child.wait()
    assert not record.is_held(place)


def test_the_same_attempt_is_made_once(node: Node) -> None:
    lock, _ = made(node, node.place())
    with pytest.raises(OSError):
        record.create(node.place(), FACTS)
    assert record.begun(node.place())["user"] == "carol"
    os.close(lock)


def test_a_place_is_made_while_an_older_one_is_undone(node: Node) -> None:
    """The undoing takes the job's folders away again and again while new attempts are made in them."""
    stop = threading.Event()
    folders = [node.place().folder.parent, node.place().socket.parent]

    def take_away() -> None:
        while not stop.is_set():
            for folder in folders:
                try:
                    folder.rmdir()
                except OSError:
                    pass

    thread = threading.Thread(target=take_away)
    thread.start()
    try:
        for start in range(40):
            place = node.place(start=start)
            lock, listener = record.create(place, FACTS)
            listener.close()
            os.close(lock)
            assert undo(place) == []
    finally:
        stop.set()
        thread.join()


def test_the_agent_goes_first_then_the_rest_backwards(node: Node) -> None:
    place = node.place()
    lock, things = made(node, place)
    agent, guest = sleeper(), sleeper()
    note_process(place, guest.pid, "qemu")
    note_process(place, agent.pid, "agent")
    os.close(lock)
    assert undo(place) == []
    assert (agent.wait(), guest.wait()) == (-9, -9)
    assert not any(thing.exists() for thing in things)


def test_a_process_that_has_another_identity_is_spared(node: Node) -> None:
    place = node.place()
    lock, _ = made(node, place)
    child = sleeper()
    record.append(place, {"do": "process", "role": "qemu", "boot": process.boot_id(), "pid": child.pid, "start": 1})
    record.append(place, {"do": "process", "role": "qemu", "boot": "x", "pid": child.pid, "start": 1})
    os.close(lock)
    assert undo(place) == []
    assert child.poll() is None
    child.kill()
    child.wait()


def test_the_caller_is_spared(node: Node) -> None:
    place = node.place()
    lock, _ = made(node, place)
    note_process(place, os.getpid(), "agent")
    assert undo(place) == [] and node.left() == []
    os.close(lock)


@pytest.mark.parametrize(
    "step",
    [
        {"do": "overlay"},
        {"do": "process", "role": "qemu", "boot": "b", "pid": "x", "start": 1},
        {"do": "process", "role": "qemu", "boot": "b", "pid": None, "start": 1},
        {"do": "process", "role": "agent", "boot": "b", "pid": 10**30, "start": 1},
        {"do": "socket", "path": "a\0b"},
        {"role": "qemu"},
    ],
)
def test_a_failing_inverse_is_reported_and_stops_no_other(node: Node, step: dict[str, object]) -> None:
    place = node.place()
    lock, (folder, socket, overlay) = made(node, place)
    record.append(place, step)
    os.close(lock)
    (failure,) = undo(place)
    assert failure.startswith(str(step.get("do")))
    assert folder.exists() and not socket.exists() and not overlay.exists()
    assert len(undo(place)) == 1, "the record stays until all is undone"


def test_an_overlay_that_cannot_be_removed_stays_recorded(node: Node) -> None:
    place = node.place()
    lock, (folder, _, overlay) = made(node, place)
    overlay.unlink()
    (overlay / "in-the-way").mkdir(parents=True)
    os.close(lock)
    assert len(undo(place)) == 1 and folder.exists()
    shutil.rmtree(overlay)
    assert undo(place) == [] and node.left() == []


def test_two_undo_at_once(node: Node) -> None:
    place = node.place()
    lock, _ = made(node, place)
    child = sleeper()
    note_process(place, child.pid, "qemu")
    os.close(lock)
    said: list[list[str]] = []
    threads = [threading.Thread(target=lambda: said.append(undo(place))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said == [[]] * 4 and node.left() == [] and child.wait() == -9


@FUZZ
@given(data=st.data())
def test_a_record_cut_anywhere_is_undone_as_far_as_it_says(node: Node, data: st.DataObject) -> None:
    wipe(node)
    place = node.place()
    lock, _ = made(node, place)
    os.close(lock)
    overlays = [node.config.images.overlays / f"{n}.qcow2" for n in range(3)]
    ends = []
    for overlay in overlays:
        record.append(place, {"do": "overlay", "path": str(overlay), "reserved": 1})
        ends.append(place.record.stat().st_size)
        overlay.touch()
    cut = data.draw(st.integers(0, ends[-1]))
    os.truncate(place.record, cut)
    assert undo(place) == []
    # a line is whole without its newline
    assert [overlay.exists() for overlay in overlays] == [cut < end - 1 for end in ends]
    assert not place.folder.exists()


@FUZZ
@given(
    noise=st.binary(max_size=200)
    | st.lists(st.none() | st.integers() | st.text()).map(lambda v: json.dumps(v).encode())
)
def test_noise_in_a_record_is_passed_over(node: Node, noise: bytes) -> None:
    wipe(node)
    place = node.place()
    lock, (_, _, overlay) = made(node, place)
    os.close(lock)
    with place.record.open("ab") as stream:
        stream.write(noise + b"\n")
    assert record.begun(place)["user"] == "carol"
    assert undo(place) == [] and not overlay.exists()


def test_a_step_that_the_disk_has_no_room_for_is_an_error(node: Node) -> None:
    import resource

    place = node.place()
    lock, _ = made(node, place)
    size = place.record.stat().st_size
    code = """\
import resource, signal
from pathlib import Path
from vmgr.node import record
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
place = record.Place(Path(sys.argv[1]), Path(sys.argv[2]))
try:
    record.append(place, {"do": "overlay", "path": "/nowhere/x"})
except OSError as err:
    print(type(err).__name__)
"""
    assert in_session(code, str(place.folder), str(place.socket), str(size + 10)) == "OSError\n"
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != size + 10
    os.close(lock)
    assert undo(place) == []


# tombstones: who is ended by an epilogue


def hooks(node: Node, code: str, *arguments: str) -> str:
    """Run `code` as a hook of job 12.host on the node."""
    return in_session(
        f"""\
from pathlib import Path
from vmgr.config import load_config
from vmgr.node import record
from vmgr.node.hook import end_job
from vmgr.paths import Installation
config = load_config(Installation(Path({str(node.install.root)!r})))
{code}""",
        *arguments,
    )


def test_an_attempt_that_started_before_the_epilogue_is_buried_a_requeued_one_is_not(node: Node) -> None:
    before = record.Place(
        Path(hooks(node, "print(record.new_place(config.paths, '12.host').folder)").strip()), Path("s")
    )
    time.sleep(0.03)  # the clock of process starts has ticks of 10 ms
    hooks(node, "record.bury(config.paths, '12.host')")
    time.sleep(0.03)
    after = record.Place(
        Path(hooks(node, "print(record.new_place(config.paths, '12.host').folder)").strip()), Path("s")
    )
    assert before.attempt < after.attempt
    assert record.is_buried(node.config.paths, "12.host", before)
    assert not record.is_buried(node.config.paths, "12.host", after)
    assert not record.is_buried(node.config.paths, "13.host", before)
    record.exhume(node.config.paths, "12.host")
    assert not record.is_buried(node.config.paths, "12.host", before)
    record.exhume(node.config.paths, "12.host")


@pytest.mark.parametrize("text", ["", "x", "1 2", "\xff", "1" * 5000])
def test_a_tombstone_that_cannot_be_read_buries_nobody(node: Node, text: str) -> None:
    record.bury(node.config.paths, "12.host")
    (node.config.paths.run / "tombstones" / "12.host").write_text(text)
    assert not record.is_buried(node.config.paths, "12.host", node.place(start=IN_FUTURE))


def test_a_boot_ends_every_attempt_and_every_tombstone(node: Node) -> None:
    """A node without a temporary file system at its run folder, and a job that is requeued after the node crashed."""
    before = node.place(start=IN_FUTURE, boot="ffffffff-an-earlier-boot")
    assert record.is_buried(node.config.paths, "12.host", before)
    tombstone = node.config.paths.run / "tombstones" / "12.host"
    record.bury(node.config.paths, "12.host")
    tombstone.write_text(f"{IN_FUTURE} an-earlier-boot\n")
    assert not record.is_buried(node.config.paths, "12.host", node.place())
    tombstone.write_text(f"{IN_FUTURE} {process.boot_id()}\n")
    assert record.is_buried(node.config.paths, "12.host", node.place())


def test_an_epilogue_ends_what_lives_and_leaves_no_tombstone(node: Node) -> None:
    place = node.place(start=LONG_AGO)
    lock, _ = made(node, place)
    agent = sleeper()
    note_process(place, agent.pid, "agent")
    os.close(lock)
    hooks(node, "end_job(config, '12.host')")
    assert agent.wait() == -9
    assert node.left() == []
    assert list((node.config.paths.run / "tombstones").iterdir()) == []


@pytest.mark.parametrize(
    ("facts", "over", "guests", "waits"),
    [
        ({"node_index": 1, "nodes": ["n1", "n2"]}, False, True, True),
        ({"node_index": 1, "nodes": ["n1", "n2"]}, True, True, False),
        ({"node_index": 1, "nodes": ["n1", "n2"]}, False, False, False),
        ({"node_index": 0, "nodes": ["n1", "n2"]}, False, True, False),
        ({"node_index": 1, "nodes": None}, False, True, False),
    ],
)
def test_an_epilog_of_slurm_lets_a_sister_end_with_its_job(
    node: Node, facts: dict[str, Any], over: bool, guests: bool, waits: bool
) -> None:
    """Where the mother superior does not call it over in time, it is ended."""
    config = node.install.config
    config.write_text(f"{config.read_text()}\ntimeouts: {{sisters: 1, disk: 0}}\n")
    for ends in (True, False):
        place = node.place(start=LONG_AGO)
        lock, _ = made(node, place, **facts)
        agent = subprocess.Popen(["sleep", "0.4" if waits and ends else "60"])
        note_process(place, agent.pid, "agent")
        if guests:
            note_process(place, sleeper().pid, "qemu")
        if over:
            record.append(place, {"do": "over"})
        os.close(lock)
        begun = time.monotonic()
        hooks(node, "end_job(config, '12.host')")
        assert agent.wait() == (0 if waits and ends else -9)
        if waits and not ends:
            assert time.monotonic() - begun > 1
        assert node.left() == []


def test_an_epilogue_before_the_agents_first_line_leaves_the_tombstone_for_it(node: Node) -> None:
    place = node.place(start=LONG_AGO)
    lock, _ = made(node, place)  # held: the agent is about to start
    hooks(node, "end_job(config, '12.host')")
    assert place.folder.exists() and record.is_buried(node.config.paths, "12.host", place)
    os.close(lock)


def test_an_epilogue_before_the_prologue_made_anything_leaves_the_tombstone(node: Node) -> None:
    hooks(node, "end_job(config, '12.host')")
    assert record.is_buried(node.config.paths, "12.host", node.place(start=LONG_AGO))


def test_an_epilogue_spares_the_requeued_attempt_and_other_jobs(node: Node) -> None:
    old, new, other = node.place(start=LONG_AGO), node.place(start=IN_FUTURE), node.place("13.host", start=LONG_AGO)
    locks = [made(node, place)[0] for place in (old, new, other)]
    os.close(locks[0])
    hooks(node, "end_job(config, '12.host')")
    assert [place.folder.exists() for place in (old, new, other)] == [False, True, True]
    assert record.newest_socket(node.config.paths, "12.host") == new.socket
    for lock in locks[1:]:
        os.close(lock)


def test_an_epilogue_that_cannot_undo_says_so_and_keeps_the_tombstone(
    node: Node, capsys: pytest.CaptureFixture[str]
) -> None:
    place = node.place(start=LONG_AGO)
    lock, _ = made(node, place)
    record.append(place, {"do": "overlay"})
    os.close(lock)
    end_job(node.config, "12.host")
    assert "vtorque: epilogue: overlay:" in capsys.readouterr().err
    assert record.is_buried(node.config.paths, "12.host", place) and place.folder.exists()


def test_an_epilog_of_a_job_that_has_no_record_leaves_no_tombstone(node: Node) -> None:
    """On Slurm its user can give any job the comment of a guest job."""
    environment = {
        "SLURM_JOB_ID": "12", "SLURM_CLUSTER_NAME": "ref", "SLURM_JOB_USER": "carol",
        "SLURM_JOB_COMMENT": f"vtorque:/home/carol/.vtorque/abcd1234/{'0' * 64}",
    }  # fmt: skip
    hook._epilogue(slurmfacts.parse_epilogue([], environment), IN_FUTURE, node.config)
    assert not (node.config.paths.run / "tombstones").exists()


@pytest.mark.parametrize("user", ["root", "no-such-user-here"])
def test_an_attempt_of_nobody_who_may_have_guests_leaves_nothing(node: Node, user: str) -> None:
    """Its agent has ended before the epilogue comes."""
    place = node.place("12.ref", start=LONG_AGO)
    lock, listener = record.create(place, {**FACTS, "user": user})
    call = Call("12.ref", user, SpecPath("/home/carol", "abcd1234", "0" * 64), 0, None)

    asyncio.run(run_attempt(node.config, node.base, place, call, None, listener))
    os.close(lock)
    listener.close()
    hook._epilogue(HookCall("12.ref", user, call.directory, 0, None), IN_FUTURE, node.config)
    marks = [path for name in ("tombstones", "ended") for path in node.base.rglob(f"{name}/*")]
    assert node.left() == marks == []


# the janitor


def test_the_janitor_takes_what_no_live_attempt_owns(node: Node) -> None:
    live, dead = node.place("12.host"), node.place("13.host")
    kept, kept_things = made(node, live)
    lock, dead_things = made(node, dead)
    os.close(lock)
    overlays, run, spool = node.config.images.overlays, node.config.paths.run, node.config.paths.spool
    stray = [overlays / "stray.qcow2", run / "jobs" / "14.host" / "1.sock", run / "tombstones" / "old"]
    half, young = spool / "jobs" / "15.host" / ".1", spool / "jobs" / "16.host" / ".1"
    fresh = run / "tombstones" / "new"
    for path in (*stray, fresh):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    for path in (half, young):
        path.mkdir(parents=True)
    os.utime(stray[2], (0, 0))
    os.utime(half, (0, 0))
    goes = [*dead_things, *stray, half]
    stays = [*kept_things, fresh, young]

    said = reap(node.config, dry_run=True)
    assert all(path.exists() for path in (*goes, *stays)), "a dry run removes nothing"
    # a dry run still sees the record that names the dead attempt's overlay
    assert sorted(said) == sorted([f"attempt 13.host {dead.attempt}", *map(str, [*stray, half])])
    assert sorted(reap(node.config)) == sorted(said)
    assert not any(path.exists() for path in goes)
    assert all(path.exists() for path in stays)
    assert not half.parent.exists() and not stray[1].parent.exists(), "nor an empty folder of the job"
    assert reap(node.config) == []
    os.close(kept)


def test_the_janitor_ends_the_guest_of_a_dead_agent(node: Node) -> None:
    place = node.place()
    lock, _ = made(node, place)
    guest = sleeper()
    note_process(place, guest.pid, "qemu")
    os.close(lock)
    assert reap(node.config) == [f"attempt 12.host {place.attempt}"]
    assert guest.wait() == -9 and node.left() == []


def test_the_janitor_reports_what_it_cannot_undo(node: Node) -> None:
    place = node.place()
    lock, _ = made(node, place)
    record.append(place, {"do": "overlay"})
    os.close(lock)
    attempt, failure = reap(node.config)
    assert attempt.startswith("attempt 12.host") and failure.startswith("left: overlay")


def test_the_janitor_of_a_node_that_never_ran_a_job(node: Node) -> None:
    assert reap(node.config) == [] == reap(node.config, dry_run=True)


def test_janitors_and_new_attempts_do_not_disturb_each_other(node: Node) -> None:
    """Three janitors in processes of their own while attempts come and go: none fails, no live attempt is touched."""
    code = f"""\
import sys; sys.path.insert(0, {str(REPOSITORY)!r})
from pathlib import Path
from vmgr.config import load_config
from vmgr.node.reap import reap
from vmgr.paths import Installation
config = load_config(Installation(Path({str(node.install.root)!r})))
while not Path(sys.argv[1]).exists():
    reap(config)
"""
    stop = node.base / "stop"
    janitors = [
        subprocess.Popen([sys.executable, "-I", "-c", code, str(stop)], stderr=subprocess.PIPE) for _ in range(3)
    ]
    try:
        deadline = time.monotonic() + 0.8
        start = 0
        while time.monotonic() < deadline:
            start += 1
            place = node.place(start=start)
            lock, things = made(node, place)
            assert all(thing.exists() for thing in things)
            os.close(lock)
            assert undo(place) == []
    finally:
        stop.touch()
        errors = [janitor.communicate()[1] for janitor in janitors]
    assert errors == [b""] * 3


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("5[1].host", "5[2].host"),
        ("5[1].host", "5[11].host"),
        ("5[1].host", "5-1.host"),
        (f"5[1].{'h' * 99}", f"5[2].{'h' * 99}"),
    ],
)
def test_members_of_an_array_are_jobs_of_their_own(first: str, second: str, node: Node) -> None:
    paths = node.config.paths
    places = [record.new_place(paths, job_id) for job_id in (first, second)]
    locks = [record.create(place, {**FACTS, "job_id": job_id}) for place, job_id in zip(places, (first, second))]
    for (lock, listener), place, job_id in zip(locks, places, (first, second)):
        listener.close()
        os.close(lock)
        assert record.places(paths, job_id) == [place] and record.begun(place)["job_id"] == job_id
        assert record.newest_socket(paths, job_id) == place.socket and len(str(place.socket)) <= 107
    record.bury(paths, first)
    assert record.is_buried(paths, first, places[0]) and not record.is_buried(paths, second, places[1])
    record.exhume(paths, first)
    record.note_end(paths, second, places[1])
    assert not record.take_end(paths, first) and record.take_end(paths, second)
    assert undo(places[0]) == [] and record.places(paths) == [places[1]]
    assert len(reap(node.config)) == 1 and node.left() == []


def test_a_hook_that_is_called_twice_finds_what_it_has_begun(node: Node) -> None:
    paths = node.config.paths
    assert not record.has_begun(paths, FACTS["job_id"], record.hook_start())
    place = record.new_place(paths, FACTS["job_id"])
    lock, listener = record.create(place, {**FACTS, "key": "k1"})
    listener.close()
    later = place.start + 1
    assert record.has_begun(paths, FACTS["job_id"], later, "k1"), "its agent lives"
    os.close(lock)
    assert not record.has_begun(paths, FACTS["job_id"], later, "k1"), "it does not"
    assert record.has_begun(paths, FACTS["job_id"], place.start) and not record.has_begun(
        paths, "999.host", place.start
    )
    assert not record.has_begun(paths, FACTS["job_id"], later), "the prologue of the job's next start"
    assert undo(place) == []


def test_processes_that_do_not_end_are_waited_for_together(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    place = node.place()
    lock, _ = made(node, place)
    for pid in range(1000, 1010):
        record.append(place, {"do": "process", "role": "qemu", "boot": "x", "pid": pid, "start": 1})
    killed: list[int] = []
    waited: list[float] = []

    def end(found: process.Process, *, timeout_s: float) -> bool:
        killed.append(found.pid)
        waited.append(timeout_s)
        time.sleep(timeout_s)
        return False

    monkeypatch.setattr(process, "end", end)
    assert undo(place, patience_s=0.1) == [f"process: pid {pid} (qemu) does not end" for pid in range(1009, 999, -1)]
    assert sorted(killed[:10]) == list(range(1000, 1010)) and waited[:10] == [0.0] * 10, "all are killed at once"
    assert sum(waited) <= 0.11
    os.close(lock)
