"""`vtorque-batch nodes|jobs|job ID`: what `vmgr` asks of the batch system, as one line of JSON.

`nodes` prints a list of names, `jobs` the jobs that have nodes and that the caller may see, `job` one of them as a list
of none or one. A job is `{"job": id, "owner": name, "nodes": [...]}`, the mother superior first. Of the nodes of jobs
only those are told that the batch system has: users' text stands beside them in what it prints.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from vmgr.config import load_config
from vmgr.errors import Code, VTorqueError
from vmgr.paths import installation
from vsub.engines import Engine, engine

USAGE = "usage: vtorque-batch nodes | jobs | job ID"


def main(argv: Sequence[str]) -> int:
    """Ask and print. A failure is one line on standard error, and its code's exit status."""
    try:
        install = installation()
        config = load_config(install)
        print(json.dumps(_answer(engine(config, install), list(argv), config.timeouts.reach)))
        return 0
    except VTorqueError as err:
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
    raise VTorqueError(USAGE, code=Code.USAGE)
