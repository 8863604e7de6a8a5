"""What qsub takes, in a real guest: arrays, arguments, own prologue and epilogue, holds, dependencies, policy."""

from __future__ import annotations

import json
import subprocess

import pytest

from .conftest import Site, User, eventually

ENGINES = ("local", "slurm", "torque")
ARRAY = pytest.mark.only("local", reason="ids and ends of arrays are each batch system's own; it has a test of them")
OWN_HOOKS = pytest.mark.only("local", "torque", reason="prologues of the user's own are refused on Slurm")


def members(site: Site, job_id: str, count: int) -> list[str]:
    """The ids of an array's members, from the array's own, `5[].host`."""
    head, _, tail = job_id.partition("[]")
    return [f"{head}[{index}]{tail}" for index in range(1, count + 1)]


@ARRAY
def test_each_member_of_an_array_has_a_guest(site: Site, user: User) -> None:
    script = (
        '#!/bin/sh\necho "index $PBS_ARRAYID in $(hostname) as $VTORQUE_JOBID"\n[ "$PBS_ARRAYID" != 2 ] || exit 9\n'
    )
    job_id = user.submit(script, "-t", "1-3%2", name="array.sh")
    assert "[]" in job_id
    assert site.wait(job_id) == 9
    number = job_id.partition("[")[0]
    for index, member in enumerate(members(site, job_id, 3), 1):
        out = user.output(f"array.sh.o{number}-{index}")
        assert out.startswith(f"index {index} in v") and f"as {member}" in out, (
            out,
            user.output(f"array.sh.e{number}-{index}"),
        )
    eventually(lambda: not list((user.home / ".vtorque").glob("*/*")), "the last member takes the files away", 10)


@ARRAY
def test_an_array_that_is_deleted(site: Site, user: User) -> None:
    job_id = user.submit("#!/bin/sh\nsleep 300\n", "-t", "1-3")
    site.wait_for(members(site, job_id, 1)[0], "job started")
    assert site.client("qdel", job_id).returncode == 0
    site.wait(job_id)


def test_arguments_of_the_script(user: User) -> None:
    done = user.job('#!/bin/sh\nfor word; do echo "<$word>"; done\n', "-F", "one 'two  three' \"$HOME\" a\\ b")
    assert (done.status, done.out) == (0, f"<one>\n<two  three>\n<{user.home}>\n<a b>\n"), done.err


@OWN_HOOKS
def test_prologue_and_epilogue_of_the_users_own(site: Site, user: User) -> None:
    user.write("before", '#!/bin/sh\necho "prologue of $1 on $(hostname) with $# arguments"\n', 0o755)
    user.write("after", '#!/bin/sh\necho "epilogue of $1 on $(hostname)"\n', 0o755)
    done = user.job("#!/bin/sh\necho job in $(hostname)\n", "-l", "prologue=before,epilogue=after", "-j", "oe")
    node = subprocess.run(["hostname"], capture_output=True, text=True, check=True).stdout.strip()
    lines = done.out.splitlines()
    assert done.status == 0, done.err
    assert lines[0] == f"prologue of {done.job_id} on {node} with 8 arguments"
    assert lines[1].startswith("job in v")
    assert lines[2] == f"epilogue of {done.job_id} on {node}"


@OWN_HOOKS
def test_a_prologue_of_the_users_own_that_aborts(site: Site, user: User) -> None:
    user.write("before", "#!/bin/sh\nexit 1\n", 0o755)
    job_id = user.submit("#!/bin/sh\necho never\n", "-l", "prologue=before")
    assert site.wait(job_id) == -2


def test_a_held_job_and_one_that_depends_on_it(site: Site, user: User) -> None:
    held = user.submit("#!/bin/sh\nsleep 1; : >first\n", "-h", name="first.sh")
    after = user.submit("#!/bin/sh\nsleep 1; : >second\n", "-W", f"depend=afterok:{held}", name="second.sh")
    assert site.held(held) and site.waits(after)
    done = user.run(*site.command("qrls", held))
    assert done.returncode == 0, done.stderr
    assert (site.wait(held), site.wait(after)) == (0, 0)
    for job, script in ((held, "first.sh"), (after, "second.sh")):
        user.finished(job, 0, "", script)
    # by the node's clock: that of an emulated guest is off by seconds when the node is busy
    first, second = ((user.home / name).stat().st_mtime for name in ("first", "second"))
    assert first < second


def test_directives_alone_make_the_guest(user: User) -> None:
    script = "#PBS -vm vcpus=2,ram=300M\n#PBS -N sized\necho $VTORQUE_VCPUS $VTORQUE_RAM_MIB $(nproc) $PBS_NP\n"
    done = user.job(script, name="sized")
    assert (done.status, done.out) == (0, "2 300 2 2\n"), done.err


def test_a_guest_is_filled_with_what_the_job_asks_for(user: User) -> None:
    done = user.job("echo $VTORQUE_VCPUS $VTORQUE_RAM_MIB $(nproc)\n", "-l", "nodes=1:ppn=2,mem=640mb")
    assert (done.status, done.out) == (0, "2 384 2\n"), done.err


def test_a_script_with_dos_line_ends(user: User) -> None:
    done = user.job("#!/bin/sh\r\n#PBS -N dos\r\necho fine\r\n", name="dos")
    assert (done.status, done.out) == (0, "fine\n"), done.err
    assert "vsub: note: the job script" in done.progress


def test_vcpus_bound_as_a_file_says(site: Site, user: User) -> None:
    user.write("bind.yaml", "1: {0: 1, 1: 0-1}\n")
    script = "#!/bin/sh\ntouch up\nwhile [ ! -e go ]; do sleep 0.1; done\n"
    job_id = user.submit(script, "-vm", "vcpus=2,vcpu_pinning=bind.yaml")
    eventually(lambda: (user.home / "up").exists(), "the job runs")
    qemu = site.qemu()
    assert qemu is not None
    found = []
    for thread in qemu.threads():
        with open(f"/proc/{qemu.pid}/task/{thread.id}/comm") as stream:
            if stream.read().startswith("CPU "):
                with open(f"/proc/{qemu.pid}/task/{thread.id}/status") as status:
                    found += [line.split()[1] for line in status if line.startswith("Cpus_allowed_list")]
    user.write("go", "")
    assert sorted(found) == ["0-1", "1"]
    assert site.wait(job_id) == 0


def test_what_was_explained_is_what_comes(site: Site, user: User) -> None:
    options = ("-l", "nodes=1:ppn=2", "-vm", "ram=300M")
    user.write("job.sh", "echo $VTORQUE_VCPUS $VTORQUE_RAM_MIB\n")
    explained = json.loads(user.run(str(site.vsub), "--explain", "--json", *options, "job.sh").stdout)["values"]
    assert not list(user.home.glob(".vtorque/*"))
    done = user.job("echo $VTORQUE_VCPUS $VTORQUE_RAM_MIB\n", *options)
    assert done.out.split() == [explained["vcpus"]["value"], "300"]


def test_root_checks_the_policy_of_the_user_again(site: Site, user: User) -> None:
    """The node's own configuration counts there: it may be stricter by the time the job starts."""
    job_id = user.submit("#!/bin/sh\necho never\n", "-h", "-vm", "vcpus=2")
    config = site.prefix / "etc" / "vtorque" / "vtorque.yaml"
    text = config.read_text()
    try:
        config.write_text(text.replace("policy:\n", f"policy:\n  users: {{{user.name}: {{vcpus: {{max: 1}}}}}}\n"))
        user.run(*site.command("qrls", job_id))
        assert site.wait(job_id) == 71
    finally:
        config.write_text(text)
        subprocess.run([str(site.vmgr), "config", "compile"], check=True)
    error = user.finished(job_id, 71, "").err
    assert f"policy.users.{user.name}.vcpus.max" in error and "VT-POLICY" in error
