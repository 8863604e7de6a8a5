"""The hooks around a job: order, arguments, environment, identity, exit statuses, time."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from .conftest import System, User

ENVIRONMENT = {
    "PATH",
    "LANG",
    "PBS_RESOURCE_NODES",
    "PBS_NUM_NODES",
    "PBS_NUM_PPN",
    "PBS_NP",
    "PBS_NODENUM",
    "PBS_MSHOST",
    "PBS_O_WORKDIR",
    "PBS_NODEFILE",
}
SHELL_OWN = {"PWD", "OLDPWD", "SHLVL", "_"}


def own_hook(system: System, user: User, name: str, extra: str = "") -> str:
    path = system.hook(name, extra, directory=user.home, mode=0o700)
    os.chown(path, user.uid, user.gid)
    return str(path)


def all_hooks(system: System, user: User) -> tuple[str, str]:
    for name in ("prologue", "prologue.user", "epilogue.user", "epilogue"):
        system.hook(name)
    return own_hook(system, user, "own_prologue"), own_hook(system, user, "own_epilogue")


def test_order_arguments_and_surroundings(system: System, user: User) -> None:
    prologue, epilogue = all_hooks(system, user)
    items = f"prologue={prologue},nodes=1:ppn=2,mem=64mb,walltime=300,other=vtorque:abc,epilogue={epilogue}"
    job, status = system.run(user, "-N", "first", "-A", "acct", "-l", items, script="exit 7\n")
    assert status == 7
    assert system.order() == [
        "prologue",
        "prologue.user",
        "own_prologue",
        "own_epilogue",
        "epilogue.user",
        "epilogue",
    ]
    [call] = system.calls("prologue")
    resources = (
        f"prologue={prologue},nodes=1:ppn=2,mem=64mb,walltime=00:05:00,other=vtorque:abc,"
        f"epilogue={epilogue},neednodes=1:ppn=2"
    )
    script = f"{system.mom_priv}/jobs/{job}.SC"
    expected = [job, user.name, user.name, "first", resources, "batch", "acct", script]
    assert [call[f"arg{number}"] for number in range(1, 9)] == expected
    assert call["count"] == "8"
    assert system.calls("own_prologue")[0]["arg5"] == resources
    [after] = system.calls("epilogue")
    assert after["count"] == "11"
    assert [after[f"arg{number}"] for number in (1, 2, 3, 4, 6)] == [*expected[:4], resources]
    assert after["arg5"].isdigit() and int(after["arg5"]) > 1
    assert {item.split("=")[0] for item in after["arg7"].split(",")} == {"cput", "mem", "vmem", "walltime"}
    assert [after[f"arg{number}"] for number in (8, 9, 10, 11)] == ["batch", "acct", "7", script]


def test_identity_streams_and_environment(system: System, user: User) -> None:
    prologue, epilogue = all_hooks(system, user)
    system.run(user, "-l", f"prologue={prologue},epilogue={epilogue},nodes=1:ppn=3", "-v", "SECRET=1")
    for name in system.order():
        [call] = system.calls(name)
        root = name in ("prologue", "epilogue")
        assert (call["uid"], call["gid"]) == (("0", "0") if root else (str(user.uid), str(user.gid))), name
        assert call["cwd"] == str(system.mom_priv if root else user.home), name
        assert call["umask"] == ("0077" if "prologue" in name else "0022"), name
        assert call["session"] == call["pid"], name
        assert call["stdin"] == "/dev/null", name
        assert int(call["sigign"], 16) & 1 << 12, f"{name}: SIGPIPE is ignored"
        environment = {key[4:]: value for key, value in call.items() if key.startswith("env:")}
        assert set(environment) - SHELL_OWN == ENVIRONMENT, name
        assert environment["PATH"] == "/bin:/usr/bin"
        assert (environment["PBS_NUM_NODES"], environment["PBS_NUM_PPN"], environment["PBS_NP"]) == ("1", "3", "3")
        assert environment["PBS_NODENUM"] == "0"
        assert environment["PBS_O_WORKDIR"] == str(user.home)


def test_nodes_by_name_count_as_none(system: System, user: User) -> None:
    system.hook("prologue", 'cat "$PBS_NODEFILE" > "@RECORD@/nodes"'.replace("@RECORD@", str(system.record)))
    system.run(user, "-l", f"nodes={system.host}:ppn=2")
    assert system.calls("prologue")[0]["env:PBS_NUM_NODES"] == "0"
    assert (system.record / "nodes").read_text() == f"{system.host}\n" * 2


def test_hook_output_is_the_jobs_output(system: System, user: User) -> None:
    system.hook("prologue", "echo before; echo before >&2")
    system.hook("epilogue", "echo after")
    system.run(user, "-N", "x", script="echo job\n")
    assert (user.home / "x.o1").read_text() == "before\njob\nafter\n"
    assert (user.home / "x.e1").read_text() == "before\n"


def test_root_prologue_may_replace_the_script(system: System, user: User) -> None:
    swap = ['new=$(dirname "$8")/new', "echo 'echo swapped' > $new", 'chown --reference="$8" $new']
    system.hook("prologue", "; ".join([*swap, 'chmod 700 $new; mv $new "$8"']))
    system.run(user, "-N", "x", script="echo original\n")
    assert (user.home / "x.o1").read_text() == "swapped\n"


def test_prologue_1_aborts_and_keeps_the_output_back(system: System, user: User) -> None:
    system.hook("prologue", "echo refused >&2; exit 1")
    system.hook("epilogue")
    _, status = system.run(user, "-N", "x", script="echo never\n")
    assert status == -2
    assert list(user.home.iterdir()) == []
    assert system.order() == ["prologue", "epilogue"]
    assert system.calls("epilogue")[0]["arg10"] == "-2"


@pytest.mark.parametrize("which", ["prologue", "own"])
def test_prologue_2_requeues_at_once(system: System, user: User, which: str) -> None:
    flag = user.write("flag", "")
    extra = f"[ -e {flag} ] && rm {flag} && exit 2"
    arguments = []
    if which == "own":
        arguments = ["-l", f"prologue={own_hook(system, user, 'own', extra)}"]
    else:
        system.hook("prologue", extra)
    job, status = system.run(user, *arguments, "-N", "x", script="echo ran\n")
    assert status == 0
    assert system.order() == [which, which]
    assert (user.home / f"x.o{job.split('.')[0]}").read_text() == "ran\n"


def test_requeue_has_an_end_here(system: System, user: User) -> None:
    system.hook("prologue", "exit 3")
    job = system.submit(user, "-N", "x")
    result = system.result(job)
    assert result["exit_status"] == -3
    assert "requeued 3 times" in str(result["reason"])
    assert "prologue ended with 3" in (user.home / "x.e1").read_text()
    assert system.order() == ["prologue"] * 4


def test_prologalarm_kills_the_session_and_requeues(system: System, user: User) -> None:
    flag = system.record / "flag"
    flag.touch()
    system.hook("prologue", f"[ -e {flag} ] && rm {flag} && {{ sleep 986 & sleep 987; }}")
    _, status = system.run(user)
    assert status == 0
    assert system.order() == ["prologue"] * 2
    assert not [1 for entry in Path("/proc").glob("[0-9]*/cmdline") if b"98" in entry.read_bytes()[:9]]


def test_background_session_of_a_hook_survives(system: System, user: User) -> None:
    gate = system.gate("gate")
    system.hook("prologue", f"setsid sh -c 'read x < {gate.path}; echo alive > {system.record}/late' &")
    late = system.gate("late")
    system.run(user)
    gate.open()
    assert late.wait() == "alive\n"


@pytest.mark.parametrize("mode", [0o777, 0o600])
def test_site_hook_that_others_may_write_is_not_run(system: System, user: User, mode: int) -> None:
    system.configure(requeue_limit=0)
    system.stop()
    system.start()
    system.hook("prologue", mode=mode)
    _, status = system.run(user, "-N", "x")
    assert (status, system.order()) == (-3, [])
    assert "permission Error" in (user.home / "x.e1").read_text()


HOSTILE = ["fifo", "directory", "writable", "other", "loop", "unreadable", "symlink-fifo", "hanging"]


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_own_prologue(
    system: System, user: User, other: User, what: str, request: pytest.FixtureRequest
) -> None:
    system.configure(requeue_limit=0)
    system.stop()
    system.start()
    path = user.home / "p"
    if what == "fifo":
        os.mkfifo(path)
    elif what == "directory":
        path.mkdir()
    elif what == "writable":
        user.write("p", "#!/bin/sh\n", 0o720)
    elif what == "other":
        other.home.chmod(0o755)
        path = other.write("p", "#!/bin/sh\n", 0o755)
    elif what == "loop":
        path.symlink_to("p")
    elif what == "unreadable":
        user.write("d/p", "#!/bin/sh\n", 0o700)
        (user.home / "d").chmod(0)
        path = user.home / "d" / "p"
    elif what == "symlink-fifo":
        os.mkfifo(user.home / "f")
        path.symlink_to("f")
    else:
        path = request.getfixturevalue("hanging") / "p"
    job = system.submit(user, "-N", "x", "-l", f"prologue={path}")
    # meanwhile the daemon answers
    assert system.qsub(user, "-l", "nodes=7", script="true\n").status != 0
    assert system.result(job)["exit_status"] == -3
    reason = (user.home / "x.e1").read_text()
    assert "requeued" in reason and ("prologalarm" if what == "hanging" else "permission Error") in reason


def test_symlink_to_a_good_prologue_and_a_missing_one(system: System, user: User) -> None:
    good = own_hook(system, user, "good")
    (user.home / "link").symlink_to(good)
    os.chown(user.home / "link", user.uid, user.gid, follow_symlinks=False)
    assert system.run(user, "-l", f"prologue={user.home}/link")[1] == 0
    assert system.order() == ["link"]
    assert system.run(user, "-l", f"prologue={user.home}/missing,epilogue={user.home}/missing")[1] == 0


def test_task_file_appears_after_the_prologue(system: System, user: User) -> None:
    look = f'ls "$(dirname "${{8}}")" > {system.record}/'
    system.hook("prologue", look + "before")
    system.hook("epilogue", look.replace("${8}", "${11}") + f"after; cat {system.mom_priv}/jobs/*.JB")
    job, _ = system.run(user, "-N", "x", "-l", "nodes=1:ppn=2")
    assert (system.record / "before").read_text().split() == [f"{job}.SC"]
    assert (system.record / "after").read_text().split() == [f"{job}.JB", f"{job}.SC"]
    text = (user.home / "x.o1").read_text()
    assert f"<exec_host>{system.host}/0-1</exec_host>" in text and "<cookie>" in text
