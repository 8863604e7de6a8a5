"""What is kept of a job: its report, its log, its guests' consoles, from a real guest, for its owner alone."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from nodejob import Jobs

from vmgr.report.parts import Part, read_parts
from vmgr.report.timeline import Phase, plan

pytestmark = [pytest.mark.guest, pytest.mark.root]
SCRIPT = "#!/bin/sh\necho hello\nsleep 1\nexit 4\n"


def kept_of(jobs: Jobs, job_id: str) -> dict[str, Path]:
    folder = jobs.node.base / "log" / "jobs"
    return {path.name[len(job_id) :]: path for path in folder.iterdir() if path.name.startswith(job_id)}


@pytest.fixture(scope="module")
def part(jobs: Jobs) -> Part:
    """The report of a job that has ended with 4."""
    with jobs.job(jobs.submit(SCRIPT), "77.host") as job:
        job.start(interactive=False)
        assert job.ended() == (4, "hello\n")
    (part,) = read_parts(kept_of(jobs, "77.host")[".report.json"].read_bytes())
    return part


def test_a_report_tells_the_whole_life(part: Part, jobs: Jobs) -> None:
    assert (part.job_id, part.user, part.image.split("@")[0], part.job_status) == (
        "77.host", jobs.owner.pw_name, "micro", 4,
    )  # fmt: skip
    assert (part.state, part.code, part.is_over) == ("ended", None, True)
    (guest,) = part.guests
    reached = [moment.name for moment in guest.moments if moment.start is None]
    assert reached == ["launched", "started", "booted", "prologue", "ready", "epilogue"]
    row = plan([part], part.began).rows[1]
    assert [bar.phase for bar in row.bars] == [
        Phase.FIRMWARE, Phase.KERNEL, Phase.SYSTEM, Phase.SETUP, Phase.WAIT, Phase.JOB, Phase.END,
    ]  # fmt: skip
    took = row.took
    assert 0.5 < took[Phase.JOB] < 30 and took[Phase.KERNEL] > 0.1
    assert all(before.end == after.start for before, after in zip(row.bars, row.bars[1:]))


def test_what_is_kept_is_for_the_owner_alone(part: Part, jobs: Jobs) -> None:
    kept = kept_of(jobs, "77.host")
    assert set(kept) == {".log", ".console", ".report.json"}
    for path in kept.values():
        for uid, may in ((jobs.owner.pw_uid, True), (65534, False)):
            read = subprocess.run(
                ["cat", path], user=uid, group=jobs.owner.pw_gid, extra_groups=[], capture_output=True
            )
            assert (read.returncode == 0) is may and bool(read.stdout) is may
        write = subprocess.run(
            ["sh", "-c", 'echo >>"$0"; chmod u+w "$0"; rm -f "$0"', path],
            user=jobs.owner.pw_uid, group=jobs.owner.pw_gid, extra_groups=[], capture_output=True,
        )  # fmt: skip
        assert write.returncode != 0 and path.exists()
        assert path.stat().st_uid == 0
    assert "epilogue after" in kept[".log"].read_text() and b"sysrq" in kept[".console"].read_bytes()
