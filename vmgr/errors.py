"""The one table of `VT-` codes and exit statuses, and the error that carries them.

A code names a class of failure for users, administrators and scripts; its text and number are stable.
Refusals at submission end with status 2 and submit nothing. A guest job that fails for a reason of ours ends
with a status from 70 to 79, which no batch system uses for itself. `vmgr errors` prints this table.
"""

from __future__ import annotations

import enum
from typing import NamedTuple, Optional

REFUSED = 2
"""Exit status of a submission or command that was refused: nothing was done."""


class Row(NamedTuple):
    """One line of the table: the code's name, the exit status, what happened, what to do."""

    name: str
    status: int
    meaning: str
    remedy: str


class Code(enum.Enum):
    """Every stable code. The value is the row of the table."""

    USAGE = Row("VT-USAGE", 2, "the command line cannot be understood", "see --help")
    KEY = Row("VT-KEY", 2, "a request names an unknown key, or a key twice", "use one of the keys named")
    VALUE = Row("VT-VALUE", 2, "a value cannot be read", "write it as the message shows")
    POLICY = Row("VT-POLICY", 2, "a request breaks a bound of the site's policy", "stay within the bound named")
    RESOURCE = Row(
        "VT-RESOURCE", 2, "the guests do not fit into what the job asks of its nodes", "ask for more, or smaller guests"
    )
    IMAGE = Row("VT-IMAGE", 2, "the image is unknown or unusable", "choose one of `vmgr list`")
    WORKDIR = Row("VT-WORKDIR", 2, "the directory of submission is not visible in the guest", "submit elsewhere")
    OPTION = Row("VT-OPTION", 2, "an option of qsub that a guest job cannot honour", "leave it out, or use -vm off")
    SCRIPT = Row("VT-SCRIPT", 2, "the job script cannot be read or is none", "submit a readable text file")
    HOME = Row("VT-HOME", 2, "the job's files cannot be written into your home", "see the reason; quota, rights")
    CONFIG = Row("VT-CONFIG", 2, "the configuration is wrong", "correct the line named; `vmgr config check`")
    TRUST = Row("VT-TRUST", 2, "a file that root uses could be changed by others", "give it to root, mode go-w")
    ENGINE = Row("VT-ENGINE", 2, "the batch system cannot be used", "ask the administrator")
    ACCESS = Row("VT-ACCESS", 2, "you may not do this", "run as root, or on a job of your own")
    SUSPEND = Row("VT-SUSPEND", 2, "the job cannot be suspended or resumed", "see what stands in the way")
    BUILD = Row("VT-BUILD", 2, "an image could not be built", "see the build log named")
    INTERNAL = Row("VT-INTERNAL", 70, "a fault in vTorque itself", "report it with the node's log")
    SPEC = Row("VT-SPEC", 71, "the job's specification is unreadable, altered or not legal", "submit again by vsub")
    NODE = Row("VT-NODE", 72, "the node refuses or lacks what the job asks for", "see the reason; ask for less")
    STAGE = Row("VT-STAGE", 73, "the image could not be made ready on the node", "see the node's log")
    LAUNCH = Row("VT-LAUNCH", 74, "the hypervisor did not start", "see the node's log")
    BOOT = Row("VT-BOOT", 75, "the guest did not become ready in time", "see the last console lines")
    GUEST = Row("VT-GUEST", 76, "the guest ended while the job was running", "see the node's log; submit again")
    HOOK = Row("VT-HOOK", 77, "a VM prologue or epilogue failed", "see its output, printed before this line")
    AGENT = Row(
        "VT-AGENT",
        78,
        "no node agent serves this job",
        "does the batch system call vTorque's hooks there? `vmgr doctor` tells",
    )
    CONNECT = Row("VT-CONNECT", 79, "the connection to the guest failed or broke", "see the node's log")

    @property
    def text(self) -> str:
        """The code as printed, for instance `VT-IMAGE`."""
        return self.value.name

    @property
    def status(self) -> int:
        """The exit status that goes with the code: 2, or 70 to 79."""
        return self.value.status

    @classmethod
    def named(cls, text: object) -> Code:
        """The code printed as `text`; `INTERNAL` for anything unknown (the text may come from a user's file)."""
        for code in cls:
            if code.text == text:
                return code
        return cls.INTERNAL


class VTorqueError(Exception):
    """A failure with a stable code, for the reader of the job's output.

    `message` says what went wrong, with the value and where it came from; `hint` what is allowed or what to do
    next. `str()` gives one line whatever the parts contain. `output` is what a failed program printed, for the
    reader to see before that line; empty unless there was one.
    """

    output = ""

    def __init__(self, message: str, *, code: Code, hint: Optional[str] = None) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.hint = hint

    @property
    def detail(self) -> str:
        """The message and the hint as one line, without the code."""
        return printable(self.message + (f"; {self.hint}" if self.hint else ""))

    def __str__(self) -> str:
        return f"{self.code.text}: {self.detail}"


class Unanswered(VTorqueError):
    """A failure to hear what has become of something: it may have been done, or still be.

    `is_new`: whether it was not so before, None where that is not known either.
    """

    is_new: Optional[bool] = None


def printable(text: str) -> str:
    """`text` as one line that cannot move a terminal's cursor: control characters are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
