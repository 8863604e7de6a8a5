"""Completion of `vmgr`'s command lines, by real shells, on an installation with images, recipes and jobs."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pexpect
import pytest
from nodesite import REPOSITORY, Node, make_node, short_folder
from test_image_add import a_pool

from vmgr.node.control import Control
from vmgr.node.state import Progress

"""A job of another user's."""


class Site(NamedTuple):
    """An installation with two jobs, one of them another user's; `program` is its `vmgr`."""

    node: Node
    program: Path

    def environment(self) -> dict[str, str]:
        return {
            "PATH": f"{self.program.parent}:/usr/bin:/bin", "HOME": str(self.node.base), "LANG": "C.UTF-8",
            "TERM": "dumb",
        }  # fmt: skip

    def script(self, shell: str) -> Path:
        """What `vmgr completion` prints, in a file."""
        path = self.node.base / f"vmgr.{shell}"
        path.write_text(self.run(self.program, "completion", shell))
        return path

    def run(self, *argv: object) -> str:
        done = subprocess.run(
            [str(word) for word in argv], env=self.environment(), capture_output=True, text=True, check=True,
            cwd=self.node.base,
        )  # fmt: skip
        assert done.stderr == ""
        return done.stdout


def serve(node: Node, job_id: str, owner: int, stop: list[threading.Event]) -> threading.Thread:
    """A job's agent, as far as completion asks it."""
    place = node.place(job_id)
    place.socket.parent.mkdir(parents=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(place.socket))
    listener.listen(8)
    over = threading.Event()
    stop.append(over)

    async def live() -> None:
        control = Control(Progress(0, {"job_id": job_id}), owner, over=lambda: None, attached=lambda: None)
        server = await control.serve(listener)
        await asyncio.get_running_loop().run_in_executor(None, over.wait)
        server.close()

    thread = threading.Thread(target=lambda: asyncio.run(live()))
    thread.start()
    return thread


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    if os.geteuid() != 0:
        pytest.skip("needs root: the agents of two users")
    with short_folder() as base:
        node = make_node(base)
        a_pool(node.config.images.pool)
        for recipe in ("micro", "debian-12", "bad name;*"):
            (node.install.recipes / recipe).mkdir(parents=True)
            (node.install.recipes / recipe / "recipe.yaml").write_text("{}")
        logs = base / "log" / "jobs"
        logs.mkdir(parents=True)
        (logs / "11.host.log").write_text("")
        program = base / "bin" / "vmgr"
        program.parent.mkdir()
        program.write_text(
            f"#!{sys.executable} -I\nimport sys\nsys.path.insert(0, {str(REPOSITORY)!r})\n"
            f"sys.executable = {str(node.install.root / 'venv' / 'bin' / 'python3')!r}\n"
            "from vmgr.cli import main\nsys.exit(main())\n"
        )
        program.chmod(0o755)
        stop: list[threading.Event] = []
        agents = [serve(node, "12[3].host", 0, stop), serve(node, "13.host", 0, stop)]
        yield Site(node, program)
        for event in stop:
            event.set()
        for agent in agents:
            agent.join()


def bash(site: Site, line: str) -> list[str]:
    """What bash offers at the end of `line`, by the function that is installed."""
    words = [word or "''" for word in line.split(" ")]
    code = (
        f"source {site.script('bash')}\nCOMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}\n"
        f"complete -p vmgr >/dev/null && _vmgr_completion vmgr\nprintf '%s\\n' \"${{COMPREPLY[@]}}\"\n"
    )
    return site.run("/bin/bash", "--norc", "-c", code).split()


WANTED = [
    ("vmgr image sh", ["show"]),
    ("vmgr image show ", ["debian-12"]),
    ("vmgr image show x", []),
    ("vmgr image show debian-12@", ["debian-12@1"]),
    ("vmgr image add --like deb", ["debian-12"]),
    ("vmgr image build ", ["debian-12", "micro"]),
    ("vmgr topology --job 1", ["11.host", "12[3].host", "13.host"]),
    ("vmgr logs 1", ["11.host", "12[3].host", "13.host"]),
    ("vmgr ssh ", ["12[3].host", "13.host"]),
    ("vmgr power off 1", ["12[3].host", "13.host"]),
    ("vmgr completion ", ["bash", "zsh", "fish"]),
    ("vmgr errors --", ["--json", "--markdown", "--help"]),
]


@pytest.mark.parametrize(("line", "offered"), WANTED, ids=[line for line, _ in WANTED])
def test_bash(site: Site, line: str, offered: list[str]) -> None:
    assert bash(site, line) == offered


def test_files_are_left_to_the_shell(site: Site) -> None:
    environment = {"COMP_WORDS": "vmgr report 1 --html x", "COMP_CWORD": "4", "_VMGR_COMPLETE": "bash_complete"}
    told = site.run("/usr/bin/env", *(f"{name}={value}" for name, value in environment.items()), site.program)
    assert told == "file,x\n"


def test_bash_on_a_terminal(site: Site) -> None:
    shell = pexpect.spawn(
        "/bin/bash", ["--norc", "--noprofile", "-i"], env=site.environment(), encoding="utf-8", timeout=20, echo=False
    )
    shell.sendline(f"PS1='$ '; source {site.script('bash')}; bind 'set enable-bracketed-paste off'; echo s''et")
    shell.expect("set\r\n")
    shell.send("echo vmgr-done; vmgr image sho\tdeb\t\n")
    shell.expect("name: debian-12")
    shell.sendline("exit")
    shell.expect(pexpect.EOF)


def test_fish(site: Site) -> None:
    fish = shutil.which("fish")
    if fish is None:
        pytest.skip("fish is not installed")
    script = site.script("fish")
    for line, offered in WANTED[::3]:
        told = site.run(fish, "--no-config", "-c", f"source {script}; complete -C {line!r}")
        assert sorted(entry.split("\t")[0] for entry in told.splitlines()) == sorted(offered), line


def test_zsh(site: Site) -> None:
    zsh = shutil.which("zsh")
    if zsh is None:
        pytest.skip("zsh is not installed")
    folder = site.node.base / "functions"
    folder.mkdir()
    site.script("zsh").rename(folder / "_vmgr_completion")  # named as the function that it defines
    shell = pexpect.spawn(zsh, ["-f", "-i"], env=site.environment(), encoding="utf-8", timeout=20, echo=False)
    shell.sendline(f"fpath=({folder} $fpath); autoload -U compinit; compinit -D -u; PS1='$ '; echo s''et")
    shell.expect("set\r\n")
    shell.send("vmgr image sho\tdeb\t\n")
    shell.expect("name: debian-12")
    shell.sendline("exit")
    shell.expect(pexpect.EOF)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_what_is_printed_is_the_shells_own_language(site: Site, shell: str) -> None:
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"{shell} is not installed")
    site.run(program, "-n", site.script(shell))


def test_without_a_configuration_nothing_is_said(site: Site) -> None:
    config = site.node.install.config
    config.rename(config.with_suffix(".away"))
    try:
        assert bash(site, "vmgr image show ") == [] and bash(site, "vmgr image sh") == ["show"]
    finally:
        config.with_suffix(".away").rename(config)


def test_a_users_jobs_are_the_users_own(site: Site) -> None:
    """Another user, who may read the installation, is offered neither the jobs nor the logs of root's."""
    code = f"""\
import os, sys
sys.path[:0] = [{str(REPOSITORY)!r}, *sys.argv[2].split(":")]
import vmgr.schema, vmgr.yamlfile, click.shell_completion
from vmgr.commands.completion import _jobs
sys.executable = sys.argv[1]
if sys.argv[3] == "other":
    os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
print(*sorted(_jobs("")))
"""
    base, python = site.node.base, str(site.node.install.root / "venv" / "bin" / "python3")
    base.chmod(0o755)
    (base / "log" / "jobs" / "11.host.log").chmod(0o600)
    for name in site.node.config.paths.run.rglob("*.sock"):
        name.chmod(0o666)
    path = ":".join(filter(None, sys.path))
    told = [
        subprocess.run(
            [sys.executable, "-I", "-c", code, python, path, who], capture_output=True, text=True, check=True, cwd="/"
        ).stdout.split()
        for who in ("root", "other")
    ]
    assert told == [["11.host", "12[3].host", "13.host"], []]
