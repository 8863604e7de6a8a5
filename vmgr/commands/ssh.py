"""`vmgr ssh`, `exec` and `cp`: into a guest, over SSH with the job's own key and the guest's known host key."""

from __future__ import annotations

import asyncio
import os
import secrets
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Callable

import click

from vmgr.config import load_config
from vmgr.errors import Code, VTorqueError
from vmgr.node.process import dies_with
from vmgr.paths import installation
from vmgr.reach.target import Target, parse_remote_path, parse_target

if TYPE_CHECKING:
    from vmgr.reach.guestssh import Way

PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
MARK = "VTORQUE_EXEC"
"""The variable by which a command is found again in the guest, with all that it has started."""

_COMMAND = {"ignore_unknown_options": True, "allow_interspersed_args": False}
_SIGNAL = """\
for file in $(grep -l {mark} /proc/[0-9]*/environ 2>/dev/null); do
    file=${{file#/proc/}}
    kill -s {name} "${{file%/environ}}" 2>/dev/null
done
:"""
"""Sends a signal to every process that has the mark in its environment."""


@click.command(context_settings=_COMMAND)
@click.argument("guest", metavar="JOB[:RANK]")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def ssh(guest: str, command: tuple[str, ...]) -> int:
    """Log in to a guest of a job, or run a command there.

    You are the job's user there. A command line is run as ssh does it.

    Without a rank it is the guest in which the job's script runs. The exit status is that of the shell or the
    command, 255 when the connection fails.

    Example: vmgr ssh 12:1
    """
    target = parse_target(guest)
    if not command:
        with _way(target) as way:
            return _interactive(["ssh", "-t" if sys.stdin.isatty() else "-T", *way.options, "--", way.guest])
    return _run(target, f'"${{SHELL:-sh}}" -c {shlex.quote(" ".join(command))}')


@click.command("exec", context_settings=_COMMAND)
@click.argument("guest", metavar="JOB[:RANK]")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def exec_(guest: str, command: tuple[str, ...]) -> int:
    """Run a command in a guest of a job, without a terminal.

    It runs as the job's user, and its words stay as they are.

    Standard input, output and error are the command's, and so are INT, TERM, HUP, QUIT, USR1 and USR2. The exit status
    is the command's, 128+n when signal n ended it, 255 when the connection fails.

    Example: vmgr exec 12:1 -- uptime
    """
    return _run(parse_target(guest), shlex.join(command[1:] if command[0] == "--" else command))


@click.command()
@click.option("-r", "--recursive", is_flag=True, help="Folders with what is in them.")
@click.option("-p", "--preserve", is_flag=True, help="Keep times and modes.")
@click.argument("source", nargs=-1, required=True, metavar="SRC...")
@click.argument("target", metavar="DST")
def cp(source: tuple[str, ...], target: str, recursive: bool, preserve: bool) -> int:
    """Copy files between this machine and a guest.

    In the guest they are the job's user's.

    One side is JOB[:RANK]:PATH; a relative path begins at the user's home. A path of this machine that looks like one
    of a guest is written with a slash before its first colon (./12:x).

    Example: vmgr cp 12:/tmp/result .
    """
    words = [(path, parse_remote_path(path)) for path in (*source, target)]
    guests = {str(found[0]): found[0] for _, found in words if found is not None}
    ends = [found is not None for _, found in words]
    if len(guests) != 1 or len(set(ends[:-1])) != 1 or ends[0] == ends[-1]:
        raise VTorqueError(
            "either what is copied or where it is copied to is in a guest",
            code=Code.USAGE,
            hint="`vmgr cp FILE JOB:PATH` or `vmgr cp JOB:PATH FILE`",
        )
    options = [*(["-r"] if recursive else []), *(["-p"] if preserve else []), *_protocol()]
    with _way(next(iter(guests.values()))) as way:
        paths = [_local(path) if found is None else f"{way.guest}:{found[1]}" for path, found in words]
        return _interactive(["scp", *options, *way.options, "--", *paths])


def _local(path: str) -> str:
    """A path of this machine that scp takes for one."""
    return path if path.startswith("/") else f"./{path}"


def _protocol() -> list[str]:
    """The option by which scp speaks SFTP, which every guest does: OpenSSH has it from 8.7 on, by default from 9.0."""
    said = subprocess.run(["ssh", "-V"], stdin=subprocess.DEVNULL, capture_output=True, text=True).stderr
    version = said.partition("OpenSSH_")[2].split(".")[:2]
    try:
        number = (int(version[0]), int("".join(c for c in version[1][:2] if c.isdigit())))
    except (IndexError, ValueError):
        return []
    return ["-s"] if number >= (8, 7) else []


@contextmanager
def _way(target: Target) -> Iterator[Way]:
    from vmgr.reach.guestssh import files, way_to

    with files() as opened:
        yield asyncio.run(way_to(load_config(installation()), target, opened))


def _interactive(argv: Sequence[str]) -> int:
    """Run a program that has the terminal; keys are its own, other signals are passed on to it."""
    before = {sig: signal.signal(sig, signal.SIG_IGN) for sig in (signal.SIGINT, signal.SIGQUIT)}
    try:
        child = _start(argv, preexec_fn=_with_keys(dies_with(os.getpid())))
        with _handling(child.send_signal, (signal.SIGTERM, signal.SIGHUP)):
            return _status(child.wait())
    finally:
        for sig, handler in before.items():
            signal.signal(sig, handler)


def _with_keys(prepare: Callable[[], None]) -> Callable[[], None]:
    """What a child does last before its program, to which the keys' signals do what they always do."""

    def become() -> None:
        prepare()
        for sig in (signal.SIGINT, signal.SIGQUIT):
            signal.signal(sig, signal.SIG_DFL)

    return become


def _run(target: Target, command: str) -> int:
    """Run a command, written for the shell, in a guest; signals reach it and what it has started."""
    mark = f"{MARK}={secrets.token_hex(8)}"
    with _way(target) as way:

        def in_guest(script: str) -> list[str]:
            return ["ssh", "-T", *way.options, "--", way.guest, f"exec sh -c {shlex.quote(script)}"]

        def send(sig: int) -> None:
            quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            script = _SIGNAL.format(mark=mark, name=signal.Signals(sig).name[3:])
            sending.append(_start(in_guest(script), start_new_session=True, preexec_fn=dies_with(os.getpid()), **quiet))

        sending: list[subprocess.Popen[bytes]] = []
        # a session of its own: the keys' signals come to us alone, who pass them on; and a shell that stays in the
        # guest, which has not the mark, so that a signal's end of the command becomes its status
        child = _start(
            in_guest(f"env {mark} {command}; exit $?"), start_new_session=True, preexec_fn=dies_with(os.getpid())
        )
        with _handling(send):
            status = _status(child.wait())
        for each in sending:
            each.wait()
        return status


def _start(argv: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
    """Start a program that ends with this one. Raises VTorqueError (VT-CONNECT)."""
    try:
        return subprocess.Popen(list(argv), **options)
    except OSError as err:
        raise VTorqueError(f"cannot run {argv[0]}: {err.strerror}", code=Code.CONNECT) from None


@contextmanager
def _handling(send: Callable[[int], None], signals: Sequence[signal.Signals] = PASSED_ON) -> Iterator[None]:
    before = {sig: signal.signal(sig, lambda number, _: send(number)) for sig in signals}
    try:
        yield
    finally:
        for sig, handler in before.items():
            signal.signal(sig, handler)


def _status(status: int) -> int:
    """An exit status as a shell gives it."""
    return status if status >= 0 else 128 - status
