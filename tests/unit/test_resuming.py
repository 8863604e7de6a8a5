"""What is stored of a suspended job, held against the job that is to go on: the user's word against root's."""

from __future__ import annotations

import asyncio
from typing import Any, Optional

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nodesite import FUZZ

from vmgr.config import Mount
from vmgr.errors import Code, VTorqueError
from vmgr.jobspec import GuestGroup
from vmgr.node import resuming
from vmgr.node.allocation import Allocation
from vmgr.node.incoming import shown_version
from vmgr.node.members import plan_members
from vmgr.node.network.plan import NetworkPlan
from vmgr.node.resuming import Ask, Resumption
from vmgr.suspended.entry import Entry, NodePart, SavedGuest
from vmgr.topology.model import Cell, Layout

MIB = 1 << 20
GROUP = GuestGroup("micro", 2, 2, 512)
ASK = Ask("12.host", "carol", "a" * 64, GROUP)
ALLOCATION = Allocation(("n7", "n8.site"), 0, "b" * 16)
ENTRY = Entry("12.host", "carol", "a" * 64, "micro@3", "c" * 16, 2, 2, 1_700_000_000, 60)
MEMBERS = tuple(
    member._replace(address=f"10.0.0.{member.rank + 1}")
    for member in plan_members("12.host", ALLOCATION.nodes, 2, "02:56")
)
NETWORK = NetworkPlan("job", MEMBERS, 7, "10.0.0.0/29", ("10.0.0.6", "10.0.0.5"))


def a_guest(rank: int, **fields: Any) -> SavedGuest:
    member = MEMBERS[rank]
    name = f"vold{member.node}-{member.number}"
    found = SavedGuest(rank, name, member.mac, member.address, Layout.flat(2, 512), 100 * MIB, 5 * MIB)
    return found._replace(**fields)


PARTS = tuple(
    NodePart(node, "ssh-ed25519 " + "A" * 68, "tcg", "7.2.22", (a_guest(2 * node), a_guest(2 * node + 1)))
    for node in range(2)
)


class InMemory:
    """A store with one entry, or none."""

    def __init__(self, there: Optional[tuple[Entry, tuple[NodePart, ...]]]) -> None:
        self._there = there

    async def find(self, job_id: str) -> Optional[tuple[Entry, tuple[NodePart, ...]]]:
        assert job_id == "12.host"
        return self._there

    async def open(self, job_id: str, name: str) -> tuple[int, int]:
        raise AssertionError

    async def remove(self, job_id: str) -> None:
        raise AssertionError


def found(entry: Entry = ENTRY, parts: tuple[NodePart, ...] = PARTS) -> Resumption:
    return Resumption(entry, parts, InMemory(None))


def refusal(check: Any, *arguments: Any, code: Code = Code.SUSPEND, **named: Any) -> str:
    with pytest.raises(VTorqueError) as caught:
        check(*arguments, **named)
    assert caught.value.code is code and caught.value.hint
    return caught.value.message


def test_an_entry_that_fits_is_taken_wherever_the_job_is_now() -> None:
    stored = InMemory((ENTRY, PARTS))
    assert asyncio.run(resuming.find(stored, ASK, ALLOCATION)) == Resumption(ENTRY, PARTS, stored)
    assert asyncio.run(resuming.find(InMemory(None), ASK, ALLOCATION)) is None
    for image in ("micro", "micro@3"):
        resuming.check_entry(found(), ASK._replace(group=GROUP._replace(image=image)), ALLOCATION)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("job_id", "13.host", "the job there is 13.host, not 12.host"),
        ("user", "dave", "the user there is dave, not carol"),
        ("spec_sha256", "d" * 64, "the SHA-256 of the specification there is ddd"),
        ("nodes", 3, "the number of nodes there is 3, not 2"),
        ("per_node", 1, "the number of guests on a node there is 1, not 2"),
        ("key", "b" * 16, "it is of this very attempt (bbbbbbbbbbbbbbbb)"),
        ("image", "minor@3", "its image is minor@3, and the job asks for micro"),
    ],
)
def test_another_jobs_entry_is_refused(field: str, value: object, said: str) -> None:
    entry = ENTRY._replace(**{field: value})
    message = refusal(resuming.check_entry, found(entry), ASK, ALLOCATION)
    assert message.startswith("what is stored of the suspended job 12.host does not fit: ") and said in message


def test_a_revision_that_is_asked_for_is_the_one_that_is_stored() -> None:
    ask = ASK._replace(group=GROUP._replace(image="micro@4"))
    assert "the job asks for micro@4" in refusal(resuming.check_entry, found(), ask, ALLOCATION)


@pytest.mark.parametrize("parts", [PARTS[:1], (PARTS[1], PARTS[0]), (PARTS[0], PARTS[0]), (*PARTS, PARTS[1])])
def test_a_part_for_each_node_is_needed(parts: tuple[NodePart, ...]) -> None:
    assert "not one part for each of 2 nodes" in refusal(resuming.check_entry, found(parts=parts), ASK, ALLOCATION)


def with_guest(number: int, **fields: Any) -> Resumption:
    parts = [
        part._replace(
            guests=tuple(guest._replace(**fields) if guest.rank == number else guest for guest in part.guests)
        )
        for part in PARTS
    ]  # fmt: skip
    return found(parts=tuple(parts))


def test_guests_keep_their_names_and_nothing_else_is_taken_from_the_entry() -> None:
    network = resuming.resumed_network(NETWORK, found(), ASK)
    assert [member.name for member in network.members] == ["vold0-1", "vold0-2", "vold1-1", "vold1-2"]
    assert [member._replace(name="") for member in network.members] == [m._replace(name="") for m in MEMBERS]
    assert network._replace(members=()) == NETWORK._replace(members=())


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"rank": 3}, "the rank of guest 2 there is 3, not 2"),
        ({"mac": "02:56:00:00:00:00"}, "the MAC address of guest 2 there is 02:56:00:00:00:00"),
        ({"address": "10.0.0.9"}, "the address of guest 2 there is 10.0.0.9, not 10.0.0.3"),
        ({"address": None}, "the address of guest 2 there is None"),
        ({"name": "vold1-2"}, "vold1-2 is not how guest 1 of a node is called"),
        ({"name": "old1-1"}, "old1-1 is not how"),
        ({"name": "vold1-1x"}, "vold1-1x is not how"),
        ({"name": "vold0-1"}, "two of its guests have the same name"),
    ],
)
def test_a_guest_that_is_none_of_the_job_is_refused(fields: dict[str, Any], said: str) -> None:
    assert said in refusal(resuming.resumed_network, NETWORK, with_guest(2, **fields), ASK)


def test_guests_of_another_number_are_refused() -> None:
    short = (PARTS[0], PARTS[1]._replace(guests=PARTS[1].guests[:1]))
    assert "it has 3 guests, not 4" in refusal(resuming.resumed_network, NETWORK, found(parts=short), ASK)
    shifted = (PARTS[0]._replace(guests=(*PARTS[0].guests, a_guest(2))), PARTS[1]._replace(guests=(a_guest(3),)))
    assert "node 1 has not 2 guests there" in refusal(resuming.resumed_network, NETWORK, found(parts=shifted), ASK)


@FUZZ
@given(st.text(min_size=1, max_size=70) | st.from_regex(r"v[a-z.0-9/-]*-[0-9]\n?"))
def test_a_name_that_is_taken_can_be_part_of_a_files_name(name: str) -> None:
    try:
        resuming.resumed_network(NETWORK, with_guest(0, name=name), ASK)
    except VTorqueError as err:
        assert err.code is Code.SUSPEND
    else:
        assert name.rpartition("-")[2] == "1"
        assert set(name) <= set("-0123456789") | set(map(chr, [*range(65, 91), *range(97, 123)]))


def test_machines_are_those_that_the_job_asks_for() -> None:
    resuming.check_machines(PARTS[0], ASK, disk_bytes=64 * MIB)
    without = PARTS[0]._replace(guests=tuple(guest._replace(overlay_bytes=None) for guest in PARTS[0].guests))
    resuming.check_machines(without, ASK, disk_bytes=None)
    for fields, disk_bytes, said in (
        ({"layout": Layout.flat(3, 512)}, 64 * MIB, "vold0-1 has 3 vCPUs there, not 2"),
        ({"layout": Layout.flat(2, 513)}, 64 * MIB, "vold0-1 has 513 MiB of RAM there, not 512"),
        ({"state_bytes": 1 << 30}, 64 * MIB, "the state of vold0-1 takes 1073741824 bytes, more than"),
        ({"overlay_bytes": None}, 64 * MIB, "vold0-1 has no disk there"),
        ({}, None, "vold0-1 has a disk there"),
        ({"overlay_bytes": 1 << 30}, 64 * MIB, "the disk of vold0-1 takes 1073741824 bytes, more than"),
    ):
        part = with_guest(0, **fields).parts[0]
        assert said in refusal(resuming.check_machines, part, ASK, disk_bytes=disk_bytes)


def test_the_hypervisor_is_compared() -> None:
    resuming.check_accelerator(PARTS[0], "tcg")
    assert "suspended under emulation, and this node has KVM" in refusal(
        resuming.check_accelerator, PARTS[0], "kvm", code=Code.LAUNCH
    )
    for running in ("7.2.22", "7.2.0 (Debian 1:7.2+dfsg)", "7.2"):
        resuming.check_version("7.2.22 (Debian)", running)
    for running in ("7.20.22", "8.2.22", "7.1.22", "", "x7.2"):
        assert "were suspended by QEMU 7.2.22" in refusal(resuming.check_version, "7.2.22", running, code=Code.LAUNCH)
    refusal(resuming.check_version, "7.200000.1", "7.2.1", code=Code.LAUNCH)


def test_the_version_that_qemu_says() -> None:
    answer = {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "Debian 1:7.2+dfsg-7"}
    assert shown_version(answer) == "7.2.22 (Debian 1:7.2+dfsg-7)"
    assert shown_version({**answer, "package": ""}) == "7.2.22"
    assert len(shown_version({**answer, "package": "x\n" * 1000})) == 128
    for wrong in ({}, {"qemu": {}}, {"qemu": {**answer["qemu"], "major": "many"}}):  # type: ignore[dict-item]
        with pytest.raises((KeyError, ValueError)):
            shown_version(wrong)


def cells(*each: tuple[tuple[int, ...], int, Optional[int]]) -> Layout:
    return Layout(1, 4, 1, tuple(Cell(*cell) for cell in each), ((10,) * len(each),) * len(each))


def test_ram_is_bound_where_a_new_guest_would_have_it() -> None:
    saved = cells(((0, 1), 256, None), ((2, 3), 256, None))
    same = cells(((0, 1), 256, 4), ((2, 3), 256, 7))
    assert resuming.bound(saved, same) == same
    assert resuming.bound(saved, cells(((0, 1, 2, 3), 512, 3))) == cells(((0, 1), 256, 3), ((2, 3), 256, 3))
    assert resuming.bound(saved, cells(((0,), 256, 0), ((1, 2, 3), 256, 1))) == saved
    assert resuming.bound(saved, Layout.flat(4, 512)) == saved
    distances = saved._replace(distances=((10, 40), (40, 10)), sockets=2, cores=2)
    assert resuming.bound(distances, same)._replace(cells=()) == distances._replace(cells=())


def test_nodes_that_go_on_from_elsewhere_are_noticed() -> None:
    resuming.check_alike(None, "n8", None)
    resuming.check_alike(found(), "n8", resuming.told(found()))
    for here, said in ((None, "c" * 16), (found(), None), (found(), "d" * 16)):
        assert "n8 does not have the job go on" in refusal(resuming.check_alike, here, "n8", said)


def test_shares_are_by_9p_where_the_guests_can_be_suspended() -> None:
    share = Mount("home", "virtiofs", "/home/carol", "/home/carol", False)
    assert share.as_saved() == share._replace(kind="9p")
    for kind in ("9p", "nfs"):
        assert share._replace(kind=kind).as_saved().kind == kind
