"""`vmgr topology`: what a machine has, who sits where on it, and where guests would sit."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Optional

import click

from vmgr.commands.table import write_text
from vmgr.config import load_config
from vmgr.errors import Code, VTorqueError
from vmgr.node.client import AgentLink
from vmgr.paths import installation
from vmgr.request import KEYS, Key
from vmgr.topology.allowed import names_a_folder, read_allowed
from vmgr.topology.cpulist import parse_cpus, show_cpus
from vmgr.topology.model import Allowed, Placement, Topology
from vmgr.topology.picture import draw
from vmgr.topology.plain import as_plain, from_plain, topology_as_plain
from vmgr.topology.plan import Ask, plan
from vmgr.topology.read import read_topology
from vmgr.topology.svg import draw_svg
from vmgr.units import parse_count

ANSWER_SECONDS = 3.0
DEFAULT_RAM_MIB = 1024

_COUNT = "a whole number"
_PLAN_KEYS = {
    **{name: KEYS[name] for name in ("vcpus", "vms_per_node", "ram")},
    "io": Key(parse_count, _COUNT, "CPUs wanted for I/O threads, for all guests together"),
    "host_cores": Key(parse_count, _COUNT, "cores kept for the host"),
}
_FORM = "write vcpus=N[,vms_per_node=N][,ram=SIZE][,io=N][,host_cores=N]"
_AT_LEAST_ONE = frozenset(("vcpus", "vms_per_node", "ram"))
_SIGNS = str.maketrans({"·": ".", "×": "x", "│": "|"})  # noqa: RUF001


class Seating(NamedTuple):
    """Who sits on a machine: guests by name, and the CPUs that the host keeps."""

    guests: Mapping[str, Placement]
    host: frozenset[int]


@click.command()
@click.option("--job", "job_id", metavar="ID", help="Show where the guests of this job sit, on this node.")
@click.option(
    "--root", type=click.Path(path_type=Path), metavar="DIR", help="A recorded tree instead of this node's /."
)
@click.option(
    "--plan",
    "plan_text",
    metavar="KEY=N,...",
    help=f"Show where guests would sit: vcpus, vms_per_node (1), ram of each ({DEFAULT_RAM_MIB}M), io (CPUs wanted for "
    "the I/O threads of all, 0), host_cores (resources.host_cores of the configuration, 0 without one).",
)
@click.option("--cpus", "cpu_list", metavar="LIST", help="The CPUs that may be used, such as 0-3,8; else the cpuset's.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.option("--svg", metavar="FILE", help="Write the picture as SVG; - is standard output.")
def topology(
    job_id: Optional[str],
    root: Optional[Path],
    plan_text: Optional[str],
    cpu_list: Optional[str],
    as_json: bool,
    svg: Optional[str],
) -> None:
    """Draw NUMA nodes, cores and CPUs, and the guests on them.

    Example: vmgr topology --plan vcpus=4,vms_per_node=2,ram=2G
    """
    if job_id is not None and (root, plan_text, cpu_list) != (None, None, None):
        raise VTorqueError("--job shows what is", code=Code.USAGE, hint="leave out --root, --plan and --cpus")
    if as_json and svg == "-":
        raise VTorqueError("--json and --svg - both write to standard output", code=Code.USAGE, hint="give a file")
    place = Path("/") if root is None else root
    machine = read_topology(place)
    allowed = read_allowed(machine, place)
    if cpu_list is not None:
        allowed = _narrowed(machine, allowed, cpu_list)
    seating = Seating({}, frozenset())
    if job_id is not None:
        seating, allowed = _job(job_id, allowed)
    elif plan_text is not None:
        seating = _planned(machine, allowed, plan_text)
    if svg is not None:
        _write(svg, draw_svg(machine, seating.guests, allowed, seating.host))
    if as_json:
        answer = topology_as_plain(machine, allowed)
        if job_id is not None or plan_text is not None:
            answer["guests"] = [{"guest": name, **as_plain(guest)} for name, guest in seating.guests.items()]
            answer["host"] = sorted(seating.host)
        click.echo(json.dumps(answer, indent=1, sort_keys=True))
    elif svg is None:
        text = draw(machine, seating.guests, allowed, seating.host, colour=sys.stdout.isatty())
        _echo(text)


def _narrowed(machine: Topology, allowed: Allowed, text: str) -> Allowed:
    """What `--cpus` allows: part of what was allowed, with its memory, or else any CPUs, with all memory."""
    cpus = parse_cpus(text)
    online = frozenset(cpu.number for cpu in machine.cpus)
    if not cpus or not cpus <= online:
        odd = f"{text!r} is no list of CPUs" if not cpus else f"no CPU {show_cpus(cpus - online)} is online"
        raise VTorqueError(
            f"--cpus {text}: {odd}", code=Code.VALUE, hint=f"write it like 0-3,8; online are {show_cpus(online)}"
        )
    nodes = allowed.nodes if cpus <= allowed.cpus else frozenset(node.number for node in machine.nodes)
    return Allowed(cpus, nodes, "--cpus")


def _planned(machine: Topology, allowed: Allowed, text: str) -> Seating:
    """Where the guests of a request would sit. Raises VTorqueError (status 2) when they do not fit."""
    asked = read_plan(text)
    host_cores = asked.get("host_cores")
    ask = Ask(
        guests=asked.get("vms_per_node", 1),
        vcpus=asked["vcpus"],
        ram_mib=asked.get("ram", DEFAULT_RAM_MIB),
        io=asked.get("io", 0),
    )
    try:
        found = plan(machine, allowed, ask, host_cores=_site_host_cores() if host_cores is None else host_cores)
    except VTorqueError as err:
        if err.code is not Code.NODE:
            raise
        raise VTorqueError(err.message, code=Code.RESOURCE, hint=err.hint) from err
    return Seating({f"guest {number}": guest for number, guest in enumerate(found.guests, 1)}, found.host)


def read_plan(text: str) -> Mapping[str, int]:
    """The numbers in the argument of `--plan`, sizes in MiB. Raises VTorqueError: VT-KEY, VT-VALUE."""
    asked: dict[str, int] = {}
    for item in text.split(","):
        name, _, value = item.partition("=")
        if name not in _PLAN_KEYS:
            raise VTorqueError(f"unknown key {name!r} in --plan {text}", code=Code.KEY, hint=_FORM)
        if name in asked:
            raise VTorqueError(f"{name} stands twice in --plan {text}", code=Code.KEY, hint="give it once")
        number = _PLAN_KEYS[name].read(value)
        if not isinstance(number, int) or (name in _AT_LEAST_ONE and not number):
            least = ", at least 1" if name in _AT_LEAST_ONE else ""
            raise VTorqueError(
                f"{item} in --plan cannot be read", code=Code.VALUE, hint=f"{_PLAN_KEYS[name].form}{least} is needed"
            )
        asked[name] = number
    if "vcpus" not in asked:
        raise VTorqueError(f"--plan {text} has no vcpus", code=Code.KEY, hint=_FORM)
    return asked


def _site_host_cores() -> int:
    """`resources.host_cores` of the site; 0 where nothing is installed."""
    install = installation()
    return load_config(install).resources.host_cores if install.config.exists() else 0


def _job(job_id: str, allowed: Allowed) -> tuple[Seating, Allowed]:
    """Who sits where of a job, as its agent on this node says, and the CPUs that it may use."""
    from vmgr.reach.agents import job_here
    from vmgr.reach.where import meant

    config = load_config(installation())
    job_id = meant(config, job_id)
    job_id = job_here(config.paths, job_id) or job_id
    placed = asyncio.run(_ask(job_id)).get("placement")
    if placed is None:
        raise VTorqueError(
            f"job {job_id} has no guests that are placed on this node yet",
            code=Code.VALUE,
            hint="`vmgr ps` shows its state",
        )
    try:
        guests = {str(name): from_plain(guest) for name, guest in placed["guests"].items()}
        host, usable = (frozenset(int(cpu) for cpu in placed[key]) for key in ("host", "allowed"))
    except (AttributeError, KeyError, TypeError, ValueError) as err:
        raise VTorqueError(
            f"what the agent of job {job_id} says of its guests' places cannot be read: {err}",
            code=Code.AGENT,
            hint="is it of another version of vTorque?",
        ) from err
    return Seating(guests, host), Allowed(usable, allowed.nodes, f"job {job_id}")


async def _ask(job_id: str) -> dict[str, Any]:
    """What the job's agent on this node says. Raises VTorqueError (status 2) when there is none that says anything."""
    paths = load_config(installation()).paths
    try:
        if names_a_folder(job_id):
            link = await asyncio.wait_for(AgentLink.open(paths, job_id), ANSWER_SECONDS)
            link.send("status")
            answer = await asyncio.wait_for(link.snapshot(), ANSWER_SECONDS)
            link.close()
            if answer is not None:
                return answer
    except asyncio.TimeoutError:
        pass
    except VTorqueError as err:
        if err.code is not Code.AGENT:
            raise
    raise VTorqueError(
        f"job {job_id} has no guests on this node", code=Code.VALUE, hint="`vmgr ps` lists those that are here"
    )


def _write(file: str, text: str) -> None:
    if file == "-":
        _echo(text)
        return
    write_text(file, text)


def _echo(text: str) -> None:
    """Print `text`, on a terminal that knows ASCII only in that."""
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = text.translate(_SIGNS).encode("ascii", "backslashreplace").decode("ascii")
    click.echo(text.rstrip("\n"))
