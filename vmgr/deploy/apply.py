"""Brings what is wanted onto a machine, and takes it away again. Each can be cut off anywhere, and is then done again.

The order is: look, write the manifest with all that is intended, do it, take away what is no longer wanted, write the
manifest. What somebody has changed is kept and reported.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Callable, Optional

from vmgr.deploy import files, tree
from vmgr.deploy.files import NOTHING, look
from vmgr.deploy.manifest import Entry, Manifest, Store, Times, times_of
from vmgr.deploy.wants import (
    DROP_ASIDE,
    FOLDER,
    KEEP,
    LINK,
    MAKE,
    MOVE,
    NONE,
    REMOVE,
    RESTORE,
    TREE,
    Step,
    Want,
    decide,
    undoing,
)


@dataclass
class Outcome:
    """What was done, by path, and what was kept, with the reason."""

    made: list[str] = field(default_factory=list)
    moved: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    restored: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)

    @property
    def changed(self) -> bool:
        return bool(self.made or self.moved or self.removed or self.restored)


def converge(
    store: Store,
    wants: Sequence[Want],
    *,
    toolkit: str,
    facts: dict[str, Any],
    dry: bool = False,
    also: Iterable[str] = (),
) -> Outcome:
    """Make `wants` so. `also` are paths of entries that are to be left alone.

    With `dry` nothing is changed, and the outcome tells what would be.
    """
    manifest = store.load() or Manifest()
    steps = [_step(want, manifest) for want in wants]
    gone = _gone(manifest, wants, also)
    outcome = Outcome()
    for step in steps:
        if step.action == KEEP:
            outcome.kept.append(f"{step.want.path} {step.why}")
        elif step.action in (MAKE, MOVE) and not (step.want.kind == TREE and tree.is_sealed(step.want.path)):
            outcome.made.append(step.want.path)
            if step.action == MOVE:
                outcome.moved.append(step.want.path)
    if dry:
        outcome.removed += gone
        return outcome
    settled = all(
        manifest.entries.get(step.want.path) == step.entry and not (step.entry and step.entry.pending) for step in steps
    )
    todo = outcome.made or gone or not settled
    if not todo and (manifest.state, manifest.toolkit, manifest.facts) == ("installed", toolkit, facts):
        return outcome
    _intend(store, manifest, steps, gone)
    for step in steps:
        if step.want.path in outcome.made:
            _do(step)
    _take_away(store, manifest, gone, outcome)
    for step in steps:
        entry = manifest.entries.get(step.want.path)
        if entry is not None:
            ours = [step.want.digest] if step.action in (MAKE, MOVE) and entry.ours else entry.ours
            manifest.entries[step.want.path] = replace(entry, ours=ours, pending=False)
    manifest.state, manifest.toolkit, manifest.facts = "installed", toolkit, facts
    store.save(manifest)
    return outcome


def _gone(manifest: Manifest, wants: Sequence[Want], also: Iterable[str]) -> list[str]:
    """Paths that are no longer wanted; a folder is wanted as long as something in it is."""
    stay = {want.path for want in wants} | set(also)
    above: set[str] = set()
    for path in stay:
        while path != "/":
            path = os.path.dirname(path)
            above.add(path)
    wanted_folders = {path for path, entry in manifest.entries.items() if entry.kind == FOLDER and path in above}
    return [path for path in manifest.entries if path not in stay | wanted_folders]


def _step(want: Want, manifest: Manifest) -> Step:
    entry = manifest.entries.get(want.path)
    aside = look(want.aside) if want.aside else NOTHING
    if aside.kind and entry is None and os.path.dirname(str(want.aside)) not in manifest.entries:
        # it lay there before anything was installed, and is to stay there
        want, aside = want._replace(aside=None), NOTHING
    return decide(want, entry, look(want.path), aside)


def _intend(store: Store, manifest: Manifest, steps: Sequence[Step], gone: Sequence[str]) -> None:
    """Record what is about to be done, and the folders as they are before."""
    for step in steps:
        if step.entry is None:
            continue
        pending = step.action in (MAKE, MOVE)
        entry = replace(step.entry, pending=pending)
        if step.action == MOVE:
            entry.was = _link_before(step.want.path)
        manifest.entries[step.want.path] = entry
        if pending:
            for path in (step.want.path, step.want.aside):
                if path:
                    _remember(manifest, os.path.dirname(path))
    for path in gone:
        _remember(manifest, os.path.dirname(path))
    _will_restore(manifest, gone)
    manifest.state = "changing"
    for path in manifest.entries:
        _sweep(path)
    store.save(manifest)


def _will_restore(manifest: Manifest, paths: Iterable[str]) -> None:
    """Note which of these give way to what lies aside: once that lies there no longer, it has been given back."""
    for path in paths:
        entry = manifest.entries[path]
        if entry.aside and look(entry.aside).kind:
            entry.pending = True


def _link_before(path: str) -> Optional[dict[str, Any]]:
    seen = look(path)
    if seen.kind != LINK:
        return None
    return {"target": seen.digest, "uid": seen.uid, "gid": seen.gid, "mtime_ns": seen.mtime_ns}


def _remember(manifest: Manifest, folder: str) -> None:
    if folder not in manifest.folders and folder not in manifest.entries and os.path.isdir(folder):
        manifest.folders[folder] = times_of(folder)


def _sweep(path: str) -> None:
    """Remove what a killed installation has half written beside a path."""
    with suppress(OSError):
        os.unlink(files.beside(path))


def _do(step: Step) -> None:
    want = step.want
    if want.kind == FOLDER:
        with suppress(FileExistsError):
            os.mkdir(want.path, 0o700)
        os.chown(want.path, *want.owner)
        os.chmod(want.path, want.mode)
        files.flush_folder(os.path.dirname(want.path))
    elif want.kind == TREE:
        assert want.make is not None
        files.remove(want.path)  # without its seal it is not whole
        want.make(want.path)
    else:
        if step.action == MOVE:
            assert want.aside is not None and step.entry is not None
            _set_aside(want.path, want.aside)
        if want.kind == LINK:
            files.write_link(want.path, want.target)
        else:
            files.write_file(want.path, want.data, want.mode, want.owner)


def _set_aside(path: str, aside: str) -> None:
    """Give what is at `path` a second name; a link that leads on from its own folder is made anew."""
    seen = look(path)
    if seen.kind == LINK and not seen.digest.startswith("/"):
        files.write_link(aside, os.path.join(os.path.dirname(path), seen.digest))
    else:
        os.link(path, aside, follow_symlinks=False)
        files.flush_folder(os.path.dirname(aside))


def _take_away(store: Store, manifest: Manifest, paths: Sequence[str], outcome: Outcome) -> None:
    for path in reversed(paths):
        reason = undo_one(path, manifest.entries[path], outcome)
        if reason:
            outcome.kept.append(f"{path} {reason}")
        del manifest.entries[path]
        store.save(manifest)


def undo_one(path: str, entry: Entry, outcome: Outcome, kept: Optional[Callable[[str], Optional[str]]] = None) -> str:
    """Undo one entry; gives the reason where something is kept, else an empty text."""
    _sweep(path)
    if entry.aside:
        _sweep(entry.aside)
    if entry.kind == TREE:
        files.remove(files.beside(path))
        changed = tree.remove(path)
        outcome.removed.append(path)
        return f"keeps what was changed in it: {', '.join(changed)}" if changed else ""
    seen, aside = look(path), look(entry.aside) if entry.aside else NOTHING
    action = undoing(entry, seen, aside)
    if action == KEEP and kept is not None:
        place = kept(path)
        if place is not None:
            os.link(path, place, follow_symlinks=False)
            _remove_or_restore(path, entry, RESTORE if aside.kind else REMOVE, outcome)
            return f"was changed since it was installed, and is now {place}"
    if action == KEEP:
        more = f"; what was there before is {entry.aside}" if aside.kind else ""
        return f"was changed since it was installed{more}"
    if action == NONE:
        return ""
    if action == DROP_ASIDE:
        assert entry.aside is not None
        os.unlink(entry.aside)
        files.flush_folder(os.path.dirname(entry.aside))
        return ""
    if entry.kind == FOLDER:
        try:
            os.rmdir(path)
        except OSError as err:
            if err.errno in (errno.ENOTEMPTY, errno.EEXIST):
                return f"is not empty: {', '.join(sorted(os.listdir(path))[:5])}"
            raise
        outcome.removed.append(path)
        return ""
    _remove_or_restore(path, entry, action, outcome)
    return ""


def _remove_or_restore(path: str, entry: Entry, action: str, outcome: Outcome) -> None:
    if action == REMOVE:
        os.unlink(path)
        outcome.removed.append(path)
        files.flush_folder(os.path.dirname(path))
        return
    assert entry.aside is not None
    if entry.was is not None:
        new, was = files.beside(path), entry.was
        os.symlink(was["target"], new)
        if os.geteuid() == 0:
            os.lchown(new, was["uid"], was["gid"])
        os.utime(new, ns=(was["mtime_ns"], was["mtime_ns"]), follow_symlinks=False)
        os.rename(new, path)
        os.unlink(entry.aside)
    else:
        os.rename(entry.aside, path)
    outcome.restored.append(path)
    files.flush_folder(os.path.dirname(entry.aside))
    files.flush_folder(os.path.dirname(path))


def undo_all(
    store: Store,
    *,
    kept: Optional[Callable[[str], Optional[str]]] = None,
    generated: Iterable[str] = (),
    dry: bool = False,
) -> Outcome:
    """Take an installation away, the last first; `generated` are files that its programs have made.

    `kept` says where a changed file of ours goes that must not stay where it is; None for one that stays.
    """
    outcome = Outcome()
    manifest = store.load()
    if manifest is None:
        if os.path.isdir(store.folder):
            _forget(store, Manifest(), [], outcome)
        return outcome
    if dry:
        outcome.removed += manifest.entries
        return outcome
    if manifest.state != "removing":
        manifest.state = "removing"
        _will_restore(manifest, manifest.entries)
        store.save(manifest)
    for path in generated:
        files.remove(path)
    around = _around(store, manifest)
    for path, entry in reversed(list(manifest.entries.items())):
        if path in around:
            continue
        reason = undo_one(path, entry, outcome, kept)
        if reason:
            outcome.kept.append(f"{path} {reason}")
    _forget(store, manifest, around, outcome)
    return outcome


def _around(store: Store, manifest: Manifest) -> list[str]:
    """Folders of ours in which the manifest's own folder lies, the innermost first."""
    found = [
        path for path, entry in manifest.entries.items() if entry.kind == FOLDER and store.folder.startswith(f"{path}/")
    ]
    return sorted(found, key=len, reverse=True)


def _forget(store: Store, manifest: Manifest, around: Sequence[str], outcome: Outcome) -> None:
    """Give the folders their times back, and remove the manifest itself with what was made around it, in one step."""
    top: Optional[str] = None
    _sweep(store.path)
    if os.path.isdir(store.folder) and set(os.listdir(store.folder)) <= {os.path.basename(store.path)}:
        top = store.folder
        for folder in around:
            if os.listdir(folder) != [os.path.basename(top)]:
                outcome.kept.append(f"{folder} is not empty: {', '.join(sorted(os.listdir(folder))[:5])}")
                break
            top = folder
            outcome.removed.append(folder)
    above = os.path.dirname(top) if top else ""
    for folder, times in manifest.folders.items():
        if folder != above:
            give_back(folder, times)
    if top is None:
        outcome.kept.append(f"{store.folder} is not empty")
        files.remove(store.path)
        return
    gone = files.beside(top)
    files.remove(gone)
    os.rename(top, gone)
    files.flush_folder(above)
    files.remove(gone)
    if above in manifest.folders:
        give_back(above, manifest.folders[above])


def give_back(folder: str, times: Times) -> None:
    """Give a folder the time of its last change back, if the same names are in it as then."""
    with suppress(FileNotFoundError, NotADirectoryError):
        if files.names_digest(folder) == times.names:
            info = os.stat(folder)
            os.utime(folder, ns=(info.st_atime_ns, times.mtime_ns))
