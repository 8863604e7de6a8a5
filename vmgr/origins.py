"""Where values of the configuration come from: for each, the place that won, and what it has overridden."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Optional

from vmgr.policy import LAYERS, Subject


class Source(NamedTuple):
    """One place that says what a key is. `layer` is `default`, `file`, or an override such as `users.alice`.

    `line` is that of the configuration's file, None for a default that is built in.
    """

    value: Any
    layer: str
    line: Optional[int]

    @property
    def text(self) -> str:
        """The place, for people."""
        if self.line is None:
            return self.layer
        return f"line {self.line}" if self.layer == "file" else f"line {self.line}, {self.layer}"


def flat(tree: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a checked tree with its dotted key; an item of a list of sections is `key[0]`."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from flat(value, f"{at}.{key}" if at else key)
    elif isinstance(tree, list) and tree and isinstance(tree[0], dict):
        for index, value in enumerate(tree):
            yield from flat(value, f"{at}[{index}]")
    else:
        yield at, tree


def sources(tree: Mapping[str, Any], lines: Mapping[str, int]) -> dict[str, list[Source]]:
    """The places of every key of a checked tree, the one that holds first."""
    from vmgr.schema import check_config  # most commands do without

    defaults = dict(flat(check_config({})))
    found = {}
    for key, value in flat(tree):
        built_in = [Source(defaults[key], "default", None)] if key in defaults else []
        line = lines.get(key)
        if line is not None:
            found[key] = [Source(value, "file", line), *built_in]
        else:
            found[key] = built_in or [Source(value, "default", None)]
    return found


def policy_sources(tree: Mapping[str, Any], lines: Mapping[str, int], subject: Subject) -> dict[str, list[Source]]:
    """The places of every key below `policy` as it holds for a subject, the one that holds first."""
    policy = tree["policy"]
    general = {key: value for key, value in policy.items() if key not in LAYERS}
    found = sources({"policy": general}, lines)
    for layer, name in zip(LAYERS, (subject.queue, subject.group, subject.user)):
        for key, value in flat(policy[layer].get(name, {})):
            line = lines.get(f"policy.{layer}.{name}.{key}")
            found[f"policy.{key}"].insert(0, Source(value, f"{layer}.{name}", line))
    return found
