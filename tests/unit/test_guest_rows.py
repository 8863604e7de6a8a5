"""From what agents say to rows of guests, whatever they say; and a guest's power, with a QEMU that answers as told."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional

import pexpect
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nodesite import FUZZ, REPOSITORY

from vmgr.commands.guests import HEADINGS, WIDE, Where, cells
from vmgr.errors import Code, VTorqueError
from vmgr.node.control import Peer, Talk
from vmgr.node.orders import power
from vmgr.reach import where
from vmgr.reach.rows import GuestRow, guest_rows
from vmgr.reach.where import JobNodes

SNAPSHOT = {
    "v": 1, "job_id": "12.host", "node": "n1", "guest": "vn1-1", "user": "carol", "state": "running", "code": None,
    "reason": None, "image": "micro@3", "age_s": 3700.2, "nodes": ["n1", "n2"],
    "spec": {"groups": [{"image": "micro", "vcpus": 2, "ram_mib": 512}]},
    "members": [
        {"rank": 1, "name": "vn1-2", "mac": "02:00:00:00:00:02", "address": None, "power": "off"},
        {"rank": 0, "name": "vn1-1", "mac": "02:00:00:00:00:01", "address": "10.1.0.1", "port": 4022, "cpu_s": 37.0},
    ],
}  # fmt: skip


def test_a_row_for_each_guest() -> None:
    first, second = guest_rows([SNAPSHOT])
    assert first == GuestRow(
        "12.host", 0, "n1", "carol", "vn1-1", "micro@3", 2, 512, "running", 3700.2, 37.0, "10.1.0.1",
        "02:00:00:00:00:01", 4022, "",
    )  # fmt: skip
    assert (second.rank, second.state, second.cpu_percent) == (1, "off", None)
    assert cells(first, wide=False) == [
        "12.host", 0, "n1", "micro@3", 2, 512, "running", "1:01:40", "1%", "10.1.0.1", "",
    ]  # fmt: skip
    assert len(cells(second, wide=True)) == len(WIDE) and len(cells(second, wide=False)) == len(HEADINGS)


def test_guests_of_sisters_run_with_their_job() -> None:
    sister = {**SNAPSHOT, "node": "n2", "state": "ready", "members": [{"rank": 2, "name": "vn2-1"}]}
    assert [row.state for row in guest_rows([sister, SNAPSHOT])] == ["running", "off", "running"]
    assert [row.state for row in guest_rows([sister])] == ["ready"]


@pytest.mark.parametrize("been", [True, False])
def test_whose_guests_are_looked_at(been: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node looks at itself. A front end at all jobs, also when it was a node once and has the folder still."""
    config: Any = SimpleNamespace(paths=SimpleNamespace(run=tmp_path))
    known = ["n1", os.uname().nodename]
    refused = VTorqueError("cannot run pbsnodes", code=Code.ENGINE)

    def all_nodes(config: object) -> list[str]:
        if not known:
            raise refused
        return known

    monkeypatch.setattr(where, "all_nodes", all_nodes)
    monkeypatch.setattr(where, "running_jobs", lambda config: [JobNodes("12.host", "carol", ("n1", "n2"))])
    nodes = Where(config, False, None)._nodes
    if been:
        (tmp_path / "jobs").mkdir()
    assert nodes() is None, "the batch system lists this machine"
    known[1:] = []
    assert nodes() == ["n1", "n2"]
    known.clear()
    if been:
        assert nodes() is None, "a node need not have the batch system's commands"
    else:
        with pytest.raises(VTorqueError, match="cannot run pbsnodes"):
            nodes()
    (tmp_path / "jobs" / "12.host").mkdir(parents=True)
    (tmp_path / "jobs" / "12.host" / "100-1.sock").touch()
    assert nodes() is None, "guests are here"


def test_before_there_are_guests_and_after_a_failure() -> None:
    early = {"job_id": "9.host", "node": "n1", "guest": "vn1-1", "state": "starting", "age_s": 0.1}
    failed = {**SNAPSHOT, "state": "failed", "code": "VT-BOOT", "reason": "not ready in 5 s", "members": []}
    rows = guest_rows([failed, early])
    assert [(row.job, row.rank, row.guest, row.state) for row in rows] == [
        ("9.host", None, "vn1-1", "starting"),
        ("12.host", None, "vn1-1", "failed"),
    ]
    assert rows[1].reason == "VT-BOOT: not ready in 5 s"


STRANGE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["rank", "name", "groups"]), inner),
    max_leaves=6,
)


@FUZZ
@given(st.lists(st.dictionaries(st.sampled_from(sorted(SNAPSHOT)), STRANGE), max_size=4))
def test_strange_agents(snapshots: list[dict[str, Any]]) -> None:
    for row in guest_rows(snapshots):
        assert len(cells(row, wide=True)) == len(WIDE)


TOP = """\
import sys
sys.path[:0] = sys.argv[1].split(":")
from vmgr.commands import guests
from vmgr.errors import Code, VTorqueError
from vmgr.reach.rows import guest_rows
looks = []
def look(self):
    looks.append(1)
    snapshot = {"job_id": "12.host", "node": "n1", "state": "running", "age_s": 10.0 * len(looks)}
    busy = [{"rank": rank, "name": f"vn1-{rank + 1}", "cpu_s": 5.0 * rank * len(looks)} for rank in (0, 1)]
    return guest_rows([{**snapshot, "members": busy}]), [VTorqueError("node n9 is away", code=Code.CONNECT)]
guests.Where.look = look
guests.load_config = lambda _: None
guests.top.main(args=sys.argv[2:], prog_name="top")
"""


def top(*arguments: str) -> pexpect.spawn[str]:
    path = ":".join([str(REPOSITORY), *filter(None, sys.path)])
    argv = ["-I", "-c", TOP, path, *arguments]
    return pexpect.spawn(sys.executable, argv, dimensions=(24, 120), encoding="utf-8", timeout=30)


def test_top_on_a_terminal_goes_on_until_ctrl_c() -> None:
    child = top("--interval", "0.2")
    for _ in range(2):
        child.expect(r"2 guests.*RANK.*\b1\b.*50%.*\b0\b.*0%.*VT-CONNECT: node n9 is away")
    child.sendintr()
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0 and "\x1b[?1049l" in child.before, "the terminal shows again what it showed"


def test_top_in_a_pipe_is_a_table_and_an_end() -> None:
    path = ":".join([str(REPOSITORY), *filter(None, sys.path)])
    for words, lines in (([], 3), (["--count", "2", "--interval", "0.2"], 7)):
        done = subprocess.run(
            [sys.executable, "-I", "-c", TOP, path, *words], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0 and len(done.stdout.splitlines()) == lines, done
        assert done.stdout.splitlines()[1].split()[:2] == ["12.host", "1"], "the busiest first"
        assert done.stderr.splitlines()[0] == "VT-CONNECT: node n9 is away"


# --- power


class FakeMonitor:
    """Notes what QEMU is told, and lets events come."""

    def __init__(self) -> None:
        self.told: list[object] = []
        self.comes = True

    async def execute(self, command: str, arguments: Optional[dict[str, Any]] = None, **_: Any) -> None:
        self.told.append((command, arguments) if arguments else command)

    async def until(self, event: str, cause: Any, *, timeout_s: float) -> bool:
        await cause(self)
        return self.comes


class FakeGuest:
    """A guest that is ready, or not, and boots when it is told."""

    def __init__(self, *, ready: bool = True, state: str = "on") -> None:
        self.name, self.power, self.is_ready = "vn1-1", state, ready
        self.monitor = FakeMonitor()
        self.orders: list[str] = []

    def tell(self, op: str) -> None:
        self.orders.append(op)

    def begin_anew(self) -> None:
        self.is_ready = False

    async def booted(self, timeout_s: float) -> None:
        self.monitor.told.append("booted")
        await asyncio.sleep(0.05)

    async def ready(self, timeout_s: float) -> None:
        self.is_ready = True

    async def switch(self, doing: Coroutine[Any, Any, Any]) -> Any:
        return await doing


class Timeouts:
    boot, vm_epilogue, shutdown = 5, 1, 1


def press(guest: FakeGuest, rank: int = 1, **request: Any) -> tuple[list[dict[str, Any]], list[VTorqueError]]:
    """What the order answers, and why the job cannot go on, if so."""

    class Crew:
        members = (type("Member", (), {"rank": rank, "name": guest.name}),)
        guests = (guest,)

    lost: list[VTorqueError] = []
    order = power.order(lambda: Crew, Timeouts, lost.append)  # type: ignore[arg-type, return-value]

    async def work() -> list[dict[str, Any]]:
        answers: AsyncIterator[Any] = order(Talk(Peer(1, 4711), {"op": "power", "rank": rank, **request}))
        return [answer async for answer in answers]

    return asyncio.run(asyncio.wait_for(work(), 10)), lost


def test_reset_lets_the_guest_reboot_until_it_runs() -> None:
    guest = FakeGuest()
    answers, lost = press(guest, action="reset")
    assert [answer["power"] for answer in answers] == ["booting", "on"] and lost == [] and guest.is_ready
    assert guest.monitor.told == [
        ("set-action", {"reboot": "reset", "shutdown": "poweroff"}),
        "system_reset",
        "booted",
        ("set-action", {"reboot": "shutdown"}),
    ]


def test_off_and_on_again() -> None:
    guest = FakeGuest()
    assert press(guest, action="off") == ([{"guest": "vn1-1", "rank": 1, "power": "off", "clean": True}], [])
    assert guest.orders == ["shutdown"] and guest.monitor.told == [("set-action", {"shutdown": "pause"})]
    with pytest.raises(VTorqueError, match="VT-GUEST: the guest vn1-1 is off"):
        press(guest, action="reset")
    guest.monitor.told.clear()
    answers, _ = press(guest, action="on", wait=False)
    assert [answer["power"] for answer in answers] == ["booting"]
    assert guest.monitor.told[:3] == [
        ("set-action", {"reboot": "reset", "shutdown": "poweroff"}), "system_reset", "cont",
    ]  # fmt: skip


@pytest.mark.parametrize("now", [True, False])
def test_power_is_cut(now: bool) -> None:
    """At once where that is asked for, and where the guest does not shut down."""
    guest = FakeGuest()
    guest.monitor.comes = False
    answers, _ = press(guest, action="off", now=now)
    assert not answers[0]["clean"] and guest.power == "off" and guest.monitor.told[-1] == "stop"
    assert guest.orders == ([] if now else ["shutdown"])


def test_the_first_guest_takes_the_job_with_it() -> None:
    for action, how in (("reset", "reset"), ("off", "switched off")):
        _, lost = press(FakeGuest(), rank=0, action=action, wait=False)
        text = f"the guest vn1-1, in which the job's script runs, was {how} by uid 4711"
        assert [str(problem) for problem in lost] == [f"VT-GUEST: {text}"]
    assert press(FakeGuest(ready=False), rank=0, action="reset")[1] == [], "it boots still, and goes on so"


@pytest.mark.parametrize(
    ("request_", "guest", "says"),
    [
        ({"action": "explode"}, FakeGuest(), "VT-VALUE: 'explode' is nothing"),
        ({"action": ["on"]}, FakeGuest(), "VT-VALUE"),
        ({"action": "off", "now": "yes"}, FakeGuest(), "VT-VALUE"),
        ({"action": "on"}, FakeGuest(), "VT-GUEST: the guest vn1-1 is not off"),
        ({"action": "off"}, FakeGuest(ready=False), "VT-GUEST: the guest vn1-1 is not ready yet"),
        ({"action": "off"}, FakeGuest(state="off"), "VT-GUEST: the guest vn1-1 is off"),
    ],
)
def test_what_power_refuses(request_: dict[str, Any], guest: FakeGuest, says: str) -> None:
    with pytest.raises(VTorqueError, match=says):
        press(guest, **request_)
    assert guest.monitor.told == [], "and changes nothing"
