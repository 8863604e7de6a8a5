"""Who holds an image, and what goes while it is chosen."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from test_images import publish

from vmgr.errors import VTorqueError
from vmgr.images import removing
from vmgr.images.pool import Image, Pool
from vmgr.images.removing import delete, rename
from vmgr.images.writing import sweep


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    return Pool(tmp_path / "pool")


def test_what_goes_while_it_is_chosen_is_chosen_again(pool: Pool) -> None:
    publish(pool)
    publish(pool)
    chosen: list[str] = []

    def choose() -> Image:
        image = pool.get("tiny")
        if not chosen:
            delete(pool, image.reference)
        chosen.append(image.reference)
        return image

    image, held = pool.hold(choose)
    assert held is not None and chosen == ["tiny@2", "tiny@1"] and image.reference == "tiny@1"
    with pytest.raises(VTorqueError, match=r"tiny@1 is in use: process \d+"):
        delete(pool, "tiny@1")
    os.close(held)
    assert delete(pool, "tiny@1").gone == ["tiny@1"]
    with pytest.raises(VTorqueError, match="unknown image"):
        pool.hold(lambda: pool.get("tiny"))


def test_where_root_is_nobody_an_image_is_used_without_a_lock(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    image, opens = publish(pool), os.open

    def refuse(path: Any, *rest: Any, **more: Any) -> int:
        if str(path).endswith("/.hold"):
            raise PermissionError(13, "Permission denied", path)
        return opens(path, *rest, **more)

    monkeypatch.setattr(os, "open", refuse)
    assert pool.hold(lambda: image) == (image, None)


def test_a_revision_without_its_lock_is_said(pool: Pool) -> None:
    image = publish(pool)
    (image.directory / ".hold").unlink()
    with pytest.raises(VTorqueError, match=r"cannot hold the image tiny@1: .*/\.hold: No such file.*anew"):
        pool.hold(lambda: image)


class Ended(Exception):
    """Stands for a signal."""


def ends_after(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rename ends with this step of it, and does nothing more."""
    if step == "the other name's folder is set aside":
        monkeypatch.setattr(removing.Path, "rename", _ending_at_second(Path.rename))
    else:
        monkeypatch.setattr(removing, "remove_tree", _end)


def _end(*_: object) -> None:
    raise Ended


def _ending_at_second(real: Any) -> Any:
    calls: list[Path] = []

    def renamed(path: Path, target: Path) -> Path:
        calls.append(path)
        if len(calls) == 2:
            raise Ended
        result: Path = real(path, target)
        return result

    return renamed


@pytest.mark.parametrize("swept", [False, True])
@pytest.mark.parametrize("step", ["the other name's folder is set aside", "all is renamed"])
def test_a_rename_that_is_ended_gives_no_number_away(
    step: str, swept: bool, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        publish(pool)
    for _ in range(3):
        publish(pool, "lab")
    delete(pool, "lab")
    with monkeypatch.context() as patched:
        ends_after(step, patched)
        with pytest.raises(Ended):
            rename(pool, "tiny", "lab")
    assert pool.names() == [{"all is renamed": "lab"}.get(step, "tiny")]
    if swept:
        sweep(pool.path)
        assert not [path.name for path in pool.path.iterdir() if path.name.startswith(".")]
    assert publish(pool).revision == 3 and publish(pool, "lab").revision == 4


def test_numbers_of_a_renamed_image_that_is_built_again_meanwhile(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process does so as soon as the name is free; the pool may be a link."""
    for _ in range(2):
        publish(pool)
    (pool.path.parent / "link").symlink_to(pool.path)
    pool = Pool(pool.path.parent / "link")
    remove, numbers = removing.remove_tree, []

    def build(path: Path) -> None:
        remove(path)
        numbers.append(publish(pool).revision)

    monkeypatch.setattr(removing, "remove_tree", build)
    rename(pool, "tiny", "lab")
    assert numbers == [3] and publish(pool).revision == 4 and publish(pool, "lab").revision == 3
    assert not [path.name for path in pool.path.iterdir() if path.name.startswith(".")]


def test_a_rename_that_fails_gives_no_number_away(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(pool)
    publish(pool, "lab")
    publish(pool, "lab")
    delete(pool, "lab")
    real = Path.rename

    def refused(path: Path, target: Path) -> Path:
        if Path(target).name == "lab":
            raise OSError(5, "Input/output error")
        return real(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", refused)
        with pytest.raises(VTorqueError, match="Input/output error"):
            rename(pool, "tiny", "lab")
    assert (publish(pool).revision, publish(pool, "lab").revision) == (2, 3)
