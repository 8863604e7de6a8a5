"""What the clients have in common: their statuses, and how they say that something failed."""

from __future__ import annotations

import os
import sys
from typing import Callable

from vsub.engines.local.options import UsageError
from vsub.engines.local.protocol import ProtocolError

USAGE = 2
NO_SERVER = 111
"""Exit status when the daemon cannot be reached, as TORQUE's (ECONNREFUSED)."""


class Failure(Exception):
    """One line for standard error and an exit status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def run(name: str, body: Callable[[], int]) -> int:
    """Run a client's body; failures become one line and a status."""
    try:
        return body()
    except UsageError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return USAGE
    except Failure as failure:
        print(failure, file=sys.stderr)
        return failure.status
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left in the buffer goes nowhere
        return 1
    except (OSError, ProtocolError) as error:
        print(f"{name}: cannot reach the embedded batch server: {error}", file=sys.stderr)
        return NO_SERVER
