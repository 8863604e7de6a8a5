"""The plan of a job's network: addresses, numbers, claims, what guests are told; the configuration's section."""

from __future__ import annotations

import json
import subprocess
import sys
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmgr.config import Bridge, Config, JobNetwork, Network, read_tree
from vmgr.errors import Code, VTorqueError
from vmgr.fields import Problem
from vmgr.netfields import parse_ports, parse_range
from vmgr.node.members import plan_members
from vmgr.node.network.claims import Claim, check, choose_pair, claim_of
from vmgr.node.network.leases import Lease, from_pool, parse_lease
from vmgr.node.network.plan import guest_net, plan_network
from vmgr.schema import check_config


def configured(**keys: Any) -> Network:
    return Config("x", check_config({"network": keys}), {}).network


jobs = st.from_regex(r"[0-9]{1,9}(\[[0-9]{1,6}\])?\.[a-z]{1,20}", fullmatch=True)


@settings(max_examples=50, deadline=None)
@given(job=jobs, nodes=st.integers(1, 1000), per_node=st.integers(1, 16), prefix=st.sampled_from(["02", "52:54:00"]))
def test_members_of_a_job_are_apart(job: str, nodes: int, per_node: int, prefix: str) -> None:
    plan = plan_network("job", job, [f"n{i}" for i in range(nodes)], per_node, configured(mac_prefix=prefix))
    assert plan.subnet is not None and 0 < plan.vni < 1 << 24
    subnet, whole = IPv4Network(plan.subnet), IPv4Network("10.128.0.0/9")
    assert subnet.subnet_of(whole)
    addresses = [IPv4Address(member.address or "") for member in plan.members] + [*map(IPv4Address, plan.gateways)]
    assert len(plan.members) == nodes * per_node and len(plan.gateways) == nodes
    assert len(set(addresses)) == len(addresses)
    assert all(address in subnet for address in addresses)
    assert not {subnet.network_address, subnet.broadcast_address} & set(addresses)
    assert subnet.num_addresses < 2 * (len(addresses) + 2)
    assert [member.rank for member in plan.members] == list(range(nodes * per_node))
    assert len({member.mac for member in plan.members}) == len(plan.members)
    assert all(member.mac.startswith(prefix) and len(member.mac) == 17 for member in plan.members)
    assert sum((plan.own(node) for node in range(min(nodes, 3))), ()) == plan.members[: 3 * per_node]


@given(job=jobs)
def test_a_job_keeps_its_addresses(job: str) -> None:
    small, large = (plan_network("job", job, nodes, 2, configured()) for nodes in (["a"], ["a", "b"]))
    assert small.members[0].mac == large.members[0].mac and small.vni == large.vni
    assert small == plan_network("job", job, ["a"], 2, configured())
    named = [(m.name, m.mac) for m in large.members]
    assert named == [(m.name, m.mac) for m in plan_members(job, ["a", "b"], 2, "02")]


def test_members_of_an_array_differ_and_both_ways_to_write_them_are_one() -> None:
    plans = [plan_network("job", job, ["a"], 1, configured()) for job in ("12[3].s", "12-3.s", "12[4].s", "12.s-1")]
    assert plans[0] == plans[1]
    assert len({plan.vni for plan in plans}) == len({plan.subnet for plan in plans}) == 3


def test_numbers_of_many_jobs_are_spread() -> None:
    plans = [plan_network("job", f"{job}.server", ["a", "b"], 2, configured()) for job in range(2000)]
    assert len({plan.vni for plan in plans}) >= 1995  # 0.1 doubles are expected
    assert len({plan.subnet for plan in plans}) >= 1980  # of 2^20: 2 are expected


@pytest.mark.parametrize(("subnets", "fits"), [("10.0.0.0/29", True), ("10.0.0.0/30", False)])
def test_a_network_is_as_large_as_its_subnets(subnets: str, fits: bool) -> None:
    network = configured(job={"subnets": subnets})
    if fits:
        assert plan_network("job", "1.s", ["a", "b"], 2, network).subnet == subnets
        assert plan_network("job", "1.s", ["a"], 1, network).prefix == 30
    else:
        with pytest.raises(VTorqueError, match=r"4 guests on 2 nodes do not fit into 10\.0\.0\.0/30") as caught:
            plan_network("job", "1.s", ["a", "b"], 2, network)
        assert caught.value.code == Code.NODE


def test_a_bridge_must_be_configured() -> None:
    with pytest.raises(VTorqueError, match=r"network\.bridge\.name is not set") as caught:
        plan_network("bridge", "1.s", ["a"], 1, configured())
    assert caught.value.code == Code.NODE
    with pytest.raises(VTorqueError, match="network=wlan"):
        plan_network("wlan", "1.s", ["a"], 1, configured())


TOLD: dict[str, Any] = {"dns": ["9.9.9.9"], "domain": "x.org", "search": ["y.org"], "ntp": ["ntp.x.org", "10.1.1.1"]}


def test_what_guests_are_told() -> None:
    told = (("9.9.9.9",), "x.org", ("y.org",), ("ntp.x.org", "10.1.1.1"))
    for nat in (False, True):
        network = configured(**TOLD, job={"nat": nat}, bridge={"name": "br0", "gateway": "10.1.2.1"})
        plan = plan_network("job", "7.s", ["a", "b"], 1, network)
        net = guest_net(plan, plan.members[1], network, mtu=1450)
        subnet = IPv4Network(plan.subnet or "")
        assert net == (plan.members[1].mac, f"{subnet[2]}/29", str(subnet[5]) if nat else None, 1450, *told)
        assert IPv4Interface(net.address or "").network == subnet
        plan = plan_network("bridge", "7.s", ["a"], 1, network)
        mac = plan.members[0].mac
        assert guest_net(plan, plan.members[0], network) == (mac, None, None, None, *told)
        static = guest_net(plan, plan.members[0], network, address="10.1.2.9/24")
        assert static == (mac, "10.1.2.9/24", "10.1.2.1", None, *told)
        static = guest_net(plan, plan.members[0], network, address="10.1.2.9/24", gateway="10.1.2.254")
        assert static.gateway == "10.1.2.254"
        plan = plan_network("user", "7.s", ["a"], 1, network)
        assert guest_net(plan, plan.members[0], network) == (mac, None, None, None, *told)
        assert plan.members[0].address == "10.0.2.15"


def test_the_section_has_defaults_and_types() -> None:
    assert configured() == Network(
        "02", (), None, (), (), Bridge(None, "dhcp", None, None, None),
        JobNetwork("10.128.0.0/9", 4789, "{node}", False, None),
    )  # fmt: skip
    pools = {"n[1-9]": "10.1.2.10-10.1.2.40/24", "*": "10.1.3.10-10.1.3.10/24"}
    assert configured(bridge={"addresses": "pool", "pool": pools}).bridge.pool == pools


BAD = [
    ("{dns: 9.9.9.9}", "network.dns is '9.9.9.9': a list of IPv4 addresses is needed"),
    ("{dns: ['fe80::1']}", "network.dns: a list of IPv4 addresses is needed"),
    ("{domain: 'a b'}", "network.domain is 'a b': a domain name is needed"),
    ("{search: [-x]}", "network.search: a list of domain names is needed"),
    ("{ntp: ['a;b']}", "network.ntp: a list of host names or addresses is needed"),
    ("{bridge: {name: br/0}}", "network.bridge.name is 'br/0': the name of a network interface"),
    ("{bridge: {addresses: static}}", "network.bridge.addresses is 'static': one of dhcp, command, pool is needed"),
    ("{bridge: {addresses: pool}}", "network.bridge.pool must be set with this"),
    ("{bridge: {addresses: command}}", "network.bridge.command must be set with this"),
    ("{bridge: {pool: 10.1.2.0-10.1.2.9/24}}", "network.bridge.pool is '10.1.2.0-10.1.2.9/24': a range of host"),
    ("{bridge: {pool: {n*: 10.1.2.9}}}", "network.bridge.pool.n* is '10.1.2.9': a range of host addresses"),
    ("{bridge: {gateway: here}}", "network.bridge.gateway is 'here': an IPv4 address is needed"),
    ("{job: {subnets: 10.1.2.3/8}}", "network.job.subnets is '10.1.2.3/8': an IPv4 network such as 10.128.0.0/9"),
    ("{job: {port: 0}}", "network.job.port is '0': a whole number from 1 to 65535 is needed"),
    ("{job: {peer: '{node}{node}'}}", "network.job.peer is '{node}{node}': a host name with {node} in it"),
    ("{job: {nat: maybe}}", "network.job.nat is 'maybe': true or false is needed"),
    ("{job: {ssh_ports: 22-80}}", "network.job.ssh_ports is '22-80': a range of ports from 1024 to 65535"),
]


@pytest.mark.parametrize(("text", "message"), BAD)
def test_bad_values_are_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "vtorque.yaml"
    file.write_text(f"engine: local\nnetwork: {text}\n")
    with pytest.raises(VTorqueError) as caught:
        read_tree(str(file))
    assert caught.value.code == Code.CONFIG
    assert message in str(caught.value) and " line 2: " in str(caught.value) and "\n" not in str(caught.value)


@given(st.text(alphabet="0123456789.-/ x", max_size=40) | st.integers() | st.none())
def test_ranges_are_read_or_refused(value: Any) -> None:
    try:
        found = parse_range(value)
    except ValueError:
        return
    network = IPv4Network((found.first, found.prefix), strict=False)
    assert found.first <= found.last and found.last in network


def test_ranges() -> None:
    assert parse_range("10.1.2.10-10.1.2.40/24") == (IPv4Address("10.1.2.10"), IPv4Address("10.1.2.40"), 24)
    for bad in ("10.1.2.40-10.1.2.10/24", "10.1.2.10-10.1.3.1/24", "10.1.2.1-10.1.2.255/24", "10.1.2.1/24", "1-2/33"):
        with pytest.raises(ValueError, match="such as"):
            parse_range(bad)
    assert parse_ports("22000-22001") == range(22000, 22002)


def test_an_unknown_key_is_refused() -> None:
    with pytest.raises(Problem, match="unknown key"):
        check_config({"network": {"job": {"natt": True}}})


# addresses on the site's bridge


@given(st.binary(max_size=60) | st.text(alphabet="0123456789./ \t\n", max_size=40).map(str.encode))
def test_what_the_sites_program_prints_is_an_address_or_refused(output: bytes) -> None:
    try:
        lease = parse_lease(output)
    except ValueError:
        return
    interface = IPv4Interface(lease.address)
    assert interface.ip.compressed in output.decode()
    assert lease.gateway is None or IPv4Address(lease.gateway) in interface.network


@pytest.mark.parametrize(
    ("output", "lease"),
    [
        (b"10.1.2.9/24\n", Lease("10.1.2.9/24", None)),
        (b"10.1.2.9/24 10.1.2.1\n", Lease("10.1.2.9/24", "10.1.2.1")),
        (b"10.1.2.0/31", Lease("10.1.2.0/31", None)),
        (b"", None),
        (b"10.1.2.9", None),
        (b"10.1.2.9/24 10.1.3.1", None),
        (b"10.1.2.9/24 10.1.2.9", None),
        (b"10.1.2.0/24", None),
        (b"10.1.2.255/24", None),
        (b"127.0.0.1/8", None),
        (b"224.0.0.1/8", None),
        (b"10.1.2.9/33", None),
        (b"10.1.2.9/24\n10.1.2.10/24\n", None),
        (b"\xd9\xa1.1.2.9/24", None),
    ],
)
def test_leases(output: bytes, lease: Any) -> None:
    if lease is None:
        with pytest.raises(ValueError):
            parse_lease(output)
    else:
        assert parse_lease(output) == lease


def test_pools() -> None:
    pools = {"n[1-2]": "10.1.2.10-10.1.2.12/24", "m*": "10.1.3.10-10.1.3.12/24"}
    assert from_pool(pools, None, "n1", 2, {"10.1.2.10"}) == [Lease("10.1.2.11/24", None), Lease("10.1.2.12/24", None)]
    assert from_pool(pools["m*"], "10.1.3.10", "x", 1, ()) == [Lease("10.1.3.11/24", "10.1.3.10")]
    with pytest.raises(VTorqueError, match=r"network\.bridge\.pool has no addresses for n3"):
        from_pool(pools, None, "n3", 1, ())
    with pytest.raises(VTorqueError, match="only 2 are free for 3 guests") as caught:
        from_pool(pools, None, "n1", 3, {"10.1.2.10"})
    assert caught.value.code == Code.NODE


CLAIM = Claim(
    "of-x", 7, "10.1.0.0/24", ("02:00:00:00:00:01",), ("10.1.2.9",), "169.254.1.0/30", (("inet", "t"),), ("l",)
)


def test_a_claim_is_read_as_it_was_recorded() -> None:
    assert claim_of(json.loads(json.dumps(CLAIM.step()))) == CLAIM
    assert CLAIM.step()["do"] == "network"
    with pytest.raises(KeyError):
        claim_of({"do": "network"})


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (CLAIM._replace(subnet=None, macs=(), addresses=()), "the number 7 of the job's network is in use"),
        (CLAIM._replace(vni=8, subnet="10.1.0.128/25"), "the subnet 10.1.0.0/24 of the job's network is in use"),
        (CLAIM._replace(vni=8, subnet=None), "the MAC address 02:00:00:00:00:01 of a guest is in use"),
        (CLAIM._replace(vni=8, subnet="10.1.1.0/24", macs=()), "the address 10.1.2.9 of a guest is in use"),
        (CLAIM._replace(vni=8, subnet="10.1.1.0/24", macs=(), addresses=()), None),
    ],
)
def test_what_another_attempt_has_is_refused(other: Claim, message: Any) -> None:
    if message is None:
        check(CLAIM, [other], [IPv4Network("10.2.0.0/16")])
        with pytest.raises(VTorqueError, match=r"overlaps the node's route to 10\.0\.0\.0/8; .*network\.job\.subnets"):
            check(CLAIM, [other], [IPv4Network("10.0.0.0/8")])
        with pytest.raises(VTorqueError, match="two guests would have the same address"):
            check(CLAIM._replace(addresses=("10.1.2.9",) * 2), [other], [])
    else:
        with pytest.raises(VTorqueError, match=message) as caught:
            check(CLAIM, [other], [])
        assert caught.value.code == Code.NODE


@given(st.integers(1, (1 << 24) - 1))
def test_the_way_out_has_addresses_of_its_own(vni: int) -> None:
    first = choose_pair(vni, [], [IPv4Network("169.254.0.0/16"), IPv4Network("10.0.0.0/8")])
    second = choose_pair(vni, [CLAIM._replace(pair=str(first))], [])
    assert first.prefixlen == second.prefixlen == 30 and not first.overlaps(second)
    assert all(str(pair).split(".")[2] not in ("0", "169", "255") for pair in (first, second))


def test_no_way_out_is_left() -> None:
    with pytest.raises(VTorqueError, match="no addresses in"):
        choose_pair(1, [], [IPv4Network("169.254.0.0/17"), IPv4Network("169.254.128.0/17")])


def test_what_every_hook_and_agent_loads_is_without_networks() -> None:
    code = "import sys, vmgr.node.undo, vmgr.node.reap; print([m for m in sys.modules if 'node.network' in m])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
