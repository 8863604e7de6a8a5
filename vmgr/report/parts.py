"""What a node says of its part in a job: one attempt after the other, in a JSON file beside the job's log.

The agent writes the file, which belongs to root; the job's owner may read it. A part of another node comes as text over
the caller's own SSH. Whatever it says is checked here: it is shown, never acted upon.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Optional

VERSION = 1
SUFFIX = ".report.json"
"""After the job's id; beside its log."""
BEGINNING = b'{"v": 1, '
"""How each file begins."""
MAX_BYTES = 1 << 20
MAX_ATTEMPTS = 8
"""As many attempts of a job are kept, the newest ones."""
MAX_NODES = 100_000
MAX_SECONDS = 1e10

_HOST = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9.-]{0,252}[A-Za-z0-9])?")


class Moment(NamedTuple):
    """Something that was reached `t` seconds after the node's prologue hook started; `start` where it took time."""

    name: str
    t: float
    start: Optional[float] = None


class GuestPart(NamedTuple):
    """A guest, by its name, with its rank among all guests of the job."""

    name: str
    rank: int
    moments: tuple[Moment, ...]


class Part(NamedTuple):
    """One attempt on one node, number `node_index` of the job: 0 is the mother superior.

    `nodes` are those of the job, the mother superior first; only she names all of them, a sister only her.
    `key` is the attempt's on all nodes, empty when the node has not got so far. `began` is when its prologue hook
    started, in seconds since 1970 by the node's clock. `alive`: its agent lives, so more will come.
    """

    job_id: str
    key: str
    node: str
    node_index: int
    nodes: tuple[str, ...]
    user: str
    image: str
    vcpus: int
    ram_mib: int
    began: float
    state: str
    code: Optional[str]
    reason: Optional[str]
    job_status: Optional[int]
    stages: tuple[Moment, ...]
    guests: tuple[GuestPart, ...]
    alive: bool = False

    @property
    def is_over(self) -> bool:
        """Whether the agent has said its last word."""
        return any(stage.name == "gone" for stage in self.stages)


def read_parts(data: bytes) -> list[Part]:
    """The attempts in a file, oldest first. Raises ValueError for what is no such file, saying what is wrong.

    What a node says has `alive` beside the attempts: whether the agent of the last one lives.
    """
    try:
        tree = json.loads(data)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(tree, dict) or tree.get("v") != VERSION:
        raise ValueError(f"it is not of version {VERSION}")
    parts = [_part(_mapping(entry)) for entry in _list(tree.get("attempts"), MAX_ATTEMPTS)]
    if parts and tree.get("alive") is True:
        parts[-1] = parts[-1]._replace(alive=True)
    return parts


def _part(entry: Mapping[str, Any]) -> Part:
    status = entry.get("job_status")
    return Part(
        job_id=_text(entry.get("job_id")),
        key=_text(entry.get("key")),
        node=_text(entry.get("node")),
        node_index=int(_number(entry.get("node_index"))),
        nodes=tuple(_host(node) for node in _list(entry.get("nodes"), MAX_NODES)),
        user=_text(entry.get("user")),
        image=_text(entry.get("image")),
        vcpus=int(_number(entry.get("vcpus", 0))),
        ram_mib=int(_number(entry.get("ram_mib", 0))),
        began=_number(entry.get("began")),
        state=_text(entry.get("state")),
        code=_optional(entry.get("code")),
        reason=_optional(entry.get("reason")),
        job_status=None if status is None else int(_number(status)),
        stages=tuple(_moments(entry.get("stages"))),
        guests=tuple(
            GuestPart(_text(guest.get("name")), int(_number(guest.get("rank"))), tuple(_moments(guest.get("moments"))))
            for guest in map(_mapping, _list(entry.get("guests"), MAX_NODES))
        ),
    )


def _moments(value: object) -> Iterable[Moment]:
    for entry in map(_mapping, _list(value, 1000)):
        start = entry.get("start")
        yield Moment(_text(entry.get("name")), _number(entry.get("t")), None if start is None else _number(start))


def _mapping(value: object) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("an object is missing in it")
    return value


def _list(value: object, most: int) -> list[Any]:
    if not isinstance(value, list) or len(value) > most:
        raise ValueError("a list is missing in it, or too long")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("a text is missing in it")
    return value


def _host(value: object) -> str:
    """The name of a node, which may be asked for its own part."""
    if not _HOST.fullmatch(_text(value)):
        raise ValueError("a node's name is missing in it")
    return _text(value)


def _optional(value: object) -> Optional[str]:
    return None if value is None else _text(value)


def _number(value: object) -> float:
    if type(value) not in (int, float) or not math.isfinite(value) or abs(value) > MAX_SECONDS:  # type: ignore[arg-type]
        raise ValueError("a number is missing in it, or out of all bounds")
    return value  # type: ignore[return-value]
