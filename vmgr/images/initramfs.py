"""Initial RAM file systems written without root: a cpio archive, and kernel modules made quick to load.

The archive is the kernel's "newc" format (kernel documentation,
driver-api/early-userspace/buffer-format.rst). Times are fixed and the order is sorted, so the same files give the same
bytes.
"""

from __future__ import annotations

import os
import re
import stat
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

_SIGNATURE_MARK = b"~Module signature appended~\n"
_SIGNATURE_INFO = struct.Struct(">5B3xI")  # include/linux/module_signature.h; the last field is the length
_MODULE_FILES = (".ko", ".ko.xz", ".ko.gz")
_ELF64_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_ELF64_SECTION = struct.Struct("<IIQQQQIIQQ")


@dataclass(frozen=True)
class Node:
    """One entry of the archive: `mode` with type bits, `data` (contents or link target), device numbers, owner."""

    mode: int
    data: bytes = b""
    major: int = 0
    minor: int = 0
    uid: int = 0
    gid: int = 0


@dataclass
class Archive:
    """The files of an initramfs by absolute path; parent directories appear by themselves."""

    nodes: dict[str, Node] = field(default_factory=dict)

    def directory(self, path: str, mode: int = 0o755) -> None:
        self._add(path, Node(stat.S_IFDIR | mode))

    def file(self, path: str, data: bytes, mode: int = 0o644) -> None:
        self._add(path, Node(stat.S_IFREG | mode, data))

    def link(self, path: str, target: str) -> None:
        self._add(path, Node(stat.S_IFLNK | 0o777, target.encode()))

    def device(self, path: str, major: int, minor: int, mode: int = 0o600) -> None:
        self._add(path, Node(stat.S_IFCHR | mode, b"", major, minor))

    def tree(self, source: Path) -> None:
        """Add what lies below `source`; only the executable bit of the modes is kept."""
        for path in sorted(source.rglob("*")):
            inside = "/" + path.relative_to(source).as_posix()
            if path.is_symlink():
                self.link(inside, path.readlink().as_posix())
            elif path.is_dir():
                self.directory(inside)
            else:
                self.file(inside, path.read_bytes(), 0o755 if path.stat().st_mode & 0o100 else 0o644)

    def _add(self, path: str, node: Node) -> None:
        for parent in list(Path(path).parents)[-2::-1]:
            self.nodes.setdefault(parent.as_posix(), Node(stat.S_IFDIR | 0o755))
        self.nodes[path] = node

    def write_to(self, folder: Path) -> None:
        """Lay the entries out below the empty `folder`; needs root for devices and owners."""
        for path, node in sorted(self.nodes.items()):
            target = folder / path.lstrip("/")
            if stat.S_ISDIR(node.mode):
                target.mkdir()
            elif stat.S_ISLNK(node.mode):
                target.symlink_to(node.data.decode())
            elif stat.S_ISREG(node.mode):
                target.write_bytes(node.data)
            else:
                os.mknod(target, node.mode, os.makedev(node.major, node.minor))
            os.chown(target, node.uid, node.gid, follow_symlinks=False)
            if not stat.S_ISLNK(node.mode):
                target.chmod(stat.S_IMODE(node.mode))

    @classmethod
    def read_from(cls, folder: Path) -> Archive:
        """What lies below `folder`, with modes and owners; sockets are left out."""
        archive = cls()
        for path in sorted(folder.rglob("*")):
            info = path.lstat()
            data = b""
            if stat.S_ISLNK(info.st_mode):
                data = os.fsencode(path.readlink())
            elif stat.S_ISREG(info.st_mode):
                data = path.read_bytes()
            if not stat.S_ISSOCK(info.st_mode):
                device = (os.major(info.st_rdev), os.minor(info.st_rdev))
                inside = "/" + path.relative_to(folder).as_posix()
                archive.nodes[inside] = Node(info.st_mode, data, *device, info.st_uid, info.st_gid)
        return archive

    def cpio(self) -> bytes:
        """The archive as uncompressed newc bytes, each entry of 1970, so that the same files give the same bytes."""
        out = bytearray()
        for number, (path, node) in enumerate(sorted(self.nodes.items()), start=1):
            _append(out, number, path.lstrip("/"), node)
        _append(out, 0, "TRAILER!!!", Node(0))
        out.extend(bytes(-len(out) % 512))
        return bytes(out)


def _append(out: bytearray, number: int, name: str, node: Node) -> None:
    links = 2 if stat.S_ISDIR(node.mode) else 1
    name_bytes = name.encode() + b"\0"
    fields = (
        number,
        node.mode,
        node.uid,
        node.gid,
        links,
        0,
        len(node.data),
        0,
        0,
        node.major,
        node.minor,
        len(name_bytes),
        0,
    )
    out.extend(b"070701" + b"".join(b"%08X" % value for value in fields) + name_bytes)
    out.extend(bytes(-len(out) % 4))
    out.extend(node.data)
    out.extend(bytes(-len(out) % 4))


def module_closure(modules_dir: Path, names: Iterable[str]) -> list[Path]:
    """The files of the modules `names` and of all they need, in an order in which each can be loaded.

    `modules_dir` is …/lib/modules/<release>. Dependencies are read from the modules themselves (`depends=` in
    .modinfo), so no depmod is needed. A name that is not there is taken to be built in if modules.builtin
    lists it; else KeyError is raised with the name.
    """
    files = {
        module_name(path).replace("-", "_"): path
        for ending in _MODULE_FILES
        for path in modules_dir.rglob(f"*{ending}")
    }
    builtin = {Path(line).stem.replace("-", "_") for line in _lines(modules_dir / "modules.builtin")}
    order: dict[str, Path] = {}

    def visit(name: str) -> None:
        key = name.replace("-", "_")
        if key in order or key in builtin:
            return
        if key not in files:
            raise KeyError(name)
        for dependency in module_dependencies(module_bytes(files[key])):
            visit(dependency)
        order[key] = files[key]

    for name in names:
        visit(name)
    return list(order.values())


def module_name(path: Path) -> str:
    """The name of the module in a file: `ext4` for ext4.ko and ext4.ko.xz."""
    return path.name.partition(".ko")[0]


def module_bytes(path: Path) -> bytes:
    """A module as the kernel loads it, unpacked where the file is compressed by xz or gzip."""
    data = path.read_bytes()
    if path.suffix == ".xz":
        import lzma

        return lzma.decompress(data)
    if path.suffix == ".gz":
        import gzip

        return gzip.decompress(data)
    return data


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def module_dependencies(module: bytes) -> list[str]:
    """The module names in `depends=` of a kernel module's .modinfo."""
    found = re.search(rb"\0depends=([^\0]*)\0", module)
    return [name for name in found.group(1).decode().split(",") if name] if found else []


def lean_module(module: bytes) -> bytes:
    """`module` without what makes loading it slow under emulation: the signature and the type information.

    Loading twenty modules takes two thirds of the time without them (0.4 s in place of 0.65 s): no RSA signature is
    checked, and the kernel does not parse its own 4 MB of type information, which the first module with a .BTF
    section makes it do. The section stays where it is, with length 0, which the kernel takes as absent
    (kernel/bpf/btf.c: btf_module_notify).
    """
    if module.endswith(_SIGNATURE_MARK):
        end = len(module) - len(_SIGNATURE_MARK) - _SIGNATURE_INFO.size
        (*_, length) = _SIGNATURE_INFO.unpack_from(module, end)
        module = module[: end - length]
    lean = bytearray(module)
    header = _ELF64_HEADER.unpack_from(lean)
    offset, entry_size, count, names_index = header[6], header[11], header[12], header[13]
    names_at = _ELF64_SECTION.unpack_from(lean, offset + names_index * entry_size)[4]
    for index in range(count):
        at = offset + index * entry_size
        section = list(_ELF64_SECTION.unpack_from(lean, at))
        name_at = names_at + section[0]
        if bytes(lean[name_at : lean.index(b"\0", name_at)]) in (b".BTF", b".BTF_ids"):
            section[5] = 0
            _ELF64_SECTION.pack_into(lean, at, *section)
    return bytes(lean)


def uncompressed_kernel(image: bytes) -> bytes:
    """The ELF kernel inside an xz-compressed bzImage (Documentation/arch/x86/boot.rst: payload_offset).

    QEMU starts it through its PVH entry, which spares the guest the decompression. Raises ValueError when
    `image` is no such kernel.
    """
    import lzma

    if image[0x202:0x206] != b"HdrS":
        raise ValueError("not a bzImage")
    setup_sectors = image[0x1F1] or 4
    payload_at, length = struct.unpack_from("<II", image, 0x248)
    start = (setup_sectors + 1) * 512 + payload_at
    try:
        elf = lzma.LZMADecompressor().decompress(image[start : start + length])
    except lzma.LZMAError as error:
        raise ValueError(f"the kernel is not xz-compressed: {error}") from None
    if not elf.startswith(b"\x7fELF"):
        raise ValueError("the payload is not an ELF kernel")
    return elf
