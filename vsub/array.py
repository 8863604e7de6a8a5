"""The request of a job array, `qsub -t RANGE[,RANGE…][%LIMIT]`."""

from __future__ import annotations

import re

from vmgr.errors import Code, VTorqueError
from vmgr.jobspec import members
from vsub.options import Option

_REQUEST = r"([0-9]{1,7}(?:-[0-9]{1,7})?(?:,[0-9]{1,7}(?:-[0-9]{1,7})?){0,511})(%[0-9]{1,7})?"


def array_indexes(text: str, option: Option) -> str:
    """The indexes of the array, without the limit of how many run at a time. Raises VTorqueError (VT-USAGE)."""
    match = re.fullmatch(_REQUEST, text)
    try:
        if match is not None and members(match[1]):
            return match[1]
    except ValueError:
        pass
    raise VTorqueError(
        f"{text!r} ({option.source}) is no request of a job array", code=Code.USAGE,
        hint="write -t 1-4, -t 0,3,7-9 or -t 1-100%10",
    )  # fmt: skip
