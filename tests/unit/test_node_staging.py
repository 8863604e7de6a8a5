"""The parts of staging that need neither root nor a file system of their own."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nodesite import Node, an_image, make_node, short_folder

from vmgr.errors import Code, VTorqueError
from vmgr.node import record
from vmgr.node.staging import copying
from vmgr.node.staging.cache import Held, choose_evicted, remove_unfinished
from vmgr.node.staging.overlay import empty_overlay, reserve_overlays, write_overlay
from vmgr.node.staging.ramdisk import available_bytes, ramdisk_bytes

MIB = 1 << 20
KEYS = [f"{number:x}" * 64 for number in range(16)]
needs_qemu_img = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="needs qemu-img")


@pytest.fixture
def node() -> Iterator[Node]:
    with short_folder() as base:
        yield make_node(base, images={"overlays_max": "100M"})
    while _LOCKS:
        os.close(_LOCKS.pop())


def attempt(node: Node, job_id: str) -> record.Place:
    """An attempt that lives, until the test's end: its lock is held."""
    place = node.place(job_id)
    lock, listener = record.create(place, {"job_id": job_id})
    _LOCKS.append(lock)
    listener.close()
    return place


_LOCKS: list[int] = []


# configuration


def test_settings(node: Node) -> None:
    images = node.config.images
    assert (images.ramdisk_max, images.cache.folder, images.cache.max) == (16 * 1024, None, 32 * 1024)
    cache = {"folder": "/scratch/images", "max": "5G"}
    images = make_node(node.base, images={"ramdisk_max": "512M", "cache": cache}).config.images
    assert (images.ramdisk_max, images.cache.folder, images.cache.max) == (512, Path("/scratch/images"), 5 * 1024)
    for wrong in ({"cache": {"folder": "scratch"}}, {"cache": {"max": "much"}}, {"cache": "/scratch"}):
        with pytest.raises(VTorqueError, match=r"images\.cache"):
            make_node(node.base, images=wrong)


# overlays


def test_overlays_are_counted_with_what_they_may_grow_to(node: Node) -> None:
    image = an_image(node.base, virtual_size=20 * MIB)
    places = [attempt(node, f"{n}.host") for n in range(3)]
    paths = [path for place in places[:2] for path in reserve_overlays(node.config, place, image, ["n1-1", "n1-2"])]
    assert len(set(paths)) == 4 and all(path.parent == node.config.images.overlays for path in paths)
    assert node.config.images.overlays.stat().st_mode & 0o777 == 0o700
    with pytest.raises(VTorqueError, match="2 overlays of 20 MiB do not fit: 80 of 100 MiB") as caught:
        reserve_overlays(node.config, places[2], image, ["n1-1", "n1-2"])
    assert caught.value.code is Code.STAGE and "images.overlays_max" in str(caught.value)
    assert [step["do"] for step in record.steps(places[2])] == ["begin", "socket"], "all of them, or none"
    reserve_overlays(node.config, places[2], image, ["n1-1"])


def test_the_dead_count_with_what_they_have_left(node: Node) -> None:
    """A record stays until all of it is undone, for instance a workspace that cannot be wiped."""
    image = an_image(node.base, virtual_size=60 * MIB)
    dead = attempt(node, "1.host")
    (overlay,) = reserve_overlays(node.config, dead, image, ["n1-1"])
    os.close(_LOCKS.pop())
    overlay.write_bytes(b"left")
    with pytest.raises(VTorqueError):
        reserve_overlays(node.config, attempt(node, "2.host"), image, ["n1-1"])
    overlay.unlink()
    assert dead.record.exists() and reserve_overlays(node.config, attempt(node, "3.host"), image, ["n1-1"])


def test_overlays_reserved_at_once_stay_below_the_bound(node: Node) -> None:
    image = an_image(node.base, virtual_size=40 * MIB)
    granted: list[Path] = []

    def ask(place: record.Place) -> None:
        try:
            granted.extend(reserve_overlays(node.config, place, image, ["n1-1"]))
        except VTorqueError:
            pass

    threads = [threading.Thread(target=ask, args=(attempt(node, f"{n}.host"),)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(granted) == 2


@needs_qemu_img
@pytest.mark.parametrize("mebibytes", [1, 8192, 16 << 20])
def test_an_overlay_is_what_qemu_img_makes(tmp_path: Path, mebibytes: int) -> None:
    path = tmp_path / "a,b.qcow2"
    os.close(write_overlay(str(path), asyncio.run(empty_overlay(mebibytes * MIB))))
    told = json.loads(subprocess.check_output(["qemu-img", "info", "--output=json", str(path)]))
    assert (told["format"], told["virtual-size"]) == ("qcow2", mebibytes * MIB) and "backing-filename" not in told
    subprocess.run(["qemu-img", "check", "-q", str(path)], check=True)
    assert path.stat().st_mode & 0o777 == 0o600 and path.stat().st_blocks * 512 < 64 << 10
    with pytest.raises(FileExistsError):
        write_overlay(str(path), b"x")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "absent")
    with pytest.raises(FileExistsError):
        write_overlay(str(link), b"x")


@needs_qemu_img
def test_an_overlay_that_cannot_be_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(VTorqueError, match="qemu-img cannot make an overlay: ") as caught:
        asyncio.run(empty_overlay(-1))
    assert caught.value.code is Code.STAGE
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(VTorqueError, match="qemu-img cannot make an overlay: No such file"):
        asyncio.run(empty_overlay(MIB))


# copies


def a_file(path: Path, data: bytes) -> copying.Original:
    path.write_bytes(data)
    image = an_image(path.parent)._replace(disk=path.name, files={path.name: copying_facts(path)})
    return copying.original(image, "disk")


def copying_facts(path: Path) -> dict[str, object]:
    digest = subprocess.check_output(["sha256sum", str(path)], text=True).split()[0]
    return {"sha256": digest, "size": path.stat().st_size}


def copied(what: copying.Original, target: Path, told: list[str]) -> bytes:
    source, fd = os.open(what.path, os.O_RDONLY), os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    try:
        copying.copy_image(source, fd, what, told.append)
    finally:
        os.close(source)
        os.close(fd)
    return target.read_bytes()


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, (1 << 20) + 1, (8 << 20) + 5])
@pytest.mark.parametrize("by_kernel", [True, False])
def test_a_copy_is_the_same(tmp_path: Path, size: int, by_kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not by_kernel:
        monkeypatch.setattr(copying, "_clone", lambda *_: False)
        monkeypatch.setattr(copying, "_copy_range", lambda *_: 0)
    data, told = os.urandom(size), []
    assert copied(a_file(tmp_path / "disk", data), tmp_path / "copy", told) == data
    assert all(text.endswith(" %") and 0 <= int(text.split()[1]) <= 100 for text in told)


def test_a_copy_of_a_file_that_shrinks_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    what = a_file(tmp_path / "disk", os.urandom(3 * MIB))
    monkeypatch.setattr(copying, "_clone", lambda source, target: os.truncate(what.path, MIB))
    monkeypatch.setattr(copying, "data_ranges", lambda fd, size: [(0, size)])
    with pytest.raises(OSError, match="ends early"):
        copied(what, tmp_path / "copy", [])


@pytest.mark.parametrize("files", [{}, {"disk": {}}, {"disk": {"size": 5}}, {"disk": {"size": 5, "sha256": "../x"}}])
def test_an_image_that_does_not_tell_what_it_is(tmp_path: Path, files: dict[str, dict[str, object]]) -> None:
    image = an_image(tmp_path)._replace(disk="disk", files=files)
    with pytest.raises(VTorqueError, match="does not tell size and SHA-256 of disk; build") as caught:
        copying.original(image, "disk")
    assert caught.value.code is Code.IMAGE


# ramdisks


def test_memory_that_is_available() -> None:
    text = "MemTotal:       24683520 kB\nMemFree:          100 kB\nMemAvailable:   23675000 kB\nBuffers: 1 kB\n"
    assert available_bytes(text) == 23675000 * 1024
    assert available_bytes("MemTotal: 5 kB\n") == 0
    assert available_bytes(Path("/proc/meminfo").read_text()) > 0


def test_a_ramdisk_has_room_for_full_overlays() -> None:
    assert ramdisk_bytes(600 * MIB, 8192 * MIB, 2) == (600 + 2 * (8192 + 2 + 1) + 1) * MIB


# the cache

HELD = st.lists(
    st.builds(Held, st.sampled_from([*KEYS, *(f".{key}.tmp" for key in KEYS)]), st.integers(0, 100), st.integers(0, 9)),
    unique_by=lambda held: held.name,
)


@given(HELD, st.integers(0, 300), st.integers(0, 500), st.sets(st.sampled_from(KEYS)))
def test_what_goes_from_the_cache(held: list[Held], needed: int, bound: int, in_use: set[str]) -> None:
    going = choose_evicted(held, needed, bound, in_use)
    may_go = {each.name: each for each in held if each.name in set(KEYS) - in_use}
    total = sum(each.size for each in held)
    if going is None:
        assert total - sum(each.size for each in may_go.values()) + needed > bound
        return
    assert set(going) <= set(may_go) and len(set(going)) == len(going)
    left = [each for each in held if each.name not in going]
    assert sum(each.size for each in left) + needed <= bound
    newest = max((may_go[name].used_ns for name in going), default=-1)
    assert all(each.used_ns >= newest for each in left if each.name in may_go), "used later than all that go"
    if going:
        assert total - sum(may_go[name].size for name in going[:-1]) + needed > bound, "no more than needed"


def test_an_unfinished_copy_is_left_to_who_is_at_it(tmp_path: Path) -> None:
    import fcntl

    path, lock = tmp_path / "cache.tmp", tmp_path / "run" / "x.lock"
    step = {"do": "filling", "path": str(path), "lock": str(lock)}
    remove_unfinished(step)
    assert not lock.parent.exists(), "nothing to do"
    path.write_text("half")
    remove_unfinished(step)
    assert not path.exists()
    path.write_text("half")
    with lock.open("w") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        remove_unfinished(step)
        assert path.exists()
    remove_unfinished(step)
    assert not path.exists()
