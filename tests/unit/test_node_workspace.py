"""Where a job's workspace is, by the site's pattern and what is known of the job."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from nodesite import a_user

from vmgr.config import Config, load_config
from vmgr.node.workspace import job_names, seen_at
from vmgr.paths import Installation

USER = a_user()


def site(base: Path, **settings: object) -> Config:
    install = Installation(base)
    install.config.parent.mkdir(parents=True, exist_ok=True)
    install.config.write_text(yaml.safe_dump(settings))
    return load_config(install)


@pytest.mark.parametrize(
    ("folder", "wipe", "path"),
    [
        ("/scratch/{user}/{job}", False, "/scratch/carol/12.host"),
        ("/scratch/{user}/{job}/", True, "/scratch/carol/12.host.0123"),
        ("{home}/w-{job}", True, "/home/carol/w-12.host.0123"),
        ("/scratch/{user}", False, "/scratch/carol"),
    ],
)
def test_paths(tmp_path: Path, folder: str, wipe: bool, path: str) -> None:
    config = site(tmp_path, workspace={"folder": folder, "wipe": wipe})
    names = job_names(config, config.mounts, USER, "12.host", "0123")
    assert names == ("/home/carol", "carol", "12.host", path)
    mounts = [mount.filled(names._asdict()) for mount in config.mounts]
    assert [mount.source for mount in mounts] == ["/home/carol", "/opt", path]
    assert seen_at(mounts, names) == "/workspace"


def test_one_that_no_guest_sees_is_not_made(tmp_path: Path) -> None:
    config = site(tmp_path, workspace={"folder": "/scratch/{job}", "wipe": True})
    names = job_names(config, config.mounts[:2], USER, "12.host", "0123")
    assert names.workspace is None and seen_at(config.mounts, names) is None
    copied = job_names(config, config.mounts[:2], USER, "12.host", "0123", copies=True)
    assert copied.workspace == "/scratch/12.host.0123" and seen_at(config.mounts[:2], copied) is None
    config = site(tmp_path)
    assert job_names(config, config.mounts, USER, "12.host", "0123").workspace is None


def test_members_of_an_array_and_long_ids_have_folders_of_their_own(tmp_path: Path) -> None:
    config = site(tmp_path, workspace={"folder": "/scratch/{job}"})
    ids = [f"12[{index}].server.with.a.long.name.example" for index in range(2)] + ["12[1].host"]
    paths = [job_names(config, config.mounts, USER, job_id, "0123").workspace for job_id in ids]
    assert len(set(paths)) == 3 and paths[2] == "/scratch/12[1].host"
    assert all(path is not None and path.count("/") == 2 and len(path) < 60 for path in paths)


def test_where_the_site_says_it_is_seen(tmp_path: Path) -> None:
    share = {"name": "w", "source": "{workspace}", "target": "/scratch/{job}"}
    config = site(tmp_path, workspace={"folder": "/w/{job}"}, mounts=[share])
    names = job_names(config, config.mounts, USER, "12.host", "0123")
    assert seen_at([mount.filled(names._asdict()) for mount in config.mounts], names) == "/scratch/12.host"
