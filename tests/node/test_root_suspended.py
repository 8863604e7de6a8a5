"""The store of suspended jobs, by root with the users' rights, whatever they have put there."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable, Optional

import pytest
from nodesite import Node, make_node
from settled import children, run
from test_root_userio import hanging_mount

from vmgr.errors import Code, VTorqueError
from vmgr.node import record
from vmgr.node.undo import undo
from vmgr.node.user import User, look_up
from vmgr.node.userio import read_from
from vmgr.suspended import files, listing
from vmgr.suspended.entry import Entry, NodePart, SavedGuest, dump_entry, dump_part
from vmgr.suspended.listing import stored_jobs, suspended_uses
from vmgr.suspended.store import LOST, Store
from vmgr.topology.model import Layout

pytestmark = pytest.mark.root
JOB = "12.server"
CHANGES = ("mkdir", "rename", "fsync", "unlink", "rmdir")
"""What changes a file system, or sees to it that it is changed."""
HOST_KEY = "ssh-ed25519 " + "A" * 68
_LIBC = ctypes.CDLL(None, use_errno=True)


@pytest.fixture
def folder(base: Path) -> Path:
    """The site's folder, as its administrator makes it."""
    made = base / "suspended"
    made.mkdir()
    made.chmod(0o1777)
    return made


@pytest.fixture
def site(base: Path, folder: Path) -> Node:
    return make_node(base, suspended={"folder": str(folder)}, timeouts={"user_file": 2, "suspend": 10})


@pytest.fixture
def store(site: Node, user: User) -> Store:
    return Store(site.config, user)


def an_entry(user: User, *, nodes: int = 1, per_node: int = 1, **fields: Any) -> Entry:
    values = {"job_id": JOB, "user": user.name, "spec_sha256": "a" * 64, "image": "micro@3", "key": "0123abcd"}
    return Entry(**{**values, "nodes": nodes, "per_node": per_node, "when": 1_700_000_000, "walltime_s": 60, **fields})


def a_part(node: int, per_node: int = 1, *, state: bytes = b"state", overlay: Optional[bytes] = b"overlay") -> NodePart:
    guests = [
        SavedGuest(
            rank, f"v{node}-{rank}", "02:00:00:00:00:01", None, Layout.flat(1, 256), len(state),
            None if overlay is None else len(overlay),
        )
        for rank in range(node * per_node, (node + 1) * per_node)
    ]  # fmt: skip
    return NodePart(node, HOST_KEY, "tcg", "7.2", tuple(guests))


async def write(store: Store, part: NodePart, state: bytes = b"state", overlay: bytes = b"overlay") -> None:
    for guest in part.guests:
        for end, data in (("state", state), ("qcow2", overlay)):
            if end == "state" or guest.overlay_bytes is not None:
                fd = await store.create(JOB, f"{guest.rank}.{end}")
                os.write(fd, data)
                os.close(fd)
    await store.write_part(JOB, part)


async def save(store: Store, entry: Entry, **how: Any) -> None:
    """What agents do: one begins, each node adds its part, one completes."""
    await store.begin(JOB, need_bytes=1 << 20)
    for node in range(entry.nodes):
        await write(store, a_part(node, entry.per_node, **how))
    await store.complete(JOB, entry)


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refused(work: Any, *words: str, within_s: float = 15) -> None:
    start = time.monotonic()
    with pytest.raises(VTorqueError) as caught:
        run(work)
    assert time.monotonic() - start < within_s
    said = str(caught.value)
    assert caught.value.code is Code.SUSPEND and said.isprintable(), said
    assert all(word in said for word in words), said


# --- what agents do


def test_a_job_is_stored_found_opened_and_removed(store: Store, user: User, folder: Path) -> None:
    entry = an_entry(user, nodes=2, per_node=2)

    async def work() -> None:
        assert await store.find(JOB) is None
        await save(store, entry)
        assert await store.find(JOB) == (entry, (a_part(0, 2), a_part(1, 2)))
        fd, size = await store.open(JOB, "3.qcow2")
        assert (os.read(fd, 100), size, os.get_blocking(fd)) == (b"overlay", 7, True)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.write(fd, b"x")
        os.close(fd)

    run(work())
    assert tree(folder)[:3] == ["carol", f"carol/{JOB}", f"carol/{JOB}/0.qcow2"]
    for path in folder.rglob("*"):
        info = path.lstat()
        assert (info.st_uid, info.st_gid, info.st_mode & 0o7777) == (
            user.uid,
            user.gid,
            0o700 if path.is_dir() else 0o600,
        )
    run(store.remove(JOB))
    run(store.remove(JOB))
    assert tree(folder) == ["carol"] and run(store.find(JOB)) is None


def test_guests_without_a_disk(store: Store, user: User) -> None:
    run(save(store, an_entry(user), overlay=None))
    found = run(store.find(JOB))
    assert found is not None and found[1][0].guests[0].overlay_bytes is None
    refused(store.open(JOB, "0.qcow2"), "0.qcow2: No such file or directory")


def test_the_newer_of_two_entries_counts(store: Store, user: User, folder: Path) -> None:
    run(save(store, an_entry(user)))
    newer = an_entry(user, when=1_800_000_000)
    run(save(store, newer))
    assert run(store.find(JOB)) == (newer, (a_part(0),))
    assert names(folder / "carol") == [JOB]


def test_beginning_again_and_dropping_leave_nothing(store: Store, folder: Path, user: User) -> None:
    run(store.drop(JOB))
    assert tree(folder) == []

    async def work() -> None:
        await store.begin(JOB, need_bytes=1)
        await write(store, a_part(0))
        await store.begin(JOB, need_bytes=1)
        assert names(folder / "carol" / f".{JOB}.new") == []
        await store.drop(JOB)
        await store.drop(JOB)

    run(work())
    assert tree(folder) == ["carol"]
    refused(store.create(JOB, "0.state"), "No such file or directory")


def test_an_attempt_that_dies_is_undone(site: Node, user: User, folder: Path) -> None:
    run(save(Store(site.config, user), an_entry(user)))
    place = a_place(site)
    other = Store(site.config, user, place)
    run(other.begin(JOB, need_bytes=1))
    os.close(run(other.create(JOB, "0.state")))
    assert names(folder / "carol") == [f".{JOB}.new", JOB]
    assert undo(place) == []
    assert names(folder / "carol") == [JOB], "the complete entry stays"


def a_place(site: Node) -> record.Place:
    attempt = site.base / "spool" / "jobs" / JOB / f"{1:016d}-1-00000000"
    attempt.mkdir(parents=True)
    place = record.Place(attempt, site.base / "run" / "jobs" / JOB / "1.sock")
    record.append(place, {"do": "begin"})
    return place


@pytest.mark.parametrize(
    "name",
    [
        "",
        "0",
        "../0.state",
        "x.state",
        "0.state\n",
        "job.json",
        "node.0.json",
        "/etc/passwd",
        "0.raw",
        "1" * 9 + ".state",
    ],
)
def test_names_that_are_no_guests(store: Store, name: str) -> None:
    for work in (store.create, store.open):
        refused(work(JOB, name), "is no file of a suspended job")


def test_a_file_is_made_once(store: Store) -> None:
    async def work() -> None:
        await store.begin(JOB, need_bytes=1)
        os.close(await store.create(JOB, "0.state"))
        await store.create(JOB, "0.state")

    refused(work(), f"{JOB}: 0.state cannot be used: File exists")


# --- what is not complete


def _without(path: str) -> Callable[[Path], None]:
    return lambda new: (new / path).unlink()


def _longer(new: Path) -> None:
    (new / "1.state").write_bytes(b"more than that")


def _swapped(new: Path) -> None:
    (new / "node.1.json").write_bytes((new / "node.0.json").read_bytes())


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (_without("node.1.json"), "node.1.json: No such file"),
        (_without("1.state"), "1.state: No such file"),
        (_without("0.qcow2"), "0.qcow2: No such file"),
        (_longer, "1.state has 14 bytes, not 5"),
        (_swapped, "node.1.json is not that of node 1"),
    ],
)
def test_half_an_entry_never_becomes_one(
    store: Store, user: User, folder: Path, spoil: Callable[[Path], None], says: str
) -> None:
    async def work() -> None:
        await store.begin(JOB, need_bytes=1)
        for node in range(2):
            await write(store, a_part(node))
        spoil(folder / "carol" / f".{JOB}.new")
        await store.complete(JOB, an_entry(user, nodes=2))

    refused(work(), says)
    assert run(store.find(JOB)) is None


@pytest.mark.parametrize("fields", [{"image": "/home/carol/disk.qcow2"}, {"key": ""}, {"walltime_s": -1}])
def test_what_could_not_be_read_again_is_not_written(store: Store, user: User, fields: dict[str, Any]) -> None:
    refused(save(store, an_entry(user)._replace(**fields)), f"job.json: {next(iter(fields))}: ")
    assert run(store.find(JOB)) is None


def test_a_part_is_not_written_before_its_files_are_there(store: Store) -> None:
    async def work() -> None:
        await store.begin(JOB, need_bytes=1)
        await store.write_part(JOB, a_part(0))

    refused(work(), "0.state: No such file")


def dies_at(monkeypatch: pytest.MonkeyPatch, moment: int, work: Callable[[], Any]) -> bool:
    """Do some work whose child kills itself before one of its changes; whether it came to its end before that."""
    seen = [0]

    def dying(call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*words: Any, **more: Any) -> Any:
            seen[0] += 1
            if seen[0] > moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*words, **more)

        return counted

    with monkeypatch.context() as patched:
        for name in CHANGES:
            patched.setattr(os, name, dying(getattr(os, name)))
        try:
            run(work())
        except VTorqueError as err:
            assert "the process for it died" in str(err)
            return False
    return True


@pytest.mark.parametrize("moment", range(14))
def test_killed_at_any_moment(
    store: Store, user: User, folder: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    """The child that completes dies before each of its changes: what is there then is whole."""
    old, new = an_entry(user), an_entry(user, when=1_800_000_000)
    run(save(store, old))

    async def prepare() -> None:
        await store.begin(JOB, need_bytes=1)
        await write(store, a_part(0))

    run(prepare())
    done = dies_at(monkeypatch, moment, lambda: store.complete(JOB, new))
    found = run(store.find(JOB))
    assert found is None or found[0] in (old, new)
    if done:
        assert found is not None and found[0] == new
    run(save(store, new))
    assert run(store.find(JOB))[0] == new and names(folder / "carol") == [JOB]


def test_what_is_given_up_does_not_happen_later(
    store: Store, user: User, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the order to suspend is called off while the entry is being completed."""

    def slow(name: str, *_: object, **__: object) -> None:
        (folder / "carol" / "reached").touch()
        signal.pause()

    before = children()

    async def work() -> None:
        await store.begin(JOB, need_bytes=1)
        await write(store, a_part(0))
        with monkeypatch.context() as patched:
            patched.setattr(os, "rename", slow)
            task = asyncio.ensure_future(store.complete(JOB, an_entry(user)))
            while not (folder / "carol" / "reached").exists():
                await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert children() == before
        await store.drop(JOB)

    run(work())
    assert names(folder / "carol") == ["reached"]


@pytest.mark.parametrize("moment", range(11))
def test_killed_while_an_entry_is_removed(
    store: Store, user: User, folder: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    run(save(store, an_entry(user)))
    done = dies_at(monkeypatch, moment, lambda: store.remove(JOB))
    found = run(store.find(JOB))
    assert found in (None, (an_entry(user), (a_part(0),))) and not (done and found)
    run(store.remove(JOB))
    assert names(folder / "carol") == [] and done == (moment == 10)


def test_only_one_takes_an_entry_away(store: Store, user: User, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who resumes a job and who deletes what is stored of it do not both have it."""
    run(save(store, an_entry(user)))
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
        refused(store.claim(JOB), "Input/output error")
    assert run(store.find(JOB)) is not None

    async def both() -> list[bool]:
        return list(await asyncio.gather(store.claim(JOB), store.claim(JOB)))

    assert sorted(run(both())) in ([False, True], [False])
    assert run(store.find(JOB)) is None and run(store.claim(JOB)) is False


def test_what_an_attempt_has_taken_away_goes_with_it(site: Node, user: User, folder: Path) -> None:
    place = site.place()
    lock, listener = record.create(place, {"job_id": JOB, "user": user.name})
    store = Store(site.config, user, place)
    run(save(Store(site.config, user), an_entry(user)))
    assert run(store.claim(JOB)) is True and names(folder / "carol") == [f".{JOB}.old"]
    os.close(lock)
    listener.close()
    assert undo(place) == [] and names(folder / "carol") == []


@pytest.mark.parametrize(
    ("words", "left", "reason"),
    [
        (["completing"], True, LOST),
        (["completing", "settled"], True, ""),
        (["completing", "stale"], False, ""),
        (["completing", "stale", "settled"], True, ""),
    ],
)
def test_what_becomes_of_an_entry_with_the_attempt_that_made_it(
    known: User, folder: Path, site: Node, words: list[str], left: bool, reason: str
) -> None:
    place, entry = a_place(site), an_entry(known)
    store = Store(site.config, known, place)
    for word in words:
        store.mark(JOB, entry, word)
    run(save(Store(site.config, known), entry))
    assert undo(place) == [] and not place.folder.exists()
    assert [(found.state, found.reason) for found in stored_jobs(site.config).stored] == [("suspended", reason)] * left


@pytest.mark.parametrize("what", ["newer", "garbage", "link", "nothing"])
def test_another_entry_is_left_alone(known: User, folder: Path, site: Node, what: str) -> None:
    """Whatever its user has made of it, the attempt is undone."""
    place, entry = a_place(site), an_entry(known)
    Store(site.config, known, place).mark(JOB, entry, "stale")
    if what != "nothing":
        run(save(Store(site.config, known), entry._replace(when=entry.when + 1)))
    file = folder / "carol" / JOB / "job.json"
    if what == "garbage":
        file.write_bytes(b"[")
    elif what == "link":
        file.unlink()
        file.symlink_to("/etc/passwd")
    assert undo(place) == [] and not place.folder.exists()
    assert names(folder / "carol") == ([JOB] if what != "nothing" else []) if (folder / "carol").exists() else True


def test_why_a_job_did_not_go_on_is_kept_with_it(store: Store, known: User, folder: Path, site: Node) -> None:
    run(save(store, an_entry(known)))
    for text in ("one", "VT-LAUNCH: \x1b[2J another\nline " + "x" * 5000):
        run(store.note(JOB, text))
    (found,) = stored_jobs(site.config).stored
    assert (found.state, found.reason) == ("suspended", "VT-LAUNCH: \x1b[2J another")
    assert run(store.find(JOB)) is not None and (folder / "carol" / JOB / "reason").stat().st_uid == known.uid
    (folder / "carol" / JOB / "reason").unlink()
    os.mkfifo(folder / "carol" / JOB / "reason")
    (found,) = stored_jobs(site.config).stored
    assert (found.state, found.reason) == ("suspended", "")
    refused(store.note("13.server", "x"), "No such file")


def test_the_workspace_goes_with_what_is_deleted(
    base: Path, known: User, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = base / "scratch"
    scratch.mkdir()
    scratch.chmod(0o1777)
    node = make_node(
        base, suspended={"folder": str(folder)}, workspace={"folder": f"{scratch}/{{user}}-{{job}}", "wipe": True}
    )
    store = Store(node.config, known)
    workspaces = [scratch / f"carol-{JOB}.{key}" for key in ("0123abcd", "other")]
    for path in workspaces:
        path.mkdir()
        (path / "file").touch()
        os.chown(path, known.uid, known.gid)
    run(save(store, an_entry(known)))
    (found,) = stored_jobs(node.config).stored
    assert run(store.claim(JOB))  # the job goes on, and has it
    listing.remove(node.config, found)
    assert [path.exists() for path in workspaces] == [True, True]
    run(save(store, an_entry(known)))
    run(store.begin(JOB, need_bytes=1))
    unfinished, _ = sorted(stored_jobs(node.config).stored)
    assert unfinished.state == "incomplete"
    listing.remove(node.config, unfinished)
    assert workspaces[0].exists() and names(folder / "carol") == [JOB]
    listing.remove(node.config, found)
    assert [path.exists() for path in workspaces] == [False, True] and names(folder / "carol") == []
    run(save(store, an_entry(known)))
    workspaces[0].mkdir()  # root's
    (workspaces[0] / "file").touch()
    with pytest.raises(VTorqueError, match=r"it is deleted, but its workspace .*/carol-12\.server\.0123abcd is not: "):
        listing.remove(node.config, found)
    assert names(folder / "carol") == [] and names(workspaces[0]) == ["file"]


def test_others_names_hide_no_job(site: Node, store: Store, known: User, folder: Path) -> None:
    """Anybody can make names in the folder: they cost no look-up each, and those behind them count."""
    for number in range(200):
        made = folder / f"x{number}"
        made.mkdir()
        os.chown(made, 65534, 65534)
    run(save(store, an_entry(known)))
    found = stored_jobs(site.config)
    assert [each.job_id for each in found.stored] == [JOB] and len(found.problems) == listing.MAX_STRANGE


@pytest.mark.parametrize("moment", range(6))
def test_killed_while_one_is_begun(
    store: Store, user: User, folder: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    run(save(store, an_entry(user)))
    run(store.begin(JOB, need_bytes=1))
    run(write(store, a_part(0)))
    dies_at(monkeypatch, moment, lambda: store.begin(JOB, need_bytes=1))
    assert run(store.find(JOB)) == (an_entry(user), (a_part(0),))
    run(store.drop(JOB))
    assert names(folder / "carol") == [JOB]


def test_the_moments_reach_to_the_end(store: Store, user: User, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last moment of the test before is behind the last change."""
    run(save(store, an_entry(user)))
    run(store.begin(JOB, need_bytes=1))
    run(write(store, a_part(0)))
    calls: list[str] = []
    shelf = files.Shelf(str(store._shelf.folder), user.name, os.geteuid())
    for path in Path(store._shelf.path).rglob("*"):
        os.chown(path, 0, 0)
    os.chown(store._shelf.path, 0, 0)
    for name in CHANGES:
        call = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *w, call=call, name=name, **m: (calls.append(name), call(*w, **m))[1])
    shelf.complete(JOB, an_entry(user))
    assert 6 <= len(calls) <= 13


# --- hostile users


def spoiled(folder: Path, user: User, name: str, make: Callable[[Path], None]) -> None:
    """Put something else in place of a file of the stored entry, as its user could."""
    path = folder / "carol" / JOB / name
    path.unlink()
    make(path)
    if path.is_symlink() or path.exists():
        os.chown(path, user.uid, user.gid, follow_symlinks=False)


def _huge(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 40)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


STRANGE: dict[str, Callable[[Path], None]] = {
    "link": lambda path: path.symlink_to("/etc/shadow"),
    "loop": lambda path: path.symlink_to(path),
    "fifo": os.mkfifo,
    "folder": Path.mkdir,
    "socket": _socket,
    "device": lambda path: os.mknod(path, 0o666 | 0o020000, os.makedev(1, 5)),
    "huge": _huge,
}


@pytest.mark.parametrize("name", ["job.json", "node.0.json", "0.state", "0.qcow2"])
@pytest.mark.parametrize("kind", STRANGE)
def test_what_is_no_file_of_ours(store: Store, user: User, folder: Path, site: Node, name: str, kind: str) -> None:
    run(save(store, an_entry(user)))
    spoiled(folder, user, name, STRANGE[kind])
    refused(store.find(JOB), name)
    if name.startswith("0") and kind != "huge":
        refused(store.open(JOB, name), name)
    assert [each.state for each in listed(site, user)] == ["damaged" if name == "job.json" else "suspended"]
    run(store.remove(JOB))
    assert tree(folder) == ["carol"]


def listed(site: Node, *users: User) -> list[listing.Stored]:
    found = run(listing._of(site.config, users))
    assert found.problems == []
    return list(found.stored)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("job.json", b"[" * 100_000),
        ("job.json", b"{}"),
        ("job.json", b"\xff\xfe\x00"),
        ("node.0.json", b'{"version": 1, "node": "\\ud800\\u001b[2J"}'),
        ("node.0.json", b" " * (2 << 20)),
        ("node.0.json", dump_part(a_part(1))),
        ("node.0.json", dump_part(a_part(0, 2))),
    ],
    ids=range(7),
)
def test_what_says_nothing_sensible(store: Store, user: User, folder: Path, name: str, data: bytes) -> None:
    run(save(store, an_entry(user)))
    (folder / "carol" / JOB / name).write_bytes(data)
    refused(store.find(JOB), name)


@pytest.mark.parametrize("fields", [{"job_id": "13.server"}, {"user": "dave"}, {"nodes": 2}, {"nodes": 65536}])
def test_entries_that_are_not_this_jobs(
    store: Store, site: Node, user: User, folder: Path, fields: dict[str, Any]
) -> None:
    run(save(store, an_entry(user)))
    (folder / "carol" / JOB / "job.json").write_bytes(dump_entry(an_entry(user)._replace(**fields)))
    refused(store.find(JOB), JOB)
    assert listed(site, user)[0].state == ("suspended" if "nodes" in fields else "damaged")


def test_folders_that_are_none(store: Store, user: User, folder: Path) -> None:
    run(save(store, an_entry(user)))
    away = folder / "carol" / "away"
    (folder / "carol" / JOB).rename(away)
    (folder / "carol" / JOB).symlink_to("away")
    refused(store.find(JOB), "no folder")
    (folder / "carol" / JOB).unlink()
    (folder / "carol" / JOB).touch()
    refused(store.find(JOB), "no folder")
    (folder / "carol" / f".{JOB}.new").symlink_to("away")
    refused(store.write_part(JOB, a_part(0)), "no folder")
    run(store.begin(JOB, need_bytes=1))
    assert sorted(path.name for path in away.iterdir()) == ["0.qcow2", "0.state", "job.json", "node.0.json"]


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o701])
def test_a_users_folder_that_is_open_to_others(store: Store, user: User, folder: Path, mode: int) -> None:
    run(save(store, an_entry(user)))
    (folder / "carol").chmod(mode)
    for work in (store.begin(JOB, need_bytes=1), store.find(JOB), store.open(JOB, "0.state"), store.remove(JOB)):
        refused(work, "is open to others; chmod 700 closes it")
    (folder / "carol").chmod(0o700)
    assert run(store.find(JOB)) is not None


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch, lambda path: path.symlink_to("/tmp")])
def test_another_user_has_taken_the_name(store: Store, user: User, folder: Path, make: Callable[[Path], None]) -> None:
    """Carol's jobs cannot be suspended then, and she has nothing stored: her job starts from its beginning."""
    squatted = folder / "carol"
    make(squatted)
    os.chown(squatted, user.uid + 1, user.gid, follow_symlinks=False)
    refused(store.begin(JOB, need_bytes=1), "carol")
    assert run(store.find(JOB)) is None
    run(store.drop(JOB))
    run(store.remove(JOB))
    assert squatted.is_symlink() or squatted.exists()


def test_roots_own_folder_is_not_taken_for_nothing(store: Store, user: User, folder: Path) -> None:
    run(save(store, an_entry(user)))
    os.chown(folder / "carol", 0, 0)
    refused(store.find(JOB), "carol")


def test_the_sites_folder_is_missing_or_anybodys(store: Store, user: User, folder: Path) -> None:
    """A node that has not mounted it must not let jobs start from their beginning."""
    run(save(store, an_entry(user)))
    folder.rename(folder.with_name("away"))
    for work in (store.find(JOB), store.begin(JOB, need_bytes=1), store.drop(JOB)):
        refused(work, f"there is no folder {folder}; the administrator makes it: install -d -m 1777 {folder}")
    folder.with_name("away").rename(folder)
    folder.chmod(0o777)
    refused(store.find(JOB), "others may replace what is in", "install -d -m 1777")
    folder.chmod(0o755)
    assert run(store.find(JOB)) is not None
    folder.rename(folder.with_name("away"))
    folder.mkdir(0o755)  # where it is mounted at other times
    for work in (store.find(JOB), store.claim(JOB), store.remove(JOB)):
        refused(work, f"{folder} is not 1777: is its file system not mounted?")


def test_no_folder_no_suspension(base: Path, user: User) -> None:
    with pytest.raises(
        VTorqueError, match=r"VT-SUSPEND: no job can be suspended on this site; suspended\.folder is not"
    ):
        Store(make_node(base).config, user)


# --- full disks, file systems that hang


@pytest.fixture
def small(folder: Path) -> Iterator[Path]:
    """The site's folder on a file system of 1 MiB."""
    if _LIBC.mount(b"small", os.fsencode(folder), b"tmpfs", 0, b"size=1m,mode=1777"):
        pytest.skip(f"cannot mount: {os.strerror(ctypes.get_errno())}")
    yield folder
    _LIBC.umount2(os.fsencode(folder), 2)


def test_too_little_room_is_said_before(store: Store, small: Path) -> None:
    refused(store.begin(JOB, need_bytes=3 << 20), "3 MiB are needed, 1 MiB are free")
    assert tree(small) == ["carol"]
    run(store.begin(JOB, need_bytes=1 << 18))


def test_a_disk_that_is_full_in_the_end(store: Store, small: Path, user: User) -> None:
    async def work() -> None:
        await store.begin(JOB, need_bytes=1)
        fd = await store.create(JOB, "0.state")
        with pytest.raises(OSError, match="No space left"):
            while True:
                os.write(fd, b"x" * 65536)
        size = os.fstat(fd).st_size
        os.close(fd)
        guest = a_part(0).guests[0]._replace(state_bytes=size, overlay_bytes=None)
        await store.write_part(JOB, a_part(0)._replace(guests=(guest,)))

    refused(work(), "No space left on device")
    run(store.drop(JOB))
    assert tree(small) == ["carol"] and run(store.find(JOB)) is None


def test_a_quota_that_is_used_up(store: Store, user: User, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the file system says so: here it is what writes in the child that does."""
    run(save(store, an_entry(user)))

    async def work(entry: Entry) -> None:
        await store.begin(JOB, need_bytes=1)
        await write(store, a_part(0))
        with monkeypatch.context() as patched:
            patched.setattr(files, "write_all", full)
            await store.complete(JOB, entry)

    def full(_fd: int, _data: bytes) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    refused(work(an_entry(user, when=1_800_000_000)), "Disk quota exceeded")
    run(store.drop(JOB))
    assert run(store.find(JOB)) == (an_entry(user), (a_part(0),))


@pytest.mark.parametrize("takes_requests", [False, True])
def test_a_file_system_that_hangs_costs_the_timeout(base: Path, user: User, folder: Path, takes_requests: bool) -> None:
    site = make_node(base, suspended={"folder": str(folder)}, timeouts={"user_file": 1})
    store = Store(site.config, user)
    (folder / "carol").mkdir(mode=0o700)
    os.chown(folder / "carol", user.uid, user.gid)

    before = children()

    async def work() -> None:
        with hanging_mount(user, folder / "carol" / JOB, takes_requests=takes_requests):
            start = time.monotonic()
            with pytest.raises(VTorqueError, match=r"within 1 s; does its file system answer"):
                await store.open(JOB, "0.state")
            assert time.monotonic() - start < 4
            found = await listing._of(site.config, [user])
            assert (found.stored, len(found.problems)) == ([], 1)

    run(work())
    assert children() == before


# --- who sees what


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch, user: User) -> User:
    """Carol, known to the node, and nobody else."""

    def look_up(name: str) -> User:
        if name != user.name:
            raise VTorqueError(f"the node does not know the user {name}", code=Code.NODE)
        return user

    monkeypatch.setattr(listing, "look_up", look_up)
    return user


def test_root_sees_the_jobs_of_all_users(site: Node, store: Store, known: User, folder: Path) -> None:
    run(save(store, an_entry(known)))
    other = "9[3].server"
    run(store.begin(other, need_bytes=1))
    (folder / "dave").mkdir()
    (folder / "carol-2").symlink_to("carol")
    (folder / "\x1b[2J").touch()
    found = stored_jobs(site.config)
    assert [(each.user, each.job_id, each.state) for each in found.stored] == [
        ("carol", other, "incomplete"),
        ("carol", JOB, "suspended"),
    ]
    assert found.stored[1].bytes > 0 and found.stored[1].entry == an_entry(known)
    assert found.stored[1].is_of("12") and found.stored[1].is_of(JOB) and not found.stored[1].is_of("1")
    assert len(found.problems) == 3 and all("is no user's own folder" in str(each) for each in found.problems)
    told: list[VTorqueError] = []
    assert suspended_uses(site.config, told.append) == [("micro@3", f"the suspended job {JOB} of carol")]
    assert list(map(str, told)) == list(map(str, found.problems))
    for each in found.stored:
        listing.remove(site.config, each)
    assert names(folder / "carol") == [] and stored_jobs(site.config, "carol").stored == []


def test_a_user_sees_and_removes_what_is_the_users_own(site: Node, store: Store, user: User, folder: Path) -> None:
    nobody = look_up("nobody")
    run(save(store, an_entry(user)))
    run(save(Store(site.config, nobody), an_entry(nobody)))

    def as_nobody() -> bytes:
        (mine,) = stored_jobs(site.config).stored
        said = [mine.user, mine.state]
        for work in (
            lambda: stored_jobs(site.config, user.name),
            lambda: listing.remove(site.config, mine._replace(user=user.name)),
            lambda: files.Shelf(str(folder), user.name, user.uid).listed(),
        ):
            try:
                work()
            except (VTorqueError, OSError) as err:
                said.append(str(err).partition(";")[0])
        listing.remove(site.config, mine)
        return json.dumps([*said, len(stored_jobs(site.config).stored)]).encode()

    said = json.loads(run(read_from(nobody, as_nobody, "x", limit=4096, timeout_s=10, code=Code.STAGE)))
    others = "VT-ACCESS: suspended jobs of carol are another user's"
    assert said[:4] == ["nobody", "suspended", others, others] and "Permission denied" in said[4] and said[5] == 0
    assert run(store.find(JOB)) is not None and names(folder) == ["carol", "nobody"]


def test_root_is_told_when_the_folder_is_not_there(site: Node, folder: Path) -> None:
    folder.rmdir()
    with pytest.raises(VTorqueError, match=r"VT-SUSPEND: .*No such file or directory"):
        stored_jobs(site.config)
    folder.mkdir(0o755)  # where it is mounted at other times: its images are not to be taken for unused
    with pytest.raises(VTorqueError, match=r"VT-SUSPEND: .*it is not 1777; is its file system mounted here\?"):
        suspended_uses(site.config, print)


def test_many_jobs_of_one_user(site: Node, store: Store, known: User, folder: Path) -> None:
    run(save(store, an_entry(known)))
    for number in range(300):
        (folder / "carol" / f"{number}").mkdir()
    assert len(stored_jobs(site.config).stored) == 301
