"""The systemd units that a site may copy: each starts a command that there is, with options that it has."""

from __future__ import annotations

import configparser
import shlex
import shutil
import subprocess
from pathlib import Path

import click
import pytest
from nodesite import REPOSITORY

from vmgr.cli import cli
from vmgr.deploy.hookfiles import fill_unit, unit_files

UNITS = REPOSITORY / "contrib" / "systemd"
SERVICES = sorted(UNITS.glob("*.service"))


def read(unit: Path) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(unit.read_text())
    return parser


@pytest.mark.parametrize("unit", SERVICES, ids=lambda unit: unit.name)
def test_a_service_starts_a_command_that_there_is(unit: Path) -> None:
    program, *words = shlex.split(read(unit)["Service"]["ExecStart"])
    assert program == "/opt/vtorque/bin/vmgr"
    command: click.Command = cli
    context = click.Context(cli, **cli.context_settings)
    while isinstance(command, click.Group):
        found = command.get_command(context, words.pop(0))
        assert found is not None
        command = found
    # reads the options, and refuses what it has not; click keeps the first context's words for help with a command
    command.make_context(command.name, words, parent=context)


@pytest.mark.parametrize("timer", sorted(UNITS.glob("*.timer")), ids=lambda unit: unit.name)
def test_a_timer_has_its_service(timer: Path) -> None:
    assert timer.with_suffix(".service") in SERVICES
    assert read(timer)["Install"]["WantedBy"] == "timers.target"
    assert read(timer.with_suffix(".service"))["Service"]["Type"] == "oneshot"


def test_the_installer_gets_the_janitor_with_its_timer() -> None:
    assert all((UNITS / name).exists() for name in unit_files())
    service, timer = (fill_unit((UNITS / name).read_text(), prefix="/opt/other") for name in unit_files())
    assert "ExecStart=/opt/other/bin/vmgr node reap\n" in service and "[Timer]" in timer
    assert "/opt/vtorque" not in service + timer


@pytest.mark.parametrize("unit", [*SERVICES, *sorted(UNITS.glob("*.timer"))], ids=lambda unit: unit.name)
def test_systemd_finds_nothing(unit: Path, tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd-analyze")
    for other in UNITS.iterdir():
        (tmp_path / other.name).write_text(other.read_text().replace("/opt/vtorque/bin/vmgr", "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", str(tmp_path / unit.name)], capture_output=True, text=True)
    assert unit.name not in done.stderr, done.stderr
