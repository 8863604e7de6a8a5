"""The site's configuration: read, checked whole, and given out as typed values.

The YAML file is the truth. `compile_config` leaves a checked copy beside it as JSON, bound to the very file it was
made from, because parsing YAML costs a submission three times the start of an interpreter.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

from vmgr import __version__
from vmgr.errors import Code, VTorqueError
from vmgr.paths import Installation
from vmgr.trust import check_trusted

MAX_CONFIG_BYTES = 1 << 20


class Bounds(NamedTuple):
    """Policy of a number or a size (MiB)."""

    min: int
    max: int
    default: int


class ImagePolicy(NamedTuple):
    """Policy of the image: the default (None: none set) and what may be asked for (None: the whole pool)."""

    default: Optional[str]
    allowed: Optional[tuple[str, ...]]


class Policy(NamedTuple):
    """What users may ask for."""

    img: ImagePolicy
    vcpus: Bounds
    ram: Bounds
    vms_per_node: Bounds
    user_vm_hooks: bool


class Submit(NamedTuple):
    without_vm: str
    qsub: str
    qstat: str


class Local(NamedTuple):
    spool: str
    socket: str


class Paths(NamedTuple):
    spool: Path
    run: Path


class Images(NamedTuple):
    pool: Path
    overlays: Path
    overlays_max: int
    """MiB."""


class Hypervisor(NamedTuple):
    qemu: str
    allow_emulation: bool
    overcommit_cpus: bool
    probe_seconds: int


class Mount(NamedTuple):
    """One share; `source` and `target` may hold `{home}`."""

    name: str
    kind: str
    source: str
    target: str
    readonly: bool

    def for_home(self, home: str) -> Mount:
        """This share with the user's home put in."""
        return self._replace(source=self.source.replace("{home}", home), target=self.target.replace("{home}", home))


class Timeouts(NamedTuple):
    """Seconds."""

    user_file: int
    launch: int
    boot: int
    barrier: int
    attach: int
    vm_epilogue: int
    shutdown: int


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


class Config(NamedTuple):
    """A checked configuration. `lines` maps dotted keys that stand in `source` to their line."""

    source: Path
    engine: str
    submit: Submit
    local: Local
    paths: Paths
    images: Images
    hypervisor: Hypervisor
    policy: Policy
    mounts: tuple[Mount, ...]
    vm_hooks: Optional[Path]
    timeouts: Timeouts
    logging: Logging
    lines: dict[str, int]

    def origin(self, key: str) -> str:
        """Where the value of a dotted key comes from, for messages: file and line, or `the built-in default`."""
        line = self.lines.get(key)
        return f"{self.source} line {line}" if line else "the built-in default"


def load_config(install: Installation) -> Config:
    """The configuration of an installation, from the compiled copy when that is current, else from the YAML file.

    Raises VTorqueError: VT-CONFIG with file, line, key and what is allowed; VT-TRUST when root runs this and others
    could have written the file.
    """
    source = install.config
    check_trusted(source)
    compiled = _read_compiled(source)
    if compiled is None:
        tree, lines = _parse(source)
        return _typed(source, tree, lines)
    return _typed(source, compiled["tree"], compiled["lines"])


def compile_config(install: Installation) -> Config:
    """Check the YAML file and leave the compiled copy beside it (written whole, then renamed)."""
    source = install.config
    check_trusted(source)
    stamp = _stamp(source)
    tree, lines = _parse(source)
    target = _compiled_path(source)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    temporary.write_text(json.dumps({"stamp": stamp, "tree": tree, "lines": lines}))
    temporary.chmod(0o644)
    temporary.replace(target)
    return _typed(source, tree, lines)


def read_tree(source: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The checked tree of a file and the line of each dotted key in it, always from the YAML itself."""
    return _parse(source)


def _compiled_path(source: Path) -> Path:
    return source.with_name(source.name + ".compiled")


def _stamp(source: Path) -> list[Union[int, str]]:
    try:
        info = source.stat()
    except OSError as err:
        raise _unreadable(source, err) from err
    return [__version__, info.st_ino, info.st_size, info.st_mtime_ns, info.st_uid]


def _unreadable(source: Path, err: OSError) -> VTorqueError:
    return VTorqueError(
        f"cannot read the configuration {source}: {err.strerror}", code=Code.CONFIG, hint="is vTorque installed here?"
    )


def _read_compiled(source: Path) -> Optional[dict[str, Any]]:
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


def _parse(source: Path) -> tuple[dict[str, Any], dict[str, int]]:
    from vmgr.schema import Problem, check_config  # costs a submission time that the compiled copy saves
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


def _typed(source: Path, tree: dict[str, Any], lines: dict[str, int]) -> Config:
    policy, log = tree["policy"], tree["logging"]
    allowed = policy["img"]["allowed"]
    return Config(
        source=source,
        engine=tree["engine"],
        submit=Submit(**tree["submit"]),
        local=Local(**tree["local"]),
        paths=Paths(**{key: Path(value) for key, value in tree["paths"].items()}),
        images=Images(
            pool=Path(tree["images"]["pool"]),
            overlays=Path(tree["images"]["overlays"]),
            overlays_max=tree["images"]["overlays_max"],
        ),
        hypervisor=Hypervisor(**tree["hypervisor"]),
        policy=Policy(
            img=ImagePolicy(policy["img"]["default"], None if allowed is None else tuple(allowed)),
            vcpus=Bounds(**policy["vcpus"]),
            ram=Bounds(**policy["ram"]),
            vms_per_node=Bounds(**policy["vms_per_node"]),
            user_vm_hooks=policy["user_vm_hooks"],
        ),
        mounts=tuple(Mount(**mount) for mount in tree["mounts"]),
        vm_hooks=Path(tree["guest"]["vm_hooks"]) if tree["guest"]["vm_hooks"] else None,
        timeouts=Timeouts(**tree["timeouts"]),
        logging=Logging(log["level"], log["file"], Rotate(**log["rotate"]), log["journal"]),
        lines=lines,
    )
