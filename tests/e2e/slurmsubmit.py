"""Submits a guest job to Slurm: the job directory by vsub's own code, `sbatch` or `srun` called with it directly.

A program of its own, run as the user by the installation's Python:
`slurmsubmit.py PREFIX [VSUB OPTION…] SCRIPT -- PROGRAM [OPTION…]`. It prints what that program prints.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def main(argv: list[str]) -> int:
    prefix, *words = argv
    split = words.index("--")
    words, command = words[:split], words[split + 1 :]
    sys.path.append(next(str(path) for path in Path(prefix).glob("venv/lib/python3*/site-packages")))
    from vmgr.config import load_config
    from vmgr.paths import Installation
    from vsub.account import account
    from vsub.asked import requested
    from vsub.cli import NO_SCRIPT
    from vsub.directives import PREFIX, read_directives
    from vsub.engines.torque import Torque
    from vsub.options import parse_line
    from vsub.plan import make_plan
    from vsub.script import read_script
    from vsub.submission import Submission

    install = Installation(Path(prefix))
    config = load_config(install)
    engine, user, line = Torque(config), account(), parse_line(words)
    script = NO_SCRIPT if line.last("I") else read_script(line.operands[0])
    directives = read_directives(script.data, PREFIX, script.name)
    plan = make_plan(line, directives, script, requested(line.vm) or {}, user, config, engine)
    submission = Submission(plan, user, config, engine, install)
    with submission.written(command[0], keep=False) as (directory, written):
        own = [f"--comment=vtorque:{written.directory} a comment of my own"]
        if command[0].endswith("srun"):
            directory.keep(b"0")
            os.execv(command[0], [command[0], *own, *command[1:], f"{written.directory}/job"])
        done = subprocess.run([*command, *own, f"{written.directory}/job"], stdout=subprocess.PIPE)
        if done.returncode == 0:
            directory.keep(done.stdout.split(b";")[0].strip())
        sys.stdout.buffer.write(done.stdout)
        return done.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
