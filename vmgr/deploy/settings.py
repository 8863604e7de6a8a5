"""The configuration of an installation, for an installer that has no YAML: it has this run by the programs it built."""

from __future__ import annotations

import json

from vmgr.config import compile_config, is_compiled, load_config, read_tree
from vmgr.errors import VTorqueError
from vmgr.front import write_front
from vmgr.paths import Installation


def tell(prefix: str) -> None:
    """Print the configuration of the installation in `prefix` as JSON, or what is wrong with it, as `error`."""
    install = Installation(prefix)
    try:
        load_config(install)
        print(json.dumps(read_tree(install.config_file)[0]))
    except VTorqueError as err:
        print(json.dumps({"error": err.detail}))


def compile_(prefix: str, again: str) -> None:
    """Leave what submissions read beside the configuration, where it is not current or `again` is not empty.

    Raises VTorqueError, OSError.
    """
    install = Installation(prefix)
    if again or not is_compiled(install.config_file):
        write_front(compile_config(install), install)
