"""A job of the embedded batch system as a value: what was asked for, whose it is, how far it has come."""

from __future__ import annotations

import dataclasses
import enum
import grp
import os
import pwd
import re
import time
from collections.abc import Mapping
from typing import Any, Optional

from vsub.engines.local import options, protocol, resources
from vsub.engines.local.process import Identity, Mark
from vsub.engines.local.protocol import Refused

MAX_VARIABLES = 20000
MAX_PATH = 4096


class Phase(enum.Enum):
    """How far a job is; the value is what is stored."""

    QUEUED = "queued"
    PROLOGUE = "prologue"
    RUNNING = "running"
    EPILOGUE = "epilogue"
    DELIVERY = "delivery"
    COMPLETE = "complete"

    @property
    def letter(self) -> str:
        """The state as qstat shows it."""
        letters = {"queued": "Q", "prologue": "R", "running": "R", "complete": "C"}
        return letters.get(self.value, "E")


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

    @classmethod
    def read(cls, message: Mapping[str, Any]) -> Submission:
        """Check a request of the protocol, every part of it. Raises Refused."""
        name, queue, account = _text(message, "name"), _text(message, "queue"), _text(message, "account")
        if not options.valid_name(name):
            raise Refused(protocol.BAD_VALUE, f"Job_Name {name[:64]!r}")
        if not options.valid_word(queue) or not (account == "" or options.valid_word(account)):
            raise Refused(protocol.BAD_VALUE, "queue or Account_Name")
        join, keep, umask = _text(message, "join"), _text(message, "keep"), message.get("umask")
        if join not in ("n", "oe", "eo") or keep not in ("n", "o", "e", "oe", "eo"):
            raise Refused(protocol.BAD_VALUE, "Join_Path or Keep_Files")
        if not isinstance(umask, int) or isinstance(umask, bool) or not 0 <= umask <= 0o777:
            raise Refused(protocol.BAD_VALUE, "umask")
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
            umask=umask,
            arguments=arguments,
        )


@dataclasses.dataclass
class Job:
    """One job. Only the server and the attempt that it runs change it; every change of phase is stored."""

    id: str
    number: int
    owner: Account
    asked: Submission
    created: float
    phase: Phase = Phase.QUEUED
    exec_host: str = ""
    processors: int = 1
    cookie: str = ""
    attempts: int = 0
    requeues: int = 0
    script_started: bool = False
    session: int = 0
    started: Optional[float] = None
    used: dict[str, str] = dataclasses.field(default_factory=dict)
    exit_status: Optional[int] = None
    reason: str = ""
    completed: Optional[float] = None
    marks: list[Mark] = dataclasses.field(default_factory=list)

    def resource(self, name: str) -> Optional[str]:
        """The value of one item of the resource list."""
        return dict(self.asked.resources).get(name)

    @property
    def node_request(self) -> resources.NodeRequest:
        """What `-l nodes=` asked for; one node when it was not given."""
        return resources.NodeRequest.parse(self.resource("nodes") or "1")

    def resource_list(self) -> list[resources.Item]:
        """The list as the server completes it: as submitted, then what the server adds."""
        items = list(self.asked.resources)
        if self.resource("nodes") is None:
            items.append(("nodes", "1"))
        return [*items, ("neednodes", self.resource("nodes") or "1")]

    def output_name(self, stream: str) -> str:
        """Default name of an output file; `stream` is "o" or "e"."""
        return f"{self.asked.name}.{stream}{self.number}"

    def streams(self) -> tuple[str, ...]:
        """The output files that this job has."""
        return {"oe": ("o",), "eo": ("e",)}.get(self.asked.join, ("o", "e"))

    def to_json(self) -> dict[str, Any]:
        """The stored form."""
        stored = dataclasses.asdict(self)
        stored["phase"] = self.phase.value
        return stored

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Job:
        """Read the stored form, which only the daemon writes. Raises KeyError, TypeError or ValueError."""
        fields = dict(stored)
        owner, asked = dict(fields["owner"]), dict(fields["asked"])
        owner["groups"] = tuple(owner["groups"])
        asked["resources"] = tuple((name, value) for name, value in asked["resources"])
        fields["owner"], fields["asked"] = Account(**owner), Submission(**asked)
        fields["phase"] = Phase(fields["phase"])
        fields["marks"] = [Mark(*mark) for mark in fields["marks"]]
        return cls(**fields)


def full_id(text: str, server: str) -> Optional[str]:
    """The whole id for what a user typed, `5` or `5.host`; None when it is no id."""
    match = re.fullmatch(r"(\d{1,15})(?:\.[A-Za-z0-9._-]{1,255})?", text, re.ASCII)
    if match is None:
        return None
    short = server.partition(".")[0]
    given = text.partition(".")[2]
    if given not in ("", server, short):
        return text
    return f"{int(match[1])}.{server}"


def _with_name(path: str, name: str) -> str:
    return path + name if path.endswith("/") else path


def attributes(job: Job, server: str, host: str) -> list[tuple[str, str]]:
    """What `qstat -f` shows, in its order."""
    asked = job.asked
    shown = [
        ("Job_Name", asked.name),
        ("Job_Owner", f"{job.owner.name}@{host}"),
        *((f"resources_used.{name}", value) for name, value in job.used.items()),
        ("job_state", job.phase.letter),
        ("queue", asked.queue),
        ("server", server),
        ("Account_Name", asked.account),
        ("ctime", time.ctime(job.created)),
        ("Error_Path", f"{host}:{_with_name(asked.error, job.output_name('e'))}"),
        ("exec_host", job.exec_host),
        ("Join_Path", asked.join),
        ("Keep_Files", asked.keep),
        ("Output_Path", f"{host}:{_with_name(asked.output, job.output_name('o'))}"),
        *((f"Resource_List.{name}", value) for name, value in job.resource_list() if name != "neednodes"),
        ("session_id", str(job.session or "")),
        ("Shell_Path_List", asked.shell or ""),
        ("Variable_List", ",".join(f"{name}={value}" for name, value in asked.variables.items())),
        ("euser", job.owner.name),
        ("egroup", job.owner.group),
        ("umask", f"{asked.umask:04o}"),
        ("start_count", str(job.attempts or "")),
        ("start_time", time.ctime(job.started) if job.started else ""),
        ("exit_status", "" if job.exit_status is None else str(job.exit_status)),
        ("comment", job.reason),
        ("init_work_dir", asked.work_dir),
        ("comp_time", time.ctime(job.completed) if job.completed else ""),
    ]
    return [(name, value) for name, value in shown if value]
