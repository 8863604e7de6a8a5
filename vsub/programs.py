"""What the launchers of the embedded batch system start, with the places that the configuration gives it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vmgr.config import Config, load_config
from vmgr.errors import VTorqueError
from vmgr.paths import installation


def local_daemon(argv: Sequence[str]) -> int:
    """`vtorque-local start|stop|status|enter|offline|online [OPTION…]`."""
    from vsub.engines.local.daemon import main

    config = load_config(installation())
    local = config.local
    command, *options = argv or ["--help"]
    if command in ("start", "status", "offline", "online"):
        options = ["--socket", local.socket, *options]
    if command == "start":
        options = [*_nodes(config), *options]
    if command in ("start", "stop", "status", "enter", "offline", "online"):
        options = ["--spool", local.spool, *options]
    return main([command, *options])


def _nodes(config: Config) -> list[str]:
    """The simulated nodes, and what vTorque keeps on a node, of which each has its own."""
    private = [config.paths.spool, config.images.overlays]
    if config.images.cache.folder is not None:
        private.append(config.images.cache.folder)
    if config.logging.file is not None:
        private.append(Path(config.logging.file).parent)
    options = ["--nodes", str(config.local.nodes), "--volatile", str(config.paths.run)]
    return options + [word for folder in private for word in ("--private", str(folder))]


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
