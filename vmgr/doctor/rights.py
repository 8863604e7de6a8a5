"""Whether everything that root runs, or reads in its work, belongs to root and can be written by nobody else."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Optional

from vmgr.doctor.finding import Finding, Level, Node, finder
from vmgr.errors import Code, VTorqueError
from vmgr.trust import check_trusted

MAX_NAMED = 5
"""So many files of one place are named."""

_find = finder("rights")


class Place(NamedTuple):
    """A file or folder that root uses, with all below it where `deep`. `optional`: it need not be there."""

    name: str
    path: Path
    deep: bool = False
    optional: bool = False


def places(node: Node) -> list[Place]:
    """What root uses on a node."""
    config, install = node.config, node.install
    found = [
        Place("installation", install.root, deep=True),
        Place("images.pool", config.images.pool, deep=True, optional=True),
        Place("paths.spool", config.paths.spool, optional=True),
        Place("images.overlays", config.images.overlays, optional=True),
        Place("paths.run", config.paths.run, optional=True),
        Place("hypervisor.qemu", Path(config.hypervisor.qemu), optional=True),
    ]
    if any(mount.kind == "virtiofs" for mount in config.mounts):
        found.append(Place("hypervisor.virtiofsd", Path(config.hypervisor.virtiofsd), optional=True))
    if config.vm_hooks is not None:
        found.append(Place("guest.vm_hooks", config.vm_hooks, deep=True))
    if config.images.cache.folder is not None:
        found.append(Place("images.cache.folder", config.images.cache.folder, deep=True, optional=True))
    if config.network.bridge.command is not None:
        found.append(Place("network.bridge.command", Path(config.network.bridge.command)))
    program = shutil.which("qemu-img")
    return [*found, Place("qemu-img", Path(program))] if program else found


def check(node: Node) -> Iterator[Finding]:
    sound = []
    for place in places(node):
        if place.optional and not os.path.lexists(place.path):
            continue
        wrong = list(judge(place))
        yield from wrong
        if not wrong:
            sound.append(place.name)
    if sound:
        yield _find(Level.OK, f"only root can write: {', '.join(sound)}")


def judge(place: Place) -> Iterator[Finding]:
    """What is wrong with a place, and with what leads to it; of what lies in it the first few."""
    try:
        check_trusted(place.path)
    except VTorqueError as err:
        level = Level.FAILURE if err.code is Code.TRUST else Level.WARNING
        yield _find(level, f"{place.name}: {err.message}", err.hint or "make it, or change the configuration")
        return
    if not place.deep:
        return
    wrong = (Wrong(path, text) for path, text in _below(place.path))
    for count, each in enumerate(wrong):
        if count == MAX_NAMED:
            yield _find(
                Level.FAILURE, f"{place.name}: more such files in {place.path}",
                f"chown -R root {place.path}; chmod -R go-w {place.path}",
            )  # fmt: skip
            return
        yield _find(Level.FAILURE, f"{place.name}: {each.path} {each.text}", f"chown root, chmod go-w {each.path}")


class Wrong(NamedTuple):
    path: str
    text: str


def _below(folder: Path) -> Iterator[Wrong]:
    """Everything below a folder that somebody else than root could change. Links are not followed."""
    left = [os.fspath(folder)]
    while left:
        try:
            entries = os.scandir(left.pop())
        except OSError:
            continue  # a file, or one that has gone
        with entries:
            for entry in entries:
                try:
                    info = entry.stat(follow_symlinks=False)
                except OSError:
                    continue
                text = wrong_with(info.st_mode, info.st_uid)
                if text is not None:
                    yield Wrong(entry.path, text)
                elif stat.S_ISDIR(info.st_mode):
                    left.append(entry.path)


def wrong_with(mode: int, uid: int) -> Optional[str]:
    """What is wrong with a file of this mode and owner; None when only root can change it."""
    if uid != 0:
        return f"belongs to uid {uid}"
    if not stat.S_ISLNK(mode) and mode & 0o022 and not (stat.S_ISDIR(mode) and mode & stat.S_ISVTX):
        return f"is writable by others (mode {stat.S_IMODE(mode):04o})"
    return None
