"""Shares of kind nfs in a real guest, from a real server: public data, and a user's own by Kerberos."""

from __future__ import annotations

import base64
import os
import pwd
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from guestmachine import Machine, Mount, User
from guestsetup import make_setup
from kerberos import realm
from nfsserver import nfs_server
from rootshell import PROLOGUE, run_as_root

pytestmark = [
    pytest.mark.guest,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: an NFS server"),
]


@pytest.fixture
def base() -> Iterator[Path]:
    folder = Path("/tmp") / f"vtorque-nfs-{os.getpid()}"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def test_public_data(base: Path) -> None:
    public = base / "public"
    public.mkdir()
    (public / "readme").write_text("for all\n")
    (public / "private").write_text("root's\n")
    (public / "private").chmod(0o600)
    (public / "open").mkdir()
    (public / "open").chmod(0o777)
    (base / "server").mkdir()
    setup = make_setup(base, "debian-12", vcpus=2, ram_mib=1024)
    share = Mount("public", "/public data", Path("10.0.2.2:/export"), True, "nfs", "sys")
    setup.mounts = (*setup.mounts, share)
    with nfs_server(base / "server", public), Machine(setup) as machine:
        machine.wait_for("ready")
        said = machine.ssh(
            "cd '/public data' && cat readme; findmnt -n -o FSTYPE,OPTIONS -T . | tr ',' ' '; cat private; "
            "echo x >open/new"
        )
        lines = said.stdout.splitlines()
        assert lines[0] == "for all", said
        options = lines[1].split()
        assert {"nfs4", "ro", "nosuid", "nodev", "hard", "sec=sys", "vers=4.2"} - set(options) == set(), options
        assert "private: Permission denied" in said.stderr and "open/new: Read-only file system" in said.stderr
        machine.send("quiesce")
        assert machine.wait_for("quiesce")["status"] == 0
        machine.send("mount")
        assert machine.wait_for("mount")["status"] == 0
        assert machine.ssh("cat '/public data/readme'").stdout == "for all\n"
        machine.send("shutdown")
        assert machine.ended()
    assert list((public / "open").iterdir()) == []


def test_a_server_that_is_not_there_is_told(base: Path) -> None:
    setup = make_setup(base, "debian-12", vcpus=2, ram_mib=1024)
    setup.mounts = (*setup.mounts, Mount("data", "/data", Path("10.0.2.2:/absent"), True, "nfs", "sys"))
    (base / "server").mkdir()
    (base / "export").mkdir()
    failed = pytest.raises(AssertionError, match=r"cannot mount data \(nfs\) on /data: mount\.nfs")
    with nfs_server(base / "server", base / "export"), Machine(setup) as machine, failed:
        machine.wait_for("ready")


TICKETS = """
# as a site's VM prologue may: the realm, and the user's ticket, for the user and for root who mounts
cat >/etc/krb5.conf <<END
{configuration}
END
for uid in 0 $VT_UID; do
    echo {ticket} | base64 -d >/tmp/krb5cc_$uid
    chmod 0600 /tmp/krb5cc_$uid
    chown $uid /tmp/krb5cc_$uid
done
"""
BY_KERBEROS = "Access_Type = RW; SecType = krb5, krb5i, krb5p; Squash = Root_Squash;"


@pytest.fixture
def account() -> Iterator[pwd.struct_passwd]:
    """A user whom the server knows by name, as it has to."""
    name = f"vtkrb{os.getpid() % 100000}"
    subprocess.run(["useradd", "--no-create-home", "--home-dir", f"/home/{name}", name], check=True)
    try:
        yield pwd.getpwnam(name)
    finally:
        subprocess.run(["userdel", name], check=True)


def test_a_users_own_files_by_kerberos(base: Path, account: pwd.struct_passwd) -> None:
    """The server goes by the ticket: root of the guest has what the ticket gives, and may claim no other uid."""
    folder, keys, server = base / "export", base / "keys", base / "server"
    for each in (folder, keys, server):
        each.mkdir()
    for name, uid in (("own", account.pw_uid), ("other", 54321)):
        (folder / name).mkdir()
        (folder / name / "file").write_text(f"{name}\n")
        for path in (folder / name, folder / name / "file"):
            os.chown(path, uid, uid)
        (folder / name).chmod(0o700)
    with realm(keys) as made:
        keytab = made.keytab("nfs/nfs.test")
        ticket = base64.b64encode(made.ticket(account.pw_name)).decode()
        setup = make_setup(
            base, "debian-12", vcpus=2, ram_mib=1024, hosts=(("10.0.2.15", "guest-1"), ("10.0.2.2", "nfs.test")),
            prologue=PROLOGUE + TICKETS.format(configuration=made.configuration("10.0.2.2"), ticket=ticket),
        )  # fmt: skip
        setup.user = User(account.pw_name, account.pw_uid, account.pw_gid, account.pw_name, groups=())
        os.chown(base / "home", account.pw_uid, account.pw_gid)
        setup.mounts = (
            Mount("home", setup.user.home, base / "home"),
            Mount("data", "/data", Path("nfs.test:/export"), False, "nfs", "krb5p"),
        )
        with nfs_server(server, folder, export=BY_KERBEROS, keytab=keytab, env=made.env), Machine(setup) as machine:
            machine.wait_for("ready")
            said = machine.ssh(
                "cd /data; cat own/file; echo new >own/new; stat -c %u own/new; cat other/file; ls other; "
                "findmnt -n -o OPTIONS -T . | tr ',' '\\n' | grep -E 'sec|^rw'"
            )
            assert said.stdout.split() == ["own", str(account.pw_uid), "rw", "sec=krb5p"], said
            assert said.stderr.count("Permission denied") == 2
            said_to_root, _ = run_as_root(
                machine, "exec setpriv --reuid=54321 --regid=54321 --clear-groups cat /data/other/file /data/own/file"
            )
            assert said_to_root.count("denied") == 2, "a uid without a ticket is nobody"
            assert run_as_root(machine, "cat /data/own/file") == ("own", 0), "against that: root has the user's"
            machine.send("shutdown")
            assert machine.ended()
    assert (folder / "own" / "new").read_text() == "new\n" and (folder / "own" / "new").stat().st_uid == account.pw_uid
