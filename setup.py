"""What wheels carry beside the packages, file by file; all else about the project is in setup.cfg."""

from __future__ import annotations

import os

from setuptools import setup

TREES = {
    "templates": "share/vtorque/templates",
    "mom_priv_hooks": "share/vtorque/mom_priv_hooks",
    "contrib": "share/vtorque/contrib",
    "man": "share/man/man1",
}
"""Folders of the repository, and where they go below an environment's root."""


def data_files() -> list[tuple[str, list[str]]]:
    found = []
    for tree, place in TREES.items():
        for folder, folders, names in os.walk(tree):
            folders[:] = sorted(name for name in folders if name != "__pycache__")
            files = [os.path.join(folder, name) for name in sorted(names)]  # noqa: PTH118
            if files:
                found.append((os.path.normpath(os.path.join(place, os.path.relpath(folder, tree))), files))  # noqa: PTH118
    return found


setup(data_files=data_files())
