"""Building an image from its recipe into the pool.

`build` is idempotent: when the newest revision was made from the same inputs it is returned as it is. The
inputs are hashed as what the recipe says, its files, the builder's own sources, and the versions of all packages that
would be installed now.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Callable, Protocol

from vmgr.errors import Code, VTorqueError
from vmgr.images.pool import Image, Pool
from vmgr.images.recipe import Recipe, load_recipe
from vmgr.images.writing import digest
from vmgr.signals import undisturbed

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_NO_SPACE = os.strerror(errno.ENOSPC)
_LEAST_FREE = 1 << 20
_PARTS = (
    "apt", "build", "cage", "debian", "disk", "initramfs", "layers", "micro", "recipe", "recipeschema", "redhat",
    "sandbox",
)  # fmt: skip
"""The modules that what an image is made of depends on."""
LOG = "build.log"
"""In an image's folder: what the programs of its last build said, whether that went well or not."""


class Maker(Protocol):
    """One kind of recipe at work: what it would install, then the image's files."""

    def packages(self) -> Sequence[object]:
        """The packages, each with its version as its text, that the image would be made of now."""

    def make(self, out: Path) -> dict[str, Any]:
        """Make the image's files in the folder `out`; gives facts for its description."""


def build(
    word: str,
    *,
    recipes: Sequence[Path],
    pool: Pool,
    progress: Callable[[str], None],
    force: bool = False,
    made: Callable[[Image], object] = lambda _image: None,
) -> Image:
    """The image of the recipe `word`, a name in the folders `recipes` or a path, built unless the pool has it.

    `force` builds in any case. `progress` is given one line per step, `made` the image as soon as it is in the pool: no
    exception of a signal's comes in between. The work happens in a temporary directory beside
    the revisions, which goes with the build, or is swept by the next one if this one is killed. Raises VTorqueError
    (VT-IMAGE and VT-CONFIG for an unknown or wrong recipe, VT-BUILD when building fails).
    """
    recipe = load_recipe(word, recipes)
    if os.geteuid() != 0:
        raise VTorqueError("images are built by root, who owns the pool", code=Code.BUILD)
    try:
        with pool.staging(recipe.name, progress) as staging:
            return _build(recipe, staging, pool, progress, made, force=force)
    except (_Full, OSError) as err:
        if isinstance(err, OSError) and err.errno not in _NO_ROOM:
            raise
        raise _no_room(recipe, pool.path, "ended in the middle of it") from None


def _build(
    recipe: Recipe,
    staging: Path,
    pool: Pool,
    progress: Callable[[str], None],
    made: Callable[[Image], object],
    *,
    force: bool,
) -> Image:
    work, out, log = staging / "work", staging / "out", staging / LOG
    work.mkdir()
    out.mkdir()
    maker = _maker(recipe, work, log, progress)
    recipe_hash = inputs_hash(recipe, maker.packages())
    if pool.revisions(recipe.name) and not force:
        with contextlib.suppress(VTorqueError):  # one that cannot be read is built anew
            newest = pool.get(recipe.name)
            if newest.recipe_hash == recipe_hash:
                progress(f"{recipe.name}: nothing has changed since revision {newest.revision} was built")
                made(newest)
                return newest
    if shutil.disk_usage(staging).free < recipe.build_disk_mb * 1_000_000:
        raise _no_room(recipe, pool.path, "cannot begin")
    kept = staging.parent / LOG
    try:
        facts = maker.make(out)
        progress("publishing it in the pool")
        known = {path.name: digest(path) for path in out.iterdir()}  # which takes its time
        with undisturbed():
            image = pool.publish(out, recipe.name, {**_facts(recipe, recipe_hash), **facts}, known=known)
            made(image)
    except (OSError, VTorqueError) as err:
        if _is_full(err, staging):
            raise _Full from None
        if not isinstance(err, VTorqueError) or not log.exists():
            raise
        log.replace(kept)
        raise VTorqueError(err.message, code=err.code, hint=f"all that was said is in {kept}") from None
    if log.exists():
        log.replace(kept)
    progress(f"{recipe.name}: revision {image.revision}, {image.size / 1e6:.0f} MB, in {image.directory}")
    return image


class _Full(Exception):
    """There is no room left for a build."""


def _is_full(err: Exception, folder: Path) -> bool:
    """Whether a step failed for want of room; not every program says so, and some do not even notice."""
    if isinstance(err, OSError):
        return err.errno in _NO_ROOM
    return _NO_SPACE in str(err) or shutil.disk_usage(folder).free < _LEAST_FREE


def _no_room(recipe: Recipe, folder: Path, what: str) -> VTorqueError:
    free = shutil.disk_usage(folder if folder.exists() else folder.parent).free
    return VTorqueError(
        f"the build of {recipe.name} {what}: it takes about {recipe.build_disk_mb} MB in {folder}, where "
        f"{free // 1_000_000} MB are free",
        code=Code.BUILD,
        hint="make room there, or name another folder by --pool",
    )


def _maker(recipe: Recipe, work: Path, log: Path, progress: Callable[[str], None]) -> Maker:
    if recipe.kind == "apt":
        from vmgr.images.debian import DebianMaker

        return DebianMaker(recipe, work, log, progress)
    if recipe.kind == "dnf":
        from vmgr.images.redhat import RedHatMaker

        return RedHatMaker(recipe, work, log, progress)
    from vmgr.images.micro import InitramfsMaker

    return InitramfsMaker(recipe, work, log, progress)


def inputs_hash(recipe: Recipe, packages: Sequence[object]) -> str:
    """SHA-256 over everything that a build is made from."""
    digest = hashlib.sha256()
    for name in _PARTS:
        digest.update((Path(__file__).parent / f"{name}.py").read_bytes())
    digest.update(recipe.digest().encode())
    for package in packages:
        digest.update(f"{package}\n".encode())
    return digest.hexdigest()


def _facts(recipe: Recipe, recipe_hash: str) -> dict[str, object]:
    return {
        "family": recipe.family,
        "distro": recipe.distro,
        "arch": "x86_64",
        "description": recipe.description,
        "disk_format": "qcow2",
        "kernel": "vmlinuz",
        "initrd": "initrd",
        "cmdline": recipe.cmdline,
        "min_ram_mib": recipe.min_ram_mib,
        "features": list(recipe.features),
        "packages": "packages.txt",
        "recipe_hash": recipe_hash,
    }
