"""The Debian package builds with the usual tools, offline; dpkg installs it, a job runs in a guest, dpkg removes it.

All of it happens over copies of the system's folders that only this test sees, with processes that end with it. The
batch system is the embedded one, which the package has in it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import vmgr
from vmgr.deploy.build import LAUNCHERS

from .conftest import PATIENCE_S, POOL, REPOSITORY

VERSION = vmgr.__version__
UNCOMPRESSED = "uses-no-compression-for-control-tarball,uses-no-compression-for-data-tarball"
"""What lintian says of a package that was built so for the test's sake."""
PARTS = (
    "LICENSE", "MANIFEST.in", "README.md", "contrib", "debian", "docs", "man", "mom_priv_hooks", "pyproject.toml",
    "setup.cfg", "setup.py", "templates", "vmgr", "vsub",
)  # fmt: skip
OVER = ("usr", "etc", "var", "home")
"""Folders of the system that dpkg, or a user's job, changes."""

INSTALL = r"""
set -eu
mount -t tmpfs tmpfs /mnt
for folder in $OVER; do
    mkdir "/mnt/$folder" "/mnt/$folder.work"
    mount -t overlay overlay -o "lowerdir=/$folder,upperdir=/mnt/$folder,workdir=/mnt/$folder.work" "/$folder"
done
mount -t tmpfs -o mode=755 tmpfs /run
rm -rf /etc/vtorque /var/log/vtorque /var/spool/vtorque /var/spool/vtorque-local
rm -f /usr/local/bin/vsub /usr/local/bin/vmgr /etc/profile.d/vtorque.sh  # of an installation in /opt
dpkg --no-triggers -i "$DEB" >&2
vmgr --version
vmgr config check
vsub --help | head -1
sh -n /usr/share/vtorque/mom_priv_hooks/prologue
vmgr image build --help | head -1
test -L /etc/systemd/system/timers.target.wants/vtorque-reap.timer
test ! -e /etc/systemd/system/timers.target.wants/vtorque-metrics.timer
stat -c '%U %a' /usr/lib/vtorque/venv /etc/vtorque/vtorque.yaml.compiled
dpkg --verify vtorque

printf '%s\n' "$CONFIG" >/etc/vtorque/vtorque.yaml
vmgr config compile >&2
mkdir -p /var/spool/vtorque-local/mom_priv
cp /usr/share/vtorque/mom_priv_hooks/*logue /var/spool/vtorque-local/mom_priv/
/usr/lib/vtorque/libexec/vtorque-local start >&2
useradd -m vtdeb
printf '#!/bin/sh\n#PBS -N hello\necho "$(id -un) in a guest: $(hostname)"\n' >/home/vtdeb/hello.sh
su - vtdeb -c 'vsub --wait hello.sh >&2 && cat hello.o*'
/usr/lib/vtorque/libexec/vtorque-local stop >&2

dpkg --no-triggers -r vtorque >&2
test ! -e /usr/lib/vtorque
ls -A /etc/vtorque
dpkg --no-triggers -P vtorque >&2
for left in /etc/vtorque /usr/lib/vtorque /usr/share/vtorque /usr/share/doc/vtorque /usr/bin/vsub /usr/bin/vmgr; do
    test ! -e "$left" || echo "left: $left"
done
"""


CONFIG = f"""\
engine: local
images: {{pool: {POOL}}}
hypervisor: {{allow_emulation: true}}
policy: {{img: {{default: micro}}, ram: {{default: 256M}}}}
mounts: [{{name: home, source: "{{home}}", target: "{{home}}"}}]
timeouts: {{boot: 400}}"""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package, built from a copy of the checkout."""
    if not shutil.which("dpkg-buildpackage") or not shutil.which("dh_python3"):
        pytest.skip("needs debhelper and dh-python")
    base = tmp_path_factory.mktemp("debian")
    source = base / "vtorque"
    source.mkdir()
    for part in PARTS:
        if (REPOSITORY / part).is_dir():
            made = ("wheels", ".debhelper", "vtorque") if part == "debian" else ()
            ignored = shutil.ignore_patterns("__pycache__", *made)
            shutil.copytree(REPOSITORY / part, source / part, ignore=ignored)
        else:
            shutil.copy(REPOSITORY / part, source)
    environment = {**os.environ, "DPKG_DEB_COMPRESSOR_TYPE": "none", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
    subprocess.run([source / "debian" / "fetch-wheels"], check=True, env=environment, timeout=200)
    done = subprocess.run(
        ["unshare", "--net", "dpkg-buildpackage", "-b", "-us", "-uc"],
        cwd=source, env=environment, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    (built,) = base.glob(f"vtorque_{VERSION}_*.deb")
    return built


@pytest.mark.timeout(600)
def test_what_is_in_it(package: Path) -> None:
    listed = subprocess.run(["dpkg-deb", "-c", package], capture_output=True, text=True, check=True).stdout
    modes = {line.split(None, 5)[5].partition(" -> ")[0].lstrip("."): line.split()[0] for line in listed.splitlines()}
    for tree in ("templates", "contrib/images", "mom_priv_hooks"):
        for path in (REPOSITORY / tree).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert f"/usr/share/vtorque/{path.relative_to(REPOSITORY)}" in modes
    for program in ("bin/vsub", *(name for name, _, _ in LAUNCHERS)):
        assert modes[f"/usr/lib/vtorque/{program}"] == "-rwxr-xr-x"
    for place in (
        "/etc/vtorque/vtorque.yaml", "/usr/share/man/man1/vmgr.1.gz", "/usr/share/bash-completion/completions/vmgr",
        "/lib/systemd/system/vtorque-reap.timer", "/usr/share/doc/vtorque/wheels.sha256",
    ):  # fmt: skip
        assert place in modes
    assert not [path for path in modes if path.endswith(".pyc") or path.startswith("/opt")]
    assert all(mode[5] != "w" and mode[8] != "w" for mode in modes.values() if mode[0] != "l")
    depends = subprocess.run(["dpkg-deb", "-f", package, "Depends"], capture_output=True, text=True, check=True).stdout
    assert f"python3 (>= {sys.version_info[0]}." in depends and "python3 (<<" in depends


@pytest.mark.timeout(600)
def test_it_is_installed_runs_a_job_in_a_guest_and_is_purged(package: Path) -> None:
    done = subprocess.run(
        [
            "unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "--mount-proc",
            "sh", "-c", INSTALL,
        ],
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8", "DEB": str(package), "OVER": " ".join(OVER),
             "CONFIG": CONFIG},
        capture_output=True, text=True, timeout=PATIENCE_S + 60, cwd="/",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines() == [
        f"vmgr, version {VERSION}",
        "/usr/lib/vtorque/etc/vtorque/vtorque.yaml: ok",
        "usage: vsub [options of qsub] [-vm KEY=VALUE[,KEY=VALUE...]]... [SCRIPT]",
        "Usage: vmgr image build [OPTIONS] RECIPE...",
        "root 755",
        "root 644",
        "vtdeb in a guest: vvm-1",
        "vtorque.yaml",
    ]
    assert not Path("/usr/lib/vtorque").exists() and not Path("/etc/vtorque").exists()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_lintian_finds_no_fault(package: Path) -> None:
    if not shutil.which("lintian"):
        pytest.skip("needs lintian")
    changes = next(package.parent.glob("*.changes"))
    done = subprocess.run(
        ["lintian", "--allow-root", f"--suppress-tags={UNCOMPRESSED}", changes],
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.stdout == "" and done.returncode == 0, done.stdout + done.stderr


def test_it_depends_on_what_nodes_need() -> None:
    """As `contrib/packages.txt` says; what only image builds need is suggested."""
    control = (REPOSITORY / "debian" / "control").read_text()
    binary = control.partition("\nPackage:")[2]
    named = set(re.findall(r"^ ([a-z0-9.+-]+),$", binary, re.MULTILINE))
    listed = (REPOSITORY / "contrib" / "packages.txt").read_text().splitlines()
    needed = {line.partition("#")[0].strip() for line in listed} - {"", "python3-venv"}
    assert named == needed


def test_the_changelog_has_this_version() -> None:
    first = (REPOSITORY / "debian" / "changelog").read_text().partition("\n")[0]
    assert first.startswith(f"vtorque ({VERSION}) ")
