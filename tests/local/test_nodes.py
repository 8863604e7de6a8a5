"""Simulated nodes: namespaces of their own, jobs on several of them as TORQUE runs these, and nothing left behind."""

from __future__ import annotations

import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from vsub.engines.local import client, network

from .conftest import DAEMON, PATIENCE_S, REPOSITORY, System, User
from .test_hooks import ENVIRONMENT, SHELL_OWN, own_hook
from .test_interactive import Session

SISTER_HOOKS = ("prologue.parallel", "prologue.user.parallel", "epilogue.user.parallel", "epilogue.parallel")
SUPERIOR_HOOKS = ("prologue", "prologue.user", "epilogue.user", "epilogue")
NODES = ("n1", "n2", "n3")


def all_hooks(cluster: System) -> None:
    for name in SISTER_HOOKS + SUPERIOR_HOOKS:
        cluster.hook(name)


def task_files(cluster: System) -> dict[str, str]:
    """The .JB of each node that has one."""
    found = {}
    for spool in cluster.node_spools():
        for path in (spool / "mom_priv" / "jobs").glob("*.JB"):
            found[spool.name] = path.read_text()
    return found


def cookies(texts: dict[str, str]) -> set[str]:
    return {match for text in texts.values() for match in re.findall("<cookie>([0-9A-F]{32})</cookie>", text)}


def links() -> set[str]:
    return set(os.listdir("/sys/class/net"))  # noqa: PTH208


def namespaces(pids: list[int]) -> set[str]:
    """The namespaces that these processes are in, but for those that the tests are in."""
    found = {str(link.readlink()) for pid in pids for link in Path(f"/proc/{pid}/ns").iterdir()}
    return found - {str(link.readlink()) for link in Path("/proc/self/ns").iterdir()}


def mounts() -> list[str]:
    """What is mounted here, but for what tests beside this one mount."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [line for line in lines if "/vtorque-hang-" not in line]


def processes_of(cluster: System) -> list[int]:
    """Pids of all processes in the nodes."""
    inits = [int(line.split()[-1]) for line in cluster.daemon("status").stdout.splitlines()[1:]]
    spaces = {os.readlink(f"/proc/{pid}/ns/pid") for pid in inits}  # noqa: PTH115
    found = []
    for link in Path("/proc").glob("[0-9]*/ns/pid"):
        try:
            if str(link.readlink()) in spaces:
                found.append(int(link.parent.parent.name))
        except OSError:
            pass  # it has ended
    assert len(inits) == 3 and set(inits) <= set(found)
    return found


def python_in(cluster: System, node: str, code: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-I", "-c", DAEMON, "enter", "--spool", str(cluster.spool), node]
    return subprocess.Popen([*command, sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


# --- nodes


def test_a_node_has_namespaces_and_a_name_of_its_own(cluster: System) -> None:
    here = {kind: str(Path(f"/proc/self/ns/{kind}").readlink()) for kind in ("net", "mnt", "uts", "pid")}
    seen = {kind: {here[kind]} for kind in here}
    for node in NODES:
        assert cluster.enter(node, "uname", "-n") == f"{node}\n"
        for kind in here:
            seen[kind].add(cluster.enter(node, "readlink", f"/proc/self/ns/{kind}").strip())
        assert sorted(cluster.enter(node, "ls", "/sys/class/net").split()) == ["eth0", "lo"]
        assert Path(cluster.enter(node, "readlink", "/proc/1/exe").strip()).name.startswith("python")
        hosts = cluster.enter(node, "cat", "/etc/hosts").splitlines()
        assert "127.0.0.1 localhost" in hosts and [line.split()[1] for line in hosts[-3:]] == list(NODES)
    assert {kind: len(found) for kind, found in seen.items()} == dict.fromkeys(here, 4)
    assert socket.gethostname() == cluster.host
    assert "n2" not in Path("/etc/hosts").read_text()


@pytest.mark.parametrize("client_node", ["n3", "host"])
def test_nodes_and_host_reach_each_other(cluster: System, client_node: str) -> None:
    serve = "import socket; s = socket.create_server(('', 0)); print(s.getsockname()[1], flush=True); c, a = s.accept()"
    with python_in(cluster, "n1", f"{serve}; c.sendall(a[0].encode())") as server:
        assert server.stdout is not None
        port = int(server.stdout.readline())
        status = dict(line.split()[:2] for line in cluster.daemon("status").stdout.splitlines()[1:])
        if client_node == "host":
            with socket.create_connection((status["n1"], port), PATIENCE_S) as connection:
                answer, expected = connection.recv(99).decode(), status["n1"].rpartition(".")[0] + ".1"
        else:
            code = f"import socket; print(socket.create_connection(('n1', {port}), 20).recv(99).decode())"
            answer, expected = cluster.enter("n3", sys.executable, "-c", code).strip(), status["n3"]
        assert answer == expected
        assert server.wait(PATIENCE_S) == 0


def test_folders_of_a_nodes_own(cluster: System) -> None:
    for folder in (cluster.own, cluster.volatile):
        assert cluster.enter("n1", "ls", "-A", str(folder)) == ""
        cluster.enter("n1", "touch", f"{folder}/mine")
        assert cluster.enter("n1", "ls", str(folder)) == "mine\n"
        assert cluster.enter("n2", "ls", "-A", str(folder)) == ""
        assert list(folder.iterdir()) == []
    shared = cluster.record / "shared"
    cluster.enter("n1", "touch", str(shared))
    assert shared.exists()
    assert cluster.traces(), "nothing would be found"
    cluster.stop()
    assert cluster.traces() == []
    cluster.own.chmod(0o1777)
    cluster.start()
    assert cluster.enter("n1", "ls", str(cluster.own)) == "mine\n"
    assert cluster.enter("n1", "ls", str(cluster.volatile)) == ""
    assert cluster.enter("n1", "stat", "-c", "%a", str(cluster.own)) == "1777\n"


def test_a_folder_that_would_hide_the_spool_is_refused(cluster: System) -> None:
    cluster.stop()
    refused = cluster.daemon("start", "--private", str(cluster.root))
    assert refused.returncode == 1
    assert f"{cluster.root} cannot be each node's own: {cluster.spool}, which all nodes need" in refused.stderr
    refused = cluster.daemon("start", "--nodes", "17")
    assert refused.returncode == 2 and "from 1 to 16" in refused.stderr


def test_nothing_of_a_node_that_cannot_be_made_is_left(cluster: System) -> None:
    cluster.stop()
    cluster.own.rmdir()
    (cluster.root / "file").touch()
    cluster.own.symlink_to("file")
    refused = cluster.daemon("start")
    assert refused.returncode == 1 and str(cluster.own) in refused.stderr
    assert cluster.traces() == [] and network.link_name(cluster.spool) not in links()
    cluster.own.unlink()


def test_enter_ends_as_its_command_and_with_us(cluster: System) -> None:
    enter = [sys.executable, "-I", "-c", DAEMON, "enter", "--spool", str(cluster.spool)]
    assert subprocess.run([*enter, "n2", "sh", "-c", "exit 7"], check=False).returncode == 7
    assert subprocess.run([*enter, "n2", "sh", "-c", "kill -9 $$"], check=False).returncode == 137
    unknown = subprocess.run([*enter, "n4", "true"], capture_output=True, text=True, check=False)
    assert (unknown.returncode, unknown.stderr) == (1, "vtorque-local: no node n4; there are: n1, n2, n3\n")
    with python_in(cluster, "n2", "print('in', flush=True); import time; time.sleep(987)") as entered:
        assert entered.stdout is not None
        entered.stdout.readline()
        entered.kill()
        assert entered.stdout.read() == ""  # the end of what was started, too
    cluster.stop()
    gone = subprocess.run([*enter, "n2", "true"], capture_output=True, text=True, check=False)
    assert gone.returncode == 1 and "no daemon serves" in gone.stderr


def test_enter_without_simulated_nodes(system: System) -> None:
    refused = system.daemon("status")
    assert refused.stdout == f"vtorque-local: running, process {system.pid}\n"
    enter = [sys.executable, "-I", "-c", DAEMON, "enter", "--spool", str(system.spool), "n1", "true"]
    refused = subprocess.run(enter, capture_output=True, text=True, check=False)
    assert refused.returncode == 1 and "no node n1; there are: none, see local.nodes" in refused.stderr


def test_an_ordinary_start_loads_nothing_for_nodes() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(REPOSITORY)!r}); import vsub.engines.local.daemon; "
        "print([name for name in ('pyroute2', 'ctypes', 'vsub.engines.local.namespaces') if name in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
    )


def test_two_daemons_beside_each_other(cluster: System, user: User) -> None:
    root = Path(tempfile.mkdtemp(prefix="vtorque-local-", dir="/var/tmp"))
    root.chmod(0o755)
    other = System(root, 2)
    try:
        other.start()
        status = cluster.daemon("status").stdout + other.daemon("status").stdout
        assert len(set(re.findall(r"\d+\.\d+\.\d+\.\d+", status))) == 5
        assert len(set(re.findall(r"\d+\.\d+\.\d+", status))) == 2
        assert network.link_name(other.spool) in links() and network.link_name(cluster.spool) in links()
        assert other.run(user, "-l", "nodes=2")[1] == cluster.run(user, "-l", "nodes=3")[1] == 0
    finally:
        other.stop()
        left = other.traces()
        shutil.rmtree(root)
    assert left == [] and network.link_name(cluster.spool) in links()


# --- jobs


def test_order_arguments_and_surroundings_on_three_nodes(cluster: System, user: User) -> None:
    all_hooks(cluster)
    prologue = own_hook(cluster, user, "own_prologue")
    epilogue = own_hook(cluster, user, "own_epilogue")
    items = f"prologue={prologue},nodes=3:ppn=2,walltime=300,epilogue={epilogue}"
    job, status = cluster.run(user, "-N", "x", "-l", items, script="cat $PBS_NODEFILE; uname -n; exit 7\n")
    assert status == 7
    assert (user.home / "x.o1").read_text().split() == ["n1", "n1", "n2", "n2", "n3", "n3", "n1"]

    order = cluster.order_on_nodes()
    first, middle, last = order[:4], order[4:11], order[11:]
    for node in ("n2", "n3"):
        assert [entry for entry in first if entry.startswith(node)] == [
            f"{node}:prologue.parallel",
            f"{node}:prologue.user.parallel",
        ]
        assert [entry for entry in middle if entry.startswith(node)] == [
            f"{node}:epilogue.user.parallel",
            f"{node}:epilogue.parallel",
        ]
    assert middle[:3] == ["n1:prologue", "n1:prologue.user", "n1:own_prologue"]
    assert last == ["n1:own_epilogue", "n1:epilogue.user", "n1:epilogue"]

    resources = f"{items.replace('walltime=300', 'walltime=00:05:00')},neednodes=3:ppn=2"
    for name in order:
        node, hook = name.split(":")
        [call] = [call for call in cluster.calls(hook) if call["host"] == node]
        sister, root = node != "n1", hook in ("prologue", "epilogue", "prologue.parallel", "epilogue.parallel")
        spool = cluster.spool / "nodes" / node
        script = f"{spool}/mom_priv/jobs/{job}.SC"
        who = [job, user.name, user.name, "x"]
        if "prologue" in hook:
            assert [call[f"arg{number}"] for number in range(1, 9)] == [*who, resources, "batch", "", script], name
            assert call["count"] == "8", name
        else:
            assert [call[f"arg{number}"] for number in (1, 2, 3, 4, 6)] == [*who, resources], name
            assert [call[f"arg{number}"] for number in (8, 9, 10, 11)] == ["batch", "", "7", script], name
            assert (call["arg5"] == "0") == sister, name
            assert call["count"] == "11", name
        assert (call["uid"], call["gid"]) == (("0", "0") if root else (str(user.uid), str(user.gid))), name
        assert call["cwd"] == str(spool / "mom_priv" if root else user.home), name
        assert call["umask"] == ("0077" if "prologue" in hook and not sister else "0022"), name
        assert call["stdin"] == "/dev/null", name
        environment = {key[4:]: value for key, value in call.items() if key.startswith("env:")}
        assert set(environment) - SHELL_OWN == ENVIRONMENT - ({"PBS_NODEFILE"} if sister else set()), name
        assert environment["PBS_NODENUM"] == str(NODES.index(node)), name
        assert (environment["PBS_MSHOST"], environment["PBS_NUM_NODES"]) == ("n1", "3"), name
        assert (environment["PBS_NUM_PPN"], environment["PBS_NP"]) == ("2", "6"), name


def test_streams_of_hooks(cluster: System, user: User) -> None:
    for name in SISTER_HOOKS:
        cluster.hook(name, "echo lost; echo lost >&2")
    cluster.hook("prologue", "echo kept")
    cluster.run(user, "-N", "x", "-l", "nodes=2", script="echo job\n")
    for name in SISTER_HOOKS:
        [call] = cluster.calls(name)
        assert (call["stdout"], call["stderr"]) == ("/dev/null", "/dev/null"), name
    assert (user.home / "x.o1").read_text() == "kept\njob\n"
    assert (user.home / "x.e1").read_text() == ""


def test_only_the_sisters_epilogues_have_signals_blocked(cluster: System, user: User) -> None:
    for name in SISTER_HOOKS + SUPERIOR_HOOKS:
        path = cluster.mom_priv / name
        # bash gives its children the mask that it was given, dash does not
        path.write_text(f"#!/bin/bash\nsed -n 's/^SigBlk://p' /proc/self/status > {cluster.record}/{name}\n")
        path.chmod(0o755)
    assert cluster.run(user, "-l", "nodes=2")[1] == 0
    three = sum(1 << number - 1 for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM))
    for name in SISTER_HOOKS + SUPERIOR_HOOKS:
        expected = three if name in ("epilogue.user.parallel", "epilogue.parallel") else 0
        assert int((cluster.record / name).read_text(), 16) == expected, name


def test_task_file_tells_every_node_of_the_job(cluster: System, user: User) -> None:
    """It appears after the sisters' prologues on all nodes, and goes with the epilogues."""
    own = user.home / ("long" * 30)
    look = f'ls "$(dirname "$8")" > {cluster.record}/'
    cluster.hook("prologue.parallel", look + "parallel.$(uname -n)")
    cluster.hook("prologue", look + "prologue")
    gate, hold = cluster.gate("gate"), cluster.gate("hold")
    items = f"nodes=n3:ppn=2+n1,prologue={own},other=vtorque:a<b"
    job = cluster.submit(user, "-N", "x", "-l", items, script=f"echo in > {gate.path}; read x < {hold.path}\n")
    gate.wait()
    texts = task_files(cluster)
    assert set(texts) == {"n1", "n3"} and texts["n1"] == texts["n3"]
    assert "<exec_host>n3/0-1+n1/0</exec_host>" in texts["n1"] and f"<prologue>{own}</prologue>" in texts["n1"]
    assert "<other>vtorque:a&lt;b</other>" in texts["n1"] and len(cookies(texts)) == 1
    for node in ("n1", "n3"):
        seen = (cluster.spool / "nodes" / node / "mom_priv" / "jobs" / f"{job}.JB").stat()
        assert (seen.st_uid, seen.st_mode & 0o777) == (0, 0o600)
    assert (cluster.record / "parallel.n1").read_text() == ""
    assert not (cluster.record / "parallel.n3").exists(), "the mother superior has no prologue.parallel"
    assert (cluster.record / "prologue").read_text().split() == [f"{job}.JB", f"{job}.SC"]

    assert cluster.qrerun(job) == 0
    gate.wait()
    again = task_files(cluster)
    assert set(again) == {"n1", "n3"} and len(cookies(texts) | cookies(again)) == 2
    hold.open()
    assert cluster.result(job)["exit_status"] == 0
    assert task_files(cluster) == {}


def test_task_files_are_there_until_the_last_epilogue(cluster: System, user: User) -> None:
    cluster.hook("epilogue", f"ls {cluster.spool}/nodes/n*/mom_priv/jobs/*.JB | wc -l > {cluster.record}/count")
    cluster.run(user, "-l", "nodes=3")
    assert (cluster.record / "count").read_text().strip() == "3"


def test_one_node_of_the_cluster(cluster: System, user: User) -> None:
    """As on a machine without simulated nodes: nothing parallel, the task file after the prologues."""
    all_hooks(cluster)
    cluster.hook("prologue", f'ls "$(dirname "$8")" > {cluster.record}/before')
    job, status = cluster.run(
        user, "-N", "x", "-l", "nodes=n2:ppn=2", script="cat $PBS_NODEFILE; uname -n; pwd; id -u\n"
    )
    assert status == 0
    assert (user.home / "x.o1").read_text().split() == ["n2", "n2", "n2", str(user.home), str(user.uid)]
    assert cluster.order_on_nodes() == ["n2:prologue", "n2:prologue.user", "n2:epilogue.user", "n2:epilogue"]
    assert (cluster.record / "before").read_text().split() == [f"{job}.SC"]
    assert cluster.run(user)[1] == 0
    assert cluster.order_on_nodes()[4:][0] == "n1:prologue"


@pytest.mark.parametrize("nodes", ["4", "n4", "n1+n1", "n1+3", "2:ppn=2+2", "localhost"])
def test_more_nodes_than_there_are(cluster: System, user: User, nodes: str) -> None:
    refused = cluster.qsub(user, "-l", f"nodes={nodes}", script="true\n")
    assert refused.status != 0 and "has 3 nodes, n1 to n3" in refused.err


def test_mixed_requests(cluster: System, user: User) -> None:
    for request, lines in (
        ("n3:ppn=2+n1", ["n3", "n3", "n1"]),
        ("2+n1:ppn=2", ["n2", "n3", "n1", "n1"]),
        ("1:ppn=2+1", ["n1", "n1", "n2"]),
    ):
        job, _ = cluster.run(user, "-N", "x", "-l", f"nodes={request}", script="cat $PBS_NODEFILE\n")
        assert (user.home / f"x.o{job.split('.')[0]}").read_text().split() == lines


def test_files_in_the_home_are_everybodys(cluster: System, user: User) -> None:
    cluster.hook("prologue.user.parallel", 'echo "$(uname -n) $(id -u)" > from_sister')
    cluster.run(user, "-N", "x", "-l", "nodes=2", script="cat from_sister\n")
    assert (user.home / "x.o1").read_text() == f"n2 {user.uid}\n"


def test_session_and_signals_in_a_node(cluster: System, user: User) -> None:
    all_hooks(cluster)
    gate = cluster.gate("gate")
    job = cluster.submit(user, "-l", "nodes=2", script=f"sleep 987 & echo in > {gate.path}; wait\n")
    gate.wait()
    pids = user.processes()
    assert {os.readlink(f"/proc/{pid}/ns/pid") for pid in pids} - {os.readlink("/proc/self/ns/pid")}  # noqa: PTH115
    [session] = {os.getsid(pid) for pid in pids}
    assert cluster.qdel(job) == 0
    assert cluster.result(job) == {"exit_status": 271, "reason": "deleted"}
    assert user.processes() == []
    assert cluster.calls("epilogue")[0]["arg5"] == str(session)
    assert cluster.order_on_nodes()[-4:] == [
        "n2:epilogue.user.parallel",
        "n2:epilogue.parallel",
        "n1:epilogue.user",
        "n1:epilogue",
    ]
    assert cluster.calls("epilogue.parallel")[0]["arg10"] == "271"


def test_walltime_in_a_node(cluster: System, user: User) -> None:
    _, status = cluster.run(user, "-N", "x", "-l", "nodes=2,walltime=1", script="sleep 987\n")
    assert status == 271
    assert "exceeded limit 1" in (user.home / "x.e1").read_text()


@pytest.mark.parametrize("where", ["prologue.parallel", "prologue"])
def test_delete_during_a_prologue(cluster: System, user: User, where: str) -> None:
    """All epilogues run beside it; after the sisters' prologues of a deleted job those of the superior never run."""
    all_hooks(cluster)
    gate, hold, late = cluster.gate("gate"), cluster.gate("hold"), cluster.gate("late")
    cluster.hook(where, f"echo in > {gate.path}; read x < {hold.path}")
    after = {"prologue.parallel": "prologue.user.parallel", "prologue": "prologue.user"}[where]
    cluster.hook(after, f"echo late > {late.path}")
    job = cluster.submit(user, "-l", "nodes=2")
    gate.wait()
    assert cluster.qdel(job) == 0
    assert cluster.result(job) == {"exit_status": 271, "reason": "deleted"}
    ends = ["n2:epilogue.user.parallel", "n2:epilogue.parallel", "n1:epilogue.user", "n1:epilogue"]
    assert cluster.order_on_nodes()[-4:] == ends
    assert task_files(cluster) == {}
    hold.open()
    assert late.wait() == "late\n"
    cluster.hook(where)
    cluster.hook(after)
    assert cluster.run(user, "-l", "nodes=2")[1] == 0
    assert cluster.order_on_nodes().count("n1:prologue") == (2 if where == "prologue" else 1)


def test_a_sister_that_fails(cluster: System, user: User) -> None:
    """The job is queued again; the superior's prologue has not run, and that sister has no epilogue."""
    all_hooks(cluster)
    flag = cluster.record / "flag"
    flag.touch()
    cluster.hook("prologue.parallel", f"[ $PBS_NODENUM = 2 ] && [ -e {flag} ] && rm {flag} && exit 1")
    assert cluster.run(user, "-l", "nodes=3")[1] == 0
    order = cluster.order_on_nodes()
    first = order[: order.index("n1:epilogue") + 1]
    assert "n1:prologue" not in first and "n3:epilogue.parallel" not in first and "n2:epilogue.parallel" in first
    assert "n3:epilogue.parallel" in order and order.count("n1:prologue") == 1
    assert "n3: " in cluster.log() and "requeued: prologue.parallel on n3 ended with 1" in cluster.log()


def test_a_sister_that_hangs(cluster: System, user: User) -> None:
    flag = cluster.record / "flag"
    flag.touch()
    cluster.hook("prologue.parallel", f"[ -e {flag} ] && rm {flag} && {{ sleep 986 & sleep 987; }}")
    assert cluster.run(user, "-l", "nodes=2")[1] == 0
    assert "prologue.parallel on n2 was ended by prologalarm" in cluster.log()
    assert "sleep" not in cluster.enter("n2", "cat", *_command_lines(cluster, "n2"))


def _command_lines(cluster: System, node: str) -> list[str]:
    found = cluster.enter(node, "sh", "-c", "ls -d /proc/[0-9]*").split()
    return [f"{path}/comm" for path in found if cluster.enter(node, "sh", "-c", f"cat {path}/comm || :")]


def test_background_session_of_a_sisters_hook_survives_the_job(cluster: System, user: User) -> None:
    gate, late = cluster.gate("gate"), cluster.gate("late")
    cluster.hook("prologue.parallel", f"setsid sh -c 'read x < {gate.path}; uname -n > {late.path}' &")
    cluster.run(user, "-l", "nodes=2")
    gate.open()
    assert late.wait() == "n2\n"


def test_arrays_on_nodes(cluster: System, user: User) -> None:
    array = cluster.submit(
        user, "-t", "1-2", "-N", "x", "-l", "nodes=2", script="cat $PBS_NODEFILE; echo $PBS_ARRAYID\n"
    )
    assert cluster.result(array)["exit_status"] == 0
    assert [(user.home / f"x.o1-{member}").read_text().split() for member in (1, 2)] == [
        ["n1", "n2", "1"],
        ["n1", "n2", "2"],
    ]


def test_interactive_job_on_nodes(cluster: System, user: User) -> None:
    all_hooks(cluster)
    session = Session(cluster, user, "-I", "-l", "nodes=n2+n3")
    try:
        session.job()
        session.type("uname -n; tty; exit\n")
        session.expect(r"\rn2\r\n/dev/pts/\d+\r\n")
        session.expect("completed")
        assert session.end() == 0
    finally:
        session.close()
    assert cluster.result("1")["exit_status"] == 0
    assert "n3:epilogue.parallel" in cluster.order_on_nodes()


def test_a_node_that_ended_is_told(cluster: System, user: User) -> None:
    lines = cluster.daemon("status").stdout.splitlines()
    pid = int(lines[2].split()[-1])
    pidfd = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    assert select.select([pidfd], [], [], PATIENCE_S)[0]
    os.close(pidfd)
    assert cluster.daemon("status").stdout.splitlines()[2].endswith(" ended")
    job = cluster.submit(user, "-l", "nodes=n2")
    result = cluster.result(job)
    assert result["exit_status"] == -3 and "no process can be started in node n2" in str(result["reason"])
    assert cluster.run(user, "-l", "nodes=n1+n3")[1] == 0


# --- the end


def test_stop_leaves_nothing(cluster: System, user: User) -> None:
    before = mounts()
    gate = cluster.gate("gate")
    cluster.hook("prologue.parallel", f"setsid sh -c 'echo in > {gate.path}; exec sleep 986' &")
    cluster.run(user, "-l", "nodes=2")
    gate.wait()
    pids = processes_of(cluster)
    assert (len(pids), len(namespaces(pids))) == (4, 3 * 4) and len(cluster.traces()) == 1 + 4
    assert network.link_name(cluster.spool) in links()
    cluster.stop()
    assert [pid for pid in pids if Path(f"/proc/{pid}").exists()] == []
    assert cluster.traces() == []
    assert network.link_name(cluster.spool) not in links() and mounts() == before


def test_killed_daemon_leaves_nothing_and_the_next_one_goes_on(cluster: System, user: User) -> None:
    before = mounts()
    all_hooks(cluster)
    gate = cluster.gate("gate")
    cluster.hook("prologue.parallel", f"setsid sh -c 'echo in > {gate.path}; exec sleep 986' &")
    script = f"echo begun; sleep 986 & echo in > {gate.path}; wait\n"
    job = cluster.submit(user, "-N", "x", "-l", "nodes=2", script=script)
    queued = cluster.submit(user, "-l", "nodes=3")
    words = gate.wait()
    while words.count("in") < 2:
        words += gate.wait()
    pids = processes_of(cluster)
    pidfds = [os.pidfd_open(pid) for pid in pids]
    assert len(pids) >= 6 and len(namespaces(pids)) == 3 * 4
    news = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
    with news:
        news.settimeout(PATIENCE_S)
        news.bind((0, 1))  # RTMGRP_LINK
        cluster.kill()
        for pidfd in pidfds:
            assert select.select([pidfd], [], [], PATIENCE_S)[0]
            os.close(pidfd)
        while network.link_name(cluster.spool) in links():
            news.recv(65536)
    assert cluster.traces() == [] and mounts() == before
    assert user.processes() == []
    cluster.start()
    assert cluster.result(job)["exit_status"] == -4
    assert (user.home / "x.o1").read_text() == "begun\n"
    assert cluster.result(queued)["exit_status"] == 0
    order = cluster.order_on_nodes()
    assert order[order.index("n2:epilogue.user.parallel") :][:4] == [
        "n2:epilogue.user.parallel",
        "n2:epilogue.parallel",
        "n1:epilogue.user",
        "n1:epilogue",
    ]


def test_restart_at_once_after_a_kill(cluster: System, user: User) -> None:
    gate = cluster.gate("gate")
    cluster.hook("prologue", f"echo in > {gate.path}; sleep 987")
    job = cluster.submit(user, "-N", "x", "-l", "nodes=2", script="echo ran\n")
    gate.wait()
    cluster.kill()
    (cluster.mom_priv / "prologue").unlink()
    cluster.start()
    assert cluster.result(job)["exit_status"] == 0
    assert (user.home / "x.o1").read_text() == "ran\n"


def test_stop_during_the_sisters_prologues_keeps_the_job(cluster: System, user: User) -> None:
    all_hooks(cluster)
    gate = cluster.gate("gate")
    cluster.hook("prologue.parallel", f"echo in > {gate.path}; sleep 987")
    job = cluster.submit(user, "-l", "nodes=2")
    gate.wait()
    cluster.stop()
    assert cluster.order_on_nodes() == [
        "n2:prologue.parallel",
        "n2:epilogue.user.parallel",
        "n2:epilogue.parallel",
        "n1:epilogue.user",
        "n1:epilogue",
    ]
    cluster.hook("prologue.parallel")
    cluster.start()
    assert cluster.result(job)["exit_status"] == 0


def test_another_number_of_nodes_after_a_kill(cluster: System, user: User) -> None:
    """What is left of a job on nodes that are no more is ended on this machine, its output delivered."""
    all_hooks(cluster)
    gate = cluster.gate("gate")
    job = cluster.submit(user, "-N", "x", "-l", "nodes=n2+n3", script=f"echo begun; echo in > {gate.path}; sleep 987\n")
    queued = cluster.submit(user, "-l", "nodes=2", script="true\n")
    gate.wait()
    cluster.kill()
    assert cluster.daemon("start", "--nodes", "1").returncode == 0
    assert cluster.result(job)["exit_status"] == -4
    assert (user.home / "x.o1").read_text() == "begun\n"
    assert cluster.order_on_nodes()[-1] == f"{cluster.host}:epilogue"
    result = cluster.result(queued)
    assert result["exit_status"] == -3 and "has one node" in str(result["reason"])
    state = client.job_state(cluster.socket, job)
    assert state is not None and state.letter == "C"
