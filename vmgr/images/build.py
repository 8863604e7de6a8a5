"""Building an image from its recipe into the pool.

`build` is idempotent: when the newest revision was made from the same inputs it is returned as it is. The
inputs are hashed as the recipe's files, the builder's own sources, and the versions that apt would install
now of every package that the recipe names (the kernel's real package in place of its meta-package). So a new
kernel or a security update of a named package leads to a new revision; one of a package that comes in only as
a dependency does not, because finding that out would cost half a build: use `force` for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path
from typing import Callable

from vmgr.errors import Code, VTorqueError
from vmgr.images import apt
from vmgr.images.micro import build_initramfs
from vmgr.images.pool import Image, Pool
from vmgr.images.recipe import Recipe, load_recipe


def build(name: str, *, recipes: Path, pool: Pool, progress: Callable[[str], None], force: bool = False) -> Image:
    """The image `name`, built from `recipes`/`name` unless the pool has it; `force` builds in any case.

    `progress` is given one line per step. The work happens in a temporary directory beside the revisions,
    which goes with the build, or is swept by the next one if this one is killed. Raises VTorqueError
    (VT-IMAGE for an unknown or wrong recipe, VT-BUILD when building fails).
    """
    recipe = load_recipe(name, recipes)
    if os.geteuid() != 0:
        raise VTorqueError("images are built by root, who owns the pool", code=Code.BUILD)
    kernel = apt.resolve_kernel(recipe.kernel, progress)
    packages = apt.candidates([kernel, *recipe.packages], progress)
    recipe_hash = inputs_hash(recipe, packages)
    with pool.staging(name, progress) as staging:
        revisions = pool.revisions(name)
        if revisions and not force:
            with contextlib.suppress(VTorqueError):  # one that cannot be read is built anew
                newest = pool.get(name)
                if newest.recipe_hash == recipe_hash:
                    progress(f"{name}: revision {newest.revision} is up to date")
                    return newest
        work, out = staging / "work", staging / "out"
        work.mkdir()
        out.mkdir()
        if recipe.kind == "disk":
            from vmgr.images.disk import build_disk

            facts = build_disk(recipe, packages, work, out, progress)
        else:
            facts = build_initramfs(recipe, packages, work, out, progress)
        progress("publishing it in the pool")
        image = pool.publish(out, name, {**_facts(recipe, recipe_hash), **facts})
    progress(f"{name}: revision {image.revision}, {image.size / 1e6:.0f} MB, in {image.directory}")
    return image


def inputs_hash(recipe: Recipe, packages: list[apt.Package]) -> str:
    """SHA-256 over everything that a build is made from, as far as it is known beforehand."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        if source.name != "pool.py":
            digest.update(source.read_bytes())
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
