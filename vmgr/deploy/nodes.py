"""The nodes of an installation: what the front end knows of them, and orders to many of them at once."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Callable, NamedTuple, Optional

from vmgr import pdsh
from vmgr.deploy import files, wire
from vmgr.deploy.nodeside import Order
from vmgr.errors import Code, VTorqueError, printable

MAX_TEXT = 600
MAX_KEPT = 50
PBSNODES_SECONDS = 60
PENDING, INSTALLED, REMOVING = "pending", "installed", "removing"


class Known(NamedTuple):
    """What is known of a node: TORQUE's home on it, the mode of its hooks, and how far it is."""

    home: str
    mode: str
    state: str


class Book:
    """The nodes that have, or may have, something of this installation; written whole before they are touched."""

    def __init__(self, path: str) -> None:
        self.path = path

    def read(self) -> dict[str, Known]:
        """Raises VTorqueError (VT-CONFIG)."""
        try:
            with open(self.path, encoding="utf-8") as stream:
                return {name: Known(**known) for name, known in json.load(stream).items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, AttributeError) as err:
            raise VTorqueError(f"{self.path} cannot be read: {err}", code=Code.CONFIG) from err

    def write(self, nodes: Mapping[str, Known]) -> None:
        ordered = {name: nodes[name]._asdict() for name in sorted(nodes, key=pdsh.natural)}
        files.write_file(self.path, json.dumps(ordered, indent=1).encode(), 0o600)

    def note(self, changes: Mapping[str, Optional[Known]]) -> None:
        """Write down what has become of some nodes; None for those that have nothing of this installation."""
        known: dict[str, Optional[Known]] = {**self.read(), **changes}
        self.write({name: each for name, each in known.items() if each is not None})


class Answer(NamedTuple):
    """What a node answers. `status` is ok, problems, tree (it has no programs yet) or failed."""

    node: str
    status: str
    text: str
    kept: tuple[str, ...] = ()


class Reach(NamedTuple):
    """How nodes are reached."""

    program: str
    fanout: int
    limit_s: int
    python: str


def parse(node: str, line: str) -> Optional[Answer]:
    """A node's answer; None for a line that is none."""
    try:
        data = json.loads(line)
        status, text, kept = data["status"], data["text"], data.get("kept", [])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    if status not in ("ok", "problems", "tree", "failed") or not isinstance(text, str) or not isinstance(kept, list):
        return None
    return Answer(
        node, status, printable(text)[:MAX_TEXT], tuple(printable(str(each))[:MAX_TEXT] for each in kept[:MAX_KEPT])
    )


def send(
    names: Sequence[str], order: Order, reach: Reach, tell: Callable[[Answer], None], tree: Optional[str] = None
) -> list[Answer]:
    """Send an order to nodes, so many at a time; `tell` hears each answer as it comes. `tree` goes with it.

    A node that gives no answer has the status failed, with what the remote shell says.
    """
    answers: dict[str, Answer] = {}

    def hear(node: str, line: str) -> None:
        answer = parse(node, line)
        if answer is not None and node not in answers:
            answers[node] = answer
            tell(answer)

    # neither file has a name: nothing of them stays, whatever ends this program
    with tempfile.TemporaryFile() as stream, tempfile.TemporaryFile() as script:
        wire.write_stream(stream, asdict(order), tree)
        script.write(wire.runner(os.environ, reach.python, _open_again(stream)).encode())
        stream.flush()
        script.flush()
        said, complained = pdsh.Heard(names, hear), pdsh.Heard(names)
        rounds = -(-len(names) // reach.fanout)
        pdsh.run(
            pdsh.here_for_each(
                reach.program, names, ["sh", _open_again(script), "%h"], fanout=reach.fanout, limit_s=reach.limit_s
            ),
            said.feed,
            complained.feed,
            limit_s=rounds * reach.limit_s + 30,
        )
        said.by_node()
        complaints = complained.by_node()
    for name in names:
        if name not in answers:
            answers[name] = Answer(name, "failed", reason(complaints[name]))
            tell(answers[name])
    return [answers[name] for name in names]


def _open_again(stream: IO[bytes]) -> str:
    """By what name programs that this one starts open a file that has none, from its beginning (proc(5))."""
    return f"/proc/{os.getpid()}/fd/{stream.fileno()}"


def reason(complaints: str) -> str:
    """Why a node gave no answer, from what the remote shell said."""
    lines = [line for line in complaints.splitlines() if line.strip()]
    telling = [line for line in lines if "exited with exit code" not in line] or lines or ["no answer"]
    return printable(telling[-1])[:MAX_TEXT]


def perform(
    groups: Mapping[Known, Sequence[str]], order: Order, reach: Reach, tree: str, tell: Callable[[Answer], None]
) -> list[Answer]:
    """Send an order to groups of nodes that are alike; those that have no programs get them with a second one."""
    answers = []
    for known, names in groups.items():
        mine = replace(order, home=known.home, mode=known.mode)

        def first(answer: Answer) -> None:
            if answer.status != "tree":
                tell(answer)

        found = send(names, mine, reach, first)
        bare = [answer.node for answer in found if answer.status == "tree"]
        answers += [answer for answer in found if answer.status != "tree"]
        if bare:
            answers += send(bare, mine, reach, tell, tree)
    return answers


# --- which nodes


_NODE_LINE = re.compile(r"^([A-Za-z0-9][A-Za-z0-9._-]*)(?:\s|$)")


def all_nodes(home: str) -> list[str]:
    """The nodes that the batch system has: of `pbsnodes`, or of the server's own list below TORQUE's home.

    Raises VTorqueError (VT-ENGINE) where neither can be read.
    """
    listed = Path(home, "server_priv", "nodes")
    program = shutil.which("pbsnodes")
    if program is not None:
        try:
            done = subprocess.run(
                [program, "-a"], stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
                timeout=PBSNODES_SECONDS,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as err:
            raise VTorqueError(f"--all: pbsnodes -a: {err}", code=Code.ENGINE) from err
        if done.returncode:
            said = (done.stderr or done.stdout).strip().splitlines()
            raise VTorqueError(f"--all: pbsnodes -a: {said[-1] if said else done.returncode}", code=Code.ENGINE)
        text = done.stdout
    elif listed.is_file():
        text = listed.read_text(encoding="utf-8", errors="replace")
    else:
        raise VTorqueError(
            f"--all: there is no pbsnodes, nor {listed}", code=Code.ENGINE, hint="name the nodes with --nodes SET"
        )
    names = nodes_in(text)
    if not names:
        raise VTorqueError("--all: the batch system has no nodes", code=Code.ENGINE, hint="name them with --nodes SET")
    return names


def nodes_in(text: str) -> list[str]:
    """Names of nodes in what `pbsnodes -a` prints, or in a server's `nodes`: each begins a line."""
    found = (_NODE_LINE.match(line) for line in text.splitlines())
    return sorted({match[1] for match in found if match}, key=pdsh.natural)
