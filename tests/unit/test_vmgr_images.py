"""The `vmgr image` commands through the launcher, on real disks: what they do, refuse and leave, alone and at once."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from nodesite import REPOSITORY, TEMPLATES, note_process, plain_qcow2
from pytest_console_scripts import ScriptRunner
from test_image_add import FACTS, a_pool, add, content
from test_vmgr_cli import Vmgr, vmgr_run  # noqa: F401

from vmgr.commands import imagechange
from vmgr.errors import VTorqueError
from vmgr.images.pool import Pool
from vmgr.images.removing import delete
from vmgr.node import record

pytestmark = pytest.mark.script_launch_mode("inprocess")


@pytest.fixture
def site(vmgr_run: Vmgr, monkeypatch: pytest.MonkeyPatch) -> Iterator[Vmgr]:
    """An installation with templates and the image debian-12, whose pool the caller may write."""
    share = vmgr_run.node.install.share
    share.mkdir(parents=True)
    (share / "templates").symlink_to(TEMPLATES)
    if os.geteuid() != 0:
        monkeypatch.setattr(imagechange, "need_root", lambda what: None)
    a_pool(vmgr_run.node.config.images.pool)
    yield vmgr_run
    pool = vmgr_run.node.config.images.pool
    assert not [*pool.glob("*/.tmp-*"), *pool.glob(".gone-*")]


@pytest.fixture
def pool(site: Vmgr) -> Pool:
    return Pool(site.node.config.images.pool)


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plain_qcow2(tmp_path_factory.mktemp("disk") / "disk.qcow2")


@pytest.mark.parametrize(
    "words",
    [["add", "x", "--name", "y"], ["update", "x", "--distro", "y"], ["rename", "x", "y"], ["delete", "x"], ["gc"]],
)
def test_what_changes_the_pool_needs_root(vmgr_run: Vmgr, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmgr.commands.access.os.geteuid", lambda: 4711)
    assert vmgr_run.refuses("image", *words).startswith(f"VT-ACCESS: vmgr image {words[0]} changes the pool")


def test_an_image_from_its_first_to_its_last_revision(site: Vmgr, pool: Pool, disk: Path, tmp_path: Path) -> None:
    status, out, err = site("image", "add", str(disk), "--name", "mine", "--like", "debian-12")
    assert (status, out) == (0, "mine@1\n") and "copying" in err
    first = pool.get("mine")
    assert (first.virtual_size, first.kernel, first.cmdline) == (16 << 20, "vmlinuz", "root=x")
    assert first.path("kernel").samefile(pool.get("debian-12").path("kernel"))

    more = ["--description", "with compilers", "--min-ram", "1G", "--feature", "9p", "--feature", "virtiofs"]
    assert site("image", "update", "mine", *more)[:2] == (0, "mine@2\n")
    second = pool.get("mine")
    assert (second.description, second.min_ram_mib) == ("with compilers", 1024)
    assert second.features == ("9p", "virtiofs") and second.family == "debian"
    assert second.path("disk").samefile(first.path("disk")) and pool.get("mine@1") == first

    other = plain_qcow2(tmp_path / "other.qcow2", 32)
    assert site("update", "mine@1", str(other))[1] == "mine@3\n"
    assert (pool.get("mine").virtual_size, pool.get("mine").description) == (32 << 20, first.description)

    rows = json.loads(site("list", "--json").stdout)
    assert [(row["name"], row["revision"]) for row in rows] == [("debian-12", 1), ("mine", 3)]
    rows = json.loads(site("show", "images", "--all", "--json").stdout)
    assert [(row["name"], row["revision"]) for row in rows] == [("debian-12", 1), *(("mine", n) for n in (1, 2, 3))]
    assert json.loads(site("show", "image", "mine@2", "--json").stdout)["description"] == "with compilers"
    assert "paths.run" in site("show", "config").stdout

    assert site("image", "verify")[:2] == (0, "debian-12@1: ok\nmine@1: ok\nmine@2: ok\nmine@3: ok\n")
    status, out, err = site("image", "gc", "--keep", "2", "--dry-run")
    assert (status, out, err) == (0, "would delete mine@1\n", "") and pool.revisions("mine") == [1, 2, 3]
    assert site("image", "gc", "--keep", "2") == (0, "deleted mine@1\n", "")
    assert site("image", "rename", "mine", "lab") == (0, "lab\n", "") and pool.names() == ["debian-12", "lab"]
    assert site("delete", "image", "lab@3")[:2] == (0, "deleted lab@3\n") and pool.get("lab").revision == 2
    assert site("image", "delete", "lab")[:2] == (0, "deleted lab@2\n") and pool.names() == ["debian-12"]

    assert site("add", str(disk), "--name", "lab", "--like", "debian-12")[1] == "lab@4\n"  # no number comes twice
    assert site("add", str(disk), "--name", "mine", "--like", "debian-12")[1] == "mine@4\n"


def test_what_was_made_and_removed_for_programs(site: Vmgr, pool: Pool, disk: Path, tmp_path: Path) -> None:
    def told(*words: str) -> object:
        status, out, _ = site(*words, "--json")
        assert status == 0
        return json.loads(out)

    place, file = pool.path / "mine", tmp_path / "out.qcow2"
    added = told("image", "add", str(disk), "--name", "mine", "--like", "debian-12")
    assert added == {"image": "mine@1", "directory": str(place / "1")}
    assert told("update", "mine", "--distro", "x") == {"image": "mine@2", "directory": str(place / "2")}
    exported = told("image", "export", "mine", str(file))
    assert exported == {"image": "mine@2", "file": str(file), "bytes": file.stat().st_size}
    assert told("image", "gc", "--keep", "1") == {"dry_run": False, "gone": ["mine@1"], "stays": []}
    assert told("image", "rename", "mine", "lab") == {"image": "lab", "was": "mine"}
    assert told("delete", "image", "lab") == {"gone": ["lab@2"], "uses": []}
    assert "there are no images in" not in site("list").stderr
    told("image", "delete", "debian-12")
    status, _, err = site("list")
    assert status == 0 and f"there are no images in {pool.path}" in err and told("list") == []


def test_an_image_that_boots_by_itself(site: Vmgr, pool: Pool, disk: Path) -> None:
    assert "--like IMAGE" in site.refuses("image", "add", str(disk))
    assert "families: debian, " in site.refuses("image", "add", str(disk), "--family", "nope")
    assert "features: 9p, " in site.refuses("image", "add", str(disk), "--family", "debian", "--feature", "nope")
    assert site("image", "add", str(disk), "--family", "debian", "--feature", "9p")[1] == "disk@1\n"
    made = pool.get("disk")
    assert (made.kernel, made.initrd, made.features, made.distro) == (None, None, ("9p", "disk-boot"), "debian")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["add", "DISK", "--name", "../x", "--like", "debian-12"], "illegal image name"),
        (["add", "DISK", "--name", "x@1", "--like", "debian-12"], "illegal image name"),
        (["add", "DISK", "--name", "x", "--like", "nope"], "unknown image 'nope'"),
        (["add", "DISK", "--name", "x", "--like", "debian-12", "--min-ram", "much"], "VT-USAGE: --min-ram much"),
        (["add", "DISK", "--name", "x", "--like", "debian-12", "--format", "iso"], "VT-USAGE: --format iso"),
        (["add", "DISK", "--name", "x", "--like", "debian-12", "--description", "a\nb"], "is no line of text"),
        (["update", "debian-12"], "nothing to change in debian-12"),
        (["update", "nope", "--distro", "x"], "unknown image 'nope'"),
        (["update", "debian-12", "--distro", "x", "--convert"], "no FILE is given"),
        (["rename", "debian-12", "Debian"], "illegal image name"),
        (["rename", "debian-12", "debian-12"], "has that name already"),
        (["rename", "nope", "x"], "unknown image 'nope'"),
        (["delete", "nope"], "unknown image 'nope'"),
        (["delete", "debian-12@7"], "has no revision 7"),
        (["delete", "debian-12@x"], "names no image"),
        (["verify", "nope"], "unknown image 'nope'"),
        (["export", "debian-12", "FILE"], "has no disk"),
        (["export", "nope", "FILE"], "unknown image 'nope'"),
    ],
)
def test_what_is_wrong_changes_nothing(
    site: Vmgr, pool: Pool, disk: Path, tmp_path: Path, words: list[str], said: str
) -> None:
    before = content(pool)
    (tmp_path / "files").mkdir()
    places = {"DISK": str(disk), "FILE": str(tmp_path / "files" / "file")}
    assert said in site.refuses("image", *(places.get(word, word) for word in words))
    assert content(pool) == before and list((tmp_path / "files").iterdir()) == []


def test_renaming_to_a_name_that_is_taken(site: Vmgr, pool: Pool, disk: Path) -> None:
    add(pool, disk)
    assert "there is an image debian-12 already" in site.refuses("image", "rename", "mine", "debian-12")
    assert pool.names() == ["debian-12", "mine"]


def test_a_running_job_keeps_its_revision(site: Vmgr, pool: Pool, disk: Path) -> None:
    """The lock of an agent keeps it; by force it goes, and what was open stays open."""
    add(pool, disk)
    add(pool, disk)
    place = site.node.place()
    attempt, listener = record.create(place, {})
    note_process(place, os.getpid(), "agent")
    image, held = pool.hold(lambda: pool.get("mine@1"))
    assert held is not None
    for words in (["delete", "mine@1"], ["delete", "mine"], ["rename", "mine", "yours"]):
        assert "is in use: job 12.host (mine@1)" in site.refuses("image", *words)
    assert site("image", "gc", "--keep", "1")[1] == "" and pool.revisions("mine") == [1, 2]
    assert "stays: mine@1 is in use: job 12.host" in site("image", "gc", "--keep", "1").stderr
    assert "stays: mine@1: job 12.host" in site("image", "gc", "--keep", "1", "--dry-run").stderr
    said = json.loads(site("image", "gc", "--keep", "1", "--dry-run", "--json").stdout)
    assert said == {"dry_run": True, "gone": [], "stays": ["mine@1: job 12.host (mine@1)"]}
    assert site("image", "delete", "mine@2")[0] == 0  # the other revision is free
    with image.path("disk").open("rb") as stream:
        status, out, err = site("image", "delete", "mine@1", "--force")
        assert (status, out, err) == (0, "deleted mine@1\n", "was in use: job 12.host (mine@1)\n")
        assert stream.read() == disk.read_bytes()
    os.close(held)
    listener.close()
    os.close(attempt)


def test_layers_and_whatever_else_uses_an_image(
    site: Vmgr, pool: Pool, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(pool, disk)
    add(pool, disk)
    with pool.staging("layer") as staging:
        (staging / "out").mkdir()
        os.link(pool.get("mine").path("disk"), staging / "out" / "disk.qcow2")
        pool.publish(staging / "out", "layer", {**FACTS, "disk": "disk.qcow2", "parent": "mine@2", "kernel": None})
    said = "the image layer@1 is a layer on mine@2"
    for words in (["delete", "mine"], ["delete", "mine@2"], ["rename", "mine", "yours"]):
        line = site.refuses("image", *words)
        assert said in line and ("--force" in line) == (words[0] == "delete")
    monkeypatch.setattr(imagechange, "USES", [lambda config: [("mine@1", "suspended job 7 of carol")]])
    assert "suspended job 7 of carol (mine@1)" in site.refuses("image", "delete", "mine@1")
    status, out, err = site("image", "delete", "mine", "--force")
    assert (status, out) == (0, "deleted mine@1\ndeleted mine@2\n") and said in err and "suspended job 7" in err
    status, out, _ = site("image", "verify", "layer")
    assert status == 1 and "layer@1: the image mine@2, on which it is a layer, is missing" in out


def test_damage_is_found_and_named(site: Vmgr, pool: Pool, disk: Path) -> None:
    for _ in range(4):
        add(pool, disk)
    at = [pool.path / "mine" / str(number) for number in (1, 2, 3, 4)]
    at[0].joinpath("disk.qcow2").chmod(0o644)
    with at[0].joinpath("disk.qcow2").open("r+b") as stream:
        stream.seek(1 << 17)
        stream.write(b"x")
    at[1].joinpath("initrd").unlink()
    at[2].joinpath("more").touch()
    at[3].joinpath("image.yaml").unlink()
    status, out, _ = site("image", "verify", "--json")
    said = json.loads(out)
    assert status == 1 and said["good"] == ["debian-12@1"] and len(said["wrong"]) == 4
    for line, part in zip(
        said["wrong"], ("mine@1: disk.qcow2 has the SHA-256 ", "mine@2: ", "mine@3: more is there", "mine@4: ")
    ):
        assert line.startswith(part)
    assert site("image", "verify", "debian-12")[:2] == (0, "debian-12@1: ok\n")
    status, out, err = site("list", "--all")
    assert status == 0 and "mine/4/image.yaml" in err
    assert [line.split()[:2] for line in out.splitlines()[1:3]] == [["debian-12", "1"], ["mine", "1"]]
    assert site("image", "delete", "mine@4")[0] == 0  # a broken one can be deleted
    assert site("image", "delete", "mine")[0] == 0


def test_exporting(site: Vmgr, pool: Pool, disk: Path, tmp_path: Path) -> None:
    add(pool, disk)
    (tmp_path / "files").mkdir()
    file = tmp_path / "files" / "out.qcow2"
    assert site("image", "export", "mine", str(file))[:2] == (0, f"mine@1: {file}\n")
    command = ["qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", str(disk), str(file)]
    subprocess.run(command, check=True, capture_output=True)
    info = file.stat()
    assert info.st_uid == os.geteuid() and info.st_mode & 0o777 == 0o644 and info.st_blocks * 512 < 1 << 20
    assert "is there already" in site.refuses("image", "export", "mine", str(file))
    file.write_text("old")
    assert site("image", "export", "mine@1", str(file), "--force")[0] == 0 and file.stat().st_size > 3
    assert "cannot write" in site("image", "export", "mine", str(tmp_path / "no" / "x")).stderr
    assert "cannot write" in site.refuses("image", "export", "mine", str(disk / "x"))
    assert [path.name for path in file.parent.iterdir()] == ["out.qcow2"]


def test_exporting_a_layer_makes_one_disk(site: Vmgr, pool: Pool, disk: Path, tmp_path: Path) -> None:
    add(pool, disk)
    with pool.staging("layer") as staging:
        out = staging / "out"
        out.mkdir()
        command = ["qemu-img", "create", "-q", "-f", "qcow2", str(out / "disk.qcow2"), "16M"]
        subprocess.run(command, check=True)
        facts = {**FACTS, "disk": "disk.qcow2", "parent": "mine@1", "kernel": None, "virtual_size": 16 << 20}
        pool.publish(out, "layer", facts)
    file = tmp_path / "flat.qcow2"
    assert site("image", "export", "layer", str(file))[0] == 0
    command = ["qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", str(disk), str(file)]
    subprocess.run(command, check=True, capture_output=True)
    assert "backing" not in subprocess.run(["qemu-img", "info", str(file)], capture_output=True, text=True).stdout


def program(site: Vmgr) -> list[str]:
    """`vmgr` of the site as a process of its own."""
    python = site.node.install.root / "venv" / "bin" / "python3"
    return [
        sys.executable if os.access(sys.executable, os.X_OK) else "/proc/self/exe",
        "-c",
        f"import sys; sys.path[:0] = {sys.path!r}; sys.executable = {str(python)!r}\n"
        "from vmgr.commands import imagechange; imagechange.need_root = lambda what: None\n"
        "from vmgr.cli import main; sys.exit(main())",
    ]


def test_killed_at_any_moment(site: Vmgr, pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of it is seen, no process stays, and the next command sweeps."""
    monkeypatch.undo()  # the interpreter is our own again
    (tmp_path / "large.raw").write_bytes(os.urandom(24 << 20))
    command = [*program(site), "image", "add", str(tmp_path / "large.raw")]
    command += ["--name", "mine", "--like", "debian-12", "--format", "raw", "--convert"]
    begin = time.monotonic()
    subprocess.run(command, check=True, capture_output=True)
    whole_s, seeded = time.monotonic() - begin, random.Random(7)
    left = 0
    for turn in range(8):
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        try:
            if turn:
                child.wait(whole_s * seeded.uniform(0.2, 1.0))
            else:  # once for sure in the middle, however busy the node is
                while child.poll() is None and not [*pool.path.glob("*/.tmp-*")]:
                    pass
                child.kill()
        except subprocess.TimeoutExpired:
            child.kill()
        child.wait()
        left += bool([*pool.path.glob("*/.tmp-*")])
        for image in pool.all():
            assert_whole(image.directory)
    assert left, "it was never killed in the middle"
    done = subprocess.run([*program(site), "image", "gc", "--keep", "1"], check=True, capture_output=True, text=True)
    assert pool.names() == ["debian-12", "mine"] and len(pool.revisions("mine")) == 1, done.stdout
    running = subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, text=True).stdout
    assert running == ""


def assert_whole(folder: Path) -> None:
    """That a revision is what its description says."""
    files = json.loads((folder / "image.yaml").read_text())["files"]
    for name, said in files.items():
        data = (folder / name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (said["size"], said["sha256"])


def test_everything_at_once(site: Vmgr, pool: Pool, disk: Path) -> None:
    """20 times `add`, with `delete`, `gc`, readers and jobs beside them: no lost image, no half one."""
    go = pool.path / ".go"
    gate = os.open(go, os.O_CREAT | os.O_RDWR)
    fcntl.flock(gate, fcntl.LOCK_EX)
    ends = time.monotonic() + 60

    def adder() -> None:
        add(pool, disk)

    def deleter() -> None:
        for _ in range(40):
            for revision in pool.revisions("mine")[:-3]:
                try:
                    delete(pool, f"mine@{revision}")
                except VTorqueError as err:
                    assert "in use" in err.message or "has no revision" in err.message, err

    def reader() -> None:
        for _ in range(100):
            assert {image.name for image in pool.newest()} <= {"debian-12", "mine"}
            for image in pool.all():
                assert image.files

    def job() -> None:
        for _ in range(30):
            while not pool.revisions("mine"):
                assert time.monotonic() < ends
            image, held = pool.hold(lambda: pool.get("mine"))
            assert held is not None
            assert_whole(image.directory)
            with pytest.raises(VTorqueError, match="in use"):
                delete(pool, image.reference)
            assert_whole(image.directory)
            os.close(held)

    workers = [*[adder] * 20, *[deleter] * 2, *[reader] * 2, *[job] * 3]
    pids = [forked(work, go) for work in workers]
    fcntl.flock(gate, fcntl.LOCK_UN)
    statuses = [os.waitpid(pid, 0)[1] for pid in pids]
    assert statuses == [0] * len(workers)
    os.close(gate)
    go.unlink()
    assert pool.revisions("mine")[-1] == 20 and len(pool.revisions("mine")) >= 3
    for image in pool.all():
        assert_whole(image.directory)
    assert {path.name for path in (pool.path / "mine").iterdir()} == {".lock", *map(str, pool.revisions("mine"))}


def forked(work: Callable[[], None], gate: Path) -> int:
    """A process that does `work` when the gate opens; it ends with 0 when that went well."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        signal.alarm(60)
        fcntl.flock(os.open(gate, os.O_RDONLY), fcntl.LOCK_SH)
        work()
        status = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(status)


def test_bars_on_a_terminal(site: Vmgr, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    command = [*program(site), "image", "add", str(disk), "--name", "mine", "--like", "debian-12", "--convert"]
    ours, theirs = os.openpty()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, env={**os.environ, "TERM": "xterm"})
    os.close(theirs)
    seen = b""
    try:
        while block := os.read(ours, 4096):
            seen += block
    except OSError:
        pass  # the terminal is hung up
    os.close(ours)
    assert child.communicate()[0] == b"mine@1\n" and child.returncode == 0
    assert b"copying" in seen and b"converting" in seen and b"100%" in seen


@pytest.mark.script_launch_mode("subprocess")
def test_help_has_an_example(script_runner: ScriptRunner, tmp_path: Path) -> None:
    launcher = tmp_path / "vmgr"
    launcher.write_text(
        f"#!{sys.executable} -I\nimport sys\nsys.path.insert(0, {str(REPOSITORY)!r})\n"
        "from vmgr.cli import main\nsys.exit(main())\n"
    )
    launcher.chmod(0o755)
    for words in (["image", "export"], ["delete", "image"], ["show", "images"]):
        done = script_runner.run([str(launcher), *words, "--help"])
        assert done.returncode == 0 and "Example: vmgr " in done.stdout
