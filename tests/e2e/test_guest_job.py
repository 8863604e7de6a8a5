"""The path of a job through a real guest: identity, place, streams, status, environment, hooks."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from .conftest import Site, User, eventually

ENGINES = ("local", "slurm", "torque")
LOOK = """#!/bin/bash
echo "id=$(id -u):$(id -g):$(id -un)"
echo "host=$(hostname)"
echo "pwd=$(pwd)"
echo "cpus=$(grep -c ^processor /proc/cpuinfo)"
echo "ram=$(awk '/MemTotal/ {print int($2/1024)}' /proc/meminfo)"
echo "umask=$(umask)"
echo "fsize=$(ulimit -f)"
echo "nodefile=$(cat $PBS_NODEFILE | tr '\\n' ' ')"
echo "opt=$(cat /opt-hpc/software)"
echo "opt-write=$(touch /opt-hpc/x 2>&1 && echo yes || echo no)"
echo "seed-write=$(for d in /dev/vd?; do dd if=/dev/zero of=$d count=1 2>/dev/null && echo yes; done)"
env | sort | sed 's/^/env:/'
echo made in the guest >"made here"
echo on the error stream >&2
exit 3
"""


def facts(out: str) -> dict[str, str]:
    return dict(line.split("=", 1) for line in out.splitlines() if "=" in line)


@pytest.mark.parametrize("image", ["micro", "debian-12"])
def test_job_runs_as_the_user_in_the_guest(user: User, site: Site, image: str) -> None:
    work = user.home / "a b"
    work.mkdir()
    os.chown(work, user.uid, user.gid)
    user.write("mine.sh", "#!/bin/sh\necho mine-$1 $(id -u) $(hostname) >>$HOME/hooks\n")
    pro = user.write("pro.sh", "#!/bin/sh\necho user-prologue $(id -u) $(hostname) >>$HOME/hooks\n")
    epi = user.write("epi.sh", "#!/bin/sh\necho user-epilogue $(id -u) $(hostname) >>$HOME/hooks\n")
    done = user.job(
        LOOK,
        "-vm", f"img={image},vcpus=2,ram=600M",
        "-vm", f"vm_prologue={pro}", "-vm", f"vm_epilogue={epi}",
        "-v", "FIRST=a b,SECOND=c=d", "-V",
        *site.limits,
        "-o", f"{user.home}/", "-e", f"{user.home}/",
        cwd=work, env={"FROM_V": "kept\nwhole", "TMPDIR": "/nowhere"},
    )  # fmt: skip
    assert done.status == 3, done.progress
    seen = facts(done.out)
    assert seen["id"] == f"{user.uid}:{user.gid}:{user.name}"
    guest = site.guest
    assert seen["host"] == guest
    assert seen["pwd"] == str(work)
    assert seen["cpus"] == "2"
    assert 480 <= int(seen["ram"]) <= 600
    assert int(seen["umask"], 8) == site.umask
    assert seen["fsize"] == site.file_kib
    assert seen["nodefile"].split() == [guest, guest]
    assert seen["opt"] == "of the cluster"
    assert "Read-only file system" in seen["opt-write"]
    assert seen["seed-write"] == ""
    for name, value in {
        "DISTRO": "SLG", "VTORQUE_IMAGE": image, "VTORQUE_RANK": "0", "VTORQUE_GUESTS": guest, "VTORQUE_VCPUS": "2",
        "VTORQUE_RAM_MIB": "600", "FIRST": "a b", "SECOND": "c=d", "FROM_V": "kept", "PBS_O_WORKDIR": str(work),
        "PBS_JOBID": site.whole(done.job_id), "HOME": str(user.home), "PBS_ENVIRONMENT": "PBS_BATCH",
    }.items():  # fmt: skip
        assert seen[f"env:{name}"] == value, name
    assert "env:TMPDIR" not in seen
    assert "env:whole" in done.out
    made = work / "made here"
    assert made.read_text() == "made in the guest\n"
    assert (made.stat().st_uid, made.stat().st_gid) == (user.uid, user.gid)
    assert made.stat().st_mode & 0o777 == 0o666 & ~site.umask
    assert done.err == "on the error stream\n"
    assert (user.home / "hooks").read_text().splitlines() == [
        f"root-prologue 0 {guest}",
        f"user-prologue {user.uid} {guest}",
        f"user-epilogue {user.uid} {guest}",
        f"root-epilogue 0 {guest}",
    ]
    assert not list((user.home / ".vtorque").iterdir())
    for stage in (
        "staged",
        "launched",
        "pinned and running",
        "booted",
        "prologue",
        "ready",
        "job started",
        "job ended",
        "gone",
    ):
        assert re.search(rf"\+[0-9.]+ s  {stage}$", done.progress, re.MULTILINE), stage


@pytest.mark.parametrize(
    "end, status", [("exit 0", 0), ("exit 137", 137), ("kill -KILL $$", 137), ("exit 255", 255), ("false", 1)]
)
def test_exit_status_comes_back(user: User, end: str, status: int) -> None:
    done = user.job(f"#!/bin/sh\necho out\n{end}\n")
    assert (done.status, done.out, done.err) == (status, "out\n", "")


def test_output_goes_where_the_options_say(user: User) -> None:
    done = user.job("#PBS -N named\n#PBS -j oe\n#PBS -o joined\necho out\necho err >&2\n")
    assert done.status == 0
    assert (user.home / "joined").read_text() == "out\nerr\n"
    done = user.job("#PBS -N other\necho out; echo err >&2\n", "-e", "errors", "-q", "batch")
    number = done.job_id.partition(".")[0]
    assert (user.output(f"other.o{number}"), user.output("errors")) == ("out\n", "err\n")


def test_plain_vsub_is_a_guest_job_and_off_is_none(user: User, site: Site) -> None:
    user.write("where.sh", "hostname\n")
    job = user.submit("hostname; pwd\n", name="where.sh", env={"VTORQUE": "1"})
    assert site.wait(job) == 0
    guest = user.finished(job, 0, "", "where.sh").out.splitlines()
    assert guest == [site.guest, str(user.home)]
    bare = user.job("#!/bin/sh\nhostname\nexit 4\n", "-vm", "off", name="where.sh")
    assert (bare.status, user.output(site.plain_output("where.sh", bare.job_id))) == (4, f"{site.node}\n")


def test_script_on_standard_input_with_directives(user: User, site: Site) -> None:
    child = user.start(
        "/bin/sh", "-c", f"printf '#PBS -vm vcpus=2\\n#PBS -N piped\\nnproc\\n' | {site.vsub} --wait",
    )  # fmt: skip
    out, err = child.communicate(timeout=240)
    assert child.returncode == 0, err
    assert user.finished(out.strip(), 0, err, "piped").out == "2\n"


def test_each_vcpu_has_a_cpu_of_its_own_and_ps_shows_the_guest(user: User, other: User, site: Site) -> None:
    cpus = os.sched_getaffinity(0)
    if len(cpus) < 2:
        pytest.skip("one CPU only")
    job = user.submit("touch running; until [ -e go ]; do sleep 0.2; done\n", "-vm", "vcpus=2")
    eventually((user.home / "running").exists, "the job runs")
    qemu = site.qemu()
    assert qemu is not None
    pinned = []
    for thread in qemu.threads():
        name = Path(f"/proc/{qemu.pid}/task/{thread.id}/comm").read_text()
        if name.startswith("CPU "):
            pinned.append(os.sched_getaffinity(thread.id))
    assert len(pinned) == 2 and all(len(one) == 1 for one in pinned) and pinned[0] != pinned[1]
    assert (qemu.uids().real, qemu.gids().real) == (user.uid, user.gid)
    status = Path(f"/proc/{qemu.pid}/status").read_text()
    assert "NoNewPrivs:\t1" in status and "Seccomp:\t2" in status and "CapEff:\t0000000000000000" in status
    [seed] = (site.node_root / "spool" / "jobs").glob("*/*/seed.1.iso")
    assert (seed.stat().st_uid, seed.stat().st_mode & 0o777) == (0, 0o600)
    [held] = [fd.name for fd in Path(f"/proc/{qemu.pid}/fd").iterdir() if fd.samefile(seed)][:1]
    flags = int(Path(f"/proc/{qemu.pid}/fdinfo/{held}").read_text().split("flags:")[1].split()[0], 8)
    assert flags & os.O_ACCMODE == os.O_RDONLY
    words = str(site.vmgr), "ps", "--json"
    [guest] = json.loads(site.on_node(*words, user=user))
    assert (guest["job"], guest["vcpus"], guest["state"]) == (site.whole(job), 2, "running")
    assert guest["image"].startswith("micro@")
    assert json.loads(site.on_node(*words, user=other)) == []
    assert site.whole(job) in site.on_node(str(site.vmgr), "ps")
    user.write("go", "")
    assert site.wait(job) == 0


def test_refused_where_no_mount_shows_the_directory(user: User) -> None:
    path = user.write("job.sh", "true\n")
    done = user.run(str(user.site.vsub), str(path), cwd=path.parents[1])
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("VT-WORKDIR: ") or "VT-WORKDIR: " in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (user.home / ".vtorque").exists() or not list((user.home / ".vtorque").iterdir())


def test_failing_hooks_of_site_and_user_end_the_job_with_their_output(user: User) -> None:
    user.write("fail-prologue", "")
    done = user.job("echo never\n")
    assert (done.status, done.out) == (77, "")
    assert "the prologue of the site says no" in done.err and "VT-HOOK" in done.err
    (user.home / "fail-prologue").rename(user.home / "fail-epilogue")
    done = user.job("echo ran\n")
    assert (done.status, done.out) == (77, "ran\n")
    assert "the epilogue of the site says no" in done.err
    (user.home / "fail-epilogue").unlink()
    pro = user.write("pro.sh", "#!/bin/sh\necho not today; exit 9\n")
    done = user.job("echo never\n", "-vm", f"vm_prologue={pro}")
    assert (done.status, done.out) == (77, "not today\n")
    assert "status 9" in done.err
