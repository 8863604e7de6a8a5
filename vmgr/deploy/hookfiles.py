"""What lies on a node for its mom: our hooks under which names, the site's own that ours run, the janitor's timer.

Pure, and with nothing but the standard library: the installer uses it before there is a virtual environment.

`qsub -T NAME` makes a mom run the hook `<its name>.NAME` in place of the plain one, where there is such a file
(`src/resmom/prolog.c` of TORQUE 6.1), whoever chose NAME. So nothing else may lie in `mom_priv` under a name that
begins with that of a hook and a dot, not even for the moment before a rename: `is_open_to_users` tells such names.
"""

from __future__ import annotations

import re
from typing import NamedTuple

WRAP = "wrap"
"""Our hooks take the place of the site's, which they run."""
JOB_TYPE = "jobtype"
"""Our hooks lie beside the site's, for jobs of a type (`qsub -T`) of ours; the site's are left as they are."""
MODES = (WRAP, JOB_TYPE)

JANITOR_TIMER = "vtorque-reap.timer"
DEFAULT_JOB_TYPE = "vtorque"
SITE_FOLDER = "vtorque-site"
"""Folder in `mom_priv` with the site's own hooks."""
SITE_FOLDER_MODE = 0o711
"""Users pass through it, because the site's `.user` hooks run with their rights; as through `mom_priv` itself."""
HOOK_MODE = 0o755
"""A mom wants a hook that root owns and can run, and that nobody else can write; others too must be able to run `.user`
ones."""

_ROOT = ("prologue", "prologue.parallel", "epilogue", "epilogue.parallel")
_USER = ("prologue.user", "prologue.user.parallel", "epilogue.user", "epilogue.user.parallel")
_PRECANCEL = "epilogue.precancel"
_MARK = b"# vTorque: "
_TAKEN = frozenset(name.partition(".")[2] for name in (*_ROOT, *_USER, _PRECANCEL))
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}")


class HookFile(NamedTuple):
    """One of our hooks: the file `source` of `mom_priv_hooks/`, to be installed as `target` with the mode `mode`.

    It belongs to root. Unless `always`, it is installed only where the site has a hook of the name `target`: without
    one, the mom takes the plain hook for a job whose type names this one.
    """

    source: str
    target: str
    mode: int
    always: bool


def hook_files(mode: str, job_type: str = DEFAULT_JOB_TYPE) -> tuple[HookFile, ...]:
    """Our hooks of a mode; `job_type` counts in the mode `jobtype` only.

    Raises ValueError for a mode that there is not, or a job type that would hide other hooks.
    """
    _check_mode(mode)
    if mode == JOB_TYPE:
        if not is_job_type(job_type):
            raise ValueError(f"{job_type!r} is no job type: letters, digits, - and _, other than {sorted(_TAKEN)}")
        return tuple(_hook_file(name, f"{name}.{job_type}", always=True) for name in _ROOT)
    always = (*_ROOT, _PRECANCEL)
    return tuple(_hook_file(name, name, always=name in always) for name in (*always, *_USER))


def site_hooks(mode: str) -> tuple[str, ...]:
    """Names of the site's hooks that move from `mom_priv` into SITE_FOLDER, if they are there. Raises ValueError."""
    _check_mode(mode)
    return (*_ROOT, _PRECANCEL, *_USER) if mode == WRAP else ()


def unit_files() -> tuple[str, ...]:
    """The systemd units of a node, of `contrib/systemd`, for `/etc/systemd/system`: service and timer of the janitor.

    The timer, enabled, is what guarantees that nothing of a job stays whose epilogue did not come.
    """
    return ("vtorque-reap.service", JANITOR_TIMER)


def fill_unit(text: str, *, prefix: str) -> str:
    """The unit that is installed: `text` of a source, for an installation elsewhere than in `/opt/vtorque`."""
    return text.replace("/opt/vtorque/", f"{prefix}/")


def is_job_type(name: str) -> bool:
    """Whether jobs of vTorque can have this type: no file that is a hook of its own would be taken for one of it."""
    return _WORD.fullmatch(name) is not None and name not in _TAKEN


def is_open_to_users(name: str) -> bool:
    """Whether a user can have a file of this name in `mom_priv` run, by `qsub -T`."""
    return name.startswith(("prologue.", "epilogue."))


def is_ours(content: bytes) -> bool:
    """Whether a hook with this content is one of ours, of whatever version."""
    return any(line.startswith(_MARK) for line in content[:4096].splitlines()[1:2])


def fill(text: str, *, prefix: str, spool: str) -> str:
    """The hook that is installed: `text` of a source with the installation's prefix and `paths.spool` in it."""
    return text.replace("@PREFIX@", prefix).replace("@SPOOL@", spool)


def _hook_file(name: str, target: str, *, always: bool) -> HookFile:
    return HookFile(name.partition(".")[0], target, HOOK_MODE, always)


def _check_mode(mode: str) -> None:
    if mode not in MODES:
        raise ValueError(f"{mode!r} is no mode of hooks: {' or '.join(MODES)}")
