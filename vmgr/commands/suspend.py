"""`vmgr suspend` and `vmgr resume`: a job gives its nodes back and waits, and goes on."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Optional

import click

from vmgr.commands.ordering import Steps, follow
from vmgr.config import Config, load_config
from vmgr.errors import Code, Unanswered, VTorqueError, printable
from vmgr.paths import installation
from vmgr.reach import batch
from vmgr.reach.target import Target, parse_target
from vmgr.signals import ENDING, undisturbed

if TYPE_CHECKING:
    from vmgr.suspended.listing import Stored

_json = click.option("--json", "as_json", is_flag=True, help="For programs.")


@click.command()
@click.argument("job", metavar="JOB")
@_json
def suspend(job: str, as_json: bool) -> None:
    """Suspend a running job: its guests are stored, it waits, held.

    For jobs submitted with -vm suspend=on. The nodes are free then; `vmgr resume` lets the job go on. What stands in
    the way, such as a program with a file open on a share, is named, and the job goes on as if nothing had been; so it
    does when this command is interrupted.

    Example: vmgr suspend 12.server
    """
    config, target = _the_job(job)
    _need_folder(config)
    suspension = _Suspension(config, target)
    with _signals_interrupt():
        try:
            asyncio.run(suspension.run(None if as_json else Steps()))
        except BaseException as err:
            with undisturbed():  # one more signal would leave the job held
                if not suspension.went_through(err):
                    suspension.call_off()
                    raise
    if as_json:
        click.echo(json.dumps({"job": suspension.job_id, "state": "suspended"}))
    else:
        click.echo(printable(f"job {suspension.job_id} is suspended; `vmgr resume {target}` lets it go on"))


@click.command()
@click.argument("job", metavar="JOB")
@_json
def resume(job: str, as_json: bool) -> None:
    """Let a suspended job go on, as soon as there are nodes for it.

    It is released, and starts where the batch system puts it.

    Example: vmgr resume 12.server
    """
    config, target = _the_job(job)
    _need_folder(config)
    job_id = _resumable(config, target)
    batch.release(config, job_id)
    if as_json:
        click.echo(json.dumps({"job": job_id, "state": "released"}))
    else:
        click.echo(printable(f"job {job_id} is released, and goes on as soon as there are nodes for it"))


class _Suspension:
    """A job on its way to be suspended, and how that is called off."""

    def __init__(self, config: Config, target: Target) -> None:
        self.job_id = target.job
        self._config = config
        self._target = target
        self._before: Optional[list[Stored]] = None
        self._is_new = False
        self._is_sure = True
        self._is_ordered = False

    async def run(self, steps: Optional[Steps]) -> None:
        """Hold the job and have its agent suspend it. Raises VTorqueError."""
        from vmgr.reach.agents import agent_of  # paramiko takes its time

        async with agent_of(self._config, self._target) as reached:
            self.job_id = reached.job_id
            _check(reached.job_id, reached.snapshot)
            self._before = _stored(self._config, self._target)
            with undisturbed():  # what is begun is to be known to be done, or not
                try:
                    self._is_new = batch.hold(self._config, self.job_id)
                except Unanswered as err:
                    self._is_new, self._is_sure = err.is_new is not False, False
                    raise
            self._is_ordered = True
            with ExitStack() as shown:
                if steps is not None:
                    shown.callback(steps.end)
                await follow(reached.link, "suspend", steps)

    def went_through(self, err: BaseException) -> bool:
        """Whether the job is suspended although its agent was not heard to the end: it goes with the job."""
        if not self._is_ordered or not isinstance(err, VTorqueError) or err.code not in (Code.AGENT, Code.CONNECT):
            return False
        now = _stored(self._config, self._target)
        if now is not None and self._before is not None:
            return any(each.entry is not None and each not in self._before for each in now)
        return self._is_on_no_node()

    def _is_on_no_node(self) -> bool:
        from vmgr.reach.where import nodes_of_job

        try:
            nodes_of_job(self._config, self.job_id)
        except VTorqueError as err:
            return err.code is Code.AGENT
        return False

    def call_off(self) -> None:
        """Release the job, unless somebody had held it before."""
        if not self._is_new:
            return
        known, said = batch.commands(self._config), None
        try:
            batch.release(self._config, self.job_id)
        except VTorqueError as err:
            said = err
        if not self._is_sure:
            print(
                f"vmgr: job {self.job_id} may be held, or be so later: {known.show} tells, {known.release} releases it",
                file=sys.stderr,
            )
        elif said is not None:
            print(f"vmgr: job {self.job_id} stays held, release it by {known.release}: {said}", file=sys.stderr)


def _the_job(text: str) -> tuple[Config, Target]:
    """The configuration, and the job that is named. Raises VTorqueError."""
    target = parse_target(text)
    if target.rank is not None:
        raise VTorqueError(
            f"{text[:80]!r} names a guest", code=Code.VALUE, hint=f"say {target.job}: a job is suspended as a whole"
        )
    from vmgr.reach.where import meant

    config = load_config(installation())
    return config, Target(meant(config, target.job))


def _need_folder(config: Config) -> None:
    from vmgr.suspended.files import site_folder  # as above

    site_folder(config)


def _check(job_id: str, snapshot: dict[str, Any]) -> None:
    """Refuse a job that is not one to be suspended, before anything is done to it. Raises VTorqueError (VT-SUSPEND)."""
    spec = snapshot.get("spec")
    if isinstance(spec, dict) and spec.get("suspend") is False:
        raise VTorqueError(
            f"job {job_id} was not submitted with -vm suspend=on", code=Code.SUSPEND,
            hint="only such jobs can be suspended",
        )  # fmt: skip
    if snapshot.get("state") != "running":
        raise VTorqueError(
            f"job {job_id} is {snapshot.get('state')}",
            code=Code.SUSPEND,
            hint="it can be suspended while it is running",
        )


def _stored(config: Config, target: Target) -> Optional[list[Stored]]:
    """What is stored of a job; None where that cannot be seen from here."""
    from vmgr.suspended.listing import stored_jobs

    try:
        listing = stored_jobs(config)
    except VTorqueError:
        return None
    return [each for each in listing.stored if each.is_of(target.job)]


def _resumable(config: Config, target: Target) -> str:
    """The id of a suspended job. Raises VTorqueError (VT-SUSPEND) for one that is not; that can be seen to be none."""
    stored = _stored(config, target)
    if stored is None:
        print("vmgr: what is stored cannot be seen from here, so the job is only released", file=sys.stderr)
        return target.job
    by = batch.commands(config).release
    whole = sorted({each.job_id for each in stored if each.entry is not None})
    if len(whole) == 1:
        return whole[0]
    if whole:
        raise VTorqueError(f"{target} may be {' or '.join(whole)}", code=Code.VALUE, hint="say which")
    if stored:
        raise VTorqueError(
            f"what is stored of job {stored[0].job_id} cannot be resumed: {stored[0].reason}", code=Code.SUSPEND,
            hint=f"without it the job starts from its beginning: `vmgr delete suspended --job {target}`, then {by}",
        )  # fmt: skip
    raise VTorqueError(
        f"job {target} is not suspended", code=Code.SUSPEND,
        hint=f"`vmgr show suspended` lists those that are; a job that is held for another reason is released by {by}",
    )  # fmt: skip


@contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Let what ends a program interrupt this one, so that it can call off what it has begun."""
    deadly = [sig for sig in ENDING if signal.getsignal(sig) is signal.SIG_DFL]
    for sig in deadly:
        signal.signal(sig, signal.default_int_handler)
    try:
        yield
    finally:
        for sig in deadly:
            signal.signal(sig, signal.SIG_DFL)
