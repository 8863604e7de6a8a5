"""A tree of programs: one folder for each version, with a seal that lists every file in it once it is whole.

A tree without its seal is the rest of a killed installation. Programs that run keep the tree that they were started
from; the next version has another.
"""

from __future__ import annotations

import ctypes
import json
import os
import stat
from collections.abc import Iterator

from vmgr.deploy import files

SEAL = ".files.json"
_CACHE = "__pycache__"


def listing(folder: str) -> dict[str, list[str]]:
    """Every file and link of a tree by its path in it, with digest and mode; what Python caches does not count."""
    found = {}
    for path in _files(folder):
        seen = files.look(path)
        found[os.path.relpath(path, folder)] = [seen.digest, f"{seen.mode:o}" if seen.kind == "file" else seen.kind]
    return found


def names(folder: str) -> set[str]:
    """The paths of a tree's files and links in it."""
    return {os.path.relpath(path, folder) for path in _files(folder)}


def _files(folder: str) -> Iterator[str]:
    for path in files.below(folder):
        relative = os.path.relpath(path, folder)
        if relative == SEAL or f"/{_CACHE}/" in f"/{relative}":
            continue
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            yield path


def seal(folder: str) -> None:
    """Declare a tree whole."""
    data = json.dumps(listing(folder)).encode()
    flush(folder)
    files.write_file(f"{folder}/{SEAL}", data, 0o644, (os.geteuid(), os.getegid()))


def flush(folder: str) -> None:
    """Bring all of a tree to the disk."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if ctypes.CDLL(None).syncfs(fd):
            os.sync()
    finally:
        os.close(fd)


def is_sealed(folder: str) -> bool:
    return os.path.isfile(f"{folder}/{SEAL}")


def sealed_listing(folder: str) -> dict[str, list[str]]:
    """What the seal says; nothing where there is none."""
    try:
        with open(f"{folder}/{SEAL}", encoding="utf-8") as stream:
            found: dict[str, list[str]] = json.load(stream)
        return found
    except (OSError, ValueError):
        return {}


def differences(folder: str) -> list[str]:
    """Paths in a tree that are not as they were sealed: changed, added or missing."""
    was, now = sealed_listing(folder), listing(folder)
    return sorted(path for path in was.keys() | now.keys() if was.get(path) != now.get(path))


def remove(folder: str) -> list[str]:
    """Remove a tree. Files that somebody has changed or added stay, in `FOLDER.kept`; gives their paths.

    One without a seal is removed wholly.
    """
    if not os.path.isdir(folder):
        return []
    if not is_sealed(folder):
        files.remove(folder)
        return []
    was, now = sealed_listing(folder), listing(folder)
    changed = sorted(path for path in now if was.get(path) != now[path])
    if not changed:
        os.unlink(f"{folder}/{SEAL}")
        files.remove(folder)
        return []
    keep = {os.path.join(folder, path) for path in changed}
    for path in list(files.below(folder)):
        if path in keep or path == f"{folder}/{SEAL}":
            continue
        if os.path.isdir(path) and not os.path.islink(path):
            if not os.listdir(path):
                os.rmdir(path)
        else:
            os.unlink(path)
    place = files.free_name(f"{folder}.kept")
    os.rename(folder, place)
    os.unlink(f"{place}/{SEAL}")
    return [f"{place}/{path}" for path in changed]
