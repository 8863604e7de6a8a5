"""Debian packages for image builds, from wherever the host's apt gets its own."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Callable

from vmgr.errors import Code, VTorqueError
from vmgr.images.sandbox import run


@dataclass(frozen=True, order=True)
class Package:
    """One package as apt would install it now."""

    name: str
    version: str
    arch: str

    def __str__(self) -> str:
        return f"{self.name} {self.version} {self.arch}"


def candidates(names: Iterable[str], progress: Callable[[str], None]) -> list[Package]:
    """The candidate version of each package of `names`, sorted; reads the package lists first if there are
    none.

    Raises VTorqueError (VT-BUILD) naming what apt does not know.
    """
    wanted = sorted(set(names))
    found = _shown(wanted)
    if any(name not in found for name in wanted):
        progress("reading the package lists (apt-get update)")
        update()
        found = _shown(wanted)
    missing = [name for name in wanted if name not in found]
    if missing:
        raise VTorqueError(
            f"apt knows no package {', '.join(missing)}",
            code=Code.BUILD,
            hint="the recipe is for another Debian release than this host's sources",
        )
    return sorted(found.values())


def update() -> None:
    """Read the package lists anew."""
    run(["apt-get", "--quiet", "update"], cwd=Path("/"))
    _show.cache_clear()


def _shown(names: Sequence[str]) -> dict[str, Package]:
    found = {}
    for paragraph in _show(tuple(names)).split("\n\n"):
        fields = dict(re.findall(r"^(Package|Version|Architecture): (.*)$", paragraph, flags=re.MULTILINE))
        if len(fields) == 3:
            found[fields["Package"]] = Package(fields["Package"], fields["Version"], fields["Architecture"])
    return found


@cache
def _show(names: tuple[str, ...]) -> str:
    """What apt knows of packages, empty when it does not know one of them. Asked once: each time costs apt a second."""
    try:
        return run(["apt-cache", "show", "--no-all-versions", *names], cwd=Path("/"))
    except VTorqueError:
        return ""


def resolve_kernel(name: str, progress: Callable[[str], None]) -> str:
    """The real package behind a kernel's meta-package such as linux-image-amd64, or `name` if it is real."""
    candidates([name], progress)
    depends = re.search(r"^Depends: (linux-image-[0-9][^ ,]*)", _show((name,)), flags=re.MULTILINE)
    return depends.group(1) if depends else name


def download(packages: Iterable[Package], directory: Path) -> list[Path]:
    """Fetch the packages into `directory` and return the files, sorted; apt checks their signatures and sums.

    Package lists that have grown old name versions that the mirror has dropped: then they are read anew,
    once.
    """
    command = [
        "apt-get",
        "--quiet",
        "--option", "APT::Sandbox::User=root",
        "download",
        *[f"{package.name}={package.version}" for package in packages],
    ]  # fmt: skip
    try:
        run(command, cwd=directory)
    except VTorqueError:
        update()
        run(command, cwd=directory)
    return sorted(directory.glob("*.deb"))


def unpack(archives: Iterable[Path], root: Path) -> None:
    """Unpack packages below `root` without running their scripts."""
    for archive in archives:
        run(["dpkg-deb", "--extract", str(archive), str(root)], cwd=root)


def debian_sources(suite: str) -> str:
    """sources.list lines of the host's Debian sources for `suite` and its updates, security included.

    Other repositories that the host may have are left out of images. Raises VTorqueError (VT-BUILD) when the
    host has no source for that suite.
    """
    text = run(
        [
            "apt-get",
            "indextargets",
            "--format", "$(ORIGIN)|$(REPO_URI)|$(CODENAME)|$(COMPONENT)",
            "Created-By: Packages",
        ],
        cwd=Path("/"),
    )  # fmt: skip
    lines = set()
    for row in text.splitlines():
        origin, uri, codename, component = row.split("|")
        if origin == "Debian" and codename.split("-")[0] == suite and "backports" not in codename:
            lines.add(f"deb {uri} {codename} {component}\n")
    if not any(f" {suite} main" in line for line in lines):
        raise VTorqueError(
            f"this host's apt has no source for Debian's {suite}",
            code=Code.BUILD,
            hint="add one to /etc/apt/sources.list and run apt-get update",
        )
    return "".join(sorted(lines))
