"""`vtorque-batch`: what `vmgr` and node agents want of the batch system, one line of JSON as the answer.

`server` prints the name in the ids of jobs, `nodes` a list of names, `jobs` the jobs that have nodes and that the
caller may see, `job` those that are meant by a name, which may be that of an array. `whole` prints the whole id of the
one job that is meant by a name, `phase` how far a job is, as `JobState` has it. A job is
`{"job": id, "owner": name, "nodes": [...]}`, the mother superior first. Of the nodes of jobs only those are told that
the batch system has: users' text stands beside them in what it prints.

`hold`, `release` and `requeue` change one job, with the caller's rights. They print `{}`, but `hold` prints
`{"new": BOOL}`: whether its user had not held the job before. Where the batch system does not say in time what has
become of it, they print `{"answered": false, "new": BOOL or null}` and fail. `check-requeue` fails where the caller may
requeue none. `give-back` takes what leads to the job directory out of what the user has said of a job that runs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from vmgr.config import load_config
from vmgr.errors import Code, Unanswered, VTorqueError
from vmgr.paths import installation
from vsub.engines import Engine, engine

USAGE = (
    "usage: vtorque-batch server | nodes | jobs | job ID | whole JOB | phase JOB | hold JOB | release JOB | "
    "requeue JOB | give-back JOB | check-requeue"
)
LAST_SECONDS = 3.0
"""So long a command of the batch system may take where the end of a job waits for it."""


def main(argv: Sequence[str]) -> int:
    """Ask and print. A failure is one line on standard error, and its code's exit status."""
    try:
        install = installation()
        config = load_config(install)
        print(json.dumps(_answer(engine(config, install), list(argv), config.timeouts.reach)))
        return 0
    except VTorqueError as err:
        if isinstance(err, Unanswered):
            print(json.dumps({"answered": False, "new": err.is_new}))
        print(err, file=sys.stderr)
        return err.code.status


def _answer(batch: Engine, argv: list[str], timeout_s: float) -> object:
    if argv == ["nodes"]:
        return list(batch.nodes(timeout_s))
    if argv == ["jobs"] or (len(argv) == 2 and argv[0] == "job" and not argv[1].startswith("-")):
        known = frozenset(batch.nodes(timeout_s))
        jobs = batch.placed(argv[1] if len(argv) == 2 else None, timeout_s)
        return [
            {"job": job.job_id, "owner": job.owner, "nodes": [node for node in job.nodes if node in known]}
            for job in jobs
        ]
    if argv == ["server"]:
        return batch.server(timeout_s)
    if len(argv) == 2 and argv[0] == "whole":
        return batch.whole(_one_job(argv[1]), timeout_s)
    if len(argv) == 2 and argv[0] == "phase":
        return batch.state(_one_job(argv[1]), timeout_s).phase
    if argv == ["check-requeue"]:
        batch.check_requeue(timeout_s)
        return {}
    if len(argv) == 2 and argv[0] in ("hold", "release", "requeue", "give-back"):
        return _change(batch, argv[0], _one_job(argv[1]), timeout_s)
    raise VTorqueError(USAGE, code=Code.USAGE)


def _one_job(text: str) -> str:
    """The id of one job; `qrerun all` would be every job of the site. Raises VTorqueError (VT-VALUE)."""
    from vmgr.reach.target import parse_target

    target = parse_target(text)
    if target.rank is not None:
        raise VTorqueError(f"{text[:80]!r} names a guest, and a job is needed", code=Code.VALUE, hint="leave out :RANK")
    return target.job


def _change(batch: Engine, what: str, job_id: str, timeout_s: float) -> dict[str, bool]:
    if what == "hold":
        return {"new": batch.hold(job_id, timeout_s)}
    if what == "release":
        batch.release(job_id, timeout_s)
    elif what == "give-back":
        batch.give_back(job_id, min(timeout_s, LAST_SECONDS))
    else:
        batch.requeue(job_id, timeout_s)
    return {}
