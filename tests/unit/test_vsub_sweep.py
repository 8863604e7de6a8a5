"""Job directories that nobody took away: later submissions do, a few at a time, and only what is surely over."""

from __future__ import annotations

import json
import os
import pwd
import stat
import time
from pathlib import Path
from typing import Optional

import pytest
from vsubsite import Runner, Site

import vsub.sweep
from vmgr.suspended.entry import Entry, dump_entry

DAY = 24 * 3600

QSTAT = """\
#!/bin/sh
echo "$2" >>{record}/asked
test ! -e {record}/slow || exec sleep 60
test ! -e {record}/broken || exit 1
test -e {record}/jobs/"$2" || {{ echo "qstat: Unknown Job Id Error $2" >&2; exit 153; }}
echo "    job_state = $(cat {record}/jobs/"$2")"
"""


class Yard:
    """Old job directories, and a batch system that knows some of their jobs."""

    def __init__(self, site: Site, run: Runner) -> None:
        self.site = site
        self.run = run
        self.base = site.home / ".vtorque"
        self.base.mkdir(mode=0o700)
        site.script()
        site.qstat.write_text(QSTAT.format(record=site.record))
        site.qstat.chmod(0o755)
        (site.record / "jobs").mkdir()
        self.knows("12.host")

    def knows(self, job_id: str, letter: str = "Q") -> None:
        (self.site.record / "jobs" / job_id).write_text(letter)

    def directory(self, name: str, job_id: Optional[str], days: float = 2) -> Path:
        """What a submission left `days` ago."""
        folder = self.base / name.ljust(16, "x")
        inner = folder / ("a" * 64)
        inner.mkdir(parents=True)
        (inner / "key").write_text("private")
        if job_id is not None:
            (folder / "job_id").write_text(job_id + "\n")
        self.age(folder, days)
        return folder

    def age(self, folder: Path, days: float) -> None:
        then = time.time() - days * DAY
        os.utime(folder, (then, then), follow_symlinks=False)

    def submit(self, *words: str) -> str:
        """Submit a job, which takes its own directory away at once; gives standard error."""
        before = set(self.base.iterdir())
        outcome = self.run(*words, "job.sh")
        assert (outcome.status, outcome.stdout) == (0, "12.host\n")
        (new,) = set(self.base.iterdir()) - before
        vsub.sweep.remove_tree(str(new))
        return outcome.stderr

    @property
    def asked(self) -> list[str]:
        """What qstat was asked about since the last time."""
        path = self.site.record / "asked"
        words = path.read_text().split() if path.exists() else []
        path.unlink(missing_ok=True)
        return words


@pytest.fixture
def yard(site: Site, vsub_run: Runner) -> Yard:
    return Yard(site, vsub_run)


def test_the_id_is_noted_beside_the_job_directory(site: Site, vsub_run: Runner) -> None:
    site.script()
    assert vsub_run("job.sh").status == 0
    note = site.directory.parent / "job_id"
    assert note.read_text() == "12.host\n" and stat.S_IMODE(note.stat().st_mode) == 0o600


def test_a_hidden_id_is_noted_too(site: Site, vsub_run: Runner) -> None:
    site.script()
    assert vsub_run("-z", "job.sh") == (0, "", "")
    assert "-z" not in site.argv
    assert (site.directory.parent / "job_id").read_text() == "12.host\n"


def test_nothing_is_asked_when_nothing_is_old(yard: Yard) -> None:
    young = [yard.directory("a", "1.host", days=0.9), yard.directory("b", None, days=0), yard.directory("c", None)]
    assert yard.submit() == "" and yard.asked == []
    assert all(folder.exists() for folder in young)


@pytest.mark.parametrize(
    ("letter", "stays"), [(None, False), ("C", False), ("Q", True), ("H", True), ("R", True), ("E", True), ("?", True)]
)
def test_by_the_state_of_the_job(yard: Yard, letter: Optional[str], stays: bool) -> None:
    folder = yard.directory("a", "1.host")
    if letter is not None:
        yard.knows("1.host", letter)
    assert yard.submit() == ""
    assert folder.exists() == stays
    assert yard.asked[0] == "1.host"
    yard.submit()
    assert yard.asked == [], "a job that lives is asked about once a day"


class Stored:
    """What is stored of suspended jobs of the one who submits."""

    def __init__(self, yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
        self.yard = yard
        base = yard.site.base
        top, self.scratch = base / "suspended", base / "scratch"
        for folder in (top, self.scratch):
            folder.mkdir()
            folder.chmod(0o1777)
        me = pwd.getpwuid(os.geteuid()).pw_name
        self.folder = top / me
        self.folder.mkdir(mode=0o700)
        settings = {"suspended": {"folder": str(top)}, "workspace": {"folder": f"{self.scratch}/{{job}}", "wipe": True}}
        yard.site.configure(json.dumps(settings)[1:-1].replace("}, ", "}\n") + "\npolicy: {img: {default: micro}}\n")
        monkeypatch.setattr("vmgr.suspended.listing._is_root", lambda: False)
        self.user = me

    def put(self, job_id: str, days: float = 2) -> Path:
        entry = Entry(job_id, self.user, "0" * 64, "micro@1", "k", 1, 1, 1_000_000, 5)
        folder = self.folder / job_id
        folder.mkdir()
        (folder / "job.json").write_bytes(dump_entry(entry))
        (folder / "0.state").write_bytes(b"x")
        (self.scratch / f"{job_id}.k").mkdir()
        self.yard.age(folder, days)
        return folder


@pytest.fixture
def stored(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> Stored:
    return Stored(yard, monkeypatch)


@pytest.mark.parametrize(("letter", "stays"), [(None, False), *((letter, True) for letter in "CQHRE?")])
def test_what_is_stored_of_a_job_that_is_gone(stored: Stored, letter: Optional[str], stays: bool) -> None:
    """Also one that has ended may start again, as long as the batch system knows it."""
    yard, folder = stored.yard, stored.put("1.host")
    if letter is not None:
        yard.knows("1.host", letter)
    assert yard.submit() == ""
    assert folder.exists() is stays and (stored.scratch / "1.host.k").exists() is stays
    assert yard.asked == (["1.host"] if stays else ["1.host", "12.host"])
    yard.submit()
    assert yard.asked == [], "a job that lives is asked about once a day"


def test_what_is_stored_and_stays(stored: Stored) -> None:
    yard = stored.yard
    young, other = stored.put("1.host", days=0.9), stored.put("2.other")
    damaged = stored.put("3.host")
    (damaged / "job.json").write_text("{}")
    (stored.folder / ".4.host.new").mkdir()
    for folder in (damaged, stored.folder / ".4.host.new"):
        yard.age(folder, 2)
    assert yard.submit() == "" and yard.asked == []
    assert young.exists() and other.exists() and damaged.exists() and (stored.folder / ".4.host.new").exists()


@pytest.mark.parametrize("trouble", ["broken", "slow", "new"])
def test_what_is_stored_when_the_batch_system_does_not_tell(
    stored: Stored, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    monkeypatch.setattr(vsub.sweep, "AT_MOST_S", 0.5)
    folder = stored.put("1.host")
    if trouble == "new":  # it does not know what has just been submitted either
        (stored.yard.site.record / "jobs" / "12.host").unlink()
    else:
        (stored.yard.site.record / trouble).touch()
    assert stored.yard.submit() == "" and folder.exists()


@pytest.mark.parametrize("trouble", ["broken", "slow"])
def test_no_answer_of_the_batch_system(yard: Yard, monkeypatch: pytest.MonkeyPatch, trouble: str) -> None:
    monkeypatch.setattr(vsub.sweep, "AT_MOST_S", 0.3)
    folders = [yard.directory(name, "1.host") for name in "abc"]
    (yard.site.record / trouble).touch()
    started = time.monotonic()
    assert yard.submit() == ""
    assert time.monotonic() - started < 10
    assert all((folder / ("a" * 64) / "key").exists() for folder in folders)


def test_a_batch_system_that_does_not_know_the_new_job_is_not_believed(yard: Yard) -> None:
    folder, done = yard.directory("a", "1.host", days=3), yard.directory("b", "2.host")
    (yard.site.record / "jobs" / "12.host").unlink()
    yard.knows("2.host", "C")
    yard.submit()
    assert folder.exists() and not done.exists()


def test_jobs_of_another_server_are_left_to_it(yard: Yard) -> None:
    folder = yard.directory("a", "1.elsewhere", days=300)
    yard.submit()
    assert folder.exists() and yard.asked == []


@pytest.mark.parametrize("job_id", [None, "", "-x", "1.host; rm -rf /", "x" * 300])
def test_without_an_id(yard: Yard, job_id: Optional[str]) -> None:
    folder, older = yard.directory("a", job_id, days=6.9), yard.directory("b", job_id, days=7.1)
    yard.submit()
    assert (folder.exists(), older.exists()) == (True, False)
    assert yard.asked == []


def test_a_few_at_a_time_the_oldest_first(yard: Yard) -> None:
    folders = [yard.directory(f"a{number}", f"{number}.host", days=20 - number) for number in range(8)]
    yard.submit()
    assert [folder.exists() for folder in folders] == [False] * 3 + [True] * 5
    yard.submit()
    yard.submit()
    assert list(yard.base.iterdir()) == []


def test_a_large_folder_is_looked_at_in_parts(yard: Yard) -> None:
    folders = [yard.directory(f"a{number}", None, days=8) for number in range(vsub.sweep.LOOK_AT * 2)]
    assert len(vsub.sweep.old_directories(str(yard.base))) == vsub.sweep.LOOK_AT
    yard.submit()
    assert sum(folder.exists() for folder in folders) == len(folders) - vsub.sweep.A_FEW


def test_links_are_not_followed(yard: Yard) -> None:
    outside = yard.site.base / "outside"
    (outside / "sub").mkdir(parents=True)
    (outside / "job_id").write_text("1.host\n")
    yard.age(outside, 30)
    link = yard.base / ("b" * 16)
    link.symlink_to(outside)
    yard.age(link, 30)
    named_by_link = yard.directory("c", None)
    (named_by_link / "job_id").symlink_to(outside / "job_id")
    yard.age(named_by_link, 2)
    holds_links = yard.directory("d", "4.host")
    (holds_links / "away").symlink_to(outside)
    (holds_links / ("a" * 64) / "away").symlink_to(outside / "job_id")
    yard.age(holds_links, 2)
    fifo = yard.directory("e", None)
    os.mkfifo(fifo / "job_id")
    yard.age(fifo, 2)
    yard.submit()
    assert (outside / "sub").is_dir() and (outside / "job_id").exists() and link.is_symlink()
    assert named_by_link.exists() and fifo.exists() and not holds_links.exists()
    assert "1.host" not in yard.asked


def test_what_is_not_a_job_directory_stays(yard: Yard) -> None:
    note = yard.base / "0123456789abcdef"
    note.write_text("a file")
    mine = yard.base / "My Folder"
    mine.mkdir()
    for path in (note, mine):
        yard.age(path, 300)
    yard.submit()
    assert note.exists() and mine.exists()


def test_debug_tells(yard: Yard) -> None:
    folder = yard.directory("a", "1.host")
    assert f"sweep: {folder} of 1.host goes" in yard.submit("--debug")


def test_a_fault_does_not_spoil_the_submission(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr(vsub.sweep, "old_directories", broken)
    assert yard.submit() == ""
    assert "sweep: RuntimeError: boom" in yard.submit("--debug")


def test_a_refused_submission_sweeps_nothing(yard: Yard) -> None:
    folder = yard.directory("a", "1.host")
    yard.site.answer(stderr="qsub: no\n", status=188)
    assert yard.run("job.sh") == (188, "", "qsub: no\n")
    assert folder.exists() and yard.asked == []
