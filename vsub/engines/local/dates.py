"""The date of `qsub -a`, as TORQUE reads it (lib/Libcmds/cvtdate.c)."""

from __future__ import annotations

import re
import time

_FORM = re.compile(r"((((\d\d)?\d\d)?\d\d)?\d\d)?(\d\d)(\d\d)(?:\.(\d\d))?", re.ASCII)


def _year(text: str, now: time.struct_time) -> int:
    if not text:
        return now.tm_year
    if len(text) == 4:
        return int(text)
    return int(text) + (1900 if int(text) > 68 else 2000)


def epoch(text: str, now: time.struct_time) -> int:
    """Seconds since the epoch of `[[[[CC]YY]MM]DD]hhmm[.SS]`, in local time. Raises ValueError.

    What is missing is taken from `now`; if that lies in the past, the largest part that was given counts as
    tomorrow's, next month's or next year's. A whole date may lie in the past.
    """
    match = _FORM.fullmatch(text)
    if match is None:
        raise ValueError("not a date: [[[[CC]YY]MM]DD]hhmm[.SS]")
    head = match[1] or ""
    day_text, month_text, year_text = head[-2:], head[-4:-2], head[:-4]
    hour, minute, second = int(match[5]), int(match[6]), int(match[7] or 0)
    year, month, day = _year(year_text, now), int(month_text or now.tm_mon), int(day_text or now.tm_mday)
    if not (1 <= month <= 12 and 1 <= day <= 31 and hour <= 23 and minute <= 59 and second <= 59):
        raise ValueError("a part of the date is out of its range")
    if month_text and not year_text and month < now.tm_mon:
        year += 1
    if day_text and not month_text and day < now.tm_mday:
        month += 1
    if not day_text and (hour, minute) <= (now.tm_hour, now.tm_min):
        day += 1
    try:
        found = int(time.mktime((year, month, day, hour, minute, second, 0, 0, -1)))
    except OverflowError:
        found = -1
    if found < 0:
        raise ValueError("the date is out of range")
    return found
