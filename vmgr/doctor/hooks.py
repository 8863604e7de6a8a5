"""What lies in a mom's `mom_priv`: our hooks are there, the site's can run, and no file waits for a user to name it.

Facts: `src/resmom/prolog.c` of TORQUE 6.1 (which file of `mom_priv` a mom runs for `qsub -T NAME`, and what it demands
of a hook).
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path

from vmgr.deploy.hookfiles import (
    JOB_TYPE,
    SITE_FOLDER,
    WRAP,
    HookFile,
    hook_files,
    is_open_to_users,
    is_ours,
    site_hooks,
)
from vmgr.doctor.finding import Finding, Level, Node, finder
from vmgr.errors import VTorqueError
from vmgr.trust import check_trusted

MAX_BYTES = 1 << 20
_INSTALL = "install those of share/vtorque/mom_priv_hooks, by install.sh; submit.job_type tells under which names"

_find = finder("batch system")


def check_hooks(folder: Path, node: Node) -> Iterator[Finding]:
    """The hooks in `folder`, in the mode that the configuration tells: with a job type of ours, or in place of all."""
    job_type = node.config.submit.job_type
    hooks = hook_files(WRAP) if job_type is None else hook_files(JOB_TYPE, job_type)
    program = node.install.program("vtorque-hook")
    for hook in hooks:
        if hook.always:
            yield from judge_hook(folder / hook.target, program)
    if job_type is None:
        yield from _judge_user_hooks(folder, hooks)
        yield from _judge_sites(folder / SITE_FOLDER)
    else:
        yield from _judge_sites(folder)
        if (folder / SITE_FOLDER).is_dir():
            yield _find(
                Level.WARNING, f"hooks in {folder / SITE_FOLDER} do not run: submit.job_type is set",
                "move them back, or unset submit.job_type where vTorque's hooks are to run them",
            )  # fmt: skip
    yield from _judge_others(folder, {hook.target for hook in hooks})


def judge_hook(path: Path, program: str) -> Iterator[Finding]:
    """Whether a hook is there, root's alone, executable, and ours or one that calls ours."""
    name = f"the hook {path}"
    try:
        check_trusted(path)
        mode = path.stat().st_mode
        text = path.read_bytes()[:MAX_BYTES]
    except (OSError, VTorqueError) as err:
        optional = path.name.startswith("epilogue.precancel")
        reason = err.message if isinstance(err, VTorqueError) else str(err)
        hint = err.hint if isinstance(err, VTorqueError) else None
        yield _find(Level.NOTE if optional else Level.FAILURE, f"{name}: {reason}", hint or _INSTALL)
        return
    if not mode & stat.S_IXUSR:
        yield _find(Level.FAILURE, f"{name} cannot be run", f"chmod 755 {path}")
    elif program.encode() not in text and b"mom_priv_hooks/" not in text:
        yield _find(Level.FAILURE, f"{name} does not call {program}", _INSTALL)
    else:
        yield _find(Level.OK, f"{name} calls vTorque's")


def _judge_user_hooks(folder: Path, hooks: tuple[HookFile, ...]) -> Iterator[Finding]:
    """Hooks for users' rights that the site has put beside ours since."""
    for name in (hook.target for hook in hooks if not hook.always):
        if (folder / name).exists() and not _is_ours(folder / name):
            word = name.partition(".")[2]
            yield _find(
                Level.WARNING, f"{folder / name} runs as root in place of vTorque's, for jobs of `qsub -T {word}`",
                f"run install.sh again: vTorque's takes its place, and runs it from {SITE_FOLDER}",
            )  # fmt: skip


def _judge_sites(place: Path) -> Iterator[Finding]:
    """The site's own hooks that ours run: a mom would refuse what others can write, and so do ours."""
    for site in (place / name for name in site_hooks(WRAP)):
        if not site.exists():
            continue
        try:
            check_trusted(site)
            if not site.stat().st_mode & stat.S_IXUSR:
                yield _find(Level.FAILURE, f"the site's hook {site} cannot be run, and jobs fail", f"chmod 755 {site}")
        except VTorqueError as err:
            yield _find(Level.FAILURE, f"the site's hook {site} is not run, and jobs fail: {err.message}", err.hint)


def _judge_others(folder: Path, ours: set[str]) -> Iterator[Finding]:
    """Files that a mom would run for whoever names them."""
    known = ours | set(site_hooks(WRAP))
    try:
        paths = sorted(folder.iterdir())
    except OSError as err:
        yield _find(Level.WARNING, f"{folder}: {err.strerror}", "run vmgr doctor as root")
        return
    for path in paths:
        if is_open_to_users(path.name) and path.name not in known:
            word = path.name.partition(".")[2]
            yield _find(
                Level.WARNING, f"{path}: any user has it run as root, in place of other hooks, by `qsub -T {word}`",
                f"move it out of {folder}, unless it is meant for jobs of that type",
            )  # fmt: skip


def _is_ours(path: Path) -> bool:
    try:
        with open(path, "rb") as stream:
            return is_ours(stream.read(MAX_BYTES))
    except OSError:
        return False
