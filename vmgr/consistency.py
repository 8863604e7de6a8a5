"""Whether a policy, as it holds for somebody somewhere, still makes sense once all overrides have been put together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Optional

from vmgr.errors import VTorqueError
from vmgr.policy import Policy, Subject
from vmgr.policyschema import KEYS
from vmgr.request import SIZES, show

MAX_COMBINATIONS = 10_000


def examine(policy: Policy) -> list[str]:
    """A line for each default that is not within what is allowed, with what holds instead.

    Raises VTorqueError (VT-CONFIG) when two overrides leave nothing of a key.
    """
    notes: list[str] = []
    for key, leaves in KEYS.items():
        if not isinstance(leaves, dict):
            continue
        if "min" in leaves:
            bounds = policy.bounds(key)
            if "default" in leaves:
                notes += _moved(policy, key, policy.leaf(key, "default"), bounds.default)
        elif "allowed" in leaves and "default" in leaves:
            notes += _moved(policy, key, policy.leaf(key, "default"), policy.default(key))
    if policy.default("img") is None:
        notes.append("policy.img.default is not set: a job that names no image is refused")
    return notes


def _moved(policy: Policy, key: str, said: Any, holds: Any) -> Iterator[str]:
    if said != holds:
        shown, instead = (show(key, value) if key in SIZES else value for value in (said, holds))
        place = policy.origin(key, "default")
        yield f"policy.{key}.default is {shown} ({place}), which is not allowed: {instead} holds"


def contradictions(
    policy: Mapping[str, Any],
    policy_for: Callable[[Subject], Policy],
    group_of: Callable[[str], Optional[str]],
) -> list[str]:
    """A line for each user or group with overrides and each queue with overrides that leave nothing of a key.

    `policy` is the checked tree below `policy`, `group_of` gives a user's primary group. Of very many combinations the
    first `MAX_COMBINATIONS` are looked at.
    """
    queues = [None, *policy["queues"]]
    people = [("", None), *(("", group) for group in policy["groups"])]
    people += [(user, group_of(user)) for user in policy["users"]]
    found: dict[str, None] = {}
    pairs = ((person, queue) for person in people for queue in queues)
    for _, ((user, group), queue) in zip(range(MAX_COMBINATIONS), pairs):
        try:
            examine(policy_for(Subject(user, group, queue)))
        except VTorqueError as err:
            found.setdefault(err.detail)
    return list(found)
