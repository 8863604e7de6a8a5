"""What a job's directory says of its progress: `status.<node>.json` from each node's agent, `result.json` at the end.

These are the user's own files: they are read bounded and tolerantly, and decide nothing but what the user
is told.
"""

from __future__ import annotations

import json
import os
import stat
from typing import Any, NamedTuple, Optional

_MAX_FILE = 64 * 1024
_MAX_NODES = 256
_MAX_STAGES = 64


class Stage(NamedTuple):
    """One stage that is done, and when: seconds since the node's hook was called."""

    name: str
    t: float


class NodeStatus(NamedTuple):
    """What one node's agent says. `disk` is the file of the job's persistent disk, on the first node."""

    node: str
    guest: str
    attempt: str
    state: str
    code: Optional[str]
    reason: Optional[str]
    stages: tuple[Stage, ...]
    doing: Optional[str] = None
    disk: Optional[str] = None


class Result(NamedTuple):
    """How the job ended, from its wrapper; `code` is set when it failed for a reason of ours."""

    status: int
    code: Optional[str]


def read_statuses(directory: str) -> list[NodeStatus]:
    """The status of every node that has one that can be read, by node name."""
    try:
        with os.scandir(directory) as entries:
            names = sorted(entry.name for entry in entries)
    except OSError:
        return []
    names = [name for name in names if name.startswith("status.") and name.endswith(".json")]
    found = []
    for name in names[:_MAX_NODES]:
        status = parse_status(_read(f"{directory}/{name}"))
        if status is not None:
            found.append(status)
    return found


def read_result(directory: str) -> Optional[Result]:
    """The job's result, or None while there is none."""
    return parse_result(_read(f"{directory}/result.json"))


def parse_status(data: bytes) -> Optional[NodeStatus]:
    """The status in a file, or None when it is none."""
    tree = _tree(data)
    if tree is None:
        return None
    stages = tree.get("stages")
    return NodeStatus(
        node=_text(tree.get("node")) or "",
        guest=_text(tree.get("guest")) or "",
        attempt=_text(tree.get("attempt")) or "",
        state=_text(tree.get("state")) or "",
        code=_text(tree.get("code")),
        reason=_text(tree.get("reason")),
        stages=tuple(_stages(stages)) if isinstance(stages, list) else (),
        doing=_text(tree.get("doing")),
        disk=_text(tree.get("disk")),
    )


def parse_result(data: bytes) -> Optional[Result]:
    """The result in a file, or None when it is none."""
    tree = _tree(data)
    if tree is None or type(tree.get("status")) is not int or not 0 <= tree["status"] <= 255:
        return None
    return Result(tree["status"], _text(tree.get("code")))


def _stages(items: list[Any]) -> list[Stage]:
    return [
        Stage(str(item["name"])[:64], float(item["t"]))
        for item in items[:_MAX_STAGES]
        if isinstance(item, dict)
        and isinstance(item.get("name"), str)
        and type(item.get("t")) in (int, float)
        and 0 <= item["t"] < 1e9
    ]


def _text(value: object) -> Optional[str]:
    return value[:4096] if isinstance(value, str) else None


def _tree(data: bytes) -> Optional[dict[str, Any]]:
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return tree if isinstance(tree, dict) and tree.get("v") == 1 else None


def _read(path: str) -> bytes:
    """The file's bytes; nothing when it is not a small regular file of ours to read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        info = os.fstat(descriptor)
        return os.read(descriptor, _MAX_FILE) if stat.S_ISREG(info.st_mode) and info.st_size <= _MAX_FILE else b""
    except OSError:
        return b""
    finally:
        os.close(descriptor)
