"""The attributes of `qsub -W name=value`, read as TORQUE 6.1 reads them.

Facts from `process_opts` and `get_name_value` (src/cmds/qsub_functions.c), seen on TORQUE 6.1.3: one `-W` holds one
attribute, and a comma belongs to its value; a value without a name is one of `x`; quotes are taken out.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

from vsub.options import Option

_BLANKS = " \t\n\v\f\r"
_LETTERS = {
    "interactive": "I",
    "job_array_request": "t",
    "jobtype": "T",
    "job_arguments": "F",
    "proxy_user": "P",
    "init_work_dir": "w",
    "Interactive_Cmd": "x",
    "Execution_Time": "a",
    "Shell_Path_List": "S",
    "Job_Name": "N",
}
"""Attributes that are another way to write an option."""


class Attribute(NamedTuple):
    """One attribute and the option that it stands in."""

    name: str
    value: str
    option: Option

    @property
    def letter(self) -> Optional[str]:
        """The option that this is another way to write."""
        return _LETTERS.get(self.name)


def last_value(options: tuple[Option, ...], letter: str) -> Optional[tuple[str, Option]]:
    """The value that counts of an option, however it is written, and the option that it stands in."""
    for option in reversed(options):
        if option.letter == letter:
            return option.value or "", option
        if option.letter == "W":
            attribute = read_attributes((option,))[0]
            if attribute.letter == letter:
                return attribute.value, option
    return None


def read_attributes(options: tuple[Option, ...]) -> list[Attribute]:
    """Every attribute asked for with `-W`, in order."""
    found = []
    for option in options:
        if option.letter == "W":
            text = (option.value or "").replace("'", "").replace('"', "").strip(_BLANKS)
            name, equals, value = text.partition("=")
            name = name.rstrip(_BLANKS)
            named = bool(equals and name and not any(char in _BLANKS for char in name))
            found.append(Attribute(name, value.strip(_BLANKS), option) if named else Attribute("x", text, option))
    return found
