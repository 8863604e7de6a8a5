"""Where an installation of the toolkit keeps its files.

The root of an installation is the folder that holds its virtual environment, found from the running interpreter:
root never takes it from the environment, where a user could have put it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple


class Installation(NamedTuple):
    """The fixed places under the root of one installation."""

    root: Path

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
        """Programs that wrappers and hooks start; nobody has them on a PATH."""
        return self.root / "libexec"


def installation() -> Installation:
    """The installation that the running interpreter belongs to: `<root>/venv/bin/python3`."""
    return Installation(Path(sys.executable).parents[2])
