"""Images built by `vmgr image build`: what is in them, what is cached, and what is left of a build that ends early.

The recipe is a small one of kind initramfs, from packages on disk: what passes for a kernel, BusyBox, files, scripts.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import psutil
import pytest
from debs import KERNEL, apt_config, kernel_files, make_deb
from test_image_recipes import TINY, write

from vmgr.commands.build import build as build_command
from vmgr.errors import VTorqueError
from vmgr.images import writing
from vmgr.images.initramfs import Archive
from vmgr.images.micro import add_busybox
from vmgr.images.pool import Pool
from vmgr.images.sandbox import run

pytestmark = pytest.mark.root
REPOSITORY = Path(__file__).resolve().parents[2]
PATIENCE_S = 60
MARK = f"vtorque-build-{os.getpid()}.test"
"""In the environment of every builder here, as a variable that it passes on to its steps."""
HOLD = str(900_000_000 + os.getpid())
"""Seconds that a script sleeps: how its processes are recognized."""

EVIDENCE = """\
#!/bin/busybox sh
exec >/etc/evidence 2>&1
echo "user $(id -u)"
echo "links $(ls /proc/self/net/dev_snmp6 | tr '\\n' ' ')"
echo "process $$"
mount -t tmpfs none /mnt 2>/dev/null && echo mounted
mknod /dev/disk b 8 0 2>/dev/null && echo device
(echo 1 >/proc/sys/vm/drop_caches) 2>/dev/null && echo sysctl
echo "outside $(ls FOLDER 2>/dev/null)"
echo "motd $(cat /etc/motd)"
"""


def vmgr(*words: str, recipes: Path, pool: Path) -> list[str]:
    program = "import sys; from vmgr.cli import main; sys.exit(main())"
    places = ["--recipes", str(recipes), "--pool", str(pool)]
    return [sys.executable, "-c", program, "image", "build", *words, *places]


def build(*words: str, recipes: Path, pool: Path) -> subprocess.CompletedProcess[str]:
    command = vmgr(*words, recipes=recipes, pool=pool)
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=PATIENCE_S)


def content(pool: Path) -> dict[str, tuple[int, int]]:
    """Every path below the pool with its inode and time of change."""
    found = {}
    for path in pool.rglob("*"):
        info = path.lstat()
        found[str(path.relative_to(pool))] = (info.st_ino, 0 if path.is_dir() else info.st_mtime_ns)
    return found


def left_behind(place: Path) -> set[str]:
    """The mounts below `place`, and the processes of builds that were started here."""
    found = {line for line in Path("/proc/self/mounts").read_text().splitlines() if str(place) in line}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            if HOLD in words or (process.pid != os.getpid() and process.environ().get("no_proxy") == MARK):
                found.add(f"{process.pid} {words}")
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all that is made here lies."""
    return tmp_path_factory.getbasetemp()


@contextmanager
def nothing_stays(place: Path) -> Iterator[None]:
    """At the end nothing is there that was not there before."""
    before = left_behind(place)
    yield
    deadline = time.monotonic() + PATIENCE_S
    while (now := left_behind(place)) != before and time.monotonic() < deadline:
        time.sleep(0.02)  # what is killed ends when the kernel gets to it, and tells nobody
    assert now == before


@pytest.fixture(scope="module", autouse=True)
def packages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """All that apt knows: a kernel, and the host's BusyBox."""
    folder = tmp_path_factory.mktemp("debs")
    busybox = Path("/bin/busybox").read_bytes()
    archives = [
        make_deb(folder, KERNEL, kernel_files(megabytes=20)),
        make_deb(folder, "busybox-static", {"bin/busybox": busybox}),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("APT_CONFIG", str(apt_config(folder, *archives)))
        patch.setenv("no_proxy", MARK)
        yield


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipes")
    files = [{"source": "motd", "target": "/etc/motd", "mode": "0640", "owner": "7:8"}]
    write(
        folder,
        {**TINY, "files": files, "scripts": ["look"]},
        motd="hello",
        look=EVIDENCE.replace("FOLDER", str(folder)),
    )
    hold = f"#!/bin/busybox sh\nsleep {HOLD} &\nsetsid sleep {HOLD} &\nsleep {HOLD}\n"
    write(folder, {"version": 1, "name": "hold", "base": "tiny", "scripts": ["hold"]}, hold=hold)
    wrong = "#!/bin/busybox sh\necho on purpose >&2\nexit 3\n"
    write(folder, {"version": 1, "name": "wrong", "base": "tiny", "scripts": ["wrong"]}, wrong=wrong)
    write(folder, {"version": 1, "name": "large", "base": "tiny", "build_disk_mb": 1 << 20})
    return folder


@pytest.fixture(scope="module")
def pool(recipes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pool with `tiny` in it."""
    pool = tmp_path_factory.mktemp("site") / "pool"
    done = build("tiny", recipes=recipes, pool=pool)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "tiny@1\n"
    return pool


def unpacked(initrd: Path, folder: Path) -> Archive:
    """The archive, read by BusyBox's cpio."""
    folder.mkdir()
    run(["sh", "-c", f"busybox cpio -id <{initrd}"], cwd=folder)
    return Archive.read_from(folder)


def test_files_and_scripts_are_in_the_image(pool: Path, tmp_path: Path) -> None:
    image = Pool(pool).get("tiny")
    nodes = unpacked(image.path("initrd"), tmp_path / "root").nodes
    motd = nodes["/etc/motd"]
    assert (motd.data, motd.mode & 0o7777, motd.uid, motd.gid) == (b"hello", 0o640, 7, 8)
    evidence = nodes["/etc/evidence"].data.decode().splitlines()
    assert evidence == ["user 0", "links lo ", "process 1", "outside ", "motd hello"]
    assert nodes["/dev/console"].major == 5 and not [name for name in nodes if "vtorque" in name]
    assert image.path("packages").read_text().startswith("busybox-static ")


def test_the_same_is_not_built_twice_and_a_changed_file_makes_a_revision(
    pool: Path, recipes: Path, tmp_path: Path
) -> None:
    before = content(pool)
    again = build("tiny", recipes=recipes, pool=pool)
    assert (again.returncode, again.stdout) == (0, "tiny@1\n")
    assert "nothing has changed since revision 1 was built" in again.stderr and content(pool) == before
    (recipes / "tiny" / "motd").write_text("hallo")
    done = build("tiny", recipes=recipes, pool=pool)
    assert (done.returncode, done.stdout) == (0, "tiny@2\n")
    new = content(pool).keys() - before.keys()
    assert new == {"tiny/2", *(f"tiny/2/{path.name}" for path in (pool / "tiny" / "2").iterdir())}


def test_a_script_that_fails_is_named_and_nothing_is_published(pool: Path, recipes: Path, place: Path) -> None:
    before = content(pool)
    with nothing_stays(place):
        done = build("wrong", recipes=recipes, pool=pool)
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("VT-"))
    assert done.returncode == 2 and line.startswith(f"VT-BUILD: the script {recipes}/wrong/wrong failed: ")
    assert line.endswith(f"ended with 3: on purpose; all that was said is in {pool}/wrong/build.log")
    assert (
        (pool / "wrong" / "build.log")
        .read_text()
        .endswith(f"\n{recipes}/wrong/wrong:\n/.vtorque-build-script\n\non purpose\n\n")
    )
    assert content(pool).keys() - before.keys() - {"wrong/.lock"} == {"wrong", "wrong/build.log"}


def test_what_the_image_has_as_busybox_sees_nothing_of_the_machine(tmp_path: Path) -> None:
    """A script of the recipe's may have put anything there."""
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "bin").mkdir(parents=True)
    shutil.copy("/bin/busybox", root / "bin" / "sh")
    (root / "bin" / "busybox").write_text(f"#!/bin/sh\n(: >{outside}) 2>/dev/null\necho ls\n")
    (root / "bin" / "busybox").chmod(0o755)
    archive = Archive()
    with nothing_stays(tmp_path):
        add_busybox(archive, root)
    assert "/bin/ls" in archive.nodes and not outside.exists()


class Building:
    """A build in a process of its own, which can be followed and ended."""

    def __init__(self, recipe: str, recipes: Path, pool: Path) -> None:
        command = vmgr(recipe, recipes=recipes, pool=pool)
        self.process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.said = b""

    def __enter__(self) -> Building:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def wait_until(self, said: str) -> None:
        """Read progress until it says this, in a whole line."""
        assert self.process.stderr is not None
        while b"\n" not in self.said.partition(said.encode())[2]:
            assert select.select([self.process.stderr], [], [], PATIENCE_S)[0], self.said
            data = os.read(self.process.stderr.fileno(), 4096)
            assert data, self.said
            self.said += data

    def end(self, number: int) -> tuple[int, list[str]]:
        """Send a signal; gives the exit status and what was said after that, in lines."""
        self.process.send_signal(number)
        _, rest = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode, rest.decode().splitlines()


MOMENTS = ("downloading", "unpacking", "running look", "running hold")


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_build_leaves_one_folder_that_the_next_one_sweeps(
    pool: Path, recipes: Path, place: Path, moment: str
) -> None:
    before = content(pool)
    with nothing_stays(place), Building("hold", recipes, pool) as building:
        building.wait_until(moment)
        if moment.endswith("hold"):
            wait_for_sleepers(3, place)
        assert building.end(signal.SIGKILL)[0] == -signal.SIGKILL
    left = content(pool).keys() - before.keys()
    assert {name.split("/")[1] for name in left if "/" in name} == {".lock", *(p.name for p in temporary(pool))}
    with Pool(pool).staging("hold"):
        assert len(temporary(pool)) == 1  # this one's own
    assert content(pool) == before


def temporary(pool: Path) -> list[Path]:
    return list((pool / "hold").glob(".tmp-*"))


def wait_for_sleepers(count: int, place: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while sum(HOLD in found for found in left_behind(place)) < count:
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("number", "moment"),
    [(signal.SIGINT, "running hold"), (signal.SIGTERM, "unpacking"), (signal.SIGHUP, "downloading")],
)
def test_an_interrupted_build_says_so_in_one_line_and_leaves_nothing(
    pool: Path, recipes: Path, place: Path, number: signal.Signals, moment: str
) -> None:
    before = content(pool)
    with nothing_stays(place):
        with Building("hold", recipes, pool) as building:
            building.wait_until(moment)
            status, lines = building.end(number)
        said = [line for line in lines if not line.startswith("[")]
        assert (status, said) == (128 + number, [f"vmgr: ended by {number.name}; nothing stays of the build of hold"])
        assert content(pool) == before


def test_ended_when_an_image_is_in_the_pool_it_tells_of_that(
    pool: Path, recipes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """While what it was made of is removed."""
    remove = writing.remove_tree

    def interrupted(folder: Path) -> None:
        signal.raise_signal(signal.SIGTERM)
        remove(folder)

    monkeypatch.setattr(writing, "remove_tree", interrupted)
    assert build_command.callback is not None
    for words, rest in ((["tiny"], ""), (["tiny", "hold"], "; nothing stays of the build of hold")):
        status = build_command.callback(words, force=True, folder=recipes, pool=pool, as_json=False)
        said = capsys.readouterr()
        assert (status, said.out) == (128 + signal.SIGTERM, f"tiny@{Pool(pool).revisions('tiny')[-1]}\n")
        assert said.err.splitlines()[-1] == f"vmgr: ended by SIGTERM{rest}" and list(pool.glob("*/.tmp-*")) == []


class Told(BaseException):
    """By a signal."""


@pytest.fixture
def told() -> Iterator[None]:
    """TERM raises Told."""

    def tell(*_: object) -> NoReturn:
        raise Told

    before = signal.signal(signal.SIGTERM, tell)
    yield
    signal.signal(signal.SIGTERM, before)


def test_a_step_that_is_ended_while_it_starts_is_gone_at_once(
    told: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would make its folders anew in what the build removes."""
    start = subprocess.Popen._execute_child  # type: ignore[attr-defined]

    def interrupted(*arguments: Any) -> None:
        start(*arguments)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(subprocess.Popen, "_execute_child", interrupted)
    before = left_behind(tmp_path)
    with pytest.raises(Told):
        run(["sleep", HOLD], cwd=tmp_path)
    assert left_behind(tmp_path) == before


def test_a_step_can_be_ended_by_signals(tmp_path: Path) -> None:
    """That none is let through while it starts is not handed down to it."""
    assert "SigBlk:\t0000000000000000\n" in run(["cat", "/proc/self/status"], cwd=tmp_path)


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Path]:
    """A file system of this size with a pool in it."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "none", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("megabytes", [12, 36, 56])
def test_a_full_disk_leaves_the_pool_as_it_was(recipes: Path, place: Path, tmp_path: Path, megabytes: int) -> None:
    """While packages are downloaded, while they are unpacked, while the image is written."""
    with small_disk(tmp_path / "small", megabytes) as small:
        pool = small / "pool"
        publish_something(pool)
        before = content(pool)
        with nothing_stays(place):
            done = build("tiny", recipes=recipes, pool=pool)
        (line,) = (line for line in done.stderr.splitlines() if not line.startswith("["))
        assert done.returncode == 2 and done.stdout == ""
        assert line.startswith("VT-BUILD: the build of tiny ended in the middle of it: it takes about 1 MB in ")
        assert content(pool) == before and Pool(pool).names() == ["other"]


def test_a_disk_without_any_room_leaves_the_pool_as_it_was(recipes: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "small", 2) as small:
        publish_something(small / "pool")
        with (small / "full").open("wb", buffering=0) as stream, contextlib.suppress(OSError):
            while stream.write(bytes(4096)):
                pass
        before = content(small / "pool")
        done = build("tiny", recipes=recipes, pool=small / "pool")
        (line,) = (line for line in done.stderr.splitlines() if not line.startswith("["))
        assert done.returncode == 2 and line.startswith("VT-BUILD: ") and content(small / "pool") == before


def test_a_disk_that_is_too_small_is_noticed_before(recipes: Path, pool: Path) -> None:
    before = content(pool)
    done = build("large", recipes=recipes, pool=pool)
    (line,) = (line for line in done.stderr.splitlines() if not line.startswith("["))
    assert line.startswith("VT-BUILD: the build of large cannot begin: it takes about 1048576 MB in ")
    assert done.returncode == 2 and content(pool) == before


def publish_something(path: Path) -> None:
    pool = Pool(path)
    facts: dict[str, Any] = {
        "family": "micro", "distro": "SLG", "arch": "x86_64", "description": "", "disk": None, "disk_format": "qcow2",
        "virtual_size": 0, "kernel": "vmlinuz", "initrd": None, "cmdline": "", "min_ram_mib": 64, "features": [],
        "packages": None, "recipe_hash": "",
    }  # fmt: skip
    with pool.staging("other") as work:
        (work / "out").mkdir()
        (work / "out" / "vmlinuz").write_text("kernel")
        pool.publish(work / "out", "other", facts)


# --- the cage ---


def test_what_a_step_sees(tmp_path: Path) -> None:
    assert run(["ls", "/proc/self/net/dev_snmp6"], cwd=tmp_path) == "lo\n"
    assert len(run(["ls", "/proc/self/net/dev_snmp6"], cwd=tmp_path, network=True).split()) >= 2
    assert run(["cat", "/proc/1/comm"], cwd=tmp_path) == "cat\n"
    assert run(["sh", "-c", "kill -TERM $$; echo not yet"], cwd=tmp_path) == "not yet\n"  # it is the first process
    (tmp_path / "new").mkdir()
    run(["sh", "-c", "mount -t tmpfs none new; touch new/file"], cwd=tmp_path)
    assert list((tmp_path / "new").iterdir()) == []
    with pytest.raises(VTorqueError, match=r"VT-BUILD: no-such-program is not installed$"):
        run(["no-such-program"], cwd=tmp_path)
    with pytest.raises(VTorqueError, match=r"VT-BUILD: sh ended with 3: two; see .*/log$"):
        run(["sh", "-c", "echo one; echo two >&2; exit 3"], cwd=tmp_path, log=tmp_path / "log")
    assert (tmp_path / "log").read_text().endswith("one\n\ntwo\n\n")
    with pytest.raises(VTorqueError, match="sh ended with 137"):
        run(["sh", "-c", f"sleep {HOLD} & kill -KILL -1; sh -c 'kill -KILL $PPID'; exit 137"], cwd=tmp_path)


STEP = f"""
import pathlib, sys
from vmgr.images.sandbox import run
script = "mount -t tmpfs none .; sleep {HOLD} & setsid sleep {HOLD} & sleep {HOLD}"
print(flush=True)
run(["sh", "-c", script], cwd=pathlib.Path(sys.argv[1]))
"""


@pytest.mark.parametrize("milliseconds", [0, 2, 5, 10, 15, 20, 25, 30, 40, 60, 100, 200])
def test_a_step_ends_with_its_builder_at_any_moment(place: Path, tmp_path: Path, milliseconds: int) -> None:
    with nothing_stays(place):
        builder = subprocess.Popen([sys.executable, "-c", STEP, str(tmp_path)], cwd=REPOSITORY, stdout=subprocess.PIPE)
        assert builder.stdout is not None and builder.stdout.read(1) == b"\n"
        time.sleep(milliseconds / 1000)  # into the start of the cage, or past it
        builder.kill()
        builder.communicate(timeout=PATIENCE_S)
