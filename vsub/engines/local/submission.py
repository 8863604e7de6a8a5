"""What a user asked for and who they are, as values; everything in it has been checked."""

from __future__ import annotations

import dataclasses
import grp
import os
import pwd
from collections.abc import Mapping
from typing import Any, Optional

from vsub.engines.local import depend, options, protocol, resources
from vsub.engines.local.depend import Dependency
from vsub.engines.local.process import Identity
from vsub.engines.local.protocol import Refused

MAX_VARIABLES = 20000
MAX_PATH = 4096
MAX_TERM = 74
"""Longest name of a terminal type, as qsub cuts it."""
CONTROLS = 6
"""Control characters that travel with a terminal: INTR, QUIT, ERASE, KILL, EOF, SUSP."""


@dataclasses.dataclass(frozen=True)
class Account:
    """A user as the password database knows them."""

    name: str
    uid: int
    gid: int
    group: str
    groups: tuple[int, ...]
    home: str
    shell: str

    @classmethod
    def of(cls, uid: int) -> Account:
        """The account of a peer. Raises Refused as TORQUE does for root and for a uid without a name."""
        try:
            entry = pwd.getpwuid(uid)
        except KeyError:
            raise Refused(protocol.BAD_USER, f"User does not exist in server password file, uid {uid}") from None
        if entry.pw_uid == 0:
            raise Refused(protocol.BAD_USER, f"root user {entry.pw_name} not allowed")
        try:
            group = grp.getgrgid(entry.pw_gid).gr_name
        except KeyError:
            group = str(entry.pw_gid)
        groups = tuple(os.getgrouplist(entry.pw_name, entry.pw_gid))
        return cls(entry.pw_name, uid, entry.pw_gid, group, groups, entry.pw_dir, entry.pw_shell or "/bin/sh")

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Account:
        """Read the stored form, which only the daemon writes. Raises KeyError or TypeError."""
        return cls(**{**stored, "groups": tuple(stored["groups"])})

    @property
    def identity(self) -> Identity:
        """The rights of this user's processes."""
        return Identity(self.uid, self.gid, self.groups)


def _text(message: Mapping[str, Any], key: str, limit: int = MAX_PATH) -> str:
    value = message.get(key)
    if not protocol.is_text(value, limit):
        raise Refused(protocol.BAD_VALUE, f"{key} is not a text of up to {limit} bytes")
    return str(value)


def _absolute(message: Mapping[str, Any], key: str) -> str:
    value = _text(message, key)
    if not value.startswith("/"):
        raise Refused(protocol.BAD_VALUE, f"{key} is not an absolute path")
    return value


def _variables(value: object) -> dict[str, str]:
    if not isinstance(value, dict) or len(value) > MAX_VARIABLES:
        raise Refused(protocol.BAD_VALUE, "Variable_List")
    for name, text in value.items():
        if not (protocol.is_text(name, 1024) and options.valid_variable(name)):
            raise Refused(protocol.BAD_VALUE, "Variable_List: the name of a variable")
        if not protocol.is_text(text, 128 << 10):
            raise Refused(protocol.BAD_VALUE, f"Variable_List.{name}: longer than 131072 bytes or not a text")
    return dict(value)


def _resources(value: object) -> tuple[resources.Item, ...]:
    if not isinstance(value, list) or len(value) > 256:
        raise Refused(protocol.BAD_VALUE, "Resource_List")
    items: dict[str, str] = {}
    for item in value:
        if not (isinstance(item, list) and len(item) == 2 and all(protocol.is_text(part, 65536) for part in item)):
            raise Refused(protocol.BAD_VALUE, "Resource_List")
        try:
            name, text = resources.parse_item(item[0], item[1])
        except resources.ResourceError as error:
            code = protocol.BAD_VALUE if error.name in resources.NAMES else protocol.UNKNOWN_RESOURCE
            raise Refused(code, f"Resource_List.{error.name}: {error}") from error
        if name in resources.PATHS and not text.startswith("/"):
            raise Refused(protocol.BAD_VALUE, f"Resource_List.{name}: {text!r} is not an absolute path")
        items[name] = text
    return tuple(items.items())


def _whole(value: object, low: int, high: int, what: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise Refused(protocol.BAD_VALUE, f"{what} is not a number from {low} to {high}")
    return value


def _truth(message: Mapping[str, Any], key: str, default: bool) -> bool:
    value = message.get(key, default)
    if not isinstance(value, bool):
        raise Refused(protocol.BAD_VALUE, key)
    return value


def _depend(value: object) -> tuple[Dependency, ...]:
    if not isinstance(value, list) or len(value) > depend.MAX_DEPENDENCIES:
        raise Refused(protocol.BAD_VALUE, "depend")
    for item in value:
        if not (isinstance(item, list) and len(item) == 2 and all(protocol.is_text(part, 300) for part in item)):
            raise Refused(protocol.BAD_VALUE, "depend")
        if item[0] not in depend.TYPES:
            raise Refused(protocol.BAD_VALUE, f"depend: {item[0]!r}")
    return tuple((kind, job) for kind, job in value)


@dataclasses.dataclass(frozen=True)
class Terminal:
    """The terminal of an interactive job as qsub has it."""

    term: str
    size: tuple[int, int, int, int]
    """Rows, columns, and both in pixels."""
    controls: tuple[int, ...]

    @classmethod
    def read(cls, value: object) -> Terminal:
        """Check the part of a request. Raises Refused."""
        if not isinstance(value, dict):
            raise Refused(protocol.BAD_VALUE, "terminal")
        size, controls = value.get("size"), value.get("controls")
        if not (isinstance(size, list) and len(size) == 4 and isinstance(controls, list) and len(controls) == CONTROLS):
            raise Refused(protocol.BAD_VALUE, "terminal")
        rows, columns, width, height = (_whole(number, 0, 0xFFFF, "a size of the terminal") for number in size)
        characters = tuple(_whole(number, 0, 0xFF, "a control character") for number in controls)
        return cls(_text(value, "term", MAX_TERM), (rows, columns, width, height), characters)

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Terminal:
        """Read the stored form. Raises KeyError, TypeError or ValueError."""
        rows, columns, width, height = stored["size"]
        return cls(stored["term"], (rows, columns, width, height), tuple(stored["controls"]))


@dataclasses.dataclass(frozen=True)
class Submission:
    """What a user asked for, checked."""

    name: str
    account: str
    queue: str
    resources: tuple[resources.Item, ...]
    variables: dict[str, str]
    work_dir: str
    init_dir: Optional[str]
    output: str
    error: str
    join: str
    keep: str
    shell: Optional[str]
    umask: int
    arguments: str
    priority: int = 0
    rerunnable: bool = True
    held: bool = False
    execute_at: Optional[int] = None
    job_type: str = ""
    depend: tuple[Dependency, ...] = ()
    array: Optional[str] = None
    terminal: Optional[Terminal] = None
    command: Optional[str] = None

    @property
    def interactive(self) -> bool:
        """Whether the job has a terminal instead of output files."""
        return self.terminal is not None

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Submission:
        """Read the stored form, which only the daemon writes. Raises KeyError, TypeError or ValueError."""
        fields = dict(stored)
        fields["resources"] = tuple((name, value) for name, value in fields["resources"])
        fields["depend"] = tuple((kind, job) for kind, job in fields.get("depend", ()))
        if fields.get("terminal") is not None:
            fields["terminal"] = Terminal.from_json(fields["terminal"])
        return cls(**fields)

    @classmethod
    def read(cls, message: Mapping[str, Any]) -> Submission:
        """Check a request of the protocol, every part of it. Raises Refused."""
        name, queue, account = _text(message, "name"), _text(message, "queue"), _text(message, "account")
        if not options.valid_name(name):
            raise Refused(protocol.BAD_VALUE, f"Job_Name {name[:64]!r}")
        if not options.valid_word(queue) or not (account == "" or options.valid_word(account)):
            raise Refused(protocol.BAD_VALUE, "queue or Account_Name")
        join, keep = _text(message, "join"), _text(message, "keep")
        if join not in ("n", "oe", "eo") or keep not in ("n", "o", "e", "oe", "eo"):
            raise Refused(protocol.BAD_VALUE, "Join_Path or Keep_Files")
        terminal = None if message.get("terminal") is None else Terminal.read(message["terminal"])
        array = None if message.get("array") is None else _text(message, "array")
        if terminal is not None and array is not None:
            raise Refused(protocol.BAD_ARRAY, "interactive job can not be job array")
        job_type = "" if message.get("job_type") is None else _text(message, "job_type")
        if job_type and not options.valid_word(job_type):
            raise Refused(protocol.BAD_VALUE, "jobtype")
        when = message.get("execute_at")
        arguments = _text(message, "arguments", 4096)
        if "\n" in arguments:
            raise Refused(protocol.BAD_VALUE, "job_arguments")
        return cls(
            name=name,
            account=account,
            queue=queue,
            resources=_resources(message.get("resources")),
            variables=_variables(message.get("variables")),
            work_dir=_absolute(message, "work_dir"),
            init_dir=None if message.get("init_dir") is None else _absolute(message, "init_dir"),
            output=_absolute(message, "output"),
            error=_absolute(message, "error"),
            join=join,
            keep=keep,
            shell=None if message.get("shell") is None else _absolute(message, "shell"),
            umask=_whole(message.get("umask"), 0, 0o777, "umask"),
            arguments=arguments,
            priority=_whole(message.get("priority", 0), -1024, 1023, "Priority"),
            rerunnable=_truth(message, "rerunnable", True) and terminal is None,
            held=_truth(message, "held", False),
            execute_at=None if when is None else _whole(when, 0, 1 << 40, "Execution_Time"),
            job_type=job_type,
            depend=_depend(message.get("depend", [])),
            array=array,
            terminal=terminal,
            command=None if terminal is None or message.get("command") is None else _text(message, "command"),
        )
