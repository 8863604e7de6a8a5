"""Recipes: what an image is made of, read from `<name>/recipe.yaml` and checked.

A recipe with a `base` is another recipe with more in it: lists are joined, the base's first; other values take the
place of the base's.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Optional

from vmgr.errors import Code, VTorqueError
from vmgr.fields import Problem, check
from vmgr.images.recipeschema import JOINED, NOT_WITH_BASE, OF_KIND, OPTIONAL, RECIPE
from vmgr.trust import check_trusted
from vmgr.yamlfile import dotted, parse_yaml

FILE = "recipe.yaml"
MAX_RECIPE_BYTES = 1 << 20
MAX_BASES = 8


class File(NamedTuple):
    """A file or folder that goes into the image: `source` here, `target` there. `mode` None keeps executable or not."""

    source: Path
    target: str
    mode: Optional[int]
    owner: str


class Repository(NamedTuple):
    """One of dnf's: `gpgkey` is the URL of the key that its packages are signed with, None for packages without."""

    name: str
    url: str
    gpgkey: Optional[str]


class Layer(NamedTuple):
    """What one recipe of a chain of bases adds to the installed system: files, then scripts that run in its root."""

    files: tuple[File, ...]
    scripts: tuple[Path, ...]


@dataclass(frozen=True)
class Recipe:
    """One recipe. Sizes are measured: what a build downloads, needs while it runs, and leaves in the pool.

    `kernel` is the package (or meta-package) of the kernel; `packages` are installed (kinds apt and dnf) or unpacked
    (kind initramfs); `programs` are the files that go into an initramfs with the libraries they need;
    `modules` are loaded at once by the initial RAM disk and `modules_on_demand` only lie ready in it; `initrd` is the
    folder with the other files of a disk's initial RAM disk. `layers` are those of the bases first.
    """

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
    programs: tuple[str, ...]
    modules_on_demand: tuple[str, ...]
    suite: str
    disk_mib: int
    excluded_paths: tuple[str, ...]
    initrd: Optional[Path]
    repositories: tuple[Repository, ...]
    release: str
    layers: tuple[Layer, ...]

    def digest(self) -> str:
        """SHA-256 over what the recipe says and over the files that it names: paths, contents, executable bits."""
        digest = hashlib.sha256()
        plain = {key: value for key, value in vars(self).items() if key not in ("layers", "initrd")}
        digest.update(json.dumps(plain, sort_keys=True).encode())
        if self.initrd is not None:
            _add_tree(digest, self.initrd)
        for layer in self.layers:
            for file in layer.files:
                digest.update(json.dumps(["file", *file[1:]]).encode())
                _add_tree(digest, file.source)
            for script in layer.scripts:
                digest.update(b"script")
                _add_tree(digest, script)
        return digest.hexdigest()


def _add_tree(digest: Any, source: Path) -> None:
    for path in sorted([source, *source.rglob("*")]):
        info = path.lstat()
        name = path.relative_to(source).as_posix()
        digest.update(f"{name}\0{info.st_mode & 0o170100:o}\0{info.st_size}\0".encode())
        if path.is_symlink():
            digest.update(os.fsencode(path.readlink()))
        elif path.is_file():
            digest.update(path.read_bytes())


def known_recipes(places: Sequence[Path]) -> list[str]:
    """The names of the recipes in the folders `places`, sorted."""
    return sorted({path.parent.name for place in places for path in place.glob(f"*/{FILE}")})


def load_recipe(word: str, places: Sequence[Path]) -> Recipe:
    """The recipe `word`: a name, looked for in the folders `places`, or the path of a recipe's file or folder.

    Raises VTorqueError: VT-IMAGE naming the recipes that there are, VT-CONFIG with file, line, key and what is
    allowed, VT-TRUST when root runs this and others could change the recipe.
    """
    path = _find(word, places)
    chain = [_read(path, None if "/" in word else word)]
    while chain[-1].values.get("base"):
        source, base = chain[-1], str(chain[-1].values["base"])
        path = _find(base, places, asked_by=source)
        if len(chain) > MAX_BASES or any(path == earlier.path for earlier in chain):
            raise source.wrong(("base",), f"{base} builds on this recipe itself, or the chain is too long")
        chain.append(_read(path, base))
    return _joined(chain[::-1])


class _Source(NamedTuple):
    """One recipe file as it stands: the checked values and the line of each key."""

    path: Path
    values: dict[str, Any]
    lines: Mapping[str, int]

    def wrong(self, path: tuple[Any, ...], text: str) -> VTorqueError:
        at = [dotted(path[:length]) for length in range(len(path), 0, -1)]
        line = next((self.lines[key] for key in at if key in self.lines), 1)
        return VTorqueError(f"{self.path} line {line}: {at[0] if at else 'the recipe'}: {text}", code=Code.CONFIG)


def _find(word: str, places: Sequence[Path], asked_by: Optional[_Source] = None) -> Path:
    if "/" in word and asked_by is None:
        path = Path(word).absolute()
        path = path / FILE if path.is_dir() else path
        if path.is_file():
            return path
        raise VTorqueError(f"there is no recipe {word}", code=Code.IMAGE, hint=f"give a {FILE} or its folder")
    for place in places:
        if "/" not in word and (place / word / FILE).is_file():
            return place / word / FILE
    known = ", ".join(known_recipes(places)) or "none"
    if asked_by is not None:
        raise asked_by.wrong(("base",), f"there is no recipe {word!r}; recipes: {known}")
    folders = ", ".join(map(str, places)) or "no folder"
    raise VTorqueError(f"there is no recipe {word!r} in {folders}", code=Code.IMAGE, hint=f"recipes: {known}")


def _read(path: Path, name: Optional[str]) -> _Source:
    check_trusted(path)
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_RECIPE_BYTES + 1)
    except OSError as err:
        raise VTorqueError(f"cannot read the recipe {path}: {err.strerror}", code=Code.IMAGE) from err
    if len(data) > MAX_RECIPE_BYTES:
        raise VTorqueError(f"{path} is larger than {MAX_RECIPE_BYTES} bytes", code=Code.CONFIG)
    tree, lines = parse_yaml(data, os.fspath(path))
    source = _Source(path, {}, lines)
    try:
        source = source._replace(values=check(tree, RECIPE, partial=True))
    except Problem as problem:
        raise source.wrong(problem.path, problem.text) from None
    _check_keys(source, name)
    return source


def _check_keys(source: _Source, name: Optional[str]) -> None:
    """Refuse a recipe with too few keys, or with keys that mean nothing in it."""
    values = source.values
    for key in ("version", "name"):
        if key not in values:
            raise source.wrong((), f"the key {key} is missing ({RECIPE[key].doc})")
    if name is not None and values["name"] != name:
        raise source.wrong(("name",), f"it is {values['name']!r} and must be {name!r}, as its folder is called")
    if values.get("base"):
        for key in NOT_WITH_BASE:
            if key in values:
                raise source.wrong((key,), "comes from the base and cannot be set beside it")
        return
    if "kind" not in values:
        raise source.wrong((), "a base, or a kind and the rest of a whole recipe, is needed")
    for key in RECIPE:
        kinds = OF_KIND.get(key)
        if key in values and kinds is not None and values["kind"] not in kinds:
            raise source.wrong((key,), f"means nothing in a recipe of kind {values['kind']}")
        if key not in values and key not in OPTIONAL and (kinds is None or values["kind"] in kinds):
            raise source.wrong((), f"the key {key} is missing ({RECIPE[key].doc})")


def _joined(chain: Sequence[_Source]) -> Recipe:
    """One recipe from those of a chain, the one at its root first."""
    values: dict[str, Any] = {key: kind.default for key, kind in RECIPE.items() if hasattr(kind, "read")}
    values.update(dict.fromkeys(JOINED, ()))
    kind = chain[0].values["kind"]
    layers = []
    for source in chain:
        for key, value in source.values.items():
            kinds = OF_KIND.get(key)
            if kinds is not None and kind not in kinds:
                raise source.wrong((key,), f"means nothing in a recipe of kind {kind}")
            values[key] = tuple(dict.fromkeys((*values[key], *value))) if key in JOINED else value
        layers.append(_layer(source))
    if values["initrd"] is not None:
        values["initrd"] = _inside(chain[0], ("initrd",), values["initrd"], folder=True)
    values["repositories"] = tuple(Repository(**each) for each in values.get("repositories") or ())
    for key in ("version", "base", "files", "scripts"):
        values.pop(key, None)
    return Recipe(layers=tuple(layers), **values)


def _layer(source: _Source) -> Layer:
    files = []
    for index, file in enumerate(source.values.get("files", ())):
        where = ("files", index)
        path = _inside(source, (*where, "source"), file["source"])
        if path.is_dir() and file["mode"] is not None:
            raise source.wrong((*where, "mode"), "is for a file; those in a folder keep being executable or not")
        mode = None if file["mode"] is None else int(file["mode"], 8)
        files.append(File(path, file["target"], mode, file["owner"]))
    scripts = []
    for index, name in enumerate(source.values.get("scripts", ())):
        path = _inside(source, ("scripts", index), name)
        with path.open("rb") as stream:
            if stream.read(2) != b"#!":
                raise source.wrong(("scripts", index), f"{name} must begin with #! and its interpreter")
        scripts.append(path)
    return Layer(tuple(files), tuple(scripts))


def _inside(source: _Source, key: tuple[Any, ...], name: str, *, folder: Optional[bool] = None) -> Path:
    """The file or folder `name` beside a recipe. Raises VTorqueError when it is not there or leads elsewhere."""
    home = source.path.parent
    path = home / name
    if not path.exists():
        raise source.wrong(key, f"there is no {path}")
    if not path.resolve().is_relative_to(home.resolve()):
        raise source.wrong(key, f"{name} leads out of the recipe's folder")
    if not path.is_dir() and (folder or not path.is_file()):
        raise source.wrong(key, f"{path} is no {'folder' if folder else 'file or folder'}")
    if key[0] == "scripts" and path.is_dir():
        raise source.wrong(key, f"{path} is a folder")
    for each in (path, *path.rglob("*")):
        if not each.is_symlink():
            check_trusted(each)
        if each.is_symlink() and each != path:
            continue
        if not each.is_dir() and not each.is_file():
            raise source.wrong(key, f"{each} is neither a file nor a folder")
    return path
