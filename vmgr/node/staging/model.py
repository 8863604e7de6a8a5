"""What is asked of the staging of a node's disks, and what it gives."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Callable, NamedTuple, Optional

from vmgr.config import Config
from vmgr.images.pool import Image
from vmgr.node.record import Place
from vmgr.node.user import User


class Layer(NamedTuple):
    """The disk of an image that another lies on, open for reading, and its format."""

    fd: int
    format: str


class Disk(NamedTuple):
    """A guest's root disk: a qcow2 overlay (read and written) and what it lies on (read), as open descriptors.

    `parents` is what the backing file lies on in turn, where the image is a layer: its parent first.

    The overlay's header names no backing file: the chain is what QEMU is given (`backing=`), and nothing that reads
    an overlay, which is the user's word, follows it anywhere. They are closed on exec; whoever has the disk closes
    them when QEMU has inherited them, and before the attempt is undone.
    """

    overlay: int
    backing: int
    backing_format: str
    parents: tuple[Layer, ...] = ()


class Source(NamedTuple):
    """A disk of the pool, or of the node's cache, that is to be staged: the image and its open file."""

    image: Image
    fd: int


def disk_of(fds: Sequence[int], sources: Sequence[Source]) -> Disk:
    """The disk whose overlay and layers, from the image's own down, are open as `fds`."""
    overlay, backing, *parents = fds
    formats = [source.image.disk_format for source in sources[1:]]
    return Disk(overlay, backing, sources[0].image.disk_format, tuple(map(Layer, parents, formats)))


class BootFiles(NamedTuple):
    """What QEMU loads by itself, readable for everybody; None for what the image has not."""

    kernel: Optional[Path]
    initrd: Optional[Path]


class StageRequest(NamedTuple):
    """The disks of one node's guests.

    `names` are the guests', in order; `ram_mib` is what all of them together get as RAM. `workspace` is the job's
    folder on a shared file system, the user's own, or None where the site has none. `tell` is called with what is
    being done, such as `copying 37 %`. `own_disk` is the open disk of an image of the user's own, which root does not
    open.
    """

    config: Config
    place: Place
    image: Image
    user: User
    names: Sequence[str]
    fs_type: str
    ram_mib: int
    workspace: Optional[str]
    tell: Callable[[str], None]
    own_disk: Optional[int] = None
