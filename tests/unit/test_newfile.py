"""Files that appear whole, or not at all, whenever a signal comes."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from interrupting import Told, then_told

from vmgr.newfile import new_file

pytestmark = pytest.mark.usefixtures("told")


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_ended_while_it_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it has a hidden name, as over NFS."""
    opens = os.open

    def without_unnamed(path: Any, flags: int, *arguments: Any, **named: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "no")
        return int(then_told(opens)(path, flags, *arguments, **named))

    with monkeypatch.context() as patched, pytest.raises(Told):
        patched.setattr(os, "open", without_unnamed)
        with new_file(tmp_path / "file", 0o644):
            raise AssertionError("not reached")
    assert content(tmp_path) == {}


def test_ended_while_it_takes_the_place_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"old")
    monkeypatch.setattr(os, "link", then_told(os.link))
    with pytest.raises(Told), new_file(tmp_path / "file", 0o644, replace=True) as target:
        os.write(target, b"new")
    assert content(tmp_path) == {"file": b"new"}
