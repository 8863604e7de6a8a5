"""Images of kind "initramfs": a kernel and an archive in memory, no disk."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Callable

from vmgr.errors import Code, VTorqueError
from vmgr.images import apt
from vmgr.images.initramfs import (
    Archive,
    lean_module,
    module_bytes,
    module_closure,
    module_name,
    uncompressed_kernel,
)
from vmgr.images.layers import apply_layers, inside
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


class InitramfsMaker:
    """Makes the files of an image; `work` is a folder for scratch."""

    def __init__(self, recipe: Recipe, work: Path, log: Path, progress: Callable[[str], None]) -> None:
        self._recipe, self._work, self._log, self._progress = recipe, work, log, progress
        self._packages: list[apt.Package] = []

    def packages(self) -> Sequence[apt.Package]:
        """The recipe's packages as apt knows them now; what they depend on the recipe names too, where it is needed."""
        kernel = apt.resolve_kernel(self._recipe.kernel, self._progress)
        self._packages = apt.candidates([kernel, *self._recipe.packages], self._progress)
        return self._packages

    def make(self, out: Path) -> dict[str, Any]:
        """Unpack the packages that `packages` has found, and make the image's files in `out`."""
        recipe, work = self._recipe, self._work
        debs, root, tree = work / "debs", work / "root", work / "tree"
        for folder in (debs, root, tree):
            folder.mkdir()
        self._progress(f"downloading {len(self._packages)} packages, about {recipe.download_mb} MB")
        archives = apt.download(self._packages, debs)
        self._progress("unpacking them")
        apt.unpack(archives, root)
        archive = Archive()
        for path in _EMPTY:
            archive.directory(path)
        for path in ("/tmp", "/var/tmp"):
            archive.directory(path, 0o1777)
        archive.directory("/root", 0o700)
        add_busybox(archive, root)
        _add_programs(archive, root, recipe.programs)
        add_modules(archive, root, recipe.modules, recipe.modules_on_demand)
        archive.write_to(tree)
        apply_layers(recipe.layers, tree, self._log, self._progress)
        self._progress("writing the kernel and the initial RAM disk")
        (out / "vmlinuz").write_bytes(kernel_of(root))
        (out / "initrd").write_bytes(Archive.read_from(tree).cpio())
        (out / "packages.txt").write_text("".join(f"{package}\n" for package in self._packages))
        return {"disk": None, "virtual_size": 0}


def kernel_file(root: Path) -> Path:
    """The one kernel below `root`, in Debian's place or in that of distributions with RPM packages."""
    kernels = sorted(root.glob("lib/modules/*/vmlinuz")) or sorted(root.glob("boot/vmlinuz-*"))
    if len(kernels) != 1:
        raise VTorqueError(f"expected one kernel in the image, found {len(kernels)}", code=Code.BUILD)
    kernel = inside(root, f"/{kernels[0].relative_to(root).as_posix()}")  # a link of the image's leads nowhere else
    if not kernel.is_file():
        raise VTorqueError(f"the image's kernel {kernels[0].name} is no file in it", code=Code.BUILD)
    return kernel


def kernel_of(root: Path) -> bytes:
    """The one kernel below `root`/boot, uncompressed: that spares every emulated boot three seconds."""
    image = kernel_file(root).read_bytes()
    try:
        return uncompressed_kernel(image)
    except ValueError:
        return image  # of another make: QEMU starts it as it is


def add_busybox(archive: Archive, root: Path) -> None:
    """BusyBox, a link for each of its programs, and the device files that the first program needs."""
    busybox = _of_a_package(root, "/bin/busybox")
    archive.file("/bin/busybox", busybox.read_bytes(), 0o755)
    for name in run([f"/{busybox.relative_to(root).as_posix()}", "--list"], cwd=root, root=root).split():
        if name != "busybox":
            archive.link(f"/bin/{name}", "busybox")
    archive.link("/sbin/init", "../bin/busybox")
    archive.device("/dev/console", 5, 1)
    archive.device("/dev/null", 1, 3, 0o666)


def add_modules(archive: Archive, root: Path, modules: Iterable[str], on_demand: Iterable[str] = ()) -> None:
    """The modules and what they need below /lib/modules, in loading order in the files load and demand."""
    release = _modules_folder(root)
    try:
        load = module_closure(release, modules)
        demand = [path for path in module_closure(release, on_demand) if path not in load]
    except KeyError as err:
        raise VTorqueError(f"the kernel has no module {err.args[0]}", code=Code.BUILD) from None
    for listed, paths in (("load", load), ("demand", demand)):
        names = []
        for path in paths:
            inside = f"/lib/modules/{module_name(path)}.ko"
            names.append(f"{inside}\n")
            archive.file(inside, lean_module(module_bytes(path)))
        archive.file(f"/lib/modules/{listed}", "".join(names).encode())


def _modules_folder(root: Path) -> Path:
    folders = sorted((root / "lib/modules").glob("*"))
    if len(folders) != 1:
        raise VTorqueError(f"expected the modules of one kernel in the image, found {len(folders)}", code=Code.BUILD)
    return folders[0]


def _add_programs(archive: Archive, root: Path, programs: Iterable[str]) -> None:
    libraries: set[str] = set()
    for program in programs:
        path = _of_a_package(root, program)
        archive.file(program, path.read_bytes(), 0o755)
        libraries |= {"/" + LOADER} | _libraries(root, path)
    for library in sorted(libraries):
        archive.file(library, _of_a_package(root, library).read_bytes(), 0o755)


def _of_a_package(root: Path, path: str) -> Path:
    """The image's `path` below `root`. Raises VTorqueError (VT-BUILD) where none of the packages has it."""
    place = inside(root, path)
    if not place.is_file():
        raise VTorqueError(f"no package of the recipe has {path}", code=Code.BUILD, hint="add one that has it")
    return place


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
