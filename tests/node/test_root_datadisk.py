"""The persistent disk: the user's file, opened and locked with the user's rights, and the wait of its epilogue."""

from __future__ import annotations

import asyncio
import fcntl
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Optional

import pytest
from nodesite import Node, a_spec, an_image, in_session, make_node, note_process
from test_root_userio import hanging_mount, run

from vmgr.errors import Code, VTorqueError
from vmgr.jobspec import Disk
from vmgr.node import datadisk, record
from vmgr.node.allocation import Allocation
from vmgr.node.datadisk import disk_path, open_disk
from vmgr.node.guestjob import Job
from vmgr.node.network.plan import plan_network
from vmgr.node.user import User
from vmgr.node.workspace import JobNames

pytestmark = pytest.mark.root
MIB = 1 << 20


@pytest.fixture
def node(base: Path) -> Node:
    return make_node(base, timeouts={"user_file": 5})


class Site:
    """A user with a node and a home; makes the jobs that ask for a disk."""

    def __init__(self, node: Node, user: User) -> None:
        self.node, self.user = node, user
        self.home = Path(user.home)
        self._starts = iter(range(100, 10_000))

    def job(self, disk: Disk, job_id: str = "12.host", ruid: str = "0123456789abcdef") -> Job:
        place = self.node.place(job_id, start=next(self._starts))
        lock, listener = record.create(place, {"job_id": job_id})
        os.close(lock)
        listener.close()
        return Job(
            job_id=job_id,
            place=place,
            user=self.user,
            spec=a_spec(disk=disk, workdir=self.user.home, ruid=ruid),
            image=an_image(self.node.base),
            allocation=Allocation(("n1",), 0, place.attempt),
            network=plan_network("user", job_id, ("n1",), 1, self.node.config.network),
            mounts=(),
            stands_for=JobNames(self.user.home, self.user.name, job_id, None),
            key=None,
        )

    def open(self, disk: Disk, job_id: str = "12.host", ruid: str = "0123456789abcdef") -> int:
        fd: int = run(open_disk(self.job(disk, job_id, ruid), self.node.config))
        return fd

    def refused(self, disk: Disk, job_id: str = "12.host", ruid: str = "0123456789abcdef") -> str:
        with pytest.raises(VTorqueError) as caught:
            self.open(disk, job_id, ruid)
        assert caught.value.code is Code.STAGE and "\n" not in str(caught.value)
        return str(caught.value)

    def file(self, name: str = "data.img", size: int = MIB) -> Path:
        path = self.home / name
        path.touch(0o600)
        os.truncate(path, size)
        os.chown(path, self.user.uid, self.user.gid)
        return path


@pytest.fixture
def site(node: Node, user: User) -> Site:
    return Site(node, user)


def of(path: object) -> Disk:
    return Disk(str(path), None)


def test_a_disk_of_the_users_own(site: Site) -> None:
    path = site.file()
    job = site.job(of(path))
    fd: int = run(open_disk(job, site.node.config))
    try:
        assert os.path.samestat(os.fstat(fd), path.stat())
        assert fcntl.fcntl(fd, fcntl.F_GETFL) & (os.O_ACCMODE | os.O_NONBLOCK) == os.O_RDWR
        assert not os.get_inheritable(fd)
        assert [step for step in record.steps(job.place) if step["do"] == "disk"] == [{"do": "disk", "path": str(path)}]
    finally:
        os.close(fd)


def test_the_second_use_at_the_same_time_is_refused(site: Site) -> None:
    path = site.file()
    fd = site.open(of(path))
    said = site.refused(of(path), "13.host")
    assert said.startswith(f"VT-STAGE: {path} cannot be used: in use by another guest; ")
    (site.home / "hard").hardlink_to(path) if sys.version_info >= (3, 10) else os.link(path, site.home / "hard")
    assert "in use by another guest" in site.refused(of(site.home / "hard"), "13.host")
    os.close(fd)
    os.close(site.open(of(path), "13.host"))


def test_the_lock_lives_as_long_as_the_hypervisor(site: Site) -> None:
    """As QEMU has it: inherited, the agent's own closed; the agent's death changes nothing, QEMU's ends it."""
    path = site.file()
    fd = site.open(of(path))
    holder = subprocess.Popen([sys.executable, "-IS", "-c", "import time; time.sleep(60)"], pass_fds=[fd])
    os.close(fd)
    assert "in use" in site.refused(of(path), "13.host")
    holder.kill()
    holder.wait()
    os.close(site.open(of(path), "13.host"))


def test_other_ways_of_locking_do_not_matter_to_it(site: Site) -> None:
    """What a program of the user's does to the file: reading it, locking and closing, does not take the lock away."""
    path = site.file()
    fd = site.open(of(path))
    other = os.open(path, os.O_RDWR)
    with pytest.raises(BlockingIOError):
        fcntl.lockf(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(other)
    assert "in use" in site.refused(of(path), "13.host")
    os.close(fd)
    reader = os.open(path, os.O_RDWR)
    fcntl.lockf(reader, fcntl.LOCK_SH)
    # POSIX locks of this process, not of ours in the child
    assert "in use" in site.refused(of(path), "13.host")
    os.close(reader)


def test_the_format_is_never_probed(site: Site) -> None:
    path = site.file()
    with path.open("r+b") as stream:
        stream.write(b"QFI\xfb\0\0\0\3" + bytes(12))
    fd = site.open(of(path))
    assert os.pread(fd, 4, 0) == b"QFI\xfb"
    os.close(fd)


def test_what_is_no_disk(site: Site, base: Path) -> None:
    home, user = site.home, site.user
    os.mkfifo(home / "fifo")
    (home / "folder").mkdir()
    site.file("good")
    (home / "link").symlink_to("good")
    other = site.file("other")
    closed = site.file("closed")
    closed.chmod(0o400)
    for path in (home / "fifo", home / "folder"):
        os.chown(path, user.uid, user.gid)
    os.chown(other, user.uid + 1, user.gid)
    other.chmod(0o666)
    for name, why in (
        ("fifo", "not a regular file"), ("folder", "Is a directory"), ("link", "a symbolic link"),
        ("other", "not owned by the job's user"), ("closed", "Permission denied"), ("absent", "No such file"),
        ("good/x", "Not a directory"),
    ):  # fmt: skip
        assert why in site.refused(of(home / name)), name
    assert "Permission denied" in site.refused(of("/etc/shadow"))
    assert "Permission denied" in site.refused(of("/dev/vda" if Path("/dev/vda").exists() else "/dev/mem"))


@pytest.mark.parametrize("size", [0, 1, 511, 513, MIB + 1])
def test_sizes(site: Site, size: int) -> None:
    assert f"its size of {size} bytes is no multiple of 512" in site.refused(of(site.file(size=size)))


@pytest.mark.parametrize("takes_requests", [False, True])
def test_a_file_system_that_hangs(node: Node, user: User, base: Path, takes_requests: bool) -> None:
    site = Site(make_node(base, timeouts={"user_file": 1, "launch": 1}), user)
    at = site.home / "mnt"

    async def work() -> None:
        with hanging_mount(user, at, takes_requests=takes_requests):
            for disk in (of(at / "disk"), Disk(None, 1)):
                job = site.job(disk)
                job = job._replace(spec=job.spec._replace(workdir=str(at)))
                start = time.monotonic()
                with pytest.raises(VTorqueError, match=r"within [12] s; does its file system answer"):
                    await open_disk(job, site.node.config)
                assert time.monotonic() - start < 3

    run(work())


def test_one_that_is_given_up_leaves_nothing(site: Site) -> None:
    """The agent is told to stop while the child opens: neither a descriptor nor a child stays (see the fixture)."""
    path = site.file()

    async def work() -> None:
        for turn in range(20):
            task = asyncio.ensure_future(open_disk(site.job(of(path)), site.node.config))
            await asyncio.sleep(0.002 * turn)
            task.cancel()
            try:
                os.close(await task)
            except asyncio.CancelledError:
                pass

    run(work())
    deadline = time.monotonic() + 5
    while True:  # a child that was given up may still be on its way out
        try:
            os.close(site.open(of(path), "13.host"))
            break
        except VTorqueError:
            assert time.monotonic() < deadline


# new disks


def dumped(path: Path) -> dict[str, str]:
    done = subprocess.run(["dumpe2fs", "-h", str(path)], capture_output=True, text=True, check=True)
    return {key: value.strip() for key, _, value in (line.partition(":") for line in done.stdout.splitlines())}


def checks_clean(path: Path) -> bool:
    return subprocess.run(["e2fsck", "-fn", str(path)], capture_output=True, check=False).returncode == 0


@contextmanager
def changed(user: User, **fields: object) -> Iterator[User]:
    yield user._replace(**fields)  # type: ignore[arg-type]


def test_a_new_disk_is_the_users_sparse_and_has_a_file_system(site: Site) -> None:
    fd = site.open(Disk(None, 10 * 1024))
    os.close(fd)
    path = site.home / "vtorque-12.host.disk"
    assert str(path) == disk_path(a_spec(disk=Disk(None, 1), workdir=site.user.home + "/"), "12.host")
    info = path.stat()
    assert (info.st_uid, info.st_gid, info.st_mode & 0o777) == (site.user.uid, site.user.gid, 0o600)
    assert info.st_size == 10 << 30 and info.st_blocks * 512 < 16 * MIB
    assert [each.name for each in site.home.iterdir()] == [path.name]
    facts = dumped(path)
    assert facts["Filesystem volume name"] == "vtorque-data" and facts["Reserved block count"] == "0"
    assert "orphan_file" not in facts["Filesystem features"] and "has_journal" in facts["Filesystem features"]
    said = subprocess.run(["debugfs", "-R", "stat /", str(path)], capture_output=True, text=True, check=True).stdout
    assert f"User: {site.user.uid:5}   Group: {site.user.gid:5}" in said
    assert checks_clean(path)


def test_large_ids_own_their_disk(node: Node, base: Path) -> None:
    home = base / "large"
    home.mkdir()
    user = User("big", 1 << 24 | 5, 1 << 25 | 7, "big", str(home), "/bin/sh", ())
    os.chown(home, user.uid, user.gid)
    os.close(Site(node, user).open(Disk(None, 16)))
    said = subprocess.run(
        ["debugfs", "-R", "stat /", str(home / "vtorque-12.host.disk")], capture_output=True, text=True, check=True
    ).stdout
    assert f"User: {user.uid}" in said and f"Group: {user.gid}" in said


@pytest.mark.parametrize("mib", [1, 4, 16])
def test_small_disks(site: Site, mib: int) -> None:
    os.close(site.open(Disk(None, mib)))
    assert checks_clean(site.home / "vtorque-12.host.disk")


def test_a_requeued_job_finds_its_disk_and_no_other_job_does(site: Site) -> None:
    fd = site.open(Disk(None, 16))
    os.pwrite(fd, b"data of the first attempt", 8 * MIB)
    assert "in use" in site.refused(Disk(None, 16))
    os.close(fd)
    fd = site.open(Disk(None, 16))
    assert os.pread(fd, 25, 8 * MIB) == b"data of the first attempt"
    os.close(fd)
    for disk, ruid in ((Disk(None, 16), "fedcba9876543210"), (Disk(None, 17), "0123456789abcdef")):
        assert "it is there already, and not of this job" in site.refused(disk, ruid=ruid)
    os.close(site.open(of(site.home / "vtorque-12.host.disk"), "13.host"))  # as a disk that there is, it is welcome


@pytest.mark.parametrize("make", [Path.touch, Path.mkdir, lambda path: path.symlink_to("/etc/passwd")])
def test_what_is_there_already_is_not_touched(site: Site, make: Callable[[Path], None]) -> None:
    path = site.home / "vtorque-12.host.disk"
    make(path)
    os.chown(path, site.user.uid, site.user.gid, follow_symlinks=False)
    before = path.lstat()
    site.refused(Disk(None, 16))
    assert path.lstat()[:8] == before[:8] and [each.name for each in site.home.iterdir()] == [path.name]


def test_where_no_disk_can_be_made(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    job = site.job(Disk(None, 16))
    job = job._replace(spec=job.spec._replace(workdir="/etc"))
    with pytest.raises(VTorqueError, match="Permission denied"):
        run(open_disk(job, site.node.config))
    monkeypatch.setattr(datadisk, "MKFS", "/absent/mkfs.ext4")
    assert "/absent/mkfs.ext4: No such file or directory; is it installed on the node?" in site.refused(Disk(None, 16))
    monkeypatch.setattr(datadisk, "MKFS", "/bin/false")
    assert "/bin/false failed: status 1" in site.refused(Disk(None, 16))
    assert list(site.home.iterdir()) == [], "nothing half made is left"


def test_a_disk_that_the_file_system_has_no_room_for(site: Site) -> None:
    """As a quota refuses it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8 * MIB, before[1]))
    try:
        assert "File too large" in site.refused(Disk(None, 16))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(site.home.iterdir()) == []


def test_making_one_that_takes_too_long_is_ended_with_all_its_processes(
    site: Site, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = base / "mkfs"
    slow.write_text(f"#!/bin/sh\necho $$ >{site.home}/pid\nexec sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setattr(datadisk, "MKFS", str(slow))
    site.node = make_node(base, timeouts={"user_file": 1, "launch": 1})
    assert "within 2 s" in site.refused(Disk(None, 16))
    pid = int((site.home / "pid").read_text())
    deadline = time.monotonic() + 5
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not Path(f"/proc/{pid}").exists()
    monkeypatch.undo()
    os.close(site.open(Disk(None, 16)))  # what it left half made is in nobody's way


# the epilogue

LONG_AGO = 1
AGENT = """\
import os, signal, sys, time
guest, folder, obeys = int(sys.argv[1]), sys.argv[2], float(sys.argv[3])
def over(*_):
    open(folder + "/told", "w").close()
    if obeys >= 0:
        time.sleep(obeys)
        os.kill(guest, signal.SIGKILL)
signal.signal(signal.SIGTERM, over)
print("up", flush=True)
while True:
    signal.pause()
"""


@contextmanager
def attempt(node: Node, *, obeys: float, disk: bool) -> Iterator[record.Place]:
    """An attempt that lives: a guest, and an agent that ends it so many seconds after it was told, or never (-1)."""
    place = node.place(start=LONG_AGO)
    lock, listener = record.create(place, {"job_id": "12.host"})
    guest = subprocess.Popen(["/bin/sleep", "60"], start_new_session=True)
    agent = subprocess.Popen(
        [sys.executable, "-IS", "-c", AGENT, str(guest.pid), str(node.base), str(obeys)],
        stdout=subprocess.PIPE, start_new_session=True, pass_fds=[lock],
    )  # fmt: skip
    os.close(lock)
    listener.close()
    try:
        assert agent.stdout is not None and agent.stdout.readline() == b"up\n"
        note_process(place, agent.pid, "agent")
        if disk:
            record.append(place, {"do": "disk", "path": "/home/carol/disk"})
        note_process(place, guest.pid, "qemu")
        yield place
        assert agent.wait(timeout=5) == -signal.SIGKILL and guest.wait(timeout=5) == -signal.SIGKILL
    finally:
        for child in (agent, guest):
            child.kill()
            child.wait()
        assert agent.stdout is not None
        agent.stdout.close()


def epilogue(node: Node) -> float:
    """How long the epilogue's own work takes."""
    said = in_session(f"""\
import time
from pathlib import Path
from vmgr.config import load_config
from vmgr.node.hook import end_job
from vmgr.paths import Installation
config = load_config(Installation(Path({str(node.install.root)!r})))
start = time.monotonic()
end_job(config, "12.host")
print(time.monotonic() - start)
""")
    return float(said)


@pytest.mark.parametrize(
    ("disk", "obeys", "low", "high"),
    [(True, 0.7, 0.7, 1.9), (True, -1, 2.0, 3.2), (False, 0.7, 0.0, 0.6)],
    ids=["obeys", "does not obey", "no disk"],
)
def test_an_epilogue_waits_for_a_guest_with_a_disk_and_for_no_other(
    base: Path, disk: bool, obeys: float, low: float, high: float
) -> None:
    node = make_node(base, timeouts={"disk": 2})
    with attempt(node, obeys=obeys, disk=disk) as place:
        assert low <= epilogue(node) < high
        assert not place.folder.exists()
    assert (base / "told").exists() == disk


def test_a_guest_that_is_not_there_yet_is_not_waited_for(base: Path) -> None:
    node = make_node(base, timeouts={"disk": 5})
    place = node.place(start=LONG_AGO)
    lock, listener = record.create(place, {"job_id": "12.host"})
    listener.close()
    os.close(lock)
    record.append(place, {"do": "disk", "path": "/x"})
    assert epilogue(node) < 0.6 and not place.folder.exists()


def test_a_site_that_does_not_want_to_wait(base: Path) -> None:
    node = make_node(base, timeouts={"disk": 0})
    with attempt(node, obeys=0.7, disk=True):
        assert epilogue(node) < 0.6


def test_disk_paths() -> None:
    found: Optional[str] = disk_path(a_spec(), "12.host")
    assert found is None
    assert disk_path(a_spec(disk=Disk("/x/y", None)), "12.host") == "/x/y"
    assert disk_path(a_spec(disk=Disk(None, 1), workdir="/"), "12[3].host") == "/vtorque-12[3].host.disk"
