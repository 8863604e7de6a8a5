"""Looking into disks that somebody made, in a process that has no rights, little memory and little time.

When root calls, that process is nobody's: it can read the disk that it is given as an open file, which is our own copy,
and what everybody may read. It cannot gain privileges, and dies with the caller. QEMU's tools are told the
format of the disk and that it has no backing file, so that they look for neither.
"""

from __future__ import annotations

import json
import os
import pwd
import re
import resource
import select
import signal
import subprocess
import time
from collections.abc import Sequence
from typing import Any, Callable, NamedTuple, NoReturn, Optional

from vmgr.errors import Code, VTorqueError
from vmgr.images.header import Header, read_header, refused
from vmgr.node.process import dies_with
from vmgr.node.userchild import MAX_DESCRIPTORS, become, write_all

QEMU_IMG = "qemu-img"
MEMORY = 2 << 30
HEADER_SECONDS = 10
CHECK_SECONDS = 600
BYTES_PER_SECOND = 1 << 20
"""What a slow machine converts at least."""
LONGEST_SECONDS = 7 * 86400
_PERCENT = re.compile(rb"\(([0-9]{1,3})\.[0-9]+/100%\)")


class Source(NamedTuple):
    """An open disk, and its format, which is never guessed."""

    fd: int
    format: str


def inspect(fd: int, *, shown_as: str, said: Optional[str], bound: int) -> Header:
    """`read_header` of the open file `fd`. Raises VTorqueError (VT-IMAGE), also when it takes too long."""
    results, out = os.pipe2(os.O_CLOEXEC)
    dies = dies_with(os.getpid())
    pid = os.fork()
    if pid == 0:
        _inspect(fd, out, dies, shown_as, said, bound)
    os.close(out)
    try:
        data = _read_all(results, time.monotonic() + HEADER_SECONDS)
    finally:
        os.close(results)
        os.kill(pid, signal.SIGKILL)  # it has ended, or is to
        os.waitpid(pid, 0)
    try:
        verdict = json.loads(data)
    except ValueError:
        raise refused(
            shown_as, "no disk: reading its header takes too long or too much", "is it a disk image?"
        ) from None
    if "refused" in verdict:
        raise VTorqueError(verdict["refused"], code=Code.IMAGE, hint=verdict["hint"])
    return Header(verdict["format"], verdict["virtual_size"])


def _inspect(fd: int, out: int, dies: Callable[[], None], shown_as: str, said: Optional[str], bound: int) -> NoReturn:
    """In the child: drop all rights, read, say what was found, end."""
    try:
        low, high = sorted((fd, out))
        os.closerange(0, low)
        os.closerange(low + 1, high)
        os.closerange(high + 1, MAX_DESCRIPTORS)
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            become(nobody.pw_uid, nobody.pw_gid, [])
        dies()
        _limit(HEADER_SECONDS, 0)
        try:
            with open(fd, "rb", closefd=False) as disk:
                disk.seek(0)
                verdict: dict[str, Any] = read_header(disk, shown_as=shown_as, said=said, bound=bound)._asdict()
        except VTorqueError as err:
            verdict = {"refused": err.message, "hint": err.hint}
        except OSError as err:
            verdict = {"refused": f"{shown_as} is unreadable: {err.strerror}", "hint": "is it a disk image?"}
        write_all(out, json.dumps(verdict).encode())
    finally:
        os._exit(0)


def _limit(cpu_s: int, file_bytes: int) -> None:
    """Bound this process: seconds of CPU, bytes of memory, and how long a file it can write."""
    for what, most in (
        (resource.RLIMIT_CPU, cpu_s), (resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_CORE, 0),
    ):  # fmt: skip
        _, hard = resource.getrlimit(what)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (most, most))


def _read_all(fd: int, deadline: float) -> bytes:
    """What comes out of a pipe until its end, or the deadline (monotonic)."""
    poll, data = select.poll(), b""
    poll.register(fd, select.POLLIN)
    while poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        block = os.read(fd, 65536)
        if not block:
            break
        data += block
    return data


def check(source: Source, *, shown_as: str) -> int:
    """Have `qemu-img check` look through a qcow2 disk, and give its virtual size. Raises VTorqueError (VT-IMAGE)."""
    info = _qemu_img(["info", "--output=json", _spelled([source])], [source.fd], cpu_s=CHECK_SECONDS)
    if info.status:
        raise refused(shown_as, f"unreadable to QEMU: {info.said}", "is it whole?")
    if source.format in ("qcow2", "vdi", "vhdx"):
        # VMDK has no check; status 3: some clusters are lost, which takes room and harms nothing
        checked = _qemu_img(["check", "--output=json", _spelled([source])], [source.fd], cpu_s=CHECK_SECONDS)
        if checked.status not in (0, 3):
            raise refused(shown_as, f"corrupt: {_corruptions(checked)}", "repair it: qemu-img check -r all")
    try:
        return int(json.loads(info.out)["virtual-size"])
    except (ValueError, KeyError, TypeError):
        raise refused(shown_as, "unreadable to QEMU", "is it whole?") from None


def convert(chain: Sequence[Source], target: int, *, virtual_size: int, advance: Callable[[int], None]) -> None:
    """Write the disk `chain` (the topmost first, each on the next) to the open, empty file `target` as a qcow2 file.

    It stands alone, and is sparse. `virtual_size` is in bytes; `advance` gets each new per cent. When root
    calls the file is nobody's meanwhile. Raises VTorqueError (VT-IMAGE).
    """
    root = os.geteuid() == 0
    if root:
        nobody = pwd.getpwnam("nobody")
        os.fchown(target, nobody.pw_uid, nobody.pw_gid)
    try:
        done = _qemu_img(
            ["convert", "-p", "-O", "qcow2", _spelled(chain), f"/proc/self/fd/{target}"],
            [*(source.fd for source in chain), target],
            cpu_s=CHECK_SECONDS + virtual_size // BYTES_PER_SECOND,
            file_bytes=virtual_size + virtual_size // 1024 + (64 << 20),
            advance=advance,
        )
    finally:
        if root:
            os.fchown(target, 0, 0)
    if done.status:
        raise VTorqueError(f"the disk cannot be converted: {done.said}", code=Code.IMAGE)


class _Done(NamedTuple):
    status: int
    out: bytes
    said: str


def _corruptions(checked: _Done) -> str:
    try:
        count = int(json.loads(checked.out)["corruptions"])
    except (ValueError, KeyError, TypeError):
        return checked.said
    return f"{count} errors in its tables"


def _spelled(chain: Sequence[Source]) -> str:
    """A disk for a program of QEMU's, spelled out to the last backing file, so that nothing is looked up or guessed."""
    tree: Optional[dict[str, Any]] = None
    for source in reversed(chain):
        file = {"driver": "file", "filename": f"/proc/self/fd/{source.fd}", "locking": "off"}
        layer: dict[str, Any] = {"driver": source.format, "file": file}
        if source.format in ("qcow2", "vmdk"):
            layer["backing"] = tree
        tree = layer
    return f"json:{json.dumps(tree)}"


def _qemu_img(
    words: Sequence[str],
    fds: Sequence[int],
    *,
    cpu_s: int,
    file_bytes: int = 0,
    advance: Callable[[int], None] = lambda _part: None,
) -> _Done:
    """Run qemu-img without rights, with these open files. Raises VTorqueError (VT-IMAGE) when it takes too long."""
    dies = dies_with(os.getpid())

    def prepare() -> None:
        _limit(cpu_s, file_bytes)
        dies()

    nobody = pwd.getpwnam("nobody")
    rights: dict[str, Any] = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
    try:
        child = subprocess.Popen(
            [QEMU_IMG, *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if words[0] == "convert" else subprocess.PIPE,
            cwd="/",
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8", "MALLOC_ARENA_MAX": "2"},
            start_new_session=True,
            pass_fds=fds,
            preexec_fn=prepare,
            **(rights if os.geteuid() == 0 else {}),
        )
    except OSError as err:
        raise VTorqueError(f"cannot run qemu-img: {err.strerror}", code=Code.IMAGE, hint="is it installed?") from err
    try:
        out, errors = _follow(child, time.monotonic() + min(4 * cpu_s, LONGEST_SECONDS), advance)
        status = child.wait(5)
    except subprocess.TimeoutExpired:
        raise VTorqueError(f"qemu-img {words[0]} takes too long", code=Code.IMAGE, hint="is the disk whole?") from None
    finally:
        child.kill()
        child.communicate()
    said = (errors or out).decode("utf-8", "replace").strip().replace("\r", "\n").splitlines()
    reason = f"killed by signal {-status}" if status < 0 else said[-1][:300] if said else f"status {status}"
    return _Done(status, out, reason.replace("/proc/self/fd/", "file "))


def _follow(child: subprocess.Popen[bytes], deadline: float, advance: Callable[[int], None]) -> tuple[bytes, bytes]:
    """What a program prints until it ends, the last 64 KiB of each stream. Raises TimeoutExpired."""
    assert child.stdout is not None
    kept = {stream.fileno(): b"" for stream in (child.stdout, child.stderr) if stream is not None}
    output, shown = child.stdout.fileno(), 0
    poll, open_ones = select.poll(), set(kept)
    for fd in open_ones:
        poll.register(fd, select.POLLIN)
    while open_ones:
        ready = poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
        if not ready:
            raise subprocess.TimeoutExpired(child.args, deadline)
        for fd, _ in ready:
            block = os.read(fd, 65536)
            kept[fd] = (kept[fd] + block)[-65536:]
            if not block:
                poll.unregister(fd)
                open_ones.discard(fd)
            if fd == output and (found := _PERCENT.findall(block)):
                percent = min(100, int(found[-1]))
                advance(max(0, percent - shown))
                shown = max(shown, percent)
    return kept.pop(output), b"".join(kept.values())
