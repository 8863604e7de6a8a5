"""The keys of a recipe, and what each may hold."""

from __future__ import annotations

import re
from typing import Any, Callable

from vmgr.fields import REQUIRED, Items, Key, choice, name, nullable, number, path, text
from vmgr.images.pool import NAME

KINDS = ("initramfs", "apt", "dnf")
_WORD = r"[A-Za-z0-9][A-Za-z0-9.+:_@~-]{0,127}"


def _image_name(value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch(NAME, value):
        raise ValueError("up to 64 small letters, digits, `.`, `_` and `-` are needed, a letter or digit first")
    return value


def _listed(read: Callable[[Any], str], what: str) -> Callable[[Any], list[str]]:
    def read_list(value: Any) -> list[str]:
        if not isinstance(value, list):
            raise ValueError(f"a list of {what} is needed")
        return [read(item) for item in value]

    return read_list


def _word(value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch(_WORD, value):
        raise ValueError("names of letters, digits and `.+:_@~-` are needed")
    return value


def _beside(value: Any) -> str:
    """The path of a file beside the recipe."""
    parts = value.split("/") if isinstance(value, str) and value.isprintable() else [""]
    if not all(parts) or ".." in parts:
        raise ValueError("a path within the recipe's folder is needed, such as `etc/motd`")
    return "/".join(part for part in parts if part != ".")


def _pattern(value: Any) -> str:
    if not isinstance(value, str) or not value.startswith("/") or not value.isprintable() or " " in value:
        raise ValueError("absolute paths, which may hold `*`, are needed")
    return value


def _mode(value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[0-7]{3,4}", value):
        raise ValueError('three or four octal digits in quotes, such as "0644", are needed')
    return value


def _owner(value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[a-z0-9_][a-z0-9_.-]*(:[a-z0-9_][a-z0-9_.-]*)?", value):
        raise ValueError("USER or USER:GROUP is needed, names or numbers of the image")
    return value


def _version(value: Any) -> int:
    if value != 1 or isinstance(value, bool):
        raise ValueError("1 is needed: recipes of another form are not known")
    return 1


def _arch(value: Any) -> str:
    return choice("amd64")(value)


def _url(value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"(https?|file)://[^\s\"'\\]+", value):
        raise ValueError("a URL such as https://mirror.example.org/9/BaseOS/x86_64/os/ is needed")
    return value


_names = _listed(_word, "names")
_megabytes = number(0, 1 << 20)

RECIPE: dict[str, Any] = {
    "version": Key(_version, REQUIRED, "1"),
    "name": Key(_image_name, REQUIRED, "the image's name, as the recipe's folder is called"),
    "base": Key(nullable(_word), None, "the recipe that this one adds to"),
    "kind": Key(choice(*KINDS), REQUIRED, "how the image is made"),
    "family": Key(name, REQUIRED, "the folder below templates/guest for its guests"),
    "distro": Key(name, REQUIRED, "what `distro=` of a request may be, beside the family"),
    "arch": Key(_arch, REQUIRED, "Debian's name of the architecture"),
    "description": Key(text, REQUIRED, "one line for `vmgr list`"),
    "download_mb": Key(_megabytes, REQUIRED, "what a build downloads"),
    "disk_mb": Key(_megabytes, REQUIRED, "what a revision takes in the pool"),
    "build_disk_mb": Key(_megabytes, REQUIRED, "what a build takes while it runs; less room is refused"),
    "cmdline": Key(text, REQUIRED, "the kernel's command line"),
    "min_ram_mib": Key(number(64, 1 << 20), REQUIRED, "least memory of a guest"),
    "features": Key(_names, REQUIRED, "what its guests can do"),
    "kernel": Key(_word, REQUIRED, "the package of the kernel, or a meta-package of it"),
    "packages": Key(_names, [], "packages that are installed, or for an initramfs unpacked"),
    "modules": Key(_names, REQUIRED, "kernel modules that the initial RAM disk loads"),
    "modules_on_demand": Key(_names, [], "kernel modules that lie ready in an initramfs"),
    "programs": Key(_listed(path, "absolute paths"), [], "files that go into an initramfs with their libraries"),
    "suite": Key(_word, "", "Debian's name of the release"),
    "release": Key(_word, "", "what dnf's `$releasever` is"),
    "repositories": Items(
        {
            "name": Key(name, REQUIRED, "its name for dnf"),
            "url": Key(_url, REQUIRED, "where it is"),
            "gpgkey": Key(nullable(_url), None, "where the key of its packages is; null: they are not signed"),
        },
        [],
        "dnf's repositories",
    ),
    "disk_mib": Key(number(128, 16 << 20), 0, "virtual size of the disk in MiB"),
    "excluded_paths": Key(_listed(_pattern, "patterns of paths"), [], "what of the packages is left out"),
    "initrd": Key(nullable(_beside), None, "folder with the files of the initial RAM disk, `init` among them"),
    "files": Items(
        {
            "source": Key(_beside, REQUIRED, "file or folder beside the recipe"),
            "target": Key(path, REQUIRED, "where it goes; a folder's contents go into this folder"),
            "mode": Key(nullable(_mode), None, 'such as "0644"; null: 0755 where it is executable, else 0644'),
            "owner": Key(_owner, "root", "USER or USER:GROUP of the image"),
        },
        [],
        "files that go into the image",
    ),
    "scripts": Key(_listed(_beside, "paths"), [], "files beside the recipe that run in the image's root at the end"),
}
"""Every key of a recipe."""

OPTIONAL = frozenset(("base", "packages", "modules_on_demand", "programs", "excluded_paths", "files", "scripts"))
"""Keys that a recipe without a base may lack."""

OF_KIND: dict[str, tuple[str, ...]] = {
    "programs": ("initramfs",),
    "modules_on_demand": ("initramfs",),
    "suite": ("apt",),
    "excluded_paths": ("apt",),
    "release": ("dnf",),
    "repositories": ("dnf",),
    "disk_mib": ("apt", "dnf"),
    "initrd": ("apt", "dnf"),
}
"""The kinds of recipe that a key means something in; other keys do in all."""

JOINED = ("features", "packages", "modules", "modules_on_demand", "programs", "excluded_paths")
"""Lists to which a recipe adds."""

NOT_WITH_BASE = ("kind", "family", "arch", "suite", "release", "repositories", "initrd")
"""What a recipe with a base cannot change."""
