"""Whatever a user writes to the socket: the daemon answers with a refusal and goes on."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vsub.engines.local import client, options, protocol

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
    return client.build(options.Options(), "x", {"HOME": str(user.home)}, str(user.home), "h")


@pytest.fixture
def held(system: System, user: User) -> Iterator[System]:
    """A system whose only job waits, so that nothing else runs."""
    gate = system.gate("gate")
    job = system.submit(user, script=f"read x < {gate.path}\n")
    yield system
    gate.open()
    assert system.result(job)["exit_status"] == 0


def test_wrong_types_in_submissions(held: System, user: User) -> None:
    good = message_of(user)
    answers: list[dict[str, Any]] = []

    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(st.sampled_from(sorted(good)[:-1]), values)
    def attempt(key: str, value: object) -> None:
        message = {**good, "op": "submit", key: value, "script_size": -1}
        answers.append(talk(held, json.dumps(message).encode() + b"\n"))

    def body() -> int:
        attempt()
        return 0 if all(map(refused, answers)) else 1

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
    assert (done.status, done.out) == (15049 % 256, "")
    for job in jobs:
        gate.open()
        system.result(job)
