"""The site's configuration: read, checked whole, and given out as typed values.

The YAML file is the truth. `compile_config` leaves a checked copy beside it as JSON, bound to the very file it was
made from, because parsing YAML costs a submission three times the start of an interpreter.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, Optional, Union

from vmgr import __version__
from vmgr.errors import Code, VTorqueError
from vmgr.paths import Installation
from vmgr.trust import check_trusted

if TYPE_CHECKING:
    from pathlib import Path

    from vmgr.policy import Policy, Subject

MAX_CONFIG_BYTES = 1 << 20


class Submit(NamedTuple):
    """The programs are paths, or paths by patterns of host names, the first that fits."""

    without_vm: str
    qsub: Union[str, dict[str, str]]
    qstat: Union[str, dict[str, str]]
    qhold: Union[str, dict[str, str]]
    qrls: Union[str, dict[str, str]]
    qrerun: Union[str, dict[str, str]]
    pbsnodes: Union[str, dict[str, str]]
    disabled_hosts: list[str]
    default_queue: Optional[str]
    node_access: Optional[str]
    job_type: Optional[str]


class Resources(NamedTuple):
    """What a node of a guest job keeps for itself; memory in MiB."""

    host_cores: int
    host_memory: int
    slots_are_cpus: bool


class Local(NamedTuple):
    spool: str
    socket: str
    nodes: int


class Paths(NamedTuple):
    spool: Path
    run: Path


class Cache(NamedTuple):
    """A node's cache of images: no folder, no cache; `max` in MiB."""

    folder: Optional[Path]
    max: int


class Images(NamedTuple):
    """Sizes in MiB. `recipes` is the folder of the site's own recipes, if it has one."""

    pool: Path
    allow_user_images: bool
    max_virtual_size: int
    recipes: Optional[Path]
    overlays: Path
    overlays_max: int
    ramdisk_max: int
    cache: Cache


class Hypervisor(NamedTuple):
    qemu: str
    virtiofsd: str
    allow_emulation: bool
    overcommit_cpus: bool
    hugepages: Optional[str]
    vhost: bool
    probe_seconds: int

    @property
    def hugepage_kib(self) -> Optional[int]:
        """The size of the huge pages that guests' RAM lies in, None for ordinary pages."""
        return None if self.hugepages is None else {"2M": 2 << 10, "1G": 1 << 20}[self.hugepages]


class Software(NamedTuple):
    """Packages that guests install when they boot, and whether they update those that they have before."""

    packages: tuple[str, ...] = ()
    updates: bool = False


def fill(text: str, names: Mapping[str, Optional[str]]) -> str:
    """A path with what is known of a job put in for `{home}`, `{user}`, `{job}` and `{workspace}`."""
    for name, value in names.items():
        if value is not None:
            text = text.replace(f"{{{name}}}", value)
    return text


class Workspace(NamedTuple):
    """The jobs' folders: where one is, by a pattern with `{home}`, `{user}` and `{job}`, and whether it goes again."""

    folder: Optional[str]
    wipe: bool


class Suspended(NamedTuple):
    """Where suspended jobs are stored, a path; None where no job can be suspended."""

    folder: Optional[str]


class Mount(NamedTuple):
    """One share; `source` and `target` may hold `{home}`, `{user}`, `{job}` and `{workspace}`.

    `source` is a folder of the node, or `SERVER:/PATH` for the kind `nfs`, which alone has `security` (`krb5`, `krb5i`,
    `krb5p`, or `sys` with `public`, for what everybody may read).
    """

    name: str
    kind: str
    source: str
    target: str
    readonly: bool
    security: Optional[str] = None
    public: bool = False

    def filled(self, names: Mapping[str, Optional[str]]) -> Mount:
        """This share for one job, as `fill` does it; what is not known, which is None or missing, stays as it is."""
        return self._replace(source=fill(self.source, names), target=fill(self.target, names))

    def as_saved(self) -> Mount:
        """This share as guests have it that can be suspended: QEMU saves none with virtiofs, so 9p stands in for it."""
        return self._replace(kind="9p") if self.kind == "virtiofs" else self

    @property
    def needs_workspace(self) -> bool:
        """Whether this share shows the job's workspace, or something in it."""
        return "{workspace}" in self.source + self.target

    @property
    def is_known(self) -> bool:
        """Whether everything has been put in; before a job is submitted it has no id."""
        return not any(name in path for path in (self.source, self.target) for name in ("{job}", "{workspace}"))


class Bridge(NamedTuple):
    """The site's bridge. `pool` is a range of addresses, or ranges by patterns of node names, the first that fits."""

    name: Optional[str]
    addresses: str
    command: Optional[str]
    pool: Union[str, dict[str, str], None]
    gateway: Optional[str]


class JobNetwork(NamedTuple):
    """Networks of jobs' own; `peer` holds `{node}`."""

    subnets: str
    port: int
    peer: str
    nat: bool
    ssh_ports: Optional[str]


class Network(NamedTuple):
    """How guests are connected, and what they are told about the site's network."""

    mac_prefix: str
    dns: tuple[str, ...]
    domain: Optional[str]
    search: tuple[str, ...]
    ntp: tuple[str, ...]
    bridge: Bridge
    job: JobNetwork


class Timeouts(NamedTuple):
    """Seconds."""

    user_file: int
    launch: int
    boot: int
    barrier: int
    attach: int
    vm_epilogue: int
    shutdown: int
    disk: int
    sisters: int
    wipe: int
    suspend: int
    reach: int


class Rotate(NamedTuple):
    size: int
    """MiB."""
    keep: int
    jobs: int


class Logging(NamedTuple):
    level: str
    file: Optional[str]
    rotate: Rotate
    journal: bool


class Config:
    """A checked configuration, typed where it is used: a submission needs few of its sections.

    `source` is the file's path; `lines` maps dotted keys that stand in it to their line. `policy` is the tree as
    checked; what holds for a submission is `policy_for`. `components` says which optional components the site has.
    """

    def __init__(self, source: str, tree: dict[str, Any], lines: dict[str, int]) -> None:
        self.source = source
        self.lines = lines
        self._tree = tree
        self.engine: str = tree["engine"]
        self.policy: dict[str, Any] = tree["policy"]
        self.components: dict[str, bool] = tree["components"]
        self.pool: str = tree["images"]["pool"]

    def origin(self, key: str) -> str:
        """Where the value of a dotted key comes from, for messages: file and line, or `the built-in default`."""
        line = self.lines.get(key)
        return f"{self.source} line {line}" if line else "the built-in default"

    def policy_for(self, subject: Subject) -> Policy:
        """The policy that holds for a subject."""
        from vmgr.policy import effective_policy  # costs a hook, which asks for none, a tenth of its time

        return effective_policy(self.policy, subject, self.origin)

    @cached_property
    def submit(self) -> Submit:
        return Submit(**self._tree["submit"])

    @cached_property
    def resources(self) -> Resources:
        return Resources(**self._tree["resources"])

    @cached_property
    def mounts(self) -> tuple[Mount, ...]:
        return tuple(Mount(**mount) for mount in self._tree["mounts"])

    @property
    def workspace(self) -> Workspace:
        return Workspace(**self._tree["workspace"])

    @property
    def suspended(self) -> Suspended:
        return Suspended(**self._tree["suspended"])

    @cached_property
    def local(self) -> Local:
        return Local(**self._tree["local"])

    @cached_property
    def paths(self) -> Paths:
        from pathlib import Path  # a submission does without

        return Paths(**{key: Path(value) for key, value in self._tree["paths"].items()})

    @property
    def slurm_bin(self) -> Union[str, dict[str, str]]:
        """The folder of Slurm's commands, or folders by patterns of host names, the first that fits."""
        found: Union[str, dict[str, str]] = self._tree["slurm"]["bin"]
        return found

    @property
    def mom_priv(self) -> Path:
        """Where the batch system's daemon on a node has its hooks and its own configuration."""
        from pathlib import Path  # as above

        return Path(self._tree["torque"]["mom_priv"])

    @cached_property
    def images(self) -> Images:
        from pathlib import Path  # as above

        images = self._tree["images"]
        pool, overlays, cache = Path(images["pool"]), Path(images["overlays"]), images["cache"]
        folder = Path(cache["folder"]) if cache["folder"] else None
        recipes = Path(images["recipes"]) if images["recipes"] else None
        more = {key: images[key] for key in ("allow_user_images", "max_virtual_size", "overlays_max", "ramdisk_max")}
        return Images(pool=pool, recipes=recipes, overlays=overlays, cache=Cache(folder, cache["max"]), **more)

    @cached_property
    def vm_hooks(self) -> Optional[Path]:
        from pathlib import Path  # as above

        folder = self._tree["guest"]["vm_hooks"]
        return Path(folder) if folder else None

    @property
    def software(self) -> Software:
        """What guests with cloud-init install when they boot."""
        guest = self._tree["guest"]
        return Software(tuple(guest["packages"]), guest["updates"] == "boot")

    @property
    def kill_user_processes(self) -> bool:
        """Whether what a job leaves running on its nodes is ended."""
        return bool(self._tree["guest"]["kill_user_processes"])

    @cached_property
    def network(self) -> Network:
        tree = self._tree["network"]
        lists = {key: tuple(tree[key]) for key in ("dns", "search", "ntp")}
        return Network(**{**tree, **lists, "bridge": Bridge(**tree["bridge"]), "job": JobNetwork(**tree["job"])})

    @cached_property
    def hypervisor(self) -> Hypervisor:
        return Hypervisor(**self._tree["hypervisor"])

    @cached_property
    def timeouts(self) -> Timeouts:
        return Timeouts(**self._tree["timeouts"])

    @cached_property
    def logging(self) -> Logging:
        log = self._tree["logging"]
        return Logging(log["level"], log["file"], Rotate(**log["rotate"]), log["journal"])


def load_config(install: Installation) -> Config:
    """The configuration of an installation, from the compiled copy when that is current, else from the YAML file.

    Raises VTorqueError: VT-CONFIG with file, line, key and what is allowed; VT-TRUST when root runs this and others
    could have written the file.
    """
    source = install.config_file
    _check_trusted(source)
    compiled = _read_compiled(source)
    if compiled is None:
        tree, lines = _parse(source)
        return Config(source, tree, lines)
    return Config(source, compiled["tree"], compiled["lines"])


def compile_config(install: Installation) -> Config:
    """Check the YAML file and leave the compiled copy beside it (written whole, then renamed)."""
    source = install.config_file
    _check_trusted(source)
    stamp = _stamp(source)
    tree, lines = _parse(source)
    target = _compiled_path(source)
    write_beside(source, target, json.dumps({"stamp": stamp, "tree": tree, "lines": lines}))
    return Config(source, tree, lines)


def _check_trusted(source: str) -> None:
    try:
        check_trusted(source)
    except VTorqueError as err:
        if err.code is Code.CONFIG and not os.path.lexists(source):
            raise _unreadable(source, FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))) from None
        raise


def read_tree(source: str) -> tuple[dict[str, Any], dict[str, int]]:
    """The checked tree of a file and the line of each dotted key in it, always from the YAML itself."""
    return _parse(source)


def is_compiled(source: str) -> bool:
    """Whether there is a compiled copy for exactly this file."""
    return _read_compiled(source) is not None


def _compiled_path(source: str) -> str:
    return f"{source}.compiled"


def write_beside(source: str, target: str, text: str) -> None:
    """Write `target`, which is made from `source`, whole: everybody may read it. Raises OSError."""
    temporary = f"{os.path.dirname(source)}/.{os.path.basename(target)}.{os.getpid()}"  # noqa: PTH119, PTH120
    with open(temporary, "w", encoding="utf-8") as stream:
        stream.write(text)
        os.fchmod(stream.fileno(), 0o644)
    os.rename(temporary, target)


def _stamp(source: str) -> list[Union[int, str]]:
    try:
        info = os.stat(source)
    except OSError as err:
        raise _unreadable(source, err) from err
    return [__version__, info.st_ino, info.st_size, info.st_mtime_ns, info.st_uid]


def _unreadable(source: str, err: OSError) -> VTorqueError:
    return VTorqueError(
        f"cannot read the configuration {source}: {err.strerror}", code=Code.CONFIG, hint="is vTorque installed here?"
    )


def _read_compiled(source: str) -> Optional[dict[str, Any]]:
    """The compiled copy, or None when there is none for exactly this file by the same owner."""
    path = _compiled_path(source)
    try:
        with open(path, "rb") as stream:
            info = os.fstat(stream.fileno())
            stamp = _stamp(source)
            if info.st_uid != stamp[4] or info.st_mode & 0o022:
                return None
            data = json.loads(stream.read(4 * MAX_CONFIG_BYTES))
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) and data.get("stamp") == stamp else None


def _parse(source: str) -> tuple[dict[str, Any], dict[str, int]]:
    from vmgr.fields import Problem  # costs a submission time that the compiled copy saves
    from vmgr.schema import check_config
    from vmgr.yamlfile import dotted, parse_yaml

    try:
        with open(source, "rb") as stream:
            data = stream.read(MAX_CONFIG_BYTES + 1)
    except OSError as err:
        raise _unreadable(source, err) from err
    if len(data) > MAX_CONFIG_BYTES:
        raise VTorqueError(f"{source} is larger than {MAX_CONFIG_BYTES} bytes", code=Code.CONFIG)
    tree, lines = parse_yaml(data, source)
    try:
        return check_config(tree), lines
    except Problem as problem:
        key = dotted(problem.path)
        line = next((lines[p] for p in _outward(problem.path, dotted) if p in lines), 1)
        found = _found(tree, problem.path)
        raise VTorqueError(
            f"{source} line {line}: {key or 'the file'}{found}: {problem.text}",
            code=Code.CONFIG,
            hint="`vmgr config show` lists every key",
        ) from None


def _outward(path: Any, dotted: Any) -> list[str]:
    return [dotted(path[:length]) for length in range(len(path), 0, -1)]


def _found(tree: Any, path: Any) -> str:
    for part in path:
        try:
            tree = tree[part]
        except (KeyError, IndexError, TypeError):
            return ""
    return "" if isinstance(tree, (dict, list)) else f" is {str(tree)[:80]!r}"
