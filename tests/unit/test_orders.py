"""Orders to guests, without a guest: in which order they clean up, and what is printed of their answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import pytest

from vmgr.commands.ordering import show
from vmgr.node.orders import save


def test_one_save_has_cleaned_up_before_the_next_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its caller goes while an answer is on its way; what QEMU knows of the copy has one name for all copies."""
    cleaned: list[int] = []

    async def saving(*_: object) -> AsyncGenerator[dict[str, Any], None]:
        try:
            yield {"doing": "copying the disk"}
            yield {"doing": "more"}
        finally:
            await asyncio.sleep(0.01)
            cleaned.append(1)

    guest: Any = SimpleNamespace(name="vn1-1")
    monkeypatch.setattr(save, "guest_of", lambda *_: (None, guest))
    monkeypatch.setattr(save, "wish_of", lambda *_: None)
    monkeypatch.setattr(save._Saver, "save", saving)

    async def work() -> None:
        order: Any = save.order(lambda: None, lambda: guest, guest)
        answers = order(SimpleNamespace(request={}))
        assert await answers.__anext__() == {"doing": "copying the disk"}
        await answers.aclose()
        assert cleaned == [1]

    asyncio.run(work())


def test_what_a_node_says_moves_no_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    show({}, "image\x1b[2J\x07", as_json=False)
    assert capsys.readouterr().out == "image\\x1b[2J\\x07\n"
