"""Where the Slurm lies that tests run: the machine's own in /usr, or another one.

VTORQUE_TEST_SLURM names the folder of another: the prefix that it was installed under, with `bin` and `sbin`. Every
user must be able to reach it. munge is the machine's own in any case.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Optional

PREFIX = Path(os.environ.get("VTORQUE_TEST_SLURM") or "/usr")
BIN = PREFIX / "bin"
"""The commands, for `slurm.bin`."""
PATH = ":".join(dict.fromkeys((str(PREFIX / "sbin"), str(BIN), "/usr/sbin", "/usr/bin", "/sbin", "/bin")))
"""Where all of them are found."""


def lacking(names: Iterable[str]) -> Optional[str]:
    """The first of the programs that is not there: those of Slurm in its own folders, others anywhere."""
    own = f"{PREFIX / 'sbin'}:{BIN}"
    return next((name for name in names if not shutil.which(name, path=PATH if name == "munged" else own)), None)
