"""How the node's program reaches a node: one stream on the standard input of a Python that the remote shell starts.

The stream is the length of what follows in twelve digits, then the program's sources with the order as JSON, then,
where the node needs them, the programs of an installation as a compressed tar. Nothing has to be on the node but
Python and the remote shell.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import shlex
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Optional

MODULES = (
    "vmgr",
    "vmgr.errors",
    "vmgr.trust",
    "vmgr.deploy",
    "vmgr.deploy.alarm",
    "vmgr.deploy.apply",
    "vmgr.deploy.files",
    "vmgr.deploy.hookfiles",
    "vmgr.deploy.manifest",
    "vmgr.deploy.moms",
    "vmgr.deploy.nodeside",
    "vmgr.deploy.places",
    "vmgr.deploy.slurmfiles",
    "vmgr.deploy.timer",
    "vmgr.deploy.tree",
    "vmgr.deploy.wants",
)
"""What runs on a node."""

DIGITS = 12
_START = (
    "import json,sys;PAYLOAD=json.loads(sys.stdin.buffer.read(int(sys.stdin.buffer.read({digits}))));"
    "exec(PAYLOAD['boot'])"
)


def remote_command(python: str) -> str:
    """The command line for the node's shell."""
    return shlex.join([python, "-IS", "-c", _START.format(digits=DIGITS)])


def head(order: Mapping[str, Any]) -> bytes:
    """The stream's beginning: length, sources, order."""
    modules = {name: _source(name) for name in MODULES}
    data = json.dumps({"boot": _source("vmgr.deploy.boot"), "modules": modules, "order": order}).encode()
    return f"{len(data):0{DIGITS}}".encode() + data


def _source(name: str) -> str:
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).read_text(encoding="utf-8")


def write_stream(stream: IO[bytes], order: Mapping[str, Any], tree: Optional[str] = None) -> None:
    """Write a whole stream; `tree` is the folder that is packed into it."""
    stream.write(head({**order, "has_tree": tree is not None}))
    if tree is not None:
        with gzip.GzipFile("", "wb", 1, stream) as packed, tarfile.open(fileobj=packed, mode="w|") as tar:
            tar.add(tree, arcname=".")


def ssh_command(environment: Mapping[str, str], remote: str) -> Sequence[str]:
    """The remote shell's command line; `$1` stands for the node, and is expanded by the shell that runs it.

    Options of the site's come from PDSH_SSH_ARGS (or the default of pdsh) and PDSH_SSH_ARGS_APPEND, with %h and %u as
    in pdsh (`src/modules/sshcmd.c` of pdsh 2.34). Nothing of
    root's is forwarded to a node because ssh_config(5) says so.
    """
    given = environment.get("PDSH_SSH_ARGS", "-a -x -l%u %h")
    words = shlex.split(f"{environment.get('PDSH_SSH_ARGS_APPEND', '')} {given}")
    if not any("%h" in word for word in words):
        words.append("%h")
    options = [
        "-o", "BatchMode=yes",
        "-o", "ConnectTimeout=10",
        "-o", "ServerAliveInterval=15",
        "-o", "ServerAliveCountMax=4",
        "-o", "ForwardAgent=no",
        "-o", "ForwardX11=no",
        "-o", "ClearAllForwardings=yes",
    ]  # fmt: skip
    return ["ssh", *options, *(word.replace("%u", "root") for word in words), remote]


def runner(environment: Mapping[str, str], python: str, stream: str) -> str:
    """A shell script that sends the stream to the node that is its only argument."""
    words = ssh_command(environment, remote_command(python))
    quoted = [" ".join('"$1"'.join(shlex.quote(part) if part else "" for part in word.split("%h")) for word in words)]
    return f"#!/bin/sh\nexec {quoted[0]} <{shlex.quote(stream)}\n"
