"""`vmgr show suspended` and `vmgr delete suspended`: what is stored of suspended jobs."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Optional

import click

from vmgr.commands.table import print_rows
from vmgr.config import Config, load_config
from vmgr.errors import Code, VTorqueError, printable
from vmgr.paths import installation
from vmgr.reach.target import parse_target

if TYPE_CHECKING:
    from vmgr.suspended.listing import Stored

HEADINGS = ("job", "user", "state", "image", "nodes", "guests", "walltime", "size", "suspended", "reason")

_job = click.option("--job", metavar="JOB", help="Of this job.")
_user = click.option("--user", metavar="USER", help="Of this user's jobs.")
_json = click.option("--json", "as_json", is_flag=True, help="For programs.")


@click.command("suspended")
@_job
@_user
@_json
def show(job: Optional[str], user: Optional[str], as_json: bool) -> None:
    """List what is stored of suspended jobs.

    Root sees those of all users, a user the user's own. Walltime is what a job had used when it was suspended. What is
    incomplete is being written, or its writer died; what is damaged cannot be resumed. `vmgr delete suspended` removes
    it. The reason of a suspended job is why it did not go on when that was tried last; it waits again.

    Example: vmgr show suspended --job 12
    """
    found = _found(load_config(installation()), job, user)
    if as_json:
        click.echo(json.dumps([_plain(each) for each in found], indent=1))
        return
    print_rows(HEADINGS, [_cells(each) for each in found], as_json=False)


@click.command("suspended")
@_job
@_user
@click.option("--gone", is_flag=True, help="Only of jobs that the batch system does not know any more.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@_json
def delete(job: Optional[str], user: Optional[str], gone: bool, yes: bool, as_json: bool) -> None:
    """Delete what is stored of suspended jobs.

    Such a job is not ended by that: released, it starts from its beginning. To be rid of it as well: qdel, or scancel;
    what is stored goes a day later then, when its user submits a job, or at once by --gone. Its workspace is wiped,
    where the site has those of ended jobs wiped, and this host sees it. What is just being written goes too; then the
    job is not suspended, and goes on.

    Example: vmgr delete suspended --job 12
    """
    from vmgr.suspended.listing import remove

    if job is None and user is None and not gone:
        raise click.UsageError("--job, --user or --gone is needed")
    config = load_config(installation())
    found = _found(config, job, user)
    if gone:
        from vmgr.reach.batch import is_gone

        found = [each for each in found if each.entry is not None and is_gone(config, each.job_id)]
    if not found and not gone:
        raise VTorqueError(
            f"nothing is stored of {_whose(job, user)}", code=Code.SUSPEND, hint="`vmgr show suspended` lists what is"
        )
    if found and not gone and not yes:
        _confirm(found)
    for each in found:
        remove(config, each)
        if not as_json:
            click.echo(printable(f"deleted what was stored of job {each.job_id} of {each.user}"))
    if as_json:
        click.echo(json.dumps([_plain(each) for each in found], indent=1))


def _found(config: Config, job: Optional[str], user: Optional[str]) -> list[Stored]:
    """What is stored, by job and user; why some cannot be looked at goes to standard error."""
    from vmgr.suspended.listing import stored_jobs

    if job is not None:
        target = parse_target(job)
        if target.rank is not None:
            raise VTorqueError(f"{job[:80]!r} names a guest", code=Code.VALUE, hint=f"say {target.job}, all of the job")
        from vmgr.reach.where import meant

        job = meant(config, target.job)
    listing = stored_jobs(config, user)
    for problem in listing.problems:
        print(problem, file=sys.stderr)
    return [each for each in listing.stored if job is None or each.is_of(job)]


def _confirm(found: Iterable[Stored]) -> None:
    """Ask on a terminal. Raises VTorqueError (VT-USAGE) where there is none, click.exceptions.Exit for a no."""
    jobs = ", ".join(printable(f"{each.job_id} of {each.user}") for each in found)
    what = f"delete what is stored of {jobs}; a job that waits for its release then starts from its beginning"
    if not sys.stdin.isatty():
        raise VTorqueError(what, code=Code.USAGE, hint="say --yes")
    if not click.confirm(f"{what}. Go on?"):
        click.echo("nothing was done", err=True)
        raise click.exceptions.Exit(1)


def _whose(job: Optional[str], user: Optional[str]) -> str:
    return " of ".join(filter(None, (job and f"job {job}", user and f"user {user}" if job is None else user)))


def _cells(stored: Stored) -> list[object]:
    entry = stored.entry
    start = [stored.job_id, stored.user, stored.state]
    size = f"{stored.bytes / (1 << 20):.0f}M"
    if entry is None:
        return [*start, "-", "-", "-", "-", size, "-", stored.reason]
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.when))
    guests, walltime = entry.nodes * entry.per_node, _clock(entry.walltime_s)
    return [*start, entry.image, entry.nodes, guests, walltime, size, when, stored.reason]


def _clock(seconds: int) -> str:
    minutes, rest = divmod(seconds, 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def _plain(stored: Stored) -> dict[str, Any]:
    entry = None if stored.entry is None else stored.entry._asdict()
    return {**stored._asdict(), "entry": entry}
