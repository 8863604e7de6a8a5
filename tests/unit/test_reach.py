"""How vmgr reaches nodes: which there are, by the batch system's word; programs on them; the words for a guest."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional

import paramiko
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nodesite import FUZZ, short_folder

from vmgr.config import Paths
from vmgr.errors import Code, Unanswered, VTorqueError
from vmgr.node.client import AgentLink
from vmgr.reach import agents, login, shell, where
from vmgr.reach import batch as batch_program
from vmgr.reach.agents import GREETING, job_here, look_here, member_of, members, open_program, ssh_port
from vmgr.reach.target import Target, parse_remote_path, parse_target
from vsub import batch as batch_side
from vsub.batch import _answer
from vsub.engines import PlacedJob
from vsub.engines.embedded import Embedded
from vsub.engines.listing import known_nodes, parse_jobs, parse_pbsnodes, placed_job
from vsub.engines.operators import may_requeue, parse_server
from vsub.engines.torque import Torque

PBSNODES = """\
n1.cluster
     state = free
     np = 4
     status = opsys=linux,uname=Linux n1 5.10,jobs=12.server
     jobs = 0/12.server, 1/12.server

n2.cluster
     state = down
     np = 4

"""

QSTAT = """\
Job Id: 12.server.example.org
    Job_Name = hello
    Job_Owner = carol@lab@front.example.org
    job_state = R
    exec_host = n1.cluster/0-3+n2.cl
\tuster/0-3
    Variable_List = PBS_O_HOME=/home/carol,X=a
\t    exec_host = evil/0
    exec_host = evil/0

Job Id: 13[2].server.example.org
    Job_Owner = dave@front
    job_state = R
    exec_host = n3/0

Job Id: 14.server.example.org
    Job_Owner = dave@front
    job_state = Q

Job Id: 15.server.example.org
    Job_Owner = dave@front
    job_state = C
    exec_host = n3/0
"""


def test_nodes_of_pbsnodes() -> None:
    assert parse_pbsnodes(PBSNODES) == ("n1.cluster", "n2.cluster")
    assert parse_pbsnodes("") == () == parse_pbsnodes("pbsnodes: no nodes\n-x\n")


def test_jobs_of_qstat() -> None:
    assert parse_jobs(QSTAT) == (
        PlacedJob("12.server.example.org", "carol@lab", ("n1.cluster", "n2.cluster")),
        PlacedJob("13[2].server.example.org", "dave", ("n3",)),
    )


@FUZZ
@given(
    st.lists(
        st.one_of(
            st.text(max_size=40),
            st.sampled_from(["Job Id: 1.a", "    exec_host = n1/0+n2/1", "    Job_Owner = u@h", "\t/3", "    x = y"]),
        ),
        max_size=30,
    )
)
def test_hostile_listings(lines: list[str]) -> None:
    text = "\n".join(lines)
    for job in parse_jobs(text):
        assert job.nodes and all(node.isascii() and not node.startswith("-") for node in job.nodes)
    for node in parse_pbsnodes(text):
        assert node.isascii() and " " not in node and not node.startswith("-") and "/" not in node


def torque(folder: Path, qstat: str, pbsnodes: str = "exit 1", **others: str) -> Torque:
    """TORQUE with commands that are scripts."""
    paths = {"qsub": "/usr/bin/false"}
    for name, script in {"qstat": qstat, "pbsnodes": pbsnodes, **others}.items():
        paths[name] = str(folder / name)
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    return Torque(SimpleNamespace(submit=SimpleNamespace(**paths)))  # type: ignore[arg-type]


def test_what_torque_is_asked(tmp_path: Path) -> None:
    (tmp_path / "jobs").write_text(QSTAT)
    (tmp_path / "nodes").write_text(PBSNODES)
    asked = f'case "$*" in "-f -t" | "-f 12") cat {tmp_path}/jobs ;; *) echo "qstat: $2" >&2; exit 153 ;; esac'
    batch = torque(tmp_path, asked, f"cat {tmp_path}/nodes")
    assert batch.nodes(10) == ("n1.cluster", "n2.cluster")
    assert batch.placed(None, 10) == batch.placed("12", 10) == parse_jobs(QSTAT)
    assert batch.placed("99", 10) == ()
    jobs = _answer(batch, ["jobs"], 10)
    assert jobs == [
        {"job": "12.server.example.org", "owner": "carol@lab", "nodes": ["n1.cluster", "n2.cluster"]},
        {"job": "13[2].server.example.org", "owner": "dave", "nodes": []},
    ], "a node that the batch system does not list is none"
    for words in ([], ["job"], ["job", "-x"], ["nodes", "all"], ["rm"]):
        with pytest.raises(VTorqueError, match="VT-USAGE"):
            _answer(batch, words, 10)


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("echo 'Communication failure' >&2; exit 1", "pbsnodes ended with status 1: Communication failure"),
        ("exec sleep 60", r"pbsnodes has not answered within 0\.3 s"),
    ],
)
def test_a_torque_that_does_not_answer(tmp_path: Path, script: str, says: str) -> None:
    batch = torque(tmp_path, "exit 1", script)
    with pytest.raises(VTorqueError, match=rf"^VT-ENGINE: .*{says}"):
        batch.nodes(0.3)
    (tmp_path / "pbsnodes").unlink()
    with pytest.raises(VTorqueError, match=r"^VT-ENGINE: cannot run .*pbsnodes.*set submit\.pbsnodes"):
        batch.nodes(0.3)


HELD = "Job Id: 12.server\n    Job_Owner = carol@front\n    job_state = R\n    Hold_Types = {}\n    Priority = 0\n"


@pytest.mark.parametrize(("before", "new"), [("n", True), ("u", False), ("os", True), ("uo", False)])
def test_what_torque_is_told(tmp_path: Path, before: str, new: bool) -> None:
    (tmp_path / "job").write_text(HELD.format(before))
    told = f'echo "$(basename "$0") $*" >> {tmp_path}/told'
    batch = torque(tmp_path, f"cat {tmp_path}/job", qhold=told, qrls=told, qrerun=told)
    assert _answer(batch, ["hold", "12.server"], 10) == {"new": new}
    assert [_answer(batch, [what, "13[2]"], 10) for what in ("release", "requeue")] == [{}, {}]
    assert (tmp_path / "told").read_text() == "qhold -h u 12.server\nqrls -h u 13[2]\nqrerun 13[2]\n"


@pytest.mark.parametrize(("before", "new"), [("n", True), ("u", False)])
def test_torque_does_not_say_what_has_become_of_a_change(tmp_path: Path, before: str, new: bool) -> None:
    (tmp_path / "job").write_text(HELD.format(before))
    batch = torque(tmp_path, f"cat {tmp_path}/job", qhold="exec sleep 60", qrerun="exec sleep 60")
    with pytest.raises(Unanswered, match="qhold has not answered within") as caught:
        batch.hold("12", 1)
    assert caught.value.is_new is new
    with pytest.raises(Unanswered) as caught:
        batch.requeue("12", 0.3)
    assert caught.value.is_new is None
    batch = torque(tmp_path, "exec sleep 60", qhold=f"touch {tmp_path}/told")
    with pytest.raises(VTorqueError, match="qstat has not answered within") as nothing:
        batch.hold("12", 0.3)
    assert not isinstance(nothing.value, Unanswered) and not (tmp_path / "told").exists(), "nothing has been changed"


@pytest.mark.parametrize("job", ["all", "ALL", "-f", "12[]", "12:0", "", "12 13", "x", "12.a;b"])
def test_one_job_is_changed_and_no_more(tmp_path: Path, job: str) -> None:
    """`qrerun all` requeues every job of the site."""
    told = f"touch {tmp_path}/told"
    batch = torque(tmp_path, told, qhold=told, qrls=told, qrerun=told)
    for what in ("hold", "release", "requeue"):
        with pytest.raises(VTorqueError, match="VT-VALUE"):
            _answer(batch, [what, job], 10)
    for words in (["requeue"], ["hold", "12", "13"], ["release", "-h", "12"]):
        with pytest.raises(VTorqueError, match="VT-USAGE"):
            _answer(batch, words, 10)
    assert not (tmp_path / "told").exists()


@pytest.mark.parametrize(
    ("said", "status", "says"),
    [
        (
            "qrerun: Unauthorized Request  MSG=additional permissions required (ATR_DFLAG_MGWR | …) 12.server",
            159,
            r"VT-ACCESS: qrerun: Unauthorized Request .*; make \S+@\S+ an operator: qmgr -c 'set server operators \+= ",
        ),
        (
            "qrerun: job is not rerunnable MSG=job 12.server not rerunnable 12.server",
            192,
            "VT-ENGINE: qrerun: job is not",
        ),
        ("qrerun: Rejected by mom 12.server", 0, "VT-ENGINE: qrerun: Rejected by mom"),
        ("", 3, "VT-ENGINE: .*/qrerun ended with status 3"),
    ],
)
def test_what_torque_refuses(tmp_path: Path, said: str, status: int, says: str) -> None:
    (tmp_path / "said").write_text(f"{said}\n")
    batch = torque(tmp_path, "exit 1", qrerun=f"cat {tmp_path}/said >&2; exit {status}")
    with pytest.raises(VTorqueError, match=says):
        batch.requeue("12.server", 10)


LIST_SERVER = """\
Server head.cluster
\tserver_state = Active
\tacl_hosts = head.cluster
\tmanagers = adm@head.cluster,root@head.cluster
\toperators = ops,-root@n9.cluster,root@n[1-16].cluster,root@*.gpu.cluster,
                    root@login.cluster
\tdefault_queue = batch
\tcomment = root@elsewhere
"""


def test_the_operators_of_torque() -> None:
    found = parse_server(LIST_SERVER)
    assert found.server == "head.cluster" and len(found.entries) == 7
    hosts = ("n1.cluster", "N16.cluster", "g1.gpu.cluster", "login.cluster", "head.cluster")
    may = [*(("root", host) for host in hosts), ("ops", "anywhere"), ("adm", "head.cluster")]
    others = ("n9.cluster", "n17.cluster", "n1", "gpu.cluster", "elsewhere", "x.login.cluster")
    may_not = [("root", host) for host in others]
    may_not += [("carol", "head.cluster"), ("adm", "n1.cluster"), ("op", "n1.cluster"), ("", "")]
    assert [each for each in may if not may_requeue(found, each[0], [each[1]])] == []
    assert [each for each in may_not if may_requeue(found, each[0], [each[1]])] == []
    assert may_requeue(found, "root", ["n1", "n1.cluster"]), "one of its names is enough"
    assert not may_requeue(parse_server(""), "root", ["n1"])


@FUZZ
@given(st.text(max_size=200), st.text(max_size=20), st.text(max_size=20))
def test_any_list_of_operators(text: str, user: str, host: str) -> None:
    found = parse_server(f"\toperators = {text}")
    may_requeue(found, user, [host])
    assert all(entry.strip() == entry != "" for entry in found.entries)


def test_whether_a_node_may_requeue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    (tmp_path / "list").write_text(LIST_SERVER)
    asked = f'[ "$*" = "-c list server" ] && cat {tmp_path}/list'
    batch = torque(tmp_path, "exit 1", qhold="exit 1", qrerun="exit 1", qmgr=asked)
    with pytest.raises(VTorqueError, match=r"VT-ACCESS: root@\S+ is neither operator nor manager; make root@\S+ an op"):
        _answer(batch, ["check-requeue"], 10)
    (tmp_path / "list").write_text("Server x\n\toperators = root@*\n")
    assert _answer(batch, ["check-requeue"], 10) == {}
    (tmp_path / "qmgr").unlink()
    with pytest.raises(VTorqueError, match=r"VT-ENGINE: cannot run .*/qmgr: No such file.*submit\.qrerun, beside"):
        _answer(batch, ["check-requeue"], 10)
    (tmp_path / "qhold").unlink()
    with pytest.raises(VTorqueError, match=r"VT-ENGINE: cannot run .*/qhold; install it, or set submit\.qhold"):
        _answer(batch, ["check-requeue"], 10)


@pytest.mark.parametrize(
    ("text", "name"),
    [("Server: head.cluster\n    server_state = Active\n", "head.cluster"), ("Server: head:15001\n", "head")],
)
def test_the_server_of_torque(tmp_path: Path, text: str, name: str) -> None:
    (tmp_path / "server").write_text(text)
    batch = torque(tmp_path, f'[ "$*" = "-B -f" ] && cat {tmp_path}/server')
    assert _answer(batch, ["server"], 10) == name
    (tmp_path / "server").write_text("    comment = Server: x\nServer: -x;y\n")
    with pytest.raises(VTorqueError, match="VT-ENGINE: the batch system does not say its server's name"):
        _answer(batch, ["server"], 10)


def test_torque_warns_of_no_failure(tmp_path: Path) -> None:
    torque(tmp_path, "exit 1", qrls="echo 'ALERT: cached server' >&2").release("12", 10)


def test_a_job_that_torque_does_not_know(tmp_path: Path) -> None:
    told = f"touch {tmp_path}/told"
    batch = torque(tmp_path, "echo 'qstat: Unknown Job Id Error 99.server' >&2; exit 153", qhold=told)
    assert _answer(batch, ["phase", "99.server"], 10) == "gone"
    with pytest.raises(VTorqueError, match="VT-ENGINE: job 99 is not known to the batch system"):
        batch.hold("99", 10)
    assert not (tmp_path / "told").exists()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@FUZZ
@given(JSON, st.dictionaries(st.sampled_from(["exec_host", "Job_Owner", "job_state"]), JSON))
def test_strange_answers_of_a_batch_system(value: object, attributes: dict[str, object]) -> None:
    assert all(isinstance(name, str) for name in known_nodes(value))
    job = placed_job(value, attributes)
    assert job is None or job.nodes


# --- words for a guest


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("12", Target("12")),
        ("12.server:3", Target("12.server", 3)),
        ("12[4].server.example.org:0", Target("12[4].server.example.org", 0)),
        ("12-4.server", Target("12-4.server")),
    ],
)
def test_targets(text: str, target: Target) -> None:
    assert parse_target(text) == target and str(target) == text


@pytest.mark.parametrize(
    "text", ["", ":", "x", "12:", "12:x", "12:-1", "12:1:2", "../12", "12.", "12.a..b", "-h", "12:٣"]
)
def test_what_is_no_target(text: str) -> None:
    with pytest.raises(VTorqueError, match=r"VT-VALUE: .* names no guest"):
        parse_target(text)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("12:/tmp/x", (Target("12"), "/tmp/x")),
        ("12.server:1:x y", (Target("12.server", 1), "x y")),
        ("12:", (Target("12"), "")),
        ("12:3", (Target("12"), "3")),
        ("12:1:", (Target("12", 1), "")),
        ("12:a:b", (Target("12"), "a:b")),
        ("./12:x", None),
        ("/tmp/12:x", None),
        ("notes:x", None),
        ("12", None),
    ],
)
def test_paths_in_guests(text: str, found: Optional[tuple[Target, str]]) -> None:
    assert parse_remote_path(text) == found


@FUZZ
@given(st.text(alphabet=st.sampled_from("0123456789:.[]-/ab\n\0 "), max_size=30))
def test_no_word_reaches_a_path_or_an_option(text: str) -> None:
    found = parse_remote_path(text)
    words = [] if found is None else [found[0].job]
    try:
        words.append(parse_target(text).job)
    except VTorqueError as err:
        assert err.code is Code.VALUE and "\n" not in str(err)
    for word in words:
        assert "/" not in word and ".." not in word and word[:1].isdigit() and word.isprintable()


# --- the batch system's program


def batch(monkeypatch: pytest.MonkeyPatch, folder: Path, script: str) -> Any:
    """A configuration whose batch system's program is a script."""

    class Install:
        prefix = str(folder)

        def program(self, name: str) -> str:
            return str(folder / name)

    (folder / "vtorque-batch").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "vtorque-batch").chmod(0o755)
    monkeypatch.setattr(batch_program, "installation", Install)

    class Config:
        engine = "torque"

        class timeouts:
            reach = 0.2

    return Config


def test_where_jobs_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    job = {"job": "12.server", "owner": "carol", "nodes": ["n1", "n2"]}
    config = batch(
        monkeypatch,
        tmp_path,
        f"case $1 in nodes) echo '[\"n1\", \"n2\"]' ;; jobs) echo '{json.dumps([job])}' ;; "
        f"*) [ $2 = 12 ] && echo '{json.dumps([job])}' || echo '[]' ;; esac",
    )
    found = where.JobNodes("12.server", "carol", ("n1", "n2"))
    assert where.all_nodes(config) == ["n1", "n2"]
    assert where.nodes_of_job(config, "12") == found and where.running_jobs(config) == [found]
    with pytest.raises(VTorqueError, match="VT-AGENT: job 13 has no nodes"):
        where.nodes_of_job(config, "13")


def test_an_array_has_no_nodes_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    jobs = [{"job": f"{number}.ref", "owner": "carol", "nodes": ["n1"]} for number in (17, 18, 16)]
    config = batch(monkeypatch, tmp_path, f"echo '{json.dumps(jobs)}'")
    with pytest.raises(VTorqueError, match=r"VT-VALUE: 16 is a job array, and 3 .* such as 16\.ref, 17\.ref, 18\.ref"):
        where.nodes_of_job(config, "16")


@pytest.mark.parametrize(
    ("engine", "named", "answer", "whole", "meant"),
    [
        ("slurm", "16_3", "echo '\"19.ref\"'", "19.ref", "19.ref"),
        ("slurm", "16_3.ref", "echo '\"19.ref\"'", "19.ref", "19.ref"),
        ("slurm", "16", "echo '\"16.ref\"'", "16.ref", "16.ref"),
        ("slurm", "16.ref", "exit 9", "16.ref", "16.ref"),
        ("slurm", "16", "echo 'VT-ENGINE: slurmctld is away' >&2; exit 2", "VT-ENGINE", "16"),
        ("slurm", "16_3", "echo 'VT-ENGINE: slurmctld is away' >&2; exit 2", "VT-ENGINE", "VT-ENGINE"),
        ("slurm", "16", "echo 'VT-VALUE: job 16 is a job array' >&2; exit 2", "VT-VALUE", "VT-VALUE"),
        ("torque", "16[3]", "echo '\"16[3].server\"'", "16[3].server", "16[3]"),
        ("torque", "16[3].server", "exit 9", "16[3].server", "16[3].server"),
    ],
)
def test_the_job_that_is_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str, named: str, answer: str, whole: str, meant: str
) -> None:
    config = batch(monkeypatch, tmp_path, answer)
    monkeypatch.setattr(config, "engine", engine)
    for ask, expected in ((where.whole_id, whole), (where.meant, meant)):
        if expected.startswith("VT-"):
            with pytest.raises(VTorqueError, match=expected):
                ask(config, named)
        else:
            assert ask(config, named) == expected


def test_another_users_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = {"job": "12.server", "owner": "nobody-else", "nodes": ["n1"]}
    config = batch(monkeypatch, tmp_path, f"echo '{json.dumps([job])}'")
    monkeypatch.setattr(os, "geteuid", lambda: 65534)
    assert where.running_jobs(config) == []
    with pytest.raises(VTorqueError, match=r"VT-ACCESS: job 12\.server is another user's"):
        where.nodes_of_job(config, "12")


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("echo 'VT-ENGINE: pbs_server is away' >&2; exit 2", "VT-ENGINE: pbs_server is away"),
        ("echo Traceback >&2; exit 1", "VT-ENGINE: the batch system cannot be asked: Traceback"),
        ("echo '{'", "VT-ENGINE: vtorque-batch gives no sensible answer"),
        ("echo '[1]'", "VT-ENGINE: vtorque-batch gives no sensible answer"),
        ("exec sleep 60", "VT-ENGINE: the batch system has not answered within"),
    ],
)
def test_a_batch_system_that_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, says: str
) -> None:
    monkeypatch.setattr(batch_program, "MORE_SECONDS", 0.5)
    with pytest.raises(VTorqueError, match=says):
        where.running_jobs(batch(monkeypatch, tmp_path, script))


def test_jobs_are_changed_by_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = batch(
        monkeypatch,
        tmp_path,
        f'echo "$*" >> {tmp_path}/told; case "$*" in "hold 12") echo \'{{"new": true}}\' ;; '
        "\"requeue 12\") echo 'VT-ACCESS: qrerun: Unauthorized Request' >&2; exit 2 ;; *) echo '{}' ;; esac",
    )
    assert batch_program.hold(config, "12") is True
    batch_program.release(config, "12")
    with pytest.raises(VTorqueError, match="VT-ACCESS: qrerun: Unauthorized Request"):
        batch_program.requeue(config, "12")
    with pytest.raises(VTorqueError, match="VT-ENGINE: vtorque-batch gives no sensible answer"):
        batch_program.hold(config, "13")
    assert (tmp_path / "told").read_text() == "hold 12\nrelease 12\nrequeue 12\nhold 13\n"


def test_what_the_program_has_not_heard_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"true": True, "false": False, "null": None, '"x"': None}
    for new, meant in said.items():
        script = f"echo '{{\"answered\": false, \"new\": {new}}}'; echo 'VT-ENGINE: no answer' >&2; exit 2"
        config = batch(monkeypatch, tmp_path, script)
        with pytest.raises(Unanswered, match="VT-ENGINE: no answer") as caught:
            batch_program.hold(config, "12")
        assert caught.value.is_new is meant
    for script in ("echo '[]'", "echo '{\"answered\": true}'", "echo '{}'", ":"):
        config = batch(monkeypatch, tmp_path, f"{script}; echo 'VT-ENGINE: refused' >&2; exit 2")
        with pytest.raises(VTorqueError, match="VT-ENGINE: refused") as refused:
            batch_program.requeue(config, "12")
        assert not isinstance(refused.value, Unanswered)
    monkeypatch.setattr(batch_program, "MORE_SECONDS", 0.3 - 2 * config.timeouts.reach)
    with pytest.raises(Unanswered):
        batch_program.requeue(batch(monkeypatch, tmp_path, "exec sleep 60"), "12")


def test_the_program_tells_what_it_has_not_heard_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "job").write_text(HELD.format("n"))
    found = torque(tmp_path, f"cat {tmp_path}/job", qhold="exec sleep 60")
    config = SimpleNamespace(timeouts=SimpleNamespace(reach=1))
    monkeypatch.setattr(batch_side, "installation", lambda: None)
    monkeypatch.setattr(batch_side, "load_config", lambda _: config)
    monkeypatch.setattr(batch_side, "engine", lambda *_: found)
    assert batch_side.main(["hold", "12"]) == Code.ENGINE.status
    out, err = capsys.readouterr()
    assert json.loads(out) == {"answered": False, "new": True} and err.startswith("VT-ENGINE: ")


def test_the_embedded_one_does_not_say_what_has_become_of_a_change(tmp_path: Path) -> None:
    with short_folder() as folder, socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(folder / "s"))
        silent.listen()
        local: Any = SimpleNamespace(local=SimpleNamespace(socket=str(folder / "s")))
        embedded = Embedded(local, SimpleNamespace(local_qsub="/qsub"))  # type: ignore[arg-type]
        with pytest.raises(Unanswered):
            embedded.hold("12", 0.2)
        silent.close()
        with pytest.raises(VTorqueError, match="is vtorque-local started") as refused:
            embedded.hold("12", 0.2)
        assert not isinstance(refused.value, Unanswered)


# --- programs on nodes


def test_which_node_this_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "uname", lambda: type("Name", (), {"nodename": "n1.cluster"}))
    assert [shell.is_here(name) for name in ("n1", "n1.cluster", "localhost")] == [True] * 3
    assert [shell.is_here(name) for name in ("n1.other", "n10", "n2.cluster")] == [False] * 3


def test_a_program_on_this_node() -> None:
    done = shell.run_on("localhost", ["sh", "-c", "cat; echo out; echo err >&2; exit 3"], timeout_s=10)
    assert done == shell.Completed(3, b"out\n", b"err\n")


def test_programs_that_do_not_end_or_say_too_much() -> None:
    with pytest.raises(VTorqueError, match=r"has not answered within 0\.3 s"):
        shell.run_on("localhost", ["sleep", "60"], timeout_s=0.3)
    with pytest.raises(VTorqueError, match="more than 1000 bytes"):
        shell.run_on("localhost", ["head", "-c", "5000", "/dev/zero"], timeout_s=10, limit=1000)
    with pytest.raises(VTorqueError, match="cannot run /nowhere"):
        shell.run_on("localhost", ["/nowhere"], timeout_s=1)


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("echo welcome to the site; printf '%s' '{greeting}'; cat", None),
        ("echo 'VT-AGENT: no node agent serves job 1' >&2; exit 78", "VT-AGENT: no node agent"),
        (
            "echo 'This account is currently not available.'; exit 1",
            "has not answered as vTorque does: This account is currently not available",
        ),
        ("yes | head -c 100000", "VT-CONNECT: something else than vTorque"),
        ("sleep 60", "VT-CONNECT: the program on the node says nothing"),
    ],
)
def test_what_greets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, says: Optional[str]) -> None:
    program = tmp_path / "vmgr"
    program.write_text("#!/bin/sh\n" + script.replace("{greeting}", GREETING.decode().replace("\n", "\\n")) + "\n")
    program.write_text(program.read_text().replace("printf '%s'", "printf"))
    program.chmod(0o755)
    monkeypatch.setattr("vmgr.reach.agents._vmgr", lambda: str(program))

    class Config:
        class timeouts:
            reach = 1.0

    if says is not None:
        with pytest.raises(VTorqueError, match=says):
            open_program(Config, "localhost", ["agent-link", "1"])  # type: ignore[arg-type]
        return
    stream = open_program(Config, "localhost", ["agent-link", "1"])  # type: ignore[arg-type]
    stream.socket.sendall(b"hello\n")
    assert stream.socket.recv(100) == b"hello\n", "not a byte after the greeting is lost"
    stream.close()


def test_nodes_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    silent = socket.create_server(("127.0.0.1", 0))
    closed = socket.create_server(("127.0.0.1", 0))
    ports = {"silent": silent.getsockname()[1], "closed": closed.getsockname()[1]}
    closed.close()

    def options(node: str, _: float) -> dict[str, list[str]]:
        return {"hostname": ["127.0.0.1"], "port": [str(ports[node])], "user": ["carol"]}

    monkeypatch.setattr(login, "ssh_options", options)
    for node in ports:
        with pytest.raises(VTorqueError, match=rf"^VT-CONNECT: node {node} \(127\.0\.0\.1\) cannot be reached: "):
            shell.run_on(node, ["true"], timeout_s=0.5)
    silent.close()


@pytest.mark.parametrize("node", ["", "-oProxyCommand=x", "n1 -oProxyCommand=x", "n1;x", "n1\n", "a/b", "n" * 300])
def test_what_is_no_node(monkeypatch: pytest.MonkeyPatch, node: str) -> None:
    """Another node may have said it: it reaches no command line."""
    monkeypatch.setattr(shell, "connect", lambda *_: pytest.fail("it was gone to"))
    with pytest.raises(VTorqueError, match="is no node's name"):
        shell.run_on(node, ["true"], timeout_s=1)


def test_what_ssh_says_of_a_node() -> None:
    options = login.ssh_options("n7.cluster", 10)
    assert options["hostname"] == ["n7.cluster"] and options["port"] == ["22"] and options["userknownhostsfile"]
    with pytest.raises(VTorqueError, match="VT-CONNECT: ssh does not know how to reach"):
        login.ssh_options("-oProxyCommand=touch /tmp/never", 10)


def test_host_keys_that_are_known_and_revoked(tmp_path: Path) -> None:
    keys = [paramiko.RSAKey.generate(1024).get_base64() for _ in range(2)]
    file = tmp_path / "known_hosts"
    lines = (
        "# a comment", "@cert-authority *.cluster ssh-ed25519 AAAAC3NzaC1lZDI1NTE5", f"n1 ssh-rsa {keys[0]}", "", "n3",
        "n3 ssh-rsa AAA", "n3 ssh-ed25519 AAAA", f"n2 ssh-rsa {keys[1]} comment",
        f"@revoked * ssh-rsa {keys[1]}", "@revoked",
    )  # fmt: skip
    file.write_text("\n".join(lines))
    client = paramiko.SSHClient()
    login._load_known_hosts(client, {"userknownhostsfile": [f"{tmp_path}/absent {file}"]}, "n1")
    known = client._system_host_keys
    assert known.lookup("n1")["ssh-rsa"].get_base64() == keys[0] and known.lookup("n2") is None
    assert known.lookup("n3") is None and known.lookup("x.cluster") is None


# --- agents of this node


@pytest.fixture
def paths() -> Any:
    with short_folder() as folder:
        (folder / "run" / "jobs").mkdir(parents=True)
        yield Paths(folder / "spool", folder / "run")


def answering(paths: Paths, job: str, answer: Callable[[bytes], bytes]) -> None:
    """Somebody who listens where an agent would, and answers one caller."""
    folder = paths.run / "jobs" / job
    folder.mkdir()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / "1-1-1.sock"))
    listener.listen()

    def serve() -> None:
        connection, _ = listener.accept()
        with connection, listener:
            try:
                connection.sendall(answer(connection.recv(4096)))
            except OSError:
                pass

    threading.Thread(target=serve, daemon=True).start()


def test_the_job_of_this_node(paths: Paths) -> None:
    answering(paths, "12.server", lambda _: b'{"job_id": "12.server"}\n')
    assert [job_here(paths, name) for name in ("12", "12.server", "1", "12.other", "server")] == [
        "12.server", "12.server", None, None, None,
    ]  # fmt: skip
    assert asyncio.run(look_here(paths, "12")) == [{"job_id": "12.server"}]
    assert asyncio.run(look_here(paths, "13")) == []


@settings(FUZZ, deadline=None)
@given(st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode() + b"\n"))
def test_a_hostile_agent(data: bytes) -> None:
    """What it says is an object or nothing; nothing else comes of it than a refusal."""
    with short_folder() as folder:
        paths = Paths(folder / "spool", folder / "run")
        (paths.run / "jobs").mkdir(parents=True)
        answering(paths, "1.a", lambda _: data)
        for snapshot in asyncio.run(look_here(paths)):
            assert all(isinstance(member["rank"], int) for member in members(snapshot))


def test_an_agent_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agents, "STATE_SECONDS", 0.1)

    async def ask() -> None:
        ours, theirs = socket.socketpair()
        link = AgentLink(*await asyncio.open_unix_connection(sock=ours))
        try:
            await agents._reached(link, None, 0)
        finally:
            link.close()
            theirs.close()

    with pytest.raises(VTorqueError, match=r"^VT-AGENT: the node agent did not answer within 0\.1 s"):
        asyncio.run(ask())


def test_somebody_elses_socket(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmgr.node.client.listener_of", lambda _: 4711)
    answering(paths, "1.a", lambda _: b'{"job_id": "1.a"}\n')
    with pytest.raises(PermissionError, match="uid 4711 listens"):
        asyncio.run(AgentLink.connect(paths.run / "jobs" / "1.a" / "1-1-1.sock"))


@FUZZ
@given(JSON)
def test_what_an_agent_says_of_its_guests(value: object) -> None:
    snapshot = {"members": value}
    assert all(isinstance(member["name"], str) for member in members(snapshot))
    name = str(value)
    told = members({"members": [{"rank": 0, "name": name}, {"rank": 1, "name": "vn1-1"}]})
    assert [member["rank"] for member in told][-1] == 1
    assert len(told) == 1 or (name[0].isalnum() and not set(name) & set(" \t\n'\"/:=@%$`;")), "no option, one word"
    with pytest.raises(VTorqueError):
        ssh_port({"name": "vn1-1", "port": value if not isinstance(value, int) else -1})
    assert ssh_port({"name": "vn1-1", "port": 2222}) == 2222
    for power, says in (("off", "vn1-1 is off"), ("booting", "vn1-1 is not ready")):
        with pytest.raises(VTorqueError, match=says):
            ssh_port({"name": "vn1-1", "port": 2222, "power": power})
    with pytest.raises(VTorqueError, match="VT-VALUE"):
        member_of({"members": [{"rank": 0, "name": "vn1-1"}]}, 1)


@pytest.mark.parametrize("name", ["-oProxyCommand=touch x", "v n1", "vn1\n", "", "v\x1b[2J", "root@vn1-1"])
def test_names_that_no_guest_has(name: str) -> None:
    assert members({"members": [{"rank": 0, "name": name}]}) == []


def test_all_nodes_at_once_and_no_longer_than_so(monkeypatch: pytest.MonkeyPatch, paths: Paths) -> None:
    """Nodes that hang, fail or answer: those that answer are shown, the others named, and nobody waits for long."""
    hung = threading.Event()

    def look_on(_: object, node: str, __: Optional[str]) -> list[dict[str, Any]]:
        if node == "hangs":
            hung.wait(20)
        if node == "away":
            raise VTorqueError("node away cannot be reached", code=Code.CONNECT)
        return [{"job_id": "1.a", "node": node}]

    monkeypatch.setattr(agents, "_look_on", look_on)

    class Config:
        class timeouts:
            reach = 0.2

    Config.paths = paths  # type: ignore[attr-defined]
    nodes = ["hangs", "away", *(f"n{number}" for number in range(30)), "localhost"]
    start = time.monotonic()
    try:
        seen = asyncio.run(agents.look(Config, nodes))  # type: ignore[arg-type]
    finally:
        hung.set()
    assert time.monotonic() - start < 5
    assert [snapshot["node"] for snapshot in seen.snapshots] == [f"n{number}" for number in range(30)]
    assert sorted(str(problem) for problem in seen.problems) == [
        "VT-CONNECT: node away cannot be reached",
        f"VT-CONNECT: node hangs was not heard within {3 * 0.2} s",
    ]


@pytest.mark.parametrize(
    ("options", "command"),
    [
        ({}, None),
        ({"proxycommand": ["none"], "proxyjump": ["none"]}, None),
        ({"proxycommand": ["exec nc -X 5 %h %p"]}, "nc -X 5 10.0.0.7 2222"),
        ({"proxycommand": ["ssh -W %h:%p %r@gate %n %% %z"]}, "ssh -W 10.0.0.7:2222 carol@gate n7 % %z"),
        ({"proxyjump": ["gate:22"]}, "ssh -o BatchMode=yes -W [10.0.0.7]:2222 -- ssh://gate:22"),
        (
            {"proxyjump": ["carol@outer,inner"]},
            "ssh -o BatchMode=yes -J carol@outer -W [10.0.0.7]:2222 -- ssh://inner",
        ),
    ],
)
def test_what_stands_between(
    options: dict[str, list[str]], command: Optional[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("paramiko.ProxyCommand", lambda line: " ".join(shlex.split(line)))
    where_to = {"hostname": ["10.0.0.7"], "port": ["2222"], "user": ["carol"]}
    assert login._proxy({**where_to, **options}, "n7") == command
