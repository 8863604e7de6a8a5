"""Users' files, read and written by root with the users' rights, whatever lies there."""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from settled import children, run

from vmgr.errors import Code, VTorqueError
from vmgr.node import userio
from vmgr.node.user import User, look_up
from vmgr.node.userio import read_file, write_file

pytestmark = pytest.mark.root
PYTHON = "/usr/bin/python3"
"""An interpreter that every user can run; that of the tests may lie in a home of root's."""
LIMIT = 65536


def read(user: User, path: object, *, limit: int = LIMIT, timeout_s: float = 5) -> bytes:
    data: bytes = run(read_file(user, str(path), limit=limit, timeout_s=timeout_s))
    return data


def refused(user: User, path: object, *, limit: int = LIMIT, timeout_s: float = 5) -> str:
    """Why a file is not read; it must be known at once."""
    start = time.monotonic()
    with pytest.raises(VTorqueError) as caught:
        read(user, path, limit=limit, timeout_s=timeout_s)
    assert time.monotonic() - start < timeout_s + 1.5
    assert caught.value.code is Code.SPEC and "\n" not in str(caught.value)
    return str(caught.value)


def theirs(user: User, path: Path, data: bytes = b"x") -> Path:
    path.write_bytes(data)
    path.chmod(0o600)
    os.chown(path, user.uid, user.gid)
    return path


@pytest.mark.parametrize("data", [b"", b"x", b"\0", b"\0ok", b"a\0b\0no such file", os.urandom(LIMIT)])
def test_a_file_of_the_users_own(user: User, data: bytes) -> None:
    assert read(user, theirs(user, Path(user.home) / "spec.json", data)) == data


def test_a_file_below_a_link_is_still_the_users_business(user: User, base: Path) -> None:
    theirs(user, Path(user.home) / "spec.json", b"spec")
    (base / "other-home").symlink_to(user.home)
    assert read(user, base / "other-home" / "spec.json") == b"spec"


def test_what_is_no_file(user: User) -> None:
    home = Path(user.home)
    os.mkfifo(home / "fifo")
    (home / "folder").mkdir()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(home / "socket"))
    os.mknod(home / "null", 0o666 | 0o020000, os.makedev(1, 3))
    os.mknod(home / "zero", 0o666 | 0o020000, os.makedev(1, 5))
    for path in home.iterdir():
        os.chown(path, user.uid, user.gid)
        assert "not a regular file" in refused(user, path), path
    listener.close()


def test_a_fifo_with_a_writer(user: User) -> None:
    path = Path(user.home) / "fifo"
    os.mkfifo(path)
    os.chown(path, user.uid, user.gid)
    writer = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    os.write(writer, b"data")
    assert "not a regular file" in refused(user, path)
    os.close(writer)


def test_links(user: User, base: Path) -> None:
    home = Path(user.home)
    secret = base / "secret"
    secret.write_text("root's")
    secret.chmod(0o600)
    theirs(user, home / "mine")
    for name, target in (
        ("to-secret", secret),
        ("to-mine", home / "mine"),
        ("to-nothing", base / "no"),
        ("loop", home / "loop"),
    ):
        (home / name).symlink_to(target)
        os.chown(home / name, user.uid, user.gid, follow_symlinks=False)
        said = refused(user, home / name)
        assert "a symbolic link" in said and "root's" not in said


def test_files_of_others(user: User, base: Path) -> None:
    home = Path(user.home)
    other = theirs(user, home / "other", b"other's")
    os.chown(other, user.uid + 1, user.gid)
    other.chmod(0o644)
    assert "not owned by the job's user" in refused(user, other)
    os.chown(other, 0, 0)
    assert "not owned by the job's user" in refused(user, other)
    other.chmod(0o600)
    assert "Permission denied" in refused(user, other)
    assert "Permission denied" in refused(user, "/etc/shadow")
    closed = base / "closed"
    closed.mkdir(mode=0o700)
    theirs(user, closed / "spec")
    assert "Permission denied" in refused(user, closed / "spec"), "root's way in is not used"


def test_files_that_are_not_there_or_have_odd_names(user: User) -> None:
    assert "No such file" in refused(user, Path(user.home) / "absent")
    assert "Not a directory" in refused(user, theirs(user, Path(user.home) / "file") / "spec")
    assert "File name too long" in refused(user, Path(user.home) / ("x" * 300))
    odd = theirs(user, Path(user.home) / "a\n\x1b[31m b", b"x" * 9)
    assert "\x1b" not in refused(user, odd, limit=1)


def test_large_files(user: User) -> None:
    path = theirs(user, Path(user.home) / "large", b"x" * (LIMIT + 1))
    assert f"larger than {LIMIT} bytes" in refused(user, path)
    os.truncate(path, 1 << 30)
    start = time.monotonic()
    assert f"larger than {LIMIT} bytes" in refused(user, path)
    assert time.monotonic() - start < 1
    # /proc files say that they have 0 bytes; this one is the user's and has more
    child = subprocess.Popen(["/bin/sleep", "60"], user=user.uid, group=user.gid, extra_groups=[])
    assert "larger than 5 bytes" in refused(user, f"/proc/{child.pid}/status", limit=5)
    child.kill()
    child.wait()


def test_a_file_that_is_replaced_while_it_is_read(user: User) -> None:
    """A user swaps the file for a link and a FIFO as fast as possible: content of the user's, or a refusal."""
    code = """\
import os, sys
home = sys.argv[1]
path, n = home + "/spec", 0
while True:
    n += 1
    new = f"{home}/new"
    if n % 3 == 0:
        os.symlink("/etc/shadow", new)
    elif n % 3 == 1:
        os.mkfifo(new)
    else:
        with open(new, "w") as stream:
            stream.write("mine")
    os.rename(new, path)
"""
    swapper = subprocess.Popen(
        [PYTHON, "-IS", "-c", code, user.home], user=user.uid, group=user.gid, extra_groups=[], cwd="/"
    )
    path = Path(user.home) / "spec"
    outcomes: set[bytes] = set()
    deadline = time.monotonic() + 1.5
    while len(outcomes) < 2 and time.monotonic() < deadline:
        try:
            outcomes.add(read(user, path))
        except VTorqueError as err:
            outcomes.add(b"refused")
            assert any(why in str(err) for why in ("symbolic link", "not a regular file", "No such file"))
    swapper.kill()
    swapper.wait()
    assert outcomes and outcomes <= {b"mine", b"", b"refused"}


# file systems that hang

_LIBC = ctypes.CDLL(None, use_errno=True)
_MNT_DETACH = 2


@contextmanager
def hanging_mount(user: User, at: Path, *, takes_requests: bool) -> Iterator[None]:
    """A FUSE file system of the user's that never answers; with `takes_requests` it takes them first.

    Spoken to the kernel directly (linux/fuse.h): a mount whose FUSE_INIT is never answered hangs everybody; one that
    reads a request and does not answer it cannot even be got out of by a signal.
    """
    at.mkdir()
    os.chown(at, user.uid, user.gid)
    try:
        fuse = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    except OSError as err:
        pytest.skip(f"no /dev/fuse: {err}")
    options = f"fd={fuse},rootmode=40755,user_id={user.uid},group_id={user.gid}"
    if _LIBC.mount(b"hang", os.fsencode(at), b"fuse", 0, options.encode()):
        os.close(fuse)
        pytest.skip(f"cannot mount: {os.strerror(ctypes.get_errno())}")
    server = None
    if takes_requests:
        request = os.read(fuse, 1 << 17)
        unique = struct.unpack_from("=IIQ", request)[2]
        answer = struct.pack("=IIIIHHIIHH", 7, 31, 0, 0, 16, 12, 4096, 1, 1, 0) + bytes(28)
        os.write(fuse, struct.pack("=IiQ", 16 + len(answer), 0, unique) + answer)
        server = subprocess.Popen(
            [sys.executable, "-IS", "-c", "import os, sys\nwhile True: os.read(int(sys.argv[1]), 1 << 17)", str(fuse)],
            pass_fds=[fuse],
            stderr=subprocess.DEVNULL,
        )
    try:
        yield
    finally:
        _LIBC.umount2(os.fsencode(at), _MNT_DETACH)
        if server is not None:
            server.kill()
            server.wait()
        os.close(fuse)


@pytest.mark.parametrize("takes_requests", [False, True])
def test_a_file_system_that_hangs_costs_the_timeout_and_no_more(user: User, takes_requests: bool) -> None:
    at, before = Path(user.home) / "mnt", children()

    async def work() -> None:
        with hanging_mount(user, at, takes_requests=takes_requests):
            for use in (
                read_file(user, str(at / "spec.json"), limit=LIMIT, timeout_s=0.3),
                write_file(user, str(at / "status"), b"x", timeout_s=0.3),
            ):
                start = time.monotonic()
                with pytest.raises(VTorqueError, match=r"within 0\.3 s; does its file system answer"):
                    await use
                assert time.monotonic() - start < 1.3
        # the connection is closed now: what nothing could end while it hung has ended, and is collected

    run(work())
    assert children() == before


def test_a_stuck_child_does_not_hold_the_attempts_lock(user: User, base: Path) -> None:
    import fcntl

    lock = os.open(base / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)

    def stuck(out: int) -> None:
        os.write(out, b"here")
        signal.pause()

    async def work() -> None:
        task = asyncio.ensure_future(userio._as_user(user, stuck, "/x", limit=10, timeout_s=1))
        await asyncio.sleep(0.3)
        os.close(lock)
        other = os.open(base / "lock", os.O_RDWR)
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(other)
        with pytest.raises(VTorqueError):
            await task

    run(work())


# what the child is


def test_the_child_has_the_users_rights_and_nothing_of_roots(user: User) -> None:
    extra = os.open("/etc/shadow", os.O_RDONLY)

    def describe(out: int) -> None:
        status = dict(
            line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line
        )
        facts = {
            "uids": os.getresuid(), "gids": os.getresgid(), "groups": sorted(os.getgroups()), "umask": os.umask(0),
            "caps": [status[name] for name in ("CapPrm", "CapEff", "CapInh", "CapAmb")],
            "fds": sorted({int(fd.name) for fd in Path("/proc/self/fd").iterdir()} - {0, 1, 2, out}),
            "term": signal.getsignal(signal.SIGTERM) == signal.SIG_DFL,
        }  # fmt: skip
        os.write(out, json.dumps(facts).encode())

    def back(out: int) -> None:
        for call, ids in ((os.setresuid, (0, 0, 0)), (os.setresgid, (0, 0, 0)), (os.setgroups, ([0],))):
            try:
                call(*ids)
                os.write(out, b"root again")
            except PermissionError:
                pass

    facts = json.loads(run(userio._as_user(user, describe, "/x", limit=LIMIT, timeout_s=5)))
    os.close(extra)
    assert facts["uids"] == [user.uid] * 3 and facts["gids"] == [user.gid] * 3
    assert facts["groups"] == sorted(user.gids) and facts["umask"] == 0o077 and facts["term"]
    assert {int(caps, 16) for caps in facts["caps"]} == {0}
    assert len(facts["fds"]) <= 1, "that of the listing itself"
    assert run(userio._as_user(user, back, "/x", limit=LIMIT, timeout_s=5)) == b""


def test_the_user_cannot_look_into_the_child(user: User) -> None:
    def stay(out: int) -> None:
        os.write(out, str(os.getpid()).encode())
        signal.pause()

    peek = """\
import os, sys
for name in ("mem", "environ", "maps", "fd"):
    path = f"/proc/{sys.argv[1]}/{name}"
    try:
        os.listdir(path) if name == "fd" else open(path, "rb").read(1)
        print("read", name)
    except (PermissionError, OSError):
        pass
"""

    async def work() -> bytes:
        before = children()
        task = asyncio.ensure_future(userio._as_user(user, stay, "/x", limit=10, timeout_s=1))
        await asyncio.sleep(0.3)
        (child,) = [child.pid for child in children() - before]
        done = await asyncio.create_subprocess_exec(
            PYTHON, "-IS", "-c", peek, str(child), stdout=subprocess.PIPE,
            user=user.uid, group=user.gid, extra_groups=[], cwd="/",
        )  # fmt: skip
        said, _ = await done.communicate()
        with pytest.raises(VTorqueError):
            await task
        return said

    assert run(work()) == b""


def test_a_child_that_is_killed_is_no_answer(user: User) -> None:
    def die(out: int) -> None:
        os.write(out, b"half an answer")
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(VTorqueError, match=r"cannot be used: "):
        run(userio._as_user(user, die, "/x", limit=LIMIT, timeout_s=5))


def test_a_fault_in_the_child_is_a_refusal_without_details(user: User) -> None:
    def fault(out: int) -> None:
        raise RuntimeError("secret")

    with pytest.raises(VTorqueError, match=r"cannot be used: failed") as caught:
        run(userio._as_user(user, fault, "/x", limit=LIMIT, timeout_s=5))
    assert "secret" not in str(caught.value)


# writing


def test_writing_is_whole_and_the_users(user: User) -> None:
    path = Path(user.home) / "status.n1.json"
    for data in (b"one", b"", os.urandom(200_000)):
        run(write_file(user, str(path), data, timeout_s=5))
        assert path.read_bytes() == data
    info = path.stat()
    assert (info.st_uid, info.st_gid, info.st_mode & 0o777) == (user.uid, user.gid, 0o600)
    assert [p.name for p in Path(user.home).iterdir()] == [path.name]


def test_writing_where_the_user_may_not(user: User, base: Path) -> None:
    closed = base / "roots"
    closed.mkdir()
    for path, why in (
        (closed / "x", "Permission denied"), ("/etc/x", "Permission denied"), (base / "absent" / "x", "No such file"),
    ):  # fmt: skip
        with pytest.raises(VTorqueError, match=why):
            run(write_file(user, str(path), b"x", timeout_s=5))


def test_writing_replaces_a_link_and_follows_none(user: User, base: Path) -> None:
    victim = base / "victim"
    victim.write_text("root's")
    path = Path(user.home) / "status"
    path.symlink_to(victim)
    run(write_file(user, str(path), b"mine", timeout_s=5))
    assert victim.read_text() == "root's" and not path.is_symlink() and path.read_bytes() == b"mine"
    (Path(user.home) / "folder" / "x").mkdir(parents=True)
    os.chown(Path(user.home) / "folder", user.uid, user.gid)
    with pytest.raises(VTorqueError):
        run(write_file(user, f"{user.home}/folder", b"x", timeout_s=5))


def test_users_that_there_are_not() -> None:
    for name, why in (("root", "jobs of root"), ("no-such-user-here", "does not know the user")):
        with pytest.raises(VTorqueError, match=why) as caught:
            look_up(name)
        assert caught.value.code is Code.NODE
    nobody = look_up("nobody")
    assert nobody.uid > 0 and 0 not in nobody.gids and nobody.gid not in nobody.gids
