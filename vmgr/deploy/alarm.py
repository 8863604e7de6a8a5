"""`$prologalarm` in the configuration of a mom: what it is, and the text that raises it.

Facts from `src/resmom/parse_config.c`, `prolog.c` and `src/include/mom_config.h` of TORQUE 6.1: the file `config` in
`mom_priv` holds `$name value` a line, `#` begins a comment; `$prologalarm` is in whole seconds (strtol(3)), none at or
below 0 is taken, 300 holds where it is not set, and hooks are ended ten seconds before.
"""

from __future__ import annotations

import re
from typing import NamedTuple, Optional

DEFAULT_SECONDS = 300
EARLY_SECONDS = 10
_KEY = "$prologalarm"


class Alarm(NamedTuple):
    """`$prologalarm` in seconds, and the line that sets it; None for the default."""

    seconds: int
    line: Optional[int]


def parse_alarm(text: Optional[str]) -> tuple[Alarm, Optional[str]]:
    """The time that hooks have; and what is wrong with the last line that sets it, so that an earlier one holds."""
    alarm, problem = Alarm(DEFAULT_SECONDS, None), None
    for number, line in enumerate((text or "").splitlines(), 1):
        words = line.split("#")[0].split()
        if not words or words[0] != _KEY:
            continue
        value = words[1] if len(words) > 1 else ""
        match = re.match(r"\+?([0-9]{1,9})", value, re.ASCII)
        if match and int(match[1]):
            alarm, problem = Alarm(int(match[1]), number), None
        else:
            problem = f"line {number}: $prologalarm {value!r} is no number of seconds above 0"
    return alarm, problem


def needed(barrier_s: int, disk_s: int) -> int:
    """The least `$prologalarm` with which no hook is ended while it waits for as long as the site lets it."""
    return max(barrier_s, disk_s) + EARLY_SECONDS + 1


def raised(text: Optional[str], seconds: int) -> Optional[str]:
    """The configuration with at least so many seconds; None where it has them already.

    Lines that set it are changed in place, so that comments and all else stay; without one it comes last.
    """
    alarm, problem = parse_alarm(text)
    if alarm.seconds >= seconds and problem is None:
        return None
    lines = (text or "").splitlines(keepends=True)
    found = False
    for index, line in enumerate(lines):
        words = line.split("#")[0].split()
        if words[:1] == [_KEY]:
            comment = line[line.index("#") :].rstrip("\r\n") if "#" in line else ""
            lines[index] = f"{_KEY} {seconds}{'  ' if comment else ''}{comment}\n"
            found = True
    if not found:
        if lines and not lines[-1].endswith("\n"):
            lines[-1] += "\n"
        lines.append(f"{_KEY} {seconds}\n")
    return "".join(lines)
