"""Images of kind "apt": Debian, downloaded by the host's apt and installed by mmdebstrap without a network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Callable

from vmgr.images import apt
from vmgr.images.disk import finish_disk
from vmgr.images.layers import inside
from vmgr.images.recipe import Recipe
from vmgr.images.sandbox import run

_MIRROR_HOOK = "/usr/share/mmdebstrap/hooks/file-mirror-automount"


class DebianMaker:
    """Makes the files of an image; `work` is a folder for scratch."""

    def __init__(self, recipe: Recipe, work: Path, log: Path, progress: Callable[[str], None]) -> None:
        self._recipe, self._work, self._log, self._progress = recipe, work, log, progress
        self._system = apt.System(recipe.suite, recipe.arch, work / "apt")
        self._packages: list[apt.Package] = []

    def packages(self) -> Sequence[apt.Package]:
        """Every package that would be installed now."""
        wanted = (self._recipe.kernel, *self._recipe.packages)
        self._packages = self._system.closure(wanted, self._progress)
        return self._packages

    def make(self, out: Path) -> dict[str, Any]:
        """Install the packages that `packages` has found, and make the image's files in `out`."""
        recipe, work = self._recipe, self._work
        root = work / "root"
        self._progress(f"downloading {len(self._packages)} packages, about {recipe.download_mb} MB")
        repository = self._system.repository(self._packages)
        self._progress("installing them by mmdebstrap")
        _install(recipe, repository, self._packages, work, root, self._log)
        for left in inside(root, "/etc/apt/sources.list.d").iterdir():  # mmdebstrap's note of the repository here
            left.unlink()
        inside(root, "/etc/apt/sources.list").write_text(self._system.sources)
        listing = run(
            [
                "dpkg-query",
                f"--admindir={root}/var/lib/dpkg",
                "--showformat=${Package} ${Version} ${Architecture}\\n",
                "--show",
            ],
            cwd=work,
        )
        (out / "packages.txt").write_text("".join(f"{line}\n" for line in sorted(listing.splitlines())))
        return finish_disk(recipe, root, root, work, out, self._log, self._progress)


def _install(recipe: Recipe, repository: Path, packages: list[apt.Package], work: Path, root: Path, log: Path) -> None:
    sources = work / "mmdebstrap.list"
    sources.write_text(f"deb [trusted=yes] file:{repository} ./\n")
    run(
        [
            "mmdebstrap",
            "--mode=root",
            "--variant=apt",
            "--format=directory",
            f"--architectures={recipe.arch}",
            f"--include={','.join(package.name for package in packages)}",
            f"--hook-dir={_MIRROR_HOOK}",
            "--aptopt=Apt::Install-Recommends false",
            "--dpkgopt=force-unsafe-io",
            "--dpkgopt=force-confold",
            *[f"--dpkgopt=path-exclude={path}" for path in recipe.excluded_paths],
            # our own initial RAM disk takes the place of the one that the kernel's installation would make
            '--essential-hook=mkdir -p "$1/etc/initramfs-tools"',
            '--essential-hook=echo update_initramfs=no >"$1/etc/initramfs-tools/update-initramfs.conf"',
            recipe.suite,
            str(root),
            str(sources),
        ],
        cwd=work,
        environment={"INITRD": "No"},
        log=log,
    )
    left = root / repository.relative_to("/")  # where the hook had the repository mounted
    while left != root and left.is_dir() and not any(left.iterdir()):
        left.rmdir()
        left = left.parent
