"""Fixtures of the unit tests: a temporary site to submit from, and a way to run vsub there."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest
from interrupting import Told
from slurmsite import SlurmSite
from vsubsite import Runner, Site

import vsub.cli
from vsub.account import Account


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    """A site with the image `micro` as its default; the current folder is in the user's home."""
    site = Site(tmp_path)
    monkeypatch.setattr(vsub.cli, "installation", lambda: site.install)
    monkeypatch.setattr(vsub.cli, "account", lambda: Account("carol", os.geteuid(), str(site.home), "users"))
    monkeypatch.chdir(site.work)
    monkeypatch.setenv("PWD", str(site.work))
    monkeypatch.delenv("PBS_DPREFIX", raising=False)
    return site


@pytest.fixture
def vsub_run(site: Site, capfd: pytest.CaptureFixture[str]) -> Runner:
    return Runner(capfd)


@pytest.fixture
def slurm(site: Site, monkeypatch: pytest.MonkeyPatch) -> SlurmSite:
    """The site with Slurm as its batch system."""
    for name in os.environ:
        if name.startswith(("SLURM", "SBATCH")):
            monkeypatch.delenv(name)
    return SlurmSite(site)


@pytest.fixture
def told() -> Iterator[None]:
    """TERM raises Told; what a test leaves put off is let through."""

    def tell(*_: object) -> NoReturn:
        raise Told

    before, mask = signal.signal(signal.SIGTERM, tell), signal.pthread_sigmask(signal.SIG_BLOCK, ())
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    signal.signal(signal.SIGTERM, before)
