"""What the launchers of the embedded batch system start, with the places that the configuration gives it."""

from __future__ import annotations

from collections.abc import Sequence

from vmgr.config import load_config
from vmgr.errors import VTorqueError
from vmgr.paths import installation


def local_daemon(argv: Sequence[str]) -> int:
    """`vtorque-local start|stop|status [OPTION…]`."""
    from vsub.engines.local.daemon import main

    local = load_config(installation()).local
    command, *options = argv or ["--help"]
    if command in ("start", "status"):
        options = ["--socket", local.socket, *options]
    if command in ("start", "stop", "status"):
        options = ["--spool", local.spool, *options]
    return main([command, *options])


def local_qsub(argv: Sequence[str]) -> int:
    """The embedded batch system's `qsub`."""
    from vsub.engines.local.qsub import qsub_main

    return qsub_main(list(argv), _socket())


def local_qstat(argv: Sequence[str]) -> int:
    """The embedded batch system's `qstat`."""
    from vsub.engines.local.qstat import qstat_main

    return qstat_main(list(argv), _socket())


def local_qdel(argv: Sequence[str]) -> int:
    """The embedded batch system's `qdel`."""
    from vsub.engines.local.client import qdel_main

    return qdel_main(list(argv), _socket())


def local_qrerun(argv: Sequence[str]) -> int:
    """The embedded batch system's `qrerun`."""
    from vsub.engines.local.client import qrerun_main

    return qrerun_main(list(argv), _socket())


def local_qhold(argv: Sequence[str]) -> int:
    """The embedded batch system's `qhold`."""
    from vsub.engines.local.client import qhold_main

    return qhold_main(list(argv), _socket())


def local_qrls(argv: Sequence[str]) -> int:
    """The embedded batch system's `qrls`."""
    from vsub.engines.local.client import qrls_main

    return qrls_main(list(argv), _socket())


def _socket() -> str:
    try:
        return load_config(installation()).local.socket
    except VTorqueError as err:
        raise SystemExit(str(err)) from None
