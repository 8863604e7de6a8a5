"""Recipes: what an image is made of, read from contrib/images/<name>/recipe.json and checked."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from vmgr.errors import Code, VTorqueError
from vmgr.images.pool import NAME

KINDS = ("initramfs", "disk")


@dataclass(frozen=True)
class Recipe:
    """One recipe. Sizes are measured: what a build downloads, needs while it runs, and leaves in the pool.

    `kernel` is the package (or meta-package) of the kernel; `packages` are installed (kind disk) or unpacked
    (kind initramfs); `programs` are the files that go into an initramfs with the libraries they need;
    `modules` are loaded at once by the initial RAM disk and `modules_on_demand` only lie ready in it.
    """

    directory: Path
    name: str
    kind: str
    family: str
    distro: str
    arch: str
    description: str
    download_mb: int
    disk_mb: int
    build_disk_mb: int
    cmdline: str
    min_ram_mib: int
    features: tuple[str, ...]
    kernel: str
    packages: tuple[str, ...]
    modules: tuple[str, ...]
    programs: tuple[str, ...] = ()
    modules_on_demand: tuple[str, ...] = ()
    suite: str = ""
    disk_mib: int = 0
    excluded_paths: tuple[str, ...] = ()

    @property
    def rootfs(self) -> Path:
        """Files that go into the image as they are."""
        return self.directory / "rootfs"

    @property
    def initrd(self) -> Path:
        """Files that go into the initial RAM disk of a disk image."""
        return self.directory / "initrd"

    @property
    def customize(self) -> Path:
        """The script that ends the installation of a disk image, run in its root."""
        return self.directory / "customize"

    def digest(self) -> str:
        """SHA-256 over the recipe's files: their paths, contents and executable bits."""
        digest = hashlib.sha256()
        for path in sorted(self.directory.rglob("*")):
            if path.is_file() and not path.is_symlink():
                executable = bool(path.stat().st_mode & 0o100)
                name = path.relative_to(self.directory).as_posix()
                digest.update(f"{name}\0{executable}\0{path.stat().st_size}\0".encode())
                digest.update(path.read_bytes())
        return digest.hexdigest()


def known_recipes(recipes: Path) -> list[str]:
    """The names of the recipes below the directory `recipes`, sorted."""
    return sorted(path.parent.name for path in recipes.glob("*/recipe.json"))


def load_recipe(name: str, recipes: Path) -> Recipe:
    """The recipe `name` below `recipes`. Raises VTorqueError (VT-IMAGE), naming recipes or the wrong key."""
    path = recipes / name / "recipe.json"
    if not re.fullmatch(NAME, name) or not path.is_file():
        known = ", ".join(known_recipes(recipes)) or "none"
        raise VTorqueError(f"there is no recipe {name!r} in {recipes}", code=Code.IMAGE, hint=f"recipes: {known}")
    try:
        data = json.loads(path.read_bytes())
    except ValueError as err:
        raise VTorqueError(f"{path} is not JSON: {err}", code=Code.IMAGE) from err
    return _checked(path, name, data)


def _checked(path: Path, name: str, data: Any) -> Recipe:
    known = {field.name: field for field in fields(Recipe) if field.name != "directory"}
    if not isinstance(data, dict) or data.pop("version", None) != 1:
        raise VTorqueError(f'{path} must be an object with "version": 1', code=Code.IMAGE)
    values: dict[str, Any] = {}
    for key, value in data.items():
        if key not in known:
            raise VTorqueError(f"{path}: unknown key {key!r}", code=Code.IMAGE, hint=f"keys: {', '.join(known)}")
        kind = known[key].type
        if kind == "tuple[str, ...]" and isinstance(value, list) and all(isinstance(v, str) for v in value):
            values[key] = tuple(value)
        elif type(value).__name__ == kind:
            values[key] = value
        else:
            raise VTorqueError(f"{path}: {key} has the wrong type: {value!r} is no {kind}", code=Code.IMAGE)
    try:
        recipe = Recipe(directory=path.parent, **values)
    except TypeError as err:
        raise VTorqueError(f"{path}: {str(err).split('__init__() ')[-1]}", code=Code.IMAGE) from None
    if recipe.name != name or recipe.kind not in KINDS:
        raise VTorqueError(
            f"{path}: name is {recipe.name!r}, kind {recipe.kind!r}",
            code=Code.IMAGE,
            hint=f"name must be {name}, kind one of {', '.join(KINDS)}",
        )
    return recipe
