"""Adding disks: good ones that qemu-img made, and hostile ones, refused in one line before anything is copied."""

from __future__ import annotations

import json
import os
import pwd
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Optional

import inotify_simple
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nodesite import FUZZ, TEMPLATES, plain_qcow2

from vmgr.errors import Code, VTorqueError
from vmgr.images import unprivileged
from vmgr.images.add import Given, Wish, add_disk
from vmgr.images.header import Header, check_qcow2, read_header
from vmgr.images.pool import Image, Pool
from vmgr.images.report import Report

FACTS = {
    "family": "debian", "distro": "SLG", "arch": "x86_64", "description": "", "disk": None, "disk_format": "qcow2",
    "virtual_size": 0, "kernel": "vmlinuz", "initrd": "initrd", "cmdline": "root=x", "min_ram_mib": 384,
    "features": ["9p"], "packages": None, "recipe_hash": "",
}  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return plain_qcow2(tmp_path_factory.mktemp("good") / "disk.qcow2").read_bytes()


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    return a_pool(tmp_path / "pool")


def a_pool(path: Path) -> Pool:
    pool = Pool(path)
    with pool.staging("debian-12") as staging:
        (staging / "out").mkdir()
        for name in ("vmlinuz", "initrd"):
            (staging / "out" / name).write_text(name)
        pool.publish(staging / "out", "debian-12", FACTS)
    return pool


BOUND = 16 << 40


def add(pool: Pool, file: Path, *, name: str = "mine", like: Optional[str] = "debian-12", **given: Any) -> Image:
    wish = Wish() if like else Wish(family="debian")
    disk = Given(file, **{"bound": BOUND, **given})
    return add_disk(disk, name, wish, like=like, pool=pool, templates=TEMPLATES, report=Report())


def content(pool: Pool) -> list[str]:
    return sorted(str(p.relative_to(pool.path)) for p in pool.path.rglob("*") if p.name not in (".lock", ".hold"))


def test_a_good_disk(pool: Pool, good: bytes, tmp_path: Path) -> None:
    disk = tmp_path / "disk.qcow2"
    disk.write_bytes(good)
    made = add(pool, disk)
    assert (made.name, made.revision, made.virtual_size, made.family, made.cmdline) == (
        "mine",
        1,
        16 << 20,
        "debian",
        "root=x",
    )
    assert made.path("disk").read_bytes() == good and made.path("disk").stat().st_mode & 0o777 == 0o444
    assert made.path("kernel").read_text() == "vmlinuz" and "added from disk.qcow2" in made.description
    assert add(pool, disk).revision == 2
    assert content(pool) == sorted(
        [
            "debian-12", "debian-12/1", *(f"debian-12/1/{n}" for n in ("image.yaml", "initrd", "vmlinuz")), "mine",
            *(f"mine/{r}{n}" for r in (1, 2) for n in ("", "/disk.qcow2", "/image.yaml", "/initrd", "/vmlinuz")),
        ]
    )  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        ["-o", "compat=0.10"], ["-o", "extended_l2=on,cluster_size=128k"], ["-o", "cluster_size=512"],
        ["-o", "cluster_size=2M"], ["-c"], ["-c", "-o", "compression_type=zstd"], ["-o", "lazy_refcounts=on"],
        ["-o", "preallocation=metadata"],
    ],
)  # fmt: skip
def test_all_kinds_of_disks_that_stand_alone(options: list[str], pool: Pool, good: bytes, tmp_path: Path) -> None:
    (tmp_path / "disk.qcow2").write_bytes(good)
    command = ["qemu-img", "convert", "-f", "qcow2", "-O", "qcow2", *options, "disk.qcow2", "other.qcow2"]
    if subprocess.run(command, cwd=tmp_path, capture_output=True).returncode:
        pytest.skip("this qemu-img makes no such disk")
    assert add(pool, tmp_path / "other.qcow2").virtual_size == 16 << 20


def poke(data: bytes, at: int, form: str, value: int) -> bytes:
    return data[:at] + struct.pack(form, value) + data[at + struct.calcsize(form) :]


Hostile = Callable[[bytes, Path], object]


def _overlay(good: bytes, path: Path) -> None:
    path.with_name("base.qcow2").write_bytes(good)
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "base.qcow2", str(path)], check=True
    )


def _data_file(good: bytes, path: Path) -> None:
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={path}.raw,data_file_raw=on", str(path), "16M"],
        check=True,
    )


def _encrypted(good: bytes, path: Path) -> None:
    path.write_bytes(poke(good, 32, ">I", 2))


def _sparse(good: bytes, path: Path) -> None:
    path.write_bytes(good)
    size = 8 << 60
    while size > len(good):
        try:
            os.truncate(path, size - 1)
            return
        except OSError:
            size //= 2


def _foreign(form: str, path: Path) -> None:
    subprocess.run(["qemu-img", "create", "-q", "-f", form, str(path), "16M"], check=True)


def _descriptor(good: bytes, path: Path) -> None:
    path.write_text(
        '# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\ncreateType="monolithicFlat"\n'
        'RW 32768 FLAT "/etc/shadow" 0\n' + "\n" * 999
    )


def _link(good: bytes, path: Path) -> None:
    path.with_name("target").write_bytes(good)
    path.symlink_to("target")


HOSTILE: dict[str, tuple[Hostile, str]] = {
    "absent": (lambda good, path: None, "No such file"),
    "empty": (lambda good, path: path.touch(), "of no known format"),
    "text": (lambda good, path: path.write_text("hello" * 100), "of no known format"),
    "raw": (lambda good, path: path.write_bytes(bytes(1 << 20)), "of no known format"),
    "backing file": (_overlay, "overlay with a backing file"),
    "data file": (_data_file, "keeps its data in another file"),
    "corrupt": (lambda good, path: path.write_bytes(poke(good, 72, ">Q", 2)), "corrupt"),
    "unknown feature": (lambda good, path: path.write_bytes(poke(good, 72, ">Q", 1 << 40)), "corrupt"),
    "version": (lambda good, path: path.write_bytes(poke(good, 4, ">I", 4)), "version 4"),
    "encrypted": (_encrypted, "encrypted"),
    "8 EB virtual": (lambda good, path: path.write_bytes(poke(good, 24, ">Q", 8 << 60)), "bytes"),
    "no size": (lambda good, path: path.write_bytes(poke(good, 24, ">Q", 0)), "of 0 bytes"),
    "8 EB sparse": (_sparse, "too long"),
    "header only": (lambda good, path: path.write_bytes(good[:104]), "cut off"),
    "cut in the tables": (lambda good, path: path.write_bytes(good[: 3 << 16]), "cut off"),
    "cut in the data": (lambda good, path: path.write_bytes(good[: len(good) - (1 << 16)]), "cut off"),
    "clusters": (lambda good, path: path.write_bytes(poke(good, 20, ">I", 63)), "clusters of"),
    "huge L1 table": (
        lambda good, path: path.write_bytes(poke(good, 36, ">I", 2**32 - 1)),
        "its tables have 4294967295",
    ),
    "far L1 table": (lambda good, path: path.write_bytes(poke(good, 40, ">Q", 2**63)), "cut off"),
    "huge refcount table": (lambda good, path: path.write_bytes(poke(good, 56, ">I", 2**31)), "its tables have"),
    "many snapshots": (lambda good, path: path.write_bytes(poke(good, 60, ">I", 2**32 - 1)), "4294967295 snapshots"),
    "long header": (lambda good, path: path.write_bytes(poke(good, 100, ">I", 2**31)), "a header of 2147483648 bytes"),
    "wide refcounts": (lambda good, path: path.write_bytes(poke(good, 96, ">I", 63)), "refcounts of 2^63 bits"),
    "tables that overlap": (lambda good, path: path.write_bytes(poke(good, 40, ">Q", 0)), "unreadable|corrupt|cut off"),
    "vmdk": (lambda good, path: _foreign("vmdk", path), "of format vmdk; --convert"),
    "vmdk of several files": (_descriptor, "keeps its data in other files"),
    "vmdk without capacity": (lambda good, path: path.write_bytes(b"KDMV" + bytes(1020)), "keeps its data in other"),
    "vmdk with a far descriptor": (
        lambda good, path: path.write_bytes(b"KDMV" + b"\xff" * 44 + bytes(976)),
        "of format vmdk; --convert",
    ),
    "fifo": (lambda good, path: os.mkfifo(path), "not a regular file"),
    "directory": (lambda good, path: path.mkdir(), "not a regular file"),
    "symbolic link": (_link, "symbolic link"),
    "dangling link": (lambda good, path: path.symlink_to("absent"), "symbolic link"),
    "device": (lambda good, path: path.symlink_to("/dev/zero"), "symbolic link"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_file_is_refused_and_the_pool_is_as_before(
    kind: str, pool: Pool, good: bytes, tmp_path: Path
) -> None:
    make, said = HOSTILE[kind]
    disk = tmp_path / "it's\na disk.qcow2"
    make(good, disk)
    before = content(pool)
    start = time.monotonic()
    with pytest.raises(VTorqueError) as caught:
        add(pool, disk)
    assert time.monotonic() - start < 2
    assert caught.value.code is Code.IMAGE and "\n" not in str(caught.value)
    assert any(part in str(caught.value) for part in said.split("|"))
    assert [name for name in content(pool) if name != "mine"] == before
    assert pool.names() == ["debian-12"]


@pytest.mark.parametrize("name", ["/dev/zero", "/dev/full", "/proc/self/mem", "/dev/tty"])
def test_devices(name: str, pool: Pool) -> None:
    with pytest.raises(VTorqueError, match=r"not a regular file|unreadable|cannot (read|copy)"):
        add(pool, Path(name))
    assert pool.names() == ["debian-12"]


def test_a_name_that_leads_out_of_the_pool(pool: Pool, good: bytes, tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(good)
    for name in ("../x", "a/b", "", ".hidden", "UPPER"):
        with pytest.raises(VTorqueError, match="illegal image name"):
            add(pool, tmp_path / "disk", name=name)
    with pytest.raises(VTorqueError, match="unknown image 'nope'"):
        add(pool, tmp_path / "disk", like="nope")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["disk", "pool"]


@FUZZ
@given(at=st.integers(0, 103), value=st.binary(min_size=1, max_size=8))
def test_an_arbitrary_header_is_read_or_refused_quickly(good: bytes, tmp_path: Path, at: int, value: bytes) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes((good[:at] + value + good[at + len(value) :])[: len(good)])
    start = time.monotonic()
    with disk.open("rb") as stream:
        try:
            assert 0 < check_qcow2(stream, shown_as=str(disk), bound=BOUND) <= BOUND
        except VTorqueError as err:
            assert err.code is Code.IMAGE
    assert time.monotonic() - start < 1


def test_all_kinds_of_formats(pool: Pool, good: bytes, tmp_path: Path) -> None:
    source = tmp_path / "disk.qcow2"
    source.write_bytes(good)
    for form in ("raw", "vmdk", "vdi", "vhdx", "qcow2"):
        disk = tmp_path / f"disk.{form}"
        if form != "qcow2":
            subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", form, str(source), str(disk)], check=True)
        said = "raw" if form == "raw" else None
        made = add(pool, disk, format=said, convert=True)
        assert (made.disk, made.disk_format, made.virtual_size) == ("disk.qcow2", "qcow2", 16 << 20)
        command = ["qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", str(source), str(made.path("disk"))]
        subprocess.run(command, check=True, capture_output=True)
        assert made.path("disk").stat().st_uid == os.geteuid()
    made = add(pool, tmp_path / "disk.raw", format="raw")
    assert (made.disk, made.disk_format, made.virtual_size) == ("disk.raw", "raw", 16 << 20)
    assert made.path("disk").stat().st_blocks * 512 < 1 << 20  # its holes are still there
    for form, said in (("raw", "of format qcow2 by its header, not raw"), ("vdi", "not vdi")):
        with pytest.raises(VTorqueError, match=said):
            add(pool, source, format=form)


def test_the_sites_bound(pool: Pool, good: bytes, tmp_path: Path) -> None:
    (tmp_path / "disk.qcow2").write_bytes(good)
    (tmp_path / "disk.raw").write_bytes(bytes(16 << 20))
    for name, form in (("disk.qcow2", None), ("disk.raw", "raw")):
        assert add(pool, tmp_path / name, bound=16 << 20, format=form).virtual_size == 16 << 20
        with pytest.raises(VTorqueError, match=r"a disk of 16777216 bytes; 1 to 8388608 .*images\.max_virtual_size"):
            add(pool, tmp_path / name, bound=8 << 20, format=form)
    (tmp_path / "odd.raw").write_bytes(bytes(1000))
    with pytest.raises(VTorqueError, match="no multiple of 512"):
        add(pool, tmp_path / "odd.raw", format="raw")


@pytest.mark.root
def test_what_looks_into_a_disk_has_no_rights(good: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader of the header, and QEMU's tools, each as it sees itself."""
    disk = tmp_path / "disk"
    disk.write_bytes(good)
    nobody = pwd.getpwnam("nobody")
    ids = [str(nobody.pw_uid)] * 4

    def look(*_: object, **__: object) -> Header:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return Header(json.dumps([lines["Uid"].split(), lines["NoNewPrivs"].strip(), is_open(secret)]), None)

    def is_open(fd: int) -> bool:
        try:
            return bool(os.fstat(fd))
        except OSError:
            return False

    secret = os.open(tmp_path / "secret", os.O_CREAT | os.O_RDWR)
    monkeypatch.setattr(unprivileged, "read_header", look)
    with disk.open("rb") as stream:
        found = json.loads(unprivileged.inspect(stream.fileno(), shown_as="x", said=None, bound=1).format)
    assert found == [ids, "1", False] and is_open(secret)
    os.close(secret)
    spy = tmp_path / "spy"
    spy.write_text(
        "#!/bin/sh\nset -- $(grep ^Uid: /proc/self/status) $(grep NoNewPrivs: /proc/self/status) $(ulimit -f)\n"
        'printf \'{"virtual-size": 1, "words": "%s"}\' "$*"\n'
    )
    spy.chmod(0o755)
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_mode & 0o5 != 0o5:
            folder.chmod(folder.stat().st_mode | 0o55)
    monkeypatch.setattr(unprivileged, "QEMU_IMG", str(spy))
    with disk.open("rb") as stream:
        done = unprivileged._qemu_img(["info"], [stream.fileno()], cpu_s=5)
    assert json.loads(done.out)["words"].split() == ["Uid:", *ids, "NoNewPrivs:", "1", "0"], done


@pytest.mark.parametrize("kind", ["backing file", "data file", "vmdk of several files", "vmdk on another"])
def test_what_a_disk_names_is_never_opened(kind: str, pool: Pool, good: bytes, tmp_path: Path) -> None:
    """By nobody: the canary may be read by all, and the kernel tells who opens it."""
    canary = tmp_path / "canary"
    canary.write_bytes(bytes(32768 * 512))
    disk = tmp_path / "disk"
    if kind == "backing file":
        command = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(canary), str(disk)]
        subprocess.run(command, check=True)
    elif kind == "data file":
        options = f"data_file={canary},data_file_raw=on"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", options, str(disk), "16M"], check=True)
    elif kind == "vmdk of several files":
        _descriptor(good, disk)
        disk.write_text(disk.read_text().replace("/etc/shadow", str(canary)))
    else:
        _foreign("vmdk", disk)
        text = disk.read_bytes()
        at = text.index(b"parentCID=ffffffff")
        hint = f'parentCID=fffffffe\nparentFileNameHint="{canary}"\n'.encode()
        disk.write_bytes(text[:at] + hint + text[at + len(hint) :])
    watch = inotify_simple.INotify()
    watch.add_watch(canary, inotify_simple.flags.OPEN | inotify_simple.flags.ACCESS)
    for convert in (False, True):
        with pytest.raises(VTorqueError):
            add(pool, disk, convert=convert)
    assert watch.read(timeout=0) == []
    watch.close()
    assert pool.names() == ["debian-12"]


@FUZZ
@given(start=st.binary(max_size=600), at=st.integers(0, 1 << 19), value=st.binary(min_size=1, max_size=64))
def test_an_arbitrary_file_is_read_or_refused_quickly(
    good: bytes, tmp_path: Path, start: bytes, at: int, value: bytes
) -> None:
    at %= len(good)
    magics = (b"KDMV", b"COWD", b"vhdxfile", b"QFI\xfb\0\0\0\3", bytes(64) + b"\x7f\x10\xda\xbe", b"")
    for data in (*(magic + start for magic in magics), good[:at] + value + good[at + len(value) :]):
        disk = tmp_path / "disk"
        disk.write_bytes(data)
        begin = time.monotonic()
        with disk.open("rb") as stream:
            try:
                header = read_header(stream, shown_as="x", said=None, bound=BOUND)
                assert header.format in ("qcow2", "vmdk", "vdi", "vhdx")
            except VTorqueError as err:
                assert err.code is Code.IMAGE
        assert time.monotonic() - begin < 1


@settings(parent=FUZZ, max_examples=12)
@given(at=st.integers(0, 1 << 19), value=st.binary(min_size=1, max_size=64))
def test_a_damaged_disk_gets_in_whole_or_not_at_all(good: bytes, tmp_path: Path, at: int, value: bytes) -> None:
    at %= len(good)
    pool = Pool(tmp_path / "pool")
    disk = tmp_path / "disk.qcow2"
    disk.write_bytes(good[:at] + value + good[at + len(value) :])
    before = content(pool)
    try:
        made = add(pool, disk, like=None)
    except VTorqueError as err:
        assert err.code is Code.IMAGE and content(pool) == before
    else:
        assert made.path("disk").read_bytes() == disk.read_bytes()


@pytest.mark.root
def test_a_full_disk_leaves_the_pool_as_it_was(good: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While copying, while converting, and before anything is done."""
    text, large, packed = (tmp_path / name for name in ("large.raw", "large.qcow2", "packed.qcow2"))
    text.write_bytes(b"vtorque " * (4 << 20))
    for options, path in (([], large), (["-c"], packed)):
        subprocess.run(["qemu-img", "convert", *options, "-f", "raw", "-O", "qcow2", text, path], check=True)
    (tmp_path / "small.qcow2").write_bytes(good)
    mount = tmp_path / "pool"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m,mode=755", "tmpfs", mount], check=True)
    try:
        pool = a_pool(mount)
        before = content(pool)
        with pytest.raises(VTorqueError, match="the pool has room for"):
            add(pool, large)
        with pytest.raises(VTorqueError, match="No space left"):
            add(pool, packed, convert=True)
        with monkeypatch.context() as patch:
            patch.setattr("vmgr.images.add.shutil.disk_usage", lambda _: type("Usage", (), {"free": 1 << 40}))
            with pytest.raises(VTorqueError, match="No space left"):
                add(pool, large)
        assert content(pool) == before
        assert add(pool, tmp_path / "small.qcow2").reference == "mine@1"
    finally:
        subprocess.run(["umount", "-l", mount], check=True)


@pytest.fixture(autouse=True)
def nothing_left(tmp_path: Path) -> Iterator[None]:
    yield
    assert not [*tmp_path.glob("pool/*/.tmp-*"), *tmp_path.glob("pool/.gone-*")]
    for sidecar in tmp_path.glob("pool/*/*/image.yaml"):
        json.loads(sidecar.read_text())
