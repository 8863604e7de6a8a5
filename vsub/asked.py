"""What the `-vm` of one place, command line or directives, come to."""

from __future__ import annotations

from typing import Optional

from vmgr.errors import Code, VTorqueError
from vmgr.request import Request, merge, parse_vm
from vsub.options import Option


def requested(options: tuple[Option, ...]) -> Optional[Request]:
    """The request in the `-vm` of one place; None for `off`.

    Raises VTorqueError (VT-KEY, VT-VALUE); `off` beside anything else is an error that names both places.
    """
    request: Request = {}
    off: Optional[Option] = None
    other: Optional[Option] = None
    for option in options:
        more = parse_vm(option.value or "", option.source)
        if more is None:
            off = option
        else:
            other = option
            merge(request, more)
    if off is not None and other is not None:
        raise VTorqueError(
            f"-vm off ({off.source}) and -vm {other.value} ({other.source}) exclude each other", code=Code.KEY
        )
    return None if off is not None else request
