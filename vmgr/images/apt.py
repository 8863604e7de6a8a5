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

_INSTALL = re.compile(r"^Inst ([^ :]+)(?::\S+)? \((\S+) .*\[([a-z0-9-]+)\]\)", re.MULTILINE)
_NOTHING_INSTALLED = "--option=Dir::State::Status=/dev/null"
"""What the host has installed is no candidate for an image."""
_OF_EVERY_SYSTEM = ("?essential", "?priority(required)", "apt")


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
    run(["apt-get", "--quiet", "update"], cwd=Path("/"), network=True)
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
        return run(["apt-cache", _NOTHING_INSTALLED, "show", "--no-all-versions", *names], cwd=Path("/"))
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
        _NOTHING_INSTALLED,
        "--option=APT::Sandbox::User=root",
        "download",
        *[f"{package.name}={package.version}" for package in packages],
    ]  # fmt: skip
    try:
        run(command, cwd=directory, network=True)
    except VTorqueError:
        update()
        run(command, cwd=directory, network=True)
    return sorted(directory.glob("*.deb"))


def unpack(archives: Iterable[Path], root: Path) -> None:
    """Unpack packages below `root` without running their scripts."""
    script = 'for archive; do dpkg-deb --extract "$archive" . || exit; done'
    run(["sh", "-c", script, "sh", *map(str, archives)], cwd=root)


class System:
    """A whole Debian system that is to be installed: which packages it consists of, and a repository of just these.

    Its state lies in the folder `state`, so nothing of the host's own packages and preferences counts; package lists
    are the host's. Other repositories than Debian's that the host may have are left out.
    """

    def __init__(self, suite: str, arch: str, state: Path) -> None:
        self.sources = debian_sources(suite)
        self._state = state
        self._debs = state / "debs"
        (self._debs / "partial").mkdir(parents=True)
        (state / "sources.list").write_text(self.sources)
        self._options = [
            f"--option=Dir::Etc::SourceList={state}/sources.list",
            "--option=Dir::Etc::SourceParts=/dev/null",
            "--option=Dir::Etc::Preferences=/dev/null",
            "--option=Dir::Etc::PreferencesParts=/dev/null",
            _NOTHING_INSTALLED,
            f"--option=Dir::Cache::Archives={self._debs}",
            "--option=Dir::Cache::PkgCache=",
            "--option=Dir::Cache::SrcPkgCache=",
            f"--option=APT::Architecture={arch}",
            f"--option=APT::Architectures={arch}",
            "--option=APT::Sandbox::User=root",
            "--option=APT::Get::AllowUnauthenticated=false",
        ]

    def closure(self, names: Iterable[str], progress: Callable[[str], None]) -> list[Package]:
        """Every package of a minimal system with the packages `names`, their dependencies included, sorted.

        Raises VTorqueError (VT-BUILD) with what apt says when it cannot be installed.
        """
        command = ["install", "--simulate", "--no-install-recommends", *_OF_EVERY_SYSTEM, *sorted(set(names))]
        try:
            said = self._apt_get(command)
        except VTorqueError:
            progress("reading the package lists (apt-get update)")
            update()
            said = self._apt_get(command)
        return sorted(Package(*found) for found in _INSTALL.findall(said))

    def repository(self, packages: Sequence[Package]) -> Path:
        """A folder with these packages, as a repository: its index has the sums that Debian has signed."""
        wanted = [f"{package.name}={package.version}" for package in packages]
        self._apt_get(["install", "--download-only", "--no-install-recommends", "--yes", *wanted], network=True)
        shown = run(["apt-cache", *self._options, "show", *wanted], cwd=self._state)
        files = {(path.name.split("_")[0], path.name.split("_")[1]): path for path in self._debs.glob("*.deb")}
        index = []
        for number, paragraph in enumerate(shown.strip().split("\n\n")):
            fields = dict(re.findall(r"^(Package|Version): (.*)$", paragraph, flags=re.MULTILINE))
            archive = files[fields["Package"], fields["Version"].replace(":", "%3a")]
            plain = archive.rename(self._debs / f"{number}.deb")
            index.append(re.sub(r"^Filename: .*$", f"Filename: ./{plain.name}", paragraph, flags=re.MULTILINE))
        (self._debs / "Packages").write_text("\n\n".join(index) + "\n")
        return self._debs

    def _apt_get(self, command: Sequence[str], *, network: bool = False) -> str:
        return run(["apt-get", "--quiet", *self._options, *command], cwd=self._state, network=network)


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
