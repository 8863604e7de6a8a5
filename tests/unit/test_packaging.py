"""The sdist and the wheel hold everything, and what is installed from the wheel works. Needs no network."""

from __future__ import annotations

import shutil
import site
import stat
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest
from nodesite import REPOSITORY

import vmgr
from vmgr.deploy import build

FOLDERS = (
    "bench",
    "contrib",
    "debian",
    "docs",
    "examples",
    "man",
    "mom_priv_hooks",
    "templates",
    "tests",
    "vmgr",
    "vsub",
)
FILES = (
    "CHANGELOG.md", "LICENSE", "MANIFEST.in", "README.md", "install.sh", "pyproject.toml", "quickstart.sh", "setup.cfg",
    "setup.py",
)  # fmt: skip
DATA = f"vtorque-{vmgr.__version__}.data/data"
PLACES = {
    "contrib": f"{DATA}/share/vtorque/contrib",
    "man": f"{DATA}/share/man/man1",
    "mom_priv_hooks": f"{DATA}/share/vtorque/mom_priv_hooks",
    "templates": f"{DATA}/share/vtorque/templates",
    "vmgr": "vmgr",
    "vsub": "vsub",
}
"""Folders of the repository that reach the wheel, and where they lie in it."""


class Built(NamedTuple):
    sdist: Path
    wheel: Path


def sources(folder: str) -> set[str]:
    """The files of a folder of the repository, without what tests and builds leave."""
    left = {"__pycache__", "wheels", ".pytest_cache", ".hypothesis"}
    return {
        str(path.relative_to(REPOSITORY))
        for path in (REPOSITORY / folder).rglob("*")
        if path.is_file() and not left & set(path.parts) and path.suffix != ".pyc"
    }


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Both, built as who releases them does: the wheel from the sdist."""
    base = tmp_path_factory.mktemp("dist")
    source = base / "source"
    source.mkdir()
    for name in FILES:
        shutil.copy(REPOSITORY / name, source)
    ignored = shutil.ignore_patterns("__pycache__", "wheels", ".pytest_cache", ".hypothesis")
    for name in FOLDERS:
        shutil.copytree(REPOSITORY / name, source / name, ignore=ignored)
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", base, source], check=True, capture_output=True
    )
    (sdist,), (wheel,) = base.glob("*.tar.gz"), base.glob("*.whl")
    return Built(sdist, wheel)


def test_the_sdist_is_the_whole_source(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        there = {name.partition("/")[2] for name in archive.getnames()}
        modes = {member.name.partition("/")[2]: member.mode for member in archive.getmembers()}
    wanted = set(FILES).union(*(sources(folder) for folder in FOLDERS))
    assert not wanted - there
    for name in ("install.sh", "quickstart.sh", "mom_priv_hooks/prologue", "contrib/bin/vsub"):
        assert bool(modes[name] & 0o100) == bool((REPOSITORY / name).stat().st_mode & 0o100), name
    assert not [name for name in there if "__pycache__" in name or name.endswith(".pyc")]


def test_an_sdist_can_be_installed(built: Built, tmp_path: Path) -> None:
    """What `install.sh` takes of a checkout is there, and it starts."""
    with tarfile.open(built.sdist) as archive:
        archive.extractall(tmp_path)
    (folder,) = tmp_path.iterdir()
    done = subprocess.run([folder / "install.sh", "--help"], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "") and "./install.sh [OPTION" in done.stdout
    here = build.source_at(str(REPOSITORY), vmgr.__version__, sys.executable)
    assert build.source_at(str(folder), vmgr.__version__, sys.executable).hooks == here.hooks


def test_the_wheel_has_packages_and_data(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as archive:
        there = {name for name in archive.namelist() if not name.endswith("/")}
        for folder, place in PLACES.items():
            for name in sources(folder):
                packed = f"{place}/{name.partition('/')[2]}"
                assert packed in there, packed
                assert archive.read(packed) == (REPOSITORY / name).read_bytes(), name
        entries = archive.read(f"vtorque-{vmgr.__version__}.dist-info/entry_points.txt").decode()
    assert "vsub = vsub.cli:main" in entries and "vmgr = vmgr.cli:main" in entries
    tops = {name.partition("/")[0] for name in there}
    assert tops == {"vmgr", "vsub", f"vtorque-{vmgr.__version__}.data", f"vtorque-{vmgr.__version__}.dist-info"}


def test_what_is_installed_from_the_wheel_works(built: Built, tmp_path: Path) -> None:
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    (packages,) = environment.glob("lib/python3*/site-packages")
    # what it depends on is taken from the environment of the tests
    (packages / "dependencies.pth").write_text("".join(f"{path}\n" for path in site.getsitepackages()))
    pip = [environment / "bin" / "python3", "-m", "pip", "install", "--no-index", "--no-deps", "-q"]
    subprocess.run([*pip, built.wheel], check=True, capture_output=True)
    for program in ("vsub", "vmgr"):
        done = subprocess.run([environment / "bin" / program, "--help"], capture_output=True, text=True, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        assert done.stdout.startswith(("usage: vsub", "Usage: vmgr")), done.stdout[:80]
    told = subprocess.run([environment / "bin" / "vmgr", "--version"], capture_output=True, text=True, cwd=tmp_path)
    assert told.stdout == f"vmgr, version {vmgr.__version__}\n"
    asked = "import vmgr, vsub; print(vmgr.__file__, vsub.__file__)"
    told = subprocess.run([environment / "bin" / "python3", "-c", asked], capture_output=True, text=True, cwd=tmp_path)
    assert all(path.startswith(str(packages)) for path in told.stdout.split()), told.stdout
    assert (environment / "share" / "vtorque" / "templates" / "guest" / "micro" / "user-data.j2").is_file()
    assert (environment / "share" / "man" / "man1" / "vmgr.1").is_file()
    for tree in ("templates", "contrib", "mom_priv_hooks"):
        for name in sources(tree):
            mode = (environment / "share" / "vtorque" / name).stat().st_mode
            assert bool(mode & stat.S_IXUSR) == bool((REPOSITORY / name).stat().st_mode & stat.S_IXUSR), name
