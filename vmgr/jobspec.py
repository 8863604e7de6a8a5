"""The job specification: what `vsub` writes and root reads on every node.

It is a value: typed, versioned, serialised canonically, and named by the SHA-256 of its bytes, so that a path that
holds the hash names exactly one specification. This module is its only writer and its only reader.
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple, Optional

from vmgr.errors import Code, VTorqueError

VERSION = 2
MAX_SPEC_BYTES = 64 * 1024
MAX_ARGUMENTS = 4096
MAX_MEMBERS = 1_000_000
MAX_METADATA_DEPTH = 16
MAX_PER_NODE = 256
"""The most guests on a node that any site may allow: what a node tells of them must have an end."""
PINNINGS = ("auto", "off", "numad")
"""How vCPUs are bound without a mapping: by the planner, to nothing, by the planner with the advice of numad."""
DIRECTORY = ".vtorque"
"""Folder in the user's home that holds the job directories."""

HASHED_WITHOUT_OPENSSL = 1 << 19
"""Bytes up to which it is quicker to do without OpenSSL, whose library takes its time to load."""

# texts: what is not used need not be compiled
_RUID = r"[0-9a-z]{8,32}"
_SHA256 = r"[0-9a-f]{64}"
_IMAGE = r"[a-z0-9][a-z0-9._-]{0,63}(?:@[1-9][0-9]{0,8})?"
_WORD = r"[A-Za-z0-9._-]{1,64}"
_CPUS = r"[0-9]{1,5}(?:-[0-9]{1,5})?(?:,[0-9]{1,5}(?:-[0-9]{1,5})?){0,63}"
_INDEXES = r"[0-9]{1,7}(?:-[0-9]{1,7})?(?:,[0-9]{1,7}(?:-[0-9]{1,7})?){0,511}"
_METADATA_KEY = r"[a-z][a-z0-9_-]{0,63}"
_PUBLIC_KEY = r"ssh-ed25519 [A-Za-z0-9+/]{68}={0,2}"
_SPEC_PATH = (
    r"(?P<home>(?:/[^/,\s\x00-\x1f\x7f]+)+)/"
    + re.escape(DIRECTORY)
    + "/(?P<ruid>[0-9a-z]{8,32})/(?P<sha256>[0-9a-f]{64})"
)


class GuestGroup(NamedTuple):
    """Guests of one kind: `per_node` of them on each node, each with `vcpus` vCPUs and `ram_mib` MiB of RAM.

    `image` is a name, a name with a revision (`debian-12@3`), or the whole path of a disk of the user's.
    """

    image: str
    per_node: int
    vcpus: int
    ram_mib: int


class Pinning(NamedTuple):
    """Which CPUs the vCPUs are bound to: `mode` is one of PINNINGS, or `map`.

    `cpus` is None unless the mode is `map`; then it holds, for each guest of a node, for each of its vCPUs, a list of
    the node's CPUs such as `4-5,8`.
    """

    mode: str
    cpus: Optional[tuple[tuple[str, ...], ...]]


class Disk(NamedTuple):
    """A persistent disk: a new one of `size_mib` MiB, or the file `image`, a whole path; the other is None."""

    image: Optional[str]
    size_mib: Optional[int]


class Iocm(NamedTuple):
    """The I/O core manager, with the cores that it keeps at least and takes at most."""

    min_cores: int
    max_cores: int


class Spec(NamedTuple):
    """One job. Files of the user's are named by their SHA-256; they lie in the job directory under fixed names.

    `asked` holds the request keys that the user gave (all other values were defaults). `distro` and `arch` are what
    the user says the image is, for the node to hold against the image. `metadata` is cloud-config of the user's own.
    `suspend` says whether the job can be suspended. `iocm`, `vrdma` and `unclot_mib` (shared memory of a node's
    guests) are the optional components, None and false when they are off. `shell` is the interpreter asked for
    (`qsub -S`), None for the login shell. An `interactive` job runs its `script` on a terminal, or a login shell when
    that is None. `array` holds the indexes of a job array (`0,3,7-9`), whose members share the job directory.
    `arguments` is the text of `qsub -F`. `keep` tells the job wrapper that somebody still reads the job directory
    afterwards.
    """

    ruid: str
    groups: tuple[GuestGroup, ...]
    asked: tuple[str, ...]
    distro: Optional[str]
    arch: Optional[str]
    pinning: Pinning
    fs_type: str
    disk: Optional[Disk]
    metadata: Optional[dict[str, Any]]
    mounts: tuple[str, ...]
    network: str
    suspend: bool
    iocm: Optional[Iocm]
    vrdma: bool
    unclot_mib: Optional[int]
    workdir: str
    shell: Optional[str]
    interactive: bool
    array: Optional[str]
    script: Optional[str]
    arguments: str
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
    nested = {key: None if part is None else part._asdict() for key, part in _parts(spec).items()}
    return {**spec._asdict(), **nested, "version": VERSION, "groups": [group._asdict() for group in spec.groups]}


def _parts(spec: Spec) -> dict[str, Any]:
    return {"pinning": spec.pinning, "disk": spec.disk, "iocm": spec.iocm}


def members(array: str) -> frozenset[int]:
    """The indexes in the text of a job array's request, `0,3,7-9`. Raises ValueError for too many, or none."""
    found: set[int] = set()
    for part in array.split(","):
        low, _, high = part.partition("-")
        first, last = int(low), int(high or low)
        if not 0 <= last - first < MAX_MEMBERS - len(found):
            raise ValueError(array)
        found.update(range(first, last + 1))
    return frozenset(found)


def spec_hash(data: bytes) -> str:
    """The name of a specification, or of a file of the user's: its SHA-256, 64 hexadecimal digits."""
    if len(data) < HASHED_WITHOUT_OPENSSL:
        try:  # the interpreter's own module is there in a fifth of the time that OpenSSL takes to load
            from _sha2 import sha256  # type: ignore[import-not-found]
        except ImportError:
            try:
                from _sha256 import sha256  # type: ignore[import-not-found]  # before Python 3.12
            except ImportError:
                from hashlib import sha256
    else:
        from hashlib import sha256
    return str(sha256(data).hexdigest())


def parse_job_directory(path: str) -> Optional[SpecPath]:
    """The parts of a job directory's path, or None for any other path."""
    match = re.fullmatch(_SPEC_PATH, path)
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


def is_cpu_list(text: str) -> bool:
    """Whether `text` is a list of CPUs such as `4-5,8`."""
    return bool(re.fullmatch(_CPUS, text)) and all(
        int(low) <= int(high or low) for low, _, high in (part.partition("-") for part in text.split(","))
    )


def is_plain(value: object, depth: int = MAX_METADATA_DEPTH) -> bool:
    """Whether `value` is made of what JSON and YAML share (finite numbers, texts as keys), not nested too deeply."""
    if depth < 0:
        return False
    if isinstance(value, dict):
        return all(isinstance(key, str) and is_plain(part, depth - 1) for key, part in value.items())
    if isinstance(value, list):
        return all(is_plain(part, depth - 1) for part in value)
    if isinstance(value, float):
        return value - value == 0  # neither infinite nor no number at all
    return value is None or isinstance(value, (str, int))


def _is_file(value: object) -> bool:
    """Whether this can be the whole path of a file."""
    return isinstance(value, str) and value.startswith("/") and len(value) <= 4096 and "\x00" not in value


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
        return Spec(
            ruid=self._match("ruid", _RUID),
            groups=tuple(self._group(group) for group in self._list("groups", 1, 16)),
            asked=self._texts("asked"),
            distro=self._optional("distro", _WORD),
            arch=self._optional("arch", _WORD),
            pinning=self._pinning(),
            fs_type=self._choice("fs_type", ("overlay", "sharedfs", "ramdisk")),
            disk=self._disk(),
            metadata=self._metadata(),
            mounts=self._texts("mounts"),
            network=self._choice("network", ("user", "bridge", "job")),
            suspend=self._flag("suspend"),
            iocm=self._iocm(),
            vrdma=self._flag("vrdma"),
            unclot_mib=None if self.tree["unclot_mib"] is None else self._count(self.tree, "unclot_mib", 1),
            workdir=self._path("workdir"),
            shell=None if self.tree["shell"] is None else self._path("shell"),
            interactive=self._flag("interactive"),
            array=self._array(),
            script=self._script(),
            arguments=self._arguments(),
            vm_prologue=self._optional("vm_prologue", _SHA256),
            vm_epilogue=self._optional("vm_epilogue", _SHA256),
            ssh_public_key=self._match("ssh_public_key", _PUBLIC_KEY),
            keep=self._flag("keep"),
        )

    def _group(self, tree: Any) -> GuestGroup:
        self._keys(tree, GuestGroup._fields)
        image = tree["image"]
        if not isinstance(image, str) or not (re.fullmatch(_IMAGE, image) or (_is_file(image) and image.isprintable())):
            raise self._wrong("image", image)
        counts = {key: self._count(tree, key, 1) for key in ("per_node", "vcpus", "ram_mib")}
        return GuestGroup(image=image, **counts)

    def _pinning(self) -> Pinning:
        tree = self.tree["pinning"]
        self._keys(tree, Pinning._fields)
        mode, cpus = tree["mode"], tree["cpus"]
        if mode not in (*PINNINGS, "map") or (cpus is None) == (mode == "map"):
            raise self._wrong("pinning", tree)
        if cpus is None:
            return Pinning(mode, None)
        if not isinstance(cpus, list) or not 1 <= len(cpus) <= 1024:
            raise self._wrong("pinning", cpus)
        for guest in cpus:
            if not isinstance(guest, list) or not 1 <= len(guest) <= 4096:
                raise self._wrong("pinning", guest)
            for listed in guest:
                if not isinstance(listed, str) or not is_cpu_list(listed):
                    raise self._wrong("pinning", listed)
        return Pinning(mode, tuple(tuple(guest) for guest in cpus))

    def _disk(self) -> Optional[Disk]:
        tree = self.tree["disk"]
        if tree is None:
            return None
        self._keys(tree, Disk._fields)
        image, size = tree["image"], tree["size_mib"]
        if (image is None) == (size is None) or not (image is None or _is_file(image)):
            raise self._wrong("disk", tree)
        return Disk(image, None if size is None else self._count(tree, "size_mib", 1))

    def _iocm(self) -> Optional[Iocm]:
        tree = self.tree["iocm"]
        if tree is None:
            return None
        self._keys(tree, Iocm._fields)
        cores = Iocm(self._count(tree, "min_cores", 0), self._count(tree, "max_cores", 0))
        if cores.min_cores > cores.max_cores:
            raise self._wrong("iocm", tree)
        return cores

    def _metadata(self) -> Optional[dict[str, Any]]:
        tree = self.tree["metadata"]
        if tree is None:
            return None
        if (
            not isinstance(tree, dict)
            or not is_plain(tree)
            or not all(re.fullmatch(_METADATA_KEY, key) for key in tree)
        ):
            raise self._wrong("metadata", tree)
        return tree

    def _script(self) -> Optional[str]:
        script = self._optional("script", _SHA256)
        if script is None and not self.tree["interactive"]:
            raise self._wrong("script", None)
        return script

    def _array(self) -> Optional[str]:
        array = self._optional("array", _INDEXES)
        try:
            if array is not None:
                members(array)
        except ValueError:
            raise self._wrong("array", array) from None
        return array

    def _arguments(self) -> str:
        value = self.tree["arguments"]
        if not isinstance(value, str) or len(value) > MAX_ARGUMENTS or "\n" in value or "\x00" in value:
            raise self._wrong("arguments", value)
        try:
            value.encode("utf-8", "surrogateescape")  # as it will be given to the guest
        except UnicodeEncodeError:
            raise self._wrong("arguments", value) from None
        return value

    def _count(self, tree: dict[str, Any], key: str, low: int) -> int:
        value = tree[key]
        if type(value) is not int or not low <= value <= 2**31:
            raise self._wrong(key, value)
        return value

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

    def _match(self, key: str, pattern: str) -> str:
        value = self.tree[key]
        if not isinstance(value, str) or not re.fullmatch(pattern, value):
            raise self._wrong(key, value)
        return value

    def _optional(self, key: str, pattern: str) -> Optional[str]:
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
            if not isinstance(value, str) or not re.fullmatch(_WORD, value):
                raise self._wrong(key, value)
        return tuple(values)
