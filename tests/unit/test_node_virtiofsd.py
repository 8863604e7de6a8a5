"""The two programs named virtiofsd: told apart by their help, and started with a user's rights."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from vmgr.errors import Code, VTorqueError
from vmgr.node import virtiofsd
from vmgr.node.virtiofsd import Language, examine, from_help

C_HELP = """\
usage: /usr/lib/qemu/virtiofsd [options]
    -o modcaps=CAPLIST         Modify the list of capabilities
                               e.g. -o modcaps=+sys_admin:-chown
    -o source=PATH             shared directory tree
    --fd=FDNUM                 fd number of vhost-user socket
"""
RUST_HELP = """\
Usage: virtiofsd --shared-dir <SHARED_DIR> --socket-path <SOCKET_PATH> [OPTIONS]
      --fd <FD>
      --no-announce-submounts
      --readonly
"""


def test_the_program_of_c() -> None:
    program = from_help("/v", C_HELP)
    assert (program.language, program.can_refuse_writes, program.takes_groups) == (Language.C, False, False)
    for readonly in (False, True):
        assert program.command("/proc/self/fd/4/.", 3, readonly=readonly) == [
            "/v", "-f", "--fd=3",
            "-o", "source=/proc/self/fd/4/.",
            "-o", "sandbox=chroot",
            "-o", "cache=auto",
            "-o", "no_flock,no_posix_lock,no_xattr",
            "-o", "modcaps=-chown:-dac_override:-fowner:-fsetid:-setgid:-setuid:-mknod:-setfcap",
            "-o", "log_level=err",
            "--rlimit-nofile=0",
        ]  # fmt: skip
    assert program.capabilities == (18, 8), "to change its root, and to drop its bounding set"


def test_the_program_of_rust() -> None:
    program = from_help("/v", RUST_HELP)
    assert (program.language, program.takes_groups, program.capabilities) == (Language.RUST, True, ())
    common = [
        "/v", "--fd=3", "--shared-dir=/s", "--sandbox=none", "--seccomp=kill", "--cache=auto",
        "--inode-file-handles=never", "--no-announce-submounts", "--log-level=error", "--rlimit-nofile=0",
    ]  # fmt: skip
    assert program.command("/s", 3, readonly=False) == common
    assert program.command("/s", 3, readonly=True) == [*common, "--readonly"]
    older = from_help("/v", RUST_HELP.replace("--readonly", "").replace("--no-announce-submounts", ""))
    assert older.can_refuse_writes is False
    assert older.command("/s", 3, readonly=True) == [word for word in common if word != "--no-announce-submounts"]


@pytest.mark.parametrize("text", ["", "usage: nothing of the kind", "source=PATH"])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(VTorqueError, match=r"/v .hypervisor.virtiofsd. is no virtiofsd that can be used") as caught:
        from_help("/v", text)
    assert caught.value.code is Code.NODE


def test_it_is_asked_once_for_all_guests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until it is another program."""
    monkeypatch.setattr(virtiofsd, "check_trusted", lambda _: None)
    program, asked = tmp_path / "virtiofsd", tmp_path / "asked"

    def install(text: str) -> None:
        new = tmp_path / "new"
        new.write_text(f"#!/bin/sh\necho >>'{asked}'\ncat <<'X'\n{text}X\n")
        new.chmod(0o755)
        os.rename(new, program)

    install(RUST_HELP)
    found = [asyncio.run(examine(str(program))) for _ in range(3)]
    assert {each.language for each in found} == {Language.RUST} and asked.read_text() == "\n"
    install(C_HELP)
    assert asyncio.run(examine(str(program))).language is Language.C and asked.read_text() == "\n\n"
    install("nothing\n")
    for _ in range(2):
        with pytest.raises(VTorqueError, match="is no virtiofsd"):
            asyncio.run(examine(str(program)))
    assert asked.read_text() == "\n" * 4
