"""The manifest of an installation: what it has put where, what was there before, and how to tell whether it still is.

It is written before anything is changed, with what is intended, and again when all is done. So it is the journal too:
whatever ends an installation in between, the manifest knows each file that may have been touched.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Optional

from vmgr.deploy.files import beside, flush_folder, names_digest, remove, write_file
from vmgr.errors import Code, VTorqueError

VERSION = 1
NAME = "manifest.json"
MAX_BYTES = 16 << 20


@dataclass
class Entry:
    """One path of ours.

    `kind` is file, link, folder or tree. `ours` are the digests (links: targets) that ours may have: one, or while a
    change is pending the old and the new one. `aside` is where a file that was there before lies, or will lie should
    somebody put it there; `was` is what such a link was. `hook` is whether a mom runs it. `pending` is whether the deed
    may not have been done yet.
    """

    kind: str
    mode: int = 0
    ours: list[str] = field(default_factory=list)
    aside: Optional[str] = None
    was: Optional[dict[str, Any]] = None
    hook: bool = False
    pending: bool = True


@dataclass
class Times:
    """A folder as it was before: its time of change, and a digest of the names in it."""

    mtime_ns: int
    names: str


@dataclass
class Manifest:
    """All of an installation on one machine, in the order in which it was made."""

    toolkit: str = ""
    state: str = "new"
    facts: dict[str, Any] = field(default_factory=dict)
    entries: dict[str, Entry] = field(default_factory=dict)
    folders: dict[str, Times] = field(default_factory=dict)

    def as_text(self) -> str:
        return json.dumps({"version": VERSION, **asdict(self)}, indent=1)


def parse(text: str, source: str) -> Manifest:
    """The manifest in a text. Raises VTorqueError (VT-CONFIG) for what is none of this version."""
    try:
        tree = json.loads(text)
        if tree.pop("version") != VERSION:
            raise ValueError("another version")
        entries = {path: Entry(**entry) for path, entry in tree.pop("entries").items()}
        folders = {path: Times(**times) for path, times in tree.pop("folders").items()}
        return Manifest(entries=entries, folders=folders, **tree)
    except (ValueError, TypeError, KeyError, AttributeError) as err:
        raise VTorqueError(
            f"{source} is no manifest of this version of vTorque: {err}", code=Code.CONFIG,
            hint="use the install.sh of the version that wrote it",
        ) from err  # fmt: skip


class Store:
    """The folder that keeps a manifest; the first installation makes it, with `mode`. The manifest is root's alone."""

    def __init__(self, folder: str, mode: int = 0o700) -> None:
        self.folder = folder
        self.mode = mode
        self.path = f"{folder}/{NAME}"

    def load(self) -> Optional[Manifest]:
        """What was installed; None where nothing was. Raises VTorqueError."""
        try:
            with open(os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as stream:
                data = stream.read(MAX_BYTES + 1)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return parse(data.decode("utf-8", "replace"), self.path)

    def save(self, manifest: Manifest) -> None:
        write_file(self.path, manifest.as_text().encode(), 0o600, (os.geteuid(), os.getegid()))

    def make(self, entries: Sequence[str] = ()) -> None:
        """Make the folder with a first manifest in it, in one step; `entries` are folders of ours that lead to it.

        The first of them is made with all below it.
        """
        top = entries[0] if entries else self.folder
        above = os.path.dirname(top)
        manifest = Manifest(folders={above: times_of(above)})
        manifest.entries = {path: Entry("folder", 0o755) for path in entries}
        new = beside(top)
        remove(new)
        inner = new + self.folder[len(top) :]
        os.makedirs(os.path.dirname(inner) if entries else above, 0o755, exist_ok=True)
        os.mkdir(inner, self.mode)
        Store(inner).save(manifest)
        os.rename(new, top)
        flush_folder(above)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the folder, which is there, against a second installation.

        Raises VTorqueError (VT-ACCESS) when another one is at work.
        """
        fd = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as err:
                raise VTorqueError(
                    f"another installation is at work ({self.folder})",
                    code=Code.ACCESS,
                    hint="try again when it is done",
                ) from err
            yield
        finally:
            os.close(fd)


def times_of(folder: str) -> Times:
    return Times(os.stat(folder).st_mtime_ns, names_digest(folder))
