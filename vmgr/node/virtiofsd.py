"""The two programs named virtiofsd, told apart by their help, and how each is started to have a user's rights alone.

That of Rust (1.0 and later) runs as the plain user. That of QEMU 7.2 and earlier, in C, has to change its root and
to limit its own capabilities: it starts with the two that this takes, as the user, and has none when the first request
reaches it. It also insists on having no supplementary groups: a file that the user may use by such a group alone is
out of reach through it. Observed on 1.13.2 and 7.2.22.
"""

from __future__ import annotations

import asyncio
import enum
import os
from collections.abc import Sequence
from typing import NamedTuple

from vmgr.errors import Code, VTorqueError
from vmgr.node.syscalls import CAP_SETPCAP, CAP_SYS_CHROOT
from vmgr.node.waiting import gone
from vmgr.trust import check_trusted

HELP_SECONDS = 10.0
_DROPPED = ("chown", "dac_override", "fowner", "fsetid", "setgid", "setuid", "mknod", "setfcap")
"""What the C program would keep: it has none of these, and would give up where it cannot take them."""


class Language(enum.Enum):
    C = "C"
    RUST = "Rust"


class Virtiofsd(NamedTuple):
    """One installed virtiofsd. `can_refuse_writes`: it has an option for shares that are only read."""

    path: str
    language: Language
    can_refuse_writes: bool = False
    has_submounts_option: bool = False

    @property
    def capabilities(self) -> tuple[int, ...]:
        """What it is started with beside the user's ids; it drops them by itself."""
        return (CAP_SYS_CHROOT, CAP_SETPCAP) if self.language is Language.C else ()

    @property
    def takes_groups(self) -> bool:
        """Whether it uses the user's supplementary groups."""
        return self.language is Language.RUST

    def command(self, source: str, listener: int, *, readonly: bool) -> list[str]:
        """The argument vector that serves the folder `source` on a listening socket.

        Locks stay in the guest: the C program, asked to take them on the node, refuses to wait for one.
        """
        if self.language is Language.C:
            return [
                self.path, "-f",
                f"--fd={listener}",
                "-o", f"source={source}",
                "-o", "sandbox=chroot",
                "-o", "cache=auto",
                "-o", "no_flock,no_posix_lock,no_xattr",
                "-o", "modcaps=" + ":".join(f"-{name}" for name in _DROPPED),
                "-o", "log_level=err",
                "--rlimit-nofile=0",
            ]  # fmt: skip
        return [
            self.path,
            f"--fd={listener}",
            f"--shared-dir={source}",
            "--sandbox=none",
            "--seccomp=kill",
            "--cache=auto",
            "--inode-file-handles=never",
            *(["--no-announce-submounts"] if self.has_submounts_option else []),
            "--log-level=error",
            "--rlimit-nofile=0",
            *(["--readonly"] if readonly and self.can_refuse_writes else []),
        ]


def from_help(path: str, text: str) -> Virtiofsd:
    """Which of the two a program is, from what it prints for `--help`. Raises VTorqueError (VT-NODE)."""
    if "--shared-dir" in text:
        return Virtiofsd(path, Language.RUST, "--readonly" in text, "--no-announce-submounts" in text)
    if "source=PATH" in text and "modcaps=" in text:
        return Virtiofsd(path, Language.C)
    raise VTorqueError(
        f"{path} (hypervisor.virtiofsd) is no virtiofsd that can be used",
        code=Code.NODE,
        hint="virtiofsd 1.0 or later, or that of QEMU 6.2 to 7.2",
    )


_TOLD: dict[tuple[str, int, int, int], str] = {}
"""What a file of this path, device, inode and time of change has printed: one agent starts it for many guests."""


async def examine(path: str) -> Virtiofsd:
    """Which virtiofsd is installed here. Raises VTorqueError (VT-NODE, VT-TRUST)."""
    try:
        check_trusted(path)
        seen = os.stat(path)
        which = path, seen.st_dev, seen.st_ino, seen.st_ctime_ns
        text = _TOLD.get(which) or await _output([path, "--help"])
    except (OSError, asyncio.TimeoutError) as err:
        raise _absent(path, getattr(err, "strerror", None) or f"no answer within {HELP_SECONDS:g} s") from err
    except VTorqueError as err:
        if err.code is Code.TRUST:
            raise
        raise _absent(path, err.message) from err
    found = from_help(path, text)
    _TOLD[which] = text
    return found


def _absent(path: str, reason: str) -> VTorqueError:
    return VTorqueError(
        f"{path} (hypervisor.virtiofsd) cannot be started: {reason}",
        code=Code.NODE,
        hint="install virtiofsd on the nodes, or use kind 9p",
    )


async def _output(argv: Sequence[str]) -> str:
    child = await asyncio.create_subprocess_exec(
        *argv,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"},
    )
    try:
        out, _ = await asyncio.wait_for(child.communicate(), HELP_SECONDS)
        return out.decode("utf-8", "replace")
    finally:
        await gone(child)
