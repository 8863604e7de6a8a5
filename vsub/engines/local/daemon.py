"""Starting and stopping the embedded batch system: `vtorque-local start|stop|status|enter|offline|online`.

`start` returns when the socket listens. What it needs comes from the command line and a settings file of
root's.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import json
import logging
import logging.handlers
import os
import select
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Callable, Optional

from vmgr.node.process import boot_id, start_ticks
from vsub.engines.local import protocol
from vsub.engines.local.clients import Clients
from vsub.engines.local.machine import Cluster, Layout, Machine, require_private
from vsub.engines.local.process import Streams, set_streams
from vsub.engines.local.records import write_whole
from vsub.engines.local.recovery import recover
from vsub.engines.local.server import Server
from vsub.engines.local.settings import Settings, load

STOP_TIMEOUT_S = 120.0
MAX_NODES = 16

log = logging.getLogger("vtorque-local")


class StartError(Exception):
    """Why the daemon cannot serve; one line."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vtorque-local", description="The embedded batch system of vTorque.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in (
        ("start", "serve"),
        ("stop", "end the daemon and what it runs"),
        ("status", "is it there? And its simulated nodes?"),
        ("enter", "run a command in a simulated node, as root"),
        ("offline", "give no more jobs to a node"),
        ("online", "give jobs to a node again"),
    ):
        command = commands.add_parser(name, help=what, description=what)
        command.add_argument("--spool", type=Path, required=True, metavar="DIR", help="spool directory")
        if name == "stop":
            continue
        if name == "enter":
            command.add_argument("node", metavar="NODE", help="n1 and so on")
            command.add_argument("run", nargs=argparse.REMAINDER, metavar="COMMAND", help="default: a shell")
            continue
        command.add_argument("--socket", required=True, metavar="PATH", help="socket for qsub and the others")
        if name in ("offline", "online"):
            command.add_argument("node", metavar="NODE", help="as status names it, or this machine")
        if name in ("status", "offline", "online"):
            continue
        command.add_argument("--log", type=Path, metavar="FILE", help="log file (default: DIR/server_priv/log)")
        command.add_argument("--settings", metavar="FILE", help="JSON file with further settings, root's alone")
        command.add_argument("--prologalarm", type=float, metavar="S", help="seconds that a hook may take")
        command.add_argument("--server", default=socket.gethostname(), metavar="NAME", help="name in job ids")
        command.add_argument("--nodes", type=_count, default=1, metavar="N", help="simulated nodes; 1: this machine")
        for option, what in (("--private", "each node has its own"), ("--volatile", "likewise, empty at each start")):
            command.add_argument(option, type=Path, action="append", default=[], metavar="DIR", help=what)
        command.add_argument("--foreground", action="store_true", help="stay; print one line when ready")
    return parser


def _count(text: str) -> int:
    """A number of nodes. Raises ArgumentTypeError."""
    if not text.isdigit() or not 1 <= int(text) <= MAX_NODES:
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number from 1 to {MAX_NODES} is needed")
    return int(text)


def _lock(spool: Path) -> int:
    """Hold the spool; the lock goes with the process. Raises StartError when another daemon has it."""
    descriptor = os.open(spool / "server_priv" / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise StartError(f"another daemon serves {spool}") from None
    return descriptor


def _listen(path: str) -> socket.socket:
    """A socket that every user can connect to. Raises StartError when another daemon listens there."""
    directory = Path(path).parent
    directory.mkdir(mode=0o755, parents=True, exist_ok=True)
    require_private(directory)
    try:
        protocol.connect(path).close()
    except OSError:
        Path(path).unlink(missing_ok=True)
    else:
        raise StartError(f"another daemon listens on {path}")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o111)
    try:
        listener.bind(path)
    finally:
        os.umask(before)
    listener.listen(128)
    return listener


def _log_to(path: Path) -> None:
    """Append to a file that log rotation may move away."""
    handler = logging.handlers.WatchedFileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False


def _stop_on_signals() -> asyncio.Event:
    """An event that TERM and INT set."""
    event = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, event.set)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    return event


async def _serve(cluster: Cluster, name: str, settings: Settings, path: str, ready: Callable[[], None]) -> None:
    """Answer clients and run jobs until a signal ends it."""
    stop = _stop_on_signals()
    try:
        server = Server(cluster, name, settings)
        server.load()
        clients = Clients(server)
        listener = await asyncio.start_unix_server(clients.connected, sock=_listen(path), limit=protocol.MAX_REQUEST)
        ready()
        await server.run(recover, stop, listener.close)
    finally:
        Path(path).unlink(missing_ok=True)


@contextlib.contextmanager
def _simulated(layout: Layout, arguments: argparse.Namespace) -> Iterator[tuple[Machine, ...]]:
    """The simulated nodes as long as the daemon serves; none when this machine is to be the only node."""
    layout.node_list.unlink(missing_ok=True)
    if arguments.nodes == 1:
        yield ()
        return
    from vsub.engines.local.nodes import Nodes  # what makes namespaces and links is loaded where there are any

    nodes = Nodes(layout)
    try:
        nodes.start(arguments.nodes, arguments.private, arguments.volatile)
        yield nodes.machines
    finally:
        nodes.close()


def _run(arguments: argparse.Namespace, ready: Callable[[], None]) -> None:
    """Be the daemon until told to stop. Raises StartError, OSError or ValueError before it is ready."""
    if os.geteuid() != 0:
        raise StartError("the batch server runs as root")
    os.umask(0o022)
    layout = Layout(arguments.spool.absolute())
    layout.create()
    settings = load(arguments.settings) if arguments.settings else Settings()
    if arguments.prologalarm is not None:
        settings = settings._replace(prologalarm_s=arguments.prologalarm)
    lock = _lock(layout.spool)
    try:
        _log_to(arguments.log or layout.private / "log")
        me = {"pid": os.getpid(), "start": start_ticks(os.getpid()), "boot": boot_id()}
        pid_file = layout.private / "pid"
        write_whole(pid_file, json.dumps(me).encode())
        log.info("serving %s as %s", layout.spool, arguments.server)
        with _simulated(layout, arguments) as simulated:
            cluster = Cluster.of(socket.gethostname(), layout, simulated)
            asyncio.run(_serve(cluster, arguments.server, settings, arguments.socket, ready))
        pid_file.unlink(missing_ok=True)
    finally:
        os.close(lock)


def _start(arguments: argparse.Namespace) -> int:
    if arguments.foreground:
        os.chdir("/")
        _run(arguments, lambda: print(f"vtorque-local: listening on {arguments.socket}", flush=True))
        return 0
    told, tell = os.pipe()
    if os.fork() == 0:
        _be_daemon(arguments, tell)
    os.close(tell)
    with open(told, "rb") as pipe:
        message = pipe.read().decode()
    if message == "ready":
        return 0
    raise StartError(message or "the daemon ended before it was ready; see its log")


def _be_daemon(arguments: argparse.Namespace, tell: int) -> None:
    """Leave terminal, session and descriptors of whoever started us, then serve; never returns."""
    status = 1
    try:
        os.setsid()
        arguments.spool = arguments.spool.absolute()
        arguments.socket = str(Path(arguments.socket).absolute())
        arguments.log = arguments.log.absolute() if arguments.log else None
        arguments.settings = str(Path(arguments.settings).absolute()) if arguments.settings else None
        os.chdir("/")
        null = os.open(os.devnull, os.O_RDWR)
        set_streams(Streams(null, null, null), (tell,))

        def ready() -> None:
            os.write(tell, b"ready")
            os.close(tell)

        _run(arguments, ready)
        status = 0
    except (StartError, OSError, ValueError) as error:
        log.error("%s", error)
        try:
            os.write(tell, str(error).encode("utf-8", "replace"))
        except OSError:
            pass  # nobody waits any more
    except BaseException:
        log.exception("fault")
    finally:
        os._exit(status)


def _running(spool: Path) -> Optional[tuple[int, int]]:
    """Pid and pidfd of the daemon of a spool, None when there is none."""
    try:
        noted = json.loads((spool / "server_priv" / "pid").read_bytes())
        pid, start, boot = int(noted["pid"]), int(noted["start"]), str(noted["boot"])
        pidfd = os.pidfd_open(pid)
    except (FileNotFoundError, ProcessLookupError, KeyError, ValueError):
        return None
    if boot != boot_id() or start_ticks(pid) != start:
        os.close(pidfd)
        return None
    return pid, pidfd


def _stop(arguments: argparse.Namespace) -> int:
    """End the daemon and wait for it. It ends its job first, whose epilogue may take its time."""
    found = _running(arguments.spool)
    if found is None:
        return 0
    pid, pidfd = found
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGTERM)
        ended, _, _ = select.select([pidfd], [], [], STOP_TIMEOUT_S)
    except ProcessLookupError:
        return 0
    finally:
        os.close(pidfd)
    if not ended:
        raise StartError(f"the daemon, process {pid}, still runs after {STOP_TIMEOUT_S:.0f} s: a hook may hang")
    return 0


def _status(arguments: argparse.Namespace) -> int:
    found = _running(arguments.spool)
    if found is not None:
        os.close(found[1])
    try:
        protocol.connect(arguments.socket).close()
    except OSError:
        found = None
    if not found:
        print("vtorque-local: not running")
        return 3
    print(f"vtorque-local: running, process {found[0]}")
    layout = Layout(arguments.spool.absolute())
    if layout.node_list.exists():
        from vsub.engines.local import nodes

        away = json.loads(layout.offline.read_bytes()) if layout.offline.exists() else []
        for node in nodes.known(layout):
            state = f"process {node.process}" if node.process else "ended"
            print(f"{node.name} {node.address} {state}{', offline' if node.name in away else ''}")
    return 0


def _mark(arguments: argparse.Namespace) -> int:
    try:
        protocol.request(arguments.socket, {"op": arguments.command, "node": arguments.node})
    except (protocol.Refused, protocol.ProtocolError) as error:
        raise StartError(str(error)) from None
    return 0


def _enter(arguments: argparse.Namespace) -> int:
    from vsub.engines.local.enter import enter

    found = _running(arguments.spool)
    if found is None:
        raise StartError(f"no daemon serves {arguments.spool}")
    os.close(found[1])
    return enter(Layout(arguments.spool.absolute()), arguments.node, arguments.run)


def main(argv: Optional[list[str]] = None) -> int:
    """`vtorque-local start|stop|status|enter|offline|online`; returns the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        commands = {"start": _start, "stop": _stop, "status": _status, "enter": _enter}
        return commands.get(arguments.command, _mark)(arguments)
    except (StartError, OSError, ValueError) as error:
        print(f"vtorque-local: {error}", file=sys.stderr)
        return 1
