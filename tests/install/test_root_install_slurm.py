"""`install.sh --engine slurm` on a front end: what it writes, what it says of a site's slurm.conf, what it refuses.

Its programs are those of this checkout, not built anew; nodes are in `test_root_install.py`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import yaml
from installsite import REPOSITORY, picture
from test_root_front import Place, place, untimed

from vmgr.deploy import front, installing, nodes, options, slurmfiles, slurmsite
from vmgr.deploy.main import run
from vmgr.deploy.nodes import Answer, Known
from vmgr.deploy.nodeside import Order
from vmgr.errors import VTorqueError

sys.path.insert(0, str(REPOSITORY / "tests" / "node"))
import slurmdaemons

__all__ = ["place"]


@pytest.fixture
def conf(place: Place, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A site's slurm.conf; there is no daemon to ask."""
    (place.base / "etc").mkdir()
    path = place.base / "etc" / "slurm.conf"
    path.write_text("ClusterName=site\nInclude hooks.conf\n")
    (place.base / "etc" / "hooks.conf").write_text("# ours\nProlog=/site/prolog\n")
    monkeypatch.setenv("SLURM_CONF", str(path))
    programs = place.base / "programs"
    programs.mkdir()
    (programs / "scontrol").write_text("#!/bin/sh\necho 'Unable to contact slurm controller' >&2\nexit 1\n")
    (programs / "scontrol").chmod(0o755)
    monkeypatch.setattr(slurmsite, "_program", lambda name, _: str(programs / name))
    monkeypatch.setattr(installing, "NODE_PROGRAMS", ("sh",))
    return path


def install(place: Place, *words: str) -> int:
    return run(str(REPOSITORY), options.read(["--prefix", str(place.prefix), "--yes", *words]))


def test_it_writes_the_lines_and_edits_nothing(
    place: Place, conf: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (place.base / "usr" / "bin").mkdir(exist_ok=True)
    before, site = place.picture(), picture(conf.parent)
    assert install(place, "--engine", "slurm", "--dry-run") == 0
    said = capsys.readouterr().out
    assert "Prolog=" in said and place.picture() == before
    assert install(place, "--engine", "slurm") == 0
    said = capsys.readouterr().out
    hooks = place.prefix / "share" / "vtorque" / "mom_priv_hooks" / "slurm"
    lines = slurmfiles.conf_lines(str(hooks))
    told = [line for line in said.splitlines() if line.startswith("slurm.conf (")]
    assert told == [
        f"slurm.conf ({conf}): {lines[0]} is different: it is /site/prolog ({conf.parent}/hooks.conf line 2)",
        f"slurm.conf ({conf}): {lines[1]} is missing",
        f"slurm.conf ({conf}): {lines[2]} is missing: PBS_JOBID and the like in jobs without guests",
        f"slurm.conf ({conf}): {lines[3]} is missing",
    ]
    assert [line[2:] for line in said.splitlines() if line.startswith("  ")] == [*lines]
    written = place.prefix / "etc" / "vtorque" / "slurm.conf.vtorque"
    info = written.stat()
    assert (info.st_uid, info.st_gid, info.st_mode & 0o777) == (0, 0, 0o644)
    assert [line for line in written.read_text().splitlines() if line[0] != "#"] == [*lines]
    config = place.prefix / "etc" / "vtorque" / "vtorque.yaml"
    assert yaml.safe_load(config.read_text())["engine"] == "slurm"
    for name in slurmfiles.HOOKS:  # the tree of this test has no share/vtorque
        assert os.access(place.prefix / "mom_priv_hooks" / "slurm" / name, os.X_OK)

    assert install(place, "--check") == 1, "it is remembered"
    said = capsys.readouterr().out
    assert "all as installed" in said and f"{lines[1]} is missing" in said
    conf.write_text(conf.read_text() + written.read_text())
    site = picture(conf.parent)
    assert install(place, "--check") == 0
    said = capsys.readouterr().out
    assert [line.endswith(" is there") for line in said.splitlines()[-4:]] == [True] * 4
    assert install(place) == 0 and "no longer needed" not in capsys.readouterr().out
    with pytest.raises(VTorqueError, match=r"Prolog, Epilog, TaskProlog.*drains nodes"):
        install(place, "--uninstall")

    earlier = written.read_text()
    monkeypatch.setattr(slurmfiles, "FLAGS", ("Alloc", "DeferBatch", "NoHold"))
    assert install(place, "--upgrade") == 0
    said = capsys.readouterr().out
    assert f"no longer needed in slurm.conf: {lines[3]}\n" in said
    assert f"new for slurm.conf: {lines[3]},NoHold\n" in said and written.read_text() != earlier
    monkeypatch.undo()
    assert picture(conf.parent) == site, "a site's file is never edited"


def test_all_goes_again(place: Place, conf: Path) -> None:
    before = place.picture()
    install(place, "--engine", "slurm")
    assert install(place, "--uninstall") == 0
    assert untimed(place.picture()) == untimed(before)


def test_a_configuration_that_cannot_be_read_goes_too(
    place: Place, conf: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it said is noted: the batch system, where its commands are, and where records of guest jobs lie."""
    before = place.picture()
    sent: list[tuple[Order, list[str]]] = []

    def perform(groups: Mapping[Known, Sequence[str]], order: Order, *_: object) -> list[Answer]:
        names = [name for each in groups.values() for name in each]
        sent.append((order, names))
        return [Answer(name, "ok", "vTorque removed") for name in names]

    monkeypatch.setattr(nodes, "perform", perform)
    monkeypatch.setattr(slurmsite, "_program", lambda name, folder: f"{folder}/{name}")
    own = place.base / "own.yaml"
    own.write_text(f"engine: slurm\nslurm: {{bin: {place.base}/programs}}\npaths: {{spool: {place.base}/spool}}\n")
    sinfo = place.base / "programs" / "sinfo"
    sinfo.write_text("#!/bin/sh\nprintf 'n1\\nn2\\n'\n")
    sinfo.chmod(0o755)
    assert install(place, "--config", str(own), "--all") == 0, "slurm.bin of a configuration that is not installed yet"
    assert sent.pop()[1] == ["n1", "n2"]
    config = place.prefix / "etc" / "vtorque" / "vtorque.yaml"
    hooks = conf.read_text()
    for text in ("engine: [\n", "engine: torque\nno such key: 1\n", ""):
        config.write_text(text)
        conf.write_text(f"Prolog={place.prefix}/share/vtorque/mom_priv_hooks/slurm/prolog\n")
        with pytest.raises(VTorqueError, match=r"vTorque \(Prolog\): Slurm drains nodes without"):
            install(place, "--uninstall")
        conf.write_text(hooks)
        assert not sent
    config.write_text("engine: [\n")
    with pytest.raises(VTorqueError, match="VT-CONFIG"):
        install(place, "--check")
    capsys.readouterr()
    assert install(place, "--uninstall", "--all", "--dry-run") == 0
    told = [line for line in capsys.readouterr().out.splitlines() if "cannot be read" in line]
    assert len(told) == 1 and f"cannot be read ({config} line 2: not YAML" in told[0]
    assert f"guest jobs are looked for in {place.base}/spool alone" in told[0]
    order, names = sent.pop()
    assert (order.action, order.dry, order.spool, names) == ("uninstall", True, f"{place.base}/spool", ["n1", "n2"])
    assert install(place, "--uninstall") == 0 and sent.pop()[1] == ["n1", "n2"]
    left = [path for path in place.picture() if path not in before and not (place.base / path).is_dir()]
    assert left == ["opt/sub/vtorque/etc/vtorque/vtorque.yaml", "own.yaml", "programs/sinfo"], "changed by hand, kept"


def test_what_is_refused(place: Place, conf: Path) -> None:
    own = place.base / "own.yaml"
    own.write_text("engine: torque\n")
    before = place.picture()
    with pytest.raises(VTorqueError, match=f"--engine slurm: {own} says engine: torque"):
        install(place, "--engine", "slurm", "--config", str(own))
    assert place.picture() == before
    install(place, "--engine", "torque")
    before = place.picture()
    for words in (["--engine", "slurm"], ["--engine", "slurm", "--check"]):
        with pytest.raises(VTorqueError, match="says engine: torque"):
            install(place, *words)
    assert place.picture() == before
    config = place.prefix / "etc" / "vtorque" / "vtorque.yaml"
    config.write_text("engine: slurm\n")
    for words in (["--hooks", "wrap"], ["--prologalarm", "raise"], ["--check", "--torque-home", "/var/spool/torque"]):
        with pytest.raises(VTorqueError, match="has no mom"):
            install(place, *words)
    assert install(place) == 0, "a configuration that was changed by hand counts"
    assert (place.prefix / "etc" / "vtorque" / "slurm.conf.vtorque").exists()


@pytest.mark.skipif(slurmdaemons.missing() is not None, reason="needs Slurm")
def test_a_real_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the controller tells, before the lines are added and after it has read them."""
    lines = [line for line in front.slurm_text("/opt/x").splitlines() if line[0] != "#"]
    with tempfile.TemporaryDirectory(prefix="vt-slurm-", dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        with slurmdaemons.slurm(Path(folder)) as conf:
            monkeypatch.setenv("SLURM_CONF", str(conf))
            assert slurmsite.all_nodes() == ["n1", "n2"]
            report = slurmsite.report("/opt/x", "")
            assert [re.sub(r":.*", "", line.partition("): ")[2]) for line in report.lines] == [
                f"{line} is missing" for line in lines
            ]
            assert report.bad and not report.ours and "scontrol show config" in report.lines[0]
            with conf.open("a") as stream:
                stream.write("\n".join([*lines, ""]))
            assert slurmsite.report("/opt/x", "").bad, "what holds counts, not what the file says"
            subprocess.run(["scontrol", "reconfigure"], check=True, timeout=60)
            report = slurmsite.report("/opt/x", "")
            assert all(line.endswith(" is there") for line in report.lines) and not report.bad, report.lines
            assert [line.partition("=")[0] for line in report.ours] == ["Prolog", "Epilog", "TaskProlog"]
