"""Every command shown in the README and in docs/ works as shown, on a real installation.

In a fenced block of the language `console` a line that starts with `$ ` is a command of an ordinary user in their
home, one that starts with `# ` is root's; other lines are sample output and are not compared. A command ends with 0,
or with N where its line ends with the comment `# exits N`. `vsub -I` is run on a terminal, where `exit` is typed at
the prompt. The batch system is the embedded one: commands of TORQUE's, as `qstat`, are shown too.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from .conftest import PATIENCE_S, REPOSITORY, Site, User
from .terminal import SHELL, terminal

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]

ELSEWHERE = {
    "./quickstart.sh": "installs the whole machine; tests/e2e/test_quickstart.py runs it",
    "./tests/run": "is what runs this test",
    "./tests/full": "runs this test, and all others, for an hour",
    "./install.sh": "installs the whole machine, and others; tests/install runs it on a cluster of its own",
    **dict.fromkeys(
        ("vmgr image add", "vmgr image update", "vmgr image rename", "vmgr image delete"),
        "writes the pool of the machine; tests/unit/test_vmgr_images.py runs it on a pool of its own",
    ),
    "vmgr image export": "writes 600 MB; tests/unit/test_vmgr_images.py exports a smaller one",
    "vmgr image build": "takes minutes; tests/run and the image tests build all images",
    ".venv/bin/python3 docs/generate": "writes into the checkout; tests/unit/test_docs.py runs it",
    ".venv/bin/python3 bench/": "measures for minutes; tests/full runs them",
}
"""First words of commands that are shown and run somewhere else, with where."""

_BLOCK = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_STATUS = re.compile(r"#\s*exits (\d+)\s*$")
_JOB_ID = re.compile(r"^[0-9]+(?:\[\])?\.[A-Za-z0-9.-]+$", re.MULTILINE)


class Command(NamedTuple):
    """One command of a page."""

    line: int
    root: bool
    text: str
    status: int


def commands(page: Path) -> list[Command]:
    """The commands of a page in their order; a backslash at the end of a line joins the next one."""
    text = page.read_text()
    found = []
    for block in _BLOCK.finditer(text):
        first = text.count("\n", 0, block.start(1)) + 1
        lines = iter(enumerate(block[1].splitlines(), first))
        for number, line in lines:
            if line[:2] not in ("$ ", "# "):
                continue
            command = line[2:]
            while command.endswith("\\"):
                command = command[:-1] + next(lines)[1].strip()
            ends = _STATUS.search(command)
            found.append(Command(number, line[0] == "#", command, int(ends[1]) if ends else 0))
    return found


def elsewhere(text: str) -> bool:
    """Whether a command is one of those that run somewhere else; an entry that ends with `/` stands for a folder."""
    words = text.replace("/opt/vtorque/bin/", "") + " "
    return any(words.startswith(start if start.endswith("/") else f"{start} ") for start in ELSEWHERE)


def placed(text: str, site: Site) -> str:
    """A command with the documented places, those of an ordinary installation, turned to the test's own."""
    places = {
        "/opt/vtorque": site.prefix,
        "/var/log/vtorque": site.root / "log",
        "/var/spool/vtorque": site.root / "spool",
        "/var/spool/torque/mom_priv": site.root / "local" / "mom_priv",
        "/run/vtorque": site.root / "run",
    }
    for shown, real in places.items():
        text = re.sub(rf"(?<![\w/-]){re.escape(shown)}(?![\w-])", str(real), text)
    return text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_work(page: Path, site: Site, user: User) -> None:
    shown = [command for command in commands(page) if not elsewhere(command.text)]
    if not shown:
        pytest.skip("shows no command that is run here")
    for example in sorted((REPOSITORY / "examples").iterdir()):
        user.write(example.name, example.read_text())
    path = f"{site.prefix}/bin:{site.prefix}/libexec/local:/usr/local/bin:/usr/bin:/bin"
    jobs: list[str] = []
    try:
        for command in shown:
            done = run(command, path, site, user)
            print(f"{command.text}\n{done.stdout}{done.stderr}", end="")  # pytest shows it where it matters
            where = f"{page.name} line {command.line}: {command.text}"
            assert done.returncode == command.status, f"{where}\nended with {done.returncode}, not {command.status}"
            if command.status == 2:
                assert done.stderr.count("\n") == 1, where
            if command.text.startswith("vsub ") and "--wait" not in command.text:
                jobs += _JOB_ID.findall(done.stdout)
    finally:
        for job in jobs:
            site.wait(job)


def run(command: Command, path: str, site: Site, user: User) -> subprocess.CompletedProcess[str]:
    text = placed(command.text, site)
    shell = ("/bin/bash", "-o", "pipefail", "-c", text)
    if text.startswith("vsub -I"):
        with terminal(user, *shell, path=path) as tty:
            if " -x " not in text:
                tty.expect(SHELL)
                tty.type("exit\r")
            return subprocess.CompletedProcess(shell, tty.end(), tty.seen, "")
    if not command.root:
        return user.run(*shell, env={"PATH": path, "USER": user.name, "LOGNAME": user.name})
    environment = {"PATH": f"{path}:/usr/sbin:/sbin", "HOME": "/root", "LANG": "C.UTF-8"}
    return subprocess.run(
        shell,
        cwd=site.root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        stdin=subprocess.DEVNULL,
    )


def test_commands_of_the_checkout_are_listed() -> None:
    """They act on the machine: none is run by accident, nor silently left out."""
    for page in PAGES:
        for command in commands(page):
            assert elsewhere(command.text) or not command.text.startswith("."), f"{page.name}: {command.text}"
