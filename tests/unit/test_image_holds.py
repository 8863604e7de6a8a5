"""Who holds an image, and what goes while it is chosen."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from test_images import publish

from vmgr.errors import VTorqueError
from vmgr.images.pool import Image, Pool
from vmgr.images.removing import delete


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
