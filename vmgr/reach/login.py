"""Connections to other nodes over the caller's own SSH.

What the caller's OpenSSH would do counts: `ssh -G` says host name, port, user, keys, proxy (ssh_config(5)). The host
key must be known, and nothing is asked: keys and the agent have to do. Whatever stands in the way is one clear line.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import shlex
import subprocess
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from vmgr.errors import Code, VTorqueError

if TYPE_CHECKING:
    import paramiko

_TOKEN = re.compile(r"%(.)")


def connect(node: str, timeout_s: float) -> paramiko.SSHClient:
    """A connection to `node` as the caller; each step of it may take `timeout_s`. Raises VTorqueError (VT-CONNECT)."""
    import logging

    import paramiko

    logging.getLogger("paramiko").setLevel(logging.CRITICAL + 1)  # what counts of it is said by us, in one line
    options = ssh_options(node, timeout_s)
    host, port = options["hostname"][0], int(options["port"][0])
    client = paramiko.SSHClient()
    client.set_missing_host_key_policy(paramiko.RejectPolicy())
    _load_known_hosts(client, options, host if port == 22 else f"[{host}]:{port}")
    keys: Any = [str(path) for path in map(_at_home, options.get("identityfile", [])) if path.is_file()]
    proxy = None
    watchdog = threading.Timer(timeout_s, client.close)  # all steps together
    watchdog.daemon = True
    watchdog.start()
    try:
        proxy = _proxy(options, node)
        client.connect(
            host,
            port,
            username=options["user"][0],
            key_filename=keys,
            allow_agent=options.get("identitiesonly") != ["yes"],
            look_for_keys=False,
            sock=proxy,
            timeout=timeout_s,
            banner_timeout=timeout_s,
            auth_timeout=timeout_s,
            channel_timeout=timeout_s,
        )
    except Exception as err:  # paramiko raises more kinds than it documents, for keys that it cannot read for instance
        client.close()
        if proxy is not None:
            proxy.close()
        raise _explained(node, host, err) from None
    finally:
        watchdog.cancel()
    return client


def _explained(node: str, host: str, err: Exception) -> VTorqueError:
    """What stands in the way to a node, as one line."""
    import paramiko

    where = f"node {node}" if host == node else f"node {node} ({host})"
    text, hint = f"{where} cannot be reached: {reason(err)}", f"does `ssh {node}` work from here?"
    if isinstance(err, paramiko.BadHostKeyException):
        text, hint = f"{where} shows another host key than the one that you know", "ask the administrator"
    elif isinstance(err, paramiko.SSHException) and "not found in known_hosts" in str(err):
        text, hint = f"the host key of {where} is not known to you", f"`ssh {node}` shows and keeps it"
    elif isinstance(err, paramiko.AuthenticationException) or "No authentication methods" in str(err):
        text = f"{where} refuses your login by key"
        hint = f"the site may forbid logins to its nodes; does `ssh -o BatchMode=yes {node} true` work?"
    return VTorqueError(text, code=Code.CONNECT, hint=hint)


def reason(err: Exception) -> str:
    """What an exception says, in a few words."""
    return (getattr(err, "strerror", None) or str(err) or type(err).__name__)[:300]


def ssh_options(node: str, timeout_s: float) -> dict[str, list[str]]:
    """What OpenSSH's configuration says of a node for the caller, by option. Raises VTorqueError (VT-CONNECT)."""
    try:
        done = subprocess.run(
            ["ssh", "-G", "--", node], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout_s
        )
    except (OSError, subprocess.TimeoutExpired) as err:
        raise VTorqueError(f"cannot ask ssh how to reach {node}: {err}", code=Code.CONNECT) from None
    options: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        name, _, value = line.partition(" ")
        options.setdefault(name, []).append(value)
    port = options.get("port", [""])[0]
    if done.returncode or "hostname" not in options or "user" not in options or not port.isdigit():
        said = done.stderr.strip().splitlines()
        raise VTorqueError(
            f"ssh does not know how to reach {node}{': ' + said[-1] if said else ''}",
            code=Code.CONNECT,
            hint="see ~/.ssh/config",
        )
    return options


def _at_home(path: str) -> Path:
    """A path in the caller's home, as the name service knows it: as OpenSSH does, not by HOME, which sudo may keep."""
    return Path(pwd.getpwuid(os.geteuid()).pw_dir, path[2:]) if path.startswith("~/") else Path(path)


def _proxy(options: dict[str, list[str]], node: str) -> Optional[paramiko.ProxyCommand]:
    """The program that the configuration puts between, if it does."""
    import paramiko

    host, port, user = (options[name][0] for name in ("hostname", "port", "user"))
    command = options.get("proxycommand", ["none"])[0]
    jump = options.get("proxyjump", ["none"])[0]
    if command == "none" and jump != "none":
        command = shlex.join(_jump(jump, host, port))
    elif command != "none":
        known = {"%": "%", "h": host, "p": port, "r": user, "n": node}
        command = _TOKEN.sub(lambda token: known.get(token[1], token[0]), command.removeprefix("exec "))
    return paramiko.ProxyCommand(command) if command != "none" else None


def _jump(jump: str, host: str, port: str) -> list[str]:
    """`ssh` over the last of the hosts to jump over, which goes over the others (ssh(1), `-J`)."""
    *before, last = jump.split(",")
    over = ["-J", ",".join(before)] if before else []
    return ["ssh", "-o", "BatchMode=yes", *over, "-W", f"[{host}]:{port}", "--", f"ssh://{last}"]


def _load_known_hosts(client: paramiko.SSHClient, options: dict[str, list[str]], name: str) -> None:
    """Let the client know the host keys that the caller knows; those of a `HostKeyAlias` as those of `name`."""
    alias = options.get("hostkeyalias", ["none"])[0]
    entries: list[Any] = []
    revoked: set[str] = set()
    for setting in ("userknownhostsfile", "globalknownhostsfile"):
        for path in map(_at_home, options.get(setting, [""])[0].split()):
            with contextlib.suppress(OSError):
                text = path.read_text(errors="replace")
                entries += _entries(text)
                revoked |= _revoked(text)
    known: Any = client._system_host_keys  # type: ignore[attr-defined]
    known._entries = [entry for entry in entries if entry.key.get_base64() not in revoked]
    for kind, key in (known.lookup(alias) or {}).items() if alias != "none" else ():
        client.get_host_keys().add(name, kind, key)


def _entries(text: str) -> list[Any]:
    """The keys in a file of known hosts (sshd(8)): paramiko's own reader gives up at a line with a mark, or a broken
    one. Those of authorities, which are marked, are none of a host's."""
    import paramiko
    from paramiko.hostkeys import HostKeyEntry, InvalidHostKey

    found = []
    for line in map(str.strip, text.splitlines()):
        if line and line[0] not in "#@":
            with contextlib.suppress(paramiko.SSHException, InvalidHostKey, ValueError):
                entry = HostKeyEntry.from_line(line)
                found += [] if entry is None else [entry]
    return found


def _revoked(text: str) -> set[str]:
    """The keys, in base64, that a file of known hosts says are none any more."""
    marked = (line.split() for line in text.splitlines() if line.lstrip().startswith("@revoked"))
    return {fields[3] for fields in marked if len(fields) > 3}
