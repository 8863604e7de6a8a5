"""The guests' networks, with real guests on simulated nodes: who reaches whom, and who does not."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest

from vmgr.config import load_config
from vmgr.node.network.plan import plan_network
from vmgr.paths import Installation

from .cluster import EVERYWHERE, FOUR, Cluster
from .conftest import Site, User, eventually, on_engine

ENGINES = ("local", "slurm")
SITES_OWN = (
    EVERYWHERE.replace("nodes: 3", "nodes: 2").replace(
        "  img: {{default: micro}}",
        "  img: {{default: micro}}\n  network: {{allowed: [user, bridge, job]}}",
    )
    + "network: {{dns: [10.9.9.9], domain: job.test, search: [example.org], bridge: {{name: site0}},"
    " job: {{nat: true, ssh_ports: 22000-22009}}}}\n"
)
ANSWERS = """\
answers() {  # whether an SSH server answers at an address
    said=$(timeout 5 bash -c "exec 3<>/dev/tcp/$1/22 && head -c 4 <&3" 2>/dev/null)
    [ "$said" = SSH- ] && echo "$1 answers" || echo "$1 silent"
}
"""


FORGED = 500
COUNTING = """
while [ ! -e over ]; do
    cat /sys/class/net/eth0/statistics/rx_packets >count.tmp; mv count.tmp count
    sleep 0.1
done
"""
SENDER = f"""
import socket, sys, time
link = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for number in range({FORGED}):
    try:
        link.sendto(bytes.fromhex(sys.argv[2]), (sys.argv[1], 4789))
    except PermissionError:
        pass
    time.sleep(0.001)
"""


@pytest.fixture(scope="module")
def site(request: pytest.FixtureRequest) -> Iterator[Site]:
    """Two nodes with a bridge of the site's, on which a real DHCP server is, that forward what their guests send."""
    with on_engine(request.param, SITES_OWN) as made, dhcp_on_a_bridge(made):
        yield made


@contextmanager
def dhcp_on_a_bridge(made: Cluster) -> Iterator[None]:
    for node in made.nodes:
        (address,) = re.findall(r"inet (\S+)", made.enter(node, "ip", "-4", "-o", "address", "show", "dev", "eth0"))
        gateway = re.sub(r"\d+/24$", "1", address)
        made.enter(
            node, "sh", "-ec",
            f"ip link add site0 type bridge forward_delay 0; ip address flush dev eth0; ip link set eth0 master site0;"
            f"ip address add {address} dev site0; ip link set site0 up; ip route add default via {gateway};"
            "echo 1 >/proc/sys/net/ipv4/ip_forward",
        )  # fmt: skip
    start = re.sub(r"\d+/24$", "", address)
    server = subprocess.Popen([
        str(made.prefix / "libexec" / "vtorque-local"), "enter", "n1", "dnsmasq",
        "--keep-in-foreground", "--conf-file=/dev/null", "--port=0", "--no-ping", "--interface=site0",
        f"--dhcp-range={start}100,{start}199,255.255.255.0,1h", "--dhcp-leasefile=/dev/null", "--pid-file=",
        "--bind-interfaces", "--user=root", "--log-facility=-",
    ], stderr=subprocess.DEVNULL)  # fmt: skip
    try:
        yield
    finally:
        server.terminate()
        server.wait(30)


def test_guests_on_the_sites_bridge(cluster: Cluster, user: User) -> None:
    script = f"""{ANSWERS}
cat /etc/hosts
grep -v '^#' /etc/resolv.conf
for name in $VTORQUE_GUESTS; do ssh $name 'hostname; ip -4 -o address show scope global'; done
answers {cluster.address("n2")}
"""
    done = user.job(script, "-l", "nodes=2:ppn=2", "-vm", "vms_per_node=2,network=bridge")
    assert (done.status, done.err) == (0, ""), done
    guests = ["vn1-1", "vn1-2", "vn2-1", "vn2-2"]
    hosts = dict(reversed(line.split()) for line in done.out.splitlines() if re.match(r"10\.77\.", line))
    hosts = {name: address for name, address in hosts.items() if name in guests}
    assert list(hosts) == guests and len(set(hosts.values())) == 4
    assert "search job.test example.org\nnameserver 10.9.9.9\n" in done.out
    for name, address in hosts.items():
        assert re.search(rf"^{name}\n\d+: eth0 .*inet {re.escape(address)}/24 ", done.out, re.MULTILINE)


def test_a_network_of_the_jobs_own_leads_out_where_the_site_says_so(cluster: Cluster, user: User) -> None:
    with Listener(cluster.outside) as listener:
        script = f"""
ip -4 -o address show dev eth0; ip route; cat /sys/class/net/eth0/mtu
echo direct | timeout 10 nc -p 700 {cluster.outside} {listener.port}
exec 3<>/dev/tcp/{cluster.outside}/{listener.port}; cat <&3
"""
        done = user.job(script, "-vm", "network=job")
        assert (done.status, done.err) == (0, ""), done
    assert listener.peers, "nobody came"
    assert {address for address, _ in listener.peers} == {cluster.address("n1")}
    assert all(port >= 1024 for _, port in listener.peers)
    address, gateway = re.search(r"inet (10\.\S+)/30 .*\ndefault via (10\.\S+) ", done.out).groups()  # type: ignore[union-attr]
    assert int(address.split(".")[1]) >= 128 and address != gateway
    assert done.out.endswith("\n1500\nhello\nhello\n"), "the first came from port 700 of the guest"


def test_ssh_from_outside(cluster: Cluster, user: User) -> None:
    job = user.submit("touch runs; sleep 300\n", "-l", "nodes=2", "-vm", "network=job")
    eventually(lambda: (user.home / "runs").exists(), "the script runs")
    (status,) = (user.home / ".vtorque").glob("*/*/status.*.json")
    folder = status.parent
    ports = json.loads(status.read_text())["ssh_ports"]
    assert set(ports) == {"vn1-1", "vn2-1"} and all(22000 <= port <= 22009 for port in ports.values())
    known = user.write("known", f"@cert-authority * {(folder / 'key.pub').read_text()}")
    for name, port in ports.items():
        options = ("BatchMode=yes", f"UserKnownHostsFile={known}", f"HostKeyAlias={name}", f"Port={port}")
        words = [word for option in options for word in ("-o", option)]
        node = cluster.address(name[1:3])
        done = user.run("ssh", "-F", "none", *words, "-i", str(folder / "key"), node, "hostname")
        assert (done.returncode, done.stdout) == (0, f"{name}\n"), done.stderr
    assert cluster.client("qdel", job).returncode == 0
    cluster.wait(job)


def test_nobody_else_gets_a_frame_into_the_jobs_network(cluster: Cluster, user: User, other: User) -> None:
    """Another user of a node of the job, and a machine that is none of its nodes; each gets in without the rule."""
    job = user.submit(COUNTING, "-l", "nodes=2", "-vm", "network=job")
    eventually(lambda: (user.home / "count").exists(), "the script runs")
    forged = forge(cluster, job, "n1")
    node = [str(cluster.prefix / "libexec" / "vtorque-local"), "enter", "n2"]
    for place, uid, filtering in ((node, other.uid, "n2"), ([], 0, "n1")):
        sender = [*place, "setpriv", f"--reuid={uid}", "--clear-groups", "/usr/bin/python3", "-Ic", SENDER, *forged]
        assert received(user, sender) < FORGED / 10, f"uid {uid} {place}"
        (table,) = cluster.tables(filtering)
        cluster.enter(filtering, "nft", "delete", *table.split())
        assert received(user, sender) > FORGED * 9 / 10, f"uid {uid} {place}: without the rule"
    user.write("over", "")
    assert cluster.wait(job) == 0


def test_a_killed_agent_leaves_no_network(cluster: Cluster, user: User) -> None:
    job = user.submit("touch runs; sleep 300\n", *FOUR)
    eventually(lambda: (user.home / "runs").exists(), "the script runs")
    assert cluster.tables("n2"), "the packet filter of the job"
    agents = cluster.processes("libexec/vtorque-agent")  # and their children, which watch the job's folders
    assert len([agent for agent in agents if agent.parent() not in agents]) == 2
    for agent in agents:
        with contextlib.suppress(psutil.NoSuchProcess):
            agent.kill()
    assert cluster.wait(job) != 0


class Listener:
    """A server outside of the cluster, which says hello to everybody and notes who came."""

    def __init__(self, address: str) -> None:
        self._socket = socket.create_server((address, 0))
        self.port = self._socket.getsockname()[1]
        self.peers: list[tuple[str, int]] = []
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> Listener:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join()

    def _serve(self) -> None:
        while True:
            try:
                client, peer = self._socket.accept()
            except OSError:
                return
            with client:
                self.peers.append(peer)
                client.sendall(b"hello\n")


def forge(cluster: Cluster, job: str, node: str) -> list[str]:
    """A node's address, and what VXLAN carries there as a frame for the job's first guest, in hexadecimal digits."""
    plan = plan_network("job", cluster.whole(job), cluster.nodes, 1, load_config(Installation(cluster.prefix)).network)
    frame = bytes.fromhex(plan.members[0].mac.replace(":", "") + "020000000001" + "88b5") + bytes(46)
    packet = bytes([8, 0, 0, 0]) + plan.vni.to_bytes(3, "big") + bytes(1) + frame
    return [cluster.address(node), packet.hex()]


def received(user: User, sender: list[str]) -> int:
    """How many packets more the first guest of the job has got when `sender` has sent its own."""
    before = fresh_count(user)
    subprocess.run(sender, check=True, timeout=60)
    return fresh_count(user) - before


def fresh_count(user: User) -> int:
    path = user.home / "count"
    seen = path.stat().st_ino
    eventually(lambda: path.stat().st_ino != seen, "the guest counts on")
    seen = path.stat().st_ino
    eventually(lambda: path.stat().st_ino != seen, "the guest counts on")
    return int(path.read_text())
