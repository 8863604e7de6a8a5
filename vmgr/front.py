"""What the shell front of `vsub` must know of the configuration: a few assignments, compiled beside it."""

from __future__ import annotations

import os
import shlex
from typing import Union

from vmgr.config import Config, write_beside
from vmgr.paths import Installation

_FITS = """\
VT_QSUB='' vt_node=$(uname -n)
vt_fits() {
    case $vt_node in $1) return 0 ;; esac
    case ${vt_node%%.*} in $1) return 0 ;; esac
    return 1
}"""


def front_text(config: Config, install: Installation, info: os.stat_result) -> str:
    """POSIX shell that sets VT_QSUB, VT_WITHOUT_VM, VT_ENGINE and VT_STAMP. `info` is that of the configuration's file.

    The stamp binds it to that file, as `stat -c '%i %s %.9Y %u'` prints it.
    """
    seconds, nanoseconds = divmod(info.st_mtime_ns, 10**9)
    lines = [
        f"VT_WITHOUT_VM={config.submit.without_vm}",
        f"VT_ENGINE={config.engine}",
        f"VT_STAMP='{info.st_ino} {info.st_size} {seconds}.{nanoseconds:09d} {info.st_uid}'",
    ]
    qsub = _qsub(config, install)
    if isinstance(qsub, str):
        return "\n".join([*lines, f"VT_QSUB={shlex.quote(qsub)}", ""])
    lines.append(_FITS)
    for pattern, path in qsub.items():
        lines.append(f'[ -n "$VT_QSUB" ] || ! vt_fits {shlex.quote(pattern)} || VT_QSUB={shlex.quote(path)}')
    return "\n".join([*lines, ""])


def _qsub(config: Config, install: Installation) -> Union[str, dict[str, str]]:
    """The program that submits, or programs by patterns of host names."""
    if config.engine == "local":
        return install.local_qsub
    if config.engine != "slurm":
        return config.submit.qsub
    folder = config.slurm_bin
    if isinstance(folder, str):
        return f"{folder.rstrip('/')}/sbatch"
    return {pattern: f"{path.rstrip('/')}/sbatch" for pattern, path in folder.items()}


def write_front(config: Config, install: Installation) -> None:
    """Leave the front's file beside the configuration, written whole, then renamed. Raises OSError."""
    source = config.source
    write_beside(source, f"{source}.front", front_text(config, install, os.stat(source)))
