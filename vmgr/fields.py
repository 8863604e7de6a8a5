"""Kinds of settings, and the check of plain data (from YAML) against a section of them.

A section is a mapping of names to keys or further sections. Checking gives plain data back, complete with defaults,
so that a checked tree can be stored as JSON and read again without a check.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Callable, NamedTuple, Union

from vmgr.deploy.hookfiles import is_job_type
from vmgr.images.pool import REFERENCE
from vmgr.units import parse_size_mib

Path_ = tuple[Union[str, int], ...]
"""Where a value stands in the tree: mapping keys and list positions."""


class Problem(Exception):
    """One thing wrong in a tree: where, and what is allowed."""

    def __init__(self, path: Path_, text: str) -> None:
        super().__init__(text)
        self.path = path
        self.text = text


class Key(NamedTuple):
    """One setting: `read` turns what stands in the file into the value or raises ValueError naming what is allowed."""

    read: Callable[[Any], Any]
    default: Any
    doc: str


class Items(NamedTuple):
    """A list of sections of the same shape."""

    section: Mapping[str, Any]
    default: list[dict[str, Any]]
    doc: str


class Named(NamedTuple):
    """Sections of the same shape under names of the site's own; keys that are not given are left out, not filled in."""

    section: Mapping[str, Any]
    doc: str


class OneOf(NamedTuple):
    """A setting for all, or one for each of the site's patterns: a value, or a mapping of names to values."""

    key: Key
    names: Callable[[Any], str]


REQUIRED = object()
"""The default of a key that has none and must be set."""


def text(value: Any) -> str:
    if not isinstance(value, str) or not value or not value.isprintable():
        raise ValueError("a text without control characters is needed")
    return value


def name(value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", value):
        raise ValueError("a name of up to 64 letters, digits, `-`, `_` and `.` is needed")
    return value


def job_type(value: Any) -> str:
    """A type of jobs of TORQUE's (`qsub -T`) that can be vTorque's own."""
    if not isinstance(value, str) or not is_job_type(value):
        raise ValueError("a word of up to 32 letters, digits, `-`, `_` is needed, no ending of a hook (user, parallel)")
    return value


def image(value: Any) -> str:
    """An image of the pool, in its newest revision or in one."""
    if not isinstance(value, str) or not re.fullmatch(REFERENCE, value):
        raise ValueError("the name of an image is needed, `debian-12`, or with its revision, `debian-12@3`")
    return value


def account(value: Any) -> str:
    """The name of a user, group or queue, as name services have them: `DOM\\user`, `domain users`, `user@dom`."""
    if not isinstance(value, str) or not value.isprintable() or not value.strip() or ":" in value or "/" in value:
        raise ValueError("a name is needed; numbers and words like `on` must stand in quotes")
    return value


def path(value: Any) -> str:
    printable = isinstance(value, str) and value.isprintable() and not any(c.isspace() for c in value)
    if not printable or not value.startswith("/") or "/../" in value + "/":
        raise ValueError("an absolute path without blanks and `..` is needed")
    return str(value)


def flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false is needed")
    return value


def mac_prefix(value: Any) -> str:
    """The first bytes of MAC addresses of one's own: unicast, locally administered (IEEE 802)."""
    if (
        not isinstance(value, str)
        or not re.fullmatch(r"[0-9a-fA-F]{2}(?::[0-9a-fA-F]{2}){0,2}", value)
        or int(value[:2], 16) & 3 != 2
    ):
        raise ValueError(
            'one to three bytes such as "02" or "02:56" (in quotes) are needed, the first with '
            "2, 6, A or E as its second digit"
        )
    return value.lower()


def size(value: Any) -> int:
    """A memory or disk size, as MiB."""
    mib = parse_size_mib(str(value)) if isinstance(value, (int, str)) and not isinstance(value, bool) else None
    if mib is None:
        raise ValueError("a size such as 512M or 2G (a whole number of MiB) is needed")
    return mib


def _word(value: Any) -> Any:
    """`on` and `off` as the words that they are; to YAML they are true and false."""
    return ("on" if value else "off") if isinstance(value, bool) else value


def positive_size(value: Any) -> int:
    """A size, as MiB, of at least one."""
    mib = size(value)
    if mib < 1:
        raise ValueError("a size of at least 1M is needed")
    return mib


def choice(*allowed: str) -> Callable[[Any], str]:
    def read(value: Any) -> str:
        if not isinstance(_word(value), str) or _word(value) not in allowed:
            raise ValueError(f"one of {', '.join(allowed)} is needed")
        return str(_word(value))

    return read


def number(low: int, high: int) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError(f"a whole number from {low} to {high} is needed")
        return value

    return read


def pattern(value: Any) -> str:
    """A host name or a pattern of host names."""
    if not isinstance(value, str) or not value.translate(_PATTERN).isalnum():
        raise ValueError("a host name, possibly with `*`, `?` and `[…]`, is needed")
    return value


_PATTERN = {ord(char): "a" for char in "-_.*?[]!"}


def patterns(value: Any) -> list[str]:
    if not isinstance(value, list):
        raise ValueError("a list of host names, which may hold `*`, `?` and `[…]`, is needed")
    return [pattern(item) for item in value]


def choices(*allowed: str) -> Callable[[Any], list[str]]:
    def read(value: Any) -> list[str]:
        words = [_word(item) for item in value] if isinstance(value, list) else []
        if not words or any(not isinstance(word, str) or word not in allowed for word in words):
            raise ValueError(f"a list of {', '.join(allowed)} is needed")
        return words

    return read


def names(value: Any) -> list[str]:
    if not isinstance(value, list):
        raise ValueError("a list of names is needed")
    return [name(item) for item in value]


def images(value: Any) -> list[str]:
    if not isinstance(value, list):
        raise ValueError("a list of images is needed")
    return [image(item) for item in value]


def packages(value: Any) -> list[str]:
    """Names of packages, with a version where `=` or `-` leads to it, as apt and dnf have them."""
    if not isinstance(value, list) or not all(isinstance(item, str) and _PACKAGE.fullmatch(item) for item in value):
        raise ValueError("a list of names of packages is needed")
    return value


_PACKAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+:_=~-]{0,127}")


def nullable(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else read(value)


def check(tree: Any, section: Mapping[str, Any], at: Path_ = (), *, partial: bool = False) -> dict[str, Any]:
    """The values of `tree`, every key of `section` present, or with `partial` only those that stand in `tree`.

    Raises Problem for the first thing that is wrong.
    """
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise Problem(at, "a mapping of " + ", ".join(section) + " is needed")
    for word in tree:
        if word not in section:
            raise Problem((*at, word), f"unknown key; allowed here: {', '.join(section)}")
    return {
        word: _check_value(tree, word, kind, (*at, word), partial)
        for word, kind in section.items()
        if word in tree or not partial
    }


def _check_value(tree: dict[str, Any], word: str, kind: Any, at: Path_, partial: bool) -> Any:
    if isinstance(kind, OneOf):
        if not isinstance(tree.get(word), dict):
            return _check_value(tree, word, kind.key, at, partial)
        patterns = tree[word]
        named = {_read(kind.names, name, (*at, name)): kind.key for name in patterns}
        return {name: _check_value(patterns, name, key, (*at, name), partial) for name, key in named.items()}
    if isinstance(kind, Named):
        sections = tree.get(word)
        if sections is not None and not isinstance(sections, dict):
            raise Problem(at, "a mapping of names is needed")
        return {
            _read(account, title, (*at, title)): check(below, kind.section, (*at, title), partial=True)
            for title, below in (sections or {}).items()
        }
    if isinstance(kind, Key):
        if word not in tree:
            if kind.default is REQUIRED:
                raise Problem(at[:-1], f"the key {word} is missing ({kind.doc})")
            return kind.default
        return _read(kind.read, tree[word], at)
    if isinstance(kind, Items):
        items = tree.get(word, kind.default)
        if not isinstance(items, list):
            raise Problem(at, "a list is needed")
        return [check(item, kind.section, (*at, index)) for index, item in enumerate(items)]
    return check(tree.get(word), kind, at, partial=partial)


def _read(read: Callable[[Any], Any], value: Any, at: Path_) -> Any:
    try:
        return read(value)
    except ValueError as err:
        raise Problem(at, str(err)) from None
