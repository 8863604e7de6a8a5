"""The debian-12 image in a real guest: directly with a seed, and from its own disk without one."""

from __future__ import annotations

import base64
import os
import subprocess
import time
from pathlib import Path

import pytest
from debs import index, make_deb
from guestmachine import QEMU_MAC, Machine, decode
from guestsetup import MakeSetup
from keptchecks import WRITER, session_outlives_its_connection

from vmgr.config import Software
from vmgr.node.network.plan import GuestNet

pytestmark = pytest.mark.guest

CHECKS = """
echo "account $(id -u) $(id -g) $(id -Gn | tr ' ' '\\n' | sort | tr '\\n' ' ')"
echo "host $(hostname) $(getent hosts guest-1 | awk '{print $1; exit}')"
echo "home $(pwd) $(findmnt -n -o FSTYPE -T .)"
echo "cpus $(nproc) limit $(ulimit -Hn) $(ulimit -Hl)"
echo "mpi $(mpirun --version | head -1)"
echo "nfs $(test -x /sbin/mount.nfs && echo yes)"
echo "failed $(systemctl --failed --no-legend --plain | awk '{print $1}' | tr '\\n' ' ')"
echo "python $(pgrep -fc [c]loud-init)"
echo "resolver $(tr '\\n' ' ' </etc/resolv.conf)"
echo "sudo $(command -v sudo || echo none)"
touch /opt-hpc/x 2>/dev/null || echo "opt read-only"
echo mine >~/made
"""


def test_debian_boots_with_a_seed(setup_for: MakeSetup) -> None:
    """One boot for everything that is different from micro: systemd, cloud-init, Debian's programs."""
    setup = setup_for(
        "debian-12",
        prologue="#!/bin/sh\nid -u\n",
        epilogue="#!/bin/sh\necho bye\n",
        environment={"DISTRO": "SLG"},
        vcpus=2,
        ram_mib=1024,
    )
    user = setup.user
    with Machine(setup) as machine:
        machine.wait_for("ready")
        assert [event["event"] for _, event in machine.events] == ["booted", "prologue", "ready"]
        assert decode(machine.events[1][1]["output"]) == "0\n"
        done = machine.ssh(CHECKS)
        facts = dict(line.split(" ", 1) for line in done.stdout.splitlines())
        assert facts.pop("account") == f"{user.uid} {user.gid} engines lovelace users "
        assert facts.pop("host") == "guest-1 10.0.2.15"
        assert facts.pop("home") == f"{user.home} 9p"
        assert facts.pop("cpus") == "2 limit 1048576 unlimited"
        assert facts.pop("mpi").startswith("mpirun (Open MPI)")
        assert facts.pop("failed") == ""
        assert facts.pop("resolver") == "nameserver 10.0.2.3 "
        assert facts == {"nfs": "yes", "python": "0", "sudo": "none", "opt": "read-only"}
        made = setup.mounts[0].source / "made"
        assert (made.read_text(), made.stat().st_uid) == ("mine\n", user.uid)
        check_job(machine)
        check_kept(machine)
        check_session(machine)
        machine.send("shutdown")
        assert decode(machine.wait_for("epilogue")["output"]) == "bye\n"
        assert machine.ended()


def test_debian_boots_by_cloud_init(setup_for: MakeSetup) -> None:
    """Without the mark of the short way, as in any other Debian image, cloud-init starts the guest program."""
    setup = setup_for("debian-12", vcpus=2, ram_mib=1024, by_cloud_init=True, hostname="guest-2")
    with Machine(setup) as machine:
        machine.wait_for("ready")
        done = machine.ssh("hostname; id -u; cat /opt-hpc/version; systemctl is-active cloud-init-local cloud-final")
        name, uid, version, *stages = done.stdout.split()
        assert (name, uid, version) == ("guest-2", str(setup.user.uid), "1.0")
        assert stages == ["active", "inactive"]
        machine.send("shutdown")
        machine.wait_for("epilogue")
        assert machine.ended()


def check_kept(machine: Machine) -> None:
    """A job that can be suspended: other shells and another `ps` than in micro."""
    home, where = machine.setup.mounts[0].source, machine.setup.user.home
    (home / "kept.sh").write_text(WRITER)
    (home / "kept.sh").chmod(0o755)
    (home / "kept-run").write_text(f"cd {where}\nVT_JOB_SHELL=/bin/sh VT_JOB_SCRIPT={where}/kept.sh\n")
    session_outlives_its_connection(machine, f"{where}/kept-run", home)


@pytest.mark.slow
def test_the_template_of_red_hats_family_works_with_cloud_init(setup_for: MakeSetup) -> None:
    """In Debian's guest: what is Red Hat's own about a guest of that family is not in the template."""
    setup = setup_for("debian-12", vcpus=2, ram_mib=1024, hostname="guest-4")
    setup.image = setup.image._replace(family="redhat")
    with Machine(setup) as machine:
        machine.wait_for("ready")
        done = machine.ssh("hostname; cat /run/vtorque/family; systemctl is-active cloud-init-local cloud-final")
        assert done.stdout.split() == ["guest-4", "redhat", "active", "inactive"]
        check_job(machine)
        machine.send("shutdown")
        machine.wait_for("epilogue")
        assert machine.ended()


METADATA = {
    "bootcmd": ["echo early >/run/early"],
    "write_files": [
        {"path": "/etc/vt/one", "content": 'it\'s "one"\n', "permissions": "0640", "owner": "root:users"},
        {"path": "/etc/vt/two", "content": "two\n", "defer": True},
    ],
    "runcmd": [["sh", "-c", "id -u >/run/who"], "ip -4 -o addr show scope global | wc -l >/run/addresses"],
    "packages": [],
    "timezone": "Europe/Berlin",
}


def test_cloud_config_of_the_users_own_has_taken_effect_before_the_job(setup_for: MakeSetup) -> None:
    setup = setup_for(
        "debian-12", vcpus=2, ram_mib=1024, metadata=METADATA, prologue="#!/bin/sh\ncat /run/early /run/who\n"
    )
    with Machine(setup) as machine:
        machine.wait_for("ready")
        assert [event["event"] for _, event in machine.events] == ["booted", "prologue", "ready"]
        assert decode(machine.events[1][1]["output"]) == "early\n0\n"
        times = machine.wait_for("times")
        spans = {name: (start, end) for name, start, end in times["spans"]}
        assert {"kernel", "cloud-init init-local"} <= set(spans)
        assert all(0 <= start <= end <= times["uptime"] for start, end in spans.values()), times
        assert spans["kernel"][1] < spans["cloud-init init-local"][0]
        done = machine.ssh(
            "stat -c '%a %U %G' /etc/vt/one; cat /etc/vt/one /etc/vt/two /run/addresses; readlink /etc/localtime;"
            " systemctl is-active cloud-init-local; systemctl --failed --no-legend --plain; id -u debian"
        )
        assert done.stdout.splitlines() == [
            "640 root users", "it's \"one\"", "two", "1", "/usr/share/zoneinfo/Europe/Berlin", "active",
        ]  # fmt: skip
        check_job(machine)
        machine.send("shutdown")
        machine.wait_for("epilogue")
        assert machine.ended()


def test_cloud_config_that_fails_ends_the_job_with_the_reason(setup_for: MakeSetup) -> None:
    setup = setup_for("debian-12", vcpus=2, ram_mib=1024, metadata={"runcmd": ["echo on purpose", "exit 3"]})
    with Machine(setup) as machine:
        event = machine.next_event()
        while event["event"] == "booted":
            event = machine.next_event()
        assert event["event"] == "failed"
        reason = decode(event["reason"]).replace("_", "-")
        assert "what the site or the job has cloud-init do failed" in reason and "scripts-user" in reason
        machine.send("shutdown")
        machine.wait_for("epilogue")
        assert machine.ended()


@pytest.mark.slow
def test_packages_of_the_sites_choice_are_installed_before_the_job(setup_for: MakeSetup, tmp_path: Path) -> None:
    """From a repository in the guest itself."""
    archive = make_deb(tmp_path, "vtorque-hello", {"usr/bin/vtorque-hello": b"#!/bin/sh\necho hello\n"})
    packed = base64.b64encode(archive.read_bytes()).decode()
    deb = {"path": f"/srv/repo/{archive.name}", "encoding": "b64", "content": packed}
    setup = setup_for(
        "debian-12",
        vcpus=2,
        ram_mib=1024,
        hostname="guest-3",
        metadata={
            "write_files": [deb, {"path": "/srv/repo/Packages", "content": index(archive)}],
            "apt": {"preserve_sources_list": False, "sources_list": "deb [trusted=yes] file:/srv/repo ./\n"},
        },
        software=Software(("vtorque-hello",), updates=True),
        prologue="#!/bin/sh\nvtorque-hello; cloud-init schema --system; grep apt-get /var/log/cloud-init.log\n",
    )
    with Machine(setup) as machine:
        machine.wait_for("ready")
        assert [event["event"] for _, event in machine.events] == ["booted", "prologue", "ready"]
        said = decode(machine.events[1][1]["output"])
        assert said.startswith("hello\nValid cloud-config: ")
        assert 0 < said.index("'update'") < said.index("'dist-upgrade'") < said.index("'install', 'vtorque-hello'")
        machine.send("shutdown")
        machine.wait_for("epilogue")
        assert machine.ended()


def check_job(machine: Machine) -> None:
    """A job's status and streams, and a signal that ends it."""
    home, where = machine.setup.mounts[0].source, machine.setup.user.home
    script = home / "job.sh"
    script.write_text('#!/bin/bash\necho out; echo err >&2\n[ -n "$HOLD" ] && sleep 600\nexit 3\n')
    script.chmod(0o755)
    for name, hold in (("run-1.sh", ""), ("run-2.sh", "y")):
        (home / name).write_text(
            f"export HOLD={hold}\ncd {where}\nVT_JOB_SHELL=/bin/bash VT_JOB_SCRIPT={where}/job.sh\n"
        )
    job = machine.start_job(f"{where}/run-1.sh")
    assert job.stdout is not None and job.stderr is not None and job.stdin is not None
    assert (job.stdout.read(), job.stderr.read(), job.wait(timeout=60)) == ("out\n", "err\n", 3)
    job = machine.start_job(f"{where}/run-2.sh")
    assert job.stdout is not None and job.stderr is not None and job.stdin is not None
    try:
        assert job.stdout.readline() == "out\n"
        job.stdin.write("TERM\n")
        job.stdin.flush()
        assert job.wait(timeout=60) == 128 + 15
    finally:
        job.kill()
        job.communicate()


def check_session(machine: Machine) -> None:
    """A login shell on a terminal, whose runner is dash here."""
    home, where = machine.setup.mounts[0].source, machine.setup.user.home
    (home / "run-3.sh").write_text(f"cd {where}\nVT_JOB_SHELL=/bin/bash VT_JOB_SCRIPT=\n")
    pid, screen = machine.start_on_terminal(f"{where}/run-3.sh", f"{where}/status")
    screen.expect(r"\$ ")
    screen.type("stty size; tty\n")
    screen.expect(r"40 100\r\n/dev/pts/\d\r\n")
    screen.type("sleep 1234\n")
    screen.expect(r"sleep 1234\r\n")
    time.sleep(1)
    screen.type("\x03")
    screen.expect(r"\$ ")
    screen.type("sleep 1235 & exit 7\n")
    screen.rest()
    screen.close()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7 and (home / "status").read_text() == "7\n"
    assert machine.ssh("pgrep -u ada -f '[s]leep|[v]torque/run'; ls /tmp | grep vtorque").stdout == ""


def test_debian_boots_from_its_own_disk(setup_for: MakeSetup) -> None:
    """SeaBIOS, SYSLINUX and the disk's own kernel lead to a login prompt; there is no seed and no harm in that."""
    setup = setup_for("debian-12", own_disk=True, seed=False, mounts=(), vcpus=2, ram_mib=1024)
    with Machine(setup) as machine:
        machine.wait_for_console(r"localhost login:")
        assert "Linux" in machine.console_text()


def test_debian_image_holds_no_identity(setup_for: MakeSetup) -> None:
    """No host keys, no machine id and no password of root's in the disk, read without booting it."""
    setup = setup_for("debian-12", seed=False)
    raw = setup.directory / "disk.raw"
    subprocess.run(
        ["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(setup.image.path("disk")), str(raw)], check=True
    )

    def debugfs(request: str) -> str:
        command = ["debugfs", "-R", request, f"{raw}?offset={64 << 20}"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert "ssh_host" not in debugfs("ls -p /etc/ssh")
    assert "sshd_config" in debugfs("ls -p /etc/ssh")
    assert debugfs("cat /etc/machine-id") == ""
    shadow = dict(line.split(":")[:2] for line in debugfs("cat /etc/shadow").splitlines())
    assert shadow["root"] in ("*", "!", "!*")
    assert "NoCloud" in debugfs("cat /etc/cloud/cloud.cfg.d/90-vtorque.cfg")


STATIC = GuestNet(QEMU_MAC, "10.0.2.15/24", "10.0.2.2", 1400, ("10.0.2.3",), "job.test", ntp=("10.0.2.2",))
"""What QEMU's user networking would give by DHCP, and more."""


@pytest.mark.parametrize("by_cloud_init", [False, True])
def test_debian_with_a_static_address_and_mpirun_without_options(setup_for: MakeSetup, by_cloud_init: bool) -> None:
    setup = setup_for("debian-12", vcpus=2, ram_mib=1024, hostname="vn1-1", network=STATIC, by_cloud_init=by_cloud_init)
    home, where = setup.mounts[0].source, setup.user.home
    script = home / "job.sh"
    script.write_text("#!/bin/sh\nmpirun hostname\nmpirun -np 1 hostname\n")
    script.chmod(0o755)
    (home / "run-1.sh").write_text(
        f"export PBS_ENVIRONMENT=PBS_BATCH PBS_JOBID=7.server PBS_NODEFILE=/run/vtorque/nodefile\n"
        f"cd {where}\nVT_JOB_SHELL=/bin/bash VT_JOB_SCRIPT={where}/job.sh\n"
    )
    with Machine(setup) as machine:
        assert machine.wait_for("ready")["address"] == "10.0.2.15"
        done = machine.ssh(
            "cat /sys/class/net/eth0/mtu; ip -4 -o address show dev eth0 | grep -c inet; cat /etc/resolv.conf;"
            " ip route show default; systemctl is-active systemd-timesyncd; cat /run/systemd/timesyncd.conf.d/*;"
            " ls /run/systemd/netif/leases; ssh -G vn1-1 | grep /run/vtorque/key"
        )
        assert done.stdout.splitlines() == [
            "1400", "1", "search job.test", "nameserver 10.0.2.3", "default via 10.0.2.2 dev eth0 proto static ",
            "active", "[Time]", "NTP=", "NTP=10.0.2.2", "identityfile /run/vtorque/key",
        ]  # fmt: skip
        job = machine.start_job(f"{where}/run-1.sh")
        assert job.stdout is not None and job.stderr is not None
        try:
            assert (job.stdout.read(), job.stderr.read(), job.wait(timeout=120)) == ("vn1-1\n" * 3, "", 0)
        finally:
            job.kill()
            job.communicate()
        machine.send("shutdown")
        machine.wait_for("epilogue")
        assert machine.ended()
