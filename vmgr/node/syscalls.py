"""System calls for a child of root's on its way to become a program of a user's, which Python has no function for.

Each raises OSError. The numbers of the newer calls are the same on all architectures that Linux shares them with.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence

CAP_SETPCAP = 8
CAP_SYS_CHROOT = 18

_OPEN_TREE = 428
_MOUNT_SETATTR = 442
_AT_EMPTY_PATH = 0x1000
_AT_RECURSIVE = 0x8000
_OPEN_TREE_CLONE = 1
_MOUNT_ATTR_RDONLY = 1
_PR_SET_KEEPCAPS = 8
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_RAISE = 2
_CAPABILITY_VERSION_3 = 0x20080522

_libc = ctypes.CDLL(None, use_errno=True)


class _MountAttr(ctypes.Structure):
    """`struct mount_attr` of mount_setattr(2)."""

    _fields_ = (
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    )


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def set_file_user(uid: int) -> None:
    """Look at files as `uid` from now on; capabilities that are not about files stay (setfsuid(2))."""
    _libc.setfsuid(uid)
    if _libc.setfsuid(-1) != uid:
        raise PermissionError(f"cannot look at files as uid {uid}")


def read_only_tree(folder: int) -> int:
    """What an open folder shows, as a mount of its own that nobody can write through; where it is mounted nowhere.

    With all that is mounted below it now. Gives a descriptor. Needs Linux 5.12 (open_tree, mount_setattr).
    """
    flags = _OPEN_TREE_CLONE | _AT_EMPTY_PATH | _AT_RECURSIVE | os.O_CLOEXEC
    tree = _checked(_libc.syscall(_OPEN_TREE, folder, b"", flags))
    attributes = _MountAttr(attr_set=_MOUNT_ATTR_RDONLY)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    _checked(_libc.syscall(_MOUNT_SETATTR, tree, b"", _AT_EMPTY_PATH | _AT_RECURSIVE, ctypes.byref(attributes), size))
    return tree


def become(uid: int, gid: int, groups: Sequence[int], capabilities: Sequence[int]) -> None:
    """Take a user's ids for good, keeping only these capabilities, for the program that comes next (ambient)."""
    os.setgroups(groups)
    os.setresgid(gid, gid, gid)
    _checked(_libc.prctl(_PR_SET_KEEPCAPS, 1, 0, 0, 0))
    os.setresuid(uid, uid, uid)
    mask = sum(1 << number for number in capabilities)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    sets = (ctypes.c_uint32 * 6)(mask, mask, mask, 0, 0, 0)  # effective, permitted, inheritable; then those above 31
    _checked(_libc.capset(ctypes.byref(header), ctypes.byref(sets)))
    for number in capabilities:
        _checked(_libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, number, 0, 0))
