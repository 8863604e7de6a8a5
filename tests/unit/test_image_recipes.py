"""Recipes: read, checked with file, line and key, joined with their bases; their files put into an image's root."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from nodesite import FUZZ

from vmgr.errors import Code, VTorqueError
from vmgr.images.layers import apply_layers, inside
from vmgr.images.micro import kernel_file
from vmgr.images.recipe import File, Layer, Recipe, known_recipes, load_recipe
from vmgr.images.recipeschema import OF_KIND, RECIPE

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPES = REPOSITORY / "contrib" / "images"
TINY: dict[str, Any] = {
    "version": 1, "name": "tiny", "kind": "initramfs", "family": "micro", "distro": "SLG", "arch": "amd64",
    "description": "for a test", "download_mb": 1, "disk_mb": 1, "build_disk_mb": 1, "cmdline": "quiet",
    "min_ram_mib": 128, "features": ["9p"], "kernel": "linux-image-amd64", "packages": ["busybox-static"],
    "modules": ["isofs"],
}  # fmt: skip


def write(folder: Path, recipe: dict[str, Any], **files: str) -> Path:
    """The folder of recipes that now has this one, with files beside it by their names, `_` for `.`."""
    home = folder / str(recipe.get("name"))
    home.mkdir(parents=True, exist_ok=True)
    (home / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for name, text in files.items():
        (home / name.replace("_", ".")).write_text(text)
    return folder


def tiny(folder: Path, **files: str) -> Recipe:
    return load_recipe("tiny", [write(folder, TINY, **files)])


# --- reading ---


def test_recipes_of_the_repository_are_sound() -> None:
    assert known_recipes([RECIPES]) == ["debian-12", "micro", "rocky-9"]
    for name in known_recipes([RECIPES]):
        recipe = load_recipe(name, [RECIPES])
        assert recipe.download_mb and recipe.disk_mb and recipe.build_disk_mb
        assert (REPOSITORY / "templates" / "guest" / recipe.family / "user-data.j2").is_file()
        assert recipe.layers[0].files


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colour": "blue"}, "colour: unknown key; allowed here: version, name, base, kind,"),
        ({"packages": "bash"}, "packages: a list of names is needed"),
        ({"packages": [1]}, "packages: names of letters, digits and"),
        ({"packages": ["--option=x"]}, "packages: names of letters, digits and"),
        ({"disk_mb": "1"}, "disk_mb: a whole number from 0 "),
        ({"min_ram_mib": True}, "min_ram_mib: a whole number from 64 "),
        ({"name": "mikro"}, "name: it is 'mikro' and must be 'tiny', as its folder is called"),
        ({"name": "../x"}, "name: up to 64 small letters"),
        ({"kind": "tape"}, "kind: one of initramfs, apt, dnf is needed"),
        ({"version": 2}, "version: 1 is needed"),
        ({"kernel": None}, "kernel: names of letters"),
        ({"suite": "bookworm"}, "suite: means nothing in a recipe of kind initramfs"),
        ({"kind": "apt"}, "the recipe: the key suite is missing (Debian's name of the release)"),
        ({"base": "nowhere"}, "kind: comes from the base"),
        ({"files": [{"source": "motd"}]}, "files[0]: the key target is missing"),
        ({"files": [{"source": "nothing", "target": "/x"}]}, "files[0].source: there is no "),
        ({"files": [{"source": "../tiny/motd", "target": "/x"}]}, "files[0].source: a path within the recipe's"),
        ({"files": [{"source": "/etc/passwd", "target": "/x"}]}, "files[0].source: a path within the recipe's"),
        ({"files": [{"source": "link", "target": "/x"}]}, "files[0].source: link leads out of the recipe's folder"),
        ({"files": [{"source": "pipe", "target": "/x"}]}, "pipe is no file or folder"),
        ({"files": [{"source": "motd", "target": "x"}]}, "files[0].target: an absolute path "),
        ({"files": [{"source": "motd", "target": "/x", "mode": 644}]}, "mode: three or four octal digits in quotes"),
        ({"files": [{"source": "folder", "target": "/x", "mode": "0644"}]}, "files[0].mode: is for a file"),
        ({"files": [{"source": "motd", "target": "/x", "owner": "a b"}]}, "files[0].owner: USER or USER:GROUP"),
        ({"scripts": ["motd"]}, "scripts[0]: motd must begin with #! and its interpreter"),
        ({"scripts": ["folder"]}, "is a folder"),
        ({"scripts": "motd"}, "scripts: a list of paths is needed"),
    ],
)
def test_wrong_recipes(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    recipe = {**TINY, **changes}
    write(tmp_path, {**recipe, "name": "tiny"}, motd="hello")
    home = tmp_path / "tiny"
    (home / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (home / "folder").mkdir()
    (home / "link").symlink_to("/etc/passwd")
    os.mkfifo(home / "pipe")
    with pytest.raises(VTorqueError) as caught:
        load_recipe("tiny", [tmp_path])
    assert caught.value.code is Code.CONFIG and message in str(caught.value)
    assert str(home / "recipe.yaml") in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "a: *b", "a: {", "name: tiny\nname: tiny\n", "x" * (1 << 20) + "y", "\0"])
def test_recipes_that_are_no_mapping(tmp_path: Path, text: str) -> None:
    (write(tmp_path, TINY) / "tiny" / "recipe.yaml").write_text(text)
    with pytest.raises(VTorqueError) as caught:
        load_recipe("tiny", [tmp_path])
    assert caught.value.code is Code.CONFIG


def test_unknown_recipe_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(VTorqueError, match=r"no recipe 'mikro' in .*; recipes: debian-12, micro, rocky-9") as caught:
        load_recipe("mikro", [tmp_path, RECIPES])
    assert caught.value.code is Code.IMAGE
    for path in ("./nothing", str(tmp_path), str(tmp_path / "recipe.yaml")):
        with pytest.raises(VTorqueError, match="there is no recipe"):
            load_recipe(path, [RECIPES])


def test_the_sites_recipes_go_before_those_that_came_along(tmp_path: Path) -> None:
    own = write(tmp_path, {**TINY, "name": "micro", "description": "the site's"})
    assert load_recipe("micro", [own, RECIPES]).description == "the site's"
    assert load_recipe("debian-12", [own, RECIPES]).name == "debian-12"


def test_a_recipe_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, TINY)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.yaml").write_text(yaml.safe_dump({**TINY, "name": "other"}))
    assert load_recipe(str(tmp_path / "tiny"), []).name == "tiny"
    assert load_recipe("./tiny/recipe.yaml", []).name == "tiny"
    assert load_recipe("./other.yaml", []).name == "other"


@pytest.mark.root
def test_root_trusts_no_recipe_that_others_can_write(tmp_path: Path) -> None:
    write(tmp_path, {**TINY, "scripts": ["go.sh"]}, go_sh="#!/bin/sh\n")
    for name in ("go.sh", "recipe.yaml"):
        (tmp_path / "tiny" / name).chmod(0o666)
        with pytest.raises(VTorqueError) as caught:
            load_recipe("tiny", [tmp_path])
        assert caught.value.code is Code.TRUST
        (tmp_path / "tiny" / name).chmod(0o644)
    assert load_recipe("tiny", [tmp_path]).layers[0].scripts


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@FUZZ
@given(changes=st.dictionaries(st.sampled_from(sorted(RECIPE)), ANY, max_size=4))
def test_anything_is_a_recipe_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any]
) -> None:
    folder = tmp_path_factory.mktemp("recipes")
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**TINY, **changes}))
    try:
        load_recipe(str(folder), [])
    except VTorqueError as err:
        assert str(err).isprintable() and err.code in (Code.CONFIG, Code.IMAGE)


# --- bases ---


def test_a_recipe_with_a_base_adds_to_it(tmp_path: Path) -> None:
    write(tmp_path, {**TINY, "files": [{"source": "motd", "target": "/etc/motd"}]}, motd="base")
    more = {
        "version": 1, "name": "mine", "base": "tiny", "description": "with more",
        "packages": ["bash", "busybox-static"], "scripts": ["go"],
    }  # fmt: skip
    recipe = load_recipe("mine", [write(tmp_path, more, go="#!/bin/sh\n")])
    assert (recipe.name, recipe.kind, recipe.description) == ("mine", "initramfs", "with more")
    assert recipe.packages == ("busybox-static", "bash") and recipe.min_ram_mib == 128
    base, own = recipe.layers
    assert [file.target for file in base.files] == ["/etc/motd"] and base.scripts == ()
    assert own.files == () and own.scripts == (tmp_path / "mine" / "go",)
    third = {"version": 1, "name": "third", "base": "mine", "min_ram_mib": 256}
    assert len(load_recipe("third", [write(tmp_path, third)]).layers) == 3


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"base": "none"}, "line 1: base: there is no recipe 'none'; recipes: mine, tiny"),
        ({"base": "mine"}, "base: mine builds on this recipe itself"),
        ({"base": "tiny", "kind": "apt"}, "kind: comes from the base and cannot be set beside it"),
        ({"base": "tiny", "disk_mib": 4096}, "disk_mib: means nothing in a recipe of kind initramfs"),
        ({"base": "../tiny"}, "base: names of letters"),
        ({}, "a base, or a kind and the rest of a whole recipe, is needed"),
    ],
)
def test_wrong_bases(tmp_path: Path, more: dict[str, Any], message: str) -> None:
    write(tmp_path, TINY)
    with pytest.raises(VTorqueError) as caught:
        load_recipe("mine", [write(tmp_path, {"version": 1, "name": "mine", **more})])
    assert message in str(caught.value)


# --- what a build is made from ---


def test_digest_follows_what_is_said_and_the_files(tmp_path: Path) -> None:
    named = {**TINY, "files": [{"source": "etc", "target": "/etc"}], "scripts": ["go"]}
    home = write(tmp_path, named, go="#!/bin/sh\n") / "tiny"
    (home / "etc").mkdir()
    (home / "etc" / "motd").write_text("hello")
    seen = [load_recipe("tiny", [tmp_path]).digest()]

    def changed() -> bool:
        seen.append(load_recipe("tiny", [tmp_path]).digest())
        return seen.count(seen[-1]) == 1

    (home / "recipe.yaml").write_text("# a comment\n" + yaml.safe_dump(named))
    (home / "notes").write_text("nobody names this")
    assert not changed()
    (home / "etc" / "motd").write_text("hallo")
    assert changed()
    (home / "etc" / "motd").chmod(0o755)
    assert changed()
    (home / "go").write_text("#!/bin/sh\nexit\n")
    assert changed()
    (home / "etc" / "link").symlink_to("motd")
    assert changed()
    for key, value in (("packages", ["bash"]), ("cmdline", "x"), ("scripts", []), ("min_ram_mib", 500)):
        (home / "recipe.yaml").write_text(yaml.safe_dump({**named, key: value}))
        assert changed(), key
    for change in ({"target": "/srv"}, {"owner": "nobody"}):
        (home / "recipe.yaml").write_text(yaml.safe_dump({**named, "files": [{**named["files"][0], **change}]}))
        assert changed(), change


def test_keys_of_one_kind_are_known() -> None:
    assert OF_KIND.keys() <= RECIPE.keys()


# --- files in an image's root ---


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    (root / "etc").mkdir(parents=True)
    (root / "etc/passwd").write_text("root:x:0:0::/:/bin/sh\nada:x:1815:1852::/:/bin/sh\n")
    (root / "etc/group").write_text("root:x:0:\nengines:x:1833:ada\n")
    (root / "usr/bin").mkdir(parents=True)
    (root / "bin").symlink_to("usr/bin")
    (root / "var").symlink_to(tmp_path / "outside")
    (root / "up").symlink_to("../../outside")
    (root / "round").symlink_to("round")
    return root


def place(root: Path, *files: File) -> None:
    apply_layers([Layer(files, ())], root, root / "no.log", lambda _: None)


def test_links_of_the_image_lead_nowhere_else(root: Path, tmp_path: Path) -> None:
    assert inside(root, "/bin/sh") == root / "usr/bin/sh"
    assert inside(root, "/up/x") == root / "outside/x"
    assert inside(root, "/var/x") == root / tmp_path.relative_to("/") / "outside/x"
    assert inside(root, "/../../etc/passwd") == root / "etc/passwd"
    with pytest.raises(VTorqueError, match="in a circle"):
        inside(root, "/round/x")
    (tmp_path / "file").write_text("text")
    place(root, File(tmp_path / "file", "/var/lib/file", None, "root"), File(tmp_path / "file", "/up/x", None, "root"))
    assert not (tmp_path / "outside").exists()
    assert inside(root, "/var/lib/file").read_text() == "text"


@pytest.mark.root
def test_files_have_the_owners_and_modes_that_the_recipe_says(root: Path, tmp_path: Path) -> None:
    source = tmp_path / "tree"
    (source / "bin").mkdir(parents=True)
    (source / "bin" / "tool").write_text("#!/bin/sh\n")
    (source / "bin" / "tool").chmod(0o755)
    (source / "link").symlink_to("bin/tool")
    (root / "etc/motd").symlink_to("/etc/passwd")
    place(
        root,
        File(source, "/", None, "root"),
        File(source / "bin/tool", "/srv/deep/secret", 0o4750, "ada:engines"),
        File(source / "bin/tool", "/etc/motd", 0o600, "ada"),
        File(source / "bin/tool", "/srv/numbers", None, "5:6"),
    )
    assert (root / "bin").is_symlink() and (root / "usr/bin/tool").stat().st_mode & 0o7777 == 0o755
    assert (root / "link").readlink() == Path("bin/tool")
    found = {}
    for name in ("srv/deep/secret", "etc/motd", "srv/numbers", "srv/deep"):
        info = (root / name).lstat()
        found[name] = (info.st_uid, info.st_gid, stat.S_IMODE(info.st_mode))
    assert found == {
        "srv/deep/secret": (1815, 1833, 0o4750), "etc/motd": (1815, 1852, 0o600), "srv/numbers": (5, 6, 0o755),
        "srv/deep": (0, 0, 0o755),
    }  # fmt: skip
    assert (root / "etc/passwd").read_text().startswith("root:")


def test_files_that_cannot_be_placed(root: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    for file, message in (
        (File(tmp_path / "file", "/etc", None, "root"), "/etc is a folder of the image"),
        (File(tmp_path / "file", "/etc/passwd/x", None, "root"), "/etc/passwd is a file of the image"),
        (File(tmp_path / "file", "/x", None, "bob"), "the image has no bob in /etc/passwd"),
        (File(tmp_path / "file", "/x", None, "ada:none"), "the image has no none in /etc/group"),
    ):
        with pytest.raises(VTorqueError, match=message) as caught:
            place(root, file)
        assert caught.value.code is Code.BUILD


def test_the_kernel_is_a_file_of_the_image(tmp_path: Path) -> None:
    """It goes into the pool, for everybody to read: a link to a file of the machine is no kernel."""
    root, secret = tmp_path / "root", tmp_path / "secret"
    secret.write_text("of the machine's")
    (root / "boot").mkdir(parents=True)
    (root / "boot" / "vmlinuz-1").symlink_to(secret)
    with pytest.raises(VTorqueError, match="VT-BUILD: the image's kernel vmlinuz-1 is no file in it"):
        kernel_file(root)
    (root / "usr").mkdir()
    (root / "usr" / "kernel").write_text("kernel")
    (root / "boot" / "vmlinuz-1").unlink()
    (root / "boot" / "vmlinuz-1").symlink_to("/usr/kernel")
    assert kernel_file(root).read_text() == "kernel"
