"""`vtorque-local enter NODE [COMMAND…]`: a command of root's in a simulated node."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence

from vsub.engines.local import namespaces, nodes
from vsub.engines.local.machine import Layout
from vsub.engines.local.namespaces import Place


def enter(layout: Layout, name: str, command: Sequence[str]) -> int:
    """Run a command (a shell, when there is none) in a node; its exit status, 128 + n for signal n.

    It has our streams, environment and, where the node has such a folder, working directory; it is killed when we
    are. Raises ValueError when there is no such node, OSError when it cannot be entered.
    """
    found = {node.name: node for node in nodes.known(layout)}
    if name not in found:
        raise ValueError(f"no node {name}; there are: {', '.join(found) or 'none, see local.nodes'}")
    process = found[name].process
    if process is None:
        raise ValueError(f"node {name} has ended; stop and start vtorque-local to have it again")
    place = Place.of(name, process)
    directory = os.getcwd()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGQUIT})  # the keys are the command's
    pid = place.fork()
    if pid == 0:
        _become(place, directory, command or [os.environ.get("SHELL", "/bin/sh")], before)
    place.close()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return status if status >= 0 else 128 - status


def _become(place: Place, directory: str, command: Sequence[str], mask: set[int]) -> None:
    """In the child: be the command; never returns."""
    status = 127
    try:
        namespaces.die_with_parent()
        place.enter()
        try:
            os.chdir(directory)
        except OSError:
            os.chdir("/")
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.execvp(command[0], list(command))
    except OSError as error:
        os.write(2, f"vtorque-local: {command[0]}: {error.strerror}\n".encode())
    finally:
        os._exit(status)
