"""A program that runs one step of an image build so that nothing of it outlives the build or reaches the machine.

    cage.py PARENT [--network] [--root FOLDER | --furnish FOLDER] -- PROGRAM [ARGUMENT…]

It runs by itself, with nothing but the standard library (`python3 -I -S cage.py`), as root. PARENT is the process
that started it; when that ends, in whatever way, everything here is killed. PROGRAM gets mount, process, IPC and,
unless it may use the `--network`, network namespaces of its own. With `--root` it sees nothing but that folder, as
its root, with a /proc, /dev, /run and /tmp of its own, and lacks the capabilities that reach beyond files and
processes; `--furnish` gives a /proc and a /dev to a folder in which it will change its root itself. SIGTERM ends it
and all that it started; the exit status is PROGRAM's, 128 + N after signal N.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import stat
import sys
from pathlib import Path

_NEWNS, _NEWIPC, _NEWPID, _NEWNET = 0x00020000, 0x08000000, 0x20000000, 0x40000000  # <linux/sched.h>
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 1, 2, 4, 8  # <linux/mount.h>
_MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = 32, 4096, 16384, 1 << 18
_MNT_DETACH = 2
_SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41, "ppc64le": 203}
_PR_SET_PDEATHSIG, _PR_CAPBSET_DROP = 1, 24  # <linux/prctl.h>
_FEW_CAPABILITIES = frozenset((0, 1, 3, 4, 5, 6, 7, 8, 10, 18, 29, 31))
"""<linux/capability.h>: CHOWN, DAC_OVERRIDE, FOWNER, FSETID, KILL, SETGID, SETUID, SETPCAP, NET_BIND_SERVICE,
SYS_CHROOT, AUDIT_WRITE, SETFCAP: what installing files and accounts needs."""
_NEVER = frozenset((16, 17, 22, 25))
"""SYS_MODULE, SYS_RAWIO, SYS_BOOT, SYS_TIME: what the whole machine would notice."""
_LAST_CAPABILITY = 63
_DEVICES = (("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0))

_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    texts = (os.fsencode(text) for text in (source, target, kind))
    _checked(_libc.mount(*texts, ctypes.c_ulong(flags), os.fsencode(data)), f"mount {target}")


def _enter(root: str) -> None:
    """Make `root` the root of this mount namespace, and leave nothing else in it."""
    _mount(root, root, "", _MS_BIND)
    os.chdir(root)
    _checked(_libc.syscall(_SYS_PIVOT_ROOT[os.uname().machine], b".", b"."), "pivot_root")
    _checked(_libc.umount2(b".", _MNT_DETACH), "umount")
    os.chdir("/")
    _furnish("")
    for folder, mode in (("/run", "mode=0755"), ("/tmp", "mode=1777")):
        Path(folder).mkdir(exist_ok=True)
        _mount("none", folder, "tmpfs", _MS_NOSUID | _MS_NODEV, mode)


def _furnish(root: str) -> None:
    """Give the folder `root` a /dev, and a /proc of this namespace that cannot change the machine's settings."""
    plain = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
    for folder, kind, flags in ((f"{root}/proc", "proc", plain), (f"{root}/dev", "tmpfs", _MS_NOSUID)):
        Path(folder).mkdir(exist_ok=True)
        _mount("none", folder, kind, flags)
    for name in ("sys", "sysrq-trigger", "irq", "bus"):
        folder = f"{root}/proc/{name}"
        if Path(folder).exists():
            _mount(folder, folder, "", _MS_BIND | _MS_REC)
            _mount("none", folder, "", _MS_BIND | _MS_REMOUNT | _MS_RDONLY | plain)
    umask = os.umask(0)
    for name, major, minor in _DEVICES:
        os.mknod(f"{root}/dev/{name}", stat.S_IFCHR | 0o666, os.makedev(major, minor))
    Path(f"{root}/dev/shm").mkdir(0o1777)
    os.umask(umask)
    Path(f"{root}/dev").chmod(0o755)
    for name, target in (("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")):
        Path(f"{root}/dev/{name}").symlink_to(target)


def _drop(capabilities: frozenset[int]) -> None:
    """Let no program that comes next have these (capabilities(7): the bounding set)."""
    for number in sorted(capabilities):
        if _libc.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0) < 0:
            break  # the kernel knows no more


def _become(command: list[str], root: str, furnished: str, outer: int) -> None:
    """The first process of the namespaces; `outer` is a pipe that ends with the one outside."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if select.select([outer], [], [], 0)[0]:
        os._exit(1)  # it ended before it could take this one along
    if root:
        _enter(root)
        _drop(frozenset(range(_LAST_CAPABILITY + 1)) - _FEW_CAPABILITIES)
    else:
        _mount("none", "/proc", "proc", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC)
        if furnished:
            _furnish(furnished)
        _drop(_NEVER)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    os.execvp(command[0], command)


def _ended(child: int) -> int:
    """Wait for the first process of the namespaces, which ends last of all there; gives its exit status.

    SIGTERM is blocked before and after: it kills the child, and nobody who has its number once that is free.
    """
    signal.signal(signal.SIGTERM, lambda _number, _frame: os.kill(child, signal.SIGKILL))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # it keeps its number
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    _, status = os.waitpid(child, 0)
    return os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)


def main(arguments: list[str]) -> int:
    """See the head of this file."""
    split = arguments.index("--")
    words, command = arguments[:split], arguments[split + 1 :]
    root, furnished = (words[words.index(word) + 1] if word in words else "" for word in ("--root", "--furnish"))
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # what started this may have put signals off
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(words[0]):
        return 1  # it ended before it could take this one along
    _checked(_libc.unshare(_NEWNS | _NEWIPC | _NEWPID | (0 if "--network" in words else _NEWNET)), "unshare")
    _mount("none", "/", "", _MS_REC | _MS_PRIVATE)
    reading, writing = os.pipe()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    child = os.fork()
    if child == 0:
        os.close(writing)
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
            _become(command, root, furnished, reading)
        except FileNotFoundError:
            print(f"{command[0]} is not installed", file=sys.stderr, flush=True)
        except OSError as err:
            print(f"cannot start {command[0]}: {err}", file=sys.stderr, flush=True)
        os._exit(127)
    return _ended(child)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
