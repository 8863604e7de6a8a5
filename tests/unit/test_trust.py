"""What anybody may ask; what root sees is in tests/node."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vmgr.errors import VTorqueError
from vmgr.trust import check_trusted


def test_a_users_own_run_harms_only_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmgr.trust.os.geteuid", lambda: 4711)
    tmp_path.chmod(0o777)
    check_trusted(tmp_path / "absent")


def test_what_the_system_ships_is_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmgr.trust.os.geteuid", lambda: 0)
    check_trusted(Path("/bin/sh"))
    check_trusted(Path("/usr/../bin/sh"))


def test_the_users_own_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() == 0:
        pytest.skip("everything here is root's")
    monkeypatch.setattr("vmgr.trust.os.geteuid", lambda: 0)
    with pytest.raises(VTorqueError, match=r"^VT-TRUST: .*belongs to uid"):
        check_trusted(tmp_path)
