"""What jobs and processes may use of a machine: cpusets of all ages, the batch system's word, the whole node."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nodesite import FUZZ
from topologies import recorded, small

from vmgr.errors import Code, VTorqueError
from vmgr.topology.allowed import NODE, allowed_for, cpuset_at, job_cpuset, names_a_folder, read_allowed
from vmgr.topology.cpulist import MAX_NUMBER, parse_cpus, parse_mask, show_cpus
from vmgr.topology.model import Allowed
from vmgr.topology.read import read_topology

TORQUE = "40intel64-2g2n4c+pcilocality"


def held(cpus: str, nodes: str, source: str) -> Allowed:
    found = parse_cpus(cpus), parse_cpus(nodes)
    assert found[0] is not None and found[1] is not None
    return Allowed(found[0], found[1], source)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("16amd64-8n2c-cpusets", held("0-3,5-6,12-15", "1-4", "the cpuset /dummy")),
        ("32amd64-4s2n4c-cgroup2", held("0-5", "0-5", "the cpuset /uid_2008/job_15389/step_0")),
        ("offline-cpu0-node0", held("4-20", "1", NODE)),
        ("48amd64-4pa2n6c-sparse", held("0-47", "0-2,33-34,45,72-73", NODE)),
        ("8em64t-2s2ca2c-buggynuma", held("0-7", "", NODE)),
    ],
)
def test_what_a_process_may_use(name: str, expected: Allowed) -> None:
    root = recorded(name)
    assert read_allowed(read_topology(root), root) == expected


def test_the_rule() -> None:
    """The job's own cpuset, else what the batch system assigned, else the node's."""
    root = recorded(TORQUE)
    machine = read_topology(root)
    some = frozenset({3, 5, 77})
    job = "511983.master.cm.cluster"
    own = held("27", "0-3", f"the cpuset /torque/{job}")
    assert allowed_for(machine, groups=[f"torque/{job}"], assigned=some, root=root) == own
    assert allowed_for(machine, groups=["torque/9.master"], assigned=some, root=root) == held(
        "3,5", "0-3", "the batch system"
    )
    assert allowed_for(machine, groups=["torque/9.master"], root=root) == held("0-39", "0-3", NODE)
    assert allowed_for(machine, assigned=some, root=root).source == "the batch system"
    with pytest.raises(VTorqueError, match="none of the CPUs that the batch system assigned is online: 77,80"):
        allowed_for(machine, assigned=frozenset({77, 80}), root=root)


def test_the_cpuset_of_a_job() -> None:
    root = recorded(TORQUE)
    machine = read_topology(root)
    assert job_cpuset(machine, ["torque/9.master", "torque/513099.master.cm.cluster"], root) == held(
        "0-39", "0-3", NODE
    )
    assert job_cpuset(machine, ["torque/9.master"], root) is None
    unified = small("cpuset-with-holes")
    found = job_cpuset(read_topology(unified), ["torque/12.host"], unified)
    assert found == held("2-3", "0", "the cpuset /torque/12.host")


@pytest.mark.parametrize(
    "job", ["", ".", "..", "../513099.master.cm.cluster", "a/b", "1..2", "x\0", "-1.host", "1.host\n"]
)
def test_a_job_id_is_one_folder(job: str) -> None:
    root = recorded(TORQUE)
    assert not names_a_folder(job)
    assert job_cpuset(read_topology(root), [f"torque/{job}"], root) is None
    assert names_a_folder("12[3].host.example.org")


def test_a_cgroup_without_a_cpuset_has_that_of_the_one_above(tmp_path: Path) -> None:
    root = tmp_path / "tree"
    shutil.copytree(small("cpuset-with-holes"), root)
    (root / "proc/self/cgroup").write_text("1:name=systemd:/other\n0::/batch/job.7/step/task\n")
    (root / "sys/fs/cgroup/batch/job.7/step/task").mkdir(parents=True)
    assert read_allowed(read_topology(root), root) == held("1-2,5,7", "0", "the cpuset /batch/job.7")


def test_a_path_of_another_namespace_is_the_mount_itself(tmp_path: Path) -> None:
    root = tmp_path / "tree"
    shutil.copytree(small("cpuset-with-holes"), root)
    for path in ("/kubepods/pod1\n", "/../../batch/job.7\n"):
        (root / "proc/self/cpuset").write_text(path)
        (root / "sys/fs/cgroup/cpuset.cpus.effective").write_text("0,3\n")
        assert read_allowed(read_topology(root), root) == held("0,3", "0", "the cpuset /")


def test_a_mount_point_with_a_blank(tmp_path: Path) -> None:
    root = tmp_path / "tree"
    shutil.copytree(small("cpuset-with-holes"), root)
    (root / "proc/mounts").write_text(r"none /dev/cpu\040set cgroup rw,cpuset,noprefix 0 0" "\n")
    (root / "dev/cpu set/batch/job.7").mkdir(parents=True)
    (root / "dev/cpu set/batch/job.7/cpus").write_text("4\n")
    assert read_allowed(read_topology(root), root).cpus == {4}  # its memory is not said: all of it
    assert read_allowed(read_topology(root), root).nodes == {0}


def test_an_empty_cpuset_allows_nothing(tmp_path: Path) -> None:
    root = tmp_path / "tree"
    shutil.copytree(small("cpuset-with-holes"), root)
    (root / "sys/fs/cgroup/torque/12.host/cpuset.cpus.effective").write_text("\n")
    machine = read_topology(root)
    assert cpuset_at(machine, "sys/fs/cgroup/torque/12.host", root) == held("", "0", "/sys/fs/cgroup/torque/12.host")
    assert cpuset_at(machine, "sys/fs/cgroup/torque", root) is None
    with pytest.raises(VTorqueError, match=r"/torque/12\.host has no CPU that is online") as caught:
        allowed_for(machine, groups=["torque/12.host"], root=root)
    assert caught.value.code is Code.NODE


def test_this_process() -> None:
    """Its own affinity, whatever its cpuset says."""
    machine = read_topology()
    before = os.sched_getaffinity(0)
    assert read_allowed(machine).cpus == before
    if len(before) < 2:
        pytest.skip("one CPU cannot be narrowed")
    one = min(before)
    os.sched_setaffinity(0, {one})
    try:
        assert read_allowed(machine)[::2] == ({one}, "the affinity of this process")
    finally:
        os.sched_setaffinity(0, before)


def test_lists_of_cpus() -> None:
    assert parse_cpus("0-3,8") == {0, 1, 2, 3, 8} and parse_cpus("") == frozenset() and parse_cpus("5,5,4-5") == {4, 5}
    for odd in (
        "3-1",
        "1-",
        "-1",
        "1,,2",
        ",",
        "1 2",
        " 1",
        "1\n",
        "0x1",
        "a",
        "\u0661",
        "1-2-3",
        "1-2:1/2",
        str(MAX_NUMBER + 1),
    ):
        assert parse_cpus(odd) is None, odd
    assert parse_cpus("0-999999") is None and parse_cpus("1," * 100_000 + "1") is None
    assert show_cpus([]) == "none" and show_cpus({8, 3, 1, 2}) == "1-3,8"


def test_masks_of_cpus() -> None:
    assert parse_mask("0000,00000011,11111111") == {*range(0, 32, 4), 32, 36} and parse_mask("ff") == set(range(8))
    for odd in ("", ",", "0x1", "1,2", "g", "1 ", "-1", "123456789", "f" * 8 + ",00000000" * 600):
        assert parse_mask(odd) is None, odd


@FUZZ
@given(st.frozensets(st.integers(0, MAX_NUMBER), min_size=1, max_size=60))
def test_what_is_shown_is_read(cpus: frozenset[int]) -> None:
    assert parse_cpus(show_cpus(cpus)) == cpus
    mask = sum(1 << cpu for cpu in cpus)
    words = [f"{mask >> 32 * word & 0xFFFFFFFF:08x}" for word in range(mask.bit_length() // 32 + 1)]
    assert parse_mask(",".join(reversed(words))) == cpus


@FUZZ
@given(st.text(st.sampled_from("0123456789,- x\n"), max_size=30) | st.text(max_size=30))
def test_no_text_confuses_the_parsers(text: str) -> None:
    for found in (parse_cpus(text), parse_mask(text)):
        assert found is None or all(0 <= cpu <= MAX_NUMBER for cpu in found)


@FUZZ
@given(st.sampled_from(["proc/mounts", "proc/self/cgroup", "proc/self/cpuset"]), st.text(max_size=80))
def test_no_text_confuses_the_search(tmp_path: Path, path: str, text: str) -> None:
    """Mounts and paths of any text: found, or not, and never outside of the tree."""
    root = tmp_path / "tree"
    if not root.exists():
        shutil.copytree(small("cpuset-with-holes"), root)
    before = (root / path).read_text() if (root / path).exists() else None
    (root / path).write_text(text)
    machine = read_topology(root)
    assert read_allowed(machine, root).cpus in ({1, 2, 5, 7}, frozenset(range(8)))
    assert job_cpuset(machine, ["torque/12.host"], root) in (None, held("2-3", "0", "the cpuset /torque/12.host"))
    if before is None:
        (root / path).unlink()
    else:
        (root / path).write_text(before)
