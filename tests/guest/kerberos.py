"""A Kerberos realm for tests: a key distribution centre of its own on 127.0.0.1, with keys and tickets in files."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from ports import free_port

REALM = "VT.TEST"
KRB5 = """\
[libdefaults]
    default_realm = {realm}
    dns_lookup_kdc = false
    dns_lookup_realm = false
    dns_canonicalize_hostname = false
    rdns = false
[realms]
    {realm} = {{
        kdc = {address}:{port}
    }}
"""
KDC = """\
[kdcdefaults]
    kdc_listen = 127.0.0.1:{port}
    kdc_tcp_listen = 127.0.0.1:{port}
[realms]
    {realm} = {{
        database_name = {folder}/principal
        key_stash_file = {folder}/stash
        acl_file = {folder}/acl
    }}
"""
PROGRAMS = ("krb5kdc", "kdb5_util", "kadmin.local", "kinit")


class Realm:
    """A running realm whose files are in `folder`."""

    def __init__(self, folder: Path) -> None:
        for program in PROGRAMS:
            if shutil.which(program) is None:
                pytest.skip(f"{program} is not installed")
        self.folder = folder
        self.port = free_port()
        (folder / "kdc.conf").write_text(KDC.format(realm=REALM, port=self.port, folder=folder))
        (folder / "krb5.conf").write_text(self.configuration("127.0.0.1"))
        self.env = {"KRB5_CONFIG": str(folder / "krb5.conf"), "KRB5_KDC_PROFILE": str(folder / "kdc.conf")}
        self._run("kdb5_util", "create", "-s", "-r", REALM, "-P", "secret")

    def configuration(self, address: str) -> str:
        """krb5.conf of a machine that has the centre at this address."""
        return KRB5.format(realm=REALM, address=address, port=self.port)

    def keytab(self, principal: str) -> Path:
        """A new principal's keys."""
        path = self.folder / f"{principal.replace('/', '.')}.keytab"
        self._run("kadmin.local", "-r", REALM, "addprinc", "-randkey", principal)
        self._run("kadmin.local", "-r", REALM, "ktadd", "-k", str(path), principal)
        return path

    def ticket(self, principal: str) -> bytes:
        """A new principal's ticket-granting ticket, as a credential cache of type FILE."""
        path = self.folder / "ccache"
        self._run("kinit", "-k", "-t", str(self.keytab(principal)), "-c", f"FILE:{path}", principal)
        return path.read_bytes()

    def _run(self, *argv: str) -> None:
        done = subprocess.run(argv, env={**os.environ, **self.env}, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done


@contextmanager
def realm(folder: Path) -> Iterator[Realm]:
    """A realm; it is gone afterwards."""
    made = Realm(folder)
    listening = folder / "pid"
    os.mkfifo(listening)  # the centre writes its number there once it listens
    with subprocess.Popen(
        ["krb5kdc", "-n", "-P", str(listening), "-r", REALM],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, **made.env},
    ) as centre:  # fmt: skip
        try:
            assert int(listening.read_text()) == centre.pid
            yield made
        finally:
            centre.kill()
    assert not Path(f"/proc/{centre.pid}").exists()
