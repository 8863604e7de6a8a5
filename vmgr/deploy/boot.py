"""Starts the node's program from what came over the remote shell: its modules are in memory, and no file is written.

`PAYLOAD` is defined by the command line that runs this text: `modules` are sources by their names, `order` is for the
node's program. This text is run as it stands, so that it imports nothing of vTorque before the modules are known.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, Optional


class Sources(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds modules among sources in memory; one that has others below it is a package."""

    def __init__(self, modules: Mapping[str, str]) -> None:
        self._modules = modules

    def find_spec(
        self, name: str, path: Optional[Sequence[str]], target: Optional[ModuleType] = None
    ) -> Optional[importlib.machinery.ModuleSpec]:
        if name not in self._modules:
            return None
        package = any(other.startswith(f"{name}.") for other in self._modules)
        return importlib.util.spec_from_loader(name, self, is_package=package)

    def exec_module(self, module: ModuleType) -> None:
        source = self._modules[module.__name__]
        exec(compile(source, f"<{module.__name__}>", "exec"), module.__dict__)


def start(payload: Mapping[str, Any]) -> None:
    """Run the node's program."""
    sys.dont_write_bytecode = True
    sys.meta_path.insert(0, Sources(payload["modules"]))
    program = importlib.import_module("vmgr.deploy.nodeside")
    program.main(payload["order"], sys.stdin.buffer)


if "PAYLOAD" in globals():
    start(globals()["PAYLOAD"])
