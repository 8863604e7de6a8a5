"""Taking images out of the pool, and giving them other names: only what nobody uses, unless told otherwise.

A revision is in use while somebody has a lock on its file `.hold` (`Pool.hold`), while another image is a layer on it,
and by what the caller names: suspended jobs. It goes by one rename, under a lock that keeps new users out, so nobody
ever finds half of one.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Callable, NamedTuple, Optional

from vmgr.errors import Code, VTorqueError
from vmgr.images.pool import HOLD, Pool, split_reference
from vmgr.images.writing import (
    GONE,
    cannot_write,
    check_name,
    keep_number,
    last_number,
    locked,
    remove_tree,
    settle,
    sweep,
)

NameOf = Callable[[int], str]
"""In words, what a process of this node is."""
Uses = Sequence[tuple[str, str]]
"""What beside running jobs uses images: `NAME@REVISION`, and in words what it is."""
_BREAKS = (
    "running guests go on with the files that they have open, suspended jobs cannot resume, layers lose their base"
)


class Removed(NamedTuple):
    """`gone`: revisions that are deleted. `uses`: in words, what used those, or what keeps others."""

    gone: list[str]
    uses: list[str]


def delete(
    pool: Pool,
    reference: str,
    *,
    force: bool = False,
    also_used_by: Uses = (),
    name_of: NameOf = "process {}".format,
    progress: Callable[[str], None] = lambda _line: None,
) -> Removed:
    """Delete one revision (`NAME@REVISION`), or an image with all of them (`NAME`).

    What is in use is refused, all of it; with `force` it goes, and what used it is told. `name_of` says in words what
    a process of this node is. Raises VTorqueError (VT-IMAGE).
    """
    name, revision = split_reference(reference)
    _must_exist(pool, name, revision)
    sweep(pool.path)
    with locked(pool.path, name, progress):
        doomed = pool.revisions(name) if revision is None else [revision]
        _must_exist(pool, name, revision)
        with _locked_out(pool, name, doomed, also_used_by, name_of) as uses:
            if uses and not force:
                raise VTorqueError(
                    f"{reference} is in use: {'; '.join(uses)}", code=Code.IMAGE, hint=f"with --force: {_BREAKS}"
                )
            aside = [_set_aside(pool, pool.path / name / str(each)) for each in doomed]
    for path in aside:
        remove_tree(path)
    return Removed([f"{name}@{each}" for each in doomed], uses)


def collect(
    pool: Pool,
    *,
    keep: int,
    dry_run: bool = False,
    also_used_by: Uses = (),
    name_of: NameOf = "process {}".format,
) -> Removed:
    """Delete the revisions of each image beside the newest `keep` that nobody uses, and what killed processes left.

    With `dry_run` nothing is deleted; it tells what would be. Raises VTorqueError (VT-IMAGE, VT-BUILD).
    """
    gone = [] if dry_run else sweep(pool.path)
    kept: list[str] = []
    for name in pool.names():
        for revision in reversed(pool.revisions(name)[: -keep or None]):  # a layer goes before what it lies on
            reference = f"{name}@{revision}"
            if dry_run:
                with _locked_out(pool, name, [revision], also_used_by, name_of) as uses:
                    kept += [f"{reference}: {use}" for use in uses]
                gone += [] if uses else [reference]
                continue
            try:
                gone += delete(pool, reference, also_used_by=also_used_by, name_of=name_of).gone
            except VTorqueError as err:
                if revision in pool.revisions(name):  # else another process has deleted it
                    kept.append(err.message)
    return Removed(gone, kept)


def rename(
    pool: Pool,
    old: str,
    new: str,
    *,
    also_used_by: Uses = (),
    name_of: NameOf = "process {}".format,
    progress: Callable[[str], None] = lambda _line: None,
) -> None:
    """Give an image, all revisions of it, another name, which no image has. One in use is refused.

    Raises VTorqueError (VT-IMAGE).
    """
    for name in (old, new):
        check_name(name)
    _must_exist(pool, old, None)
    if old == new:
        raise VTorqueError(f"{old} has that name already", code=Code.IMAGE)
    sweep(pool.path)
    with ExitStack() as locks:
        held = {name: locks.enter_context(locked(pool.path, name, progress)) for name in sorted((old, new))}
        _must_exist(pool, old, None)
        if pool.revisions(new):
            raise VTorqueError(
                f"there is an image {new} already", code=Code.IMAGE, hint="delete it, or take another name"
            )
        with _locked_out(pool, old, pool.revisions(old), also_used_by, name_of) as uses:
            if uses:
                raise VTorqueError(f"{old} is in use: {'; '.join(uses)}", code=Code.IMAGE, hint="wait until it is not")
            last = {name: last_number(pool.path, name, lock) for name, lock in held.items()}
            try:  # no number is given again under either name, wherever this ends
                keep_number(pool.path, new, max(last.values()))
                keep_number(pool.path, old, last[old])
                aside = _set_aside(pool, pool.path / new)
                (pool.path / old).rename(pool.path / new)
            except OSError as err:
                raise cannot_write(pool.path, err) from err
    remove_tree(aside)
    settle(pool.path, (old, new))


def _must_exist(pool: Pool, name: str, revision: Optional[int]) -> None:
    """Raises VTorqueError (VT-IMAGE) naming what there is; a revision whose description is broken counts too."""
    revisions = pool.revisions(name)
    if not revisions or (revision is not None and revision not in revisions):
        pool.get(name, revision)
        raise VTorqueError(f"there is no image {name}", code=Code.IMAGE, hint="see `vmgr list`")


def _set_aside(pool: Pool, path: Path) -> Path:
    """Take a folder of the pool out of every reader's sight; gives where it is to be removed."""
    aside = pool.path / f"{GONE}{path.name}-{secrets.token_hex(8)}"
    try:
        return path.rename(aside)
    except OSError as err:
        raise cannot_write(pool.path, err) from err


@contextlib.contextmanager
def _locked_out(
    pool: Pool, name: str, revisions: Collection[int], also_used_by: Uses, name_of: NameOf
) -> Iterator[list[str]]:
    """Keep new users out of these revisions; gives in words what uses them."""
    references = [f"{name}@{revision}" for revision in revisions]
    uses = [f"{what} ({reference})" for reference, what in also_used_by if reference in references]
    uses += [
        f"the image {image.reference} is a layer on {image.parent}"
        for image in pool.all(broken=lambda _problem: None)  # which is nobody's layer
        if image.parent in references and image.reference not in references
    ]
    fds: list[int] = []
    try:
        for revision, reference in zip(revisions, references):
            with contextlib.suppress(FileNotFoundError):
                fd = os.open(pool.path / name / str(revision) / HOLD, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
                fds.append(fd)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    holders = [name_of(pid) for pid in holders_of(fd)] or ["something that is not seen from this node"]
                    uses += [f"{holder} ({reference})" for holder in holders]
        yield uses
    except OSError as err:
        raise cannot_write(pool.path, err) from err
    finally:
        for fd in fds:
            os.close(fd)


def holders_of(fd: int) -> list[int]:
    """The processes of this node that have a lock (flock(2)) on an open file, from /proc/locks (proc(5))."""
    info = os.fstat(fd)
    where = f"{os.major(info.st_dev):02x}:{os.minor(info.st_dev):02x}:{info.st_ino}"
    try:
        lines = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return []
    fields = [line.split() for line in lines]
    return sorted({int(each[4]) for each in fields if each[1] == "FLOCK" and each[5] == where and int(each[4]) > 0})
