"""Whether the pool can be read, and each image is what its description says, by names and sizes of its files."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from typing import Optional

from vmgr.doctor.finding import Finding, Level, Node, finder
from vmgr.errors import VTorqueError
from vmgr.images.pool import Image, Pool

_find = finder("images")


def check(node: Node) -> Iterator[Finding]:
    pool, default = Pool(node.config.pool), node.config.policy["img"]["default"]
    names = pool.names()
    if not names:
        reason = _unreadable(node.config.pool)
        yield _find(
            Level.FAILURE, f"the pool {node.config.pool} {reason}", "vmgr image build micro, or set images.pool"
        )
        return
    sound = []
    for name in names:
        try:
            image = pool.get(name)
        except VTorqueError as err:
            yield _find(Level.FAILURE, err.message, err.hint or "add or build the image anew")
            continue
        wrong = [text for text in (wrong_with(image, file) for file in image.files) if text]
        for text in wrong:
            yield _find(Level.FAILURE, f"{image.name}@{image.revision}: {text}", "add or build the image anew")
        if not wrong:
            sound.append(f"{image.name}@{image.revision}")
    if sound:
        yield _find(Level.OK, f"{', '.join(sound)} in {node.config.pool}: sizes are as described")
    yield from judge_default(default, names, node.config.origin("policy.img.default"))


def _unreadable(pool: str) -> str:
    try:
        os.scandir(pool).close()
    except OSError as err:
        return f"cannot be read: {err.strerror}"
    return "holds no image"


def wrong_with(image: Image, file: str) -> Optional[str]:
    """What is wrong with a file of an image, by a look at it: its content is checked when it is copied or verified."""
    try:
        info = os.lstat(image.directory / file)
    except OSError as err:
        return f"{file}: {err.strerror}"
    if not stat.S_ISREG(info.st_mode):
        return f"{file} is no regular file"
    size = int(image.files[file]["size"])
    return None if info.st_size == size else f"{file} has {info.st_size} bytes, not {size}"


def judge_default(default: Optional[str], names: list[str], origin: str) -> Iterator[Finding]:
    if default is None:
        yield _find(
            Level.WARNING, "policy.img.default is not set: a job that names no image is refused",
            f"set it to one of {', '.join(names)}",
        )  # fmt: skip
    elif default not in names:
        yield _find(
            Level.FAILURE, f"the default image {default} ({origin}) is not in the pool",
            f"build or add it, or choose one of {', '.join(names)}",
        )  # fmt: skip
