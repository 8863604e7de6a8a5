"""Whether KVM works on this node: found out once per boot by starting a kernel, and remembered.

A `/dev/kvm` proves little: on some nested hosts a guest under it spins for ever without a line on its console. So a
stock kernel is started, as nobody, and has to show its first line within a limit.
"""

from __future__ import annotations

import asyncio
import json
import os
import pwd
import socket
import stat
import subprocess
import time
from pathlib import Path
from typing import Any, NamedTuple, Optional

from vmgr.config import Config
from vmgr.errors import Code, VTorqueError
from vmgr.node import process, record

DEVICE = Path("/dev/kvm")
_KERNEL, _FIRMWARE = "kvm.json", "kvm-firmware.json"
_FIRMWARE_PORT = 0x402
"""Where SeaBIOS writes its messages (its CONFIG_DEBUG_IO)."""


class Kvm(NamedTuple):
    """What was found: whether KVM boots a kernel here, and why not."""

    works: bool
    reason: str


def choose_accelerator(config: Config, kvm: Kvm) -> str:
    """`kvm` where it works, `tcg` where the site allows emulation. Raises VTorqueError (VT-NODE)."""
    if kvm.works:
        return "kvm"
    if not config.hypervisor.allow_emulation:
        raise VTorqueError(
            f"KVM does not work on this node: {kvm.reason}",
            code=Code.NODE,
            hint=f"hypervisor.allow_emulation is false ({config.origin('hypervisor.allow_emulation')})",
        )
    return "tcg"


def kvm_gid() -> Optional[int]:
    """The group that may use KVM, for the hypervisor's supplementary groups; None when everybody or nobody else may."""
    try:
        info = DEVICE.stat()
    except OSError:
        return None
    return info.st_gid if info.st_gid and info.st_mode & stat.S_IRGRP and info.st_mode & stat.S_IWGRP else None


def probe(config: Config, kernel: Optional[Path]) -> Kvm:
    """What is known of KVM since the boot, else what starting `kernel` shows; one process at a time finds out.

    Where there is no kernel to start, the firmware has to show its first line: that says less, and is remembered for
    such guests alone.
    """
    found = remembered(config, firmware=kernel is None)
    if found is not None:
        return found
    with record.node_lock(config.paths, "kvm"):
        found = remembered(config, firmware=kernel is None)
        if found is None:
            found = find_out(config, kernel)
            known = config.paths.run / (_FIRMWARE if kernel is None else _KERNEL)
            temporary = known.with_name(f".kvm.{os.getpid()}")
            temporary.write_text(json.dumps({"boot": process.boot_id(), **found._asdict()}))
            temporary.replace(known)
        return found


async def probe_beside(config: Config, kernel: Optional[Path]) -> Kvm:
    """`probe` without holding up the caller's event loop."""
    found = remembered(config, firmware=kernel is None)
    if found is not None:
        return found
    return await asyncio.get_running_loop().run_in_executor(None, probe, config, kernel)


def remembered(config: Config, *, firmware: bool = False) -> Optional[Kvm]:
    """What was found since the boot; None when nobody has tried. With `firmware` what that alone has shown will do."""
    found = _remembered(config.paths.run / _KERNEL)
    return found or (_remembered(config.paths.run / _FIRMWARE) if firmware else None)


def _remembered(known: Path) -> Optional[Kvm]:
    try:
        data = json.loads(known.read_text())
        return Kvm(bool(data["works"]), str(data["reason"])) if data["boot"] == process.boot_id() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def find_out(config: Config, kernel: Optional[Path]) -> Kvm:
    """What starting `kernel` under KVM shows, whatever is remembered. Raises VTorqueError (VT-LAUNCH)."""
    if not DEVICE.exists():
        return Kvm(False, f"there is no {DEVICE}")
    what = "the firmware" if kernel is None else "a kernel"
    nobody = pwd.getpwnam("nobody")
    gid = kvm_gid()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        child = _popen(
            [
                config.hypervisor.qemu,
                "-nodefaults", "-no-user-config",
                "-display", "none",
                "-machine", "q35",
                "-accel", "kvm",
                "-cpu", "host",
                "-m", "size=128M",
                "-no-reboot",
                "-chardev", f"socket,id=console,fd={theirs.fileno()}",
                *_what_speaks(kernel),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            user=nobody.pw_uid,
            group=nobody.pw_gid,
            extra_groups=[] if gid is None else [gid],
            start_new_session=True,
            pass_fds=[theirs.fileno()],
            preexec_fn=process.dies_with(os.getpid()),
            cwd="/",
        )  # fmt: skip
        theirs.close()
        try:
            if _shows_a_line(ours, b"SeaBIOS" if kernel is None else b"Linux version", config.hypervisor.probe_seconds):
                return Kvm(True, f"{what} started under it")
            try:
                child.wait(0.2)  # it closes its console before it ends and has a status
            except subprocess.TimeoutExpired:
                limit = config.hypervisor.probe_seconds
                return Kvm(False, f"{what} under {DEVICE} showed nothing within {limit} s")
        finally:
            child.kill()
            said = child.communicate()[1].decode("utf-8", "replace").strip()
    return Kvm(False, said.splitlines()[-1][:200] if said else "QEMU ended at once")


def _what_speaks(kernel: Optional[Path]) -> list[str]:
    if kernel is None:
        return ["-device", f"isa-debugcon,iobase={_FIRMWARE_PORT},chardev=console"]
    return [
        "-serial", "chardev:console",
        "-kernel", str(kernel),
        "-append", "console=ttyS0 earlyprintk=ttyS0 panic=-1",
    ]  # fmt: skip


def _popen(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(command, **options)
    except OSError as err:
        # nothing that would be remembered until the next boot
        raise VTorqueError(
            f"cannot start {command[0]}: {err.strerror}", code=Code.LAUNCH, hint="is it installed?"
        ) from err


def _shows_a_line(console: socket.socket, line: bytes, limit_s: float) -> bool:
    deadline = time.monotonic() + limit_s
    seen = b""
    while line not in seen and len(seen) < 65536:
        console.settimeout(max(0.01, deadline - time.monotonic()))
        try:
            data = console.recv(4096)
        except OSError:
            return False
        if not data or time.monotonic() > deadline:
            return False
        seen += data
    return line in seen
