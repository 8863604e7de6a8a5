"""A file system root that kernel files are read from: the machine's own, or a recorded one."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import Optional

from vmgr.errors import Code, VTorqueError
from vmgr.topology.cpulist import MAX_NUMBER, parse_cpus, parse_mask

MAX_FILE_BYTES = 1 << 20
_DIGITS = 15


class Tree:
    """Reads small files below `root`; nothing below it can make a reader hang, or read without end.

    Paths are relative to the root. What is not there, or cannot be read, is None: kernels of all ages, containers
    and recorded trees leave out this and that.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def is_live(self) -> bool:
        """Whether this is the root of the running system, as this process sees it."""
        return os.fspath(self.root) == "/"

    def at(self, path: str) -> Path:
        return self.root / path

    def text(self, path: str) -> Optional[str]:
        """The text of a file without white space at its ends, nor the zeros with which recorded trees fill pages."""
        try:
            fd = os.open(self.at(path), os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        except (OSError, ValueError):
            return None
        with os.fdopen(fd, "rb") as file:
            try:
                if not stat.S_ISREG(os.fstat(fd).st_mode):
                    return None
                data = file.read(MAX_FILE_BYTES)
            except OSError:
                return None
        return data.decode("utf-8", "replace").strip("\0 \t\r\n")

    def number(self, path: str) -> Optional[int]:
        """The whole number in a file, which may be negative."""
        text = self.text(path) or ""
        digits = text[1:] if text.startswith("-") else text
        return int(text) if digits.isascii() and digits.isdigit() and len(digits) <= _DIGITS else None

    def cpus(self, *paths: str) -> Optional[frozenset[int]]:
        """The CPUs (or nodes) in the first of the files that is there: a mask where it has no `list` in its name.

        Raises VTorqueError for a file that has neither, because nothing can be built on half of a machine.
        """
        for path in paths:
            text = self.text(path)
            if text is None:
                continue
            found = parse_mask(text) if path.endswith(("map", "siblings", "_cpus")) else parse_cpus(text)
            if found is None:
                raise self.error(f"{self.at(path)} holds no set of numbers that can be believed")
            return found
        return None

    def numbered(self, folder: str, prefix: str) -> list[int]:
        """The numbers of the entries of a folder that are called `prefix` and a number, ascending."""
        try:
            names = [entry.name for entry in self.at(folder).iterdir()]
        except OSError:
            return []
        found = (re.fullmatch(rf"{prefix}([0-9]{{1,6}})", name, re.ASCII) for name in names)
        return sorted(number for number in (int(match[1]) for match in found if match) if number <= MAX_NUMBER)

    def error(self, message: str) -> VTorqueError:
        """A failure to read this tree: of the node's where it is live, else of the one who named the folder."""
        if self.is_live:
            return VTorqueError(message, code=Code.NODE, hint="is /sys mounted?")
        return VTorqueError(message, code=Code.VALUE, hint="a recorded tree has sys/devices/system/cpu in it")
