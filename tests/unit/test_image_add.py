"""Adding disks: good ones that qemu-img made, and hostile ones, refused in one line before anything is copied."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nodesite import FUZZ, plain_qcow2

from vmgr.errors import Code, VTorqueError
from vmgr.images.add import add_disk, check_qcow2
from vmgr.images.pool import Image, Pool

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


def add(pool: Pool, file: Path) -> Image:
    return add_disk(file, "mine", like="debian-12", description="", pool=pool, progress=lambda _: None)


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


def _link(good: bytes, path: Path) -> None:
    path.with_name("target").write_bytes(good)
    path.symlink_to("target")


HOSTILE: dict[str, tuple[Hostile, str]] = {
    "absent": (lambda good, path: None, "No such file"),
    "empty": (lambda good, path: path.touch(), "no qcow2 image"),
    "text": (lambda good, path: path.write_text("hello" * 100), "no qcow2 image"),
    "raw": (lambda good, path: path.write_bytes(bytes(1 << 20)), "no qcow2 image"),
    "backing file": (_overlay, "overlay with a backing file"),
    "data file": (_data_file, "keeps its data in another file"),
    "corrupt": (lambda good, path: path.write_bytes(poke(good, 72, ">Q", 2)), "corrupt"),
    "unknown feature": (lambda good, path: path.write_bytes(poke(good, 72, ">Q", 1 << 40)), "corrupt"),
    "version": (lambda good, path: path.write_bytes(poke(good, 4, ">I", 4)), "version 4"),
    "encrypted": (_encrypted, "encrypted"),
    "8 EB virtual": (lambda good, path: path.write_bytes(poke(good, 24, ">Q", 8 << 60)), "bytes"),
    "no size": (lambda good, path: path.write_bytes(poke(good, 24, ">Q", 0)), "of 0 bytes"),
    "8 EB sparse": (_sparse, "the pool has room for"),
    "header only": (lambda good, path: path.write_bytes(good[:104]), "cut off"),
    "cut in the tables": (lambda good, path: path.write_bytes(good[: 3 << 16]), "cut off"),
    "cut in the data": (lambda good, path: path.write_bytes(good[: len(good) - (1 << 16)]), "cut off"),
    "clusters": (lambda good, path: path.write_bytes(poke(good, 20, ">I", 63)), "clusters of"),
    "huge L1 table": (lambda good, path: path.write_bytes(poke(good, 36, ">I", 2**32 - 1)), "cut off"),
    "far L1 table": (lambda good, path: path.write_bytes(poke(good, 40, ">Q", 2**63)), "cut off"),
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
    assert caught.value.code is Code.IMAGE and said in str(caught.value) and "\n" not in str(caught.value)
    assert [name for name in content(pool) if name != "mine"] == before
    assert pool.names() == ["debian-12"]


@pytest.mark.parametrize("name", ["/dev/zero", "/dev/full", "/proc/self/mem", "/dev/tty"])
def test_devices(name: str, pool: Pool) -> None:
    with pytest.raises(VTorqueError, match=r"not a regular file|no qcow2|cannot (read|copy)"):
        add(pool, Path(name))
    assert pool.names() == ["debian-12"]


def test_a_name_that_leads_out_of_the_pool(pool: Pool, good: bytes, tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(good)
    for name in ("../x", "a/b", "", ".hidden", "UPPER"):
        with pytest.raises(VTorqueError, match="illegal image name"):
            add_disk(tmp_path / "disk", name, like="debian-12", description="", pool=pool, progress=lambda _: None)
    with pytest.raises(VTorqueError, match="unknown image 'nope'"):
        add_disk(tmp_path / "disk", "x", like="nope", description="", pool=pool, progress=lambda _: None)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["disk", "pool"]


@FUZZ
@given(at=st.integers(0, 103), value=st.binary(min_size=1, max_size=8))
def test_an_arbitrary_header_is_read_or_refused_quickly(good: bytes, tmp_path: Path, at: int, value: bytes) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes((good[:at] + value + good[at + len(value) :])[: len(good)])
    start = time.monotonic()
    with disk.open("rb") as stream:
        try:
            assert 0 < check_qcow2(stream, shown_as=disk) <= 16 << 40
        except VTorqueError as err:
            assert err.code is Code.IMAGE
    assert time.monotonic() - start < 1


@pytest.fixture(autouse=True)
def nothing_left(tmp_path: Path) -> Iterator[None]:
    yield
    assert not list(tmp_path.glob("pool/*/.tmp-*"))
    for sidecar in tmp_path.glob("pool/*/*/image.yaml"):
        json.loads(sidecar.read_text())
