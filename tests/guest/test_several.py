"""Guests that know one another: static addresses, names, ssh from guest to guest, orders before the prologue.

The two guests of this module have, beside the device over which the test reaches them, one that connects them directly,
as the bridge of a job does.
"""

from __future__ import annotations

import base64
import os
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from guestmachine import Machine, make_key, sign
from guestsetup import MakeSetup, make_setup
from ports import free_port

from vmgr.node.network.plan import GuestNet

pytestmark = pytest.mark.guest

NAMES = ("vn1-1", "vn2-1")
HOSTS = (("10.77.0.11", "vn1-1"), ("10.77.0.12", "vn2-1"))
SLOTS = (("vn1-1", 1), ("vn2-1", 2))
USER = r"LAB\ada@lab.test+x"
"""All that a directory service may put into a name."""
REACH = "#!/bin/sh\nip link set eth0 up && ip address add 10.0.2.15/24 dev eth0\n"
"""The VM prologue that sets up the test's own way in; the job's device comes second."""


def job_guest(base: Path, rank: int, wire: str) -> Machine:
    """The guest of that rank; `wire` is one end of the connection between the two."""
    mac = f"52:54:00:77:00:{rank:02x}"
    directory = base / str(rank)
    directory.mkdir()
    setup = make_setup(
        directory,
        "micro",
        user_name=USER,
        hostname=NAMES[rank],
        vcpus=SLOTS[rank][1],
        prologue=REACH,
        hosts=HOSTS,
        slots=SLOTS,
        network=GuestNet(
            mac, f"{HOSTS[rank][0]}/24", "10.77.0.1", 1400, ("10.77.0.2", "10.77.0.3"), "job.test", ("example.org",)
        ),
        devices=("-netdev", f"socket,id=wire,{wire}", "-device", f"virtio-net-pci,netdev=wire,mac={mac},romfile="),
    )
    return Machine(setup)


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[Machine, Machine]]:
    """Two guests of one job, whose key has signed the host key of the second; a stranger's has signed the first's."""
    base = Path("/tmp") / f"vtorque-guest-pair-{os.getpid()}"
    base.mkdir()
    try:
        port = free_port()
        first, second = job_guest(base, 0, f"listen=127.0.0.1:{port}"), job_guest(base, 1, f"connect=127.0.0.1:{port}")
        for suffix in ("", ".pub"):
            shutil.copy(f"{first.setup.key}{suffix}", f"{second.setup.key}{suffix}")
        stranger = base / "stranger"
        make_key(stranger)
        sign(first.setup, stranger)
        sign(second.setup, first.setup.key)
        with first, second:
            first.wait_for("ready")
            second.wait_for("ready")
            yield first, second
    finally:
        shutil.rmtree(base)


def test_ready_tells_the_address(pair: tuple[Machine, Machine]) -> None:
    assert [machine.events[-1][1] for machine in pair] == [
        {"v": 1, "event": "ready", "ssh": 22, "address": address} for address, _ in HOSTS
    ]


def test_the_guests_know_the_job(pair: tuple[Machine, Machine]) -> None:
    for machine in pair:
        done = machine.ssh("cd /run/vtorque; cat /etc/hosts nodefile hostfile machinefile; cat /etc/resolv.conf")
        assert done.stdout.splitlines() == [
            "127.0.0.1 localhost", "::1 localhost", "10.77.0.11 vn1-1", "10.77.0.12 vn2-1",
            "vn1-1", "vn2-1", "vn2-1", "vn1-1 slots=1", "vn2-1 slots=2", "vn1-1:1", "vn2-1:2",
            "search job.test example.org", "nameserver 10.77.0.2", "nameserver 10.77.0.3",
        ]  # fmt: skip


def test_the_network_is_what_the_seed_says(pair: tuple[Machine, Machine]) -> None:
    for machine, (address, _) in zip(pair, HOSTS):
        done = machine.ssh("cat /sys/class/net/eth?/mtu; ip -4 -o address show eth1; ip route show default")
        assert done.stdout.split()[:2] == ["1500", "1400"]
        assert f" {address}/24 brd 10.77.0.255 " in done.stdout and "default via 10.77.0.1 dev eth1" in done.stdout
    sent = pair[0].ssh("head -c 100000 /dev/zero | ssh vn2-1 'wc -c'")  # whole packets
    assert sent.stdout.strip() == "100000", sent.stderr


def test_ssh_from_guest_to_guest_by_name_without_options(pair: tuple[Machine, Machine]) -> None:
    user = pair[0].setup.user
    done = pair[0].ssh("ssh vn2-1 'hostname; id -un; id -u; echo $PATH'")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == ["vn2-1", user.name, str(user.uid), "/usr/local/bin:/usr/bin:/bin:/usr/games"]
    assert not list((pair[0].setup.mounts[0].source).glob(".ssh/*"))


def test_a_guest_whose_host_key_another_has_signed_is_refused(pair: tuple[Machine, Machine]) -> None:
    done = pair[1].ssh("ssh vn1-1 hostname")
    assert (done.returncode, done.stdout) == (255, "") and "Host key verification failed" in done.stderr


def test_only_the_jobs_guests_are_meant(pair: tuple[Machine, Machine]) -> None:
    shown = {name: pair[0].ssh(f"ssh -G {name}").stdout for name in ("vn2-1", "vn2-10", "elsewhere")}
    assert {name for name, text in shown.items() if "/run/vtorque/" in text} == {"vn2-1"}
    assert {"batchmode yes", "stricthostkeychecking true"} <= set(shown["vn2-1"].splitlines())


def test_keys_are_their_owners_alone(pair: tuple[Machine, Machine]) -> None:
    user = pair[0].setup.user
    done = pair[0].ssh(
        "cd /run/vtorque; stat -c '%a %u %g' key ssh_host_ed25519_key; cat ssh_host_ed25519_key guest.env"
    )
    assert done.stdout.splitlines() == [f"600 {user.uid} {user.gid}", "400 0 0"]


def test_the_jobs_own_setting_wins_over_ours(pair: tuple[Machine, Machine]) -> None:
    home, where = pair[0].setup.mounts[0].source, shlex.quote(pair[0].setup.user.home)
    script = home / "job.sh"
    script.write_text("#!/bin/sh\necho $OMPI_MCA_orte_default_hostfile $HYDRA_HOST_FILE $OMPI_MCA_plm\n")
    script.chmod(0o755)
    (home / "run.sh").write_text(
        f"export HYDRA_HOST_FILE=mine\ncd {where}\nVT_JOB_SHELL=/bin/sh VT_JOB_SCRIPT={where}/job.sh\n"
    )
    job = pair[0].start_job(f"{pair[0].setup.user.home}/run.sh")
    assert job.stdout is not None
    try:
        assert job.stdout.read() == "/run/vtorque/hostfile mine ^tm\n"
    finally:
        job.kill()
        job.communicate()


def test_hosts_are_awaited_before_the_prologue(setup_for: MakeSetup) -> None:
    setup = setup_for(
        "micro",
        prologue="#!/bin/sh\ngrep vn9 /etc/hosts\n",
        mounts=(),
        wait_hosts=True,
        network=GuestNet("52:54:00:12:34:56", dns=("10.9.9.9",), mtu=1300),
    )
    with Machine(setup) as machine:
        assert machine.wait_for("up")["address"] == "10.0.2.15"
        machine.send("hosts", hosts="")
        assert machine.next_event() == {"v": 1, "event": "hosts", "status": 1}
        names = "".join(f"10.9.{n // 250}.{n % 250 + 1} vn{n}-1\n" for n in range(1000))
        machine.send("hosts", hosts=base64.b64encode(names.encode()).decode())
        assert machine.next_event() == {"v": 1, "event": "hosts", "status": 0}
        assert base64.b64decode(machine.next_event()["output"]).decode().splitlines()[0] == "10.9.0.10 vn9-1"
        assert machine.wait_for("ready")["address"] == "10.0.2.15"
        limit = "/proc/sys/net/ipv4/neigh/default/gc_thresh3"
        said = machine.ssh(f"wc -l </etc/hosts; cat /etc/resolv.conf /sys/class/net/eth0/mtu {limit}").stdout
        assert said.splitlines() == ["1002", "nameserver 10.9.9.9", "1300", "4008"]
        machine.send("shutdown")
        machine.wait_for("epilogue")
        assert machine.ended()


def test_a_guest_that_waits_for_hosts_still_obeys(setup_for: MakeSetup) -> None:
    with Machine(setup_for("micro", mounts=(), wait_hosts=True)) as machine:
        machine.wait_for("up")
        machine.send("shutdown")
        machine.wait_for("epilogue")
        assert machine.ended()


def test_what_mpirun_starts_elsewhere_has_the_environment_of_its_caller(pair: tuple[Machine, Machine]) -> None:
    home = pair[0].setup.mounts[0].source
    script = home / "caller.sh"
    script.write_text(
        "export WORDS='it'\\''s \"two\"  $words \\n\nand lines'\n"
        "export LONG=$(head -c 100000 /dev/zero | tr '\\0' x)\nexport LONGER=$LONG\n"
        "export PATH=$HOME/bin:$PATH LD_LIBRARY_PATH=$HOME/lib HOSTNAME=here VTORQUE_RANK=0\n"
        "umask 0027\nulimit -S -s 4096\n"
        "/run/vtorque/rsh -x -o LogLevel=QUIET vn2-1 "
        '\'printf "%s\\n" "$WORDS" ${#LONG} ${#LONGER} "$PATH $LD_LIBRARY_PATH";\''
        " 'umask; ulimit -S -s; hostname; env | grep -E \"^(HOSTNAME|SSH_|VT)\"; cat; exit 7'\n"
        "echo $?\n"
    )
    done = pair[0].ssh("echo never | sh ~/caller.sh")
    where = pair[0].setup.user.home
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        'it\'s "two"  $words \\n', "and lines", "100000", "100000",
        f"{where}/bin:/usr/local/bin:/usr/bin:/bin:/usr/games {where}/lib", "0027", "4096", "vn2-1", "7",
    ]  # fmt: skip


def test_what_mpirun_starts_elsewhere_can_be_refused(pair: tuple[Machine, Machine]) -> None:
    done = pair[1].ssh("/run/vtorque/rsh vn1-1 hostname")
    assert (done.returncode, done.stdout) == (255, "") and "Host key verification failed" in done.stderr
    assert pair[1].ssh("/run/vtorque/rsh vn1-1").returncode == 2
