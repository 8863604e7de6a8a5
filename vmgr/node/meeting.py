"""How the nodes of a job meet: in the job directory, in files that are written whole, once, with the user's rights.

    nodes.<key>/<kind>.<i>   what node i says of itself: `ready`, `failed`, `gone`, `stopped-<try>`, … (JSON)
    job.<key>/<order>        what the mother superior says to all: `hosts` (JSON), `over`, `stop-<try>`, …

A node never looks a name up that may not be there yet, because an NFS client remembers for up to 30 s (acdirmin,
nfs(5)) that it was not. It makes the folder itself and lists it; opening a folder makes the client ask the server
whether it has changed. inotify tells at once of what this machine writes, and nothing of what others do, so the
folder is listed again after a while. Only the mother superior lists what all nodes say, and what an event tells of it
opens without listing, so that what it does grows as the number of nodes.

Whatever is read here is the user's word.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import select
import stat
import struct
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple, Optional

from inotify_simple import INotify, flags

from vmgr.errors import Code, VTorqueError
from vmgr.jobspec import MAX_PER_NODE
from vmgr.node.user import User
from vmgr.node.userchild import write_all
from vmgr.node.userio import Stream, read_stream, write_in_folder

UP, READY, FAILED, GONE = "up", "ready", "failed", "gone"
STOPPED, SAVED = STEPS = ("stopped", "saved")
"""What a sister has done for a suspension of the job."""
HOSTS, OVER = "hosts", "over"
STOP, SAVE, GO_ON = "stop", "save", "goon"
"""What the sisters are to do for it."""
TRIES = range(1, 17)
"""The numbers of the tries to suspend a job of several nodes: each of them leaves files."""
MAX_REPORT_BYTES = 64 * 1024
MAX_ORDER_BYTES = 1 << 20
MAX_ENTRIES_PER_NODE = 64
MAX_OUTPUT_CHARS = 4096
MAX_REASON_CHARS = 1000
MAX_NAME_CHARS = 255
MAX_IMAGE_CHARS = 96
LEADER_LOOKS_AGAIN_SECONDS = 0.5
SISTER_LOOKS_AGAIN_SECONDS = 2.0


def of_try(what: str, number: int) -> str:
    """How a step, or an order, of a try to suspend the job is called."""
    return f"{what}-{number}"


KINDS = (UP, READY, FAILED, GONE, *(of_try(step, number) for step in STEPS for number in TRIES))
ORDERS = (HOSTS, OVER, *(of_try(order, number) for order in (STOP, SAVE, GO_ON) for number in TRIES))
_WITH_WORDS = (HOSTS, OVER)

_TEXTS = {
    "code": slice(64), "reason": slice(MAX_REASON_CHARS), "output": slice(-MAX_OUTPUT_CHARS, None),
    "resumed": slice(96), "image": slice(MAX_IMAGE_CHARS),
}  # fmt: skip
_OF_TRIES = tuple(f"{step}-" for step in STEPS)
_READ = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
_HEAD = struct.Struct(">HI")
_NAME = re.compile(rf"({'|'.join(KINDS)})\.([0-9]{{1,6}})", re.ASCII)


class Report(NamedTuple):
    """What a node says of itself; `node` is its place among the nodes of the job."""

    kind: str
    node: int
    data: dict[str, Any]


def nodes_folder(directory: str, key: str) -> str:
    return f"{directory}/nodes.{key}"


def job_folder(directory: str, key: str) -> str:
    return f"{directory}/job.{key}"


async def report(
    user: User, directory: str, key: str, kind: str, index: int, data: dict[str, Any], *, timeout_s: float
) -> None:
    """Say something of node `index`, with the user's rights. Raises VTorqueError (VT-SPEC)."""
    text = json.dumps({"v": 1, **kept(data)}, ensure_ascii=False).encode(errors="replace")
    await write_in_folder(user, nodes_folder(directory, key), f"{kind}.{index}", text, timeout_s=timeout_s)


async def call(user: User, directory: str, key: str, order: str, text: bytes = b"", *, timeout_s: float) -> None:
    """Say one of ORDERS to all nodes, with the user's rights. Raises VTorqueError (VT-SPEC)."""
    await write_in_folder(user, job_folder(directory, key), order, text, timeout_s=timeout_s)


async def reports(directory: str, key: str, *, user: User, nodes: int, inotify: bool = True) -> AsyncIterator[Report]:
    """What the nodes say, each kind of each node once, as it comes. What is no report is passed over."""
    watch = Watch(
        nodes_folder(directory, key),
        MAX_REPORT_BYTES,
        LEADER_LOOKS_AGAIN_SECONDS,
        MAX_ENTRIES_PER_NODE * nodes,
        inotify,
    )
    frames = await read_stream(user, watch.run)
    try:
        while True:
            frame = await _next_frame(frames, MAX_REPORT_BYTES)
            if frame is None:
                return
            found = parse_report(*frame)
            if found is not None and found.node < nodes:
                yield found
    finally:
        await frames.close()


def parse_report(name: str, data: bytes) -> Optional[Report]:
    """The report in a file of this name; None for anything that is none."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    tree = _parse_object(data)
    return None if tree is None else Report(match[1], int(match[2]), tree)


def _parse_object(data: bytes) -> Optional[dict[str, Any]]:
    """The object in a text of JSON; None for anything else."""
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return tree if isinstance(tree, dict) else None


def kept(data: dict[str, Any]) -> dict[str, Any]:
    """What a report says of all that is asked for, no longer than it may be.

    So that what is written is never cut where it is read, and what all nodes say, which the user may have written, has
    room in the memory of root's.
    """
    found: dict[str, Any] = {word: data[word][part] for word, part in _TEXTS.items() if isinstance(data.get(word), str)}
    addresses, ports = data.get("addresses"), data.get("ssh_ports")
    if isinstance(addresses, list) and len(addresses) <= MAX_PER_NODE:
        found["addresses"] = [text[:MAX_NAME_CHARS] for text in addresses if isinstance(text, str)]
    if isinstance(ports, dict) and len(ports) <= MAX_PER_NODE:
        good = {name: port for name, port in ports.items() if type(port) is int and 0 < port < 1 << 16}
        found["ssh_ports"] = {name[:MAX_NAME_CHARS]: port for name, port in good.items()}
    return found


def parse_failure(data: dict[str, Any], node: str) -> Optional[VTorqueError]:
    """The failure of a node that a report tells of; None where it tells of none."""
    if not data.get("code"):
        return None
    code = Code.named(data["code"])
    problem = VTorqueError(
        f"{node}: {str(data.get('reason'))[:MAX_REASON_CHARS]}",
        code=code if code.status >= Code.INTERNAL.status or code is Code.SUSPEND else Code.INTERNAL,
    )
    problem.output = str(data.get("output") or "")[-MAX_OUTPUT_CHARS:]
    return problem


class Barrier:
    """On the mother superior: what `nodes`, by their names, have said so far, and waiting for what they will say."""

    def __init__(self, directory: str, key: str, *, user: User, nodes: list[str], inotify: bool = True) -> None:
        self._nodes = nodes
        self._said: dict[str, dict[int, dict[str, Any]]] = {kind: {} for kind in (UP, READY, FAILED, GONE)}
        self._try = 0
        self._changed = asyncio.Event()
        self._listening = asyncio.ensure_future(
            self._listen(reports(directory, key, user=user, nodes=len(nodes), inotify=inotify))
        )

    async def all_ready(self) -> list[dict[str, Any]]:
        """Wait until every node is ready; gives what they say, by node.

        Raises VTorqueError, the first failure that a node tells of, as soon as it does.
        """
        return await self._all(READY)

    async def all_up(self) -> list[dict[str, Any]]:
        """Wait until every node has told its guests' addresses; gives what they say, and raises, as `all_ready`."""
        return await self._all(UP)

    async def failure(self) -> None:
        """Wait until a node tells of a failure, and raise it as a VTorqueError."""
        await self._all(FAILED)

    async def all_gone(self, timeout_s: float) -> list[VTorqueError]:
        """Wait, no longer than `timeout_s`, until nothing is left on any sister; what they say went wrong there."""
        sisters = range(1, len(self._nodes))
        waiting = asyncio.ensure_future(self._all(GONE, first=1, fails=False))
        await asyncio.wait([waiting], timeout=timeout_s)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        found = (parse_failure(self._said[GONE].get(index, {}), self._nodes[index]) for index in sisters)
        return [problem for problem in found if problem is not None]

    def begin_try(self, number: int) -> None:
        """Hear what is said of this try to suspend the job, and of no other."""
        self._try = number
        for kind in list(self._said):
            if kind.startswith(_OF_TRIES):
                del self._said[kind]

    async def all_have(self, step: str) -> None:
        """Wait until every sister has done this one of STEPS in the present try.

        Raises VTorqueError (VT-SUSPEND) as soon as one says why it cannot, and the failure of a node.
        """
        kind = of_try(step, self._try)
        while True:
            changed = self._changed
            self._raise_failure()
            said = self._said.get(kind, {})
            for index, data in said.items():
                if data.get("reason"):
                    raise VTorqueError(f"{self._nodes[index]}: {data['reason']}", code=Code.SUSPEND)
            if all(index in said for index in range(1, len(self._nodes))):
                return
            await changed.wait()

    async def close(self) -> None:
        """Stop listening; nothing is left running."""
        self._listening.cancel()
        await asyncio.gather(self._listening, return_exceptions=True)

    def _raise_failure(self) -> None:
        for index, data in self._said[FAILED].items():
            name = self._nodes[index]
            raise parse_failure(data, name) or VTorqueError(f"{name}: failed", code=Code.INTERNAL)

    async def _all(self, kind: str, *, first: int = 0, fails: bool = True) -> list[dict[str, Any]]:
        """What the nodes from `first` on say of this kind, once all of them have."""
        said, indexes = self._said[kind], range(first, len(self._nodes))
        missing = list(indexes)
        while True:
            changed = self._changed
            if fails:
                self._raise_failure()
            while missing and missing[-1] in said:
                missing.pop()
            if not missing:
                return [said[index] for index in indexes]
            await changed.wait()

    async def _listen(self, coming: AsyncIterator[Report]) -> None:
        async for found in coming:
            kind = found.kind
            if kind.startswith(_OF_TRIES) and kind not in (of_try(step, self._try) for step in STEPS):
                continue
            self._said.setdefault(kind, {}).setdefault(found.node, kept(found.data))
            self._changed.set()
            self._changed = asyncio.Event()


class Calls:
    """On a sister: what the mother superior has said so far, and waiting for what she will say."""

    def __init__(self, directory: str, key: str, *, user: User, inotify: bool = True) -> None:
        folder = job_folder(directory, key)
        watch = Watch(folder, MAX_ORDER_BYTES, SISTER_LOOKS_AGAIN_SECONDS, MAX_ENTRIES_PER_NODE, inotify)
        self.said: dict[str, dict[str, Any]] = {}
        self._changed = asyncio.Event()
        self._listening = asyncio.ensure_future(self._listen(user, watch))

    async def first(self, *orders: str) -> str:
        """Wait until one of these orders has been given; gives the first of them, in this order."""
        while True:
            changed = self._changed
            given = next((order for order in orders if order in self.said), None)
            if given is not None:
                return given
            await changed.wait()

    async def close(self) -> None:
        """Stop listening; nothing is left running."""
        self._listening.cancel()
        await asyncio.gather(self._listening, return_exceptions=True)

    async def _listen(self, user: User, watch: Watch) -> None:
        frames = await read_stream(user, watch.run)
        try:
            while True:
                frame = await _next_frame(frames, MAX_ORDER_BYTES)
                if frame is None:  # the folder cannot be watched: the batch system's own word remains
                    return
                order, text = frame
                words = _parse_object(text) if order in _WITH_WORDS else None
                self.said.setdefault(order, words or {})
                self._changed.set()
                self._changed = asyncio.Event()
        finally:
            await frames.close()


class Watch(NamedTuple):
    """The work of the child that watches a folder: `run` writes a frame for each new file to a descriptor, for ever.

    It makes the folder where it is not there. `limit` bounds a file's size in bytes, `entries` how many files are
    looked at. A folder that cannot be listed now is listed again later.
    """

    folder: str
    limit: int
    look_again_s: float
    entries: int
    inotify: bool

    def run(self, out: int) -> None:
        self.make()
        watch = self._events()
        told: set[str] = set()
        look = time.monotonic()
        while True:
            left = look - time.monotonic()
            if left <= 0:
                self.tell_new(told, out)
                look = time.monotonic() + self.look_again_s
            elif watch is None:
                time.sleep(left)
            elif select.select([watch], [], [], left)[0]:
                self.tell_new(told, out, [event.name for event in watch.read(timeout=0)])

    def make(self) -> None:
        """Make the folder where it is not there."""
        try:
            Path(self.folder).mkdir(0o700)
        except FileExistsError:
            pass

    def tell_new(self, told: set[str], out: int, names: Optional[list[str]] = None) -> None:
        """Write a frame for each file that is not `told` yet: of these names, or of all that are there."""
        try:
            folder = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return
        try:
            for name in self._listed(folder) if names is None else names:
                if name not in told and len(told) < self.entries and (name in ORDERS or _NAME.fullmatch(name)):
                    data = self._read(folder, name)
                    if data is not None:
                        told.add(name)
                        text = name.encode()
                        write_all(out, _HEAD.pack(len(text), len(data)) + text + data)
        finally:
            os.close(folder)

    def _events(self) -> Optional[INotify]:
        if not self.inotify:
            return None
        try:
            watch = INotify()
            watch.add_watch(self.folder, flags.MOVED_TO)
        except OSError:
            return None
        return watch

    def _listed(self, folder: int) -> list[str]:
        try:
            with os.scandir(folder) as listing:
                return [entry.name for entry in itertools.islice(listing, self.entries)]
        except OSError:
            return []

    def _read(self, folder: int, name: str) -> Optional[bytes]:
        """The content of a file, empty for what is none; None where it cannot be read."""
        try:
            try:
                fd = os.open(name, _READ, dir_fd=folder)
            except FileNotFoundError:
                _forget_absent(folder, name)
                fd = os.open(name, _READ, dir_fd=folder)
            with open(fd, "rb") as stream:
                return stream.read(self.limit) if stat.S_ISREG(os.fstat(fd).st_mode) else b""
        except OSError:
            return None


def _forget_absent(folder: int, name: str) -> None:
    """Have the kernel ask the file system again for a name that it remembers not to be there.

    Listing shows a file that another machine has made; a lookup of its name that came too early may hide it from `open`
    for as long as lookups are remembered. Making a link of that name asks anew; none is made, since no folder may have
    one (link(2), EPERM; EEXIST for a name that is there).
    """
    try:
        os.link(".", name, src_dir_fd=folder, dst_dir_fd=folder)
    except OSError:
        pass


async def _next_frame(frames: Stream, limit: int) -> Optional[tuple[str, bytes]]:
    """The next frame from the child, which is the user's: None at its end, or when it is none."""
    try:
        length, size = _HEAD.unpack(await frames.reader.readexactly(_HEAD.size))
        if length > 64 or size > limit:
            return None
        name = await frames.reader.readexactly(length)
        return name.decode("ascii", "replace"), await frames.reader.readexactly(size)
    except asyncio.IncompleteReadError:
        return None
