"""Pinning and the room for overlays: what a node gives away, and what it never gives away twice."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nodesite import FUZZ, Node, an_image, make_node, plain_qcow2, short_folder

from vmgr.errors import Code, VTorqueError
from vmgr.jobspec import Pinning
from vmgr.node import cpus, record
from vmgr.node.cpus import map_cpus, plan_cpus, reserve, show_cpus, usable_cpus
from vmgr.node.stage import create_overlay, reserve_overlay

TWO = {0: {0, 1, 2, 3}, 1: {4, 5, 6, 7}}
AUTO, OFF = Pinning("auto", None), Pinning("off", None)


def mapped(*listed: str) -> Pinning:
    return Pinning("map", (listed,))


@pytest.fixture
def node() -> Iterator[Node]:
    with short_folder() as base:
        yield make_node(base, images={"overlays_max": "100M"}, hypervisor={"overcommit_cpus": False})


def attempt(node: Node, job_id: str) -> tuple[record.Place, int]:
    place = node.place(job_id)
    lock, listener = record.create(place, {})
    listener.close()
    return place, lock


@pytest.mark.parametrize(
    ("vcpus", "used", "chosen"),
    [
        (1, {}, [0]),
        (4, {}, [0, 1, 2, 3]),
        (2, {0: 1}, [1, 2]),  # the node with the least to spare
        (3, {0: 1, 1: 1}, [4, 5, 6]),
        (5, {}, [0, 1, 2, 3, 4]),  # from as few nodes as possible
        (5, {0: 1}, [4, 5, 6, 7, 1]),
        (8, {}, [0, 1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_where_vcpus_go(vcpus: int, used: dict[int, int], chosen: list[int]) -> None:
    assert plan_cpus(vcpus, TWO, Counter(used), overcommit=False) == chosen


def test_too_few_cpus_are_refused_by_name() -> None:
    with pytest.raises(VTorqueError, match="9 vCPUs do not fit: 8 of 8 CPUs") as caught:
        plan_cpus(9, TWO, Counter(), overcommit=False)
    assert caught.value.code is Code.NODE
    with pytest.raises(VTorqueError, match="2 vCPUs do not fit: 1 of 2"):
        plan_cpus(2, {0: {0, 1}}, Counter({0: 1}), overcommit=False)


def test_overcommitted_vcpus_go_where_the_load_is_least() -> None:
    assert plan_cpus(3, {0: {0, 1}}, Counter(), overcommit=True) == [0, 1, 0]
    assert plan_cpus(2, {0: {0, 1}}, Counter({0: 2}), overcommit=True) == [1, 1]


def test_without_any_cpu_overcommitting_does_not_help() -> None:
    with pytest.raises(VTorqueError):
        plan_cpus(1, {0: set()}, Counter(), overcommit=True)


_NODES = st.lists(st.integers(0, 6), min_size=1, max_size=4).map(
    lambda sizes: {n: set(range(n * 10, n * 10 + size)) for n, size in enumerate(sizes)}
)
_USED = st.dictionaries(st.integers(0, 36), st.integers(0, 3)).map(Counter)


@FUZZ
@given(st.integers(1, 30), _NODES, _USED, st.booleans())
def test_what_every_plan_keeps(vcpus: int, nodes: dict[int, set[int]], used: Counter[int], overcommit: bool) -> None:
    every = set().union(*nodes.values())
    free = {cpu for cpu in every if not used[cpu]}
    before = Counter(used)
    try:
        chosen = plan_cpus(vcpus, nodes, used, overcommit=overcommit)
    except VTorqueError:
        assert vcpus > len(free) and (not overcommit or not every)
        return
    assert used == before and len(chosen) == vcpus and set(chosen) <= every
    if vcpus <= len(free):
        assert set(chosen) <= free and len(set(chosen)) == vcpus, "none is shared while there are enough"
        touched = sum(1 for cpus_ in nodes.values() if cpus_ & set(chosen))
        rooms = sorted((len(cpus_ & free) for cpus_ in nodes.values()), reverse=True)
        assert touched == next(n for n in range(1, len(rooms) + 1) if sum(rooms[:n]) >= vcpus)
    else:
        assert overcommit
        load = used + Counter(chosen)
        loads = [load[cpu] for cpu in chosen]
        assert max(loads) <= min(load[cpu] for cpu in every) + 1, "spread evenly"


def test_the_cpus_of_this_node() -> None:
    assert set().union(*usable_cpus().values()) == os.sched_getaffinity(0)


def test_two_attempts_get_cpus_of_their_own(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpus, "usable_cpus", lambda: {0: {0, 1, 2}})
    (first, lock), (second, other) = attempt(node, "12.host"), attempt(node, "13.host")
    assert reserve(node.config, first, AUTO, 2, 1) == [[{0}, {1}]]
    assert reserve(node.config, second, AUTO, 1, 1) == [[{2}]]
    third, last = attempt(node, "14.host")
    with pytest.raises(VTorqueError, match="0 of 3 CPUs"):
        reserve(node.config, third, AUTO, 1, 1)
    os.close(lock)  # the first one's agent dies
    assert reserve(node.config, third, AUTO, 1, 2) == [[{0}], [{1}]]
    for fd in (other, last):
        os.close(fd)


def test_attempts_at_once_share_nothing(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpus, "usable_cpus", lambda: {0: set(range(8))})
    held = [attempt(node, f"{n}.host") for n in range(8)]
    chosen: list[int] = []

    def take(place: record.Place) -> None:
        chosen.extend(
            cpu for guest in reserve(node.config, place, AUTO, 1, 1) for cpus_ in guest or [] for cpu in cpus_
        )

    threads = [threading.Thread(target=take, args=(place,)) for place, _ in held]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(chosen) == list(range(8))
    for _, lock in held:
        os.close(lock)


# a mapping of the user's own, and none


@pytest.mark.parametrize(
    ("listed", "cpus_"),
    [
        (["0"], [{0}]),
        (["4-5,8", "0", "8,4"], [{4, 5, 8}, {0}, {4, 8}]),
        (["0-8"], [{0, 1, 2, 3, 4, 5, 8}]),
        (["5-5,05"], [{5}]),
    ],
)
def test_a_mapping_is_met_exactly(listed: list[str], cpus_: list[set[int]]) -> None:
    usable = {0, 1, 2, 3, 4, 5, 8} | ({6, 7} if "0-8" in listed else set())
    expected = [{*range(9)}] if "0-8" in listed else cpus_
    assert map_cpus(listed, usable, Counter(), overcommit=False) == expected


@pytest.mark.parametrize(
    ("listed", "said"),
    [
        (["0", "4"], "vCPU 1 cannot be bound to the CPUs 4; guests may use 0-2,8 of this node"),
        (["1-3"], "vCPU 0 cannot be bound to the CPUs 1-3, of which 3 may not be; guests may use 0-2,8 of this node"),
        (["2-1"], "vCPU 0 cannot be bound to the CPUs 2-1; "),
        (["0-99999,0-99999"], "vCPU 0 cannot be bound to the CPUs 0-99999,0-99999; "),
    ],
)
def test_a_mapping_to_what_may_not_be_used_is_refused(listed: list[str], said: str) -> None:
    for overcommit in (False, True):
        with pytest.raises(VTorqueError) as caught:
            map_cpus(listed, {0, 1, 2, 8}, Counter(), overcommit=overcommit)
        assert caught.value.code is Code.NODE and said in str(caught.value)


def test_a_mapping_to_what_another_guest_has_is_refused_unless_the_site_allows_it() -> None:
    used = Counter({1: 1, 2: 1})
    with pytest.raises(VTorqueError, match="vCPU 1 cannot be bound to the CPUs 0-2: 1-2 in use by another") as caught:
        map_cpus(["0", "0-2"], {0, 1, 2, 3}, used, overcommit=False)
    assert caught.value.code is Code.NODE and "overcommit_cpus" in str(caught.value)
    assert map_cpus(["0", "0-2"], {0, 1, 2, 3}, used, overcommit=True) == [{0}, {0, 1, 2}]


@FUZZ
@given(st.sets(st.integers(0, 70)), st.sets(st.integers(0, 70), min_size=1))
def test_lists_of_cpus_are_read_as_they_are_shown(cpus_: set[int], usable: set[int]) -> None:
    text = show_cpus(cpus_)
    if not cpus_:
        assert text == "none"
    elif cpus_ <= usable:
        assert map_cpus([text], usable, Counter(), overcommit=False) == [cpus_]
    else:
        with pytest.raises(VTorqueError):
            map_cpus([text], usable, Counter(), overcommit=True)


def test_mapped_cpus_are_reserved_and_a_floating_guest_reserves_none(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpus, "usable_cpus", lambda: {0: {0, 1}, 1: {2, 3}})
    held = [attempt(node, f"{n}.host") for n in range(4)]
    (first, _), (second, _), (third, _), (fourth, _) = held
    assert reserve(node.config, first, OFF, 4, 2) == [None, None]
    assert reserve(node.config, second, mapped("1-2", "1"), 2, 1) == [[{1, 2}, {1}]]
    assert reserve(node.config, third, AUTO, 2, 1) == [[{0}, {3}]]
    for pinning in (mapped("2"), mapped("3"), AUTO):
        with pytest.raises(VTorqueError):
            reserve(node.config, fourth, pinning, 1, 1)
    assert reserve(node.config, fourth, OFF, 1, 1) == [None]
    assert [step for step in record.steps(fourth) if step.get("do") == "cpus"] == []
    for _, lock in held:
        os.close(lock)


# overlays


def test_overlays_are_counted_with_what_they_may_grow_to(node: Node) -> None:
    image = an_image(node.base, virtual_size=40 << 20)
    places = [attempt(node, f"{n}.host") for n in range(3)]
    paths = [reserve_overlay(node.config, place, image, "vnode-1") for place, _ in places[:2]]
    assert len(set(paths)) == 2 and all(path.parent == node.config.images.overlays for path in paths)
    assert node.config.images.overlays.stat().st_mode & 0o777 == 0o700
    with pytest.raises(VTorqueError, match="40 MiB does not fit: 80 of 100 MiB") as caught:
        reserve_overlay(node.config, places[2][0], image, "vnode-1")
    assert caught.value.code is Code.STAGE and "images.overlays_max" in str(caught.value)
    reserve_overlay(node.config, places[2][0], an_image(node.base, virtual_size=20 << 20), "vnode-1")
    for _, lock in places:
        os.close(lock)


def test_overlays_reserved_at_once_stay_below_the_bound(node: Node) -> None:
    image = an_image(node.base, virtual_size=40 << 20)
    places = [attempt(node, f"{n}.host") for n in range(8)]
    granted: list[Path] = []

    def ask(place: record.Place) -> None:
        try:
            granted.append(reserve_overlay(node.config, place, image, "vnode-1"))
        except VTorqueError:
            pass

    threads = [threading.Thread(target=ask, args=(place,)) for place, _ in places]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(granted) == 2
    for _, lock in places:
        os.close(lock)


def test_an_overlay_of_a_real_disk(tmp_path: Path) -> None:
    disk, overlay = plain_qcow2(tmp_path / "a,b.qcow2", 48), tmp_path / "overlay.qcow2"
    old = os.umask(0o077)  # the agent's
    try:
        asyncio.run(create_overlay(disk, overlay, backing_format="qcow2"))
    finally:
        os.umask(old)
    told = json.loads(subprocess.check_output(["qemu-img", "info", "--output=json", str(overlay)]))
    assert (told["virtual-size"], told["backing-filename"], told["backing-filename-format"]) == (
        48 << 20,
        str(disk),
        "qcow2",
    )
    assert overlay.stat().st_mode & 0o777 == 0o600 and overlay.stat().st_size < 1 << 20


@pytest.mark.skipif(shutil.which("qemu-img") is None, reason="needs qemu-img")
def test_an_overlay_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VTorqueError, match=r"cannot create the overlay .*absent") as caught:
        asyncio.run(create_overlay(tmp_path / "absent", tmp_path / "overlay", backing_format="qcow2"))
    assert caught.value.code is Code.STAGE
