"""What a guest test starts from: an image of the pool, keys, a home and a read-only share."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Callable

import pytest
from guestmachine import Mount, Setup, User, make_key

from vmgr.errors import VTorqueError
from vmgr.images.pool import HOLD, Image, Pool
from vmgr.images.removing import holders_of

POOL = Path(os.environ.get("VTORQUE_TEST_POOL", "/var/lib/vtorque/images"))

MakeSetup = Callable[..., Setup]


def image_or_skip(name: str) -> Image:
    if shutil.which("qemu-system-x86_64") is None:
        pytest.skip("QEMU is not installed")
    try:
        return Pool(POOL).get(name)
    except VTorqueError as err:
        pytest.skip(f"no image {name} to boot: {err}")


def holders(name: str) -> list[int]:
    """The processes that keep the newest revision of an image in the pool."""
    with (image_or_skip(name).directory / HOLD).open("rb") as stream:
        return holders_of(stream.fileno())


def make_setup(directory: Path, name: str, *, user_name: str = "ada", **options: object) -> Setup:
    """A guest of the image `name` with a home and a read-only share made in `directory`."""
    image = image_or_skip(name)
    directory.chmod(0o755)
    ids = {} if os.geteuid() == 0 else {"uid": os.geteuid(), "gid": os.getegid()}
    user = User(user_name, **ids)
    machine, home, opt = directory / "machine", directory / "home", directory / "opt"
    for path in (machine, home, opt):
        path.mkdir()
    (opt / "version").write_text("1.0\n")
    if os.geteuid() == 0:
        os.chown(home, user.uid, user.gid)
    mounts = (Mount("home", user.home, home), Mount("opt", "/opt-hpc", opt, readonly=True))
    options.setdefault("mounts", mounts)
    setup = Setup(image, machine, user=user, **options)  # type: ignore[arg-type]
    make_key(setup.key)
    make_key(setup.host_key)
    return setup
