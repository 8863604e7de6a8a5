"""The rest of the node side that needs root: other users at the socket, KVM's probe, starting a hypervisor, trust."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional

import pytest
from nodesite import REPOSITORY, make_node, wait_gone
from settled import children, run

from vmgr.deploy.hookfiles import fill
from vmgr.errors import Code, VTorqueError
from vmgr.node import accel, process
from vmgr.node.control import Control
from vmgr.node.jobgroup import JobGroup
from vmgr.node.launch import Files, pin_and_run, start
from vmgr.node.qemu import GuestPlan
from vmgr.node.state import Progress
from vmgr.node.user import User
from vmgr.topology.model import Layout, Placement
from vmgr.trust import check_trusted

pytestmark = pytest.mark.root
PYTHON = "/usr/bin/python3"
"""An interpreter that every user can run; that of the tests may lie in a home of root's."""


def test_a_child_of_another_user_dies_with_its_parent(user: User) -> None:
    code = f"""\
import os, subprocess, sys
sys.path.insert(0, {str(REPOSITORY)!r})
from vmgr.node.process import dies_with
child = subprocess.Popen(["/bin/sleep", "60"], start_new_session=True, user={user.uid}, group={user.gid},
                         extra_groups=[], preexec_fn=dies_with(os.getpid()))
print(child.pid, flush=True)
child.wait()
"""
    parent = subprocess.Popen([sys.executable, "-I", "-c", code], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    status = Path(f"/proc/{child}/status").read_text()
    assert f"Uid:\t{user.uid}\t{user.uid}" in status and "NoNewPrivs:\t1" in status
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert wait_gone(child)


# the control socket

CALLER = """\
import json, socket, sys
link = socket.socket(socket.AF_UNIX)
link.connect(sys.argv[1])
try:
    link.sendall(sys.argv[2].encode() + b"\\n")
except BrokenPipeError:
    pass  # refused before anything was asked
link.settimeout(5)
print(link.makefile().readline(), end="")
"""


def test_only_root_and_the_owner_are_served(user: User, base: Path) -> None:
    overs = []

    async def work() -> None:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(base / "s"))
        (base / "s").chmod(0o666)
        listener.listen(8)
        progress = Progress(0, {"job_id": "12.host"})
        progress.private["ssh"] = {"port": 4242}
        control = Control(progress, user.uid, over=lambda: overs.append(1), attached=lambda: None)
        server = await control.serve(listener)

        async def ask(uid: int, op: str) -> dict[str, Any]:
            child = await asyncio.create_subprocess_exec(
                PYTHON, "-IS", "-c", CALLER, str(base / "s"), json.dumps({"op": op}),
                stdout=subprocess.PIPE, user=uid, group=user.gid, extra_groups=[], cwd="/",
            )  # fmt: skip
            said, _ = await child.communicate()
            answer: dict[str, Any] = json.loads(said)
            return answer

        for uid in (0, user.uid):
            assert (await ask(uid, "status"))["ssh"] == {"port": 4242}
        for op in ("status", "follow", "attach", "end", "started"):
            answer = await ask(user.uid + 1, op)
            assert (
                list(answer) == ["error"]
                and f"belongs to uid {user.uid}, you are uid {user.uid + 1}" in answer["error"]
            )
        assert overs == [] and progress.stages == []
        await ask(user.uid, "attach")
        await asyncio.sleep(0.05)
        assert overs == [1]
        server.close()
        await control.drain(1)

    run(work())


# KVM

FAKE_QEMU = """\
#!{python} -IS
# a fake QEMU: {what}
import os, re, sys, time
fd = int(re.search(r"id=console,fd=([0-9]+)", " ".join(sys.argv)).group(1))
with open({seen!r}, "w") as stream:
    stream.write(f"{{os.getpid()}} {{os.getuid()}} {{os.getgroups()}}")
{does}
"""


def fake_probe(
    base: Path, monkeypatch: pytest.MonkeyPatch, does: str, *, gid: int = 0, kernel: Optional[str] = "/boot/vmlinuz"
) -> tuple[accel.Kvm, float, str]:
    """What the probe finds with a fake QEMU, how long it took, and what the fake noted."""
    fake, device, seen = base / "fake-qemu", base / "kvm", base / "seen"
    seen.touch()
    seen.chmod(0o666)
    device.touch()
    os.chown(device, 0, gid)
    device.chmod(0o660)
    fake.write_text(
        FAKE_QEMU.format(python="/usr/bin/python3", what=does.replace("\n", " "), does=does, seen=str(seen))
    )
    fake.chmod(0o755)
    monkeypatch.setattr(accel, "DEVICE", device)
    config = make_node(base, hypervisor={"qemu": str(fake), "probe_seconds": 1}).config
    before, start = children(), time.monotonic()
    found = accel.probe(config, kernel and Path(kernel))
    took = time.monotonic() - start
    assert children() == before and wait_gone(int(seen.read_text().split()[0]))
    return found, took, seen.read_text()


def test_kvm_that_shows_a_kernels_first_line(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    does = "os.write(fd, b'SeaBIOS\\n'); os.write(fd, b'[0.0] Linux ver'); os.write(fd, b'sion 6.1\\n'); time.sleep(60)"
    found, took, seen = fake_probe(base, monkeypatch, does, gid=4711)
    assert found.works and took < 1
    assert " 65534 " in seen and seen.endswith("[4711]"), "as nobody, with the group of the device"


def test_kvm_that_shows_the_firmwares_first_line(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For guests that bring their own kernel; a kernel that was started since says more."""
    does = "assert 'isa-debugcon' in str(sys.argv) and '-kernel' not in sys.argv; "
    does += "os.write(fd, b'SeaBIOS (version 1)'); time.sleep(60)"
    found, took, _ = fake_probe(base, monkeypatch, does, kernel=None)
    assert found == accel.Kvm(True, "the firmware started under it") and took < 1
    found, _, _ = fake_probe(base, monkeypatch, "os._exit(0)")
    assert found == accel.Kvm(False, "QEMU ended at once"), "what the firmware shows says nothing of kernels"
    (base / "seen").write_text("1")
    assert accel.probe(make_node(base).config, None) == found


@pytest.mark.parametrize(
    ("does", "reason"),
    [
        ("time.sleep(60)", "showed nothing within 1 s"),
        ("while True:\n    os.write(fd, b'.'); time.sleep(0.01)", "showed nothing within 1 s"),
        ("os.write(fd, b'x' * 200000); time.sleep(60)", "showed nothing within 1 s"),
        ("sys.exit('Could not access KVM kernel module: Permission denied')", "Permission denied"),
        ("os._exit(0)", "QEMU ended at once"),
        ("os.close(fd); time.sleep(60)", "showed nothing within 1 s"),
    ],
)
def test_kvm_that_does_not_work(does: str, reason: str, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, took, _ = fake_probe(base, monkeypatch, does)
    assert not found.works and reason in found.reason and took < 3
    assert json.loads((base / "run" / "kvm.json").read_text())["reason"] == found.reason


def test_a_qemu_that_is_missing_is_said_and_not_remembered(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accel, "DEVICE", Path("/dev/null"))
    config = make_node(base, hypervisor={"qemu": "/absent/qemu"}).config
    with pytest.raises(VTorqueError, match=r"cannot start /absent/qemu: No such file") as caught:
        accel.probe(config, Path("/boot/vmlinuz"))
    assert caught.value.code is Code.LAUNCH and not (base / "run" / "kvm.json").exists()


# starting a hypervisor: fakes that run where QEMU would

LAYOUT = Layout.flat(1, 128)
PLAN = GuestPlan("12.host-g", LAYOUT, "tcg", Path("/k"), Path("/i"), "console=ttyS0", "qcow2", "02:00:00:00:00:01", ())

FAKE_QMP = """\
#!/usr/bin/python3 -IS
# a fake QEMU that speaks just enough QMP, and says what it is told to
import json, os, re, socket, sys, threading
words = " ".join(sys.argv)
fd = {{name: int(re.search(rf"id={{name}},fd=([0-9]+)", words).group(1)) for name in ("qmp", "port", "console")}}
{does}
link = socket.socket(fileno=fd["qmp"])
def say(data):
    link.sendall(json.dumps(data).encode() + b"\\n")
say({{"QMP": {{"version": {{"qemu": {{"micro": 0, "minor": 2, "major": 7}}, "package": ""}}, "capabilities": []}}}})
while True:
    request = json.loads(link.recv(65536))  # one at a time, without a newline
    answer = {{"query-cpus-fast": {threads}, "query-iothreads": {iothreads}, "human-monitor-command": {usernet!r}}}.get(
        request["execute"], {{}}
    )
    say({{"return": answer, "id": request.get("id")}})
"""
USERNET = "TCP[HOST_FORWARD]  19       127.0.0.1 38087       10.0.2.15    22     0     0\n"
OWN = '[{"cpu-index": 0, "thread-id": os.getpid()}]'
PINNED = Placement(((0,),), (0,), (0,), (), LAYOUT)


@contextmanager
def opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    yield fd
    os.close(fd)


def launch(
    base: Path,
    user: User,
    *,
    does: str = "",
    threads: str = OWN,
    usernet: str = USERNET,
    timeout_s: float = 5,
    iothreads: str = "[]",
    placement: Optional[Placement] = PINNED,
) -> Any:
    """Start a fake and take it to running; gives its SSH port and CPUs. It is gone afterwards."""
    fake = base / "fake-qemu"
    fake.write_text(FAKE_QMP.format(does=does, threads=threads, iothreads=iothreads, usernet=usernet))
    fake.chmod(0o755)
    seed = base / "seed.iso"
    seed.write_bytes(b"seed")
    seed.chmod(0o600)

    async def work() -> Any:
        pids: list[int] = []
        with opened(seed) as fd:
            guest, qmp = start(str(fake), PLAN, Files(fd), user, kvm_gid=None, group=JobGroup(), started=pids.append)
        try:
            await pin_and_run(guest, qmp, placement, timeout_s=timeout_s)
            return guest.ssh_port, os.sched_getaffinity(pids[0])
        finally:
            await guest.kill()
            await guest.close()
            guest.port.close()
            qmp.close()
            assert wait_gone(pids[0])

    return run(work())


def test_a_hypervisor_is_pinned_before_it_runs(base: Path, user: User) -> None:
    assert launch(base, user) == (38087, {0})


def test_a_hypervisor_that_is_not_pinned_runs_where_its_agent_may(base: Path, user: User) -> None:
    mine = os.sched_getaffinity(0)
    assert launch(base, user, placement=None) == (38087, mine)
    assert launch(base, user, placement=PINNED._replace(vcpus=(tuple(mine),))) == (38087, mine)
    assert launch(base, user, placement=None, threads="[]") == (38087, mine), "nobody asks for the threads"


def test_a_hypervisor_is_the_users_and_has_its_descriptors_only(base: Path, user: User) -> None:
    note = Path(user.home) / "facts"
    does = f"""\
status = dict(line.split(":\\t", 1) for line in open("/proc/self/status").read().splitlines() if ":\\t" in line)
json.dump({{"ids": os.getresuid() + os.getresgid(), "groups": sorted(os.getgroups()), "env": dict(os.environ),
    "caps": status["CapEff"], "privs": status["NoNewPrivs"], "umask": os.umask(0), "cwd": os.getcwd(),
    "session": os.getsid(0) == os.getpid(), "fds": sorted(map(int, os.listdir("/proc/self/fd"))),
    "seed": os.pread(int(re.search(r"set=1,fd=([0-9]+)", words).group(1)), 9, 0).decode()}},
    open({str(note)!r}, "w"))"""
    secret = os.open("/etc/shadow", os.O_RDONLY)
    launch(base, user, does=does)
    os.close(secret)
    facts = json.loads(note.read_text())
    assert facts["ids"] == [user.uid] * 3 + [user.gid] * 3 and facts["groups"] == sorted([user.gid, *user.gids])[1:]
    assert (int(facts["caps"], 16), facts["privs"], facts["umask"], facts["cwd"]) == (0, "1", 0o077, "/")
    assert facts["session"] and facts["seed"] == "seed"
    # 0 to 2, three sockets, the seed, the listing, the file that is written
    assert len(facts["fds"]) <= 9
    facts["env"].pop("LC_CTYPE", None)
    assert facts["env"] == {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"threads": '[{"cpu-index": 0, "thread-id": 1}]'}, "is none"),
        ({"threads": f'[{{"cpu-index": 0, "thread-id": {os.getpid()}}}]'}, "is none"),
        ({"threads": '[{"cpu-index": 0, "thread-id": -1}]'}, "is none"),
        ({"iothreads": '[{"id": "io0", "thread-id": 1}]'}, "is none"),
        ({"iothreads": '[{"id": "io0"}]'}, "QMP"),
        ({"threads": "[]"}, "QMP"),
        ({"threads": '"x"'}, "QMP"),
        ({"threads": '{"cpu-index": 0}'}, "QMP"),
        ({"threads": '[{"cpu-index": 0, "thread-id": float("inf")}]'}, "QMP"),
        ({"usernet": ""}, "no port leads"),
        ({"usernet": USERNET.replace("38087", "22")}, "no port leads"),
        ({"does": "sys.exit('cannot set up guest memory')"}, "exit status 1: cannot set up guest memory"),
        ({"does": "os.kill(os.getpid(), 9)"}, "killed by signal 9"),
        ({"does": "import time; time.sleep(60)", "timeout_s": 0.5}, r"did not answer within 0\.5 s"),
        ({"does": "os.write(fd['qmp'], b'{' * 3000000); import time; time.sleep(60)", "timeout_s": 3}, "QEMU did not"),
        ({"does": "os.write(fd['qmp'], b'[]\\n'); import time; time.sleep(60)", "timeout_s": 3}, "QEMU did not"),
    ],
)
def test_a_hostile_or_broken_hypervisor_is_refused(change: dict[str, Any], said: str, base: Path, user: User) -> None:
    mine = os.sched_getaffinity(0), os.sched_getaffinity(1)
    with pytest.raises(VTorqueError, match=said) as caught:
        launch(base, user, **change)
    assert caught.value.code is Code.LAUNCH
    assert (os.sched_getaffinity(0), os.sched_getaffinity(1)) == mine


def test_a_hypervisor_that_cannot_be_recorded_does_not_run(base: Path, user: User) -> None:
    (base / "seed.iso").write_bytes(b"seed")
    fake = base / "fake-qemu"
    fake.write_text("#!/bin/sh\nexec sleep 60\n")
    fake.chmod(0o755)
    pids: list[int] = []

    def full(pid: int) -> None:
        pids.append(pid)
        raise OSError(28, "No space left on device")

    with opened(base / "seed.iso") as fd, pytest.raises(VTorqueError):
        start(str(fake), PLAN, Files(fd), user, kvm_gid=None, group=JobGroup(), started=full)
    assert wait_gone(pids[0], 0)


def test_a_hypervisor_that_is_not_there(base: Path, user: User) -> None:
    (base / "seed.iso").write_bytes(b"seed")
    before = sorted(Path("/proc/self/fd").iterdir())
    with opened(base / "seed.iso") as fd, pytest.raises(VTorqueError) as caught:
        start("/absent", PLAN, Files(fd), user, kvm_gid=None, group=JobGroup(), started=lambda pid: None)
    assert caught.value.code is Code.LAUNCH
    assert sorted(Path("/proc/self/fd").iterdir()) == before


# trust


def test_what_root_trusts(base: Path) -> None:
    inner = base / "a" / "b"
    inner.mkdir(parents=True)
    file = inner / "file"
    file.write_text("x")
    check_trusted(file)
    (base / "link").symlink_to(inner)
    check_trusted(base / "link" / "file")
    check_trusted(base / "a" / ".." / "a" / "b" / "file")
    (base / "a" / "relative").symlink_to("../a/b/file")
    check_trusted(base / "a" / "relative")


@pytest.mark.parametrize(
    ("part", "uid", "mode", "said"),
    [
        ("a/b/file", 0, 0o664, "writable by others"), ("a/b/file", 0, 0o646, "writable by others"),
        ("a/b/file", 48211, 0o644, "belongs to uid 48211"), ("a/b", 0, 0o775, "writable by others"),
        ("a", 0, 0o757, "writable by others"), ("a", 48211, 0o755, "belongs to uid 48211"),
    ],
)  # fmt: skip
def test_what_root_does_not_trust(part: str, uid: int, mode: int, said: str, base: Path) -> None:
    file = base / "a" / "b" / "file"
    file.parent.mkdir(parents=True)
    file.write_text("x")
    (base / "link").symlink_to(file)
    os.chown(base / part, uid, 0)
    (base / part).chmod(mode)
    for path in (file, base / "link"):
        with pytest.raises(VTorqueError, match=said) as caught:
            check_trusted(path)
        assert (
            caught.value.code is Code.TRUST
            and str(base / part) in str(caught.value)
            and "chmod" in str(caught.value) + "chmod"
        )


def test_a_sticky_folder_is_fine_for_what_is_roots(base: Path) -> None:
    sticky = base / "sticky"
    sticky.mkdir()
    sticky.chmod(0o1777)
    (sticky / "roots").write_text("x")
    check_trusted(sticky / "roots")
    (sticky / "theirs").write_text("x")
    os.chown(sticky / "theirs", 48211, 0)
    with pytest.raises(VTorqueError, match="belongs to uid"):
        check_trusted(sticky / "theirs")


def test_every_link_on_the_way_counts(base: Path) -> None:
    """A link of root's that leads through one of a user's: the user decides where it ends."""
    (base / "good").write_text("x")
    theirs = base / "theirs"
    theirs.mkdir()
    (theirs / "link").symlink_to(base / "good")
    os.chown(theirs, 48211, 0)
    (base / "outer").symlink_to(theirs / "link")
    with pytest.raises(VTorqueError, match="belongs to uid 48211"):
        check_trusted(base / "outer")
    os.chown(theirs, 0, 0)
    check_trusted(base / "outer")
    os.chown(theirs / "link", 48211, 0, follow_symlinks=False)
    with pytest.raises(VTorqueError, match="belongs to uid 48211"):
        check_trusted(base / "outer")


def test_links_without_end_and_nothing(base: Path) -> None:
    (base / "loop").symlink_to("loop")
    with pytest.raises(VTorqueError, match="too many symbolic links"):
        check_trusted(base / "loop")
    for path in (base / "absent", base / "absent" / "x"):
        with pytest.raises(VTorqueError, match=r"cannot look at .*absent") as caught:
            check_trusted(path)
        assert caught.value.code is Code.CONFIG


# the hooks


def test_an_epilogue_as_the_user_starts_nothing(base: Path, user: User) -> None:
    program = base / "libexec" / "vtorque-hook"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\necho called >>{user.home}/called\n")
    program.chmod(0o755)
    (base / "spool" / "jobs" / "12.host").mkdir(parents=True)
    hook = base / "epilogue.precancel"
    text = (REPOSITORY / "mom_priv_hooks" / "epilogue").read_text()
    hook.write_text(fill(text, prefix=str(base), spool=str(base / "spool")))
    hook.chmod(0o755)
    environment = {"PATH": "/bin:/usr/bin"}
    ids = {"user": user.uid, "group": user.gid, "extra_groups": []}
    subprocess.run([str(hook), "12.host"], env=environment, check=True, cwd="/", **ids)  # type: ignore[call-overload]
    assert not (Path(user.home) / "called").exists()
    subprocess.run([str(hook), "12.host"], env=environment, check=True, cwd="/")
    assert (Path(user.home) / "called").exists()


def test_the_signal_that_ends_is_kill() -> None:
    child = subprocess.Popen(["/bin/sleep", "60"], user=48211, group=48212, extra_groups=[])
    found = process.identify(child.pid)
    assert found is not None and process.end(found, timeout_s=5)
    assert child.wait() == -signal.SIGKILL
