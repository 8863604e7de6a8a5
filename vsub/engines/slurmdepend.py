"""`qsub -W depend=…` as Slurm's `--dependency`.

Both know `after`, `afterok`, `afternotok` and `afterany`, mean the same by them, and join several by commas: all have
to hold. A job that waits for what cannot come any more is ended by TORQUE, and by Slurm with `--kill-on-invalid-dep`,
which `srun` has not. A dependency on a whole array is one on its id; of a number of its members
(`afterokarray:12[][3]`) Slurm knows nothing. Forms: qsub(1B) of TORQUE 6.1, sbatch(1) of Slurm 22.05.
"""

from __future__ import annotations

import re

from vmgr.errors import Code, VTorqueError
from vsub.engines.slurmrequest import without_counterpart
from vsub.options import Option

_KINDS = {kind: kind for kind in ("after", "afterok", "afternotok", "afterany")}
_KINDS.update(afterstartarray="after", afterokarray="afterok", afternotokarray="afternotok", afteranyarray="afterany")
_OTHERS = frozenset(
    ("on", "synccount", "syncwith", "before", "beforeok", "beforenotok", "beforeany", "beforestartarray",
     "beforeokarray", "beforenotokarray", "beforeanyarray")
)  # fmt: skip
_JOB = r"([0-9]{1,15})(?:\[([0-9]{0,7})\]|[_-]([0-9]{1,7}))?(?:\.[A-Za-z0-9._-]{1,255})?"
_COUNTED = r"[0-9]{1,15}(?:\[\])?(?:\.[A-Za-z0-9._-]{1,255})?\[[0-9]{1,7}\](?:\.[A-Za-z0-9._-]{1,255})?"
"""A number of an array's members: brackets behind its name, which ends with `[]` or leaves them out."""


def dependency_list(text: str, option: Option) -> str:
    """The dependencies in Slurm's language. Raises VTorqueError (VT-USAGE, VT-OPTION)."""
    found = []
    for part in text.split(","):
        kind, *jobs = part.strip().split(":")
        if kind in _OTHERS:
            raise without_counterpart(option, f"{kind}: say afterok, afternotok, afterany or after on the other job")
        if kind in _KINDS and kind.endswith("array") and any(re.fullmatch(_COUNTED, job) for job in jobs):
            raise without_counterpart(option, f"{part[:80]}: say {_KINDS[kind]} on the whole array")
        matches = [re.fullmatch(_JOB, job) for job in jobs]
        if kind not in _KINDS or not matches:
            raise _unreadable(option, part)
        ids = []
        for match in matches:
            if match is None:
                raise _unreadable(option, part)
            index = match[2] or match[3]
            ids.append(match[1] if not index else f"{match[1]}_{index}")
        found.append(":".join((_KINDS[kind], *ids)))
    return ",".join(found)


def _unreadable(option: Option, part: str) -> VTorqueError:
    return VTorqueError(
        f"the dependency {part[:80]!r} ({option.source}) cannot be read", code=Code.USAGE,
        hint="write -W depend=afterok:JOB[:JOB…][,afterany:JOB…]",
    )  # fmt: skip
