"""Every row of `vsubrows`: qsub's arguments, the specification, the wrappers, status and messages, exactly."""

from __future__ import annotations

import os
import pty
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable

import pytest
from vsubrows import DEFAULTS, PROGRAMS, ROWS, Row, sha256
from vsubsite import Outcome, Runner, Site

from vmgr.jobspec import Spec, parse_spec
from vmgr.request import KEYS
from vsub.options import FLAGS, WITH_VALUE

Expand = Callable[[str], str]


@pytest.fixture
def expand(site: Site) -> Expand:
    """Puts what is known of the site in place of the words in angle brackets."""
    known = {
        "<home>": str(site.home),
        "<work>": str(site.work),
        "<config>": str(site.install.config),
        "<pool>": str(site.pool),
        "<qsub>": str(site.qsub),
        "<host>": os.uname().nodename,
        "<keys>": ", ".join(["off", *(f"{key}=VALUE" for key in KEYS)]),
    }

    def put_in(text: str) -> str:
        for word, value in known.items():
            text = text.replace(word, value)
        return text

    return put_in


def prepare(site: Site, row: Row) -> None:
    """What the row needs to be there."""
    if row.config or row.submit:
        site.configure(row.config, submit=row.submit)
    stdout, stderr, status = row.qsub
    site.answer(stdout=stdout, stderr=stderr, status=status)
    if row.result is not None:
        (site.record / "result").write_text(row.result)
    (site.work / "sub").mkdir()
    for name, data in {"job.sh": row.script, **row.files}.items():
        (site.work / name).write_bytes(data)


@contextmanager
def standard_input(path: Path) -> Iterator[None]:
    """A file as the standard input of this process."""
    held = os.dup(0)
    with path.open("rb") as stream:
        os.dup2(stream.fileno(), 0)
    try:
        yield
    finally:
        os.dup2(held, 0)
        os.close(held)


def run(site: Site, vsub_run: Runner, row: Row, words: list[str], monkeypatch: pytest.MonkeyPatch) -> Outcome:
    """Run vsub: in this process, or in one of its own where it becomes qsub or needs a terminal."""
    if row.terminal:
        return on_terminal(site, words)
    if row.process:
        done = site.launch(*words, stdin=row.stdin or b"", env=row.env)
        return Outcome(done.returncode, done.stdout.decode(), done.stderr.decode())
    for name, value in row.env.items():
        monkeypatch.setenv(name, value)
    stdin = site.base / "stdin"
    stdin.write_bytes(row.stdin or b"")
    with standard_input(stdin):
        return vsub_run(*words)


def on_terminal(site: Site, words: list[str]) -> Outcome:
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        site.command(*words), cwd=site.work, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE
    ) as process:
        os.close(theirs)
        assert process.stderr is not None
        error, shown = process.stderr.read(), b""
        try:
            while part := os.read(ours, 1024):
                shown += part
        except OSError:  # the other end is closed
            pass
    os.close(ours)
    return Outcome(process.returncode, shown.decode().replace("\r\n", "\n"), error.decode())


def submitted_spec(site: Site) -> tuple[Spec, Path]:
    """The specification that stood in the job directory when qsub was called, named by its hash, and a copy of it."""
    last = site.argv_raw[-1]
    match = re.fullmatch(f"{re.escape(str(site.home))}/\\.vtorque/([0-9a-z]{{16}})/([0-9a-f]{{64}})/job", last)
    assert match is not None, last
    copy = site.record / "submitted"
    spec = parse_spec((copy / "spec.json").read_bytes(), sha256=match[2], source="spec.json")
    assert spec.ruid == match[1]
    assert (copy / "key.pub").read_text().startswith(spec.ssh_public_key)
    return spec, copy


def expanded(value: Any, expand: Expand) -> Any:
    if isinstance(value, tuple):
        return tuple(expanded(part, expand) for part in value)
    return expand(value) if isinstance(value, str) else value


def as_row(spec: Spec) -> dict[str, Any]:
    """A specification as rows state it."""
    (group,) = spec.groups
    fields = {**spec._asdict(), **group._asdict()}
    for name in ("groups", "ruid", "ssh_public_key"):
        del fields[name]
    return {name: tuple(value) if isinstance(value, tuple) else value for name, value in fields.items()}


@pytest.mark.parametrize(
    "row",
    [pytest.param(row, id=name) for name, row in ROWS],
)
def test_row(site: Site, vsub_run: Runner, expand: Expand, monkeypatch: pytest.MonkeyPatch, row: Row) -> None:
    prepare(site, row)
    outcome = run(site, vsub_run, row, [expand(word) for word in row.words], monkeypatch)
    assert (outcome.status, outcome.stderr) == (row.status, expand(row.err))
    if row.out is not None:
        assert outcome.stdout == expand(row.out)
    if row.argv is None:
        assert not site.called and site.left_in_home() == []
        return
    assert site.argv == [expand(word) for word in row.argv]
    if row.spec is None:
        given = (site.record / "stdin").read_bytes()
        assert given == (row.stdin or b"") and site.left_in_home() == []
        return
    spec, copy = submitted_spec(site)
    data = row.script if row.stdin is None else row.stdin
    script = data.replace(b"\r\n", b"\n")
    expected = {**DEFAULTS, "script": sha256(script), **row.spec}
    expected = {name: expanded(value, expand) for name, value in expected.items()}
    assert as_row(spec) == expected
    if spec.script is None:
        assert not (copy / "script").exists()
    else:
        assert (copy / "script").read_bytes() == script
    directory = site.argv_raw[-1].rpartition("/")[0]
    for name, text in {**PROGRAMS, **row.programs}.items():
        text = expand(text).replace("PREFIX", str(site.install.root)).replace("DIR", directory)
        assert (copy / name).read_text() == text
    if row.qsub[2] != 0 or spec.interactive:
        assert site.left_in_home() == []


def test_every_letter_has_its_rows() -> None:
    given = {word[1] for _, row in ROWS for word in row.words if word[:1] == "-" and word[1:2].isalpha()}
    assert given >= (FLAGS | WITH_VALUE) - {"-"}
    assert len(ROWS) >= 150
