"""Running things in the guest as the job's user, over SSH with the job's own key and the guest's known host key."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import re
import resource
import shlex
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

from vmgr.errors import Code, VTorqueError
from vmgr.node.process import dies_with
from vmgr.node.terminal import Terminal

RUNNER = "/run/vtorque/run"
SSH_FAILED = 255
"""What `ssh` itself ends with when the connection fails (ssh(1)); a script may end with it too."""

SSH_SECONDS = 2.0
"""How long `ssh` may take to end when it is told to."""

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_NOT_PASSED = {
    "_", "HOSTNAME", "OLDPWD", "PWD", "SHLVL", "TMPDIR", "PBS_NODEFILE",
    "SSH_CLIENT", "SSH_CONNECTION", "SSH_TTY", "SSH_AUTH_SOCK", "XAUTHORITY", "DISPLAY",
}  # fmt: skip
"""Variables that speak of the node and would be wrong in the guest."""

_SHELLS_OWN = {"BASHOPTS", "BASH_VERSINFO", "EUID", "LINENO", "OPTIND", "PPID", "SHELLOPTS", "UID"}
"""Variables that bash, or dash, lets nobody set, or not to everything."""

_LIMITS = {
    "c": resource.RLIMIT_CORE,
    "d": resource.RLIMIT_DATA,
    "f": resource.RLIMIT_FSIZE,
    "l": resource.RLIMIT_MEMLOCK,
    "n": resource.RLIMIT_NOFILE,
    "s": resource.RLIMIT_STACK,
    "t": resource.RLIMIT_CPU,
    "v": resource.RLIMIT_AS,
}
"""`ulimit` options that POSIX-like shells share, and the limits that they set."""

_UNITS = {"c": 512, "f": 512, "n": 1, "t": 1}
"""Bytes in a unit of an `ulimit` option, 1024 where not named (dash(1), bash in POSIX mode)."""


class GuestSession:
    """The way into one guest. `tag` makes the names of the files unique that are written for it in `directory`."""

    def __init__(self, directory: Path, tag: str, guest: str, port: int, host_key: str) -> None:
        self._directory = directory
        self._guest = guest
        self._port = int(port)
        self._child: Optional[asyncio.subprocess.Process] = None
        self._hung_up = False
        kind, key = host_key.split()[:2]
        self._run_file = directory / f"run.{tag}"
        self._status_file = directory / f"ended.{tag}"
        self._ssh_log = directory / f"ssh.{tag}"
        self._known_hosts = directory / f"known_hosts.{tag}"
        self._known_hosts.write_text(f"{guest} {kind} {key}\n")

    async def run(self, described: str, script: Path, arguments: str = "") -> int:
        """Run `script` in the guest as the batch system would run it; gives its exit status.

        `described` is what `run_file` made, `arguments` text for the job's shell. `ssh` is gone, and has said what it
        says by itself, when this returns or is given up. Raises VTorqueError (VT-CONNECT) when the connection fails.
        """
        self._describe(described, script, arguments)
        self._child = child = await asyncio.create_subprocess_exec(
            *self._command("-T", f"{RUNNER} {self._words()}"),
            stdin=asyncio.subprocess.PIPE,
            # a session of its own: the batch system signals the job's, and the guest is told by us
            start_new_session=True,
            preexec_fn=deaf(dies_with(os.getpid())),
        )
        try:
            return self._ended(await child.wait())
        finally:
            self._child = None
            await end_ssh(child, (signal.SIGKILL,))

    async def run_on_terminal(self, described: str, script: Optional[Path], arguments: str, terminal: Terminal) -> int:
        """Run `script`, or a login shell, on `terminal`; gives its exit status.

        Keys and sizes reach it through `ssh`, which is gone, and the terminal as it was found, when this returns or is
        given up. Raises VTorqueError (VT-CONNECT) when the connection fails.
        """
        self._describe(described, script, arguments)
        child = await asyncio.create_subprocess_exec(
            # by exec: the runner has to lead the terminal's session in the guest
            *self._command("-tt", f"exec {RUNNER} -i {self._words()}"),
            start_new_session=True,
            preexec_fn=dies_with(os.getpid()),
        )
        self._child = child
        if self._hung_up:  # while it was being started
            self.hang_up()
        try:
            return self._ended(await child.wait())
        finally:
            self._child = None
            await end_ssh(child)
            terminal.restore()

    def signal(self, sig: signal.Signals) -> None:
        """Pass a signal on to what runs in the guest: by the runner, or, where that has a terminal, by `hang_up`."""
        if self._child is not None and self._child.stdin is not None:
            self._child.stdin.write(f"{sig.name[3:]}\n".encode())

    def resized(self) -> None:
        """Tell `ssh` that its terminal has another size."""
        self._tell_ssh(signal.SIGWINCH)

    def hang_up(self) -> None:
        """Break the connection: what runs on the terminal in the guest is hung up, then killed."""
        self._hung_up = True
        self._tell_ssh(signal.SIGTERM)

    def _tell_ssh(self, sig: int) -> None:
        if self._child is not None:
            _tell(self._child, sig)

    def _describe(self, described: str, script: Optional[Path], arguments: str) -> None:
        """Write the file that the runner reads, and make sure that it has left no status yet."""
        self._status_file.unlink(missing_ok=True)
        values = {"VT_JOB_SCRIPT": "" if script is None else os.fspath(script), "VT_JOB_ARGUMENTS": arguments}
        lines = [f"{name}={shlex.quote(value)}\n" for name, value in values.items()]
        self._run_file.write_bytes(os.fsencode(described + "".join(lines)))

    def _words(self) -> str:
        return " ".join(shlex.quote(os.fspath(path)) for path in (self._run_file, self._status_file))

    def _ended(self, status: int) -> int:
        """The exit status of what ran in the guest, from that of `ssh`: where that failed, the runner's word counts."""
        if status != SSH_FAILED and status >= 0:
            return status
        try:
            return int(self._status_file.read_bytes()[:8]) & 0xFF
        except (OSError, ValueError):
            said = _last_line(self._ssh_log)
            raise VTorqueError(
                f"the connection to the guest {self._guest} failed or broke{': ' + said if said else ''}",
                code=Code.CONNECT,
            ) from None

    def _command(self, tty: str, command: str) -> list[str]:
        options = {
            "BatchMode": "yes",
            "StrictHostKeyChecking": "yes",
            "UserKnownHostsFile": self._known_hosts,
            "GlobalKnownHostsFile": "/dev/null",
            "HostKeyAlias": self._guest,
            "IdentityFile": self._directory / "key",
            "IdentitiesOnly": "yes",
            "IdentityAgent": "none",
            "ConnectTimeout": "60",
            "ServerAliveInterval": "30",
            "ServerAliveCountMax": "10",
            "EscapeChar": "none",
            "LogLevel": "ERROR",
            "ClearAllForwardings": "yes",
            "Port": self._port,
        }
        return [
            "ssh",
            "-F", "none",
            tty,
            "-E", os.fspath(self._ssh_log),
            *(word for name, value in options.items() for word in ("-o", f"{name}={value}")),
            "127.0.0.1",
            command,
        ]  # fmt: skip


def deaf(prepare: Callable[[], None]) -> Callable[[], None]:
    """What a child does before its program that SIGTERM is not to end: Slurm tells all processes of a job, whatever
    their session, and `ssh` has to stay until the script in the guest has been told. It leaves a signal ignored that it
    finds ignored (OpenSSH's clientloop.c).
    """

    def deaf() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        prepare()

    return deaf


async def end_ssh(
    child: asyncio.subprocess.Process, signals: Sequence[signal.Signals] = (signal.SIGTERM, signal.SIGKILL)
) -> None:
    """End `ssh` if it is still there: gently, so that it leaves its terminal in order, then surely."""
    for sig in signals:
        if child.returncode is not None:
            return
        _tell(child, sig)
        waiting = asyncio.ensure_future(child.wait())
        await asyncio.wait([waiting], timeout=SSH_SECONDS)


def _tell(child: asyncio.subprocess.Process, sig: int) -> None:
    """Send a signal to a child of ours, not by its own method: that one reaps a child that has just ended, and asyncio,
    which waits for it in a thread, then knows no status and says so on standard error (Popen.send_signal).
    """
    with contextlib.suppress(ProcessLookupError):
        os.kill(child.pid, sig)


def _last_line(log: Path) -> str:
    try:
        return log.read_text(errors="replace").strip().splitlines()[-1][:200]
    except (OSError, IndexError):
        return ""


def run_file(spec: Mapping[str, Any], environ: Mapping[str, str]) -> str:
    """Shell text that gives the guest's shell what the batch system gave this process: variables, umask, limits.

    A limit above what the guest allows stays at what the guest allows.
    """
    lines = [_export(name, value) for name, value in environ.items() if _is_passed(name)]
    lines.append("export PBS_NODEFILE=/run/vtorque/nodefile")
    umask = os.umask(0)
    os.umask(umask)
    lines.append(f"umask {umask:04o}")
    for option, limit in _LIMITS.items():
        for kind, value in zip("SH", resource.getrlimit(limit)):
            amount = "unlimited" if value == resource.RLIM_INFINITY else str(value // _UNITS.get(option, 1024))
            lines.append(f"ulimit -{kind}{option} {amount} 2>/dev/null || :")
    lines.append(f"cd {shlex.quote(spec['workdir'])} || exit 1")
    shell = spec["shell"] or pwd.getpwuid(os.getuid()).pw_shell or "/bin/sh"
    lines.append(f"export SHELL={shlex.quote(shell)}")
    lines.append(f"VT_JOB_SHELL={shlex.quote(shell)}")
    return "".join(line + "\n" for line in lines)


def _export(name: str, value: str) -> str:
    line = f"export {name}={shlex.quote(value)}"
    # a shell that keeps the variable for itself would end over it, unless `export` is made an ordinary command
    return f"command {line} 2>/dev/null || :" if name in _SHELLS_OWN else line


def _is_passed(name: str) -> bool:
    return bool(_NAME.fullmatch(name)) and name not in _NOT_PASSED and not name.startswith("BASH_FUNC_")
