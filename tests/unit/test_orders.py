"""Orders to guests, without a guest: how they clean up, and what is printed of their answers."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vmgr.commands.ordering import show
from vmgr.errors import VTorqueError
from vmgr.node import record
from vmgr.node.callersfile import MAX_UNFINISHED, CallersFile, discard, note, undo_partial, unfinished
from vmgr.node.orders import save
from vmgr.node.undo import undo


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


@pytest.fixture
def place(tmp_path: Path) -> record.Place:
    folder = tmp_path / "spool" / "jobs" / "13.host" / f"{1:016d}-1-00000000"
    folder.mkdir(parents=True)
    place = record.Place(folder, tmp_path / "run" / "jobs" / "13.host" / "1.sock")
    record.append(place, {"do": "begin"})
    return place


def partial_of(folder: Path, number: int) -> CallersFile:
    """One of root's, which is removed without a process of its own."""
    return CallersFile(f"{folder}/made{number}", f"{folder}/.made{number}.part", None)


def test_files_that_are_gone_are_not_removed_again(place: record.Place, tmp_path: Path) -> None:
    files = [partial_of(tmp_path, number) for number in range(3 * MAX_UNFINISHED)]
    for file in files:
        note(place, file)
        os.close(file.create())
        asyncio.run(discard(place, file, timeout_s=1))
        assert not Path(file.partial).exists()
    assert unfinished(record.steps(place)) == []
    left = files[0]._replace(partial=f"{tmp_path}/.left.part")
    note(place, left)
    os.close(left.create())
    for file in files:
        Path(file.partial).write_text("of somebody else's by now")
    assert undo(place) == [] and not Path(left.partial).exists() and not place.folder.exists()
    assert all(Path(file.partial).exists() for file in files)
    asyncio.run(discard(place, left, timeout_s=1))
    assert not place.folder.exists(), "an order that ends after its attempt writes nothing down"


def test_only_so_many_unfinished_files(place: record.Place, tmp_path: Path) -> None:
    for number in range(MAX_UNFINISHED):
        note(place, partial_of(tmp_path, number))
    with pytest.raises(VTorqueError, match="VT-GUEST: 16 files are being made"):
        note(place, partial_of(tmp_path, MAX_UNFINISHED))


def test_an_epilogue_whose_time_is_over_starts_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmgr.node.callersfile.act_now", lambda *_, **__: pytest.fail("a process was started"))
    with pytest.raises(OSError, match="no time was left"):
        undo_partial({"path": "/home/carol/.x.part", "uid": 1000, "gid": 1000, "gids": []}, 0.0)
