"""CPUs and memory of a node, given away to the guests of one attempt at a time, and never twice."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator, Sequence

import pytest
from nodesite import Node, a_spec, a_user, an_image, make_node, short_folder

from vmgr.config import Config
from vmgr.errors import Code, VTorqueError
from vmgr.jobspec import GuestGroup, Pinning
from vmgr.node import placing, record
from vmgr.node.allocation import Allocation
from vmgr.node.guestjob import Job
from vmgr.node.hookcall import GroupPath
from vmgr.node.network.plan import plan_network
from vmgr.node.placing import Seats, find_seats
from vmgr.node.resuming import Resumption
from vmgr.node.workspace import JobNames
from vmgr.suspended.entry import Entry, NodePart, SavedGuest
from vmgr.topology.model import Allowed, Cell, Cpu, Layout, NumaNode, Topology

AUTO, OFF = Pinning("auto", None), Pinning("off", None)
SMALL = Topology(
    tuple(Cpu(number, number, number // 4, number // 4) for number in range(8)),
    (NumaNode(0, 4096, {2048: (1024, 512)}), NumaNode(1, 4096, {2048: (1024, 100)})),
    {(0, 0): 10, (0, 1): 21, (1, 0): 21, (1, 1): 10},
    8192,
)


def mapped(*listed: str) -> Pinning:
    return Pinning("map", (listed,))


def use(monkeypatch: pytest.MonkeyPatch, *cpus: int) -> list[dict[str, object]]:
    """A machine with two NUMA nodes of which a job may use these CPUs; gives what is asked about jobs."""
    asked: list[dict[str, object]] = []

    def allowed(topology: Topology, **about: object) -> Allowed:
        asked.append(about)
        return Allowed(frozenset(cpus), frozenset((0, 1)), "the node")

    monkeypatch.setattr(placing, "read_topology", lambda: SMALL)
    monkeypatch.setattr(placing, "allowed_for", allowed)
    return asked


@pytest.fixture
def node() -> Iterator[Node]:
    with short_folder() as base:
        yield make_node(base, resources={"host_cores": 0})


@pytest.fixture
def held() -> Iterator[list[int]]:
    locks: list[int] = []
    yield locks
    for lock in locks:
        os.close(lock)


def a_job(
    node: Node,
    locks: list[int],
    number: int,
    pinning: Pinning = AUTO,
    *,
    slots: frozenset[int] = frozenset(),
    **size: int,
) -> Job:
    """A job whose agent lives: it holds its lock."""
    place = node.place(f"{number}.host")
    lock, listener = record.create(place, {})
    listener.close()
    locks.append(lock)
    group = GuestGroup("micro", **{"per_node": 1, "vcpus": 1, "ram_mib": 512, **size})
    network = plan_network("user", f"{number}.host", ["n1"], group.per_node, node.config.network)
    return Job(
        f"{number}.host", place, a_user(), a_spec(groups=(group,), pinning=pinning), an_image(node.base),
        Allocation(("n1",), 0, "key", slots), network, (), JobNames("/home/carol", "carol", "1.host", None), None,
        groups=(GroupPath("torque", f"{number}.host"),),
    )  # fmt: skip


def seats(config: Config, job: Job) -> Seats:
    return asyncio.run(find_seats(config, job))


def vcpus(found: Seats) -> list[Sequence[Sequence[int]]]:
    return [placement.vcpus for placement in found.guests if placement is not None]


def test_attempts_get_cpus_and_memory_of_their_own(
    node: Node, held: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, 0, 1, 2)
    first, second, third = (a_job(node, held, number, vcpus=2 - (number > 12)) for number in (12, 13, 14))
    given = [cpus for found in (seats(node.config, first), seats(node.config, second)) for cpus in vcpus(found)[0]]
    assert sorted(given) == [(0,), (1,), (2,)]
    with pytest.raises(VTorqueError, match="0 of 3 CPUs") as caught:
        seats(node.config, third)
    assert caught.value.code is Code.NODE
    os.close(held.pop(0))  # the first one's agent dies
    assert seats(node.config, third).guests


def test_attempts_at_once_share_nothing(node: Node, held: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, *range(8))
    chosen: list[int] = []

    def take(job: Job) -> None:
        chosen.extend(cpu for guest in vcpus(seats(node.config, job)) for cpus in guest for cpu in cpus)

    threads = [threading.Thread(target=take, args=(a_job(node, held, number),)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(chosen) == list(range(8))


def test_ram_that_is_bound_is_counted(node: Node, held: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, *range(8))
    for number, mib in ((1, 3000), (2, 3000)):
        found = seats(node.config, a_job(node, held, number, ram_mib=mib))
        assert found.guests[0] is not None and len(found.guests[0].memory) == 1
    with pytest.raises(VTorqueError) as caught:
        seats(node.config, a_job(node, held, 3, ram_mib=3000))
    assert caught.value.code is Code.NODE


def going_on(job: Job, layout: Layout) -> Job:
    """The same job, whose guest has had this layout before it was suspended."""
    saved = SavedGuest(0, "vn9-1", "02:00:00:00:00:01", None, layout, 1, None)
    entry = Entry("1.host", "carol", "a" * 64, "micro@1", "key", 1, 1, 0, 0)
    part = NodePart(0, "ssh-ed25519 " + "A" * 68, "tcg", "7.2.22", (saved,))
    return job._replace(resumption=Resumption(entry, (part,), None))  # type: ignore[arg-type]


def test_a_guest_that_goes_on_sits_like_a_new_one_and_sees_what_it_saw(
    node: Node, held: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, *range(8))
    job = a_job(node, held, 1, vcpus=2)
    fresh = seats(node.config, job)
    (new,) = fresh.guests
    assert new is not None and new.layout.cells[0].host_node == 0
    os.close(held.pop())
    threads = Layout(1, 1, 2, (Cell((0, 1), 512, None),), ((10,),))
    apart = Layout(2, 1, 1, (Cell((0,), 256, None), Cell((1,), 256, None)), ((10, 40), (40, 10)))
    for number, layout in enumerate((threads, apart), start=2):
        job = going_on(a_job(node, held, number, vcpus=2), layout)
        found = seats(node.config, job)
        (placement,) = found.guests
        assert placement is not None and placement.vcpus == new.vcpus
        bound = layout._replace(cells=tuple(cell._replace(host_node=0) for cell in layout.cells))
        assert found.layout(0, job.group) == placement.layout == bound and placement.memory == (0,)
        (step,) = (step for step in record.steps(job.place) if step.get("do") == "cpus")
        assert step["memory"] == {"0": 512}
        os.close(held.pop())
    found = seats(node.config, going_on(a_job(node, held, 4, OFF, vcpus=2), apart))
    assert found.guests == (None,) and found.layout(0, job.group) == apart


def test_a_floating_guest_takes_no_seat(node: Node, held: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, 0)
    job = a_job(node, held, 1, OFF, vcpus=4, per_node=2)
    found = seats(node.config, job)
    assert found == Seats((None, None), None)
    assert found.layout(1, job.group) == Layout.flat(4, 512)
    assert [step for step in record.steps(job.place) if step.get("do") == "cpus"] == []


def test_a_mapping_takes_the_seats_that_it_names(node: Node, held: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, 0, 1, 2, 3)
    assert vcpus(seats(node.config, a_job(node, held, 1, mapped("1-2", "1"), vcpus=2))) == [((1, 2), (1,))]
    for pinning in (mapped("2"), mapped("4")):
        with pytest.raises(VTorqueError, match="vCPU 0 cannot be bound"):
            seats(node.config, a_job(node, held, 2 + len(held), pinning))


def test_what_is_shown_of_it(node: Node, held: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, *range(4))
    found = seats(node.config, a_job(node, held, 1, vcpus=2))
    assert (
        found.shown is not None and found.shown["allowed"] == [0, 1, 2, 3] and list(found.shown["guests"]) == ["vn1-1"]
    )


@pytest.mark.parametrize(("setting", "passed"), [(False, None), (True, frozenset({4, 5}))])
def test_slots_count_as_cpus_where_the_site_says_so(
    setting: bool, passed: object, held: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = use(monkeypatch, *range(8))
    with short_folder() as base:
        node = make_node(base, resources={"slots_are_cpus": setting})
        seats(node.config, a_job(node, held, 7, slots=frozenset({4, 5})))
        seats(node.config, a_job(node, held, 8))
    assert asked == [{"groups": ["torque/7.host"], "assigned": passed}, {"groups": ["torque/8.host"], "assigned": None}]


@pytest.mark.parametrize("pinning", [AUTO, OFF])
def test_huge_pages_that_are_promised_and_missing(
    pinning: Pinning, held: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, *range(8))
    with short_folder() as base:
        node = make_node(base, hypervisor={"hugepages": "2M"})
        assert seats(node.config, a_job(node, held, 1, pinning, ram_mib=1024)).guests
        with pytest.raises(VTorqueError, match="huge pages") as caught:
            seats(node.config, a_job(node, held, 2, pinning, ram_mib=4096))
    assert caught.value.code is Code.NODE


def test_a_machine_without_numa_nodes(node: Node, held: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, *range(4))
    flat = Topology(tuple(Cpu(number, number, 0, None) for number in range(4)), (), {}, 4096, {2048: (512, 256)})
    monkeypatch.setattr(placing, "read_topology", lambda: flat)
    first = seats(node.config, a_job(node, held, 1, ram_mib=3000)).guests[0]
    assert first is not None and first.memory == () and first.layout.cells[0].host_node is None
    with pytest.raises(VTorqueError):
        seats(node.config, a_job(node, held, 2, ram_mib=3000))
    with short_folder() as base:
        huge = make_node(base, hypervisor={"hugepages": "2M"})
        assert seats(huge.config, a_job(huge, held, 3, OFF, ram_mib=512)).guests == (None,)
        with pytest.raises(VTorqueError, match="514 MiB of RAM do not fit: 512 MiB are free in huge pages"):
            seats(huge.config, a_job(huge, held, 4, OFF, ram_mib=514))
        with pytest.raises(VTorqueError, match="no whole number of huge pages"):
            seats(huge.config, a_job(huge, held, 5, OFF, ram_mib=513))


def test_a_mapping_to_numbers_that_no_cpu_has(node: Node, held: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, 0)
    with pytest.raises(VTorqueError, match="vCPU 0 cannot be bound to the CPUs 99999"):
        seats(node.config, a_job(node, held, 1, mapped("99999")))
