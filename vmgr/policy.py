"""The site's policy as it holds for one submission: the general values, overridden for its queue, group and user."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple, Optional

from vmgr.errors import Code, VTorqueError
from vmgr.request import SIZES, show
from vmgr.units import format_size_mib

NO_DEFAULTS = frozenset(("file",))
"""Choices that need more than the word and are nobody's default."""
LAYERS = ("queues", "groups", "users")
"""The overrides, the most specific last."""


class Subject(NamedTuple):
    """Who submits where: the user, the user's primary group, the queue (None: not known)."""

    user: str
    group: Optional[str]
    queue: Optional[str]


class Bounds(NamedTuple):
    """Policy of a number or a size (MiB)."""

    min: int
    max: int
    default: int

    def broken_by(self, value: int) -> Optional[str]:
        """The bound that `value` breaks, `min` or `max`; None when it lies within both."""
        return "min" if value < self.min else "max" if value > self.max else None


def is_among(value: str, allowed: Collection[str]) -> bool:
    """Whether a word is among what is allowed: an image is in each of its revisions, `debian-12@3`, with its name."""
    return value in allowed or value.partition("@")[0] in allowed


class Policy:
    """What holds, by request key and leaf (`min`, `max`, `default`, `allowed`, `enabled`), and where it was set."""

    def __init__(self, tree: Mapping[str, Any], places: Mapping[str, str], origin: Callable[[str], str]) -> None:
        self._tree = tree
        self._places = places
        self._origin = origin

    def bounds(self, key: str) -> Bounds:
        """The bounds of a key that has them; a default that an override left outside of them is moved inside.

        Raises VTorqueError (VT-CONFIG) when two overrides together leave nothing.
        """
        leaves = self._tree[key]
        low, high = leaves["min"], leaves["max"]
        if low > high:
            raise VTorqueError(
                f"policy.{key}: min {show(key, low)} ({self.origin(key, 'min')}) is above "
                f"max {show(key, high)} ({self.origin(key, 'max')})",
                code=Code.CONFIG,
                hint="two overrides exclude each other",
            )
        return Bounds(low, high, min(max(leaves.get("default", low), low), high))

    def allowed(self, key: str) -> Optional[tuple[str, ...]]:
        """What may be asked for, None for anything."""
        allowed = self._tree[key]["allowed"]
        return None if allowed is None else tuple(allowed)

    def default(self, key: str) -> Any:
        """What holds when nobody asks. A default that overrides together do not allow moves to what they do."""
        default, allowed = self._tree[key]["default"], self._tree[key].get("allowed")
        if default is None or allowed is None:
            return default
        if isinstance(default, list):
            return [name for name in default if name in allowed]
        possible = [word for word in allowed if word not in NO_DEFAULTS]
        return default if is_among(default, possible) or not possible else possible[0]

    def network(self, guests: int) -> str:
        """The network of a job with so many guests whose user asks for none: several are to reach each other."""
        several, allowed = self._tree["network"]["several"], self.allowed("network")
        usual = str(self.default("network"))
        return several if guests > 1 and several is not None and (allowed is None or several in allowed) else usual

    def leaf(self, key: str, leaf: str) -> Any:
        """Any other leaf of a key."""
        return self._tree[key][leaf]

    def enabled(self, key: str) -> bool:
        """Whether the key may be asked for at all."""
        return bool(self._tree[key]["enabled"])

    def flag(self, key: str) -> bool:
        """A switch of the policy itself: `raise_requests`, `grow_defaults`."""
        return bool(self._tree[key])

    def origin(self, key: str, leaf: Optional[str] = None) -> str:
        """Where a value was set, for messages: file, line and the override's name, or `the built-in default`."""
        name = f"{key}.{leaf}" if leaf else key
        place = self._places.get(name)
        return self._origin(f"policy.{name}") if place is None else f"{self._origin(place)}, {place}"

    def rows(self) -> list[tuple[str, Any, str]]:
        """Every value by its dotted key, with its origin, for `vmgr config show`."""
        rows = []
        for key, leaves in self._tree.items():
            for leaf, value in leaves.items() if isinstance(leaves, dict) else ((None, leaves),):
                if leaf == "default" and leaves.get("min", 0) <= leaves.get("max", 0):
                    value = self.bounds(key).default if "min" in leaves else self.default(key)
                shown = format_size_mib(value) if key in (*SIZES, "disk") and type(value) is int else value
                rows.append((f"policy.{key}.{leaf}" if leaf else f"policy.{key}", shown, self.origin(key, leaf)))
        return rows


def effective_policy(policy: Mapping[str, Any], subject: Subject, origin: Callable[[str], str]) -> Policy:
    """The policy for one subject. `policy` is the checked tree below `policy` in the configuration.

    The user's override wins over the group's, that over the queue's, that over the general value, leaf by leaf.
    `origin` gives the place of a dotted key of the configuration.
    """
    tree: Mapping[str, Any] = {key: value for key, value in policy.items() if key not in LAYERS}
    places: dict[str, str] = {}
    for layer, name in zip(LAYERS, (subject.queue, subject.group, subject.user)):
        override = policy[layer].get(name, {})
        tree = overridden(tree, override)
        for key, value in override.items():
            at = f"policy.{layer}.{name}.{key}"
            leaves = [f".{leaf}" for leaf in value] if isinstance(value, dict) else [""]
            places.update((f"{key}{leaf}", f"{at}{leaf}") for leaf in leaves)
    return Policy(tree, places, origin)


def overridden(general: Mapping[str, Any], override: Mapping[str, Any]) -> dict[str, Any]:
    """A policy with what an override says of it, leaf by leaf."""
    return {
        key: {**value, **override.get(key, {})} if isinstance(value, dict) else override.get(key, value)
        for key, value in general.items()
    }
