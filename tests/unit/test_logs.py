"""The node's log, the jobs' logs and the journal: real files, real processes, and a stand-in for /dev/log."""

from __future__ import annotations

import errno
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Optional

import pytest
from nodesite import REPOSITORY, short_folder

from vmgr import logs
from vmgr.config import Logging, Rotate
from vmgr.logs import LOGGER, drop_oldest, open_for, rotate, set_up


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    yield
    for handler in list(LOGGER.handlers):
        LOGGER.removeHandler(handler)
        handler.close()
    LOGGER.propagate = True
    LOGGER.setLevel(logging.NOTSET)


def config(file: Optional[Path], *, level: str = "info", journal: bool = False, jobs: int = 3) -> Logging:
    return Logging(level, None if file is None else str(file), Rotate(1, 2, jobs), journal)


@pytest.mark.parametrize(
    ("level", "kept"),
    [("debug", "DIWE"), ("info", "IWE"), ("warning", "WE"), ("error", "E")],
)
def test_levels(level: str, kept: str, tmp_path: Path) -> None:
    file = tmp_path / "made" / "node.log"
    job_log = set_up(config(file, level=level), job="12.host")
    for name in ("debug", "info", "warning", "error"):
        getattr(LOGGER, name)("said %s", name)
    assert job_log == tmp_path / "made" / "jobs" / "12.host.log"
    lines = file.read_text().splitlines()
    assert "".join(line.split()[2][0] for line in lines) == kept
    assert all("job 12.host: said" in line for line in lines)
    assert [line.split()[-1] for line in job_log.read_text().splitlines()] == [line.split()[-1] for line in lines]


def test_what_a_job_can_have_logged_is_bounded(tmp_path: Path) -> None:
    """A job's owner may give orders without end, and each is logged."""
    log = set_up(config(tmp_path / "node.log"), job="12.host")
    assert log is not None
    for number in range(2 * logs.MAX_MESSAGES):
        LOGGER.warning("order %d", number)
    LOGGER.error("broken %s", "x" * (1 << 20))
    LOGGER.error("100 %", *())
    LOGGER.error("broken")
    assert log.stat().st_size < 100 * logs.MAX_MESSAGES
    lines = log.read_text().splitlines()
    assert len(lines) == logs.MAX_MESSAGES + 3 and "only errors" in lines[-4]
    assert [line.rpartition(" ")[2][-6:] for line in lines[-3:]] == ["xxx...", "%", "broken"]
    set_up(config(tmp_path / "node.log"))
    LOGGER.info("another process")
    assert "another process" in (tmp_path / "node.log").read_text().splitlines()[-1]


def test_without_a_job_or_a_file(tmp_path: Path) -> None:
    assert set_up(config(tmp_path / "node.log")) is None and not (tmp_path / "jobs").exists()
    assert set_up(config(None), job="12.host") is None
    LOGGER.info("to nobody")


def test_setting_up_again_does_not_say_things_twice(tmp_path: Path) -> None:
    for _ in range(3):
        set_up(config(tmp_path / "node.log"))
    LOGGER.info("once")
    assert (tmp_path / "node.log").read_text().count("once") == 1


@pytest.mark.parametrize("kind", ["file in the way", "directory", "read-only"])
def test_a_log_that_cannot_be_written_stops_nothing(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "log" / "node.log"
    if kind == "file in the way":
        (tmp_path / "log").write_text("")
    elif kind == "directory":
        file.mkdir(parents=True)
    else:
        if os.geteuid() == 0:
            pytest.skip("root writes everywhere")
        file.parent.mkdir(mode=0o500)
    assert set_up(config(file), job="12.host") is None, "a job's log that is not there is not given out"
    LOGGER.info("said")
    err = capsys.readouterr().err
    assert err.startswith("vtorque: cannot log: ") and err.count("\n") == 1


def test_a_jobs_log_that_cannot_be_written_leaves_the_nodes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "jobs").write_text("in the way")
    assert set_up(config(tmp_path / "node.log"), job="12.host") is None
    LOGGER.info("said")
    assert "said" in (tmp_path / "node.log").read_text() and "cannot log" in capsys.readouterr().err


def test_a_folder_that_is_taken_away_stops_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "log" / "node.log"
    set_up(config(file))
    LOGGER.info("first")
    file.parent.rename(tmp_path / "away")
    LOGGER.info("second")
    LOGGER.info("third")
    (tmp_path / "log").mkdir()
    LOGGER.info("fourth")
    assert "fourth" in file.read_text()


def test_the_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    monkeypatch.chdir(tmp_path)
    path = Path("log")  # a socket's path is short
    stand_in.bind(str(path))
    stand_in.settimeout(5)
    monkeypatch.setattr(logs, "_JOURNAL", path)
    set_up(config(tmp_path / "node.log", journal=True), job="12.host")
    LOGGER.warning("a %s", "word")
    assert stand_in.recv(1000).rstrip(b"\0") == b"<12>vtorque[%d]: job 12.host: a word" % os.getpid()
    assert "a word" in (tmp_path / "node.log").read_text()
    stand_in.close()
    LOGGER.warning("to nobody")


def test_without_a_journal_the_file_is_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logs, "_JOURNAL", tmp_path / "absent")
    assert set_up(config(tmp_path / "node.log", journal=True), job="12.host") is not None
    LOGGER.info("said")
    assert "said" in (tmp_path / "node.log").read_text()
    assert f"cannot log to {tmp_path / 'absent'}" in capsys.readouterr().err


# rotation


def test_rotation_keeps_so_many(tmp_path: Path) -> None:
    log = tmp_path / "node.log"
    for n in range(5):
        log.write_text(f"{n}" * 11)
        rotate(log, size=10, keep=2)
        assert not log.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == [".node.log.lock", "node.log.1", "node.log.2"]
    assert ((tmp_path / "node.log.1").read_text()[0], (tmp_path / "node.log.2").read_text()[0]) == ("4", "3")


def test_rotation_of_what_is_small_or_not_there(tmp_path: Path) -> None:
    log = tmp_path / "node.log"
    rotate(log, size=10, keep=2)
    log.write_text("x" * 10)
    rotate(log, size=10, keep=2)
    assert [p.name for p in tmp_path.iterdir()] == ["node.log"]


def test_rotation_that_keeps_nothing(tmp_path: Path) -> None:
    log = tmp_path / "node.log"
    log.write_text("x" * 11)
    rotate(log, size=10, keep=0)
    assert [p.name for p in tmp_path.iterdir()] == [".node.log.lock"]


def test_a_writer_follows_the_rotation(tmp_path: Path) -> None:
    log = tmp_path / "node.log"
    set_up(config(log))
    LOGGER.info("old")
    rotate(log, size=1, keep=1)
    LOGGER.info("new")
    assert "old" in (tmp_path / "node.log.1").read_text() and "new" in log.read_text()


def test_several_processes_rotate_at_once_and_lose_nothing(tmp_path: Path) -> None:
    code = f"""\
import sys; sys.path.insert(0, {str(REPOSITORY)!r})
from pathlib import Path
from vmgr.config import Logging, Rotate
from vmgr.logs import LOGGER, rotate, set_up
log = Path(sys.argv[1])
set_up(Logging("info", str(log), Rotate(1, 1000, 3), False))
for n in range(60):
    LOGGER.info("line %s %d", sys.argv[2], n)
    rotate(log, size=500, keep=1000)
"""
    log = tmp_path / "node.log"
    writers = [
        subprocess.Popen([sys.executable, "-I", "-c", code, str(log), str(n)], stderr=subprocess.PIPE) for n in range(4)
    ]
    errors = [writer.communicate()[1] for writer in writers]
    assert errors == [b""] * 4
    lines = [line.split("line ")[1] for file in tmp_path.glob("node.log*") for line in file.read_text().splitlines()]
    assert sorted(lines) == sorted(f"{w} {n}" for w in range(4) for n in range(60))


# the jobs' logs


def test_so_many_jobs_logs_stay_each_with_its_console(tmp_path: Path) -> None:
    jobs = tmp_path / "jobs"
    for n in range(6):
        log = set_up(config(tmp_path / "node.log", jobs=3), job=f"{n}.host.example")
        assert log is not None
        LOGGER.info("x")
        log.with_suffix(".console").write_text("boot")
        for path in (log, log.with_suffix(".console")):
            os.utime(path, (n, n))
    assert sorted(p.name for p in jobs.iterdir()) == sorted(
        f"{n}.host.example.{kind}" for n in (3, 4, 5) for kind in ("log", "console")
    )


@pytest.mark.parametrize(("keep", "left"), [(0, 0), (1, 0), (2, 1), (9, 4)])
def test_room_for_one_more(keep: int, left: int, tmp_path: Path) -> None:
    for n in range(4):
        (tmp_path / f"{n}.log").touch()
        os.utime(tmp_path / f"{n}.log", (n, n))
    (tmp_path / "other").touch()
    drop_oldest(tmp_path, keep=keep)
    assert sorted(p.name for p in tmp_path.iterdir()) == [*(f"{n}.log" for n in range(4 - left, 4)), "other"]


def test_the_log_of_a_job_that_lives_stays(tmp_path: Path) -> None:
    """Of a job that has long been quiet: its agent would make its report and its console's log anew, for ever."""
    for n in range(4):
        (tmp_path / f"{n}.host.log").touch()
        (tmp_path / f"{n}.host.report.json").touch()
        os.utime(tmp_path / f"{n}.host.log", (n, n))
    drop_oldest(tmp_path, keep=2, lives=lambda job: job == "1.host")
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "1.host.log", "1.host.report.json", "3.host.log", "3.host.report.json",
    ]  # fmt: skip


def test_a_log_that_goes_meanwhile(tmp_path: Path) -> None:
    (tmp_path / "1.log").symlink_to("absent")  # as if it had gone between the listing and the look
    (tmp_path / "2.log").touch()
    drop_oldest(tmp_path, keep=2)
    assert (tmp_path / "2.log").exists()


# who may read what is kept of a job


def readers(path: Path) -> set[Optional[int]]:
    fd = os.open(path, os.O_RDONLY)
    try:
        return logs._readers(fd)
    finally:
        os.close(fd)


def needs_lists(folder: Path) -> None:
    probe = folder / "probe"
    os.close(open_for(probe, 4711))
    listed = readers(probe)
    probe.unlink()
    if not listed:
        pytest.skip("the file system has no access control lists")


def test_a_jobs_log_is_its_owners_to_read_and_nobody_elses(tmp_path: Path) -> None:
    needs_lists(tmp_path)
    before = os.umask(0o077)
    try:
        log = set_up(config(tmp_path / "made" / "deep" / "node.log"), job="12.host", reader=4711)
    finally:
        os.umask(before)
    assert log is not None and readers(log) == {4711}
    info = log.stat()
    assert (info.st_uid, info.st_mode & 0o777) == (os.geteuid(), 0o640), "the group's bits are the list's mask"
    modes = [folder.stat().st_mode & 0o777 for folder in (log.parent, log.parents[1], log.parents[2])]
    assert modes == [0o711, 0o755, 0o755] and (tmp_path / "made" / "deep" / "node.log").stat().st_mode & 0o077 == 0


def test_who_reads_as_whom(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to be other users")
    needs_lists(tmp_path)
    with short_folder() as base:
        base.chmod(0o755)
        log = set_up(config(base / "node.log"), job="12.host", reader=48211)
        assert log is not None
        LOGGER.info("said")
        for uid, may in ((48211, True), (48212, False)):
            for words in (["cat"], ["sh", "-c", 'echo x >>"$0" || rm "$0"']):
                done = subprocess.run(
                    [*words, str(log)], user=uid, group=4711, extra_groups=[], cwd="/", capture_output=True
                )
                assert (done.returncode == 0) is (may and words == ["cat"])
        assert log.read_text().endswith("said\n")


def test_a_file_of_another_users_job_of_the_same_id_is_not_gone_on_with(tmp_path: Path) -> None:
    needs_lists(tmp_path)
    path = tmp_path / "12.host.log"
    for reader, text, left in (
        (4711, b"one\n", b"one\n"),
        (4711, b"two\n", b"one\ntwo\n"),
        (4712, b"three\n", b"three\n"),
    ):
        held = os.open(path, os.O_RDONLY) if path.exists() else -1
        fd = open_for(path, reader)
        os.write(fd, text)
        os.close(fd)
        assert path.read_bytes() == left and readers(path) == {reader}
        if reader == 4712:
            assert os.pread(held, 100, 0) == b"one\ntwo\n", "who had it open sees nothing of what is new"
        if held >= 0:
            os.close(held)
    os.close(open_for(path, None, truncate=True))
    assert path.read_bytes() == b"" and readers(path) == set()


def test_no_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("kept")
    (tmp_path / "12.host.log").symlink_to("elsewhere")
    with pytest.raises(OSError):
        open_for(tmp_path / "12.host.log", 4711, truncate=True)
    assert (tmp_path / "elsewhere").read_text() == "kept"


def test_without_access_control_lists_it_stays_roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "no")

    monkeypatch.setattr(os, "setxattr", refuse)
    os.close(open_for(tmp_path / "x", 4711))
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o600


def test_what_lies_beside_a_log_goes_with_it(tmp_path: Path) -> None:
    for name in ("1.log", "1.console", "1.2.console", "1.report.json", ".1.report.json", "11.log", "11.report.json"):
        (tmp_path / name).touch()
    os.utime(tmp_path / "1.log", (1, 1))
    drop_oldest(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["11.log", "11.report.json"]
