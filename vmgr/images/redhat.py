"""Images of kind "dnf": a system of RPM packages, downloaded and installed by the host's dnf, without a network.

The recipe's repositories are the only ones; packages of one with a `gpgkey` must be signed with it. All state lies in
the new root, nothing of the host's counts.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Callable, NamedTuple

from vmgr.errors import Code, VTorqueError
from vmgr.images import apt
from vmgr.images.disk import finish_disk
from vmgr.images.layers import inside
from vmgr.images.recipe import Recipe, Repository
from vmgr.images.sandbox import run

_BUSYBOX = "busybox-static"
"""Debian's package whose BusyBox is in the initial RAM disk."""

_DATABASE = "/var/lib/rpm"
_NO_INITRAMFS = ("50-dracut.install", "51-dracut-rescue.install")
"""kernel-install(8): a plugin of this name in /etc/kernel/install.d that is /dev/null is left out."""

_MAIN = """\
[main]
plugins=1
cachedir=/var/cache/dnf
persistdir=/var/lib/dnf
logdir=/var/log
keepcache=1
install_weak_deps=0
tsflags=nodocs
best=1
skip_if_unavailable=0
fastestmirror=0
"""


class Rpm(NamedTuple):
    """The file name of a package, which has its name, version, release and architecture in it."""

    file: str

    def __str__(self) -> str:
        return self.file


class RedHatMaker:
    """Makes the files of an image; `work` is a folder for scratch."""

    def __init__(self, recipe: Recipe, work: Path, log: Path, progress: Callable[[str], None]) -> None:
        self._recipe, self._work, self._log, self._progress = recipe, work, log, progress
        self._root = work / "root"
        self._root.mkdir()
        self._home = work / "home"
        self._home.mkdir()
        (self._home / ".rpmmacros").write_text(f"%_dbpath {_DATABASE}\n")  # Debian's rpm has another place for it
        self._config = work / "dnf.conf"
        self._config.write_text(_MAIN + "".join(map(_repository, recipe.repositories)))
        self._busybox: list[apt.Package] = []

    def packages(self) -> Sequence[object]:
        """Every package that would be installed now, and BusyBox. Raises VTorqueError (VT-BUILD)."""
        self._busybox = apt.candidates([_BUSYBOX], self._progress)
        self._progress("asking the repositories what is to be installed")
        said = self._dnf("download", "--resolve", "--alldeps", "--urls", *self._wanted(), network=True)
        files = {line.rpartition("/")[2] for line in said.splitlines() if line.endswith(".rpm")}
        return [*sorted(map(Rpm, files)), *self._busybox]

    def make(self, out: Path) -> dict[str, Any]:
        """Install the recipe's packages, and make the image's files in `out`."""
        recipe, work, root = self._recipe, self._work, self._root
        for name in _NO_INITRAMFS:
            plugin = root / "etc/kernel/install.d" / name
            plugin.parent.mkdir(parents=True, exist_ok=True)
            plugin.symlink_to("/dev/null")
        self._progress(f"downloading packages, about {recipe.download_mb} MB")
        self._dnf("install", "--downloadonly", *self._wanted(), network=True)
        self._progress("installing them by dnf")
        self._dnf("install", "--cacheonly", *self._wanted())
        (out / "packages.txt").write_text("".join(f"{line}\n" for line in self._installed()))
        for folder in ("/var/cache/dnf", "/var/lib/dnf"):
            shutil.rmtree(inside(root, folder), ignore_errors=True)
        busybox, debs = work / "busybox", work / "debs"
        busybox.mkdir()
        debs.mkdir()
        apt.unpack(apt.download(self._busybox, debs), busybox)
        return finish_disk(recipe, root, busybox, work, out, self._log, self._progress)

    def _wanted(self) -> list[str]:
        return sorted({self._recipe.kernel, *self._recipe.packages})

    def _dnf(self, verb: str, *words: str, network: bool = False) -> str:
        return run(
            [
                "dnf",
                "--quiet",
                "--assumeyes",
                f"--config={self._config}",
                f"--installroot={self._root}",
                f"--releasever={self._recipe.release}",
                f"--setopt=reposdir={self._home}",
                f"--setopt=varsdir={self._home}",
                "--disableplugin=*",  # one of them keeps packages on the host, and takes them from there unchecked
                "--enableplugin=download",
                verb,
                *words,
            ],
            cwd=self._work,
            network=network,
            furnish=None if network else self._root,
            environment={"HOME": str(self._home)},
            log=self._log,
        )

    def _installed(self) -> list[str]:
        said = run(
            ["rpm", f"--root={self._root}", "-qa", "--queryformat", "%{NAME} %{EVR} %{ARCH}\\n"],
            cwd=self._work,
            environment={"HOME": str(self._home)},
        )
        lines = sorted(line for line in said.splitlines() if not line.startswith("gpg-pubkey "))
        if not lines:
            raise VTorqueError("dnf has installed nothing", code=Code.BUILD, hint=f"see {self._log}")
        return lines


def _repository(repository: Repository) -> str:
    check = f"gpgcheck=1\ngpgkey={repository.gpgkey}\n" if repository.gpgkey else "gpgcheck=0\n"
    return f"[{repository.name}]\nname={repository.name}\nbaseurl={repository.url}\nenabled=1\n{check}"
