"""What an installation does on a node, cut off by SIGKILL before every single step of it, and then done again."""

from __future__ import annotations

import base64
import io
import os
import platform
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple, Optional

import pytest
from deploysteps import every_step
from installsite import MOM_CONFIG, SITE_HOOKS, FakeSystemd, make_home, picture, timeless

from vmgr.deploy import moms, nodeside, slurmfiles, timer, tree
from vmgr.deploy.build import Source
from vmgr.deploy.hookfiles import JOB_TYPE, WRAP, hook_files, is_open_to_users, is_ours
from vmgr.deploy.nodeside import NeedsTree, Order, Refused, perform
from vmgr.errors import VTorqueError

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCES = Source(str(REPOSITORY), "1", "1-one").hooks
UNITS = {"vtorque-reap.service": "[Service]\nType=oneshot\n", "vtorque-reap.timer": "[Timer]\nOnBootSec=1min\n"}


class Place(NamedTuple):
    """A node: TORQUE's home on it, its units of systemd, and the prefix."""

    base: Path
    home: Path
    units: Path
    prefix: Path

    def order(self, action: str = "install", **changes: Any) -> Order:
        order = Order(
            action=action, dry=False, prefix=str(self.prefix), home=str(self.home), tree="1-one", toolkit="1",
            front="the-front", mode=WRAP, job_type="vtorque", spool=str(self.base / "spool"), needed_s=311,
            raise_alarm=True, python=[*sys.version_info[:2]], machine=platform.machine(), hooks=SOURCES, units=UNITS,
            config={"vtorque.yaml": (base64.b64encode(b"engine: torque\n").decode(), 0o644)},
        )  # fmt: skip
        return replace(order, **changes)

    @property
    def mom_priv(self) -> Path:
        return self.home / "mom_priv"

    def before(self) -> dict[str, Any]:
        """What must be the same again when all is taken away."""
        return {str(folder): picture(folder) for folder in (self.home, self.units, self.prefix.parent)}

    def share(self) -> None:
        """Let the node see the front end's own prefix."""
        (self.prefix / ".install").mkdir(parents=True)
        (self.prefix / ".install" / "id").write_text("the-front\n")
        make_tree(self.prefix / "current")
        (self.prefix / "bin").symlink_to("current/bin")


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    with tempfile.TemporaryDirectory(prefix="vt-", dir="/dev/shm") as folder:  # in memory: all is flushed, often
        Path(folder).chmod(0o755)
        yield make_place(Path(folder), monkeypatch)


def make_place(base: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    found = Place(base, base / "torque", base / "units", base / "opt" / "vtorque")
    make_home(found.home)
    (found.units / "timers.target.wants").mkdir(parents=True)
    found.prefix.parent.mkdir()
    monkeypatch.setattr(timer, "UNITS", str(found.units))
    return found


def make_tree(folder: Path, version: str = "1") -> None:
    """Programs of an installation; `vmgr` is one that is content with every configuration."""
    for name in ("venv", "share", "libexec", "bin"):
        (folder / name).mkdir(parents=True)
    (folder / "bin" / "vmgr").write_text(f"#!/bin/sh\n# {version}\nexit 0\n")
    (folder / "bin" / "vmgr").chmod(0o755)
    (folder / "libexec" / "vtorque-hook").write_text(f"#!/bin/sh\n# {version}\n")
    tree.seal(str(folder))


def packed(base: Path, version: str = "1") -> bytes:
    folder = base / f"tree-{version}"
    if not folder.exists():
        make_tree(folder, version)
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w|gz") as tar:
        tar.add(folder, arcname=".")
    return data.getvalue()


def mom_sees_whole_hooks(mom_priv: Path) -> None:
    """Each hook is the site's own or one of ours, whole, and there is none that a user could choose beside them."""
    texts = {
        moms.Hooks(WRAP, "vtorque", prefix, spool, SOURCES).text(source)
        for prefix, spool in PLACES
        for source in SOURCES
    }
    allowed = {hook.target for mode in (WRAP, JOB_TYPE) for hook in hook_files(mode)}
    for name in SITE_HOOKS:
        assert (mom_priv / name).exists(), f"the mom has no {name}"
    for path in mom_priv.iterdir():
        if not is_open_to_users(path.name) and path.name not in ("prologue", "epilogue"):
            continue
        assert path.name in allowed, path
        text = path.read_bytes()
        theirs = f'#!/bin/sh\necho "the site\'s {path.name} $*"\nexit 3\n'.encode()
        assert text in (theirs, b"#!/bin/sh\nexit 0\n") or text in texts, f"{path} is half a hook"


PLACES: set[tuple[str, str]] = set()


def but_the_time_of(pictures: dict[str, Any], folders: set[Path]) -> dict[str, Any]:
    """Pictures without the times of folders in which the manifest's own folder lies."""
    return {
        top: {
            path: seen._replace(mtime_ns=0) if (Path(top) / path) in folders else seen for path, seen in found.items()
        }
        for top, found in pictures.items()
    }


# --- cut off at every step


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
def test_killed_while_it_installs(place: Place, shared: bool) -> None:
    if shared:
        place.share()
    data = packed(place.base)
    PLACES.add((str(place.prefix), str(place.base / "spool")))
    before = place.before()
    order = place.order()
    free = {place.home} if shared else {place.home, place.prefix.parent}

    def install() -> dict[str, Any]:
        return perform(order, io.BytesIO(data))

    assert install()["status"] == "ok"
    done = {top: timeless(seen) for top, seen in place.before().items()}
    assert perform(place.order("uninstall"), None)["kept"] == []
    assert place.before() == before
    for step in every_step(install):
        mom_sees_whole_hooks(place.mom_priv)
        if step % 2:
            assert install()["status"] == "ok"
            now = without_manifest(place)
            for top, seen in without_manifest(place, done).items():
                assert now[top] == seen, f"step {step}"
        answer = perform(place.order("uninstall"), None)
        assert answer == {**answer, "status": "ok", "kept": []}, f"step {step}"
        assert but_the_time_of(place.before(), free) == but_the_time_of(before, free), f"step {step}"
    assert perform(place.order("uninstall"), None)["status"] == "ok"


def without_manifest(place: Place, seen: Optional[dict[str, Any]] = None) -> dict[str, Any]:
    """Pictures without times and without what the manifest says, which has times in it."""
    found = seen or {top: timeless(each) for top, each in place.before().items()}
    return {
        top: {
            path: each._replace(content="") if path.endswith("manifest.json") else each for path, each in all_.items()
        }
        for top, all_ in found.items()
    }


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
def test_killed_while_it_uninstalls(place: Place, shared: bool) -> None:
    if shared:
        place.share()
    data = packed(place.base)
    PLACES.add((str(place.prefix), str(place.base / "spool")))
    before = place.before()
    free = {place.home, place.prefix.parent}
    perform(place.order(), io.BytesIO(data))
    for step in every_step(lambda: perform(place.order("uninstall"), None)):
        mom_sees_whole_hooks(place.mom_priv)
        if step % 2:
            assert perform(place.order(), io.BytesIO(data))["status"] == "ok"
            assert perform(place.order("check"), None)["status"] == "ok", f"step {step}"
        answer = perform(place.order("uninstall"), None)
        assert answer == {**answer, "status": "ok", "kept": []}, f"step {step}"
        assert but_the_time_of(place.before(), free) == but_the_time_of(before, free), f"step {step}"
        perform(place.order(), io.BytesIO(data))
    assert but_the_time_of(place.before(), free) == but_the_time_of(before, free)


def test_killed_while_it_changes_version_and_mode(place: Place) -> None:
    one, two = packed(place.base), packed(place.base, "2")
    PLACES.update((str(place.prefix), str(place.base / spool)) for spool in ("spool", "spool2"))
    before = place.before()
    free = {place.home, place.prefix.parent}
    newer = place.order(tree="2-two", toolkit="2", mode=JOB_TYPE, spool=str(place.base / "spool2"))
    perform(place.order(), io.BytesIO(one))
    for step in every_step(lambda: perform(newer, io.BytesIO(two))):
        mom_sees_whole_hooks(place.mom_priv)
        present = place.prefix / "current" / "bin" / "vmgr"
        assert present.read_text().splitlines()[1] in ("# 1", "# 2"), "the programs are those of one version"
        if step % 2:
            assert perform(newer, io.BytesIO(two))["status"] == "ok"
            assert perform(replace(newer, action="check"), None)["status"] == "ok", f"step {step}"
        assert perform(place.order("uninstall"), None)["kept"] == [], f"step {step}"
        assert but_the_time_of(place.before(), free) == but_the_time_of(before, free), f"step {step}"
        perform(place.order(), io.BytesIO(one))


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
def test_a_node_of_slurm(place: Place, shared: bool) -> None:
    """It has no mom, and what one would have is left alone."""
    if shared:
        place.share()
    data, before = packed(place.base), place.before()
    order = place.order(mode=slurmfiles.MODE)
    away = replace(order, action="uninstall")
    free = {place.home, place.prefix.parent, place.units}
    assert perform(order, io.BytesIO(data))["text"].startswith("installed, Slurm's hooks, prefix ")
    assert picture(place.mom_priv) == {
        path.removeprefix("mom_priv/").replace("mom_priv", "."): seen
        for path, seen in before[str(place.home)].items()
        if path.startswith("mom_priv")
    }
    assert perform(replace(order, action="check"), None)["status"] == "ok"
    assert perform(order, None)["text"].startswith("is current")
    (place.units / "vtorque-reap.timer").write_text("changed")
    assert perform(replace(order, action="check"), None)["status"] == "problems"
    (place.units / "vtorque-reap.timer").unlink()
    assert perform(away, None)["kept"] == []
    assert but_the_time_of(place.before(), free) == but_the_time_of(before, free)
    for step in every_step(lambda: perform(order, io.BytesIO(data)), stride=3):
        if step % 2:
            assert perform(order, io.BytesIO(data))["status"] == "ok", f"step {step}"
            assert perform(replace(order, action="check"), None)["status"] == "ok", f"step {step}"
        assert perform(away, None)["kept"] == [], f"step {step}"
        assert but_the_time_of(place.before(), free) == but_the_time_of(before, free), f"step {step}"


# --- what is there


def test_the_mode_wrap(place: Place) -> None:
    place.share()
    mom_priv = place.mom_priv
    before = {name: (mom_priv / name).lstat() for name in SITE_HOOKS}
    answer = perform(place.order(), None)
    assert answer["status"] == "ok" and "moved aside" in answer["text"] and "epilogue.parallel" in answer["text"]
    for name in [*SITE_HOOKS, "prologue.parallel"]:
        assert is_ours((mom_priv / name).read_bytes()) and (mom_priv / name).stat().st_mode & 0o7777 == 0o755
    for name, info in before.items():
        moved = (mom_priv / "vtorque-site" / name).lstat()
        assert (moved.st_ino, moved.st_mode, moved.st_mtime_ns) == (info.st_ino, info.st_mode, info.st_mtime_ns)
    link = mom_priv / "vtorque-site" / "epilogue.parallel"
    assert link.is_symlink() and link.read_text() == (mom_priv / "common").read_text(), "a link leads where it did"
    assert not (mom_priv / "epilogue.user").exists(), "no hook is put where the site has none that ours stands for"
    assert (mom_priv / "config").read_text() == MOM_CONFIG.replace("120", "311").replace("   #", "  #")
    assert (mom_priv / "config").stat().st_mode & 0o7777 == 0o640 and (mom_priv / "config").stat().st_gid == 4
    assert (mom_priv / "vtorque-config.before").read_text() == MOM_CONFIG, "on the same file system"
    again = picture(place.home)
    answer = perform(place.order(), None)
    assert "is current" in answer["text"] and not answer["changed"] and picture(place.home) == again


def test_the_mode_jobtype_and_back(place: Place) -> None:
    place.share()
    before = place.before()
    mom_priv = place.mom_priv
    order = place.order(mode=JOB_TYPE, raise_alarm=False)
    answer = perform(order, None)
    assert any("$prologalarm is 120 s" in line and "311 s are needed" in line for line in answer["kept"])
    ours = {path.name for path in mom_priv.iterdir() if is_ours(path.read_bytes() if path.is_file() else b"")}
    assert ours == {hook.target for hook in hook_files(JOB_TYPE)}
    theirs = before[str(place.home)]
    now = picture(place.home)
    assert all(now[f"mom_priv/{name}"] == theirs[f"mom_priv/{name}"] for name in [*SITE_HOOKS, "epilogue.parallel"])
    perform(place.order(), None)
    assert not (mom_priv / "prologue.vtorque").exists() and is_ours((mom_priv / "prologue").read_bytes())
    perform(order, None)
    assert (mom_priv / "prologue.vtorque").exists() and not is_ours((mom_priv / "prologue").read_bytes())
    perform(place.order("uninstall"), None)
    assert place.before() == before


def test_hooks_that_were_copied_by_hand(place: Place) -> None:
    """Those of an older version are replaced, and are not taken for the site's own."""
    place.share()
    mom_priv = place.mom_priv
    for name in ("prologue", "epilogue"):
        (mom_priv / name).write_text("#!/bin/sh\n# vTorque: an older one\nexit 0\n")
    perform(place.order(), None)
    assert (
        not (mom_priv / "vtorque-site" / "prologue").exists() and (mom_priv / "vtorque-site" / "prologue.user").exists()
    )
    assert perform(place.order("check"), None)["status"] == "ok"
    perform(place.order("uninstall"), None)
    assert not (mom_priv / "prologue").exists() and (mom_priv / "prologue.user").exists()


def test_what_somebody_has_changed_is_kept(place: Place) -> None:
    place.share()
    perform(place.order(), None)
    mom_priv = place.mom_priv
    edited = (mom_priv / "prologue").read_text() + "# and something of the site's\n"
    (mom_priv / "prologue").write_text(edited)
    (mom_priv / "epilogue").write_text("#!/bin/sh\n# all of the site's\n")
    (mom_priv / "config").write_text("$prologalarm 400\n")
    (place.units / "vtorque-reap.timer").write_text("[Timer]\nOnBootSec=9min\n")
    answer = perform(place.order(), None)
    for name in ("prologue ", "epilogue ", "config ", "vtorque-reap.timer "):
        assert any(f"/{name}was changed since it was installed" in line for line in answer["kept"]), answer
    assert (mom_priv / "prologue").read_text() == edited
    found = perform(place.order("check"), None)
    assert found["status"] == "problems" and f"{mom_priv}/epilogue was changed" in found["text"]

    answer = perform(place.order("uninstall"), None)
    assert len(answer["kept"]) >= 4
    kept = place.home / "vtorque-kept" / "prologue"
    assert kept.read_text() == edited and (mom_priv / "prologue").read_text().startswith("#!/bin/sh\necho"), answer
    assert (mom_priv / "epilogue").read_text() == "#!/bin/sh\n# all of the site's\n"
    assert (mom_priv / "vtorque-site" / "epilogue").exists(), "what was there before is not lost either"
    assert (mom_priv / "config").read_text() == "$prologalarm 400\n"
    assert (place.units / "vtorque-reap.timer").exists()


def test_a_hook_that_the_site_puts_into_the_folder_later(place: Place) -> None:
    place.share()
    perform(place.order(), None)
    mom_priv = place.mom_priv
    later = mom_priv / "vtorque-site" / "epilogue.user"
    later.write_text("#!/bin/sh\nexit 0\n")
    later.chmod(0o755)
    perform(place.order(), None)
    assert is_ours((mom_priv / "epilogue.user").read_bytes())
    perform(place.order("uninstall"), None)
    assert (mom_priv / "epilogue.user").read_text() == "#!/bin/sh\nexit 0\n" and not later.exists()


def test_hooks_that_lay_in_the_folder_before(place: Place) -> None:
    """They stay there, and run; what lies at their names in mom_priv as well is not touched."""
    place.share()
    for name in ("epilogue.user", "prologue"):
        (place.mom_priv / "vtorque-site").mkdir(exist_ok=True)
        (place.mom_priv / "vtorque-site" / name).write_text("#!/bin/sh\nexit 0\n")
    before = place.before()
    answer = perform(place.order(), None)
    assert any("/prologue is not vTorque's" in line for line in answer["kept"]), answer
    assert is_ours((place.mom_priv / "epilogue.user").read_bytes())
    perform(place.order(), None)
    perform(place.order("uninstall"), None)
    assert place.before() == before


# --- what is checked


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda place: (place.mom_priv / "prologue").chmod(0o777), "has owner 0:0 and mode 0777"),
        (lambda place: os.chown(place.mom_priv / "prologue", 12, 0), "has owner 12:0"),
        (lambda place: (place.mom_priv / "epilogue.parallel").unlink(), "epilogue.parallel is missing"),
        (lambda place: (place.prefix / "bin" / "vmgr").write_text("#!/bin/sh\nexit 0\n"), "vmgr was changed"),
        (lambda place: (place.prefix / "etc" / "vtorque" / "vtorque.yaml").write_text("x"), "vtorque.yaml was changed"),
        (lambda place: (place.mom_priv / "config").write_text("$prologalarm 60\n"), "60 s"),
        (lambda place: (place.prefix / "current").unlink(), "current is missing"),
        (lambda place: place.mom_priv.chmod(0o777), "writable by others"),
    ],
)
def test_the_check_sees(place: Place, spoil: Callable[[Place], Any], said: str) -> None:
    perform(place.order(), io.BytesIO(packed(place.base)))
    assert perform(place.order("check"), None)["status"] == "ok"
    spoil(place)
    try:
        answer = perform(place.order("check"), None)
    except Exception as err:
        answer = {"status": "problems", "text": str(err)}
    assert answer["status"] == "problems" and said in answer["text"], answer


def test_what_is_refused(place: Place) -> None:
    before = place.before()
    with pytest.raises(NeedsTree):
        perform(place.order(), None)
    data = packed(place.base)
    cut = io.BytesIO(data[: len(data) // 2])
    for wrong, stream, said in (
        (place.order(home=str(place.base / "none")), None, "--torque-home"),
        (place.order(python=[2, 7]), None, "Python 2.7"),
        (place.order(machine="vax"), None, "vax"),
        (place.order(programs=["no-such-program"]), None, "it lacks no-such-program"),
        (place.order(), cut, "did not arrive whole"),
    ):
        with pytest.raises(Refused, match=said):
            perform(wrong, stream)
        perform(place.order("uninstall"), None)
        free = {place.home, place.prefix.parent}
        assert but_the_time_of(place.before(), free) == but_the_time_of(before, free), said
    perform(place.order(), io.BytesIO(data))
    with pytest.raises(Refused, match="another installation"):
        perform(place.order(prefix="/opt/other"), None)
    (place.base / "spool" / "jobs" / "7.server").mkdir(parents=True)
    with pytest.raises(Refused, match=r"guest jobs are there \(7\.server\)"):
        perform(place.order("uninstall"), None)
    assert perform(place.order("check"), None)["status"] == "ok"


def test_a_prefix_that_is_not_ours_alone(place: Place) -> None:
    """Nobody else may be able to change what the mom runs, and programs of something else stay."""
    data = packed(place.base)
    place.prefix.parent.chmod(0o775)
    before = place.before()
    with pytest.raises(VTorqueError, match="writable by others"):
        perform(place.order(), io.BytesIO(data))
    assert place.before() == before
    place.prefix.parent.chmod(0o755)
    (place.prefix / "venv").mkdir(parents=True)
    before = place.before()
    with pytest.raises(Refused, match="venv is of something else"):
        perform(place.order(), io.BytesIO(data))
    (place.prefix / "venv").rename(place.prefix / ".install")
    with pytest.raises(Refused, match="an installation of its own"):
        perform(place.order(), io.BytesIO(data))
    (place.prefix / ".install").rmdir()
    assert perform(place.order(), io.BytesIO(data))["status"] == "ok"


def test_a_dry_run_for_a_front_end_that_has_nothing_yet(place: Place) -> None:
    before = place.before()
    assert "would be changed" in perform(place.order(dry=True, front=""), None)["text"]
    assert place.before() == before


def test_roots_umask_does_not_matter(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tree(place.base / "tree-1")
    program = place.base / "tree-1" / "bin" / "vmgr"
    compiled = place.prefix / "etc" / "vtorque" / "vtorque.yaml.compiled"
    program.write_text(f"#!/bin/sh\n>{compiled}\n")
    tree.seal(str(program.parents[1]))
    before = os.umask(0o077)
    try:
        nodeside.main({**asdict(place.order()), "has_tree": True}, io.BytesIO(packed(place.base)))
    finally:
        os.umask(before)
    assert compiled.stat().st_mode & 0o777 == 0o644
    modes = {path: path.lstat().st_mode & 0o777 for path in place.prefix.rglob("*") if not path.is_symlink()}
    assert not [path for path, mode in modes.items() if mode & 0o022 or mode & 0o044 != 0o044]


def test_the_timer_runs(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where systemd runs, the janitor's timer is started; also by the next order, where one was cut off before."""
    systemd = FakeSystemd(place.base, monkeypatch)
    perform(place.order(), io.BytesIO(packed(place.base)))
    started = ["daemon-reload", "restart vtorque-reap.timer"]
    assert systemd.said() == started
    assert (place.units / "timers.target.wants" / "vtorque-reap.timer").exists()
    assert perform(place.order("check"), None)["status"] == "ok"
    systemd.runs.unlink()
    assert "vtorque-reap.timer does not run" in perform(place.order("check"), None)["text"]
    systemd.log.unlink()
    perform(place.order(), None)
    assert systemd.said()[1:] == started
    assert perform(place.order("check"), None)["status"] == "ok"
    perform(place.order("uninstall"), None)
    assert not systemd.runs.exists() and systemd.said()[-1] == "daemon-reload"


def test_programs_that_are_gone(place: Place) -> None:
    perform(place.order(), io.BytesIO(packed(place.base)))
    shutil.rmtree(place.prefix / "trees" / "1-one")
    answer = perform(place.order("check"), None)
    assert answer["status"] == "problems" and "trees/1-one is missing" in answer["text"], answer


@pytest.mark.parametrize("mode", [WRAP, JOB_TYPE])
def test_it_names_what_users_can_have_run(place: Place, mode: str) -> None:
    (place.mom_priv / "prologue.orig").write_text("#!/bin/sh\n")
    for _ in range(2):
        kept = perform(place.order(mode=mode), io.BytesIO(packed(place.base)))["kept"]
        assert kept == [f"{place.mom_priv}/prologue.orig is run as root for whoever asks by qsub -T orig"]
