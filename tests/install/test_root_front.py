"""What an installation does on a front end, cut off by SIGKILL before many of its steps, and then done again.

Its programs are those of this checkout, not built anew: each step is tried many times.
"""

from __future__ import annotations

import errno
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Optional

import pytest
import yaml
from deploysteps import every_step
from installsite import REPOSITORY, FakeSystemd, picture

from vmgr import __version__
from vmgr.deploy import build, options, outside, timer, tree
from vmgr.deploy.build import Source, source_at
from vmgr.deploy.front import Front
from vmgr.deploy.hookfiles import is_ours
from vmgr.deploy.main import run
from vmgr.errors import VTorqueError

CONFIG = "engine: local\nlocal: {{spool: {base}/local}}\npaths: {{spool: {base}/spool}}\n"
EVERY = 9
"""So many steps apart are the ones before which it is killed; each run begins with another one."""


class Place(NamedTuple):
    """Where a front end is installed."""

    base: Path
    source: Source

    @property
    def prefix(self) -> Path:
        return self.base / "opt" / "sub" / "vtorque"

    def front(self, version: str = "one") -> Front:
        source = self.source._replace(name=version, version=version)
        return Front(str(self.prefix), source, python=sys.executable, wheels=None, links=True)

    def install(self, version: str = "one") -> None:
        """All that `install.sh` does on a front end."""
        front = self.front(version)
        config = CONFIG.format(base=self.base).encode()
        front.prepare()
        with front.store.held():
            front.switch(config, front.build_programs(config))

    def picture(self) -> dict[str, Any]:
        return picture(self.base)


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    def make(source: Source, prefix: str, path: str, python: str, wheels: Optional[str], work: str) -> None:
        """A tree with the packages that are needed to read a configuration."""
        packages = Path(path, "venv", "lib", "python3", "site-packages")
        packages.mkdir(parents=True)
        (packages / "vmgr").symlink_to(REPOSITORY / "vmgr")
        (packages / "yaml").symlink_to(Path(yaml.__file__).parent)
        Path(path, "venv", "bin").mkdir()
        Path(path, "venv", "bin", "python3").symlink_to(sys.executable)
        pages = [f"share/man/man1/{name}.1" for name in ("vsub", "vmgr")]
        completions = [f"share/{name}" for name in build.COMPLETIONS.values()]
        for name in ("bin/vmgr", "bin/vsub", "libexec/vtorque-hook", "share/vmgr", *pages, *completions):
            Path(path, name).parent.mkdir(parents=True, exist_ok=True)
            Path(path, name).write_text(source.version)
        tree.seal(path)

    with tempfile.TemporaryDirectory(prefix="vt-", dir="/dev/shm") as folder:
        base = Path(folder)
        base.chmod(0o755)
        for name in ("opt", "usr/bin", "profile", "local", "units"):
            (base / name).mkdir(parents=True)
        monkeypatch.setattr(build, "build", make)
        monkeypatch.setattr(outside, "PLACE", str(base / "usr"))
        monkeypatch.setattr(outside, "PROFILE", str(base / "profile"))
        monkeypatch.setattr(timer, "UNITS", str(base / "units"))
        monkeypatch.setattr(timer, "SYSTEMD", str(base / "no systemd"))
        yield Place(base, source_at(str(REPOSITORY), __version__, sys.executable))


def untimed(seen: dict[str, Any]) -> dict[str, Any]:
    """A picture without the time of the folder in which the prefix is made."""
    return {path: each._replace(mtime_ns=0) if path == "opt" else each for path, each in seen.items()}


def test_it_comes_and_goes(place: Place) -> None:
    before = place.picture()
    place.install()
    assert (place.base / "usr" / "bin" / "vsub").readlink() == place.prefix / "bin" / "vsub"
    hooks = place.base / "local" / "mom_priv"
    assert is_ours((hooks / "prologue").read_bytes()) and not (hooks / "prologue.user").exists()
    assert place.front().check(b"") == []
    again = place.picture()
    place.install()
    assert place.picture() == again
    with pytest.raises(VTorqueError, match="another installation is at work"), place.front().store.held():
        place.install()
    assert place.front().uninstall(dry=False).kept == []
    assert place.picture() == before


def test_the_janitor_of_the_embedded_batch_system(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    systemd = FakeSystemd(place.base, monkeypatch)
    before = picture(place.base / "units")
    place.install()
    assert systemd.said() == ["daemon-reload", "restart vtorque-reap.timer"]
    assert f"ExecStart={place.prefix}/bin/vmgr node reap" in (place.base / "units/vtorque-reap.service").read_text()
    assert place.front().check(b"") == []
    systemd.runs.unlink()
    assert place.front().check(b"") == ["vtorque-reap.timer does not run: systemctl start vtorque-reap.timer"]
    place.install()
    assert place.front().check(b"") == []
    assert place.front().uninstall(dry=False).kept == [] and not systemd.runs.exists()
    assert picture(place.base / "units") == before


def test_what_is_somebody_elses_stays(place: Place) -> None:
    (place.base / "usr" / "bin" / "vsub").write_text("another\n")
    before = place.picture()
    front = place.front()
    config = CONFIG.format(base=place.base).encode()
    front.prepare()
    outcome = front.switch(config, front.build_programs(config))
    assert outcome.kept == [f"{place.base}/usr/bin/vsub is not vTorque's"]
    (place.prefix / "etc" / "vtorque" / "vtorque.yaml").write_text(CONFIG.format(base=place.base) + "# mine\n")
    (place.prefix / "share" / "vmgr").write_text("mine")
    kept = place.front().uninstall(dry=False).kept
    assert any("vtorque.yaml was changed" in line for line in kept)
    assert any("trees/one.kept/share/vmgr" in line for line in kept)
    left = {path: seen for path, seen in place.picture().items() if path not in before}
    files = {path for path, seen in left.items() if seen.content}
    assert files == {"opt/sub/vtorque/etc/vtorque/vtorque.yaml", "opt/sub/vtorque/trees/one.kept/share/vmgr"}


def test_a_prefix_in_which_something_else_lies(place: Place) -> None:
    (place.prefix / "bin").mkdir(parents=True)
    before = place.picture()
    with pytest.raises(VTorqueError, match=r"a folder bin that is not of install\.sh"):
        place.install()
    assert place.picture() == before


def test_a_prefix_that_others_could_change(place: Place) -> None:
    (place.base / "opt").chmod(0o777)
    before = place.picture()
    with pytest.raises(VTorqueError, match="writable by others"):
        place.install()
    assert place.picture() == before


@pytest.mark.parametrize("action", ["--check", "--uninstall", "--upgrade"])
def test_a_prefix_that_others_have_made(place: Place, action: str) -> None:
    """What lies in it is not run, and says not what is removed."""
    place.install()
    (place.base / "opt" / "sub").chmod(0o777)
    before = place.picture()
    with pytest.raises(VTorqueError, match="writable by others"):
        run(str(REPOSITORY), options.read([action, "--prefix", str(place.prefix), "--yes"]))
    assert place.picture() == before


def test_a_build_that_fails_leaves_no_programs(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: Source, prefix: str, path: str, *_: Any) -> None:
        Path(path).mkdir()
        Path(path, "half").write_text("x")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(build, "build", full)
        with pytest.raises(OSError, match="No space left"):
            place.install()
        assert list((place.prefix / "trees").iterdir()) == []
        assert place.front().check(b"") == ["an installation was cut off: run it again"]
    place.install()
    assert place.front().check(b"") == []


def test_a_configuration_that_is_wrong_changes_nothing_that_runs(place: Place) -> None:
    place.install()
    (place.prefix / "etc" / "vtorque" / "vtorque.yaml").write_text("engine: none\n")
    with pytest.raises(VTorqueError, match="engine"):
        place.install("two")
    assert (place.prefix / "bin" / "vmgr").read_text() == "one"


def test_killed_while_it_installs(place: Place) -> None:
    before = place.picture()
    place.install()
    place.front().uninstall(dry=False)
    assert place.picture() == before
    for step in every_step(place.install, EVERY):
        if step % 2:
            place.install()
            assert place.front().check(b"") == [], f"step {step}"
        assert place.front().uninstall(dry=False).kept == [], f"step {step}"
        assert untimed(place.picture()) == untimed(before), f"step {step}"
    place.front().uninstall(dry=False)


def test_killed_while_it_upgrades(place: Place) -> None:
    before = place.picture()
    place.install()
    for step in every_step(lambda: place.install("two"), EVERY):
        assert (place.prefix / "bin" / "vmgr").read_text() in ("one", "two")
        place.install("two")
        assert place.front("two").check(b"") == [], f"step {step}"
        assert place.front().uninstall(dry=False).kept == [], f"step {step}"
        assert untimed(place.picture()) == untimed(before), f"step {step}"
        place.install()


def test_killed_while_it_uninstalls(place: Place) -> None:
    before = place.picture()
    place.install()
    for step in every_step(lambda: place.front().uninstall(dry=False), EVERY):
        if step % 2:
            place.install()
            assert place.front().check(b"") == [], f"step {step}"
        assert place.front().uninstall(dry=False).kept == [], f"step {step}"
        assert untimed(place.picture()) == untimed(before), f"step {step}"
        place.install()


def test_a_front_end_needs_no_hypervisor(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    programs = place.base / "programs"
    programs.mkdir()
    config = place.base / "site.yaml"
    config.write_text(CONFIG.format(base=place.base).replace("engine: local", "engine: torque"))
    asked = options.read(["--prefix", str(place.prefix), "--config", str(config), "--no-links", "--yes"])
    monkeypatch.setenv("PATH", str(programs))
    with pytest.raises(VTorqueError, match="missing: ssh, ssh-keygen, qemu") as refused:
        run(str(REPOSITORY), asked)
    assert "openssh-client" in str(refused.value.hint) and not place.prefix.exists()
    for name in ("ssh", "ssh-keygen"):
        (programs / name).symlink_to("/bin/true")
    assert run(str(REPOSITORY), asked) == 0
    assert "missing: qemu-system-x86_64, qemu-img: no guests can run on this machine" in capsys.readouterr().out
