"""Shares in a real guest: what a user's programs find there, and what root of the guest cannot do.

One boot for each kind of share serves all checks of that kind.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from guestmachine import SLOW, Machine, Mount
from guestsetup import make_setup
from rootshell import PROLOGUE, run_as_root
from sharechecks import GROUP, LINES, append, whole_lines

sys.path.insert(0, str(Path(__file__).parent.parent / "node"))

from virtiofsds import program_or_skip

pytestmark = [
    pytest.mark.guest,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: files of other users"),
]

FILES, MEGABYTES = 1000, 64
MANY_FILES, LARGE_MEGABYTES = 10_000, 1024
DEVIATIONS: dict[str, dict[str, Any]] = {
    "9p": {"times": 10**18, "fifo": "ENXIO"},
    "c": {"change_group": "EPERM"},
    "rust": {},
}
"""Where a share is not as a mount (docs/shares.md): times are set in whole seconds and FIFOs cannot be used; the
user's further groups do not count."""
OTHER = 54321
"""Another user of the node."""


class Guest(NamedTuple):
    """A guest with its shares. `server` is 9p, c or rust; `base` holds the shares' folders on the node."""

    machine: Machine
    server: str
    base: Path

    @property
    def kind(self) -> str:
        return "9p" if self.server == "9p" else "virtiofs"

    @property
    def home(self) -> Path:
        return self.base / "home"

    @property
    def where(self) -> str:
        """The home as the guest has it."""
        return self.machine.setup.user.home

    def user(self, script: str) -> str:
        """What a script of the user's prints, errors as well."""
        return self.machine.ssh(f"exec 2>&1; {script}").stdout.strip()

    def root(self, script: str) -> tuple[str, int]:
        """What a script of root's in the guest prints, and its status."""
        return run_as_root(self.machine, script)

    def uids(self) -> set[int]:
        """The owners of everything in the shares that is not there from the start."""
        return {
            (Path(folder) / name).lstat().st_uid
            for share in ("home", "data", "opt")
            for folder, folders, files in os.walk(self.base / share)
            for name in folders + files
        }


@pytest.fixture(scope="module", params=["9p", "c", "rust"])
def guest(request: pytest.FixtureRequest) -> Iterator[Guest]:
    server = str(request.param)
    program = "" if server == "9p" else program_or_skip(server)
    base = Path("/tmp") / f"vtorque-shares-{os.getpid()}"
    base.mkdir()
    kind = "9p" if server == "9p" else "virtiofs"
    try:
        setup = make_setup(base, "debian-12", prologue=PROLOGUE, vcpus=2, ram_mib=1024, virtiofsd=program)
        user = setup.user
        populate(base, user.uid, user.gid)
        setup.mounts = tuple(
            Mount(tag, target, base / tag, readonly, kind)
            for tag, target, readonly in (
                ("home", user.home, False), ("opt", "/opt-hpc", True), ("data", "/data", False),
            )
        )  # fmt: skip
        with Machine(setup) as machine:
            machine.wait_for("ready")
            yield Guest(machine, server, base)
            machine.send("shutdown")
            assert machine.ended()
    finally:
        shutil.rmtree(base)


def populate(base: Path, uid: int, gid: int) -> None:
    """Files of the user's and of others, inside of the shares and beside them."""
    (base / "outside").mkdir()
    (base / "outside" / "marker").write_text("outside\n")
    (base / "opt" / "mine").write_text("mine\n")
    for path in (base / "outside", base / "outside" / "marker", base / "opt", base / "opt" / "mine"):
        os.chown(path, uid, gid)  # what keeps the user from these is not their owner
    data = base / "data"
    data.mkdir()
    data.chmod(0o1777)
    (data / "public").write_text("everybody's\n")
    (data / "secret").write_text("of another\n")
    (data / "closed").mkdir()
    (data / "closed" / "inner").write_text("of another\n")
    for name, mode in (("public", 0o644), ("secret", 0o600), ("closed/inner", 0o644), ("closed", 0o700)):
        os.chown(data / name, OTHER, OTHER)
        (data / name).chmod(mode)
    (data / "grouped").write_text("of the group\n")
    os.chown(data / "grouped", OTHER, GROUP)
    (data / "grouped").chmod(0o640)
    for name, target in (("absolute", str(base / "outside" / "marker")), ("relative", "../outside/marker")):
        (data / name).symlink_to(target)
    (data / "shadow").symlink_to("/etc/shadow")


# what the user's programs find


def run_checks(guest: Guest, folder: str, files: int, megabytes: int, *names: str) -> dict[str, Any]:
    """What comes of the checks in a new folder of the home."""
    shutil.copy(Path(__file__).with_name("sharechecks.py"), guest.home / "sharechecks.py")
    words = f"{guest.where}/{folder} {files} {megabytes} {' '.join(names)}"
    done = subprocess.run(
        guest.machine.ssh_command(f"mkdir {folder} && python3 sharechecks.py {words}"),
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=1700 * SLOW, check=False,
    )  # fmt: skip
    print(f"{guest.server}: {done.stderr}")
    assert done.returncode == 0, done
    return dict(json.loads(done.stdout))


@pytest.fixture(scope="module")
def found(guest: Guest) -> dict[str, Any]:
    return run_checks(guest, "work", FILES, MEGABYTES)


def test_it_behaves_as_a_mount(guest: Guest, found: dict[str, Any]) -> None:
    user = guest.machine.setup.user
    own = [user.uid, user.gid]
    digest = found["large_file"][-1]
    expected = {
        "owner_and_mode": [[*own, "0o100751"], [*own, "0o42750"], [*own, "0o100600"]],
        "change_group": GROUP,
        "give_away": "EPERM",
        "times": 10**18 + 5,
        "rename": ["old", "new", False],
        "rename_folder": "deep",
        "unlinked_while_open": ["before after", False],
        "unlinked_and_looked_at": 5,
        "links": ["target", "x", 2, True],
        "exclusive_create": "EEXIST",
        "fifo": ["through\n", 0],
        "flock": ["refused", True, "got it"],
        "fcntl_lock": ["refused", True, "got it"],
        "append_by_two": [LINES, LINES, 0],
        "truncate": ["0123", "303132330000"],
        "mapped_write": "over a page!",
        "sparse": [(1 << 30) + 3, True],
        "long_and_strange_names": True,
        "many_files": [True, True, False],
        "large_file": [True, True, digest],
    }
    assert found == {**expected, **DEVIATIONS[guest.server]}


def test_the_node_has_what_the_guest_wrote(guest: Guest, found: dict[str, Any]) -> None:
    work = guest.home / "work"
    with (work / "large").open("rb") as stream:
        digest = hashlib.sha256()
        while data := stream.read(1 << 20):
            digest.update(data)
    assert digest.hexdigest() == found["large_file"][-1]
    assert (work / "mapped").read_bytes()[4090:4102] == b"over a page!"
    assert stat.S_IMODE((work / "file").stat().st_mode) == 0o751
    assert (work / "symbolic").readlink() == Path("target")
    assert (work / "sparse").stat().st_blocks * 512 < 1 << 20


@pytest.mark.slow
@pytest.mark.timeout(1800 * SLOW)
def test_ten_thousand_files_and_a_gigabyte(guest: Guest) -> None:
    done = run_checks(guest, "much", MANY_FILES, LARGE_MEGABYTES, "many_files", "large_file")
    assert done["many_files"] == [True, True, False] and done["large_file"][:2] == [True, True]
    assert (guest.home / "much" / "large").stat().st_size == LARGE_MEGABYTES << 20


def test_the_guest_sees_what_the_node_writes(guest: Guest) -> None:
    """A file that is opened anew has what the node has written since, at the latest a second later."""
    (guest.home / "fresh").write_text("old")
    assert guest.user("cat fresh; test -e later && echo there") == "old"
    (guest.home / "fresh").write_text("rather new")
    (guest.home / "later").write_text("x")
    time.sleep(1.1)
    assert guest.user("cat fresh; test -e later && echo there") == "rather newthere"


def test_node_and_guest_append_to_one_file(guest: Guest, found: dict[str, Any]) -> None:
    path = guest.home / "both"
    path.write_text("")
    os.chown(path, guest.machine.setup.user.uid, guest.machine.setup.user.gid)
    command = guest.machine.ssh_command(f"echo go; exec python3 sharechecks.py append {guest.where}/both a")
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdout.readline() == b"go\n"
        append(str(path), "b")
        assert child.wait(120 * SLOW) == 0
    assert whole_lines(str(path)) == [LINES, LINES, 0]


def test_locks_are_the_guests_own(guest: Guest) -> None:
    """No kind carries them to the node: what is shown here is told in docs/shares.md."""
    path = guest.home / "locked"
    path.write_text("x")
    path.chmod(0o666)
    for call, take in (("flock", fcntl.flock), ("lockf", fcntl.lockf)):
        script = f"import fcntl; fcntl.{call}(open('locked', 'r+'), fcntl.LOCK_EX | fcntl.LOCK_NB); print('got it')"
        with path.open("r+") as stream:
            take(stream, fcntl.LOCK_EX)
            assert guest.user(f'python3 -c "{script}"') == "got it", call


# what root of the guest cannot do


def test_another_users_files(guest: Guest) -> None:
    attempts = """cd /data
cat secret
echo x >>secret
cat closed/inner
ls closed
chmod 666 secret
rm -rf secret closed
mv secret mine
echo x >>public
cat grouped"""
    said, _ = guest.root(attempts)
    assert "of another" not in said and said.count("denied") + said.count("not permitted") >= 8, said
    data = guest.base / "data"
    assert (data / "secret").read_text() == "of another\n", "as it was"
    assert (data / "public").read_text() == "everybody's\n"
    assert (data / "closed" / "inner").exists() and stat.S_IMODE((data / "secret").stat().st_mode) == 0o600
    # against that: what the user may read root may, too, and the group counts where the server has it
    assert guest.root("cat /data/public") == ("everybody's", 0)
    assert ("of the group" in said) == (guest.server != "c")
    assert ("of the group" in guest.user("cat /data/grouped")) == (guest.server != "c")


def test_files_that_matter_on_the_node(guest: Guest) -> None:
    user, data = guest.machine.setup.user, guest.base / "data"
    theirs = guest.uids()
    assert theirs == {user.uid, OTHER, 0}, "root's own are the links, and the folders' first files"
    (data / "roots").mkdir()
    (data / "roots").chmod(0o777)
    guest.root(
        f"""cd /data/roots
cp /bin/true copied; chown 0:0 copied; chmod 4755 copied
mkdir made; chown 0:0 made; ln -s x link; mkfifo pipe
mknod disk b 254 0; mknod null c 1 3; chmod 666 disk null
cp /bin/true {guest.where}/set; chown 0:0 {guest.where}/set; chmod 6755 {guest.where}/set
setcap cap_sys_admin+ep {guest.where}/set"""
    )
    guest.user("cd /data/roots; cp /bin/true own; chmod 4755 own")
    made = {path.name: path.lstat() for path in (data / "roots").iterdir()}
    for name, info in made.items():
        assert info.st_uid == user.uid, name
        assert not stat.S_ISBLK(info.st_mode) and not stat.S_ISCHR(info.st_mode), name
    assert made["own"].st_mode == 0o104755, "against that: a set-uid file of the user's own is the user's matter"
    assert ("copied" in made) == (guest.server != "c"), "that of C cannot become another user, root neither"
    if (guest.home / "set").exists():
        assert (guest.home / "set").stat().st_uid == user.uid
        assert "security.capability" not in os.listxattr(guest.home / "set")


def test_out_of_the_share(guest: Guest) -> None:
    said, _ = guest.root(
        f"""cat /data/absolute /data/relative /data/../outside/marker {guest.base}/outside/marker
mkdir -p /mnt/again; umount /data; mount {mount_of(guest, "data")} /mnt/again
cat /mnt/again/../outside/marker /mnt/again/relative
echo broken >/data/relative; echo broken >/data/absolute
ln /data/relative /data/hard; cat /data/hard
umount /mnt/again; mount {mount_of(guest, "data")} /data && echo again"""
    )
    assert said.endswith("again"), said
    assert "outside\n" not in f"{said}\n".replace("/outside", ""), said
    assert (guest.base / "outside" / "marker").read_text() == "outside\n", "as it was"
    assert guest.root("cmp /data/shadow /etc/shadow && echo its own")[0] == "its own"
    # against that: on the node the links lead there
    assert (
        (guest.base / "data" / "absolute").read_text() == (guest.base / "data" / "relative").read_text() == "outside\n"
    )


def test_a_folder_that_becomes_a_link_on_the_node(guest: Guest) -> None:
    """What a guest stands in is swapped for a link that leads out: the server does not follow it either."""
    user, swap = guest.machine.setup.user, guest.home / "swap"
    for folder in (swap, guest.home / "kept"):
        folder.mkdir()
        os.chown(folder, user.uid, user.gid)
    command = guest.machine.ssh_command("cd swap && echo in && read word && cat marker; echo new >made; cat made")
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None and child.stdout.readline() == "in\n"
        swap.rename(guest.home / "swapped")
        swap.symlink_to(guest.base / "outside")
        assert (swap / "marker").read_text() == "outside\n", "on the node it leads there"
        said, _ = child.communicate("go\n", timeout=120)
    assert "outside" not in said
    assert [path.name for path in (guest.base / "outside").iterdir()] == ["marker"]


def test_read_only_is_read_only(guest: Guest) -> None:
    attempts = """cd {folder} || exit
for try in 'echo x >new' 'echo x >>mine' ': >mine' 'rm -f mine' 'mv mine other' 'ln -s x link' 'ln mine hard' \
    'mkdir folder' 'chmod 777 mine' 'chown 12345 mine' 'touch -d 2001-01-01 mine' 'truncate -s 0 mine' 'mkfifo pipe' \
    'setfattr -n user.a -v b mine'; do
    (eval "$try") 2>/dev/null && echo "did: $try"
done
cat mine"""
    opt, user = guest.base / "opt", guest.machine.setup.user
    before = (opt / "mine").stat()
    assert guest.user(attempts.format(folder="/opt-hpc")) == "mine"
    assert guest.root(attempts.format(folder="/opt-hpc"))[0] == "mine"
    guest.root("mount -o remount,rw /opt-hpc")
    assert " rw" in guest.user("grep ' /opt-hpc ' /proc/mounts | tr , ' '"), "the guest believes that it may write"
    assert guest.root(attempts.format(folder="/opt-hpc"))[0] == "mine"
    again, _ = guest.root(
        f"umount /opt-hpc; mount {mount_of(guest, 'opt')} /opt-hpc || exit\n{attempts.format(folder='/opt-hpc')}\n"
        "mount -o remount,ro /opt-hpc"
    )
    assert again == "mine"
    after = (opt / "mine").stat()
    assert [path.name for path in opt.iterdir()].count("mine") == 1 and len(list(opt.iterdir())) == 2
    assert (after.st_mode, after.st_uid, after.st_mtime_ns, after.st_nlink) == (
        before.st_mode, before.st_uid, before.st_mtime_ns, before.st_nlink,
    )  # fmt: skip
    # against that: on the node the very same user may
    subprocess.run(["sh", "-c", f"echo x >{opt}/new && rm {opt}/new"], user=user.uid, group=user.gid, check=True)


def mount_of(guest: Guest, name: str) -> str:
    """The words with which root of the guest mounts a share again, for writing."""
    return f"-t 9p -o trans=virtio,version=9p2000.L {name}" if guest.kind == "9p" else f"-t virtiofs {name}"


# the node's side of it


def test_shares_are_let_go_of_and_taken_again(guest: Guest) -> None:
    machine = guest.machine
    machine.send("quiesce")
    event = machine.wait_for("quiesce")
    assert event["status"] == 0, machine.console_text()[-500:]
    assert guest.root(f"grep -cE ' ({guest.where}|/data|/opt-hpc) ' /proc/mounts")[0] == "0"
    machine.send("mount")
    assert machine.wait_for("mount")["status"] == 0
    assert guest.user("cat /opt-hpc/mine") == "mine"


def test_a_file_server_that_ends_is_told_and_the_guest_lives_on(tmp_path: Path) -> None:
    program = program_or_skip("c")
    base = Path("/tmp") / f"vtorque-shares-end-{os.getpid()}"
    base.mkdir()
    sandbox = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
    try:
        setup = make_setup(base, "micro", virtiofsd=program, devices=("-sandbox", sandbox))
        setup.mounts = (Mount("home", setup.user.home, base / "home", kind="virtiofs"),)
        with Machine(setup) as machine:
            machine.wait_for("ready")
            assert machine.ssh("echo here >made; grep -c ' virtiofs ' /proc/mounts").stdout == "1\n"
            assert (base / "home" / "made").stat().st_uid == setup.user.uid
            assert machine.servers is not None and machine.process is not None
            os.kill(machine.servers.pids[0], signal.SIGKILL)
            assert machine.servers.wait(20) == "the file server of the share home ended (killed by signal 9)"
            assert machine.process.poll() is None
            machine.send("identify")
            assert machine.wait_for("identify")["family"] == "micro", "the guest itself answers"
    finally:
        shutil.rmtree(base)
