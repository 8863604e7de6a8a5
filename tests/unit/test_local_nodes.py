"""The embedded batch system's nodes as far as they are values: requests, addresses, folders, options."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from types import SimpleNamespace
from typing import Optional

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vsub import programs
from vsub.engines.local import network
from vsub.engines.local.daemon import _parser
from vsub.engines.local.machine import Cluster, Layout, Machine, exec_host
from vsub.engines.local.node import Own, own_folders
from vsub.engines.local.nodes import hosts
from vsub.engines.local.protocol import Refused
from vsub.engines.local.resources import NodeRequest

LAYOUT = Layout(Path("/var/spool/x"))
HERE = Cluster.of("vm.example.org", LAYOUT)
FOUR = Cluster.of(
    "vm.example.org",
    LAYOUT,
    tuple(Machine(f"n{number}", LAYOUT.node(f"n{number}"), LAYOUT.mom_priv) for number in range(1, 5)),
)


@pytest.mark.parametrize(
    ("request_text", "lines"),
    [
        ("1", "n1"),
        ("4", "n1 n2 n3 n4"),
        ("2:ppn=2", "n1 n1 n2 n2"),
        ("n1:ppn=2+n3", "n1 n1 n3"),
        ("n3+n1", "n3 n1"),
        ("2+n1", "n2 n3 n1"),
        ("1:ppn=3+2:ppn=1", "n1 n1 n1 n2 n3"),
    ],
)
def test_allocation(request_text: str, lines: str) -> None:
    assert FOUR.allocate(NodeRequest.parse(request_text)) == lines.split()


@pytest.mark.parametrize("request_text", ["5", "n5", "n1+n1", "n1+4", "2+3", "localhost", "vm.example.org"])
def test_too_much_for_four_nodes(request_text: str) -> None:
    with pytest.raises(Refused) as refused:
        FOUR.allocate(NodeRequest.parse(request_text))
    assert "has 4 nodes, n1 to n4" in refused.value.detail


@pytest.mark.parametrize("request_text", ["1:ppn=2", "localhost:ppn=2", "vm:ppn=2", "vm.example.org:ppn=2"])
def test_this_machine_alone(request_text: str) -> None:
    assert HERE.allocate(NodeRequest.parse(request_text)) == ["vm.example.org"] * 2


@pytest.mark.parametrize("request_text", ["2", "n1", "1+1", "vm+localhost"])
def test_too_much_for_this_machine(request_text: str) -> None:
    with pytest.raises(Refused) as refused:
        HERE.allocate(NodeRequest.parse(request_text))
    assert "has one node, vm.example.org, and runs" in refused.value.detail


PARTS = st.lists(
    st.tuples(st.sampled_from(["1", "2", "n1", "n2", "n3", "n4"]), st.integers(1, 4)), min_size=1, max_size=4
)


@given(PARTS)
def test_a_job_finds_its_nodes_again(parts: list[tuple[str, int]]) -> None:
    try:
        lines = FOUR.allocate(NodeRequest(tuple(parts)))
    except Refused:
        return
    names = list(dict.fromkeys(lines))
    assert [machine.name for machine in FOUR.of_job(exec_host(lines))] == names
    assert len(lines) == sum(ppn * (int(head) if head.isdigit() else 1) for head, ppn in parts)
    assert lines == sorted(lines, key=names.index), "the lines of a node lie together"


def test_nodes_that_are_no_more(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    layout.node("n2").spool.mkdir(parents=True)
    here = Cluster.of("vm", layout)
    superior, sister = here.of_job("n2/0-1+n7/0")
    assert superior == Machine("n2", layout.node("n2"), layout.mom_priv)
    assert sister.layout == layout
    assert here.of_job("") == here.of_job("vm/0") == here.machines


# --- addresses


def test_addresses() -> None:
    link = network.link_name(Path("/var/spool/vtorque-local"))
    assert link.startswith("vtlocal") and len(link) == 15
    assert link != network.link_name(Path("/var/spool/other"))
    free = network.choose(link, [])
    assert free.network.subnet_of(network.SUBNETS) and free.network.prefixlen == 24
    assert network.choose(link, [free.network]) != free
    assert free.host.endswith(".1") and free.node(0).endswith(".2") and free.node(15).endswith(".17")
    last = ipaddress.IPv4Network("10.77.3.0/24")
    used = [network_ for network_ in network.SUBNETS.subnets(new_prefix=24) if network_ != last]
    assert network.choose(link, used).network == last
    for everything in ("10.0.0.0/8", "10.77.0.0/16"):
        with pytest.raises(OSError, match=r"10\.77\.0\.0/16 is in use"):
            network.choose(link, [ipaddress.IPv4Network(everything)])


def test_hosts() -> None:
    subnet = network.Subnet(ipaddress.IPv4Network("10.77.9.0/24"))
    text = hosts(["n1", "n2"], subnet, "vm")
    assert text.splitlines()[0] == "127.0.0.1 localhost"
    assert text.splitlines()[2:] == ["10.77.9.1 vm", "10.77.9.2 n1", "10.77.9.3 n2"]


# --- folders


def test_folders() -> None:
    spool = Path("/var/spool/vtorque-local")
    private = [Path("/var/spool/vtorque"), Path("/var/spool/vtorque/overlays"), Path("/var/log/vtorque")]
    assert own_folders(spool, private, [Path("/run/vtorque")]) == [
        Own(Path("/run/vtorque"), True),
        Own(Path("/var/log/vtorque"), False),
        Own(Path("/var/spool/vtorque"), False),
    ]
    # in memory within a kept one: mounted over it, after it
    assert own_folders(spool, private[:1], [private[0] / "run"]) == [
        Own(private[0], False),
        Own(private[0] / "run", True),
    ]
    assert own_folders(spool, [Path("/run/v/o")], [Path("/run/v")]) == [Own(Path("/run/v"), True)]


@pytest.mark.parametrize("path", ["/", "/var/spool", "/var/spool/vtorque-local"])
def test_folders_that_would_hide_the_spool(path: str) -> None:
    with pytest.raises(ValueError, match="cannot be each node's own"):
        own_folders(Path("/var/spool/vtorque-local"), [Path(path)], [])


@pytest.mark.parametrize(("log", "cache"), [("/var/log/v/node.log", None), (None, Path("/s/cache"))])
def test_what_the_configuration_makes_of_it(
    monkeypatch: pytest.MonkeyPatch, log: Optional[str], cache: Optional[Path]
) -> None:
    config = SimpleNamespace(
        local=SimpleNamespace(spool="/s/local", socket="/s/sock", nodes=3),
        paths=SimpleNamespace(spool=Path("/s/spool"), run=Path("/s/run")),
        images=SimpleNamespace(overlays=Path("/s/over"), cache=SimpleNamespace(folder=cache)),
        logging=SimpleNamespace(file=log),
    )
    given: list[list[str]] = []
    monkeypatch.setattr(programs, "load_config", lambda _: config)
    monkeypatch.setattr("vsub.engines.local.daemon.main", lambda argv: given.append(argv) or 0)
    assert programs.local_daemon(["start", "--foreground"]) == 0
    assert programs.local_daemon(["enter", "n2", "ls", "-l"]) == 0
    start, enter = (_parser().parse_args(argv) for argv in given)
    further = [*([cache] if cache else []), *([Path("/var/log/v")] if log else [])]
    assert (start.nodes, start.private) == (3, [Path("/s/spool"), Path("/s/over"), *further])
    assert start.volatile == [Path("/s/run")] and start.foreground
    assert (enter.spool, enter.node, enter.run) == (Path("/s/local"), "n2", ["ls", "-l"])
