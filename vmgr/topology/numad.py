"""Advice of `numad` on which NUMA nodes guests should sit: `numad -w NCPUS:MB` (numad(8)).

Seen with 0.5+20150602 (Debian 12). It prints the nodes as a list and a newline. Where its daemon runs, that answers at
once, or never when it is stopped; else the program itself watches the machine for 2 s first. It needs root. It leaves
two lines a call in /var/log/numad.log, which its package rotates, and one empty System V message queue, the same for
all calls, with key 0xdeadbeef. The queue is the daemon's too, so it is not removed here.
"""

from __future__ import annotations

import asyncio
import shutil
from typing import Optional

from vmgr.logs import LOGGER
from vmgr.topology.cpulist import parse_cpus

PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
MAX_OUTPUT = 4096
_MAX_NUMBER = (1 << 31) // 100 - 1
"""numad counts CPUs in hundredths, in 32 bits."""


def is_installed() -> bool:
    """Whether this node has numad."""
    return _program() is not None


def _program() -> Optional[str]:
    return shutil.which("numad", path=PATH)


async def advise(vcpus: int, ram_mib: int, *, timeout_s: float) -> Optional[frozenset[int]]:
    """The nodes that numad advises for so many vCPUs and so much RAM, those of all guests together.

    None, with the reason in the log, when it is not installed, fails, says nothing sensible, or is not done in time; it
    is gone then.
    """
    program = _program()
    if program is None:
        _warn("is not installed")
        return None
    child = await asyncio.create_subprocess_exec(
        program,
        "-w", f"{min(vcpus, _MAX_NUMBER)}:{min(ram_mib, _MAX_NUMBER)}",
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env={"PATH": PATH, "LC_ALL": "C"},
    )  # fmt: skip
    try:
        said = await asyncio.wait_for(_output(child), timeout_s)
    except asyncio.TimeoutError:
        _warn(f"has not answered in {timeout_s:g} s")
        return None
    finally:
        if child.returncode is None:
            child.kill()
            await child.communicate()  # a pipe that is full would keep `wait` waiting
    if child.returncode and len(said) <= MAX_OUTPUT:
        _warn(f"ended with status {child.returncode}")
        return None
    nodes = parse_advice(said)
    if nodes is None:
        _warn(f"said {said[:80]!r}")
    return nodes


def parse_advice(said: bytes) -> Optional[frozenset[int]]:
    """The nodes in numad's answer, `0-1,3` and a newline; None when it names none, or is something else."""
    if len(said) > MAX_OUTPUT:
        return None
    nodes = parse_cpus(said.decode("ascii", "replace").strip())
    return nodes or None


async def _output(child: asyncio.subprocess.Process) -> bytes:
    """What the program prints until it ends, or until that is too much."""
    said = b""
    while child.stdout is not None and len(said) <= MAX_OUTPUT:
        part = await child.stdout.read(MAX_OUTPUT)
        if not part:
            await child.wait()
            break
        said += part
    return said


def _warn(reason: str) -> None:
    LOGGER.warning("numad %s: guests are placed without its advice", reason)
