"""Many submissions at once from one user: all succeed, none shares anything with another."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from vsubsite import Site

from vmgr.config import compile_config
from vmgr.jobspec import parse_spec

SUBMISSIONS = 200
AT_ONCE = 25
"""Processes that are alive at any time; all of them work in the same `~/.vtorque`, which the first must make."""

STUB = """\
#!/bin/sh
# takes a job: notes which, and that its files are all there
for word; do :; done
folder=${{word%/*}}
for name in job key key.pub prologue script spec.json; do
    test -s "$folder/$name" || {{ echo "qsub: no $name in $folder" >&2; exit 1; }}
done
printf '%s\\n' "$folder" >>{record}/taken
echo "$$.host"
"""


@pytest.fixture
def busy_site(site: Site) -> Site:
    site.qsub.write_text(STUB.format(record=site.record))
    compile_config(site.install)
    for number in range(SUBMISSIONS):
        site.script(f"#!/bin/sh\n#PBS -N n{number}\necho {number}\n", f"{number}.sh")
    return site


def submissions(site: Site) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    for number in range(SUBMISSIONS):
        yield number, subprocess.Popen(
            site.command(f"{number}.sh"), cwd=site.work,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip


def test_two_hundred_at_once(busy_site: Site) -> None:
    running: list[tuple[int, subprocess.Popen[bytes]]] = []
    waiting = submissions(busy_site)
    done: dict[int, tuple[int, bytes, bytes]] = {}
    while len(done) < SUBMISSIONS:
        while len(running) < AT_ONCE and (started := next(waiting, None)) is not None:
            running.append(started)
        number, process = running.pop(0)
        output, error = process.communicate(timeout=120)
        done[number] = (process.returncode, output, error)
    assert {(status, error) for status, _, error in done.values()} == {(0, b"")}
    folders = (busy_site.record / "taken").read_text().split()
    assert len(folders) == len(set(folders)) == SUBMISSIONS
    base = busy_site.home / ".vtorque"
    assert {str(path.parent) for path in base.glob("*/*/spec.json")} == set(folders)
    ruids, keys, scripts, ids = set(), set(), set(), set()
    for folder in map(Path, folders):
        spec = parse_spec((folder / "spec.json").read_bytes(), sha256=folder.name, source=str(folder))
        assert spec.ruid == folder.parent.name
        ruids.add(spec.ruid)
        keys.add(spec.ssh_public_key)
        scripts.add((folder / "script").read_bytes())
        ids.add((folder.parent / "job_id").read_bytes())
        assert {path.name for path in folder.iterdir()} == {"job", "key", "key.pub", "prologue", "script", "spec.json"}
    assert ids == {output for _, output, _ in done.values()}
    assert scripts == {(busy_site.work / f"{number}.sh").read_bytes() for number in range(SUBMISSIONS)}
    assert (len(ruids), len(keys), len(ids)) == (SUBMISSIONS,) * 3
    assert len(list(base.iterdir())) == SUBMISSIONS
