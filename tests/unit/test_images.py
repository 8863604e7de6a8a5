"""The image pool and the initramfs writer; the guest's scripts as far as they run on any machine."""

from __future__ import annotations

import gzip
import json
import lzma
import os
import pwd
import shutil
import stat
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from interrupting import Told, first_told, then_told

from vmgr.errors import Code, VTorqueError
from vmgr.images import initramfs
from vmgr.images.disk import boot_record
from vmgr.images.initramfs import Archive
from vmgr.images.pool import Image, Pool, describe, split_reference

REPOSITORY = Path(__file__).resolve().parents[2]
GUEST = REPOSITORY / "templates" / "guest" / "common"
FACTS: dict[str, Any] = {
    "family": "micro",
    "distro": "SLG",
    "arch": "x86_64",
    "description": "for a test",
    "disk": None,
    "disk_format": "qcow2",
    "virtual_size": 0,
    "kernel": "vmlinuz",
    "initrd": "initrd",
    "cmdline": "quiet",
    "min_ram_mib": 64,
    "features": ["9p"],
    "packages": "packages.txt",
    "recipe_hash": "abc",
}


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    return Pool(tmp_path / "pool")


@pytest.mark.parametrize("place", ["/proc/no-such-folder", "link"])
def test_a_pool_that_cannot_be_made_is_refused_at_once(place: str, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(VTorqueError, match="cannot write the pool"), Pool(tmp_path / place).staging("tiny"):
        pass


def publish(pool: Pool, name: str = "tiny", **facts: Any) -> Image:
    with pool.staging(name) as work:
        out = work / "out"
        out.mkdir()
        for file in ("vmlinuz", "initrd", "packages.txt"):
            (out / file).write_text(file)
        return pool.publish(out, name, {**FACTS, **facts})


# --- pool ---


def test_empty_pool(pool: Pool) -> None:
    assert pool.names() == []
    with pytest.raises(VTorqueError, match=r"unknown image 'micro'.*vmgr image build") as caught:
        pool.get("micro")
    assert caught.value.code is Code.IMAGE


def test_published_image_comes_back_read_only(pool: Pool) -> None:
    image = publish(pool)
    assert image == pool.get("tiny")
    assert (image.name, image.revision, image.features) == ("tiny", 1, ("9p",))
    assert image.path("kernel") == pool.path / "tiny" / "1" / "vmlinuz"
    assert image.path("kernel").read_text() == "vmlinuz"
    assert stat.S_IMODE(image.directory.stat().st_mode) == 0o755
    for path in image.directory.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == (0o600 if path.name == ".hold" else 0o444)
        assert path.stat().st_uid == os.geteuid()
    assert set(image.files) == {"vmlinuz", "initrd", "packages.txt"}
    assert image.size == sum(path.stat().st_size for path in image.directory.iterdir() if path.name in image.files)
    told = json.loads(json.dumps(describe(image)))
    assert (told["revision"], told["added"], told["directory"]) == (1, image.created, image.folder)


def test_part_that_is_not_there(pool: Pool) -> None:
    with pytest.raises(VTorqueError, match="has no disk"):
        publish(pool).path("disk")


def test_newest_revision_is_the_default(pool: Pool) -> None:
    for _ in range(11):
        publish(pool)
    publish(pool, "other")
    assert pool.names() == ["other", "tiny"]
    assert pool.get("tiny").revision == 11
    assert pool.get("tiny", 2).revision == 2
    with pytest.raises(VTorqueError, match="no revision 12; revisions: 1, 2, 3"):
        pool.get("tiny", 12)


def test_unknown_image_names_those_that_are_there(pool: Pool) -> None:
    publish(pool)
    with pytest.raises(VTorqueError, match=r"VT-IMAGE: unknown image 'tin' .*; images: tiny"):
        pool.get("tin")


@pytest.mark.parametrize("name", ["../tiny", "", "Tiny", ".tmp-x", "a/b", "a" * 65])
def test_illegal_names(pool: Pool, name: str) -> None:
    publish(pool)
    with pytest.raises(VTorqueError, match="unknown image"):
        pool.get(name)
    with pytest.raises(VTorqueError, match="illegal image name"), pool.staging(name):
        pass


@pytest.mark.parametrize("content", ["", "[]", "{}", json.dumps({**FACTS, "version": 1})])
def test_broken_sidecar(pool: Pool, content: str) -> None:
    sidecar = publish(pool).directory / "image.yaml"
    sidecar.chmod(0o644)
    sidecar.write_text(content)
    with pytest.raises(VTorqueError, match=r"image\.yaml"):
        pool.get("tiny")


def test_sidecar_that_names_a_file_elsewhere(pool: Pool) -> None:
    with pytest.raises(VTorqueError, match="outside of its image"):
        publish(pool, kernel="../../vmlinuz")
    assert pool.names() == []


@pytest.mark.root
def test_root_trusts_no_image_that_others_can_write(pool: Pool) -> None:
    image = publish(pool)
    image.path("kernel").chmod(0o666)
    with pytest.raises(VTorqueError) as caught:
        pool.get("tiny")
    assert caught.value.code is Code.TRUST


def test_failed_work_leaves_nothing(pool: Pool) -> None:
    with pytest.raises(RuntimeError), pool.staging("tiny") as work:
        (work / "half").write_text("x")
        raise RuntimeError
    assert list(pool.path.iterdir()) == []


@pytest.mark.usefixtures("told")
def test_work_that_is_ended_while_it_begins_leaves_nothing(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "mkdtemp", then_told(tempfile.mkdtemp))
    with pytest.raises(Told), pool.staging("tiny"):
        pass
    assert list(pool.path.iterdir()) == []


@pytest.mark.usefixtures("told")
@pytest.mark.parametrize("moment", ["rmtree", "unlink", "rmdir"])
def test_work_that_is_ended_while_it_is_taken_away_leaves_nothing(
    moment: str, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What failed or was interrupted before, or has been published."""
    with pytest.raises(Told), pool.staging("tiny") as work:
        (work / "x").touch()
        place = shutil if moment == "rmtree" else Path
        monkeypatch.setattr(place, moment, first_told(getattr(place, moment)))
    assert list(pool.path.iterdir()) == []


def test_next_build_sweeps_what_a_killed_one_left(pool: Pool) -> None:
    hold = (
        "import sys, pathlib; from vmgr.images.pool import Pool\n"
        "with Pool(pathlib.Path(sys.argv[1])).staging('tiny') as work:\n"
        "    (work / 'half').write_text('x'); print('in', flush=True); sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", hold, str(pool.path)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as builder:
        assert builder.stdout is not None
        assert builder.stdout.readline() == "in\n"
        builder.kill()
    assert len(list((pool.path / "tiny").glob(".tmp-*"))) == 1
    publish(pool)
    assert sorted(path.name for path in (pool.path / "tiny").iterdir()) == [".lock", "1"]


def test_second_build_waits_for_the_first(pool: Pool) -> None:
    said: list[str] = []
    code = (
        "import sys, pathlib; from vmgr.images.pool import Pool\n"
        "with Pool(pathlib.Path(sys.argv[1])).staging('tiny', lambda s: print(s, flush=True)): print('in')\n"
    )
    with pool.staging("tiny", said.append):
        second = subprocess.Popen(
            [sys.executable, "-c", code, str(pool.path)], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
        )
        assert second.stdout is not None
        assert "waiting" in second.stdout.readline()
    assert second.communicate(timeout=20)[0] == "in\n"
    assert said == []


def test_pool_is_light_to_import() -> None:
    """vsub imports it on every submission."""
    code = "import sys, vmgr.images.pool; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert not {"yaml", "jinja2", "paramiko", "subprocess", "click"} & set(done.stdout.split())


def test_the_description_is_yaml_too(pool: Pool) -> None:
    facts = {"description": "caf\u00e9 \U0001f600: 'a' \"b\" #", "parent": "base@2"}
    image = publish(pool, **facts)
    text = (image.directory / "image.yaml").read_text(encoding="utf-8")
    assert yaml.safe_load(text) == json.loads(text)
    assert (image.description, image.parent) == tuple(facts.values()) and image.added_by


def test_a_revision_is_named_with_the_image(pool: Pool) -> None:
    publish(pool)
    publish(pool)
    assert (pool.get("tiny").reference, pool.get("tiny@1").reference) == ("tiny@2", "tiny@1")
    for text in ("tiny@", "tiny@0", "tiny@01", "tiny@x", "tiny@1@1", "@1", "tiny@-1"):
        with pytest.raises(VTorqueError, match="unknown image"):
            pool.get(text)
        with pytest.raises(VTorqueError, match="names no image"):
            split_reference(text)


@pytest.mark.parametrize(("field", "value"), [("parent", "base"), ("parent", 3), ("added_by", 1), ("features", "9p")])
def test_a_wrong_field_does_not_get_in(pool: Pool, field: str, value: object) -> None:
    with pytest.raises(VTorqueError, match=f"{field} cannot be"):
        publish(pool, **{field: value})
    assert list(pool.path.iterdir()) == []


def test_everybody_can_read_the_pool_whatever_the_umask(pool: Pool) -> None:
    mask = os.umask(0o077)
    try:
        image = publish(pool)
    finally:
        os.umask(mask)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (pool.path, image.directory.parent, image.directory)} == {
        0o755
    }


@pytest.mark.root
def test_who_added_it_is_who_became_root(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    nobody = pwd.getpwnam("nobody")
    monkeypatch.setenv("SUDO_UID", str(nobody.pw_uid))
    assert publish(pool).added_by == "nobody"
    for value in ("", "x", "4294967295", "99999999999999"):
        monkeypatch.setenv("SUDO_UID", value)
        assert publish(pool).added_by not in ("", "nobody")


# --- initramfs ---


def test_archive_is_what_cpio_reads(tmp_path: Path) -> None:
    archive = Archive()
    archive.file("/usr/bin/tool", b"#!/bin/sh\n", 0o755)
    archive.link("/bin", "usr/bin")
    archive.directory("/tmp", 0o1777)
    data = archive.cpio()
    assert data == archive.cpio()
    assert len(data) % 512 == 0
    names = [name for name, _ in entries(data)]
    assert names == ["bin", "tmp", "usr", "usr/bin", "usr/bin/tool", "TRAILER!!!"]
    modes = dict(entries(data))
    assert (modes["usr/bin/tool"], modes["tmp"], modes["bin"]) == (0o100755, 0o41777, 0o120777)


def entries(data: bytes) -> list[tuple[str, int]]:
    """Names and modes in a newc archive, read independently of the writer."""
    found, at = [], 0
    while not found or found[-1][0] != "TRAILER!!!":
        fields = [int(data[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        start = at + 110
        found.append((data[start : start + fields[11] - 1].decode(), fields[1]))
        at = start + fields[11]
        at += -at % 4 + fields[6]
        at += -at % 4
    return found


def make_module(directory: Path, name: str, *depends: str) -> None:
    (directory / f"{name}.ko").write_bytes(b"\x7fELF\0license=GPL\0depends=" + ",".join(depends).encode() + b"\0x\0")


@pytest.mark.root
def test_archive_goes_through_a_folder_and_back(tmp_path: Path) -> None:
    archive = Archive()
    archive.file("/etc/mine", b"text", 0o640)
    archive.nodes["/etc/mine"] = replace(archive.nodes["/etc/mine"], uid=7, gid=8)
    archive.link("/bin/sh", "busybox")
    archive.device("/dev/null", 1, 3, 0o666)
    archive.directory("/tmp", 0o1777)
    archive.write_to(tmp_path)
    assert Archive.read_from(tmp_path).cpio() == archive.cpio()
    assert archive.cpio()[:110].startswith(b"070701")


@pytest.mark.parametrize(("ending", "pack"), [("", bytes), (".xz", lzma.compress), (".gz", gzip.compress)])
def test_packed_modules(tmp_path: Path, ending: str, pack: Callable[[bytes], bytes]) -> None:
    (tmp_path / f"virtio.ko{ending}").write_bytes(pack(b"\x7fELF\0depends=\0"))
    (tmp_path / f"virtio-net.ko{ending}").write_bytes(pack(b"\x7fELF\0depends=virtio\0"))
    (tmp_path / "virtio.ko.txt").write_text("none")
    found = initramfs.module_closure(tmp_path, ["virtio_net"])
    assert [initramfs.module_name(path) for path in found] == ["virtio", "virtio-net"]
    assert initramfs.module_bytes(found[0]).startswith(b"\x7fELF")


def test_modules_come_after_what_they_need(tmp_path: Path) -> None:
    make_module(tmp_path, "virtio_net", "net_failover", "virtio")
    make_module(tmp_path, "net_failover", "failover")
    make_module(tmp_path, "failover")
    make_module(tmp_path, "virtio-ring")
    make_module(tmp_path, "virtio", "virtio_ring")
    (tmp_path / "modules.builtin").write_text("kernel/drivers/base/regmap.ko\n")
    names = [path.stem for path in initramfs.module_closure(tmp_path, ["virtio_net", "regmap"])]
    assert names == ["failover", "net_failover", "virtio-ring", "virtio", "virtio_net"]
    with pytest.raises(KeyError, match="nosuch"):
        initramfs.module_closure(tmp_path, ["nosuch"])


@pytest.mark.parametrize("image", [b"", b"\x7fELF" + bytes(1000), bytes(0x202) + b"HdrS" + bytes(1000)])
def test_kernels_that_cannot_be_unwrapped(image: bytes) -> None:
    with pytest.raises(ValueError):
        initramfs.uncompressed_kernel(image)


# --- building ---


def test_boot_record() -> None:
    record = boot_record(b"\xeb\x10code", 0x11223344, 8192)
    assert len(record) == 512
    assert record[440:444] == bytes.fromhex("44332211")
    assert record[510:] == b"\x55\xaa"
    boot, root = (struct.unpack("<B3xB3xII", record[446 + 16 * n : 462 + 16 * n]) for n in (0, 1))
    assert boot == (0x80, 0x0C, 2048, 63 * 2048)
    assert root == (0, 0x83, 64 * 2048, (8192 - 64) * 2048)


# --- guest scripts ---


@pytest.mark.parametrize("shell", ["dash", "busybox sh"])
def test_account_lines_take_precedence(tmp_path: Path, shell: str) -> None:
    """`prepend` of the guest program, run by both shells on a file that already has the name."""
    program = (GUEST / "guest").read_text()
    function = program[program.index("prepend() {") : program.index("write_sshd_config() {")]
    passwd = tmp_path / "passwd"
    passwd.write_text("root:x:0:0::/root:/bin/sh\nada:x:7:7::/:/bin/false\n")
    script = f"{function}\nprintf 'ada:x:500:500::/home/ada:/bin/bash\\n' | prepend {passwd}\n"
    try:
        subprocess.run([*shell.split(), "-c", script], check=True)
    except FileNotFoundError:
        pytest.skip(f"{shell} is not installed")
    assert passwd.read_text() == "ada:x:500:500::/home/ada:/bin/bash\nroot:x:0:0::/root:/bin/sh\n"


@pytest.mark.parametrize("shell", ["dash", "busybox sh"])
@pytest.mark.parametrize(
    ("user", "pattern"),
    [("ada", "ada"), (r"LAB\ada", r"LAB\ada"), ("ada@lab@x", "ada?lab?x"), ("ada+x$", "ada+x$")],
)
def test_sshd_lets_the_user_in_whatever_the_name(tmp_path: Path, shell: str, user: str, pattern: str) -> None:
    """`USER@HOST` would be a user from there alone (sshd_config(5), ssh_config(5) on patterns)."""
    program = (GUEST / "guest").read_text()
    function = program[program.index("write_sshd_config() {") : program.index("# The key with which the user gets")]
    try:
        done = subprocess.run(
            [*shell.split(), "-uc", f"{function}\nwrite_sshd_config"],
            env={"RUN": "/run", "VT_USER": user, "PATH": os.environ["PATH"]}, cwd=tmp_path, capture_output=True,
            text=True, check=True,
        )  # fmt: skip
    except FileNotFoundError:
        pytest.skip(f"{shell} is not installed")
    assert f"\nAllowUsers {pattern}\n" in done.stdout


@pytest.mark.parametrize("script", sorted(path.name for path in GUEST.iterdir()))
@pytest.mark.parametrize("shell", ["dash", "busybox sh", "bash --posix"])
def test_guest_scripts_parse_everywhere(script: str, shell: str) -> None:
    try:
        subprocess.run([*shell.split(), "-n", str(GUEST / script)], check=True)
    except FileNotFoundError:
        pytest.skip(f"{shell} is not installed")
