"""The files and scripts of a recipe, put into the root of an image that is being built."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Callable, Optional

from vmgr.errors import Code, VTorqueError
from vmgr.images.recipe import File, Layer
from vmgr.images.sandbox import run

MAX_LINKS = 40
_SCRIPT = ".vtorque-build-script"


def apply_layers(layers: Iterable[Layer], root: Path, log: Path, progress: Callable[[str], None]) -> None:
    """Put each layer's files below `root`, then run its scripts there, without a network, as the image's root.

    What scripts say is added to the file `log`.
    Raises VTorqueError (VT-BUILD) naming the file or the script, with the last of what the script said.
    """
    for layer in layers:
        for file in layer.files:
            _place(file, root)
        for script in layer.scripts:
            progress(f"running {script.name}")
            _run_script(script, root, log)


def inside(root: Path, path: str) -> Path:
    """The place of the image's absolute `path` below `root`, symbolic links on the way followed as the image would.

    So no link of the image's leads to a file of the machine. The last component may be missing. Raises VTorqueError
    (VT-BUILD) when links go round in a circle.
    """
    at, links = root, 0
    left = [part for part in reversed(path.split("/")) if part]
    while left:
        name = left.pop()
        if name == ".":
            continue
        if name == "..":
            at = at if at == root else at.parent
            continue
        if not (at / name).is_symlink():
            at = at / name
            continue
        links += 1
        if links > MAX_LINKS:
            raise VTorqueError(f"symbolic links of the image go round in a circle at {path}", code=Code.BUILD)
        target = (at / name).readlink().as_posix()
        at = root if target.startswith("/") else at
        left += [part for part in reversed(target.split("/")) if part]
    return at


def _place(file: File, root: Path) -> None:
    owner = _owner(file.owner, root)
    if not file.source.is_dir():
        _copy(file.source, root, file.target, file.mode, owner)
        return
    for path in sorted(file.source.rglob("*")):
        target = f"{file.target.rstrip('/')}/{path.relative_to(file.source).as_posix()}"
        if path.is_dir() and not path.is_symlink():
            _folder(inside(root, target), root, owner)
        else:
            _copy(path, root, target, None, owner)


def _copy(source: Path, root: Path, target: str, mode: Optional[int], owner: tuple[int, int]) -> None:
    """A file or link to `target`, in place of the file or link that is there."""
    folder, _, name = target.rpartition("/")
    place = _folder(inside(root, folder), root, (0, 0)) / name
    if place.is_dir() and not place.is_symlink():
        raise VTorqueError(f"{target} is a folder of the image, {source} is none", code=Code.BUILD)
    place.unlink(missing_ok=True)
    if source.is_symlink():
        place.symlink_to(source.readlink())
    else:
        shutil.copyfile(source, place)
    os.chown(place, *owner, follow_symlinks=False)
    if not source.is_symlink():
        place.chmod(mode if mode is not None else 0o755 if source.stat().st_mode & stat.S_IXUSR else 0o644)


def _folder(folder: Path, root: Path, owner: tuple[int, int]) -> Path:
    """Make a folder of the image and those above it where they are missing."""
    if folder.is_dir():
        return folder
    if folder.exists():
        raise VTorqueError(f"/{folder.relative_to(root)} is a file of the image, and no folder", code=Code.BUILD)
    _folder(folder.parent, root, owner)
    folder.mkdir()
    folder.chmod(0o755)
    os.chown(folder, *owner)
    return folder


def _owner(text: str, root: Path) -> tuple[int, int]:
    """Numbers of `USER` or `USER:GROUP`, by the image's own accounts; without a group it is the user's own."""
    user, _, group = text.partition(":")
    uid, gid = (0, 0) if user == "root" else _account(user, root, "/etc/passwd")
    return uid, gid if not group else 0 if group == "root" else _account(group, root, "/etc/group")[0]


def _account(name: str, root: Path, file: str) -> tuple[int, int]:
    """The number of a user or group, or a number itself; of a user also the group's."""
    if name.isdigit():
        return int(name), int(name) if file == "/etc/passwd" else 0
    path = inside(root, file)
    for line in path.read_text("utf-8", "replace").splitlines() if path.is_file() else ():
        fields = line.split(":")
        if fields[0] == name and len(fields) > 3 and fields[2].isdigit():
            return int(fields[2]), int(fields[3]) if fields[3].isdigit() else 0
    raise VTorqueError(f"the image has no {name} in {file}, to whom a file of the recipe is to belong", code=Code.BUILD)


def _run_script(script: Path, root: Path, log: Path) -> None:
    with log.open("a") as stream:
        stream.write(f"{script}:\n")
    copy = root / _SCRIPT
    copy.unlink(missing_ok=True)
    shutil.copyfile(script, copy)
    copy.chmod(0o700)
    try:
        run([f"/{_SCRIPT}"], cwd=root, root=root, log=log)
    except VTorqueError as err:
        reason = err.message.replace(f"/{_SCRIPT}", script.name)
        raise VTorqueError(f"the script {script} failed: {reason}", code=err.code) from None
    finally:
        copy.unlink(missing_ok=True)
