"""Images of kind "initramfs": a kernel and an archive in memory, no disk."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Callable

from vmgr.errors import Code, VTorqueError
from vmgr.images import apt
from vmgr.images.initramfs import Archive, lean_module, module_closure, uncompressed_kernel
from vmgr.images.recipe import Recipe
from vmgr.images.sandbox import run

LOADER = "lib64/ld-linux-x86-64.so.2"
_EMPTY = (
    "/dev",
    "/etc",
    "/home",
    "/proc",
    "/root",
    "/run",
    "/sys",
    "/tmp",
    "/var/tmp",
    "/var/log",
    "/workspace",
)


def build_initramfs(
    recipe: Recipe, packages: list[apt.Package], work: Path, out: Path, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Make the files of the image in `out`; `work` is for scratch. Returns facts for image.yaml."""
    debs, root = work / "debs", work / "root"
    debs.mkdir()
    root.mkdir()
    progress(f"downloading {len(packages)} packages, about {recipe.download_mb} MB")
    archives = apt.download(packages, debs)
    progress("unpacking them")
    apt.unpack(archives, root)
    progress("writing the kernel and the initial RAM disk")
    (out / "vmlinuz").write_bytes(kernel_of(root))
    archive = Archive()
    for path in _EMPTY:
        archive.directory(path)
    for path in ("/tmp", "/var/tmp"):
        archive.directory(path, 0o1777)
    archive.directory("/root", 0o700)
    add_busybox(archive, root)
    _add_programs(archive, root, recipe.programs)
    add_modules(archive, root, recipe.modules, recipe.modules_on_demand)
    archive.tree(recipe.rootfs)
    archive.file("/etc/shadow", archive.nodes["/etc/shadow"].data, 0o600)
    (out / "initrd").write_bytes(archive.cpio())
    (out / "packages.txt").write_text("".join(f"{package}\n" for package in packages))
    return {"disk": None, "virtual_size": 0}


def kernel_of(root: Path) -> bytes:
    """The one kernel below `root`/boot, uncompressed: that spares every emulated boot three seconds."""
    kernels = sorted(root.glob("boot/vmlinuz-*"))
    if len(kernels) != 1:
        raise VTorqueError(f"expected one kernel, found {len(kernels)}", code=Code.BUILD)
    image = kernels[0].read_bytes()
    try:
        return uncompressed_kernel(image)
    except ValueError:
        return image  # of another make: QEMU starts it as it is


def add_busybox(archive: Archive, root: Path) -> None:
    """BusyBox, a link for each of its programs, and the device files that the first program needs."""
    busybox = root / "bin/busybox"
    archive.file("/bin/busybox", busybox.read_bytes(), 0o755)
    for name in run([str(busybox), "--list"], cwd=root).split():
        if name != "busybox":
            archive.link(f"/bin/{name}", "busybox")
    archive.link("/sbin/init", "../bin/busybox")
    archive.device("/dev/console", 5, 1)
    archive.device("/dev/null", 1, 3, 0o666)


def add_modules(archive: Archive, root: Path, modules: Iterable[str], on_demand: Iterable[str] = ()) -> None:
    """The modules and what they need below /lib/modules, in loading order in the files load and demand."""
    (release,) = (root / "lib/modules").iterdir()
    try:
        load = module_closure(release, modules)
        demand = [path for path in module_closure(release, on_demand) if path not in load]
    except KeyError as err:
        raise VTorqueError(f"the kernel has no module {err.args[0]}", code=Code.BUILD) from None
    for listed, paths in (("load", load), ("demand", demand)):
        names = []
        for path in paths:
            names.append(f"/lib/modules/{path.name}\n")
            archive.file(f"/lib/modules/{path.name}", lean_module(path.read_bytes()))
        archive.file(f"/lib/modules/{listed}", "".join(names).encode())


def _add_programs(archive: Archive, root: Path, programs: Iterable[str]) -> None:
    libraries: set[str] = {"/" + LOADER}
    for program in programs:
        path = root / program.lstrip("/")
        archive.file(program, path.read_bytes(), 0o755)
        libraries |= _libraries(root, path)
    for library in sorted(libraries):
        archive.file(library, (root / library.lstrip("/")).read_bytes(), 0o755)


def _libraries(root: Path, program: Path) -> set[str]:
    """The libraries that the packages' own loader finds for `program`, as paths inside the image."""
    places = ":".join(str(root / place / "x86_64-linux-gnu") for place in ("lib", "usr/lib"))
    listing = run([str(root / LOADER), "--library-path", places, "--list", str(program)], cwd=root)
    found = set()
    for line in listing.splitlines():
        name, arrow, place = line.strip().partition(" => ")
        if arrow and place.startswith("not found"):
            raise VTorqueError(f"{program.name} needs {name}", code=Code.BUILD, hint="add its package to the recipe")
        if arrow and not name.startswith("/"):
            path = Path(place.split(" (")[0])
            if root not in path.parents:
                raise VTorqueError(f"{name} is not in the recipe's packages", code=Code.BUILD)
            found.add("/" + path.relative_to(root).as_posix())
    return found
