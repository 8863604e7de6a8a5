"""What the doctor says of Slurm on a node."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from nodesite import FUZZ, make_node, short_folder

from vmgr.config import load_config
from vmgr.deploy.slurmfiles import HOOKS, conf_lines
from vmgr.doctor import batchsystem, slurm
from vmgr.doctor.finding import Finding, Level, Node

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="hooks are root's")

CONFIG = """\
Configuration data as of 2026-11-28T08:08:30
ClusterName             = ref
Epilog                  = {epilog}
KillWait                = 30 sec
Prolog                  = {prolog}
PrologEpilogTimeout     = {timeout}
PrologFlags             = {flags}
TaskProlog              = {task}

Slurmctld(primary) at vm is UP
"""
NODE = (
    "NodeName=n1 Arch=x86_64 CPUAlloc=0 CPUTot=4 NodeAddr=127.0.0.1 NodeHostName={host} State={state} "
    "ThreadsPerCore=1 Partitions=batch{reason} \n"
)


class Site:
    """A node whose `scontrol` says what a test lets it say."""

    def __init__(self, base: Path) -> None:
        self.base = base
        made = make_node(base)
        tree = {**yaml.safe_load(made.install.config.read_text()), "engine": "slurm", "slurm": {"bin": str(base)}}
        made.install.config.write_text(yaml.safe_dump(tree))
        self.node = Node(made.install, load_config(made.install))
        self.folder = Path(made.install.prefix) / "share" / "vtorque" / "mom_priv_hooks" / "slurm"
        self.folder.mkdir(parents=True)
        for name in HOOKS:
            self.hook(self.folder / name, f"{made.install.program('vtorque-hook')} x\n")
        for name in slurm.COMMANDS:
            self.hook(base / name, "exit 1\n")
        self.says()

    def hook(self, path: Path, text: str) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{text}")
        path.chmod(0o755)
        return path

    def says(self, node: str = "", status: int = 0, **changed: object) -> None:
        settings: dict[str, object] = {
            "prolog": self.folder / "prolog", "epilog": self.folder / "epilog", "timeout": "65534",
            "flags": "Alloc,DeferBatch", "task": self.folder / "task_prolog",
        }  # fmt: skip
        (self.base / "config").write_text(CONFIG.format(**{**settings, **changed}))
        (self.base / "nodes").write_text(node or self.line("IDLE"))
        text = f'case $* in "show config") cat {self.base}/config ;; "-o show nodes") cat {self.base}/nodes ;; esac\n'
        self.hook(self.base / "scontrol", f"{text}exit {status}\n")

    @staticmethod
    def line(state: str, reason: str = "") -> str:
        shown = f" Reason={reason} [root@2026-11-28T08:08:30]" if reason else ""
        return NODE.format(host="other", state="IDLE", reason="") + NODE.format(
            host=os.uname().nodename, state=state, reason=shown
        )

    def found(self) -> list[Finding]:
        return list(batchsystem.check(self.node))


@pytest.fixture
def site() -> Iterator[Site]:
    with short_folder() as base:
        base.chmod(0o755)
        yield Site(base)


def only(found: Iterable[Finding], level: Level, *words: str) -> None:
    """The only finding that is not well, with its remedy."""
    (each,) = (finding for finding in found if finding.level is not Level.OK)
    text = f"{each.what} | {each.remedy}"
    assert each.level is level and each.remedy and all(word in text for word in words), text


def test_all_is_well(site: Site) -> None:
    found = site.found()
    assert {finding.level for finding in found} == {Level.OK} and len(found) == 5, found
    assert {finding.subject for finding in found} == {"batch system"}


def test_a_task_prolog_is_optional(site: Site) -> None:
    site.says(task="(null)")
    only(site.found(), Level.NOTE, "Slurm has no TaskProlog", f"TaskProlog={site.folder}/task_prolog")
    own = site.hook(site.base / "own" / "task", "echo export A=1\n")
    site.says(task=own)
    only(site.found(), Level.NOTE, f"TaskProlog ({own}) does not call ours")
    site.hook(own, f"{site.folder}/task_prolog\n")
    assert {finding.level for finding in site.found()} == {Level.OK}


def test_a_front_end_or_a_controller_that_is_away(site: Site) -> None:
    site.says(node=NODE.format(host="other", state="IDLE", reason=""))
    only(site.found(), Level.NOTE, "is no node of Slurm's")
    site.says(status=1)
    only(site.found(), Level.WARNING, "does not tell its configuration", "slurmctld")
    (site.base / "scontrol").unlink()
    only(site.found(), Level.NOTE, "scontrol", "slurm.bin")


def test_a_front_end_without_some_commands(site: Site) -> None:
    (site.base / "sbatch").unlink()
    (site.base / "sinfo").chmod(0o644)
    only(site.found(), Level.WARNING, "slurm.bin", "has no sbatch, sinfo")


def test_hooks(site: Site) -> None:
    site.says(prolog="(null)")
    only(site.found(), Level.FAILURE, "has no Prolog", f"Prolog={site.folder}/prolog")
    own = site.hook(site.base / "d" / "10-site", "true\n")
    site.says(epilog=own)
    only(site.found(), Level.FAILURE, "does not call", "Epilog")
    site.hook(site.base / "d" / "20-ours", f"{site.folder}/prolog\n")
    site.says(prolog=site.base / "d" / "*")
    assert {finding.level for finding in site.found()} == {Level.OK}, "the site's own that calls ours, among others"
    own.chmod(0o777)
    only(site.found(), Level.WARNING, "10-site", "chmod")
    own.chmod(0o755)
    site.says()
    (site.folder / "epilog").chmod(0o644)
    only(site.found(), Level.FAILURE, "cannot be run", "chmod 755")


def test_control_groups(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "slurms_root", lambda paths: paths[0])
    tracker = "ProctrackType           = proctrack/cgroup\nKillWait "
    for flags, level, words in (
        ("Alloc,DeferBatch", Level.WARNING, "has no Contain"),
        ("Alloc,Contain,RunInJob,DeferBatch", Level.WARNING, "has RunInJob"),
        ("Alloc,Contain,DeferBatch", Level.OK, "guests are in"),
    ):
        site.says(flags=flags)
        config = site.base / "config"
        config.write_text(config.read_text().replace("KillWait ", tracker))
        found = [each for each in site.found() if words in each.what]
        assert [each.level for each in found] == [level], site.found()
    monkeypatch.setattr(slurm, "slurms_root", lambda paths: None)
    only(site.found(), Level.WARNING, "where they are looked for", "cgroup.conf")


def test_several_prologs_as_newer_ones_tell_them(site: Site) -> None:
    site.says(task="(null)")
    text = (site.base / "config").read_text().replace("Prolog   ", "Prolog[0]   = /site/own\nProlog[1]", 1)
    settings = slurm.parse_settings(text)
    assert settings["Prolog"] == ("/site/own", str(site.folder / "prolog")) and settings["TaskProlog"] == ()


@pytest.mark.parametrize(
    ("flags", "level"),
    [
        ("Alloc,DeferBatch", Level.OK), ("alloc,deferbatch,x11", Level.OK), ("Contain,DeferBatch", Level.OK),
        ("Alloc", Level.NOTE), ("RunInJob", Level.NOTE), ("(null)", Level.FAILURE), ("DeferBatch", Level.FAILURE),
        ("NoHold", Level.FAILURE),
    ],
)  # fmt: skip
def test_flags(site: Site, flags: str, level: Level) -> None:
    site.says(flags=flags)
    if level is Level.OK:
        assert {finding.level for finding in site.found()} == {Level.OK}
    else:
        only(site.found(), level, "PrologFlags=Alloc,DeferBatch")


@pytest.mark.parametrize(
    ("timeout", "well"), [("65534", True), ("300", True), ("31", True), ("30", False), ("1", False)]
)
def test_the_time_of_hooks(site: Site, timeout: str, well: bool) -> None:
    for key, other in (("disk", "sisters"), ("sisters", "disk")):
        timeouts = site.node.config.timeouts._replace(**{key: 30, other: 20})
        for name in ("PrologEpilogTimeout", "EpilogTimeout"):  # the second one since Slurm 25.05
            (found,) = slurm.judge_timeout({name: (timeout,), "PrologTimeout": ("1",)}, timeouts)
            assert (found.level is Level.OK) == well and (well or f" {name} above 30" in str(found.remedy))
            assert f"timeouts.{key}" in str(found.remedy) + found.what or timeout == "65534"


@pytest.mark.parametrize(
    ("state", "reason", "level", "words"),
    [
        ("ALLOCATED", "", Level.OK, "allocated"),
        ("IDLE+DRAIN", "Prolog error", Level.FAILURE, "slurmd's log"),
        ("IDLE+DRAIN", "Epilog error", Level.FAILURE, "state=resume"),
        ("IDLE+DRAIN", "old disk : Epilog error", Level.FAILURE, "slurmd's log"),
        ("DOWN*", "Not responding", Level.WARNING, "Not responding"),
        ("MIXED+DRAIN", "disk is to be changed", Level.WARNING, "disk is to be changed"),
    ],
)
def test_the_node(site: Site, state: str, reason: str, level: Level, words: str) -> None:
    site.says(node=site.line(state, reason))
    if level is Level.OK:
        assert words in site.found()[-1].what
    else:
        only(site.found(), level, words, f"the node n1 is {state.lower()}")


def test_patterns_of_hosts(site: Site) -> None:
    file = site.node.install.config
    for folders, said in (
        ({"nobody*": "/x"}, "no folder for this host"),
        ({"nobody*": "/x", "*": "/nowhere"}, "/nowhere"),
    ):
        file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), "slurm": {"bin": folders}}))
        node = site.node._replace(config=load_config(site.node.install))
        (found,) = slurm.check(node)
        assert said in found.what


@FUZZ
@given(st.text(max_size=200))
def test_whatever_slurm_says(text: str) -> None:
    assert isinstance(slurm.parse_settings(text), dict)
    for line in (text, f"NodeName=n1 {text}"):
        assert len(list(slurm.judge_state(line, "n1"))) == 1


def test_the_lines_that_it_asks_for() -> None:
    assert [line.partition("=")[0] for line in conf_lines("/x")] == ["Prolog", "Epilog", "TaskProlog", "PrologFlags"]
