"""qstat of the embedded batch system."""

from __future__ import annotations

import sys
from typing import Optional

from vsub.engines.local import command, protocol
from vsub.engines.local.options import UsageError
from vsub.engines.local.protocol import Refused

LINE = 78


def _visible(text: str) -> str:
    return text.replace("\n", "\\n").replace("\t", "\\t").encode("utf-8", "backslashreplace").decode()


def full_lines(job_id: str, attributes: list[list[str]], wrap: bool) -> list[str]:
    """A job as `qstat -f` prints it; long values go on in lines that begin with a tab."""
    lines = [f"Job Id: {job_id}"]
    for name, value in attributes:
        line = f"    {name} = {_visible(value)}"
        while wrap and len(line) > LINE:
            lines.append(line[:LINE])
            line = "\t" + line[LINE:]
        lines.append(line)
    return [*lines, ""]


def _summary_line(job_id: str, attributes: list[list[str]]) -> str:
    known = {name: value for name, value in attributes}  # noqa: C416
    user = known["Job_Owner"].partition("@")[0]
    used = known.get("resources_used.cput", "0")
    name = known["Job_Name"]
    name = name if len(name) <= 16 else f"...{name[-13:]}"
    state, queue = known["job_state"], known["queue"]
    return f"{job_id[:25]:<25} {name:<16} {user[:15]:<15} {used:>8} {state} {queue[:15]}"


def _qstat(argv: list[str], socket_path: str) -> int:
    flags = {argument for argument in argv if argument.startswith("-")}
    letters = {letter for flag in flags for letter in flag[1:]}
    if not letters <= {"f", "1", "t"}:
        unknown = sorted(letters - {"f", "1", "t"})[0]
        raise UsageError(f"option -{unknown} is not supported by the embedded batch system")
    members = "t" in letters
    wanted: list[Optional[str]] = [argument for argument in argv if argument not in flags] or [None]
    jobs, status = [], 0
    for text in wanted:
        try:
            jobs.extend(protocol.request(socket_path, {"op": "stat", "job": text, "members": members})["jobs"])
        except Refused as refusal:
            print(f"qstat: {refusal} {text}", file=sys.stderr)
            status = refusal.status
    if "f" in letters:
        for job_id, attributes in jobs:
            print("\n".join(full_lines(job_id, attributes, "1" not in letters)))
    elif jobs:
        print("Job ID                    Name             User            Time Use S Queue")
        print("------------------------- ---------------- --------------- -------- - -----")
        for job_id, attributes in jobs:
            print(_summary_line(job_id, attributes))
    sys.stdout.flush()
    return status


def qstat_main(argv: list[str], socket_path: str) -> int:
    """`qstat [-f] [-1] [-t] [job…]`: with -t the members of arrays in place of the arrays."""
    return command.run("qstat", lambda: _qstat(argv, socket_path))
