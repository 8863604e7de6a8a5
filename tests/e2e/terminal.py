"""A user's terminal: a real pseudo terminal with a program of the user's on it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import pexpect

from .conftest import PATIENCE_S, User

SHELL = r"[$#] (\x1b\[K)?$"
"""The end of a prompt, of a plain shell or of one that clears the line behind it."""


class Terminal:
    """One program on a terminal of its own. `rows` and `columns` are the terminal's size, `path` its PATH."""

    def __init__(self, user: User, *argv: str, rows: int = 33, columns: int = 101, path: str = "/usr/bin:/bin") -> None:
        def become() -> None:
            os.initgroups(user.name, user.gid)
            os.setresgid(user.gid, user.gid, user.gid)
            os.setresuid(user.uid, user.uid, user.uid)

        environment = {
            "PATH": path, "HOME": str(user.home), "USER": user.name, "LOGNAME": user.name,
            "LANG": "C.UTF-8", "TERM": "xterm-256color", **user.site.environment,
        }  # fmt: skip
        self.child = pexpect.spawn(
            argv[0], list(argv[1:]), cwd=str(user.home), env=environment, dimensions=(rows, columns),
            preexec_fn=become, timeout=PATIENCE_S, encoding="utf-8", echo=True,
        )  # fmt: skip
        self.seen = ""

    def expect(self, pattern: str, timeout_s: float = PATIENCE_S) -> re.Match[str]:
        """Wait until the terminal shows `pattern`; gives the match."""
        try:
            self.child.expect(pattern, timeout=timeout_s)
        except (pexpect.TIMEOUT, pexpect.EOF) as err:
            raise AssertionError(f"{pattern!r} was not shown:\n{self.seen}{self.child.before}") from err
        self.seen += self.child.before + self.child.after
        match = self.child.match
        assert isinstance(match, re.Match)
        return match

    def type(self, text: str) -> None:
        self.child.send(text)

    def run(self, command: str, pattern: str) -> re.Match[str]:
        """Type a command into a shell and wait for what it prints."""
        self.type(f"{command}\r")
        return self.expect(pattern)

    def resize(self, rows: int, columns: int) -> None:
        self.child.setwinsize(rows, columns)

    def end(self) -> int:
        """Wait for the program's end; gives its exit status, 128 + n for signal n."""
        self.child.expect(pexpect.EOF)
        self.seen += self.child.before
        self.child.close()
        status, number = self.child.exitstatus, self.child.signalstatus
        return 128 + number if number is not None else status


@contextmanager
def terminal(
    user: User, *argv: str, rows: int = 33, columns: int = 101, path: str = "/usr/bin:/bin"
) -> Iterator[Terminal]:
    """A terminal that is gone afterwards, with what runs on it."""
    made = Terminal(user, *argv, rows=rows, columns=columns, path=path)
    try:
        yield made
    finally:
        made.child.close(force=True)


def check_size_and_keys(tty: Terminal) -> None:
    """A shell on a terminal of 33 by 101 has that size, follows a new one, and Ctrl-C ends what it runs, not itself."""
    tty.run("stty size", r"33 101\s")
    tty.expect(SHELL)
    tty.resize(44, 120)
    tty.run('until [ "$(stty size)" = \'44 120\' ]; do sleep 0.2; done; echo re""sized', "resized")
    tty.expect(SHELL)
    tty.run('echo sleep""ing; sleep 1000', "sleeping\r?\n")
    tty.type("\x03")
    tty.expect(SHELL)
