"""Where an installation of the toolkit keeps its files.

The root of an installation is the folder that holds its virtual environment, found from the running interpreter:
root never takes it from the environment, where a user could have put it.

What a submission uses is text: `pathlib` costs it a third of an interpreter's start.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Union

if TYPE_CHECKING:
    from pathlib import Path


class Installation:
    """The fixed places under the root of one installation."""

    def __init__(self, root: Union[str, os.PathLike[str]]) -> None:
        self.prefix = os.fspath(root)

    @property
    def config_file(self) -> str:
        """The site's configuration."""
        return f"{self.prefix}/etc/vtorque/vtorque.yaml"

    def program(self, name: str) -> str:
        """A program that wrappers and hooks start; nobody has them on a PATH."""
        return f"{self.prefix}/libexec/{name}"

    @property
    def local_qsub(self) -> str:
        """The `qsub` of the embedded batch system."""
        return self.program("local/qsub")

    @property
    def root(self) -> Path:
        from pathlib import Path  # as the module says

        return Path(self.prefix)

    @property
    def config(self) -> Path:
        """The site's configuration."""
        return self.root / "etc" / "vtorque" / "vtorque.yaml"

    @property
    def share(self) -> Path:
        """Templates, recipes and samples as they came with the toolkit."""
        return self.root / "share" / "vtorque"

    @property
    def templates(self) -> Path:
        return self.share / "templates"

    @property
    def recipes(self) -> Path:
        return self.share / "contrib" / "images"

    @property
    def libexec(self) -> Path:
        """The folder of `program`."""
        return self.root / "libexec"


def installation() -> Installation:
    """The installation that the running interpreter belongs to: `<root>/venv/bin/python3`."""
    return Installation(sys.executable.rsplit("/", 3)[0])
