"""`vmgr image build`: where recipes are looked for, and what is said before anything is built."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Callable, NamedTuple

import pytest
from click.testing import CliRunner
from nodesite import Node, make_node, short_folder
from test_image_recipes import TINY, write

import vmgr.commands.build
import vmgr.commands.images
from vmgr.commands.build import build
from vmgr.errors import Code, VTorqueError

pytestmark = pytest.mark.root


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> Iterator[Node]:
    with short_folder() as base:
        own = write(base / "own", {**TINY, "name": "mine"})
        node = make_node(base, images={"recipes": str(own)})
        write(node.install.recipes, TINY)
        for module in (vmgr.commands.build, vmgr.commands.images):
            monkeypatch.setattr(module, "installation", lambda: node.install)
        yield node


def refused(*words: str) -> VTorqueError:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    done = CliRunner().invoke(build, words)
    assert isinstance(done.exception, VTorqueError), done.output
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before
    return done.exception


def test_recipes_are_looked_for_in_the_sites_folder_and_among_those_that_came_along(node: Node) -> None:
    own, shipped = node.base / "own", node.install.recipes
    text = str(refused("nothing"))
    assert text == f"VT-IMAGE: there is no recipe 'nothing' in {own}, {shipped}; recipes: mine, tiny"
    assert str(refused("nothing", "--recipes", str(own))).endswith(f"in {own}; recipes: mine")
    assert not node.config.images.pool.exists()


def test_a_wrong_recipe_is_refused_before_anything_is_done(node: Node, tmp_path: Path) -> None:
    (tmp_path / "wrong.yaml").write_text("version: 1\nname: wrong\nbase: mine\nsuite: bookworm\n")
    error = refused(str(tmp_path / "wrong.yaml"))
    assert error.code is Code.CONFIG and not node.config.images.pool.exists()
    assert str(error).endswith("wrong.yaml line 4: suite: comes from the base and cannot be set beside it")


def test_what_was_built_for_programs(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    class Made(NamedTuple):
        reference: str
        folder: str

    def make(recipe: str, *, made: Callable[[Made], object], **_how: object) -> None:
        if recipe == "broken":
            raise VTorqueError("it broke", code=Code.BUILD)
        made(Made(f"{recipe}@3", f"/pool/{recipe}/3"))

    monkeypatch.setattr("vmgr.images.build.build", make)
    assert CliRunner().invoke(build, ["mine", "tiny"]).stdout == "mine@3\ntiny@3\n"
    done = CliRunner().invoke(build, ["mine", "tiny", "--json"])
    assert json.loads(done.stdout) == {
        "images": [{"image": f"{name}@3", "directory": f"/pool/{name}/3"} for name in ("mine", "tiny")]
    }
    assert json.loads(CliRunner().invoke(build, ["mine", "broken", "--json"]).stdout)["images"][0]["image"] == "mine@3"
