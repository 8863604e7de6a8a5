"""YAML files with the line of every key, for messages that name it."""

from __future__ import annotations

from typing import Any

import yaml

from vmgr.errors import Code, VTorqueError


def parse_yaml(data: bytes, source: str, *, texts: bool = False) -> tuple[Any, dict[str, int]]:
    """The plain data of a YAML document, with `texts` all of it as text, and the line (from 1) of each dotted key.

    A key that stands twice in one mapping is an error: YAML would silently take the last. Aliases are refused:
    they serve nobody here and can blow a small file up. Raises VTorqueError (VT-CONFIG) with the line.
    """
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(data, Loader=yaml.SafeLoader)):
            raise VTorqueError(f"{source}: aliases (*name) are not allowed", code=Code.CONFIG)
        root = yaml.compose(data, Loader=yaml.SafeLoader)
        tree = yaml.load(data, Loader=yaml.BaseLoader if texts else yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as err:
        mark = getattr(err, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        reason = getattr(err, "problem", None) or str(err).splitlines()[0]
        raise VTorqueError(f"{source}{where}: not YAML: {reason}", code=Code.CONFIG) from None
    lines: dict[str, int] = {}
    if root is not None:
        _collect(root, (), lines, source)
    return tree, lines


def dotted(path: tuple[Any, ...]) -> str:
    """A path in a tree as people write it: `policy.ram.max`, `mounts[0].name`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else (f".{part}" if text else str(part))
    return text


def _collect(node: yaml.Node, path: tuple[Any, ...], lines: dict[str, int], source: str) -> None:
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            inner = (*path, str(key.value))
            name = dotted(inner)
            if key.value in seen:
                raise VTorqueError(
                    f"{source} line {key.start_mark.line + 1}: {name} stands a second time", code=Code.CONFIG
                )
            seen.add(key.value)
            lines[name] = key.start_mark.line + 1
            _collect(value, inner, lines, source)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            inner = (*path, index)
            lines[dotted(inner)] = value.start_mark.line + 1
            _collect(value, inner, lines, source)
