"""What should lie on a machine, and what has to be done for it: pure, from what lies there and what was recorded."""

from __future__ import annotations

from dataclasses import replace
from typing import Callable, NamedTuple, Optional

from vmgr.deploy.files import Seen, digest_of_bytes
from vmgr.deploy.manifest import Entry

FILE, LINK, FOLDER, TREE = "file", "link", "folder", "tree"

NONE, MAKE, MOVE, KEEP = "none", "make", "move", "keep"
"""Nothing is to be done; ours is to be put there; what is there goes aside first; what is there is somebody else's."""


class Want(NamedTuple):
    """One path that should be ours.

    `aside`: where a file of the site's at this path goes first. `over`: what is there may be overwritten, though no
    manifest knows it (it is one of an older version). `once`: only where there is nothing, and it is the site's from
    then on. `make` builds a tree, which has a seal when it is whole. `owner` is uid and gid of a file.
    """

    path: str
    kind: str
    mode: int = 0o644
    data: bytes = b""
    target: str = ""
    aside: Optional[str] = None
    over: bool = False
    once: bool = False
    hook: bool = False
    owner: tuple[int, int] = (0, 0)
    make: Optional[Callable[[str], None]] = None

    @property
    def digest(self) -> str:
        """What `look` gives for it."""
        return digest_of_bytes(self.data) if self.kind == FILE else self.target


class Step(NamedTuple):
    """What is to be done for a Want, with its entry in the manifest from then on; None for what is not ours."""

    want: Want
    action: str
    entry: Optional[Entry]
    why: str = ""


def decide(want: Want, entry: Optional[Entry], seen: Seen, aside: Seen) -> Step:
    """What is to be done for `want`, of which `seen` lies at its path and `aside` where the site's would be moved."""
    if want.kind in (FOLDER, TREE):
        return _decide_folder(want, entry, seen)
    new = Entry(want.kind, want.mode, [want.digest], want.aside, None, want.hook)
    if entry is not None:
        new = replace(new, aside=entry.aside, was=entry.was, ours=[*dict.fromkeys([*entry.ours, want.digest])])
    if not seen.kind:
        return Step(want, MAKE, new)
    if seen.kind == want.kind and seen.digest == want.digest:
        return _decide_same(want, entry, seen, new)
    if entry is None:
        return _decide_foreign(want, seen, aside, new)
    if want.once:
        return Step(want, NONE, entry)
    if seen.kind == entry.kind and seen.digest in entry.ours:
        return Step(want, MAKE, new)
    if aside.kind and _is_still_there(entry, seen, aside):  # it has its second name, and ours is not there yet
        return Step(want, MAKE, new)
    if entry.pending and want.over:
        return Step(want, MAKE, new)
    if entry.pending and entry.aside and not aside.kind:  # to be moved, and not moved yet
        return Step(want, MOVE, new)
    return Step(want, KEEP, entry, "was changed since it was installed")


def _is_still_there(entry: Entry, seen: Seen, aside: Seen) -> bool:
    """Whether at the path itself lies what has, as `aside`, a second name already."""
    link = entry.was is not None and seen.kind == LINK and seen.digest == entry.was["target"]
    return aside.inode == seen.inode or link


def _decide_folder(want: Want, entry: Optional[Entry], seen: Seen) -> Step:
    if seen.kind == "folder" and want.kind == TREE:
        return Step(want, MAKE if want.make else NONE, entry or Entry(want.kind, want.mode))
    if seen.kind == "folder":
        right = (seen.mode, seen.uid, seen.gid) == (want.mode, *want.owner)
        return Step(want, NONE if right or entry is None else MAKE, entry)
    if seen.kind:
        return Step(want, KEEP, entry, "is no folder")
    return Step(want, MAKE, Entry(want.kind, want.mode))


def _decide_same(want: Want, entry: Optional[Entry], seen: Seen, new: Entry) -> Step:
    """It is there already, perhaps with another mode or owner."""
    if entry is None and want.once:
        return Step(want, NONE, None)
    new = replace(new, ours=[want.digest])
    right = want.kind == LINK or (seen.mode == want.mode and (seen.uid, seen.gid) == want.owner)
    if not right:
        return Step(want, MAKE, new)
    return Step(want, NONE, entry if entry is not None and entry.ours == new.ours else new)


def _decide_foreign(want: Want, seen: Seen, aside: Seen, new: Entry) -> Step:
    """Something is there that no manifest knows."""
    if want.once:
        return Step(want, NONE, None)
    if want.over and seen.kind in (FILE, LINK):
        return Step(want, MAKE, new)
    if want.aside is None or seen.kind not in (FILE, LINK):
        return Step(want, KEEP, None, "is not vTorque's")
    if aside.kind:
        return Step(want, KEEP, None, f"is the site's, and so is {want.aside}: remove one of them")
    return Step(want, MOVE, new)


REMOVE, RESTORE, DROP_ASIDE = "remove", "restore", "drop"
"""Ours goes; it gives way to what was there before; only the second name of what was there before goes."""


def undoing(entry: Entry, seen: Seen, aside: Seen) -> str:
    """What is to be done to undo an entry: REMOVE, RESTORE, DROP_ASIDE, NONE, or KEEP for what somebody has changed."""
    if aside.kind and _is_still_there(entry, seen, aside):
        return DROP_ASIDE
    if not seen.kind:
        return RESTORE if aside.kind else NONE
    if entry.pending and entry.aside and not aside.kind and seen.digest not in entry.ours:
        return NONE  # it was never moved
    if seen.kind == entry.kind and (entry.kind == FOLDER or seen.digest in entry.ours):
        return RESTORE if aside.kind else REMOVE
    return KEEP
