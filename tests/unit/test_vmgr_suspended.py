"""`vmgr show suspended`, `vmgr delete suspended` and the rows of `vmgr ps`, of a user who is not root."""

from __future__ import annotations

import json
import os
import pwd
import time
from pathlib import Path
from typing import Any, Optional

import pytest
import yaml
from test_suspended_entry import ENTRY
from test_vmgr_cli import Vmgr, vmgr_run

from vmgr.commands import guests
from vmgr.errors import Code, VTorqueError
from vmgr.reach import where
from vmgr.suspended import listing
from vmgr.suspended.entry import dump_entry
from vmgr.suspended.listing import Stored

pytestmark = pytest.mark.script_launch_mode("inprocess")
__all__ = ["vmgr_run"]
WHEN = 1_700_000_000
SHOWN = time.strftime("%Y-%m-%d %H:%M", time.localtime(WHEN))


@pytest.fixture
def site(vmgr_run: Vmgr, monkeypatch: pytest.MonkeyPatch) -> Vmgr:
    """An installation with a folder of suspended jobs, in which somebody who is not root looks: carol."""
    config = vmgr_run.node.install.config
    folder = vmgr_run.node.base / "suspended"
    folder.mkdir()
    folder.chmod(0o1777)
    config.write_text(yaml.safe_dump({**yaml.safe_load(config.read_text()), "suspended": {"folder": str(folder)}}))
    (folder / "carol").mkdir(mode=0o700)
    carol = pwd.struct_passwd(("carol", "x", os.geteuid(), 0, "", "/", "/bin/sh"))
    monkeypatch.setattr(listing.pwd, "getpwuid", lambda _uid: carol)
    monkeypatch.setattr(listing, "_is_root", lambda: False)
    return vmgr_run


def put(site: Vmgr, place: str, text: Optional[bytes] = None, **fields: Any) -> Path:
    made = site.node.base / "suspended" / "carol" / place
    made.mkdir()
    entry = ENTRY._replace(**{"job_id": place, "when": WHEN, "walltime_s": 3700, "nodes": 2, "per_node": 2, **fields})
    (made / "job.json").write_bytes(dump_entry(entry) if text is None else text)
    return made


def test_nothing_is_stored(site: Vmgr) -> None:
    assert site("show", "suspended") == (
        0, "JOB  USER  STATE  IMAGE  NODES  GUESTS  WALLTIME  SIZE  SUSPENDED  REASON\n", "",
    )  # fmt: skip
    assert site("show", "suspended", "--json").stdout == "[]\n"


def test_what_is_stored_is_listed(site: Vmgr) -> None:
    put(site, "9.server", when=WHEN - 5)
    put(site, "12.server")
    put(site, ".13.server.new").joinpath("job.json").unlink()
    put(site, "14.server", b"{}")
    put(site, "15.server", user="dave")
    status, out, err = site("show", "suspended")
    assert (status, err) == (0, "")
    rows = {line.split()[0]: line.split(maxsplit=3) for line in out.splitlines()[1:]}
    assert rows["12.server"][1:] == ["carol", "suspended", f"micro@3  2      4       1:01:40   0M    {SHOWN}"]
    assert rows["13.server"][2] == "incomplete" and "its writer died" in rows["13.server"][3]
    assert rows["14.server"][2] == "damaged" and "job.json: version: 1 is needed" in rows["14.server"][3]
    assert rows["15.server"][2] == "damaged" and "it says that it is job 15.server of dave" in rows["15.server"][3]
    assert list(rows)[-2:] == ["9.server", "12.server"]
    for words in (["--job", "12"], ["--job", "12.server"], ["--job", "12", "--user", "carol"]):
        (one,) = json.loads(site("show", "suspended", "--json", *words).stdout)
        assert (one["job_id"], one["entry"]["image"], one["state"]) == ("12.server", "micro@3", "suspended")


def test_what_is_refused(site: Vmgr) -> None:
    put(site, "12.server")
    assert "VT-ACCESS" in site.refuses("show", "suspended", "--user", "dave")
    assert "VT-ACCESS" in site.refuses("delete", "suspended", "--user", "dave", "--yes")
    assert "VT-VALUE: '12:1' names a guest" in site.refuses("show", "suspended", "--job", "12:1")
    assert "VT-VALUE" in site.refuses("show", "suspended", "--job", "../12")
    assert "VT-SUSPEND: nothing is stored of job 13; " in site.refuses("delete", "suspended", "--job", "13", "--yes")
    assert "starts from its beginning; say --yes" in site.refuses("delete", "suspended", "--job", "12")
    status, _, err = site("delete", "suspended")
    assert status == 2 and "--job, --user or --gone is needed" in err
    (site.node.base / "suspended" / "carol").chmod(0o755)
    assert "is open to others; chmod 700 closes it" in site.refuses("show", "suspended")
    (site.node.base / "suspended" / "carol").chmod(0o700)
    assert len(json.loads(site("show", "suspended", "--json").stdout)) == 1


def test_a_site_without_suspension(vmgr_run: Vmgr) -> None:
    for words in (["show", "suspended"], ["delete", "suspended", "--job", "12", "--yes"]):
        assert "VT-SUSPEND: no job can be suspended on this site; suspended.folder is not set" in vmgr_run.refuses(
            *words
        )


def test_one_job_is_deleted_or_all_of_them(site: Vmgr) -> None:
    places = [put(site, name) for name in ("9.server", "12.server", "14.server", ".12.server.new")]
    status, out, _ = site("delete", "suspended", "--job", "12", "--yes")
    assert status == 0 and out.count("deleted what was stored of job 12.server of carol\n") == 2
    assert [path.exists() for path in places] == [True, False, True, False]
    status, out, _ = site("delete", "suspended", "--user", "carol", "--yes", "--json")
    assert status == 0 and {each["job_id"] for each in json.loads(out)} == {"9.server", "14.server"}
    assert list((site.node.base / "suspended" / "carol").iterdir()) == []


# --- vmgr ps


@pytest.fixture
def no_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch system that has no nodes for any job."""

    def none(*_: object) -> Any:
        raise VTorqueError("job 12 has no nodes", code=Code.AGENT)

    monkeypatch.setattr(where, "nodes_of_job", none)
    monkeypatch.setattr(where, "all_nodes", lambda _config: [])
    monkeypatch.setattr(where, "running_jobs", lambda _config: [])
    monkeypatch.setattr(guests, "is_root", lambda: False)


def test_why_a_job_did_not_go_on_is_shown(site: Vmgr, no_nodes: None) -> None:
    put(site, "12.server").joinpath("reason").write_text("VT-LAUNCH: another QEMU \x1b[2J\nmore")
    for words in (["show", "suspended"], ["ps"]):
        assert "VT-LAUNCH: another QEMU \\x1b[2J" in site(*words).stdout.splitlines()[1]
    (found,) = json.loads(site("show", "suspended", "--json").stdout)
    assert (found["state"], found["reason"]) == ("suspended", "VT-LAUNCH: another QEMU \x1b[2J")


def test_suspended_jobs_are_among_the_guests(site: Vmgr, no_nodes: None) -> None:
    put(site, "12.server")
    put(site, "14.server", b"{}")
    status, out, err = site("ps")
    assert (status, err) == (0, "")
    assert [line.split() for line in out.splitlines()[1:]] == [
        ["12.server", "-", "-", "micro@3", "-", "-", "suspended", "-", "-", "-"],
    ]
    (row,) = json.loads(site("ps", "--json", "--job", "12").stdout)
    assert (row["job"], row["node"], row["state"], row["user"]) == ("12.server", "-", "suspended", "carol")
    status, out, err = site("ps", "--job", "13")
    assert (status, out, err) == (Code.AGENT.status, "", "VT-AGENT: job 12 has no nodes\n")


def test_where_the_folder_cannot_be_read_guests_are_listed_all_the_same(site: Vmgr, no_nodes: None) -> None:
    (site.node.base / "suspended").chmod(0o777)
    assert site("ps") == (0, "JOB  RANK  NODE  IMAGE  VCPUS  RAM_MIB  STATE  AGE  CPU  ADDRESS  REASON\n", "")


def test_a_job_that_is_resumed_is_shown_once() -> None:
    from test_guest_rows import SNAPSHOT

    from vmgr.reach.rows import guest_rows, with_suspended

    stored = [
        Stored("carol", job, job, 1, "suspended", ENTRY._replace(job_id=job), "") for job in ("12.host", "9.host")
    ]
    rows = with_suspended(guest_rows([SNAPSHOT]), stored)
    assert [(row.job, row.state) for row in rows] == [
        ("9.host", "suspended"),
        ("12.host", "running"),
        ("12.host", "off"),
    ]


def test_what_is_stored_of_jobs_that_are_gone_is_deleted(site: Vmgr) -> None:
    program = Path(site.node.install.program("vtorque-batch"))
    program.write_text(
        '#!/bin/sh\ncase "$*" in\nserver) echo \'"server"\' ;;\n"phase 12.server") echo \'"gone"\' ;;\n'
        '"phase 13.server") echo \'"held"\' ;;\n"phase 14.server") echo \'"unknown"\' ;;\n'
        '"phase 15.server") echo \'"completed"\' ;;\n*) exit 1 ;;\nesac\n'
    )
    program.chmod(0o755)
    for number in range(12, 16):
        put(site, f"{number}.server")
    put(site, "12.other")
    put(site, ".12.server.new")
    put(site, "16.server", b"{}")
    left = sorted(path.name for path in (site.node.base / "suspended" / "carol").iterdir())
    status, out, err = site("delete", "suspended", "--gone")
    assert (status, out, err) == (0, "deleted what was stored of job 12.server of carol\n", "")
    left.remove("12.server")
    left.remove(".12.server.new")  # what is left of the same job
    assert sorted(path.name for path in (site.node.base / "suspended" / "carol").iterdir()) == left
    assert site("delete", "suspended", "--gone", "--job", "13") == (0, "", "")
    program.write_text("#!/bin/sh\necho 'VT-ENGINE: away' >&2; exit 2\n")
    assert "VT-ENGINE: away" in site.refuses("delete", "suspended", "--gone")
