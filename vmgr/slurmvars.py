"""Variables by which a user has Slurm's commands show something else, of which what we ask them must not depend."""

from __future__ import annotations

from collections.abc import Mapping

_FILTERS = ("SQUEUE_", "SINFO_", "SCONTROL_", "SLURM_CLUSTERS")
"""What their names begin with: squeue(1), sinfo(1), scontrol(1) of Slurm 22.05 to 26.05."""


def unfiltered(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment without them."""
    return {name: value for name, value in environ.items() if not name.startswith(_FILTERS)}
