"""What a job asks of its nodes: `nodes=`, `procs=`, `ncpus=`, `-L tasks=` and memory, as a structure.

The forms are TORQUE's (qsub(1B), pbs_resources(7B)); everything that is not a number of nodes or processors is kept
as it is written, so that what is written back differs from what was read only where it was meant to.
"""

from __future__ import annotations

import re
from typing import NamedTuple, Optional

from vmgr.errors import Code, VTorqueError
from vmgr.units import parse_count
from vsub.attributes import read_attributes
from vsub.options import SBATCH, Option
from vsub.resources import Resource, last_of, read_resources

MEMORY = ("mem", "pmem", "vmem", "pvmem")
"""Resources that bound a job's memory: of the job, of a process, and the same as virtual memory."""

_SIZE = r"([0-9]{1,15})([kmgtp]?)([bw]?)"
_SHIFT = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50}
_PPN = r"ppn=([0-9]{1,6})"


class Chunk(NamedTuple):
    """One part of `nodes=`: `head` is a number of nodes, a host or a property; `words` are what follows it."""

    head: str
    words: tuple[str, ...]

    @property
    def number(self) -> int:
        """Nodes of this kind."""
        count = parse_count(self.head)
        return 1 if count is None else count

    @property
    def ppn(self) -> Optional[int]:
        """Processors on each node, None when nobody said."""
        found = [re.fullmatch(_PPN, word) for word in (self.head, *self.words)]
        return next((int(match[1]) for match in found if match), None)

    def with_ppn(self, ppn: int) -> Chunk:
        """The same nodes with `ppn` processors on each."""
        word = f"ppn={ppn}"
        if self.ppn is None:
            return self._replace(words=(word, *self.words))
        words = [word if re.fullmatch(_PPN, old) else old for old in (self.head, *self.words)]
        return Chunk(words[0], tuple(words[1:]))

    def __str__(self) -> str:
        return ":".join((self.head, *self.words))


class Nodes(NamedTuple):
    """The value of `nodes=`: its parts, and the suffix for all of them (`#shared`)."""

    chunks: tuple[Chunk, ...]
    suffix: str

    def __str__(self) -> str:
        return "+".join(map(str, self.chunks)) + self.suffix

    @property
    def number(self) -> int:
        return sum(chunk.number for chunk in self.chunks)


class Tasks(NamedTuple):
    """One `-L tasks=…`: the number of tasks and the settings of each, in order (value None: a word alone)."""

    number: int
    settings: tuple[tuple[str, Optional[str]], ...]

    def setting(self, name: str) -> Optional[str]:
        return next((value for key, value in self.settings if key == name), None)

    def with_setting(self, name: str, value: str) -> Tasks:
        if self.setting(name) is None:
            return self._replace(settings=(*self.settings, (name, value)))
        return self._replace(settings=tuple((key, value if key == name else old) for key, old in self.settings))

    def __str__(self) -> str:
        words = [f"tasks={self.number}"]
        words += [key if value is None else f"{key}={value}" for key, value in self.settings]
        return ":".join(words)


class Given(NamedTuple):
    """An amount that the user gave, as it was written and where: `ppn=2 (job.sh line 3)`."""

    amount: int
    text: str


class HostRequest(NamedTuple):
    """What a job asks of its nodes.

    `form` says how the processors are asked for: `nodes`, `procs`, `ncpus`, `tasks`, or `open` when they are not.
    `nodes` is the nodes in every form. `option` is the option that says so. `memory` holds the amounts given, in
    bytes, by resource.
    """

    form: str
    nodes: Nodes
    tasks: Optional[Tasks]
    option: Optional[Option]
    memory: dict[str, Given]

    @property
    def cores(self) -> Optional[Given]:
        """The processors on the node that has the fewest, None when nobody said."""
        given = [chunk.ppn for chunk in self.nodes.chunks if chunk.ppn is not None]
        if not given or self.option is None:
            return None
        if self.option.letter == SBATCH:
            return Given(min(given), f"{self.option} ({self.option.source})")
        word = {"nodes": "ppn", "tasks": "lprocs"}.get(self.form, self.form)
        return Given(min(given), f"{word}={min(given)} ({self.option.source})")


def read_host_request(options: tuple[Option, ...]) -> HostRequest:
    """The request in `-l` and `-L`. Raises VTorqueError (VT-USAGE, VT-OPTION) for what no guest job can ask for."""
    wanted = last_of(read_resources(options))
    memory = {name: _memory(wanted[name]) for name in MEMORY if name in wanted}
    tasks = [option for option in options if option.letter == "L"]
    forms = [name for name in ("nodes", "procs", "ncpus") if name in wanted]
    if len(forms) + len(tasks) > 1:
        names = [str(wanted[name].option) for name in forms] + [str(option) for option in tasks]
        raise VTorqueError(
            f"{' and '.join(names)} cannot both be honoured in a guest job", code=Code.OPTION, hint="say nodes=N:ppn=M"
        )
    if tasks:
        return _of_tasks(tasks[0], memory)
    if not forms:
        return HostRequest("open", _one_node(None), None, None, memory)
    item = wanted[forms[0]]
    if forms == ["nodes"]:
        return HostRequest("nodes", parse_nodes(item.value, item.option), None, item.option, memory)
    return HostRequest(forms[0], _one_node(_count(item.value, item)), None, item.option, memory)


def chooses_node_access(options: tuple[Option, ...]) -> bool:
    """Whether the user says who may share the nodes: `-l naccesspolicy=` or `-W x=naccesspolicy:`."""
    if any(item.name == "naccesspolicy" for item in read_resources(options)):
        return True
    return any(item.name == "x" and "naccesspolicy" in item.value.lower() for item in read_attributes(options))


def parse_nodes(text: str, option: Option) -> Nodes:
    """The value of `nodes=`. Raises VTorqueError (VT-USAGE)."""
    body, mark, suffix = text.partition("#")
    chunks = tuple(Chunk(head, tuple(words)) for head, *words in (part.split(":") for part in body.split("+")))
    for chunk in chunks:
        numbers = [word for word in (chunk.head, *chunk.words) if word.startswith("ppn")]
        if chunk.head.isdigit() and parse_count(chunk.head) is None:
            raise VTorqueError(
                f"nodes={text} ({option.source}) cannot be read: {chunk.head[:20]} is no number of nodes",
                code=Code.USAGE,
                hint="write nodes=N:ppn=M",
            )
        if not all((chunk.head, *chunk.words)) or chunk.number < 1 or chunk.ppn == 0 or len(numbers) > 1 or (
            numbers and chunk.ppn is None
        ):  # fmt: skip
            raise VTorqueError(
                f"nodes={text} ({option.source}) cannot be read: {str(chunk)!r}",
                code=Code.USAGE,
                hint="write nodes=N:ppn=M or nodes=HOST:ppn=M, several joined by +",
            )
    return Nodes(chunks, mark + suffix)


def parse_tasks(text: str) -> Optional[Tasks]:
    """The value of one `-L`; None when it is none."""
    first, *words = text.split(":")
    name, _, number = first.partition("=")
    count = parse_count(number)
    if name != "tasks" or not count or not all(words):
        return None
    pairs = [word.partition("=") for word in words]
    return Tasks(count, tuple((key, value if equals else None) for key, equals, value in pairs))


def parse_size(text: str) -> Optional[int]:
    """The bytes in a size as TORQUE writes it: `N[k|m|g|t|p][b|w]`, a word being 8 bytes; None when it is none."""
    match = re.fullmatch(_SIZE, text, re.IGNORECASE)
    if match is None:
        return None
    return (int(match[1]) << _SHIFT[match[2].lower()]) * (8 if match[3].lower() == "w" else 1)


def _of_tasks(option: Option, memory: dict[str, Given]) -> HostRequest:
    tasks = parse_tasks(option.value or "")
    if tasks is None:
        raise VTorqueError(f"illegal -L value {option.value!r} ({option.source})", code=Code.USAGE, hint="tasks=N[:…]")
    if tasks.number != 1:
        raise VTorqueError(
            f"{option} ({option.source}) cannot be honoured in a guest: tasks may share a node",
            code=Code.OPTION,
            hint="say -l nodes=N:ppn=M",
        )
    lprocs, size = tasks.setting("lprocs"), tasks.setting("memory")
    cores = None if lprocs in (None, "all") else parse_count(lprocs or "")
    bytes_ = None if size is None else parse_size(size)
    if (cores is None and lprocs not in (None, "all")) or cores == 0 or (bytes_ is None and size is not None):
        raise VTorqueError(f"{option} ({option.source}) cannot be read", code=Code.USAGE, hint="lprocs=N, memory=SIZE")
    if bytes_ is not None:
        memory = {**memory, "memory": Given(bytes_, f"memory={size} ({option.source})")}
    return HostRequest("tasks", _one_node(cores), tasks, option, memory)


def _one_node(ppn: Optional[int]) -> Nodes:
    return Nodes((Chunk("1", () if ppn is None else (f"ppn={ppn}",)),), "")


def _count(text: str, item: Resource) -> int:
    number = parse_count(text)
    if not number:
        raise VTorqueError(
            f"{item.name}={text} ({item.option.source}) cannot be read",
            code=Code.USAGE,
            hint="a number from 1 is needed",
        )
    return number


def _memory(item: Resource) -> Given:
    size = parse_size(item.value)
    if size is None:
        raise VTorqueError(
            f"{item.name}={item.value} ({item.option.source}) cannot be read", code=Code.USAGE, hint="such as 2gb"
        )
    return Given(size, f"{item.name}={item.value} ({item.option.source})")
