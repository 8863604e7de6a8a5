"""What of a guest's disk can be saved, and how, before anything is done."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from test_image_add import FACTS

from vmgr.errors import Code, VTorqueError
from vmgr.images.pool import Image
from vmgr.node.control import Peer, Talk
from vmgr.node.orders.save import wish_of


def wish(image: Image, **request: object) -> Any:
    job: Any = SimpleNamespace(image=image, user=None, job_id="12.host")
    member: Any = SimpleNamespace(name="vn1-1")
    return wish_of(Talk(Peer(1, 0), request), job, None, member, None)  # type: ignore[arg-type]


def image(name: str, revision: int) -> Image:
    known: dict[str, Any] = {**FACTS, "disk": "disk.qcow2", "created": "", "files": {}, "packages": None}
    return Image(folder="/", name=name, revision=revision, **{k: v for k, v in known.items() if k in Image._fields})


def test_a_layer_on_a_users_own_disk_is_refused_before_it_is_made() -> None:
    own = image("/home/alice/own.qcow2", 0)
    with pytest.raises(VTorqueError, match=r"own\.qcow2, which is not in the pool.*") as caught:
        wish(own, name="mine", layer=True)
    assert caught.value.code is Code.IMAGE and caught.value.hint == "save it with --flat"
    assert wish(own, name="mine").whole
