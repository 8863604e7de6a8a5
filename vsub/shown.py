"""What `--explain`, `--dry-run` and `--json` print: each value with its source, the command line, every file."""

from __future__ import annotations

import json
import os
import shlex
import stat
from collections.abc import Iterator
from typing import Any, NamedTuple, Optional

from vmgr.config import Config
from vmgr.errors import printable
from vmgr.request import KEYS, show
from vsub.engines import Said
from vsub.hostrequest import chooses_node_access
from vsub.options import Option
from vsub.plan import Plan
from vsub.report import put
from vsub.resources import Resource, last_of, read_resources

FITTED = "; fitted to the image and to what the job asks of its nodes"
OF_GUESTS = "what the guests need"
PRIVATE_KEY = "key"


class Row(NamedTuple):
    """One value and where it comes from."""

    key: str
    value: str
    source: str


class Shown(NamedTuple):
    """A submission: its command line, the files that would be written, its environment (None: that of vsub)."""

    argv: list[str]
    files: list[dict[str, Any]]
    environment: Optional[dict[str, str]]


def explain(plan: Plan, config: Config, said: Optional[tuple[Said, ...]]) -> Iterator[Row]:
    """Every value of a guest job with its source: of the guests, then what the batch system is told.

    `said` is the latter where it is not in the language of qsub.
    """
    yield from _guests(plan)
    if said is None:
        yield from _of_qsub(plan, config)
    else:
        yield from (Row(*each) for each in said)
    yield Row("directory", plan.workdir, _workdir_source(plan))


def _of_qsub(plan: Plan, config: Config) -> Iterator[Row]:
    """qsub's options, then the resources."""
    for option in _last_of_each(plan.options):
        if option.letter == "L" and plan.fitted.tasks is not None:
            option = option._replace(value=str(plan.fitted.tasks), source=f"{option.source}; {OF_GUESTS}")
        yield Row(f"-{option.letter}", option.value if option.value is not None else "yes", option.source)
    fitted = plan.fitted
    changed = {name: f"{mib}mb" for name, mib in fitted.memory}
    if fitted.nodes is not None:
        changed["nodes"] = str(fitted.nodes)
    wanted = last_of(read_resources(plan.options))
    gone = ("procs", "ncpus") if fitted.nodes is not None else ()
    for name, item in wanted.items():
        if name not in changed and name not in gone:
            yield Row(f"-l {name}", item.value, item.option.source)
    for name, value in changed.items():
        yield Row(f"-l {name}", value, OF_GUESTS + _in_place_of(name, wanted))
    if config.submit.node_access is not None and not chooses_node_access(plan.options):
        yield Row("-l naccesspolicy", config.submit.node_access, config.origin("submit.node_access"))
    if config.submit.job_type is not None:
        yield Row("-T", config.submit.job_type, config.origin("submit.job_type"))


def _in_place_of(name: str, wanted: dict[str, Resource]) -> str:
    """What the user asked for instead, where there is something."""
    if name in wanted:
        return f", in place of {wanted[name].value} ({wanted[name].option.source})"
    other = next((wanted[form] for form in ("procs", "ncpus") if name == "nodes" and form in wanted), None)
    return f", in place of {other.name}={other.value} ({other.option.source})" if other else ""


def _guests(plan: Plan) -> Iterator[Row]:
    group, features = plan.fitted.group, plan.features
    values: dict[str, Any] = {
        "img": group.image,
        "vcpus": group.vcpus,
        "ram": group.ram_mib,
        "vms_per_node": group.per_node,
        "vcpu_pinning": features.pinning,
        "fs_type": features.fs_type,
        "network": features.network,
        "mounts": features.mounts,
        "suspend": features.suspend,
        "iocm": features.iocm is not None,
        "vrdma": features.vrdma,
        "unclot": features.unclot_mib is not None,
    }
    if features.iocm is not None:
        values.update(iocm_min_cores=features.iocm.min_cores, iocm_max_cores=features.iocm.max_cores)
    if features.unclot_mib is not None:
        values["unclot_shmem"] = features.unclot_mib
    for key in KEYS:
        if key in plan.request:
            asked = plan.request[key]
            yield Row(key, show(key, asked.value), asked.source)
        elif key in values:
            fitted = key in ("vcpus", "ram") and values[key] != plan.policy.bounds(key).default
            default = plan.policy.origin(key, "default")
            yield Row(key, show(key, values[key]), f"default ({default}{FITTED if fitted else ''})")


def _last_of_each(options: tuple[Option, ...]) -> list[Option]:
    """The options that count: the last of each letter, all of those that add up."""
    several = [option for option in options if option.letter in "WL"]
    single = {option.letter: option for option in options if option.letter not in "WLl"}
    return [*single.values(), *several]


def _workdir_source(plan: Plan) -> str:
    option = plan.last("d") or plan.last("w")
    return option.source if option else "where you are"


def print_rows(rows: list[Row]) -> None:
    """A table, in columns that fit."""
    shown = [Row(*(printable(text) for text in row)) for row in rows]
    keys, values = (max((len(row[column]) for row in shown), default=0) for column in (0, 1))
    for row in shown:
        print(f"{row.key:{keys}}  {row.value:{min(values, 40)}}  {row.source}")


def print_plain(argv: list[str], source: str, own: frozenset[str]) -> None:
    """What becomes of a job without guests."""
    if "--json" in own:
        print_json({"guest": False, "source": source, "argv": argv, "files": []})
        return
    if "--explain" in own:
        print_rows([Row("guest", "off", source)])
        return
    print(shlex.join(argv))


def print_guest(rows: list[Row], own: frozenset[str], shown: Optional[Shown] = None) -> None:
    """What becomes of a guest job: its values, or its submission."""
    if "--json" in own:
        values = {row.key: {"value": row.value, "source": row.source} for row in rows}
        written: dict[str, Any] = {} if shown is None else {"argv": shown.argv, "files": shown.files}
        if shown is not None and shown.environment is not None:
            written["environment"] = shown.environment
        print_json({"guest": True, "values": values, **written})
        return
    if shown is None:
        print_rows(rows)
        return
    print(shlex.join(shown.argv))
    if shown.environment is not None:
        print("\nthe job's environment")
        for name, value in sorted(shown.environment.items()):
            print(f"    {printable(name)}={printable(value)}")
    for file in shown.files:
        print(f"\n{file['path']} ({file['mode']}, {file['size']} bytes)")
        if file["content"] is None:
            print("    not shown: made anew for each submission")
        for line in (file["content"] or "").splitlines():
            print(f"    {printable(line)}")


def files_of(folder: str, named: str) -> list[dict[str, Any]]:
    """The files below `folder` as they would stand in `named`; the private key's content is left out."""
    found = []
    for name in sorted(os.listdir(folder)):  # noqa: PTH208
        with open(f"{folder}/{name}", "rb") as stream:
            data, info = stream.read(), os.fstat(stream.fileno())
        content = None if name == PRIVATE_KEY else data.decode("utf-8", "backslashreplace")
        mode = f"{stat.S_IMODE(info.st_mode):04o}"
        found.append({"path": f"{named}/{name}", "mode": mode, "size": len(data), "content": content})
    return found


def print_json(tree: dict[str, Any]) -> None:
    """One JSON object on standard output."""
    put(json.dumps(tree).encode() + b"\n")
