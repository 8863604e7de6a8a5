"""What tests of installations share: whole pictures of folders, and moms' folders with hooks of the site's own."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parents[2]

SITE_HOOKS = {
    "prologue": 0o500,
    "prologue.parallel": 0o755,
    "epilogue": 0o744,
    "epilogue.precancel": 0o755,
    "prologue.user": 0o755,
}
"""The site's own hooks, with their modes."""
MOM_CONFIG = "# the site's\n$logevent 255\n$prologalarm 120   # enough for us\n$usecp *:/home /home\n"
LONG_AGO_NS = 1_500_000_000_123_456_789


class Seen(NamedTuple):
    """A file, link or folder as a picture has it."""

    kind: str
    mode: int
    owner: tuple[int, int]
    mtime_ns: int
    content: str


def picture(folder: Path) -> dict[str, Seen]:
    """All below a folder and itself: kind, mode, owner, time, and content of files or target of links."""
    found = {}
    for path in [folder, *sorted(folder.rglob("*"))]:
        info = path.lstat()
        content = ""
        if stat.S_ISREG(info.st_mode):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        elif stat.S_ISLNK(info.st_mode):
            content = str(path.readlink())
        kind = oct(stat.S_IFMT(info.st_mode))
        owner = (info.st_uid, info.st_gid)
        found[str(path.relative_to(folder))] = Seen(kind, stat.S_IMODE(info.st_mode), owner, info.st_mtime_ns, content)
    return found


def timeless(seen: dict[str, Seen]) -> dict[str, Seen]:
    """The same without times."""
    return {path: each._replace(mtime_ns=0) for path, each in seen.items()}


def make_home(home: Path, *, hooks: bool = True) -> None:
    """TORQUE's folder of a node as a site has it, `hooks` with hooks of the site's own; all of it long ago."""
    mom_priv = home / "mom_priv"
    (mom_priv / "jobs").mkdir(parents=True)
    (mom_priv / "config").write_text(MOM_CONFIG)
    (mom_priv / "config").chmod(0o640)
    os.chown(mom_priv / "config", 0, 4)
    if hooks:
        for name, mode in SITE_HOOKS.items():
            path = mom_priv / name
            path.write_text(f'#!/bin/sh\necho "the site\'s {name} $*"\nexit 3\n')
            path.chmod(mode)
        (mom_priv / "common").write_text("#!/bin/sh\nexit 0\n")
        (mom_priv / "common").chmod(0o755)
        (mom_priv / "epilogue.parallel").symlink_to("common")
    mom_priv.chmod(0o751)
    for number, path in enumerate(sorted([home, *home.rglob("*")], reverse=True)):
        os.utime(path, ns=(LONG_AGO_NS + number, LONG_AGO_NS + number), follow_symlinks=False)
