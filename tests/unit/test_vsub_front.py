"""The shell front of vsub: what it hands to qsub itself is exactly what Python would hand to qsub."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
from pathlib import Path
from typing import NamedTuple, Optional

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vsubsite import REPOSITORY, Site

import vsub.cli
from vmgr.config import compile_config
from vmgr.front import front_text, write_front
from vsub.options import parse_line

PROGRAM = """\
#!/bin/sh
# stands for the Python program: records how it was called
for argument; do printf '%s\\0' "$argument"; done >{record}/python
cat >{record}/python-stdin
"""
SCRIPTS = {
    "job.sh": b"#!/bin/sh\n#PBS -l walltime=60\necho hello\n",
    "guest.sh": b"#!/bin/sh\n#PBS -v A=1\n#PBS -vm vcpus=2\necho hello\n",
    "binary": b"\x7fELF\x00\x01",
    "-vm": b"echo a script of this name\n",
}


class Front:
    """The front of a site, with programs that record in place of Python and qsub."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.path = site.base / "prefix" / "bin" / "vsub"
        self.path.parent.mkdir()
        text = (REPOSITORY / "contrib" / "bin" / "vsub").read_text()
        self.path.write_text(text.replace("@PREFIX@", str(site.install.root)))
        program = Path(site.install.program("vtorque-vsub"))
        program.write_text(PROGRAM.format(record=site.record))
        for executable in (self.path, program):
            executable.chmod(0o755)
        for name, data in SCRIPTS.items():
            (site.work / name).write_bytes(data)

    def configure(self, without_vm: str = "guest", *, engine: str = "torque") -> None:
        self.site.configure("", submit=f", without_vm: {without_vm}")
        if engine == "slurm":
            folder = self.site.base / "bin"
            folder.mkdir(exist_ok=True)
            for name in ("sbatch", "srun"):
                shutil.copy(self.site.qsub, folder / name)
            config = self.site.install.config
            config.write_text(f"engine: slurm\nslurm: {{bin: {folder}}}\n{config.read_text()}")
        write_front(compile_config(self.site.install), self.site.install)

    def __call__(self, *words: str, stdin: bytes = b"", env: Optional[dict[str, str]] = None) -> Went:
        for name in ("argv", "stdin", "python", "python-stdin"):
            (self.site.record / name).unlink(missing_ok=True)
        done = subprocess.run(
            [self.path, *words], input=stdin, capture_output=True, cwd=self.site.work, env={**os.environ, **(env or {})}
        )
        to = "python" if (self.site.record / "python").exists() else "qsub"
        file, taken = ("python", "python-stdin") if to == "python" else ("argv", "stdin")
        raw = (self.site.record / file).read_bytes().decode(errors="surrogateescape")
        return Went(to, raw.split("\0")[:-1], (self.site.record / taken).read_bytes(), done.returncode)


class Went(NamedTuple):
    """Where the front went: `qsub` or `python`, with which arguments and standard input, and the exit status."""

    to: str
    argv: list[str]
    stdin: bytes
    status: int


@pytest.fixture
def front(site: Site) -> Front:
    made = Front(site)
    made.configure()
    return made


@pytest.mark.parametrize(
    ("line", "argv"),
    [
        ("-vm off job.sh", "job.sh"),
        ("job.sh -vm off", "job.sh"),
        ("-l nodes=1 -vm off -N 'a b' job.sh -q long", "-l nodes=1 -N 'a b' job.sh -q long"),
        ("-vm off -lnodes=1:ppn=2 -vm off job.sh", "-lnodes=1:ppn=2 job.sh"),
        ("-vm off -N -vm job.sh", "-N -vm job.sh"),
        ("-vm off -v m job.sh", "-v m job.sh"),
        ("-vm off -h -V -z job.sh", "-h -V -z job.sh"),
        ("-I -vm off", "-I"),
        ("-I -x -vm off job.sh", "-I -x job.sh"),
        ("-vm off missing.sh", "missing.sh"),
        ("-vm off .", "."),
        ("-vm off binary", "binary"),
        ("-vm off -F 'a  b' job.sh", "-F 'a  b' job.sh"),
    ],
)
def test_a_job_without_guests_goes_to_qsub(front: Front, line: str, argv: str) -> None:
    assert front(*shlex.split(line)) == ("qsub", shlex.split(argv), b"", 0)


@pytest.mark.parametrize(
    "line",
    [
        "job.sh", "-vm vcpus=2 job.sh", "-vm off -vm vcpus=2 job.sh", "-vm off --wait job.sh", "-vm off --json job.sh",
        "-gf -vm off job.sh", "-vm off -- job.sh", "-vm off -hz job.sh", "-vm off guest.sh", "-vm off job.sh job.sh",
        "-vm off -y job.sh", "-vm off job.sh -N", "-vm", "--help", "-vm off -- -vm", "-vm off --about",
    ],
)  # fmt: skip
def test_everything_else_is_left_to_python(front: Front, line: str) -> None:
    assert front(*shlex.split(line)) == ("python", shlex.split(line), b"", 0)


@pytest.mark.parametrize(
    ("line", "argv"),
    [
        ("-vm off plain.sh", "--parsable plain.sh"),
        ("plain.sh -vm off", "--parsable plain.sh"),
        ("-vm off missing.sh", "--parsable missing.sh"),
    ],
)
def test_on_slurm_what_is_written_for_sbatch_goes_to_sbatch(front: Front, line: str, argv: str) -> None:
    (front.site.work / "plain.sh").write_bytes(b"#!/bin/sh\n#SBATCH --nodes=2 --comment='a b'\n")
    front.configure(engine="slurm")
    assert front(*shlex.split(line)) == ("qsub", shlex.split(argv), b"", 0)
    assert front("-vm", "off", stdin=b"#!/bin/sh\n") == ("qsub", ["--parsable"], b"#!/bin/sh\n", 0)


@pytest.mark.parametrize(
    "line",
    [
        "-vm off job.sh", "-vm off -l nodes=1 plain.sh", "-vm off -h plain.sh", "-vm off -Nx plain.sh", "-vm off -",
        "-vm off -I", "-vm off --slurm -p x plain.sh", "-vm off guest.sh",
    ],
)  # fmt: skip
def test_on_slurm_what_is_written_for_qsub_is_left_to_python(front: Front, line: str) -> None:
    (front.site.work / "plain.sh").write_bytes(b"#!/bin/sh\n#SBATCH --nodes=2\n")
    front.configure(engine="slurm")
    assert front(*shlex.split(line)) == ("python", shlex.split(line), b"", 0)


@pytest.mark.parametrize("data", [b"", b"echo hello", b"#PBS -N x\n" * 3000, b"\x00\xff\n\r\n"])
def test_standard_input_is_passed_on(front: Front, data: bytes) -> None:
    assert front("-vm", "off", stdin=data) == ("qsub", [], data, 0)
    assert front("-vm", "off", "-", stdin=data) == ("qsub", ["-"], data, 0)


def test_directives_of_ours_on_standard_input_are_left_to_python(front: Front) -> None:
    data = b"#PBS -v A=1\n#PBS -vm vcpus=2\n"
    assert front("-vm", "off", stdin=data) == ("python", ["-vm", "off"], data, 0)


def test_no_copy_of_standard_input_stays(front: Front, tmp_path: Path) -> None:
    folder = tmp_path / "tmp"
    folder.mkdir()
    front("-vm", "off", stdin=b"echo\n", env={"TMPDIR": str(folder)})
    assert list(folder.iterdir()) == []


def test_a_site_without_guests_by_default(front: Front) -> None:
    front.configure("qsub")
    assert front("job.sh").to == "qsub"
    assert front("guest.sh").to == "python"
    assert front("-vm", "vcpus=1", "job.sh").to == "python"
    assert front("-l", "nodes=1", stdin=b"echo\n") == ("qsub", ["-l", "nodes=1"], b"echo\n", 0)


def test_status_of_qsub(front: Front) -> None:
    front.site.answer(status=57)
    assert front("-vm", "off", "job.sh").status == 57


def test_a_changed_configuration_is_noticed(front: Front) -> None:
    front.site.configure("# another text\n", submit=", without_vm: qsub")
    assert front("-vm", "off", "job.sh").to == "python"


def test_without_its_file_and_with_itself_for_qsub(front: Front) -> None:
    compiled = Path(f"{front.site.install.config_file}.front")
    text = compiled.read_text()
    compiled.write_text(text.replace(str(front.site.qsub), str(front.path)))
    assert front("-vm", "off", "job.sh").to == "python"
    compiled.write_text(text.replace(str(front.site.qsub), "/nonexistent/qsub"))
    assert front("-vm", "off", "job.sh").to == "python"
    compiled.unlink()
    assert front("-vm", "off", "job.sh").to == "python"


@pytest.mark.parametrize(
    ("patterns", "to"),
    [
        ('{"*": %s}', "qsub"),
        ('{"no-such-host*": /bin/false, "*": %s, "?*": /bin/false}', "qsub"),
        ('{"no-such-host*": %s}', "python"),
        ('{"%h": %s}', "qsub"),
    ],
)
def test_qsub_by_host(front: Front, patterns: str, to: str) -> None:
    host = os.uname().nodename.partition(".")[0]
    setting = patterns.replace("%h", host).replace("%s", str(front.site.qsub))
    front.site.install.config.write_text(f"submit: {{qsub: {setting}}}\nimages: {{pool: {front.site.pool}}}\n")
    write_front(compile_config(front.site.install), front.site.install)
    assert front("-vm", "off", "job.sh").to == to


def test_the_file_is_shell_whatever_the_paths(front: Front, site: Site) -> None:
    config = compile_config(site.install)
    text = front_text(config, site.install, os.stat(config.source))
    done = subprocess.run(["sh", "-c", f'{text}printf "%s" "$VT_QSUB"'], capture_output=True, text=True, check=True)
    assert done.stdout == str(site.qsub)


WORDS = [
    "-vm", "off", "vcpus=2", "-l", "nodes=1", "-N", "x", "job.sh", "guest.sh", "-I", "-h", "-x", "-z", "-hz", "--",
    "-C", "#X", "-lwalltime=1", "--wait", "-gf", "-q", "-", "-v", "-vmx", "-V", "-y", "-vmoff", "", "a b", "-W", "-e",
]  # fmt: skip


class Became(Exception):
    """vsub would have become qsub."""


@pytest.mark.parametrize("engine", ["torque", "slurm"])
@pytest.mark.parametrize("without_vm", ["guest", "qsub"])
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(words=st.lists(st.sampled_from(WORDS), max_size=7))
def test_front_and_python_agree(
    without_vm: str, engine: str, front: Front, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    """What the front gives to qsub, or sbatch, Python would have given to it."""
    configured = front.site.base / "configured"
    if not configured.exists():
        front.configure(without_vm, engine=engine)
        configured.touch()
    if without_vm == "guest":  # else next to nothing would get past the front
        words = ["-vm", "off", *words]
    went = front(*words)
    if went.to == "python":
        assert went.argv == words
        return

    def become(argv: list[str], environment: Optional[dict[str, str]] = None) -> None:
        assert environment is None
        raise Became(argv[1:])

    monkeypatch.setattr(vsub.cli, "become", become)
    monkeypatch.setattr(
        vsub.cli, "read_standard_input", lambda **_: vsub.cli.Script(b"", "standard input", "STDIN", True)
    )
    monkeypatch.setattr(vsub.cli, "feed_standard_input", lambda _: None)
    monkeypatch.setattr(vsub.cli, "installation", lambda: front.site.install)
    monkeypatch.chdir(front.site.work)
    with pytest.raises(Became) as became:
        vsub.cli._run(parse_line(words))
    assert became.value.args[0] == went.argv


@pytest.mark.parametrize("moment", ["before mktemp", "after mktemp", "before rm"])
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("shell", ["dash", "bash --posix"])
def test_a_signal_leaves_no_copy_of_a_script(front: Front, moment: str, number: signal.Signals, shell: str) -> None:
    """It reaches the shell and what that waits for, as from a terminal."""
    front.configure("qsub")
    folder, stubs = front.site.base / "tmp", front.site.base / "stubs"
    for each in (folder, stubs):
        each.mkdir()
    when, program = moment.split()
    steps = [f'{shutil.which(program)} "$@"', f"kill -{int(number)} $PPID $$"]
    stub = stubs / program
    stub.write_text("\n".join(["#!/bin/sh", *(steps if when == "after" else steps[::-1]), ""]))
    stub.chmod(0o755)
    where = {"TMPDIR": str(folder), "PATH": f"{stubs}:{os.environ['PATH']}"}
    try:
        done = subprocess.run(
            [*shell.split(), str(front.path)], input=b"#!/bin/sh\n", capture_output=True, cwd=front.site.work,
            env={**os.environ, **where},
        )  # fmt: skip
    except FileNotFoundError:
        pytest.skip(f"{shell} is not installed")
    assert done.returncode == -number, done.stderr
    assert list(folder.iterdir()) == [] and not front.site.called
    assert not (front.site.record / "python").exists()
