"""The configuration that a file of the bash vTorque becomes: what is carried over, what is not, and why."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple, Optional

from vmgr.fields import Key, OneOf, Problem
from vmgr.migration.parameters import CONSTANTS, NUMBERED_SWITCHES, PARAMETERS, Dropped
from vmgr.migration.shellfile import ShellFile, Unread, read_shell
from vmgr.schema import SCHEMA, check_config
from vmgr.yamlfile import dotted

_FRONT_PATHS = ("PBS_QSUB_ON_FE", "REAL_QSUB_ON_SERVER")
_NODE_PATHS = ("PBS_QSUB_ON_NODES", "REAL_QSUB_ON_NODES")
_FRONT_NAMES = ("REGEX_FE", "SERVER_HOSTNAME")
_REDHAT = ("redhat", "centos")


class Carried(NamedTuple):
    """A parameter that is carried over: the line where it is set, and our key and value."""

    parameter: str
    line: int
    key: str
    value: Any


class Left(NamedTuple):
    """A parameter that is dropped: the line where it is set, and why."""

    parameter: str
    line: int
    reason: str


class Converted(NamedTuple):
    """`tree` is a legal configuration; `unread` are the parts of the file in which no parameter stands by itself."""

    tree: dict[str, Any]
    carried: list[Carried]
    dropped: list[Left]
    unread: list[Unread]
    notes: list[str]


def convert(text: str) -> Converted:
    """Turn the text of an old configuration file into one of ours."""
    return _Conversion(read_shell(text, CONSTANTS)).run()


class _Conversion:
    def __init__(self, file: ShellFile) -> None:
        self._file = file
        self._carried: list[Carried] = []
        self._dropped: list[Left] = []
        self._notes: list[str] = []

    def run(self) -> Converted:
        for name, assigned in self._file.values.items():
            self._take(name, assigned.line)
        self._take_qsub()
        unread = self._take_unread()
        tree = self._legal()
        self._carried.sort(key=lambda item: (item.line, item.parameter))
        self._dropped.sort(key=lambda item: (item.line, item.parameter))
        return Converted(tree, self._carried, self._dropped, unread, self._notes)

    def _drop(self, name: str, line: int, reason: str) -> None:
        self._dropped.append(Left(name, line, reason))

    def _take(self, name: str, line: int) -> None:
        parameter = PARAMETERS.get(name)
        if parameter is None:
            if name not in CONSTANTS:
                self._drop(name, line, "no parameter of the vTorque of 2018")
            return
        if parameter.key is None:
            self._drop(name, line, parameter.reason)
            return
        if parameter.key == "submit.qsub":
            return
        if parameter.key == "guest.packages" and name != self._packages():
            self._drop(name, line, f"guest.packages is one list for all guests; that of {self._packages()} counts")
            return
        try:
            value = parameter.read(self._file.values[name].value)
            self._add(name, line, parameter.key, value)
        except Dropped as reason:
            self._drop(name, line, str(reason))
            return
        given = self._file.values[name].value
        if parameter.read in NUMBERED_SWITCHES and given in ("0", "1"):
            meant = "enabled" if given == "0" else "disabled"
            self._notes.append(f"{parameter.key}: {name} is {given}, which was {meant} there")
        if parameter.note:
            self._notes.append(f"{parameter.key}: {parameter.note}")

    def _packages(self) -> str:
        distro = self._file.values.get("DISTRO_DEFAULT")
        is_redhat = distro is not None and isinstance(distro.value, str) and distro.value.lower() in _REDHAT
        return "SW_PACKAGES_REDHAT" if is_redhat else "SW_PACKAGES_DEBIAN"

    def _add(self, name: str, line: int, key: str, value: Any) -> None:
        """Carry a value over; lists grow, another value of the same key must be the same. Raises Dropped."""
        reader = _key(key)
        try:
            reader.read(value)
        except ValueError as err:
            raise Dropped(f"{key} cannot be {_shown(value)}: {err}") from None
        if not isinstance(value, list):
            other = next((item for item in self._carried if item.key == key), None)
            if other is not None and other.value != value and key != "logging.level":
                raise Dropped(f"{key} is {_shown(other.value)} already, by {other.parameter} in line {other.line}")
        self._carried.append(Carried(name, line, key, value))

    def _first(self, names: tuple[str, ...]) -> Optional[str]:
        return next((name for name in names if name in self._file.values), None)

    def _take_qsub(self) -> None:
        """One path of qsub, or one for front ends and one for nodes."""
        front, node, where = (self._first(names) for names in (_FRONT_PATHS, _NODE_PATHS, _FRONT_NAMES))
        paths: dict[str, str] = {}
        for name in (front, node):
            if name is None:
                continue
            line = self._file.values[name].line
            try:
                path = PARAMETERS[name].read(self._file.values[name].value)
                _read_key("submit.qsub", path)
                paths[name] = path
            except Dropped as reason:
                self._drop(name, line, str(reason))
        for name in (*_FRONT_PATHS, *_NODE_PATHS, *_FRONT_NAMES):
            if name in self._file.values and name not in (front, node, where):
                self._drop(name, self._file.values[name].line, "a newer parameter for the same is set too")
        self._place_qsub(paths, front, node, where)

    def _place_qsub(
        self, paths: Mapping[str, str], front: Optional[str], node: Optional[str], where: Optional[str]
    ) -> None:
        lines = {name: self._file.values[name].line for name in (front, node, where) if name is not None}
        if front is None or node is None or len(set(paths.values())) < 2:
            for name, path in paths.items():
                self._carried.append(Carried(name, lines[name], "submit.qsub", path))
            if where is not None:
                self._drop(where, lines[where], "needed only where front ends and nodes have other paths of qsub")
            return
        patterns = self._front_ends(where)
        if where is None or not patterns:
            self._carried.append(Carried(front, lines[front], "submit.qsub", paths[front]))
            self._drop(node, lines[node], f"no front ends are told apart: {front} is taken for all hosts")
            return
        both = {**dict.fromkeys(patterns, paths[front]), "*": paths[node]}
        for name in (front, node, where):
            self._carried.append(Carried(name, lines[name], "submit.qsub", both))

    def _front_ends(self, where: Optional[str]) -> list[str]:
        """The patterns of the front ends' names; none where they cannot be told from nodes."""
        if where is None:
            return []
        value, line = self._file.values[where]
        if value == "*":
            self._drop(where, line, "it holds for all hosts")
            return []
        try:
            patterns: list[str] = PARAMETERS[where].read(value)
        except Dropped as reason:
            self._drop(where, line, str(reason))
            return []
        return patterns

    def _take_unread(self) -> list[Unread]:
        """Parameters that could not be read are dropped by name; gives the parts that hold none."""
        others, seen = [], set()
        for part in reversed(self._file.unread):
            names = [name for name in part.names if name in PARAMETERS and name not in self._file.values]
            for name in names:
                if name not in seen:
                    own = PARAMETERS[name].reason
                    where = f"lines {part.first} to {part.last}" if part.last > part.first else f"line {part.first}"
                    self._drop(name, part.first, own or f"not read, because in {where} stands {part.reason}")
                    seen.add(name)
            if not names:
                others.append(part)
        return others[::-1]

    def _legal(self) -> dict[str, Any]:
        """The tree of what is carried over, without what does not go together."""
        while True:
            tree = self._tree()
            try:
                check_config(copy.deepcopy(tree))
                return tree
            except Problem as problem:
                self._take_back(problem)

    def _tree(self) -> dict[str, Any]:
        tree: dict[str, Any] = {}
        for item in self._carried:
            section, leaf = _section(tree, item.key)
            if isinstance(item.value, list):
                section[leaf] = list(dict.fromkeys([*section.get(leaf, []), *item.value]))
            else:
                section[leaf] = item.value
        policy = tree.get("policy", {})
        for word, leaves in policy.items():
            _widen(leaves, SCHEMA["policy"][word])
        return tree

    def _take_back(self, problem: Problem) -> None:
        """Drop what a check of the whole refuses: the values of the key, else of its section."""
        at = dotted(problem.path)
        while True:
            gone = [item for item in self._carried if item.key == at or item.key.startswith(f"{at}.")]
            if gone or not at:
                break
            at = at.rpartition(".")[0]
        assert gone, f"{dotted(problem.path)}: {problem.text}"
        for item in gone:
            self._carried.remove(item)
            self._drop(item.parameter, item.line, f"{item.key} cannot be {_shown(item.value)}: {problem.text}")


def _section(tree: dict[str, Any], key: str) -> tuple[dict[str, Any], str]:
    *sections, leaf = key.split(".")
    for word in sections:
        tree = tree.setdefault(word, {})
    return tree, leaf


def _widen(leaves: dict[str, Any], keys: Mapping[str, Key]) -> None:
    """Set the bounds that nobody has set so that the values lie within, as there were none."""
    value = leaves.get("default")
    if "allowed" in keys and value is not None and value not in (keys["allowed"].default or [value]):
        leaves.setdefault("allowed", [*keys["allowed"].default, value])
    if "min" not in keys:
        return
    read = keys["default"].read
    now = {leaf: read(leaves[leaf]) if leaf in leaves else keys[leaf].default for leaf in ("min", "default", "max")}
    if "default" in leaves:
        for leaf, beyond in (("max", now["default"] > now["max"]), ("min", now["default"] < now["min"])):
            if beyond:
                leaves.setdefault(leaf, leaves["default"])
    else:
        for leaf, beyond in (("max", now["default"] > now["max"]), ("min", now["default"] < now["min"])):
            if beyond:
                leaves["default"] = leaves[leaf]


def _key(key: str) -> Key:
    kind: Any = SCHEMA
    for word in key.split("."):
        kind = kind[word]
    if isinstance(kind, OneOf):
        return kind.key
    assert isinstance(kind, Key)
    return kind


def _read_key(key: str, value: Any) -> None:
    try:
        _key(key).read(value)
    except ValueError as err:
        raise Dropped(f"{key} cannot be {_shown(value)}: {err}") from None


def _shown(value: Any) -> str:
    text = ", ".join(value) if isinstance(value, list) else str(value)
    return repr(text[:80] + "…" if len(text) > 80 else text)
