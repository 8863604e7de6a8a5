"""Whatever a user writes to the socket: the daemon answers with a refusal and goes on."""

from __future__ import annotations

import json
import os
import select
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vsub.engines.local import arrivals, options, protocol, qsub

from .conftest import System, User


def talk(system: System, data: bytes) -> dict[str, Any]:
    """Send bytes, read the answer."""
    with protocol.connect(system.socket) as connection:
        connection.settimeout(20)
        try:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
        except OSError:
            pass
        return protocol.decode(protocol.read_line(connection))


def refused(answer: dict[str, Any]) -> bool:
    return isinstance(answer.get("error"), int) and answer["error"] != protocol.SYSTEM


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\n",
        b"{}\n",
        b"[]\n",
        b"nonsense\n",
        b'{"op": "submit"}\n',
        b'{"op": ["submit"]}\n',
        b'{"op": "wait", "job": {}}\n',
        b'{"op": "delete", "job": "1", "delay": 1e999}\n',
        b'{"op": NaN}\n',
        b"[" * 100000 + b"\n",
        b'{"op": ' + b"9" * 100000 + b"}\n",
        b"x" * (protocol.MAX_REQUEST + 10),
        b'{"op": "stat", "job": "' + b"1" * 100000 + b'"}\n',
    ],
)
def test_nonsense(system: System, data: bytes) -> None:
    assert refused(talk(system, data))
    assert talk(system, b'{"op": "stat"}\n') == {"jobs": []}


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def message_of(user: User) -> dict[str, object]:
    return qsub.build(options.Options(), "x", {"HOME": str(user.home)}, str(user.home), "h")


TERMINAL = {"term": "vt100", "size": [24, 80, 0, 0], "controls": [3, 28, 127, 21, 4, 26]}


@pytest.fixture
def held(system: System, user: User) -> Iterator[System]:
    """A system whose only job waits, so that nothing else runs."""
    gate = system.gate("gate")
    job = system.submit(user, script=f"read x < {gate.path}\n")
    yield system
    gate.open()
    assert system.result(job)["exit_status"] == 0


def test_wrong_types_in_submissions(held: System, user: User) -> None:
    good = {**message_of(user), "command": None, "terminal": None}
    answers: list[dict[str, Any]] = []

    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(st.sampled_from(sorted(good)[:-1]), values)
    def attempt(key: str, value: object) -> None:
        message = {**good, "op": "submit", key: value, "script_size": -1}
        answers.append(talk(held, json.dumps(message).encode() + b"\n"))

    @settings(attempt._hypothesis_internal_use_settings)
    @given(st.sampled_from(sorted(good)[:-1]), values)
    def load(key: str, value: object) -> None:
        """Loads what hypothesis loads late, before the user does, who may not be able to read it."""

    def body() -> int:
        attempt()
        return 0 if all(map(refused, answers)) else 1

    load()

    assert user.call(body).status == 0
    assert "Traceback" not in held.log()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", "../../etc/cron.d/x"),
        ("name", "a b"),
        ("name", "a\nb"),
        ("output", "relative"),
        ("output", "/x\0y"),
        ("output", "/" + "x" * 5000),
        ("shell", "sh"),
        ("umask", 0o1000),
        ("umask", True),
        ("variables", {"A=B": "1"}),
        ("variables", {"A": "\udfff"}),
        ("variables", {"A": "x" * 200000}),
        ("resources", [["walltime", "x"]]),
        ("resources", [["prologue", "relative"]]),
        ("resources", [["nodes", "1:ppn=0"]]),
        ("resources", [["other", "a\nb"]]),
        ("resources", [["unknown", "1"]]),
        ("arguments", "a\nrm -rf /"),
        ("priority", 1024),
        ("priority", True),
        ("rerunnable", 1),
        ("held", "yes"),
        ("execute_at", -1),
        ("execute_at", 1e300),
        ("job_type", "a/b"),
        ("job_type", "../prologue"),
        ("depend", [["on", "1"]]),
        ("depend", [["afterok", "1"]] * 300),
        ("depend", [["afterok"]]),
        ("depend", [["afterok", "99"]]),
        ("array", "1-999999999"),
        ("array", "1," * 5000),
        ("array", ""),
        ("terminal", {}),
        ("terminal", {**TERMINAL, "size": [24, 80, 0, 65536]}),
        ("terminal", {**TERMINAL, "size": [24, 80, 0]}),
        ("terminal", {**TERMINAL, "controls": [256] * 6}),
        ("terminal", {**TERMINAL, "controls": [None] * 6}),
        ("terminal", {**TERMINAL, "term": "x" * 75}),
        ("script_size", protocol.MAX_SCRIPT + 1),
        ("script_size", -1),
    ],
)
def test_dangerous_values(held: System, user: User, key: str, value: object) -> None:
    request = protocol.encode({**message_of(user), "script_size": 0, key: value})

    def body() -> int:
        answer = talk(held, request)
        print(answer)
        return 0 if refused(answer) else 1

    assert user.call(body)[:1] == (0,)


@pytest.mark.parametrize(
    "more", [{"array": "1-2"}, {"command": "x" * 5000}, {"command": ["sh"]}, {"script_size": 4}, {"term": "x"}]
)
def test_dangerous_values_of_interactive_jobs(held: System, user: User, more: dict[str, object]) -> None:
    message = {**message_of(user), "script_size": 0, "terminal": TERMINAL, **more}
    if "term" in more:
        message["terminal"] = {**TERMINAL, "term": "a\0b"}
    request = protocol.encode(message) + b"true"
    assert user.call(lambda: 0 if refused(talk(held, request)) else 1).status == 0


def test_cut_off_script(held: System, user: User) -> None:
    request = protocol.encode({**message_of(user), "script_size": 100}) + b"short"
    assert user.call(lambda: 0 if refused(talk(held, request)) else 1).status == 0
    assert not list((held.spool / "server_priv" / "jobs").glob(".script*"))


def test_silent_connections_are_bounded_per_user(held: System, user: User, other: User) -> None:
    def body() -> int:
        connections = [protocol.connect(held.socket) for _ in range(64)]
        answer = talk(held, b'{"op": "stat"}\n')
        theirs = other_user_asks()
        for connection in connections:
            connection.close()
        return 0 if refused(answer) and theirs == 0 else 1

    def other_user_asks() -> int:
        gate.open()
        return 0 if done.wait() == "served\n" else 1

    gate, done = held.gate("ask"), held.gate("served")
    pid = os.fork()
    if pid == 0:
        ok = gate.wait() and other.call(lambda: 0 if talk(held, b'{"op": "stat"}\n') == {"jobs": []} else 1)
        os.write(os.open(done.path, os.O_WRONLY), b"served\n" if ok and ok.status == 0 else b"refused\n")
        os._exit(0)
    try:
        assert user.call(body).status == 0
    finally:
        os.waitpid(pid, 0)


def answered(connections: list[socket.socket]) -> list[socket.socket]:
    """The connections that have an answer, once one has."""
    assert select.select(connections, [], [], 20)[0]
    return select.select(connections, [], [], 0.3)[0]


def submissions(system: System, user: User, sizes: list[int]) -> list[socket.socket]:
    """Submissions whose scripts are announced and do not come."""
    connections = [protocol.connect(system.socket, 20) for _ in sizes]
    for connection, size in zip(connections, sizes):
        connection.sendall(protocol.encode({**message_of(user), "op": "submit", "script_size": size}))
    return connections


def told(connection: socket.socket) -> dict[str, Any]:
    return protocol.decode(protocol.read_line(connection))


def test_scripts_on_their_way_are_bounded_in_number(held: System, user: User, other: User) -> None:
    def body() -> int:
        connections = submissions(held, user, [4] * (arrivals.MAX_ARRIVING_PER_USER + 1))
        (refusal,) = answered(connections)
        assert told(refusal)["error"] == protocol.TOO_MANY
        connections.remove(refusal)
        ask.open()
        assert served.wait() == "served\n"
        for connection in connections:
            connection.sendall(b"true")
        assert all("job" in told(connection) for connection in connections)
        assert "job" in talk(held, protocol.encode({**message_of(user), "op": "submit", "script_size": 4}) + b"true")
        return 0

    ask, served = held.gate("ask"), held.gate("served")
    pid = os.fork()
    if pid == 0:
        done = ask.wait() and held.qsub(other, script="true\n")
        os.write(os.open(served.path, os.O_WRONLY), b"served\n" if done and done.status == 0 else b"refused\n")
        os._exit(0)
    try:
        assert user.call(body)[::2] == (0, "")
    finally:
        os.waitpid(pid, 0)
        drain(held)


def drain(system: System) -> None:
    """Delete the jobs that wait."""
    jobs = [job for job, attributes in talk(system, b'{"op": "stat"}\n')["jobs"] if ["job_state", "Q"] in attributes]
    assert system.qdel(*jobs) == 0


def test_scripts_on_their_way_are_bounded_in_size(system: System, user: User) -> None:
    system.configure(max_script_bytes_per_user=1000)
    system.stop()
    system.start()

    def body() -> int:
        connections = submissions(system, user, [600, 600])
        (refusal,) = answered(connections)
        answer = told(refusal)
        assert (answer["error"], "too large together" in answer["detail"]) == (protocol.TOO_MANY, True)
        connections.remove(refusal)
        connections[0].sendall(b"#" * 600)
        assert system.result(told(connections[0])["job"])["exit_status"] == 0
        return 0

    assert user.call(body)[::2] == (0, "")


def test_scripts_on_their_way_are_bounded_in_all(system: System, user: User, monkeypatch: pytest.MonkeyPatch) -> None:
    system.stop()
    monkeypatch.setattr(arrivals, "MAX_ARRIVING", 3)
    monkeypatch.setattr(arrivals, "MAX_ARRIVING_BYTES", 1000)
    system.start()  # a fork of this process

    def body() -> int:
        for sizes in ([10] * 4, [600, 600]):
            connections = submissions(system, user, sizes)
            (refusal,) = answered(connections)
            assert told(refusal)["error"] == protocol.TOO_MANY
            for connection in connections:
                connection.shutdown(socket.SHUT_WR)  # the script has no end: no job comes of it
            assert all(refused(told(connection)) for connection in connections if connection is not refusal)
        return 0

    assert user.call(body)[::2] == (0, "")
    assert not list((system.spool / "server_priv" / "jobs").glob(".script*"))


def test_refusal_comes_before_a_large_script(system: System, user: User) -> None:
    system.configure(max_script_bytes_per_user=1000)
    system.stop()
    system.start()
    done = system.qsub(user, script="#" * (8 << 20))
    assert done.status == protocol.TOO_MANY % 256 and "too large together" in done.err


def test_a_uid_has_no_sign() -> None:
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setgroups([])
            os.setresgid(3_000_000_000, 3_000_000_000, 3_000_000_000)
            os.setresuid(3_000_000_001, 3_000_000_001, 3_000_000_001)
            ours, _theirs = socket.socketpair()
            status = 0 if protocol.peer_of(ours)[1:] == (3_000_000_001, 3_000_000_000) else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_large_script_and_large_environment(system: System, user: User) -> None:
    script = "wc -c < $0\n#" + "x" * (5 << 20) + "\n"
    environment = {f"V{number}": "y" * 1000 for number in range(500)}
    job = system.submit(user, "-V", "-N", "x", script=script, env=environment)
    assert system.result(job)["exit_status"] == 0
    assert (user.home / "x.o1").read_text().strip() == str(len(script))


def test_quota_of_jobs(system: System, user: User) -> None:
    system.configure(max_jobs_per_user=2)
    system.stop()
    system.start()
    gate = system.gate("gate")
    jobs = [system.submit(user, script=f"read x < {gate.path}\n") for _ in range(2)]
    done = system.qsub(user, script="true\n")
    assert (done.status, done.out) == (15048 % 256, "")
    for job in jobs:
        gate.open()
        system.result(job)


def interactive(system: System, user: User, command: str) -> socket.socket:
    """A connection with an interactive job that has been taken."""
    connection = protocol.connect(system.socket, 20)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    message = {**message_of(user), "script_size": 0, "terminal": TERMINAL, "command": command, "shell": "/bin/bash"}
    connection.sendall(protocol.encode(message))
    assert b"job" in connection.recv(100)
    return connection


def memory_kib(pid: int) -> int:
    [line] = [line for line in open(f"/proc/{pid}/status") if line.startswith("VmRSS")]  # noqa: SIM115
    return int(line.split()[1])


@pytest.mark.parametrize("end", ["qdel", "gone"])
def test_a_qsub_that_never_reads(system: System, user: User, end: str) -> None:
    """The job writes as fast as it can; the daemon neither grows nor waits, and the job can be ended."""
    before = memory_kib(system.pid)
    gate = system.gate("go")

    def body() -> int:
        connection = interactive(system, user, f"echo > {gate.path}; exec yes")
        gate.wait()
        for _ in range(20):
            assert len(talk(system, b'{"op": "stat"}\n')["jobs"]) == 1
        if end == "qdel":
            assert "ok" in talk(system, b'{"op": "delete", "job": "1"}\n')
            system.result("1")
        elif end == "gone":
            connection.close()
        return 0

    assert user.call(body)[::2] == (0, "")
    assert system.result("1")["reason"] == ("deleted" if end == "qdel" else "its qsub has gone")
    assert memory_kib(system.pid) - before < 20 << 10
    assert system.run(user)[1] == 0


def test_a_qsub_that_floods(system: System, user: User) -> None:
    """What the job does not read stays with qsub; what comes before the job has started ends it."""
    before = memory_kib(system.pid)
    gate = system.gate("go")

    def body() -> int:
        connection = interactive(system, user, f"stty raw; echo > {gate.path}; exec sleep 974")
        gate.wait()
        connection.setblocking(False)
        sent = 0
        while select.select([], [connection], [], 0.5)[1]:
            sent += connection.send(b"x" * 65536)
        assert sent < 32 << 20
        assert len(talk(system, b'{"op": "stat"}\n')["jobs"]) == 1
        early = interactive(system, user, "true")
        early.sendall(b"early")
        assert system.result("2") == {"exit_status": 271, "reason": "its qsub has gone"}
        return 0

    assert user.call(body)[::2] == (0, "")
    assert system.result("1")["reason"] == "its qsub has gone"
    assert memory_kib(system.pid) - before < 30 << 10
    assert "Traceback" not in system.log()


@pytest.mark.parametrize("goes_on", ["sleep 973", "yes"])
def test_a_job_that_keeps_its_terminal(system: System, user: User, goes_on: str) -> None:
    """A process that left the session still has the terminal open: neither qsub nor the next job waits for it."""
    command = (
        f"rm -f left; setsid sh -c 'touch left; exec {goes_on}' & until [ -e left ]; do sleep 0.05; done; echo over"
    )

    def body() -> int:
        connection = interactive(system, user, command)
        received = b""
        while True:
            data = connection.recv(4096)
            if not data:
                break
            received += data
        return 0 if b"over" in received and received.endswith(protocol.frame(b"")) else 1

    done = user.call(body)
    for pid in user.processes():
        os.kill(pid, 9)
    assert done[::2] == (0, "")
    assert system.result("1")["exit_status"] == 0
    assert system.run(user)[1] == 0
    assert not [path for path in os.listdir(f"/proc/{system.pid}/fd") if "ptmx" in _link(system.pid, path)]  # noqa: PTH208


def _link(pid: int, number: str) -> str:
    try:
        return os.readlink(f"/proc/{pid}/fd/{number}")  # noqa: PTH115
    except OSError:
        return ""
