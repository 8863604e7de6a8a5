"""The job specification: what `vsub` writes and root reads on every node.

It is a value: typed, versioned, serialised canonically, and named by the SHA-256 of its bytes, so that a path that
holds the hash names exactly one specification. This module is its only writer and its only reader.
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple, Optional

from vmgr.errors import Code, VTorqueError

VERSION = 1
MAX_SPEC_BYTES = 64 * 1024
DIRECTORY = ".vtorque"
"""Folder in the user's home that holds the job directories."""

_RUID = re.compile(r"[0-9a-z]{8,32}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_WORD = re.compile(r"[A-Za-z0-9._-]{1,64}")
_PUBLIC_KEY = re.compile(r"ssh-ed25519 [A-Za-z0-9+/]{68}={0,2}")
_SPEC_PATH = re.compile(
    r"(?P<home>(?:/[^/,\s\x00-\x1f\x7f]+)+)/"
    + re.escape(DIRECTORY)
    + r"/(?P<ruid>[0-9a-z]{8,32})/(?P<sha256>[0-9a-f]{64})"
)


class GuestGroup(NamedTuple):
    """Guests of one kind: `per_node` of them on each node, each with `vcpus` vCPUs and `ram_mib` MiB of RAM."""

    image: str
    per_node: int
    vcpus: int
    ram_mib: int


class Spec(NamedTuple):
    """One job. Files of the user's are named by their SHA-256; they lie in the job directory under fixed names.

    `asked` holds the request keys that the user gave (all other values were defaults). `distro` is what the user
    says the image is, for the node to hold against the image. `shell` is the interpreter asked for (`qsub -S`),
    None for the login shell. `keep` tells the job wrapper that somebody still reads the job directory afterwards.
    """

    ruid: str
    groups: tuple[GuestGroup, ...]
    asked: tuple[str, ...]
    distro: Optional[str]
    mounts: tuple[str, ...]
    network: str
    workdir: str
    shell: Optional[str]
    script: str
    vm_prologue: Optional[str]
    vm_epilogue: Optional[str]
    ssh_public_key: str
    keep: bool


class SpecPath(NamedTuple):
    """The parts of a job directory's path."""

    home: str
    ruid: str
    sha256: str

    @property
    def directory(self) -> str:
        return f"{self.home}/{DIRECTORY}/{self.ruid}/{self.sha256}"


def dump_spec(spec: Spec) -> bytes:
    """The canonical bytes of a specification; equal specifications give equal bytes."""
    return json.dumps(as_plain(spec), sort_keys=True, separators=(",", ":")).encode("ascii")


def as_plain(spec: Spec) -> dict[str, Any]:
    """A specification as plain data, as it stands in its file."""
    return {**spec._asdict(), "version": VERSION, "groups": [group._asdict() for group in spec.groups]}


def spec_hash(data: bytes) -> str:
    """The name of a specification: SHA-256 of its bytes, 64 hexadecimal digits."""
    import hashlib  # costs a hook, which hashes nothing, a tenth of its time

    return hashlib.sha256(data).hexdigest()


def parse_job_directory(path: str) -> Optional[SpecPath]:
    """The parts of a job directory's path, or None for any other path."""
    match = _SPEC_PATH.fullmatch(path)
    if match is None or "/../" in path or "/./" in path or len(path) > 1024:
        return None
    return SpecPath(match["home"], match["ruid"], match["sha256"])


def parse_spec(data: bytes, *, sha256: str, source: str) -> Spec:
    """The specification in `data`, which must hash to `sha256`.

    Nothing in it is believed beyond its form: values are checked against the site's policy elsewhere.
    Raises VTorqueError (VT-SPEC), naming `source`.
    """
    if len(data) > MAX_SPEC_BYTES:
        raise _bad(source, f"larger than {MAX_SPEC_BYTES} bytes")
    if spec_hash(data) != sha256:
        raise _bad(source, "altered after submission: its SHA-256 is not the one in its path")
    try:
        tree = json.loads(data.decode("ascii"), parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise _bad(source, "not JSON") from None
    if not isinstance(tree, dict) or type(tree.get("version")) is not int:
        raise _bad(source, "not a job specification")
    if tree["version"] != VERSION:
        raise _bad(source, f"of version {tree['version']}, this node reads {VERSION}")
    return _Reader(tree, source).spec()


def _no_constant(text: str) -> None:
    raise ValueError(text)


def _bad(source: str, text: str) -> VTorqueError:
    return VTorqueError(f"the job specification {source} is {text}", code=Code.SPEC, hint="submit again by vsub")


class _Reader:
    """Takes a tree apart, key by key, and refuses what it does not know."""

    def __init__(self, tree: dict[str, Any], source: str) -> None:
        self.source = source
        self.tree = tree

    def spec(self) -> Spec:
        self._keys(self.tree, (*Spec._fields, "version"))
        groups = self._list("groups", 1, 16)
        return Spec(
            ruid=self._match("ruid", _RUID),
            groups=tuple(self._group(group) for group in groups),
            asked=self._texts("asked"),
            distro=self._optional("distro", _WORD),
            mounts=self._texts("mounts"),
            network=self._choice("network", ("user",)),
            workdir=self._path("workdir"),
            shell=None if self.tree["shell"] is None else self._path("shell"),
            script=self._match("script", _SHA256),
            vm_prologue=self._optional("vm_prologue", _SHA256),
            vm_epilogue=self._optional("vm_epilogue", _SHA256),
            ssh_public_key=self._match("ssh_public_key", _PUBLIC_KEY),
            keep=self._flag("keep"),
        )

    def _group(self, tree: Any) -> GuestGroup:
        self._keys(tree, GuestGroup._fields)
        if not isinstance(tree["image"], str) or not _NAME.fullmatch(tree["image"]):
            raise self._wrong("image", tree["image"])
        counts = {}
        for key in ("per_node", "vcpus", "ram_mib"):
            value = tree[key]
            if type(value) is not int or not 1 <= value <= 2**31:
                raise self._wrong(key, value)
            counts[key] = value
        return GuestGroup(image=tree["image"], **counts)

    def _keys(self, tree: Any, known: tuple[str, ...]) -> None:
        if not isinstance(tree, dict):
            raise _bad(self.source, "not a job specification")
        for key in tree:
            if key not in known:
                raise _bad(self.source, f"wrong: unknown key {key[:80]!r}")
        for key in known:
            if key not in tree:
                raise _bad(self.source, f"wrong: the key {key} is missing")

    def _wrong(self, key: str, value: Any) -> VTorqueError:
        return _bad(self.source, f"wrong: {key} cannot be {repr(value)[:80]}")

    def _match(self, key: str, pattern: re.Pattern[str]) -> str:
        value = self.tree[key]
        if not isinstance(value, str) or not pattern.fullmatch(value):
            raise self._wrong(key, value)
        return value

    def _optional(self, key: str, pattern: re.Pattern[str]) -> Optional[str]:
        return None if self.tree[key] is None else self._match(key, pattern)

    def _path(self, key: str) -> str:
        value = self.tree[key]
        if not isinstance(value, str) or not value.startswith("/") or len(value) > 4096 or "\x00" in value:
            raise self._wrong(key, value)
        return value

    def _choice(self, key: str, allowed: tuple[str, ...]) -> str:
        value = self.tree[key]
        if value not in allowed:
            raise self._wrong(key, value)
        return str(value)

    def _flag(self, key: str) -> bool:
        value = self.tree[key]
        if not isinstance(value, bool):
            raise self._wrong(key, value)
        return value

    def _list(self, key: str, low: int, high: int) -> list[Any]:
        value = self.tree[key]
        if not isinstance(value, list) or not low <= len(value) <= high:
            raise self._wrong(key, value)
        return value

    def _texts(self, key: str) -> tuple[str, ...]:
        values = self._list(key, 0, 64)
        for value in values:
            if not isinstance(value, str) or not _WORD.fullmatch(value):
                raise self._wrong(key, value)
        return tuple(values)
