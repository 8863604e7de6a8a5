"""OpenSSH's options for one guest: the job's key, the guest's known host key, the way to it.

Nothing is written anywhere: the host key, and for root the job's key, are handed to `ssh` as files of this process's
that have no name, so this process has to live as long as `ssh`.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from vmgr.config import Config
from vmgr.errors import Code, VTorqueError
from vmgr.jobspec import parse_job_directory
from vmgr.node.keys import MAX_KEY_BYTES
from vmgr.node.user import User, look_up
from vmgr.node.userio import read_file
from vmgr.paths import installation
from vmgr.reach.agents import Reached, agent_of, ssh_port
from vmgr.reach.target import Target


class Way(NamedTuple):
    """How `ssh` gets into a guest: the guest's name, and options in the order of the command line."""

    guest: str
    options: tuple[str, ...]


@contextmanager
def files() -> Iterator[list[int]]:
    """Descriptors that are closed at the end."""
    opened: list[int] = []
    try:
        yield opened
    finally:
        for fd in opened:
            os.close(fd)


async def way_to(config: Config, target: Target, opened: list[int]) -> Way:
    """The way into the guest that is meant; what is opened for it is added to `opened`.

    Raises VTorqueError: as `agent_of`, VT-GUEST while the guest is not ready, VT-SPEC where root cannot read the key.
    """
    async with agent_of(config, target) as reached:
        member = reached.member or {}
        port = ssh_port(member)
        kind, key = _host_key(reached)
        user, identity = await _identity(config, reached, opened)
        name = str(member["name"])
        options = {
            "BatchMode": "yes",
            "StrictHostKeyChecking": "yes",
            "UserKnownHostsFile": _unnamed(f"{name} {kind} {key}\n".encode(), opened),
            "GlobalKnownHostsFile": "/dev/null",
            "HostKeyAlias": name,
            "UpdateHostKeys": "no",
            "IdentityFile": identity,
            "IdentitiesOnly": "yes",
            "IdentityAgent": "none",
            "ConnectTimeout": "60",
            "ServerAliveInterval": "30",
            "ServerAliveCountMax": "10",
            "LogLevel": "ERROR",
            "ClearAllForwardings": "yes",
            "User": user,
        }
        if reached.is_here:
            options.update(HostName="127.0.0.1", Port=str(port))
        else:
            rank = str(member["rank"])
            command = [f"{installation().prefix}/bin/vmgr", "agent-link", "--node", reached.node, "--ssh", rank]
            options["ProxyCommand"] = shlex.join([*command, reached.job_id]).replace("%", "%%")
    return Way(name, ("-F", "none", *(word for item in options.items() for word in ("-o", "=".join(item)))))


def _host_key(reached: Reached) -> tuple[str, str]:
    """Kind and key of the guest's host key, as its node's agent has made it. Raises VTorqueError (VT-GUEST)."""
    ssh: Any = reached.snapshot.get("ssh")
    words = str(ssh.get("host_key")).split() if isinstance(ssh, dict) else []
    if len(words) < 2 or not all(word.isascii() and word.isprintable() for word in words[:2]):
        raise VTorqueError("the guest is not ready", code=Code.GUEST, hint="`vmgr ps` shows how far it is")
    return words[0], words[1]


async def _identity(config: Config, reached: Reached, opened: list[int]) -> tuple[str, str]:
    """The job's user, and the path of the job's key for `ssh`: root gets a copy that was read as the user."""
    user, directory = str(reached.snapshot.get("user")), str(reached.snapshot.get("directory"))
    if parse_job_directory(directory) is None:
        raise VTorqueError(f"the node agent names no job directory: {directory[:200]!r}", code=Code.AGENT)
    path = f"{directory}/key"
    if os.geteuid() != 0:
        return user, path
    owner: User = look_up(user)
    data = await read_file(owner, path, limit=MAX_KEY_BYTES, timeout_s=config.timeouts.user_file)
    return user, _unnamed(data, opened)


def _unnamed(data: bytes, opened: list[int]) -> str:
    """A path, for children of this process, of a file without a name that holds `data` and is this user's alone."""
    fd = os.memfd_create("vtorque", os.MFD_CLOEXEC)
    opened.append(fd)
    os.fchmod(fd, 0o600)  # ssh takes no key that others could read
    os.write(fd, data)
    return f"/proc/{os.getpid()}/fd/{fd}"
