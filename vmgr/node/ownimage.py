"""A disk of a user's own that guests boot: opened, and its header read, with the user's rights alone.

QEMU, which is the user's too, gets it as an open file that it can only read. So whatever the disk holds or names, and
whenever its owner changes it, nobody gains by it what the user had not before.
"""

from __future__ import annotations

import os
import stat

from vmgr.config import Config
from vmgr.errors import Code, VTorqueError
from vmgr.images.header import read_header
from vmgr.images.pool import Image
from vmgr.node.user import User
from vmgr.node.userio import open_and_look


async def open_image(image: Image, user: User, config: Config) -> tuple[Image, int]:
    """The image with the virtual size of its disk, and the open disk. Raises VTorqueError (VT-STAGE)."""
    path = str(image.path("disk"))
    bound = config.images.max_virtual_size << 20
    fd, seen = await open_and_look(
        user,
        lambda: _open(path, bound),
        path,
        timeout_s=config.timeouts.user_file,
        code=Code.STAGE,
        hint="img=FILE names a qcow2 disk that stands alone and that you can read",
    )
    size = int(seen) if seen.isdigit() else 0
    if not 0 < size <= bound:  # the child is the user's
        os.close(fd)
        raise VTorqueError(f"{path} has no size within the bound", code=Code.STAGE)
    return image._replace(virtual_size=size), fd


def _open(path: str, bound: int) -> tuple[int, bytes]:
    """In the child, with the user's rights. Raises OSError saying what is wrong."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_NOCTTY | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise OSError(0, "not a regular file")
    os.set_blocking(fd, True)
    try:
        with open(fd, "rb", closefd=False) as disk:
            header = read_header(disk, shown_as="it", said="qcow2", bound=bound)
    except VTorqueError as err:
        raise OSError(0, err.message) from None
    return fd, str(header.virtual_size).encode()
