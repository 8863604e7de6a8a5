"""Users who write their own specification, or put something else where root expects one.

Root reads one file of the user's, in a child with the user's rights, and believes it only when it hashes to its path
and stays within the site's policy. The fixture `user` checks that nothing is left on the node.
"""

from __future__ import annotations

import os
import shlex
import time
from pathlib import Path
from typing import Any, Optional

import psutil
import pytest

from vmgr.jobspec import GuestGroup, Pinning, Spec, dump_spec, spec_hash

from .conftest import Done, Site, User, eventually

ENGINES = ("local", "slurm", "torque")
USER_FILE_LIMIT_S = 2.0
"""`timeouts.user_file` of the tests' configuration."""

SPEC = Spec(
    ruid="abcdefgh12345678",
    groups=(GuestGroup("micro", 1, 1, 256),),
    asked=(),
    distro=None,
    arch=None,
    pinning=Pinning("auto", None),
    fs_type="overlay",
    disk=None,
    metadata=None,
    mounts=("home", "opt-hpc"),
    network="user",
    iocm=None,
    suspend=False,
    vrdma=False,
    unclot_mib=None,
    workdir="/tmp",
    shell=None,
    interactive=False,
    array=None,
    script="0" * 64,
    arguments="",
    vm_prologue=None,
    vm_epilogue=None,
    ssh_public_key="ssh-ed25519 " + "A" * 68,
    keep=False,
)


def by_hand(user: User, data: bytes, *, sha256: str = "") -> Path:
    """A job directory that no `vsub` has made."""
    folder = user.home / ".vtorque" / SPEC.ruid / (sha256 or spec_hash(data))
    folder.mkdir(parents=True)
    (folder / "spec.json").write_bytes(data)
    (folder / "prologue").write_text(f'#!/bin/sh\nexec {user.site.prefix}/libexec/vtorque-user-prologue "$@"\n')
    (folder / "prologue").chmod(0o700)
    for path in (*folder.parents[:2], folder, *folder.iterdir()):
        os.chown(path, user.uid, user.gid)
    return folder


def submit(user: User, folder: Path, hanging: Optional[Hanging] = None) -> Done:
    """Submit to the batch system directly, as `vsub` would.

    A file system that hangs is let go as soon as the agent has given up on it: until then the batch system waits for
    the prologue that is on it too, and nobody could tell the user anything.
    """
    wrapper = user.write(
        "wrapper", f"#!/bin/sh\nexec {user.site.prefix}/libexec/vtorque-job {shlex.quote(str(folder))}\n"
    )
    done = user.run(*user.site.by_hand(folder, wrapper))
    assert done.returncode == 0, done.stderr
    job = done.stdout.strip()
    if hanging:
        user.site.wait_for(job, "failed")
        hanging.server.resume()
    return user.finished(job, user.site.wait(job), "", "wrapper")


@pytest.mark.parametrize(
    "change, said",
    [
        ({"vcpus": 3}, "vcpus=3 "),
        ({"ram_mib": 4096}, "ram=4G "),
        ({"ram_mib": 64}, "ram=64M "),
        ({"image": "nosuch"}, "nosuch"),
        ({"per_node": 17}, "vms_per_node=17 "),
    ],
)
def test_policy_holds_for_a_specification_written_by_hand(user: User, change: dict[str, Any], said: str) -> None:
    data = dump_spec(SPEC._replace(groups=(SPEC.groups[0]._replace(**change),)))
    done = submit(user, by_hand(user, data))
    assert done.status == 71
    assert said in done.err and done.err.startswith("VT-") and done.err.count("\n") == 1


def test_unknown_keys_and_altered_bytes_are_refused(user: User) -> None:
    data = b'{"surprise":1,' + dump_spec(SPEC)[1:]
    assert "surprise" in submit(user, by_hand(user, data)).err
    done = submit(user, by_hand(user, dump_spec(SPEC), sha256="0" * 64))
    assert done.status == 71 and "altered" in done.err


class Hanging:
    """A FUSE file system of the user's that never answers: a real mount, whose server is simply stopped."""

    def __init__(self, user: User, where: Path) -> None:
        self.site, self.where = user.site, str(where)
        source = user.home / "behind"
        source.mkdir()
        words = ("bindfs", "-f", "-o", "nonempty,allow_other", str(source), self.where)
        self.started = psutil.Popen(self.site.entering(*words))
        eventually(
            lambda: self.where in self.site.on_node("cat", "/proc/mounts"), "the FUSE mount is there", limit_s=10
        )
        self.server = next(iter(self.started.children()), self.started)
        self.server.suspend()

    def end(self) -> None:
        self.server.kill()
        self.started.wait()
        self.site.on_node("umount", "-l", self.where)


@pytest.mark.parametrize("kind", ["fifo", "fuse", "link", "directory", "huge", "foreign", "missing"])
def test_hostile_paths_delay_no_hook_and_end_in_a_reason(user: User, other: User, site: Site, kind: str) -> None:
    folder = by_hand(user, dump_spec(SPEC))
    spec = folder / "spec.json"
    hanging = None
    spec.unlink()
    if kind == "fifo":
        os.mkfifo(spec)
    elif kind == "fuse":
        hanging = Hanging(user, folder)
    elif kind == "link":
        spec.symlink_to("/etc/shadow")
    elif kind == "directory":
        spec.mkdir()
    elif kind == "huge":
        with open(spec, "wb") as stream:
            stream.truncate(1 << 30)
    elif kind == "foreign":
        spec.write_bytes(dump_spec(SPEC))
    if kind not in ("link", "fuse", "missing"):
        os.chown(spec, *(other.uid, other.gid) if kind == "foreign" else (user.uid, user.gid))
    start = time.monotonic()
    try:
        done = submit(user, folder, hanging)
        took = time.monotonic() - start
    finally:
        if hanging:
            hanging.end()
    assert done.status == 71
    assert done.err.startswith("VT-SPEC: ") and done.err.count("\n") == 1, done.err
    assert took < 2 * USER_FILE_LIMIT_S + 5
    assert all(seconds < 1.5 for seconds in site.hook_times())
    if kind == "link":
        assert "root:" not in done.err


@pytest.mark.parametrize("what", ["rewritten", "deleted", "script"])
def test_what_a_user_changes_after_submission_only_makes_root_refuse(user: User, site: Site, what: str) -> None:
    job = user.submit("touch ran\n", "-h")
    [spec] = user.home.glob(".vtorque/*/*/spec.json")
    folder = spec.parent
    if what == "rewritten":
        for path in folder.iterdir():
            path.write_text(f"#!/bin/sh\nid >>{user.home}/rewritten\n")
    elif what == "deleted":
        user.run("rm", "-rf", str(folder.parent))
    else:
        (folder / "script").write_text("#!/bin/sh\ntouch $HOME/changed\n")
    assert site.client("qrls", job).returncode == 0
    assert site.wait(job) == 71
    err = user.finished(job, 71, "").err
    assert err.startswith("VT-SPEC: "), err
    assert not (user.home / "ran").exists() and not (user.home / "changed").exists()
    if what == "rewritten":
        # the user's own file ran as the user, and root did nothing with it
        lines = (user.home / "rewritten").read_text().splitlines() if (user.home / "rewritten").exists() else []
        assert all(f"uid={user.uid}(" in line for line in lines)


def test_a_guest_that_no_job_comes_for_is_ended(user: User, site: Site) -> None:
    """A job whose own script never asks for its guest: the guest does not stay for as long as the job does."""
    folder = by_hand(user, dump_spec(SPEC))
    script = user.write("idle.sh", "#!/bin/sh\nuntil [ -e free ]; do sleep 0.1; done\n")
    job = user.run(*site.by_hand(folder, script)).stdout.strip()
    site.wait_for(job, "ready")
    assert site.qemu()
    eventually(lambda: not site.qemu(), "the guest has ended", limit_s=60)
    assert "no job has come for the guest within 20 s" in site.log()
    user.write("free", "")
    assert site.wait(job) == 0
