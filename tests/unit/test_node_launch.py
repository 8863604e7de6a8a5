"""What a hypervisor must not inherit."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmgr.node import launch


@pytest.mark.parametrize(("inherited", "left"), [("-1000\n", "0"), ("-17\n", "0"), ("0\n", "0\n"), ("300\n", "300\n")])
def test_a_hypervisor_is_not_immune_to_the_oom_killer(
    inherited: str, left: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a real score cannot be lowered in a container without CAP_SYS_RESOURCE
    (tmp_path / "proc" / "7").mkdir(parents=True)
    score = tmp_path / "proc" / "7" / "oom_score_adj"
    score.write_text(inherited)
    monkeypatch.setattr(launch, "Path", lambda path: tmp_path / path.lstrip("/"))
    launch._expose_to_oom_killer(7)
    assert score.read_text() == left
