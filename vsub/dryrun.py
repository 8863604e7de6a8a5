"""`--explain` and `--dry-run` of a guest job: everything is made as for a submission, in a folder that goes again."""

from __future__ import annotations

import tempfile

from vmgr.config import Config
from vsub.options import DRY_RUN
from vsub.shown import Shown, explain, files_of, print_guest
from vsub.submission import Submission


def show_submission(submission: Submission, config: Config, qsub: str, own: frozenset[str]) -> None:
    """Print the values of a guest job with their sources, or the command line and the files; submit nothing.

    The random parts (the folder's name, the key pair and with it the specification's hash) are made anew by a
    submission; everything else is exactly what it would be.
    """
    rows = list(explain(submission.plan, config, submission.engine.explain(submission.job(""))))
    if DRY_RUN not in own:
        print_guest(rows, own)
        return
    if "--explain" in own and "--json" not in own:
        print_guest(rows, own)
    with tempfile.TemporaryDirectory(prefix="vsub-") as folder:
        with submission.written(qsub, keep="--wait" in own, home=folder) as (directory, written):
            files = files_of(directory.path, written.directory)
        print_guest(rows, own, Shown(written.argv, files, written.environment))
