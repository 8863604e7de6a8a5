"""An NFS server for tests: Ganesha, NFS 4 alone, on 127.0.0.1, which guests on user networking have as 10.0.2.2."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Optional

import pytest

PORT = 2049
CONFIG = """\
NFS_CORE_PARAM {{
    Protocols = 4; NFS_Port = {port}; Bind_addr = 127.0.0.1;
    Enable_NLM = false; Enable_RQUOTA = false; Enable_UDP = false;
}}
NFSv4 {{ Graceless = true; RecoveryRoot = {recovery}; Only_Numeric_Owners = true; IdmapConf = {names}; }}
NFS_KRB5 {{ Active_krb5 = {kerberos}; KeytabPath = {keytab}; CCacheDir = {recovery}/ccache; }}
EXPORT {{
    Export_Id = 1; Path = {folder}; Pseudo = /export; Protocols = 4; Transports = TCP;
    {export} FSAL {{ Name = VFS; }}
}}
"""
NAMES = "[General]\nDomain = vt.test\nLocal-Realms = VT.TEST\n[Translation]\nMethod = nsswitch\n"
PUBLIC = "Access_Type = RO; SecType = sys; Squash = All_Squash;"


@contextmanager
def nfs_server(
    base: Path, folder: Path, *, export: str = PUBLIC, keytab: Optional[Path] = None, env: Mapping[str, str] = {}
) -> Iterator[None]:
    """Serve `folder` as /export; files of its own go below `base`. It is gone afterwards."""
    program = shutil.which("ganesha.nfsd")
    if program is None:
        pytest.skip("nfs-ganesha is not installed")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", PORT))
        except OSError:
            pytest.skip("another NFS server has this machine's port 2049")
    recovery = base / "recovery"
    recovery.mkdir()
    config, names = base / "ganesha.conf", base / "idmapd.conf"
    names.write_text(NAMES)
    kerberos = "true" if keytab else "false"
    config.write_text(
        CONFIG.format(
            port=PORT,
            recovery=recovery,
            folder=folder,
            export=export,
            names=names,
            kerberos=kerberos,
            keytab=keytab or "/absent",
        )
    )
    argv = [program, "-F", "-f", str(config), "-L", "/dev/stderr", "-p", str(base / "ganesha.pid")]
    with subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        env={**os.environ, **env},
    ) as server:  # fmt: skip
        try:
            said = []
            assert server.stderr is not None
            for line in server.stderr:
                said.append(line)
                if "NFS SERVER INITIALIZED" in line:
                    break
            else:
                raise AssertionError("".join(said))
            yield
        finally:
            server.kill()
            server.communicate()
    assert not Path(f"/proc/{server.pid}").exists()
