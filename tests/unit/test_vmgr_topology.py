"""`vmgr topology` through its launcher: recorded and small machines, plans, a job's guests, refusals."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from nodesite import Node
from test_topology_pictures import a_placement, read_back
from test_vmgr_cli import Vmgr
from test_vmgr_cli import vmgr_run as vmgr_run  # the fixture
from topologies import RECORDED, SMALL, recorded, small

from vmgr.commands.topology import read_plan
from vmgr.errors import VTorqueError
from vmgr.node import record
from vmgr.node.control import Control
from vmgr.node.state import Progress
from vmgr.topology.plain import as_plain, from_plain

pytestmark = pytest.mark.script_launch_mode("inprocess")


def answer(vmgr_run: Vmgr, *words: str) -> dict[str, Any]:
    """The JSON that a command prints."""
    status, out, err = vmgr_run("topology", *words, "--json")
    assert (status, err) == (0, "")
    found: dict[str, Any] = json.loads(out)
    assert out == json.dumps(found, indent=1, sort_keys=True) + "\n"
    return found


def test_this_machine(vmgr_run: Vmgr) -> None:
    status, out, err = vmgr_run("topology")
    assert (status, err) == (0, "") and "package 0" in out and "\x1b" not in out
    cpus = {row["cpu"] for row in answer(vmgr_run)["cpus"]}
    assert set(read_back(out)) == cpus and set(answer(vmgr_run)["allowed"]["cpus"]) == os.sched_getaffinity(0) & cpus


def test_a_recorded_machine(vmgr_run: Vmgr) -> None:
    root = recorded("16amd64-8n2c-cpusets")
    found = answer(vmgr_run, "--root", str(root))
    assert found["allowed"] == {
        "cpus": [0, 1, 2, 3, 5, 6, 12, 13, 14, 15], "nodes": [1, 2, 3, 4], "source": "the cpuset /dummy",
    }  # fmt: skip
    assert len(found["packages"]) == 8 and "guests" not in found
    assert "the cpuset /dummy" in vmgr_run("topology", "--root", str(root)).stdout


def test_the_picture_as_svg(vmgr_run: Vmgr, tmp_path: Path) -> None:
    root, file = str(small("two-nodes-smt")), tmp_path / "node.svg"
    assert vmgr_run("topology", "--root", root, "--svg", str(file)) == (0, "", "")
    status, out, err = vmgr_run("topology", "--root", root, "--svg", "-")
    assert (status, err) == (0, "") and out == file.read_text()
    assert ElementTree.fromstring(out).tag == "{http://www.w3.org/2000/svg}svg"
    both = tmp_path / "both.svg"
    assert len(answer(vmgr_run, "--root", root, "--svg", str(both))["cpus"]) == 8 and both.read_text() == out
    assert "cannot be written" in vmgr_run.refuses("topology", "--root", root, "--svg", str(tmp_path / "no" / "x.svg"))


@pytest.mark.parametrize("name", [*RECORDED, *SMALL])
def test_a_plan_for_every_machine(vmgr_run: Vmgr, name: str) -> None:
    root = str(small(name) if name in SMALL else recorded(name))
    words = ("--root", root, "--plan", "vcpus=2,vms_per_node=2,ram=512M")
    found = answer(vmgr_run, *words)
    first, second = found["guests"]
    for guest in (first, second):
        placement = from_plain({key: value for key, value in guest.items() if key != "guest"})
        assert len(placement.vcpus) == 2 and sum(cell.ram_mib for cell in placement.layout.cells) == 512
        assert set(placement.memory) <= set(found["allowed"]["nodes"])
        layout = placement.layout
        assert layout.sockets * layout.cores * layout.threads == 2 == sum(len(cell.vcpus) for cell in layout.cells)
    pinned = [cpu for guest in (first, second) for cpus in guest["vcpus"].values() for cpu in cpus]
    assert len(pinned) == len(set(pinned)) == 4 and set(pinned) <= set(found["allowed"]["cpus"])
    assert found["host"] == [] and found == answer(vmgr_run, *words)
    drawn = read_back(vmgr_run("topology", *words).stdout)
    assert {drawn[cpu].rstrip("+") for cpu in pinned} == {"A0", "A1", "B0", "B1"}
    svg = vmgr_run("topology", *words, "--svg", "-").stdout
    assert all(f"vCPU {vcpu} of guest {guest}" in svg for vcpu in (0, 1) for guest in (1, 2))


def test_a_plan_without_an_installation(vmgr_run: Vmgr) -> None:
    words = ("--root", str(small("two-nodes-smt")), "--plan", "vcpus=1")
    vmgr_run.node.install.config.write_text("resources: {host_cores: 1}\n")
    assert answer(vmgr_run, *words)["host"] == [0, 4]
    assert answer(vmgr_run, *words[:3], "vcpus=1,host_cores=0")["host"] == []
    vmgr_run.node.install.config.unlink()
    found = answer(vmgr_run, *words)
    assert found["host"] == [] and found["guests"][0]["layout"]["nodes"][0]["ram_mib"] == 1024
    assert len(answer(vmgr_run, *words[:3], "vcpus=1,host_cores=2")["host"]) == 4


def test_cpus_that_may_be_used(vmgr_run: Vmgr) -> None:
    root = ("--root", str(small("cpuset-with-holes")))
    assert answer(vmgr_run, *root, "--cpus", "5,7")["allowed"] == {"cpus": [5, 7], "nodes": [0], "source": "--cpus"}
    found = answer(vmgr_run, *root, "--cpus", "0,6-7", "--plan", "vcpus=2")
    assert found["guests"][0]["vcpus"] == {"0": [0], "1": [6]} and found["allowed"]["cpus"] == [0, 6, 7]
    memory = ("--root", str(recorded("16amd64-8n2c-cpusets")))
    assert answer(vmgr_run, *memory, "--cpus", "2-3")["allowed"]["nodes"] == [1, 2, 3, 4]
    assert answer(vmgr_run, *memory, "--cpus", "8-9")["allowed"]["nodes"] == list(range(8))
    for odd in ("", "4-8", "8", "3-1", "all", "0-99999999999999"):
        assert vmgr_run.refuses("topology", *root, "--cpus", odd).startswith(f"VT-VALUE: --cpus {odd}")
    assert "no CPU 8 is online" in vmgr_run.refuses("topology", *root, "--cpus", "4-8")


@pytest.mark.parametrize(
    ("plan", "code", "said"),
    [
        ("", "VT-KEY", "unknown key ''"),
        ("vcpus=1,", "VT-KEY", "unknown key ''"),
        ("vcpus=1,img=micro", "VT-KEY", "unknown key 'img'"),
        ("vms_per_node=2", "VT-KEY", "has no vcpus"),
        ("vcpus=1,vcpus=1", "VT-KEY", "vcpus stands twice"),
        ("vcpus", "VT-VALUE", "a whole number, at least 1 is needed"),
        ("vcpus=0", "VT-VALUE", "a whole number, at least 1 is needed"),
        ("vcpus=-1", "VT-VALUE", "vcpus=-1 in --plan cannot be read"),
        ("vcpus=1,ram=x", "VT-VALUE", "a size such as"),
        ("vcpus=1,vms_per_node=0", "VT-VALUE", "vms_per_node=0 in --plan"),
        ("vcpus=1,io=many", "VT-VALUE", "io=many in --plan"),
        ("vcpus=9", "VT-RESOURCE", "9 vCPUs do not fit: 8 of 8 CPUs of this node are free"),
        ("vcpus=999999999,vms_per_node=999999999", "VT-RESOURCE", ""),
        ("vcpus=1,ram=900000G", "VT-RESOURCE", ""),
        ("vcpus=1,vms_per_node=999999999", "VT-RESOURCE", ""),
        ("vcpus=8,host_cores=1", "VT-RESOURCE", "resources.host_cores"),
        ("vcpus=8,host_cores=999999999", "VT-RESOURCE", "resources.host_cores"),
    ],
)
def test_plans_that_cannot_be(vmgr_run: Vmgr, plan: str, code: str, said: str) -> None:
    line = vmgr_run.refuses("topology", "--root", str(small("two-nodes-smt")), "--plan", plan)
    assert line.startswith(f"{code}: ") and said in line


def test_what_a_plan_may_hold() -> None:
    assert read_plan("vcpus=4,ram=1.5G,io=1,host_cores=0,vms_per_node=2") == {
        "vcpus": 4, "ram": 1536, "io": 1, "host_cores": 0, "vms_per_node": 2,
    }  # fmt: skip
    with pytest.raises(VTorqueError, match="VT-VALUE"):
        read_plan("vcpus=4;ram=1")


def test_roots_that_are_none(vmgr_run: Vmgr, tmp_path: Path) -> None:
    for root in (tmp_path, tmp_path / "missing", Path("/dev/null")):
        line = vmgr_run.refuses("topology", "--root", str(root))
        assert line.startswith("VT-VALUE: no CPU can be seen in ") and str(root) in line


@contextmanager
def agent(node: Node, job: str, facts: dict[str, Any], start: int = 100) -> Iterator[None]:
    """The agent of a job, as far as its socket goes, with `facts` in what it says of the job."""
    place = node.place(job, start)
    lock, listener = record.create(place, {})
    ready, loop = threading.Event(), asyncio.new_event_loop()
    thread = threading.Thread(target=serve, args=(loop, listener, facts, ready))
    thread.start()
    ready.wait()
    try:
        yield
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        os.close(lock)


def serve(
    loop: asyncio.AbstractEventLoop, listener: socket.socket, facts: dict[str, Any], ready: threading.Event
) -> None:
    asyncio.set_event_loop(loop)
    progress = Progress(0, facts)
    control = Control(progress, os.geteuid(), over=lambda: None, attached=lambda: None)
    server = loop.run_until_complete(control.serve(listener))
    loop.call_soon(ready.set)
    loop.run_forever()
    server.close()
    loop.run_until_complete(control.drain(1))
    loop.run_until_complete(server.wait_closed())
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()


def test_the_guests_of_a_job(vmgr_run: Vmgr) -> None:
    cpu = min(os.sched_getaffinity(0))
    placement = a_placement(((cpu,),), emulator=(cpu,))
    facts = {"placement": {"host": [], "allowed": [cpu], "guests": {"vnode01-1": as_plain(placement)}}}
    with agent(vmgr_run.node, "12.host", facts):
        found = answer(vmgr_run, "--job", "12.host")
        (guest,) = found["guests"]
        assert guest.pop("guest") == "vnode01-1" and from_plain(guest) == placement
        assert (found["allowed"]["cpus"], found["host"]) == ([cpu], [])
        out = vmgr_run("topology", "--job", "12.host").stdout
        assert vmgr_run("topology", "--job", "12").stdout == out
        assert read_back(out)[cpu] == "A0+" and "A  vnode01-1: 1 vCPU on " in out and "(job 12.host)" in out


@pytest.mark.parametrize("job", ["13.host", "", "..", "../jobs/12.host", "1"])
def test_a_job_that_is_not_here(vmgr_run: Vmgr, job: str) -> None:
    with agent(vmgr_run.node, "12.host", {"placement": {"host": [], "allowed": [], "guests": {}}}):
        assert vmgr_run.refuses("topology", "--job", job).startswith(f"VT-VALUE: job {job} has no guests on this node")


def test_a_job_whose_guests_are_not_placed_yet(vmgr_run: Vmgr) -> None:
    with agent(vmgr_run.node, "12.host", {}):
        assert "job 12.host has no guests that are placed" in vmgr_run.refuses("topology", "--job", "12.host")


def test_an_agent_of_another_language(vmgr_run: Vmgr) -> None:
    for start, said in enumerate(
        ({}, [], {"host": 1, "allowed": [], "guests": {}}, {"host": [], "allowed": [], "guests": {"a": {}}})
    ):
        with agent(vmgr_run.node, "12.host", {"placement": said}, start):
            status, out, err = vmgr_run("topology", "--job", "12.host")
            assert status == 78 and out == "" and err.startswith("VT-AGENT: what the agent of job 12.host says")
            assert err.count("\n") == 1


def test_options_that_exclude_each_other(vmgr_run: Vmgr) -> None:
    for words in (["--root", "/"], ["--plan", "vcpus=1"], ["--cpus", "0"]):
        assert vmgr_run.refuses("topology", "--job", "12.host", *words).startswith("VT-USAGE: ")
    assert vmgr_run.refuses("topology", "--json", "--svg", "-").startswith("VT-USAGE: ")
    assert vmgr_run("topology", "more")[0] == 2


@pytest.mark.script_launch_mode("subprocess")
def test_a_terminal_that_knows_ascii_only(tmp_path: Path) -> None:
    import subprocess
    import sys

    command = [sys.executable, "-c", "import sys; from vmgr.cli import main; sys.exit(main())"]
    words = ["topology", "--root", str(small("two-nodes-smt"))]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([*command, *words], env=environment, capture_output=True, text=True, check=True)
    assert ". free" in done.stdout and " | " in done.stdout and done.stdout.isascii()
