"""The `vmgr` command, through its launcher, on an installation below a temporary folder."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Optional

import pytest
from nodesite import REPOSITORY, Node, make_node, short_folder
from pytest_console_scripts import ScriptRunner
from test_image_add import FACTS, a_pool

from vmgr import __version__
from vmgr.errors import Code
from vmgr.images.pool import Pool
from vmgr.node import record

pytestmark = pytest.mark.script_launch_mode("inprocess")


class Outcome(NamedTuple):
    status: int
    stdout: str
    stderr: str


class Vmgr:
    """Runs `vmgr` on one node."""

    def __init__(self, node: Node, runner: ScriptRunner, program: Path) -> None:
        self.node = node
        self._runner = runner
        self.program = program

    def __call__(self, *words: str, cwd: Optional[Path] = None) -> Outcome:
        done = self._runner.run([str(self.program), *words], cwd=cwd)
        return Outcome(done.returncode, done.stdout, done.stderr)

    def refuses(self, *words: str) -> str:
        """The one line with which a command is refused."""
        status, out, err = self(*words)
        assert status == 2 and out == "" and err.count("\n") == 1 and err.isascii()
        return err.rstrip("\n")


@pytest.fixture
def vmgr_run(script_runner: ScriptRunner, monkeypatch: pytest.MonkeyPatch) -> Iterator[Vmgr]:
    with short_folder() as base:
        node = make_node(base)
        program = base / "vmgr"
        # the installation is found from the interpreter
        python = str(node.install.root / "venv" / "bin" / "python3")
        program.write_text(
            f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(REPOSITORY)!r})\nsys.executable = {python!r}\n"
            "from vmgr.cli import main\nsys.exit(main())\n"
        )
        program.chmod(0o755)
        monkeypatch.setattr(sys, "executable", python)
        yield Vmgr(node, script_runner, program)


@pytest.fixture
def pool(vmgr_run: Vmgr) -> Pool:
    return a_pool(vmgr_run.node.config.images.pool)


def test_version_help_and_what_is_none_of_it(vmgr_run: Vmgr) -> None:
    assert vmgr_run("--version") == (0, f"vmgr, version {__version__}\n", "")
    for words in (["--help"], ["image", "--help"], ["node", "reap", "-h"]):
        status, out, err = vmgr_run(*words)
        assert (status, err) == (0, "") and "Example: vmgr" in out
    assert vmgr_run("nonsense")[0] == 2 and vmgr_run("image", "show")[0] == 2 and vmgr_run("ps", "--what")[0] == 2


@pytest.mark.script_launch_mode("subprocess")
def test_as_a_process_of_its_own(script_runner: ScriptRunner, tmp_path: Path) -> None:
    program = tmp_path / "vmgr"
    program.write_text(
        f"#!{sys.executable} -I\nimport sys\nsys.path.insert(0, {str(REPOSITORY)!r})\n"
        "from vmgr.cli import main\nsys.exit(main())\n"
    )
    program.chmod(0o755)
    done = script_runner.run([str(program), "errors"])
    assert done.returncode == 0 and "VT-SPEC" in done.stdout


def test_list_and_show(vmgr_run: Vmgr, pool: Pool) -> None:
    status, out, err = vmgr_run("list")
    heading, row = out.splitlines()
    assert (status, err) == (0, "") and heading.split()[:3] == ["NAME", "REVISION", "FAMILY"]
    assert row.split()[:3] == ["debian-12", "1", "debian"]
    (entry,) = json.loads(vmgr_run("list", "--json").stdout)
    assert (entry["name"], entry["size"]) == ("debian-12", 13)
    assert json.loads(vmgr_run("image", "show", "debian-12", "--json").stdout)["cmdline"] == "root=x"
    shown = vmgr_run("image", "show", "debian-12").stdout
    assert "features: 9p\n" in shown and "file: initrd 6 bytes sha256 " in shown
    assert "has no packages" in vmgr_run.refuses("image", "show", "debian-12", "--packages")
    assert vmgr_run.refuses("image", "show", "nope").startswith("VT-IMAGE: unknown image 'nope'")
    assert "debian-12" in vmgr_run.refuses("image", "show", "../../etc")


def test_the_packages_of_an_image(vmgr_run: Vmgr, pool: Pool) -> None:
    with pool.staging("micro") as staging:
        (staging / "out").mkdir()
        (staging / "out" / "packages.txt").write_text("busybox 1.35\n")
        pool.publish(staging / "out", "micro", {**FACTS, "packages": "packages.txt", "kernel": None, "initrd": None})
    assert vmgr_run("image", "show", "micro", "--packages") == (0, "busybox 1.35\n", "")


def test_an_empty_pool(vmgr_run: Vmgr) -> None:
    assert vmgr_run("list").stdout.split()[0] == "NAME"
    assert json.loads(vmgr_run("list", "--json").stdout) == []
    assert "vmgr image build" in vmgr_run.refuses("image", "show", "micro")


def test_configuration(vmgr_run: Vmgr) -> None:
    config = vmgr_run.node.install.config
    assert vmgr_run("config", "check") == (0, f"{config}: ok\n", "")
    assert json.loads(vmgr_run("config", "check", "--json").stdout) == {
        "file": str(config), "ok": True, "error": None, "notes": [],
    }  # fmt: skip
    assert vmgr_run("config", "compile") == (0, f"{config}: ok, compiled\n", "")
    assert config.with_name("vtorque.yaml.compiled").stat().st_mode & 0o777 == 0o644
    assert vmgr_run("config", "show", "--value", "paths.run").stdout == f"{vmgr_run.node.config.paths.run}\n"
    assert vmgr_run("config", "show", "--value", "policy.vcpus.max").stdout == "64\n"
    assert vmgr_run("config", "show", "--value", "hypervisor.allow_emulation").stdout == "false\n"
    rows = {row["key"]: row for row in json.loads(vmgr_run("config", "show", "--json").stdout)}
    assert rows["policy.ram.default"] == {"key": "policy.ram.default", "value": 512, "origin": "default"}
    assert rows["paths.run"]["origin"].startswith("line ") and rows["mounts[0].name"]["value"] == "home"
    assert "paths.run" in vmgr_run("config", "show").stdout
    assert vmgr_run.refuses("config", "show", "--value", "paths.nope").startswith("VT-KEY: there is no key paths.nope")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("paths: {nope: 1}\n", "line 1: paths.nope"),
        ("engine: torque\npolicy:\n  vcpus: {min: 4, max: 2}\n", "line 3: policy.vcpus"),
        ("engine: [\n", "not YAML"),
        ("a: &x 1\nb: *x\n", "aliases"),
        ("engine: torque\nengine: local\n", "line 2: engine stands a second time"),
        ('engine: "\\x1b[2Jx"\n', "engine is"),
        ("\0", "not YAML"),
    ],
)
def test_a_wrong_configuration_is_one_line_for_every_command(vmgr_run: Vmgr, text: str, said: str) -> None:
    vmgr_run.node.install.config.write_text(text)
    for words in (["config", "check"], ["config", "compile"], ["config", "show"], ["list"], ["ps"]):
        line = vmgr_run.refuses(*words)
        assert line.startswith("VT-CONFIG: ") and said in line


def test_no_configuration(vmgr_run: Vmgr) -> None:
    vmgr_run.node.install.config.unlink()
    for words in (["config", "check"], ["list"], ["ps"]):
        assert vmgr_run.refuses(*words).startswith("VT-CONFIG: cannot read the configuration ")


def test_errors(vmgr_run: Vmgr) -> None:
    rows = json.loads(vmgr_run("errors", "--json").stdout)
    assert [row["code"] for row in rows] == [code.text for code in Code]
    assert all(row["status"] == 2 or 70 <= row["status"] <= 79 for row in rows)
    assert len({row["status"] for row in rows} - {2}) == sum(row["status"] != 2 for row in rows)
    markdown = vmgr_run("errors", "--markdown").stdout
    assert markdown.count("\n") == len(rows) + 2 and "| `VT-SPEC` | 71 |" in markdown
    assert vmgr_run("errors").stdout.count("\n") == len(rows) + 1


def test_ps_without_guests_and_with_dead_sockets(vmgr_run: Vmgr) -> None:
    place = vmgr_run.node.place()
    lock, listener = record.create(place, {})
    listener.close()
    assert vmgr_run("ps").stdout.split()[0] == "JOB"
    assert json.loads(vmgr_run("ps", "--json").stdout) == []
    os.close(lock)


def test_reaping(vmgr_run: Vmgr, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() != 0:
        assert vmgr_run.refuses("node", "reap", "--dry-run").startswith("VT-ACCESS: ")
        monkeypatch.setattr("vmgr.commands.nodes.need_root", lambda what: None)
        monkeypatch.setattr("vmgr.node.network.undo.tables_of", lambda spool: [])  # only root may ask
        monkeypatch.setattr("vmgr.config.check_trusted", lambda path: None)
    place = vmgr_run.node.place()
    lock, listener = record.create(place, {})
    listener.close()
    assert vmgr_run("node", "reap") == (0, "", "")
    os.close(lock)
    said = f"attempt 12.host {place.attempt}\n  socket {place.socket}\n"
    (thing,) = json.loads(vmgr_run("node", "reap", "--dry-run", "--json").stdout)["things"]
    assert thing == {
        "kind": "attempt", "what": f"12.host {place.attempt}", "holds": [f"socket {place.socket}"], "left": [],
    }  # fmt: skip
    assert vmgr_run("node", "reap", "--dry-run") == (0, said, "") and place.folder.exists()
    assert vmgr_run("node", "reap") == (0, said, "") and vmgr_run.node.left() == []


def test_building_needs_root(vmgr_run: Vmgr, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmgr.commands.access.os.geteuid", lambda: 4711)
    assert vmgr_run.refuses("image", "build", "micro").startswith("VT-ACCESS: vmgr image build")


def test_debug_shows_where_it_came_from(vmgr_run: Vmgr) -> None:
    status, _, err = vmgr_run("--debug", "image", "show", "nope")
    assert status != 0 and "VT-IMAGE: " in err and "Traceback" in err
