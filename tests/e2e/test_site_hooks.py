"""A guest job at a site that has hooks of its own, with ours in their place and with ours for jobs of a type.

These are TORQUE's hooks, as the embedded batch system calls them. On Slurm ours stand beside a site's, as Slurm has it.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vmgr.deploy.hookfiles import JOB_TYPE, SITE_FOLDER, SITE_FOLDER_MODE, WRAP, fill, hook_files, is_open_to_users

from .conftest import REPOSITORY, Site, User

SITE_HOOK = '#!/bin/sh\necho "${0##*/} $(id -u) $2 $(wc -c)"\n'
SITE_HOOKS = ("prologue", "prologue.user", "epilogue.user", "epilogue")


def hooks_of(mom_priv: Path) -> list[Path]:
    names = ("prologue", "epilogue", SITE_FOLDER)
    return [path for path in mom_priv.iterdir() if path.name in names or is_open_to_users(path.name)]


@contextmanager
def arranged(site: Site, mode: str) -> Iterator[None]:
    """The site's hooks, and ours in a mode; afterwards ours alone, as the installer has left them."""
    mom_priv, kept = site.root / "local" / "mom_priv", site.root / "kept"
    config = site.prefix / "etc" / "vtorque" / "vtorque.yaml"
    before = config.read_text()
    kept.mkdir()
    for path in hooks_of(mom_priv):
        path.rename(kept / path.name)
    try:
        place = mom_priv / SITE_FOLDER if mode == WRAP else mom_priv
        place.mkdir(exist_ok=True)
        for name in SITE_HOOKS:
            (place / name).write_text(SITE_HOOK)
            (place / name).chmod(0o755)
        if mode == WRAP:
            place.chmod(SITE_FOLDER_MODE)
        else:
            config.write_text(before.replace("without_vm: guest", "without_vm: guest, job_type: vtorque"))
            subprocess.run([str(site.vmgr), "config", "compile"], check=True, stdout=subprocess.DEVNULL)
        for hook in hook_files(mode):
            if hook.always or hook.target in SITE_HOOKS:
                text = (REPOSITORY / "mom_priv_hooks" / hook.source).read_text()
                (mom_priv / hook.target).write_text(fill(text, prefix=str(site.prefix), spool=str(site.root / "spool")))
                (mom_priv / hook.target).chmod(hook.mode)
        yield
    finally:
        for path in hooks_of(mom_priv):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for path in kept.iterdir():
            path.rename(mom_priv / path.name)
        kept.rmdir()
        config.write_text(before)
        subprocess.run([str(site.vmgr), "config", "compile"], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("mode", [WRAP, JOB_TYPE])
def test_a_guest_job_has_the_sites_hooks_around_it(user: User, site: Site, mode: str) -> None:
    with arranged(site, mode):
        done = user.job('#!/bin/sh\necho "in $(hostname)"\n')
        doctor = subprocess.run([str(site.vmgr), "doctor"], capture_output=True, text=True)
        site.assert_clean()
    assert done.status == 0, done.err
    first, second, job, third, last = done.out.splitlines()
    assert job.startswith("in v")
    assert [first, second] == [f"prologue 0 {user.name} 0", f"prologue.user {user.uid} {user.name} 0"]
    assert [third, last] == [f"epilogue.user {user.uid} {user.name} 0", f"epilogue 0 {user.name} 0"]
    assert "does not call" not in doctor.stdout and "do not run" not in doctor.stdout


def test_users_choose_no_hooks_by_the_type_of_a_job(user: User, site: Site) -> None:
    """Where ours stand in the place of the site's, jobs of all types have the site's hooks, each for what it is."""
    with arranged(site, WRAP):
        for word in ("orig", "parallel", "precancel", "user", "user.parallel"):
            done = user.job("#!/bin/sh\necho the job\n", "-vm", "off", "-T", word)
            assert done.status == 0, done.err
            assert done.out.splitlines() == [
                f"prologue 0 {user.name} 0",
                f"prologue.user {user.uid} {user.name} 0",
                "the job",
                f"epilogue.user {user.uid} {user.name} 0",
                f"epilogue 0 {user.name} 0",
            ], word
        site.assert_clean()
