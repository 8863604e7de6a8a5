"""Installing: what is pure of it, its options and answers, and how an order reaches a node."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, Optional

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from nodesite import FUZZ

from vmgr.deploy import alarm, answers, nodes, options, wire
from vmgr.deploy.files import NOTHING, Seen, digest_of_bytes
from vmgr.deploy.front import first_config
from vmgr.deploy.manifest import Entry, Manifest, Times, parse
from vmgr.deploy.wants import (
    DROP_ASIDE,
    FILE,
    FOLDER,
    KEEP,
    LINK,
    MAKE,
    MOVE,
    NONE,
    REMOVE,
    RESTORE,
    Want,
    decide,
    undoing,
)
from vmgr.errors import Code, VTorqueError

KNOWN = {"prefix": str, "nodes": str, "all": bool, "fanout": int}

# --- what is to be done

OURS = digest_of_bytes(b"ours")
SITE = Seen("file", "site", 0o755, 0, 0, (1, 1))
THERE = Seen("file", OURS, 0o755, 0, 0, (1, 2))
HOOK = Want("/m/prologue", FILE, 0o755, b"ours", aside="/m/site/prologue")
PENDING = Entry("file", 0o755, [OURS], "/m/site/prologue")
DONE = Entry("file", 0o755, [OURS], "/m/site/prologue", pending=False)
OLD = Entry("file", 0o755, ["old"], "/m/site/prologue", pending=False)


@pytest.mark.parametrize(
    ("entry", "seen", "aside", "action", "undone"),
    [
        (None, NOTHING, NOTHING, MAKE, None),
        (None, SITE, NOTHING, MOVE, None),
        (None, SITE, SITE._replace(inode=(1, 9)), KEEP, None),
        (PENDING, SITE, NOTHING, MOVE, NONE),
        (PENDING, SITE, SITE, MAKE, DROP_ASIDE),
        (PENDING, NOTHING, NOTHING, MAKE, NONE),
        (DONE, THERE, SITE, NONE, RESTORE),
        (DONE, THERE, NOTHING, NONE, REMOVE),
        (DONE, THERE._replace(mode=0o777), SITE, MAKE, RESTORE),
        (DONE, THERE._replace(uid=7), SITE, MAKE, RESTORE),
        (OLD, Seen("file", "old", 0o755), SITE, MAKE, RESTORE),
        (OLD, NOTHING, SITE, MAKE, RESTORE),
        (DONE, Seen("file", "theirs", 0o755, inode=(1, 3)), SITE, KEEP, KEEP),
        (DONE, Seen("link", "/x", inode=(1, 3)), SITE, KEEP, KEEP),
        (DONE, Seen("file", "theirs", 0o755, inode=(1, 3)), NOTHING, KEEP, KEEP),
    ],
)
def test_what_is_done_for_a_hook(entry: Optional[Entry], seen: Seen, aside: Seen, action: str, undone: str) -> None:
    step = decide(HOOK, entry, seen, aside)
    assert step.action == action
    if entry is not None:
        assert undoing(entry, seen, aside) == undone


def test_what_is_done_for_all_else() -> None:
    once = Want("/e/c.yaml", FILE, 0o644, b"new", once=True)
    mine = Entry("file", 0o644, ["first"], pending=False)
    assert decide(once, None, SITE, NOTHING) == (once, NONE, None, ""), "the site's own configuration is never ours"
    assert decide(once, mine, Seen("file", "first", 0o644), NOTHING).action == NONE, "nor replaced by a newer default"
    assert decide(once, None, NOTHING, NOTHING).action == MAKE
    link = Want("/b/vsub", LINK, target="/opt/a")
    assert decide(link, None, Seen("link", "/opt/b"), NOTHING).action == KEEP, "another installation's"
    assert decide(link, Entry("link", 0, ["/opt/b"], pending=False), Seen("link", "/opt/b"), NOTHING).action == MAKE
    folder = Want("/d", FOLDER, 0o711)
    assert decide(folder, None, Seen("folder", "", 0o777, 5), NOTHING)[1:3] == (NONE, None), "not ours, not touched"
    assert decide(folder, Entry("folder", 0o711), Seen("folder", "", 0o700), NOTHING).action == MAKE
    assert decide(folder, None, SITE, NOTHING).action == KEEP
    old = Want("/m/prologue", FILE, 0o755, b"ours", aside="/m/site/prologue", over=True)
    assert decide(old, None, SITE, NOTHING).action == MAKE, "one of an older version is not the site's"


def test_a_manifest_comes_back() -> None:
    made = Manifest("1", "installed", {"id": "x"}, {"/a": DONE, "/b": Entry("link", ours=["/c"])}, {"/": Times(5, "n")})
    assert parse(made.as_text(), "m") == made
    for text in ("", "[]", "{}", '{"version": 2}', made.as_text().replace('"kind"', '"sort"'), "x" * 9):
        with pytest.raises(VTorqueError, match="no manifest of this version") as raised:
            parse(text, "m")
        assert raised.value.code is Code.CONFIG


# --- $prologalarm


@pytest.mark.parametrize(
    ("text", "raised"),
    [
        (None, "$prologalarm 311\n"),
        ("", "$prologalarm 311\n"),
        ("$logevent 255", "$logevent 255\n$prologalarm 311\n"),
        ("$prologalarm 60\n", "$prologalarm 311\n"),
        ("a\n  $prologalarm 60 # ours\nb\n", "a\n$prologalarm 311  # ours\nb\n"),
        ("$prologalarm 60\n$prologalarm 90\n", "$prologalarm 311\n$prologalarm 311\n"),
        ("$prologalarm never\n", "$prologalarm 311\n"),
        ("$prologalarm 311\n", None),
        ("$prologalarm 9000 # long\n", None),
        ("#$prologalarm 9000\n", "#$prologalarm 9000\n$prologalarm 311\n"),
    ],
)
def test_an_alarm_is_raised(text: Optional[str], raised: Optional[str]) -> None:
    assert alarm.raised(text, alarm.needed(300, 100)) == raised


@FUZZ
@given(st.text(alphabet="$prologalarm 0123456789#\n\tx"), st.integers(11, 5000))
def test_a_raised_alarm_is_enough(text: str, seconds: int) -> None:
    new = alarm.raised(text, seconds)
    found, problem = alarm.parse_alarm(text if new is None else new)
    assert found.seconds >= seconds and problem is None
    assert new is None or alarm.raised(new, seconds) is None


# --- answers and options


def test_answers() -> None:
    text = "---\n# of the site\nprefix: /opt/x   # there\nnodes: 'n[01-16],n20'\n\nall: false\nfanout: 8\n"
    found = answers.parse(text, "f", KNOWN)
    assert found == {"prefix": "/opt/x", "nodes": "n[01-16],n20", "all": False, "fanout": 8} == yaml.safe_load(text)


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        ("a: 1", Code.KEY, "line 1: a: unknown"),
        ("fanout: 1\nfanout: 2", Code.KEY, "line 2: fanout: twice"),
        ("prefix:", Code.VALUE, "no value"),
        ("prefix: [a]", Code.VALUE, "no answer"),
        ("prefix: {a: b}", Code.VALUE, "no answer"),
        ("prefix: &a b", Code.VALUE, "no answer"),
        ("prefix: a b", Code.VALUE, "no answer"),
        ("prefix: 5", Code.VALUE, "in quotes"),
        ("prefix: yes", Code.VALUE, "in quotes"),
        ("fanout: many", Code.VALUE, "whole number"),
        ("fanout: 010", Code.VALUE, "whole number"),
        ("all: yes", Code.VALUE, "true or false"),
        (" fanout: 1", Code.VALUE, "no answer"),
        ("fanout: 1\tx", Code.VALUE, "no answer"),
    ],
)
def test_answers_that_are_none(text: str, code: Code, said: str) -> None:
    with pytest.raises(VTorqueError, match=said) as raised:
        answers.parse(text, "site.yaml", KNOWN)
    assert raised.value.code is code and "site.yaml line" in raised.value.message


@FUZZ
@given(st.text(alphabet="prefixnodesallfanout: \"'#/.-[]0189eE+_xob~truefalsnyY\n,@&*!|>%", max_size=60))
@example("nodes: 1.5")
@example("nodes: 0x1f")
@example("nodes: 2001-01-01")
@example("prefix: 'a' #b")
@example("prefix: 1:30")
def test_what_is_taken_means_the_same_in_yaml(text: str) -> None:
    try:
        found = answers.parse(text, "f", KNOWN)
    except VTorqueError:
        return
    loaded = yaml.safe_load(text) or {}
    assert {key: str(value) if KNOWN[key] is str else value for key, value in loaded.items()} == found


def test_options_and_answers(tmp_path: Path) -> None:
    file = tmp_path / "site.yaml"
    file.write_text("nodes: n[1-4]\nhooks: jobtype\ntorque-home: /var/torque\nfanout: 4\n")
    read = options.read(["--answers", str(file), "--fanout", "9", "--dry-run"])
    assert (read.nodes, read.hooks, read.torque_home, read.fanout, read.dry_run) == (
        "n[1-4]", "jobtype", "/var/torque", 9, True,
    )  # fmt: skip
    assert options.read(["--answers", str(file), "--all"]).nodes is None, "the command line says which nodes"
    assert (options.read([]).prefix, options.read([]).action) == ("/opt/vtorque", "install")
    read = options.read(["--prefix", "/opt/there/", "--torque-home=/var/torque/"])
    assert (read.prefix, read.torque_home) == ("/opt/there", "/var/torque")
    for prefix in ("relative", "/opt/a b", "/opt/../etc", "/", "/opt//x", "/opt/.hidden"):
        with pytest.raises(VTorqueError, match="--prefix"):
            options.read(["--prefix", prefix])


def test_the_first_configuration(tmp_path: Path) -> None:
    sample = tmp_path / "sample.yaml"
    sample.write_text('guest: {vm_hooks: "@PREFIX@/vm"}\n')
    assert first_config(str(sample), "/opt/x", None) == b'guest: {vm_hooks: "/opt/x/vm"}\n'
    made = yaml.safe_load(first_config(str(sample), "/opt/x", "/var/torque"))
    assert made["torque"] == {"mom_priv": "/var/torque/mom_priv"}
    sample.write_text("engine: torque\ntorque:\n  mom_priv: /site/mom_priv\n")
    assert yaml.safe_load(first_config(str(sample), "/opt/x", "/var/torque"))["torque"]["mom_priv"] == "/site/mom_priv"
    with pytest.raises(VTorqueError, match="--config"):
        first_config(str(tmp_path / "none"), "/opt/x", None)


# --- nodes


def test_an_order_reaches_a_program_that_has_no_files(tmp_path: Path) -> None:
    """The node's program runs from what it is sent, in a Python that sees nothing of this checkout."""
    order: dict[str, Any] = {
        "action": "check", "dry": False, "prefix": str(tmp_path / "opt"), "home": str(tmp_path), "tree": "t",
        "toolkit": "1", "front": "f", "mode": "wrap", "job_type": "v", "spool": "/s", "needed_s": 1,
        "raise_alarm": False, "python": [3, 9], "machine": "m",
    }  # fmt: skip
    stream = tmp_path / "stream"
    with stream.open("wb") as out:
        wire.write_stream(out, order)
    command = shlex.split(wire.remote_command(sys.executable))
    with stream.open("rb") as given_:
        done = subprocess.run(command, stdin=given_, capture_output=True, text=True, cwd=tmp_path)
    answer = nodes.parse("n1", done.stdout)
    assert answer is not None and answer.status == "failed", done.stderr
    assert "mom_priv" in answer.text or "no root" in answer.text


def test_the_remote_shell_is_that_of_pdsh() -> None:
    remote = wire.remote_command("/usr/bin/python3")
    assert wire.ssh_command({}, remote)[-5:] == ["-a", "-x", "-lroot", "%h", remote]
    given_ = {"PDSH_SSH_ARGS": "-F '/a b' -l%u", "PDSH_SSH_ARGS_APPEND": "-v"}
    assert wire.ssh_command(given_, "x")[-6:] == ["-v", "-F", "/a b", "-lroot", "%h", "x"]
    script = wire.runner(given_, "python3", "/tmp/a b")
    assert "-F '/a b' -lroot \"$1\" " in script and script.endswith("<'/tmp/a b'\n")
    subprocess.run(["sh", "-n"], input=script, text=True, check=True)


def test_nothing_of_roots_is_forwarded(tmp_path: Path) -> None:
    (tmp_path / "config").write_text("ForwardAgent yes\nForwardX11 yes\nRemoteForward 9 h:9\n")
    program, *words = wire.ssh_command({"PDSH_SSH_ARGS": f"-F {tmp_path}/config %h"}, "true")
    shown = subprocess.run(
        [program, "-G", *(word.replace("%h", "n1") for word in words)], capture_output=True, text=True, check=True
    )
    told = shown.stdout.splitlines()
    wanted = {"forwardagent no", "forwardx11 no", "clearallforwardings yes", "batchmode yes"}
    assert wanted <= {*told} and not [line for line in told if line.startswith("remoteforward")]


@pytest.mark.parametrize(
    "line", ["", "x", "[]", "null", "{}", '{"status": "fine", "text": ""}', '{"status": "ok"}', "[" * 9999]
)
def test_what_is_no_answer(line: str) -> None:
    assert nodes.parse("n1", line) is None


def test_answers_of_nodes_are_lines() -> None:
    answer = nodes.parse("n1", json.dumps({"status": "ok", "text": "a\x1b[2Jb\nc", "kept": ["\n", 5]}))
    assert answer == nodes.Answer("n1", "ok", "a\\x1b[2Jb\\nc", ("\\n", "5"))
    much = nodes.parse("n1", json.dumps({"status": "ok", "text": "x" * 9999, "kept": ["y" * 9999] * 999}))
    assert much is not None and len(much.text) + sum(map(len, much.kept)) < 40_000
    assert nodes.reason("ssh: no route\nsh exited with exit code 255\n") == "ssh: no route"


def test_a_pbsnodes_that_gives_no_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "pbsnodes"
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(nodes, "PBSNODES_SECONDS", 0.2)
    for text, said in (
        ("exec sleep 60", "timed out"),
        ("echo no server >&2; exit 3", "no server"),
        ("printf '\\377\\n  x\\n'", "has no nodes"),
    ):
        program.write_text(f"#!/bin/sh\n{text}\n")
        program.chmod(0o755)
        with pytest.raises(VTorqueError, match=said):
            nodes.all_nodes("/nowhere")
    program.write_text("#!/bin/sh\nprintf 'n2\\n     note = \\377\\nn1\\n'\n")
    assert nodes.all_nodes("/nowhere") == ["n1", "n2"]


def test_names_of_nodes() -> None:
    listed = "# all\nn10 np=4\nn2\n\n  indented\nn1.cluster np=1 fast\n"
    shown = "n2\n     state = free\n     np = 4\n\nn10\n     state = down\n"
    assert nodes.nodes_in(listed) == ["n1.cluster", "n2", "n10"] and nodes.nodes_in(shown) == ["n2", "n10"]
