"""Small Debian packages and a repository of them on disk: a build from them takes little time and no network."""

from __future__ import annotations

import hashlib
import struct
import subprocess
from collections.abc import Mapping
from pathlib import Path

KERNEL = "linux-image-amd64"


def a_module(*depends: str) -> bytes:
    """What passes for a kernel module: the header of an ELF file without sections, and what it depends on."""
    header = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 1, 62, 1, 0, 0, 0, 0, 64, 0, 0, 64, 0, 0)
    return header + b"\0license=GPL\0depends=" + ",".join(depends).encode() + b"\0"


def kernel_files(*, megabytes: int = 1) -> dict[str, bytes]:
    """The files of a kernel's package: the kernel, so large, and the module isofs."""
    return {"boot/vmlinuz-1": bytes(megabytes << 20), "lib/modules/1/kernel/fs/isofs.ko": a_module()}


def make_deb(folder: Path, name: str, files: Mapping[str, bytes]) -> Path:
    """A package of architecture amd64 in `folder`; every file is executable."""
    tree = folder / f"{name}.tree"
    (tree / "DEBIAN").mkdir(mode=0o755, parents=True)
    for path, data in files.items():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_bytes(data)
        (tree / path).chmod(0o755)
    (tree / "DEBIAN/control").write_text(
        f"Package: {name}\nVersion: 1\nArchitecture: amd64\nMaintainer: Nobody <nobody@example.org>\n"
        "Description: for a test\n"
    )
    archive = folder / f"{name}.deb"
    command = ["dpkg-deb", "--root-owner-group", "-Znone", "--build", str(tree), str(archive)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return archive


def index(*archives: Path) -> str:
    """The file `Packages` of a flat repository with these packages."""
    paragraphs = []
    for archive in archives:
        control = subprocess.run(["dpkg-deb", "--field", archive], check=True, capture_output=True, text=True).stdout
        sha256 = hashlib.sha256(archive.read_bytes()).hexdigest()
        place = f"Filename: ./{archive.name}\nSize: {archive.stat().st_size}\nSHA256: {sha256}\n"
        paragraphs.append(control + place)
    return "\n".join(paragraphs)


def apt_config(folder: Path, *archives: Path) -> Path:
    """An apt.conf by which apt knows these packages, which lie in `folder`, and no others."""
    (folder / "Packages").write_text(index(*archives))
    (folder / "sources.list").write_text(f"deb [trusted=yes] file:{folder} ./\n")
    (folder / "state/lists/partial").mkdir(parents=True)
    (folder / "cache/archives/partial").mkdir(parents=True)
    config = folder / "apt.conf"
    config.write_text(
        f'Dir::Etc::SourceList "{folder}/sources.list"; Dir::Etc::SourceParts "/dev/null";\n'
        f'Dir::State "{folder}/state"; Dir::State::Lists "{folder}/state/lists"; Dir::Cache "{folder}/cache";\n'
        'APT::Sandbox::User "root"; APT::Architecture "amd64";\n'
    )
    return config
