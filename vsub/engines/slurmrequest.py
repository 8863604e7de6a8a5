"""What a job asks of its nodes on Slurm, in the language of qsub or of sbatch, as a `HostRequest`.

Where both stand there the one that comes last counts, of nodes and processors as a whole, and of memory. Forms are
those of qsub(1B) of TORQUE 6.1 and sbatch(1) of Slurm 22.05.
"""

from __future__ import annotations

import re
from typing import NamedTuple, Optional

from vmgr.errors import Code, VTorqueError
from vmgr.units import parse_count
from vsub.engines.slurmoptions import split_option
from vsub.hostrequest import Chunk, Given, HostRequest, Nodes, read_host_request
from vsub.options import SBATCH, Option
from vsub.resources import read_resources, replace_items

MIB = 1 << 20
PBS_NODES = frozenset(("nodes", "procs", "ncpus"))
PBS_MEMORY = frozenset(("mem", "pmem"))
SLURM_NODES = frozenset(("nodes", "ntasks", "ntasks-per-node", "cpus-per-task"))
SLURM_MEMORY = frozenset(("mem", "mem-per-cpu"))
PER_CPU = ("pmem", "--mem-per-cpu")

_FEATURE = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,255}"
_SIZE = r"([0-9]{1,15})([KMGT]?)B?"
_SHIFT = {"K": 10, "": 20, "M": 20, "G": 30, "T": 40}


class Layout(NamedTuple):
    """How a job lies on its nodes: on each `tasks` times `cpus` processors and `mib` MiB of memory (None: not said).

    `hosts` are nodes that must be among them, `features` what each of them must have.
    """

    nodes: int
    tasks: int
    cpus: int
    mib: Optional[int]
    hosts: tuple[str, ...]
    features: tuple[str, ...]


def read_request(options: tuple[Option, ...]) -> HostRequest:
    """The request of a job. Raises VTorqueError (VT-USAGE, VT-OPTION) for what no guest job can ask of Slurm."""
    for option in options:
        if option.letter == "L":
            raise without_counterpart(option, "say -l nodes=N:ppn=M")
    dropped = PBS_NODES if last_language(options, PBS_NODES, SLURM_NODES) == SBATCH else frozenset()
    dropped |= PBS_MEMORY if last_language(options, PBS_MEMORY, SLURM_MEMORY) == SBATCH else frozenset()
    request = read_host_request(replace_items(options, dropped))
    if last_language(options, PBS_NODES, SLURM_NODES) == SBATCH:
        request = _of_sbatch(options, request.memory)
    _check_uniform(request)
    if last_language(options, PBS_MEMORY, SLURM_MEMORY) == SBATCH:
        request = request._replace(memory=_memory_of_sbatch(options, request.nodes.number))
    return request


def layout(asked: HostRequest, fitted: Optional[Nodes], memory: dict[str, int], options: tuple[Option, ...]) -> Layout:
    """How a job lies on its nodes, from what it asks for, and what its guests need instead (None, empty: just that).

    `memory` is in MiB, by resource, as in `Fitted`.
    """
    nodes = fitted or asked.nodes
    chunk = nodes.chunks[0]
    tasks, cpus = chunk.ppn or 1, 1
    if fitted is None and last_language(options, PBS_NODES, SLURM_NODES) == SBATCH:
        each = _numbers(options).get("cpus-per-task")
        cpus = each[0] if each else 1
        tasks //= cpus
    hosts = tuple(part.head for part in nodes.chunks if parse_count(part.head) is None)
    features = tuple(word for word in chunk.words if not word.startswith("ppn="))
    return Layout(nodes.number, tasks, cpus, _memory_per_node(asked, memory, nodes), hosts, features)


def _memory_per_node(asked: HostRequest, wanted: dict[str, int], nodes: Nodes) -> Optional[int]:
    """The smallest of the bounds, in MiB: all of them hold."""
    bounds = {name: -(-given.amount // MIB) for name, given in asked.memory.items()}
    bounds.update(wanted)
    ppn = nodes.chunks[0].ppn or 1
    each = [mib * ppn if name in PER_CPU else -(-mib // nodes.number) for name, mib in bounds.items()]
    return min(each) if each else None


def last_language(options: tuple[Option, ...], pbs: frozenset[str], slurm: frozenset[str]) -> Optional[str]:
    """Which language the last word on a matter is in: `l` (qsub's), SBATCH, or None when nothing is said."""
    for option in reversed(options):
        if option.letter == SBATCH and split_option(option)[0] in slurm:
            return SBATCH
        if option.letter == "l" and any(item.name in pbs for item in read_resources((option,))):
            return "l"
    return None


def _numbers(options: tuple[Option, ...]) -> dict[str, tuple[int, Option]]:
    """The numbers asked for in sbatch's language. Raises VTorqueError (VT-USAGE, VT-OPTION)."""
    found = {}
    for option in options:
        name, value = split_option(option) if option.letter == SBATCH else ("", None)
        if name in SLURM_NODES:
            found[name] = (_number(value or "", option, is_range=name == "nodes"), option)
    return found


def _number(text: str, option: Option, *, is_range: bool) -> int:
    low, dash, high = text.partition("-")
    number = parse_count(low)
    if number is None or number < 1 or (dash and not is_range):
        raise VTorqueError(
            f"{option.value} ({option.source}) cannot be read", code=Code.USAGE, hint="a number from 1 is needed"
        )
    if dash and parse_count(high) != number:
        raise VTorqueError(
            f"{option.value} ({option.source}) cannot be honoured in a guest job: guests are made for a number of "
            "nodes that is known",
            code=Code.OPTION,
            hint="name one number",
        )
    return number


def _of_sbatch(options: tuple[Option, ...], memory: dict[str, Given]) -> HostRequest:
    numbers = _numbers(options)
    nodes, ntasks, per_node, cpus = (
        numbers[name][0] if name in numbers else None
        for name in ("nodes", "ntasks", "ntasks-per-node", "cpus-per-task")
    )
    option = next(
        numbers[name][1] for name in ("nodes", "ntasks", "ntasks-per-node", "cpus-per-task") if name in numbers
    )
    option = option._replace(letter=SBATCH, value=" ".join(given.value or "" for _, given in numbers.values()))
    form = "nodes"
    if per_node is not None:
        if nodes is None:
            nodes = 1 if ntasks is None else -(-ntasks // per_node)
        if ntasks is not None and ntasks != nodes * per_node:
            raise _uneven(option)
    elif ntasks is not None:
        form = "nodes" if nodes is not None else "procs"
        nodes = nodes or 1
        if ntasks % nodes:
            raise _uneven(option)
        per_node = ntasks // nodes
    ppn = None if per_node is None and cpus is None else (per_node or 1) * (cpus or 1)
    chunk = Chunk(str(nodes or 1), () if ppn is None else (f"ppn={ppn}",))
    return HostRequest(form, Nodes((chunk,), ""), None, option, memory)


def _uneven(option: Option) -> VTorqueError:
    return VTorqueError(
        f"{option.value} ({option.source}) cannot be honoured in a guest job: every node has as many guests",
        code=Code.OPTION,
        hint="ask for as many tasks on each node: --nodes=N --ntasks-per-node=M",
    )


def _memory_of_sbatch(options: tuple[Option, ...], nodes: int) -> dict[str, Given]:
    """The last `--mem` or `--mem-per-cpu`, which exclude each other; `--mem` as the memory of all nodes."""
    found: dict[str, Given] = {}
    for option in options:
        name, value = split_option(option) if option.letter == SBATCH else ("", None)
        if name not in SLURM_MEMORY:
            continue
        match = re.fullmatch(_SIZE, value or "", re.IGNORECASE)
        if match is None:
            raise VTorqueError(
                f"{option.value} ({option.source}) cannot be read", code=Code.USAGE, hint="such as 2G; MiB without unit"
            )
        amount = int(match[1]) << _SHIFT[match[2].upper()]
        if amount == 0:
            raise VTorqueError(
                f"{option.value} ({option.source}) cannot be honoured in a guest job: how much memory a node has is "
                "not known yet",
                code=Code.OPTION,
                hint="name a size",
            )
        text = f"{option.value} ({option.source})"
        found = {f"--{name}": Given(amount * (nodes if name == "mem" else 1), text)}
    return found


def _check_uniform(request: HostRequest) -> None:
    """Refuse nodes of several kinds. Raises VTorqueError (VT-OPTION)."""
    nodes, option = request.nodes, request.option
    if option is None or request.form != "nodes" or option.letter == SBATCH:
        return
    kinds = {(chunk.ppn, _features(chunk)) for chunk in nodes.chunks}
    if len(kinds) > 1 or nodes.suffix:
        raise without_counterpart(option, "ask for nodes of one kind, nodes=N:ppn=M[:FEATURE…]")
    for chunk in nodes.chunks:
        words = [*_features(chunk), *(() if parse_count(chunk.head) is not None else (chunk.head,))]
        for word in words:
            if not re.fullmatch(_FEATURE, word):
                raise without_counterpart(option, f"{word!r} is no name of a feature or a node")


def _features(chunk: Chunk) -> tuple[str, ...]:
    return tuple(word for word in chunk.words if not word.startswith("ppn="))


def without_counterpart(option: Option, reason: str) -> VTorqueError:
    """The refusal of what Slurm has nothing for."""
    return VTorqueError(
        f"{option} ({option.source}) has no counterpart on Slurm: {reason}",
        code=Code.OPTION,
        hint="leave it out, or say it in sbatch's language after --slurm",
    )
