"""A site to submit from: an installation, a pool, a home and a stub qsub, all below a temporary folder.

The stub is a real program that records how it was called; nothing else is replaced but where the installation lies
and what the password database says (no test ever writes into the home of the user who runs it).
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, Optional

import pytest

import vsub.cli
from vmgr.images.pool import SIDECAR, VERSION
from vmgr.jobspec import Spec, parse_spec
from vmgr.paths import Installation

REPOSITORY = Path(vsub.cli.__file__).parent.parent

STUB = """\
#!/bin/sh
# records the call and answers as told; starts as little as it can
for argument; do printf '%s\\0' "$argument"; done >{record}/argv
test -t 0 || cat >{record}/stdin
pwd >{record}/cwd
umask >{record}/umask
case $argument in
*/.vtorque/*/job)  # what a session, or a submission that failed, takes away again
    cp -r "${{argument%/*}}" {record}/submitted
    test ! -e {record}/result || cp {record}/result "${{argument%/*}}/result.json"
    ;;
esac
. {record}/answer
"""

IMAGES = {
    "micro": {"family": "micro", "distro": "SLG", "min_ram_mib": 128},
    "debian-12": {"family": "debian", "distro": "SLG", "min_ram_mib": 384, "features": ["9p", "cloud-init"]},
}


class Outcome(NamedTuple):
    """What a run of vsub gave."""

    status: int
    stdout: str
    stderr: str


class Site:
    """One temporary site."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.install = Installation(base / "prefix")
        self.home = base / "home"
        self.work = self.home / "work"
        self.record = base / "record"
        self.pool = base / "pool"
        for folder in (self.install.config.parent, self.install.libexec, self.work, self.record, self.pool):
            folder.mkdir(parents=True)
        self.qsub = base / "qsub"
        self.qsub.write_text(STUB.format(record=self.record))
        self.qsub.chmod(0o755)
        self.qstat = base / "qstat"
        self.answer(stdout="12.host\n", status=0)
        for name, fields in IMAGES.items():
            make_image(self.pool, name, fields)
        self.configure()

    def configure(self, text: str = "", *, default: Optional[str] = "micro", submit: str = "") -> None:
        """Write the configuration: what every test needs, and `text`."""
        self.install.config.write_text(
            f"submit: {{qsub: {self.qsub}, qstat: {self.qstat}{submit}}}\n"
            f"images: {{pool: {self.pool}}}\n"
            + (text or f"policy: {{img: {{default: {default or 'null'}}}, vcpus: {{max: 8}}, ram: {{max: 4G}}}}\n")
        )

    def answer(self, *, stdout: str = "", stderr: str = "", status: int = 0, signal: Optional[str] = None) -> None:
        """What the stub qsub will answer; `signal` ends it."""
        say = f"printf %s {shlex.quote(stderr)} >&2\nprintf %s {shlex.quote(stdout)}\n"
        end = f"exit {status}" if signal is None else f"kill -{signal} $$"
        (self.record / "answer").write_text(f"{say}{end}\n")

    @property
    def called(self) -> bool:
        return (self.record / "argv").exists()

    @property
    def argv_raw(self) -> list[str]:
        """The stub's arguments as they were given."""
        raw = (self.record / "argv").read_bytes().decode(errors="surrogateescape")
        return raw.split("\0")[:-1]

    @property
    def argv(self) -> list[str]:
        """The stub's arguments, the job directory written as `DIR` and the installation as `PREFIX`."""
        words = self.argv_raw
        in_directory = bool(words) and words[-1].startswith(f"{self.home}/.vtorque/")
        folder = words[-1].rpartition("/")[0] if in_directory else "\0"
        prefix = str(self.install.root)
        return [word.replace(folder, "DIR").replace(prefix, "PREFIX") for word in words]

    @property
    def stdin(self) -> bytes:
        return (self.record / "stdin").read_bytes()

    @property
    def directory(self) -> Path:
        """The one job directory."""
        (spec,) = self.home.glob(".vtorque/*/*/spec.json")
        return spec.parent

    @property
    def spec(self) -> Spec:
        path = self.directory / "spec.json"
        return parse_spec(path.read_bytes(), sha256=self.directory.name, source=str(path))

    def script(self, text: str = "echo hello\n", name: str = "job.sh") -> Path:
        path = self.work / name
        path.write_bytes(text.encode())
        return path

    def left_in_home(self) -> list[str]:
        """Everything in the home that a submission made."""
        return [str(path) for path in self.home.rglob("*") if ".vtorque" in path.parts]

    def launch(
        self, *words: str, stdin: bytes = b"", env: Optional[Mapping[str, str]] = None
    ) -> subprocess.CompletedProcess[bytes]:
        """Run vsub as a process of its own, as its launcher does."""
        return subprocess.run(
            self.command(*words),
            input=stdin,
            capture_output=True,
            cwd=self.work,
            env={**os.environ, "PWD": str(self.work), **(env or {})},
        )

    def command(self, *words: str) -> list[str]:
        return [
            sys.executable,
            "-I",
            "-c",
            f"""\
import sys
sys.path.insert(0, {str(REPOSITORY)!r})
from pathlib import Path
import vsub.cli
from vmgr.paths import Installation
from vsub.account import Account
vsub.cli.installation = lambda: Installation(Path({str(self.install.root)!r}))
vsub.cli.account = lambda: Account("carol", {os.geteuid()}, {str(self.home)!r}, "users")
sys.exit(vsub.cli.main())
""",
            *words,
        ]


def make_image(pool: Path, name: str, fields: dict[str, object]) -> None:
    """One image in a pool: its description only, which is all that a submission reads."""
    folder = pool / name / "1"
    folder.mkdir(parents=True)
    description = {
        "version": VERSION,
        "arch": "x86_64",
        "description": f"{name} for tests",
        "created": "2024-01-01T00:00:00Z",
        "added_by": "root",
        "parent": None,
        "disk": None,
        "disk_format": "qcow2",
        "virtual_size": 0,
        "kernel": "vmlinuz",
        "initrd": "initrd",
        "cmdline": "console=ttyS0",
        "features": ["9p"],
        "files": {},
        "packages": "packages.txt",
        "recipe_hash": "0" * 64,
        **fields,
    }
    (folder / SIDECAR).write_text(json.dumps(description))


class Runner:
    """Runs vsub in this process and gives what it printed."""

    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self.capfd = capfd

    def __call__(self, *words: str) -> Outcome:
        self.capfd.readouterr()
        status = vsub.cli.main(list(words))
        out, err = self.capfd.readouterr()
        return Outcome(status, out, err)
