"""A job's workspace: made by every node with the user's rights, and wiped, whatever the user has put into it."""

from __future__ import annotations

import ctypes
import itertools
import os
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from nodesite import Node, make_node
from test_root_userio import PYTHON, hanging_mount, run

from vmgr.errors import Code, VTorqueError
from vmgr.node import record
from vmgr.node.reap import reap
from vmgr.node.undo import undo
from vmgr.node.user import User
from vmgr.node.workspace import job_names, keep_workspace, open_workspace, wipe_workspace

pytestmark = pytest.mark.root
KEY = "0123456789abcdef"
STARTS = itertools.count(100)
_LIBC = ctypes.CDLL(None, use_errno=True)
_MS_BIND, _MNT_DETACH = 4096, 2


@pytest.fixture
def scratch(base: Path) -> Path:
    """A folder in which every user may make one, as sites have them."""
    folder = base / "scratch"
    folder.mkdir()
    folder.chmod(0o1777)
    return folder


def make_site(base: Path, folder: str, *, wiped: bool = True, **timeouts: object) -> Node:
    return make_node(base, workspace={"folder": folder, "wipe": wiped}, timeouts=timeouts)


@pytest.fixture
def node(base: Path, scratch: Path) -> Node:
    return make_site(base, f"{scratch}/{{user}}/{{job}}")


def begun(node: Node, job_id: str = "12.host") -> record.Place:
    place = node.place(job_id, start=next(STARTS))
    lock, listener = record.create(place, {"job_id": job_id})
    os.close(lock)
    listener.close()
    return place


def path_of(node: Node, user: User) -> str:
    path = job_names(node.config, node.config.mounts, user, "12.host", KEY).workspace
    assert path is not None
    return path


def opened(node: Node, user: User) -> tuple[record.Place, Path]:
    place, path = begun(node), path_of(node, user)
    run(open_workspace(node.config, place, user, path, undone=True))
    return place, Path(path)


def as_user(user: User, code: str, *arguments: object) -> None:
    subprocess.run(
        [PYTHON, "-IS", "-c", f"import os, sys\n{code}", *map(str, arguments)],
        user=user.uid, group=user.gid, extra_groups=[], check=True, cwd="/", umask=0o077,
    )  # fmt: skip


def test_it_is_made_for_the_user_alone_and_by_every_node(node: Node, user: User, scratch: Path) -> None:
    place, path = opened(node, user)
    assert path == scratch / "carol" / f"12.host.{KEY}"
    for folder in (path, path.parent):
        info = folder.stat()
        assert (info.st_uid, info.st_gid, info.st_mode & 0o7777) == (user.uid, user.gid, 0o700)
    sister = node.place(start=next(STARTS))
    run(open_workspace(node.config, sister, user, str(path), undone=False))
    assert not sister.folder.exists(), "a sister has nothing to undo"
    assert [step["do"] for step in record.steps(place)] == ["begin", "socket", "workspace"]


def test_one_that_stays_is_not_recorded_and_found_again(base: Path, user: User, scratch: Path) -> None:
    node = make_site(base, f"{scratch}/{{job}}", wiped=False)
    place, path = opened(node, user)
    assert path == scratch / "12.host"
    (path / "result").write_text("kept")
    assert undo(place) == []
    run(open_workspace(node.config, begun(node), user, str(path), undone=True))
    assert (path / "result").read_text() == "kept"


def refused(node: Node, user: User) -> str:
    with pytest.raises(VTorqueError) as caught:
        opened(node, user)
    assert caught.value.code is Code.STAGE and "workspace.folder" in str(caught.value)
    return str(caught.value)


def test_what_is_there_already(node: Node, user: User, base: Path) -> None:
    path = Path(path_of(node, user))
    path.parent.mkdir()
    os.chown(path.parent, user.uid, user.gid)
    victim = base / "victim"
    victim.mkdir(mode=0o777)
    path.symlink_to(victim)
    assert "no folder" in refused(node, user)
    path.unlink()
    path.write_text("")
    assert "no folder" in refused(node, user)
    path.unlink()
    path.mkdir()
    assert "another user's" in refused(node, user)


def test_where_the_user_may_not_write(base: Path, user: User) -> None:
    (base / "roots").mkdir()
    assert "Permission denied" in refused(make_site(base, f"{base}/roots/{{user}}/{{job}}"), user)
    assert not list((base / "roots").iterdir()), "root's way in is not used"


def test_two_nodes_make_it_at_once(node: Node, user: User) -> None:
    import asyncio

    places = [begun(node, f"{number}.host") for number in range(12, 20)]
    path = path_of(node, user)

    async def both() -> None:
        await asyncio.gather(*(open_workspace(node.config, each, user, path, undone=False) for each in places))

    run(both())
    assert Path(path).is_dir()


# wiping


def gone(node: Node, place: record.Place, path: Path) -> None:
    """The workspace is gone with the attempt, and nothing but it."""
    assert undo(place, patience_s=30) == []
    assert not path.exists() and path.parent.is_dir() and not place.folder.exists()
    assert list(path.parent.iterdir()) == []


def test_wiping_is_idempotent_and_leaves_the_folder_above(node: Node, user: User) -> None:
    place, path = opened(node, user)
    as_user(user, "os.makedirs(sys.argv[1]); open(sys.argv[1] + '/x', 'w').close()", path / "a" / "b")
    run(wipe_workspace(node.config, user, str(path)))
    assert not path.exists()
    run(wipe_workspace(node.config, user, str(path)))
    gone(node, place, path)


def test_the_janitor_wipes_what_a_crash_left_and_not_the_next_attempts(node: Node, user: User) -> None:
    place, path = opened(node, user)
    (path / "x").write_text("x")
    after = job_names(node.config, node.config.mounts, user, "12.host", "f" * 16).workspace
    assert after is not None
    run(open_workspace(node.config, place, user, after, undone=False))
    assert reap(node.config) == [f"attempt 12.host {place.attempt}"]
    assert not path.exists() and Path(after).is_dir() and not place.folder.exists()


def test_one_that_outlives_its_attempt_is_wiped_by_nobody(node: Node, user: User) -> None:
    """The last word counts: a suspension may be called off."""
    for words, wiped in (([True], False), ([True, False], True), ([True, False, True], False)):
        place, path = opened(node, user)
        for kept in words:
            keep_workspace(place, user, str(path), kept=kept)
        assert undo(place) == []
        assert path.exists() is not wiped and not place.folder.exists()


def test_folders_and_files_that_nobody_may_touch(node: Node, user: User) -> None:
    place, path = opened(node, user)
    code = """\
top = sys.argv[1]
for depth in ("a", "a/b", "a/b/c"):
    os.mkdir(f"{top}/{depth}")
    for name in ("file", "empty"):
        open(f"{top}/{depth}/{name}", "w").close()
        os.chmod(f"{top}/{depth}/{name}", 0)
for depth in ("a/b/c", "a/b", "a", ""):
    os.chmod(f"{top}/{depth}", 0)
"""
    as_user(user, code, path)
    gone(node, place, path)


def test_names_of_any_bytes_and_what_is_no_file(node: Node, user: User) -> None:
    place, path = opened(node, user)
    code = """\
import socket
top = os.fsencode(sys.argv[1])
for name in (b"a\\nb", b"\\xff\\xfe", b"-rf", b" ", b"\\\\", b"x" * 255, "\\u202e".encode()):
    os.mkdir(top + b"/" + name)
    open(top + b"/" + name + b"/" + name[:200] + b"\\n", "w").close()
os.mkfifo(top + b"/fifo")
os.chdir(top)
socket.socket(socket.AF_UNIX).bind("socket")
os.link("fifo", "hard")
os.symlink("/absent", "dangling")
"""
    as_user(user, code, path)
    gone(node, place, path)


def test_links_are_removed_and_not_followed(node: Node, user: User) -> None:
    place, path = opened(node, user)
    home = Path(user.home)
    as_user(user, "os.mkdir(sys.argv[1]); open(sys.argv[1] + '/x', 'w').close()", home / "kept")
    as_user(user, "os.symlink(sys.argv[1], sys.argv[2]); os.chmod(sys.argv[1], 0o500)", home / "kept", path / "link")
    gone(node, place, path)
    assert (home / "kept" / "x").exists() and (home / "kept").stat().st_mode & 0o777 == 0o500


def test_a_link_in_its_own_place(node: Node, user: User) -> None:
    place, path = opened(node, user)
    home = Path(user.home)
    (home / "kept").write_text("x")
    path.rmdir()
    as_user(user, "os.symlink(sys.argv[1], sys.argv[2])", home, path)
    gone(node, place, path)
    assert (home / "kept").exists()


def test_deep_trees(node: Node, user: User) -> None:
    place, path = opened(node, user)
    code = """\
os.chdir(sys.argv[1])
open("f", "w").close()
for _ in range(10_000):
    os.mkdir("d")
    os.link("f", "d/f")
    os.chdir("d")
"""
    as_user(user, code, path)
    start = time.monotonic()
    gone(node, place, path)
    print(f"10,000 levels: {time.monotonic() - start:.2f} s")


def test_many_files(node: Node, user: User) -> None:
    place, path = opened(node, user)
    code = """\
for folder in range(20):
    os.mkdir(f"{sys.argv[1]}/{folder}")
    first = f"{sys.argv[1]}/{folder}/0"
    os.close(os.open(first, os.O_CREAT))
    for number in range(1, 5_000):
        os.link(first, f"{sys.argv[1]}/{folder}/{number}")  # quicker to make than files of their own
"""
    as_user(user, code, path)
    start = time.monotonic()
    gone(node, place, path)
    print(f"100,000 files: {time.monotonic() - start:.2f} s")


@contextmanager
def refilling(user: User, path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process of the user's that makes files and folders in the workspace as fast as it can."""
    code = """\
import os, sys
n = 0
while True:
    n += 1
    try:
        os.makedirs(f"{sys.argv[1]}/{n % 7}/{n}", exist_ok=True)
        os.close(os.open(f"{sys.argv[1]}/{n % 7}/file{n}", os.O_CREAT))
    except OSError:
        os.makedirs(sys.argv[1], exist_ok=True)
"""
    child = subprocess.Popen(
        [PYTHON, "-IS", "-c", code, str(path)], user=user.uid, group=user.gid, extra_groups=[], cwd="/"
    )
    try:
        deadline = time.monotonic() + 10
        while not (path / "6").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        yield child
    finally:
        child.kill()
        child.wait()


def test_one_that_is_refilled_costs_its_time_and_no_more(node: Node, user: User) -> None:
    place, path = opened(node, user)
    with refilling(user, path):
        start = time.monotonic()
        undo(place, patience_s=0.5)
        assert time.monotonic() - start < 2.5
    if place.folder.exists():  # else it was empty for the one moment that counts
        gone(node, place, path)


def test_what_is_mounted_in_it_is_not_touched(node: Node, user: User, base: Path) -> None:
    place, path = opened(node, user)
    elsewhere = base / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept").write_text("x")
    for owned in (elsewhere, elsewhere / "kept"):
        os.chown(owned, user.uid, user.gid)
    inner = path / "a" / "mnt"
    as_user(user, "os.makedirs(sys.argv[1]); open(sys.argv[1] + '/../file', 'w').close()", inner)
    assert _LIBC.mount(os.fsencode(elsewhere), os.fsencode(inner), None, _MS_BIND, None) == 0  # of the same device
    try:
        (failure,) = undo(place)
        assert "mnt" in failure and "busy" in failure and "\n" not in failure
        assert (elsewhere / "kept").exists() and place.folder.exists()
        assert [each.name for each in path.rglob("*") if each.name == "file"] == [], "the rest is gone"
    finally:
        (left,) = path.rglob("mnt")
        assert _LIBC.umount2(os.fsencode(left), _MNT_DETACH) == 0
    gone(node, place, path)


def test_another_users_files_stay_and_are_told(node: Node, user: User, base: Path) -> None:
    place, path = opened(node, user)
    (path / "roots").mkdir()
    (path / "roots" / "file").write_text("x")
    (path / "empty").mkdir()
    (path / "mine").write_text("x")
    (failure,) = undo(place)
    assert failure == f"workspace: {path}: 'file' stays: Permission denied"
    assert [each.name for each in path.rglob("*") if each.is_file()] == ["file"]


@pytest.mark.parametrize("takes_requests", [False, True])
def test_a_file_system_that_hangs_costs_the_time_and_no_more(
    base: Path, scratch: Path, user: User, takes_requests: bool
) -> None:
    node = make_site(base, f"{scratch}/{{user}}/{{job}}", wipe=1)
    place, path = opened(node, user)
    with hanging_mount(user, path / "mnt", takes_requests=takes_requests):
        (failure,) = undo(place, patience_s=1)  # what is mounted inside is not even asked
        assert "busy" in failure
    path.joinpath("mnt").rmdir()
    path.rmdir()

    async def work() -> None:
        with hanging_mount(user, path, takes_requests=takes_requests):
            start = time.monotonic()
            with pytest.raises(VTorqueError, match="within 1 s"):
                await wipe_workspace(node.config, user, str(path))
            (failure,) = undo(place, patience_s=0.3)
            assert re.search(r"not done after 0\.(29|30) s", failure)
            assert time.monotonic() - start < 3

    run(work())
    gone(node, place, path)
